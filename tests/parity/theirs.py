"Run the code of a peer in a process of its own, and make what it says comparable with ours."
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from drivers.common import gradients  # noqa: F401, of either side

DRIVERS = Path(__file__).parent / "drivers"


def run(driver, folder, **job):
    "Give a job to `drivers/<driver>.py`, which may import from the folder of a checkout; return its answer."
    with TemporaryDirectory() as place:
        torch.save(job, Path(place, "job.pt"))
        env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, DRIVERS / f"{driver}.py"], cwd=place, env=env, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        return torch.load(Path(place, "answer.pt"))


def randomise(model, std=.3, seed=0):
    "Draw all weights anew, biases and scales too: with biases of zero much could not differ. Padding rows stay zero."
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.data += std * torch.randn(weight.shape, generator=generator)
        if "item_emb" in name or "item_kappa" in name: weight.data[0] = 0
    return model


def one_scale(ours, theirs):
    "Put gradients by name into two flat tensors; each weight's largest counts as 1, so that small ones are compared too."
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    largest = {name: float(grad.abs().max()) for name, grad in theirs.items()}
    least = 1e-6 * max(largest.values())  # what is zero but for rounding stays so
    flat = lambda grads: torch.cat([grads[name].flatten() / max(largest[name], least) for name in sorted(theirs)])
    return flat(ours), flat(theirs)


def meant(batch, kept):
    "The items that the released draws mean to drop."
    drop = ~kept & ~batch.item_pad_mask
    drop[:, 0] = False
    return drop


def one_before(drop):
    "The items before those that are meant: these are lost in the released code, where indices collide, on a CPU."
    return F.pad(drop[:, 1:], (0, 1))


def as_released(batch, kept): return one_before(meant(batch, kept))
