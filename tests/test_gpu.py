"""On a GPU the same losses, gradients, ranks and runs as on the CPU, in 32 bits and in bf16.

Without a GPU every test is skipped. `MMSEQREC_GPU_TESTS_ON=cpu` runs the bodies on the CPU, to see that they work.
"""
import copy
import math
import os

import numpy as np
import pytest
import torch

from bench.drivers.protocol import MemoryMeter
from mmseqrec import training
from mmseqrec.blocks.losses import full_softmax_cross_entropy
from mmseqrec.core import get_device, set_seed
from mmseqrec.data.interactions import TEST, TRAIN
from mmseqrec.data.sequences import collate, position_batches, prefix_batches
from mmseqrec.evaluation import evaluate
from mmseqrec.recommender import Recommender, note_known_items
from mmseqrec.training import fit
from small_world import LEARNING, build, make_store, without_seconds

ON = os.environ.get("MMSEQREC_GPU_TESTS_ON", "cuda")
pytestmark = pytest.mark.skipif(ON == "cuda" and not torch.cuda.is_available(), reason="no GPU")

SYSTEMS = tuple(name for name in LEARNING if name not in ("content_text", "content_image", "content_msm4sr"))
PRETRAINED = tuple(name for name in SYSTEMS if build(name).has_pretraining)
systems = pytest.mark.parametrize("name", SYSTEMS)
precisions = pytest.mark.parametrize("precision", ["no", "bf16"])

# The largest error of a loss, and of a gradient as a share of its length: sums in another order, and in 32 bits the
# TensorFloat-32 of cuDNN's recurrent networks, which has 10 binary digits.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}
OF_RUNS = 2e-3  # of the losses of one run and another that should be the same: a GPU may add in another order each time
OF_BF16 = .05  # bf16 has 7 binary digits
HISTORIES = [[1, 2, 3], [7], [4, 5, 6, 6, 1, 12, 11, 10], [5, 3]]
QUIET = dict(dropout=0., attention_dropout=0.)


@pytest.fixture(scope="module")
def device(): return get_device(ON)


@pytest.fixture(scope="module")
def store(): return make_store(48)


def twins(name, store, device, dtype=torch.float32):
    "Build a system without dropout, with its interests found, and copy it to the device."
    here = build(name, **QUIET).to(dtype)
    here.start_epoch(store, 0)
    there = copy.deepcopy(here).to(device)
    for model in (here, there): note_known_items(model, store)
    return here, there


def trained(name, store, device, precision="no", options=QUIET, **settings):
    "Train a system on the device; returns the history and the model."
    model = build(name, **options)
    quick = dict(epochs=3, lr=.01, batch_size=24, patience=10, device=str(device), precision=precision, progress=False)
    return fit(model, store, **quick | settings), model


# One step

@systems
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients_equal_the_cpus(name, dtype, store, device):
    here, there = twins(name, store, device, dtype)
    make = position_batches if here.causal else lambda *how: prefix_batches(how[0], TRAIN, *how[1:])
    batch, tolerance = make(store, 32, here.max_len)[0], TOLERANCE[dtype]
    losses = [model.train().finetune_loss(batch.to(model.device))["loss"] for model in (here, there)]
    assert losses[1].device.type == device.type
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
    for loss in losses: loss.backward()
    pairs = {key: (a.grad, b.grad) for (key, a), (_, b) in zip(here.named_parameters(), there.named_parameters())}
    assert all((a is None) == (b is None) for a, b in pairs.values())
    pairs = {key: (a, b.cpu()) for key, (a, b) in pairs.items() if a is not None}
    whole = math.sqrt(sum(a.square().sum().item() for a, _ in pairs.values()))  # some gradients are 0 but for rounding
    for key, (a, b) in pairs.items(): assert (a - b).norm() <= tolerance * (a.norm() + 1e-3 * whole), key


@systems
def test_ranks_equal_the_cpus(name, store, device):
    here, there = twins(name, store, device, torch.float64)
    expected, found = (evaluate(model, store, TEST) for model in (here, there))
    assert np.array_equal(found.ranks, expected.ranks) and np.array_equal(found.top_items, expected.top_items)
    found = evaluate(there.float(), store, TEST)
    apart = np.abs(found.ranks - expected.ranks)
    assert apart.max() <= 1 and (apart > 0).mean() <= .05, "32 bits may swap neighbours, and seldom do"


@systems
def test_a_model_of_the_device_is_loaded_on_the_cpu(name, store, device, tmp_path):
    _, model = trained(name, store, device, epochs=1)
    model.save_pretrained(tmp_path / "saved")
    again = Recommender.from_pretrained(tmp_path / "saved")
    assert model.device.type == device.type and again.device.type == "cpu"
    with torch.no_grad():
        found, expected = (m.score(m.encode_sequence(collate(HISTORIES, m.max_len).to(m.device)), m.encode_items()).cpu()
                           for m in (model, again))
    assert (found - expected).norm() <= TOLERANCE[torch.float32] * expected.norm()
    tokens = model.catalogue.item_tokens
    for answer in model.recommend([[tokens[i] for i in h] for h in HISTORIES], k=3): assert len(answer.items) == 3


# A run

@systems
@precisions
def test_a_run_ends_with_finite_losses(name, precision, store, device):
    history, model = trained(name, store, device, precision, options={})
    losses = [epoch["loss"] for epoch in history.epochs]
    assert len(losses) == 3 and np.isfinite(losses).all() and losses[-1] < losses[0]
    assert model.device.type == device.type and all(x.dtype == torch.float32 for x in model.parameters())
    assert all(x.isfinite().all() for x in model.state_dict().values() if x.is_floating_point())


@pytest.mark.parametrize("name", PRETRAINED)
@precisions
def test_pretraining_ends_with_finite_losses(name, precision, store, device):
    history, model = trained(name, store, device, precision, options={}, phase="pretrain", epochs=2)
    assert np.isfinite([epoch["loss"] for epoch in history.epochs]).all() and model.device.type == device.type


@systems
def test_the_loss_in_bf16_is_close_to_that_in_32_bits(name, store, device):
    wide, narrow = (trained(name, store, device, precision)[0].epochs for precision in ("no", "bf16"))
    for a, b in zip(wide, narrow): assert b["loss"] == pytest.approx(a["loss"], rel=OF_BF16)


class Stop(Exception): pass


@systems
def test_a_resumed_run_gives_the_same_numbers(name, store, device, tmp_path, monkeypatch):
    "With dropout, stopped within an epoch: generators and averages of the device continue, too."
    noisy = {"dropout": .3, "attention_dropout": .3}
    undisturbed, _ = trained(name, store, device, options=noisy)
    other_seed, _ = trained(name, store, device, options=noisy, seed=1)
    options = dict(options=noisy, checkpoint=tmp_path / "run.safetensors", checkpoint_every=1)
    step, steps = training._train_step, []
    def stopping(*inputs):
        steps.append(1)
        if len(steps) == 4: raise Stop
        return step(*inputs)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train_step", stopping)
        with pytest.raises(Stop): trained(name, store, device, **options)
    set_seed(9)  # what was drawn in between does not matter
    resumed, _ = trained(name, store, device, **options)
    expected, found, others = ([epoch["loss"] for epoch in h.epochs] for h in (undisturbed, resumed, other_seed))
    assert found == pytest.approx(expected, rel=OF_RUNS)
    assert others != pytest.approx(expected, rel=OF_RUNS), "a wrong generator would be noticed"
    if device.type == "cpu": assert without_seconds(resumed) == without_seconds(undisturbed)


# Memory

def test_memory_of_the_full_softmax_does_not_grow_with_rows_times_items(device):
    on_gpu = device.type == "cuda"
    few, many, n_items, max_elements = (256, 4096, 200_000, 1 << 25) if on_gpu else (256, 4096, 20_000, 1 << 21)
    def peak(n_rows):
        set_seed(0)
        sequence, vectors = (torch.randn(n, 1, 32, device=device).requires_grad_() for n in (n_rows, n_items))
        target = torch.arange(n_rows, device=device)
        meter = MemoryMeter()
        meter.reset()
        full_softmax_cross_entropy(sequence, vectors, target, max_elements=max_elements).backward()
        return meter.growth()
    peak(8)
    small, large, all_scores = peak(few), peak(many), 4 * many * n_items
    assert few * n_items > max_elements, "even the few rows take several chunks"
    spare = all_scores / (16 if on_gpu else 4)  # what a process holds is known less well than what tensors take
    assert large <= small + spare, (small, large, all_scores)
