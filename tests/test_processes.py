"Two processes with half the batch each are one process with the whole: losses, gradients, runs, ranks, tables, the command."
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmseqrec.artifacts import read_json
from mmseqrec.core import each_for_itself, from_all, from_main, is_main_process, join_processes, n_processes, process_index
from mmseqrec.blocks.contrastive import gather_rows
from mmseqrec.training import process_batches, training_batches
from small_world import LEARNING, build, make_store
from two_processes import PRETRAINED

HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE))), "TQDM_DISABLE": "1"}
OWN = ("generator", "seed")  # each process has its own
CLOSE = dict(rtol=1e-5, atol=1e-5)
STEPS = [*(f"finetune {name}" for name in LEARNING), *(f"pretrain {name}" for name in PRETRAINED), "words content_unisrec",
         "words content_missrec", "legacy unisrec", "kappas missrec", "three rows content_mmsrec"]
ALONE = [f"single row {name}" for name in ("sasrec", "bert4rec", *PRETRAINED)]
QUIET = [*(f"quiet {name}" for name in ("sasrec", "missrec", "content_mp4sr", "content_mmsrec")),
         *(f"quiet pretrain {name}" for name in PRETRAINED)]

pytestmark = pytest.mark.xdist_group("processes")  # one worker starts them, once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where `two_processes.py` has written."
    folder = tmp_path_factory.mktemp("processes")
    ran = subprocess.run([sys.executable, HERE / "two_processes.py", folder], capture_output=True, text=True, timeout=300, env=ENV)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Warning" not in ran.stderr, ran.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    "For one process alone, and for both of two: `{story: {name: tensor}}`."
    def read(path):
        stories = {}
        for key, x in load_file(path).items():
            story, _, name = key.partition("|")
            stories.setdefault(story, {})[name] = x
        return stories
    return [read(folder / f"{name}.safetensors") for name in ("one", "0", "1")]


def histories(folder, story): return [read_json(folder / f"{name}.json")[story] for name in ("one", "0", "1")]


def close(a, b, but=()):
    assert a.keys() == b.keys()
    for name in a.keys() - set(but): torch.testing.assert_close(a[name], b[name], **CLOSE, msg=lambda text: f"{name}: {text}")


def equal(a, b, but=()): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a.keys() - set(but))


# One step

@pytest.mark.parametrize("story", STEPS)
def test_losses_and_gradients_are_those_of_the_whole_batch(story, found):
    one, first, second = (each[story] for each in found)
    shares, targets = [each["rows"][0] for each in (first, second)], [each["rows"][1] for each in (first, second)]
    assert sum(shares) == one["rows"][0] == one["rows"][2] and sum(targets) == one["rows"][1] and 0 < shares[1] <= shares[0]
    gradients = [name for name in one if name != "rows" and not name.startswith("loss ")]
    assert len(gradients) > 3 and sum(bool(one[name].any()) for name in gradients) > 3
    for each in (first, second): close(one, each, but=["rows"])


@pytest.mark.parametrize("story", ALONE)
def test_a_batch_with_fewer_rows_than_processes_is_computed_by_each(story, found):
    one, first, second = (each[story] for each in found)
    assert one["rows"][0] == first["rows"][0] == second["rows"][0] == 1
    for each in (first, second): close(one, each)


@pytest.mark.parametrize("story", ["unwrapped sasrec", "unwrapped content_unisrec"])
def test_a_model_taken_out_of_its_wrapper_would_be_noticed(story, found):
    "As the released code of UniSRec and MISSRec does: each process then has gradients of its own."
    one, first, second = (each[story] for each in found)
    apart = [name for name in one if name != "rows" and not name.startswith("loss ")]
    assert any((first[name] - second[name]).abs().max() > .01 for name in apart)
    assert all(any((one[name] - each[name]).abs().max() > .01 for name in apart) for each in (first, second))


# Whole runs

@pytest.mark.parametrize("story", QUIET)
def test_a_run_of_two_is_a_run_of_one(story, found, folder):
    one, first, second = (each[story] for each in found)
    close(one, first, but=OWN)
    assert equal(first, second, but=OWN)
    alone, together, other = histories(folder, story)
    assert together == other and alone[1:] == together[1:] and len(alone[0]) == len(together[0])
    for a, b in zip(alone[0], together[0]): assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("story", ["calm", "undisturbed"])
def test_with_dropout_both_have_the_same_weights_and_draw_differently(story, found, folder):
    one, first, second = (each[story] for each in found)
    assert equal(first, second, but=OWN)
    assert first["seed"] == one["seed"] != second["seed"] and not torch.equal(first["generator"], second["generator"])
    assert not equal(one, first) and histories(folder, story)[1] == histories(folder, story)[2]


@pytest.mark.parametrize("story", ["rough 3", "rough 8"])
def test_a_stopped_run_of_two_continues(story, found, folder):
    for stories in found: assert equal(stories[story], stories["calm"])
    assert histories(folder, story) == histories(folder, "calm")


def test_a_killed_run_of_two_continues_to_the_same_digits(found, folder):
    for n in (4, 3): assert "SIGKILL" in (folder / f"killed-{n}.txt").read_text()
    for r in (0, 1):
        assert equal(load_file(folder / f"killed-{r}.safetensors"), found[r + 1]["undisturbed"])
        assert read_json(folder / f"killed-{r}.json") == histories(folder, "undisturbed")[r + 1]


def test_one_file_holds_the_generators_of_both(folder):
    names = sorted(path.name for path in (folder / "two").glob("*.safetensors"))
    assert names == ["calm.safetensors", "rough-3.safetensors", "rough-8.safetensors", "undisturbed.safetensors"]
    for place, generators in (("one", ["rng.0.cpu"]), ("two", ["rng.0.cpu", "rng.1.cpu"])):
        with safe_open(folder / place / "calm.safetensors", "pt") as file:
            assert sorted(name for name in file.keys() if name.startswith("rng.")) == generators


def test_counting_needs_no_others(found, folder):
    one, first, second = (each["counting"] for each in found)
    assert equal(one, first, but=OWN) and equal(first, second, but=OWN)
    assert histories(folder, "counting")[0] == histories(folder, "counting")[1]


# What they tell each other

def test_rows_of_all_are_gathered_with_gradients(found):
    one, first, second = (each["words"] for each in found)
    rows = torch.cat([torch.arange(3.), torch.arange(4.)]).double()[:, None]
    for each in (first, second):
        assert torch.equal(each["rows"], rows) and torch.equal(each["half"], torch.ones(7, dtype=torch.bfloat16))
        assert each["odd"].tolist() == [False, True, False, False, True, False, True]
    gradient = 2 * rows * torch.arange(1., 8)[:, None]
    assert torch.equal(one["gradient"], gradient[:3])
    torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]), 2 * gradient)  # accelerate takes the mean


def test_a_coin_is_thrown_once_for_all(found):
    "MP4SR's rates of a step are those of the main process; rows are drawn by each."
    one, first, second = (each["rates"]["rates"] for each in found)
    assert torch.equal(first, second) and len(first.unique()) > 10


def test_one_process_is_alone():
    join_processes("cpu")
    assert (n_processes(), process_index(), is_main_process()) == (1, 0, True)
    assert from_all(lambda: 3) == [3] and from_main(lambda: 3) == 3
    x = torch.ones(2)
    assert gather_rows(x)[0] is x
    with each_for_itself(), pytest.raises(ZeroDivisionError): from_all(lambda: 1 / 0)
    batches = training_batches(build("sasrec"), make_store(), batch_size=16)
    for batch, (share, n_targets) in zip(batches, process_batches(batches)):
        assert torch.equal(batch.item_seq, share.item_seq) and n_targets == batch.n_targets


def test_ranks_are_shared(found):
    for stories in found:
        assert equal(stories["shared evaluation"], stories["own evaluation"]) and stories["shared evaluation"]["ranks"].min() >= 1
        assert equal(stories["shared evaluation"], found[0]["own evaluation"])


def test_features_are_encoded_by_shares(found, folder):
    "The same file as one process writes; each has encoded about half of the batches, and a finished chunk not again."
    one, first, second = (each["tables"] for each in found)
    for each in (first, second): assert equal(one, each, but=["some batches", "all batches"])
    for name in ("some", "all"):
        batches = [int(each[f"{name} batches"]) for each in (one, first, second)]
        assert batches[0] <= batches[1] + batches[2] <= batches[0] + 1 and abs(batches[1] - batches[2]) <= 2
    assert torch.equal(one["own folder"], one["all rows"])
    assert not list((folder / "two/tables").glob("*.tmp")) and len(list((folder / "two/tables").glob("*.safetensors"))) == 2


# The command

@pytest.fixture(scope="module")
def command(tmp_path_factory):
    "A run on two processes of this machine's CPU, started by accelerate."
    folder = tmp_path_factory.mktemp("command")
    words = ["-m", "mmseqrec", "run", "--device", "cpu", "--n-users", "60", "--n-items", "30", "--epochs", "2",
             "--pretrain-epochs", "1", "--systems", "sasrec", "missrec", "--out", str(folder / "run")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]  # torchrun, called so
    return folder / "run", subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300, env=ENV)


def test_the_command_runs_on_two_processes(command):
    folder, ran = command
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("Results go to") == 1 == ran.stdout.count("The report is") == ran.stdout.count("on 2 processes.")
    names = sorted(path.name for path in (folder / "models").iterdir())
    assert names == ["markov-seed0", "missrec-seed0", "popularity-seed0", "sasrec-seed0"], "no checkpoint stays"
    assert (folder / "report.html").stat().st_size > 10_000
    for name in names: assert read_json(folder / "models" / name / "result.json")["n_items"] <= 30
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.partial"))
