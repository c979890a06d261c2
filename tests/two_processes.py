"""What one process does, and two together do: `python two_processes.py FOLDER` writes `FOLDER/one`, `FOLDER/0`, `FOLDER/1`.

Everything is imported once; the two are forked by accelerate and talk through gloo."""
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accelerate import debug_launcher
from safetensors.torch import save_file

import mmseqrec.training as training
from mmseqrec.blocks.contrastive import gather_rows
from mmseqrec.core import each_for_itself, from_all, from_main, is_main_process, join_processes, n_processes, process_index
from mmseqrec.data.interactions import TEST, VALID
from mmseqrec.evaluation import evaluate
from mmseqrec.features import encoders
from mmseqrec.models import missrec, mp4sr, unisrec
from mmseqrec.training import History, fit, process_batches, training_batches
from small_world import LEARNING, build, make_catalogue, make_store, weights, without_seconds

PRETRAINED = ("content_unisrec", "content_mp4sr", "content_msm4sr", "content_mmsrec", "content_missrec")
QUIET = dict(dropout=0., attention_dropout=0.)  # MMSRec hides its next item only, BERT4Rec too
QUICK = dict(epochs=3, batch_size=17, lr=.01, device="cpu", progress=False, seed=4, patience=1)
WORDS = dict(word_drop_share=1.)


RATES = []  # that MP4SR has drawn


def second_column(item_pad_mask, rate):
    "Drop the second item of each row: a disturbance that does not depend on where a row is computed."
    RATES.append(rate)
    drop = torch.zeros_like(item_pad_mask)
    drop[:, 1:2] = True
    return drop & ~item_pad_mask


def first_column(item_pad_mask, rate):
    "Let the streams of the first item of each row change places."
    RATES.append(rate)
    swap = torch.zeros_like(item_pad_mask)
    swap[:, 0] = True
    return swap


def every_item(item_pad_mask, rate):
    "Let every item speak its shortened text."
    return ~item_pad_mask


# One step

def one_step(name, phase, batch_size=17, unwrapped=False, **options):
    "Take a step that moves nothing; returns the losses of the whole batch and all gradients."
    model, store = build(name, **QUIET | options).double(), make_store(60, seed=2)
    accelerator = training._accelerate("cpu", "no")
    training._start_epoch(model, store, 0)
    wrapped, optimizer = training._prepare(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.), store, phase)
    batches, history = training_batches(model, store, phase, batch_size), History()
    place = next((place for place, group in enumerate(batches.groups) if len(group) % 2), 0)  # the shares are uneven
    share, = process_batches(batches[place:place + 1])
    training._train_step(accelerator, model if unwrapped else wrapped, optimizer, phase, None, history, share)
    training._settle(history)
    losses = {f"loss {key}": torch.tensor(total / history.n_targets, dtype=torch.double) for key, total in history.sums.items()}
    rows = {"rows": torch.tensor([len(share[0]), share[0].n_targets, len(batches.groups[place])])}
    return losses | rows | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def steps():
    "One step of every system in every phase."
    found = {f"finetune {name}": one_step(name, "finetune") for name in LEARNING}
    found |= {f"pretrain {name}": one_step(name, "pretrain") for name in PRETRAINED}
    for name in ("content_unisrec", "content_missrec"): found[f"words {name}"] = one_step(name, "pretrain", **WORDS)
    found["legacy unisrec"] = one_step("content_unisrec", "pretrain", released=("false_negatives",))
    found["kappas missrec"] = one_step("content_missrec", "pretrain", candidate_fusion="per_item")
    for name in ("sasrec", "bert4rec"): found[f"single row {name}"] = one_step(name, "finetune", 1)
    for name in PRETRAINED: found[f"single row {name}"] = one_step(name, "pretrain", 1)
    found["three rows content_mmsrec"] = one_step("content_mmsrec", "pretrain", 3)
    found["unwrapped sasrec"] = one_step("sasrec", "finetune", unwrapped=True)
    found["unwrapped content_unisrec"] = one_step("content_unisrec", "pretrain", unwrapped=True)
    return found


# Whole runs

def plain(history): return json.loads(json.dumps([without_seconds(history), history.best_epoch, history.finished]))


def run(name, phase="finetune", path=None, options=QUIET, **settings):
    "Train; returns weights, history and the state of the generator."
    model = build(name, **options)
    if options.get("dropout") == 0: model.double()
    store = make_store(60, seed=2)
    history = fit(model, store, phase, checkpoint=path, **QUICK | settings)
    generator = {"generator": torch.get_rng_state(), "seed": torch.tensor(torch.initial_seed())}
    return weights(model) | generator | {"ranks": torch.from_numpy(evaluate(model, store, TEST).ranks)}, plain(history)


class Stop(Exception): pass


def stopping(n):
    "Raise before the n-th optimiser step, on every process."
    left, original = [n], training._train_step
    def limited(*args):
        left[0] -= 1
        if left[0] < 0: raise Stop
        return original(*args)
    return patch.object(training, "_train_step", limited)


def quiet_runs():
    "Runs without dropout."
    found = {f"quiet {name}": run(name) for name in ("sasrec", "missrec", "content_mp4sr", "content_mmsrec")}
    found |= {f"quiet pretrain {name}": run(name, "pretrain") for name in PRETRAINED}
    return found | {"counting": run("markov", options={})}


def noisy_runs(folder):
    "Runs with dropout, also stopped and continued."
    noisy = dict(options=dict(dropout=.3), checkpoint_every=2)
    found = {"calm": run("content_missrec", "pretrain", folder / "calm.safetensors", **noisy)}
    for n in (3, 8):
        with stopping(n):
            try: run("content_missrec", "pretrain", folder / f"rough-{n}.safetensors", **noisy)
            except Stop: pass
            else: raise AssertionError("it was not stopped")
        found[f"rough {n}"] = run("content_missrec", "pretrain", folder / f"rough-{n}.safetensors", **noisy)
    found["undisturbed"] = run("content_both", path=folder / "undisturbed.safetensors", **noisy)
    return found


# What processes say to each other

def words():
    "Gather rows of different number and type; errors travel; what one does alone does not wait."
    r, n = process_index(), n_processes()
    assert [is_main_process(), from_main(process_index), from_all(process_index)] == [r == 0, 0, list(range(n))]
    x = torch.arange(3. + r)[:, None].double().requires_grad_()
    odd = torch.arange(3 + r) % 2 == 1
    rows, is_odd, half = gather_rows(x, odd, torch.ones(3 + r, dtype=torch.bfloat16))
    (rows.square() * torch.arange(1., len(rows) + 1)[:, None]).sum().backward()
    for work in (from_all, from_main):
        try: work(lambda: 1 / (r - r if n == 1 or work is from_main else r - 1))
        except ZeroDivisionError: pass
        else: raise AssertionError("the error of one was not raised on all")
    if is_main_process():
        with each_for_itself(): assert (n_processes(), from_all(process_index), gather_rows(x)) == (1, [0], (x,))
    with each_for_itself(False): assert n_processes() == n
    return {"rows": rows.detach(), "odd": is_odd, "half": half, "gradient": x.grad}


class Reader:
    "Counts letters; a text that begins with ! cannot be opened, one with # has no finite feature."
    kind, name, fingerprint, size, pooling, n_batches = "text", "letters", "0" * 16, 3, "mean", 0
    def key(self, text): return encoders.fingerprint(text)
    def length(self, text): return len(text)
    def read(self, text):
        if text.startswith("!"): raise OSError("cannot be opened")
        return text
    def encode_batch(self, texts):
        self.n_batches += 1
        if any(text.startswith("#") for text in texts): return np.full((len(texts), 3), np.nan)
        return np.array([[len(text), text.count("a"), text.count("e")] for text in texts], np.float32)


def tables(folder):
    "Encode texts into one table, and add some; each process encodes its share of the batches."
    texts = [word * (n + 1) for n in range(9) for word in ("apple", "pear", "banana", "!melon")]
    reader, found = Reader(), {}
    for name, some in (("some", texts[:20]), ("all", texts)):
        table = encoders.encode_table(some, reader, folder / "tables", chunk_size=4, progress=False)
        found |= {f"{name} rows": torch.from_numpy(table.take()), f"{name} index": torch.from_numpy(table.index),
                  f"{name} batches": torch.tensor(reader.n_batches),
                  f"{name} file": torch.frombuffer(bytearray(table.path.read_bytes()), dtype=torch.uint8)}
        assert len(table.report) == sum(text.startswith("!") for text in some)
    alone = encoders.encode_table(texts, reader, folder / f"tables-{process_index()}", chunk_size=4, progress=False)
    found["own folder"] = torch.from_numpy(alone.take())
    try: encoders.encode_table(["fig", *(f"#{n}" for n in range(2))], reader, folder / "tables", chunk_size=1, progress=False)
    except ValueError as error: assert "not a number" in str(error)
    else: raise AssertionError("a feature that is no number was kept")
    return found


def everything(folder):
    "Do all of it; process r writes `folder/r.safetensors` and `folder/r.json`, the only process `folder/one...`."
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    join_processes("cpu")
    own = folder / ("one" if n_processes() == 1 else "two")
    own.mkdir(exist_ok=True)
    draws = dict(draw_item_drop=second_column, draw_word_drop=every_item)
    with patch.multiple(unisrec, **draws), patch.multiple(missrec, **draws), \
            patch.multiple(mp4sr, draw_item_drop=second_column, draw_swaps=first_column):
        found, trained = steps(), quiet_runs()
    trained |= noisy_runs(own)
    model, store = build("missrec"), make_store(60, seed=2)
    shared, alone = (evaluate(model, store, VALID, batch_size=7, shared=each) for each in (True, False))
    found |= {name: tensors for name, (tensors, _) in trained.items()}
    found |= {"words": words(), "tables": tables(own), "rates": {"rates": torch.tensor(RATES)},
              "shared evaluation": {"ranks": torch.from_numpy(shared.ranks), "top": torch.from_numpy(shared.top_items)},
              "own evaluation": {"ranks": torch.from_numpy(alone.ranks), "top": torch.from_numpy(alone.top_items)}}
    name = str(process_index()) if n_processes() > 1 else "one"
    save_file({f"{story}|{key}": x.contiguous().clone() for story, tensors in found.items() for key, x in tensors.items()},
              folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({story: history for story, (_, history) in trained.items()}))


def killed(folder, n):
    "Continue the run `undisturbed`; process 1 is killed in the n-th step."
    torch.set_num_threads(1)
    join_processes("cpu")
    if process_index() == 1:
        left, original = [n], training._train_step
        def dying(*args):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)
        training._train_step = dying
    tensors, history = run("content_both", path=folder / "killed.safetensors", options=dict(dropout=.3), checkpoint_every=2)
    save_file(tensors, folder / f"killed-{process_index()}.safetensors")
    (folder / f"killed-{process_index()}.json").write_text(json.dumps(history))


def main(folder):
    seconds = {}
    def timed(name, work):
        start = time.perf_counter()
        try: work()
        finally: seconds[name] = round(time.perf_counter() - start, 2)
    timed("one", lambda: everything(folder))
    timed("two", lambda: debug_launcher(everything, (folder,), num_processes=2))
    for n in (4, 3):
        try: timed(f"killed {n}", lambda: debug_launcher(killed, (folder, n), num_processes=2))
        except Exception as error: (folder / f"killed-{n}.txt").write_text(str(error))
    timed("continued", lambda: debug_launcher(killed, (folder, 10**9), num_processes=2))
    print(seconds)


if __name__ == "__main__": main(Path(sys.argv[1]))
