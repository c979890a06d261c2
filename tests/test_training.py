"Training against a loop by hand; the same digits twice; killed runs that continue to the digits of undisturbed ones."
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import mmseqrec.training as training
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore, position_batches, prefix_batches, training_windows
from mmseqrec.evaluation import evaluate
from mmseqrec.training import History, fit, load_checkpoint, plot_fit, run_identity, save_checkpoint, training_batches
from small_world import (COUNTING, LEARNING, V, build, make_catalogue, make_store, ring_store, same, weights, without_seconds)

learning = pytest.mark.parametrize("name", LEARNING)
QUICK = dict(epochs=3, batch_size=16, lr=.01, device="cpu", progress=False)


# Learning

def eight_sequences():
    "Eight users, five events each, no two histories alike; nothing is held out."
    rng = np.random.default_rng(0)
    items = np.concatenate([[[user + 1, *rng.integers(1, V + 1, 4)]] for user in range(8)]).astype(np.int32)
    return SequenceStore(items.ravel(), np.arange(0, 41, 5), np.full(40, TRAIN, np.int8), V)


@learning
def test_eight_sequences_are_learned_by_heart(name):
    store = eight_sequences()
    model = build(name, make_catalogue(whole=True), dropout=0., attention_dropout=0.)
    history = fit(model, store, epochs=100, batch_size=32, lr=.02, device="cpu", progress=False)
    batch, = prefix_batches(store, TRAIN, 100, model.max_len)
    best = model.score(model.encode_sequence(batch), model.encode_items()).argmax(1) + 1
    assert (best == batch.pos_item).float().mean() >= .95
    assert history.epochs[0]["loss"] > 1.5 and history.epochs[-1]["loss"] < .2


@pytest.mark.parametrize("name", ["sasrec", "content_both"])
def test_a_ring_is_understood(name):
    "Next steps that were held out are found, not only what was seen."
    model = build(name, make_catalogue(whole=True), dropout=.1)
    fit(model, ring_store(24), epochs=40, batch_size=32, lr=.02, device="cpu", progress=False, patience=40)
    assert evaluate(model, ring_store(24), TEST).metrics(ks=(1,))["recall@1"] > .9


def by_hand(model, store, epochs, batch_size, lr, max_grad_norm, seed):
    "The loop, with Adam and clipping written out."
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads.")]
    first, second, step = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters], 0
    losses = []
    for epoch in range(epochs):
        model.start_epoch(store, epoch)
        total = count = 0
        for batch in training_batches(model, store, "finetune", batch_size, seed, epoch):
            loss = model.finetune_loss(batch)["loss"]
            gradients = torch.autograd.grad(loss, parameters)
            length = math.sqrt(sum(g.square().sum().item() for g in gradients))
            factor, step = min(1, max_grad_norm / (length + 1e-6)), step + 1
            for p, g, m, v in zip(parameters, gradients, first, second):
                m.mul_(.9).add_(g * factor, alpha=.1)
                v.mul_(.999).add_((g * factor).square(), alpha=.001)
                p.data -= lr * (m / (1 - .9 ** step)) / ((v / (1 - .999 ** step)).sqrt() + 1e-8)
            total, count = total + loss.item() * batch.n_targets, count + batch.n_targets
        losses.append(total / count)
    return losses


@learning
def test_fit_is_the_loop_by_hand(name):
    store = make_store(held_out=False)
    slow, fast = (build(name, dropout=0., attention_dropout=0.).double() for _ in range(2))
    losses = by_hand(slow, store, epochs=4, batch_size=20, lr=.01, max_grad_norm=.5, seed=3)
    history = fit(fast, store, epochs=4, batch_size=20, lr=.01, max_grad_norm=.5, seed=3, device="cpu", progress=False)
    np.testing.assert_allclose([epoch["loss"] for epoch in history.epochs], losses, rtol=0, atol=1e-6)
    for (key, a), b in zip(slow.named_parameters(), fast.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=key)


@learning
def test_prefixes_and_positions_give_the_same_loss_and_gradients(name):
    store = make_store(40, longest=9)  # no history is longer than max_len = 10
    model = build(name, dropout=0., attention_dropout=0.).double()
    if not model.causal: pytest.skip("not causal: it has no position rows")
    found = []
    for batches in (prefix_batches(store, TRAIN, 10_000, model.max_len), position_batches(store, 10_000, model.max_len)):
        batch, = batches
        loss = model.finetune_loss(batch)["loss"]
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)  # heads are for pre-training
        found.append((loss, [x for x in gradients if x is not None], batch.n_targets))
    (a, a_gradients, n), (b, b_gradients, m) = found
    assert n == m == len(store.rows(TRAIN))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for x, y in zip(a_gradients, b_gradients): torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_batches_fit_the_phase_and_the_model():
    store, model = make_store(40), build("sasrec")
    assert training_batches(model, store)[0].positions is not None
    model.causal = False
    assert training_batches(model, store)[0].positions is None
    for batch in training_batches(model, store, "pretrain", 8): assert len(set(batch.user.tolist())) == len(batch)


@pytest.mark.parametrize("batch_size", [12, 16, 40, 10_000])
def test_the_number_of_steps_is_targets_over_batch_size(batch_size):
    store, model = make_store(50, longest=12), build("sasrec")
    total = len(store.rows(TRAIN))
    assert total / math.ceil(total / batch_size) >= training_windows(store, model.max_len)[2].max(), "windows fit into a batch"
    for epoch in range(5):
        batches = training_batches(model, store, batch_size=batch_size, epoch=epoch)
        assert len(batches) == math.ceil(total / batch_size) and sum(batch.n_targets for batch in batches) == total
    counted, step = [], training._train_step
    def counting(*args):
        counted.append(1)
        return step(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_train_step", counting)
        fit(model, store, **QUICK | {"epochs": 2, "batch_size": batch_size})
    assert len(counted) == 2 * math.ceil(total / batch_size)


def test_frozen_weights_stay():
    model = build("content_both")
    model.content.requires_grad_(False)
    before = weights(model)
    fit(model, make_store(), **QUICK)
    for key, x in model.named_parameters(): assert torch.equal(x, before[key]) == key.startswith("content"), key


def test_weight_decay_and_clipping_do_something():
    lengths = {}
    for key, options in {"plain": {}, "adam": {"weight_decay": .1}, "adamw": {"weight_decay": .1, "decoupled": True},
                         "clipped": {"max_grad_norm": 1e-3}}.items():
        model = build("sasrec", dropout=0., attention_dropout=0.)
        fit(model, make_store(held_out=False), **QUICK, **options)
        lengths[key] = sum(p.detach().square().sum().item() for p in model.parameters())
    assert len(set(lengths.values())) == 4 and lengths["adamw"] < lengths["plain"]


# Choosing the best epoch

def scripted(monkeypatch, values):
    "Let validation say `values`, one after the other; returns the weights that it saw."
    seen, values = [], iter(values)
    def validate(model, store, metric):
        seen.append(weights(model))
        return next(values)
    monkeypatch.setattr(training, "_validate", validate)
    return seen


@pytest.mark.parametrize("patience, values, best", [
    (1, [.1, .2, .2], 1), (2, [.1, .3, .2, .3], 1), (3, [.5, .1, .1, .1], 0), (2, [.1, .0, .2, .0, .1], 2), (0, [.1], 0)])
def test_patience(monkeypatch, patience, values, best):
    seen, model = scripted(monkeypatch, values), build("sasrec")
    history = fit(model, make_store(), **QUICK | {"epochs": 50}, patience=patience)
    assert history.finished and history.best_epoch == best and history.best_value == values[best]
    assert [epoch["ndcg@10"] for epoch in history.epochs] == values
    assert same(weights(model), seen[best]) and not model.training


def test_the_last_epoch_may_be_the_best(monkeypatch):
    seen, model = scripted(monkeypatch, [.1, .2, .3]), build("sasrec")
    history = fit(model, make_store(), **QUICK)
    assert history.best_epoch == 2 and len(history.epochs) == 3 and same(weights(model), seen[2])


def test_without_validation_every_epoch_is_trained_and_the_last_is_kept():
    model, store = build("sasrec"), make_store(held_out=False)
    assert len(store.rows(VALID)) == 0
    history = fit(model, store, **QUICK | {"epochs": 6}, patience=1)
    assert len(history.epochs) == 6 and history.best_epoch == 5 and all("ndcg@10" not in epoch for epoch in history.epochs)
    longer = build("sasrec")
    fit(longer, store, **QUICK | {"epochs": 5}, patience=1)
    assert not same(weights(longer), weights(model))


def test_the_metric_is_the_one_that_evaluate_finds():
    model, store = build("content_both"), make_store(40)
    history = fit(model, store, **QUICK, metric="recall@3")
    expected = evaluate(model, store, VALID).metrics(ks=(3,))["recall@3"]
    assert history.best_value == pytest.approx(expected, abs=1e-12) == history.epochs[history.best_epoch]["recall@3"]
    with pytest.raises(ValueError, match="unknown metric 'hits@3'"): fit(model, store, **QUICK, metric="hits@3")


def test_no_epochs_change_nothing(tmp_path):
    model = build("sasrec")
    before = weights(model)
    assert fit(model, make_store(), **QUICK | {"epochs": 0}).epochs == [] and same(weights(model), before)


@pytest.mark.parametrize("name", COUNTING)
def test_counting_models_count_once(name):
    model, store = build(name, counted=False), make_store()
    history = fit(model, store, **QUICK)
    assert history.finished and len(history.epochs) == 1 and history.best_epoch == 0
    assert history.best_value == pytest.approx(evaluate(model, store, VALID).metrics()["ndcg@10"], abs=1e-12)
    assert same(weights(model), weights(build(name, store=store)))


# The same digits twice

@learning
def test_the_same_seed_gives_the_same_digits(name):
    store, found = make_store(), []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = build(name, dropout=.3, attention_dropout=.3)
        set_seed(noise)  # whatever was drawn before does not matter
        found.append((without_seconds(fit(model, store, **QUICK, seed=seed)), weights(model)))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])
    assert found[0][0] != found[2][0]


def test_the_loss_is_weighted_by_targets():
    "Batches of different size: the epoch's loss is the mean over targets, not over batches."
    store, model = make_store(30, longest=12), build("sasrec", dropout=0., attention_dropout=0.)
    history = fit(model, store, **QUICK | {"epochs": 1, "lr": 0., "batch_size": 13})
    losses = [(model.finetune_loss(batch)["loss"].item(), batch.n_targets) for batch in training_batches(model, store, batch_size=13)]
    assert len({n for _, n in losses}) > 1
    assert history.epochs[0]["loss"] == pytest.approx(sum(x * n for x, n in losses) / sum(n for _, n in losses), abs=1e-6)


# Killed runs

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_runs_continue_to_the_same_digits(tmp_path):
    """Trainings killed in a step, while a checkpoint is written, around its renaming, while validating; encodings likewise.
    The script is a process of its own; this process finds its digits, too."""
    import killed_runs
    here, folder = Path(__file__).parent, tmp_path / "killed"
    folder.mkdir()
    ran = subprocess.run([sys.executable, here / "killed_runs.py", folder], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here)))})
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    for kind, stories in results.items():
        for name, lives in stories.items():
            assert "result" in lives[-1], f"{kind}, {name}: {lives[-1]}"
            assert all(life == {"signal": signal.SIGKILL} for life in lives[:-1]), f"{kind}, {name}: {lives[:-1]}"
            assert lives[-1] == stories["undisturbed"][-1], f"{kind}, {name}: other numbers than undisturbed"
        assert len(stories) > 2
    undisturbed = results["training"]["undisturbed"][-1]["result"]
    assert undisturbed["finished"] and undisturbed["best_epoch"] < len(undisturbed["epochs"]) - 1, "early stopping is tested too"
    assert killed_runs.train(tmp_path) == undisturbed


class Stop(Exception): pass


def stopping(monkeypatch, step):
    "Raise before the n-th optimiser step."
    left, original = [step], training._train_step
    def limited(*args):
        left[0] -= 1
        if left[0] < 0: raise Stop
        return original(*args)
    monkeypatch.setattr(training, "_train_step", limited)


@learning
@pytest.mark.parametrize("step", [2, 9])
def test_a_stopped_run_continues(name, step, tmp_path, monkeypatch):
    store, options = make_store(40), QUICK | {"checkpoint_every": 2}
    calm = build(name, dropout=.3)
    expected = fit(calm, store, **options, checkpoint=tmp_path / "calm.safetensors")
    rough = build(name, dropout=.3)
    with monkeypatch.context() as patch:
        stopping(patch, step)
        with pytest.raises(Stop): fit(rough, store, **options, checkpoint=tmp_path / "rough.safetensors")
    rough = build(name, seed=99, dropout=.3)  # its weights do not matter: the checkpoint has them
    history = fit(rough, store, **options, checkpoint=tmp_path / "rough.safetensors")
    assert without_seconds(history) == without_seconds(expected) and same(weights(rough), weights(calm))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm.safetensors", "rough.safetensors"]


def test_an_epoch_starts_once(tmp_path, monkeypatch):
    "`start_epoch` comes before the first step of each epoch, and not again where an epoch is continued."
    model, store, path, calls = build("sasrec"), make_store(40), tmp_path / "run.safetensors", []
    monkeypatch.setattr(type(model), "start_epoch", lambda self, store, epoch: calls.append(epoch), raising=True)
    steps = len(training_batches(model, store, batch_size=16))
    assert steps > 3
    with monkeypatch.context() as patch:
        stopping(patch, steps + 2)
        with pytest.raises(Stop): fit(model, store, **QUICK, checkpoint=path, checkpoint_every=1)
    assert calls == [0, 1]
    fit(model, store, **QUICK, checkpoint=path, checkpoint_every=1)
    assert calls == [0, 1, 2]


def test_checkpoints_do_not_change_the_run(tmp_path):
    plain, written = build("sasrec"), build("sasrec")
    a = fit(plain, make_store(), **QUICK)
    b = fit(written, make_store(), **QUICK, checkpoint=tmp_path / "run.safetensors", checkpoint_every=1)
    assert without_seconds(a) == without_seconds(b) and same(weights(plain), weights(written))


def test_more_epochs_continue_a_run(tmp_path, monkeypatch):
    store, path = make_store(40), tmp_path / "run.safetensors"
    whole = build("sasrec")
    expected = fit(whole, store, **QUICK | {"epochs": 5})
    parts = build("sasrec")
    for epochs in (2, 5): history = fit(parts, store, **QUICK | {"epochs": epochs}, checkpoint=path)
    assert without_seconds(history) == without_seconds(expected) and same(weights(parts), weights(whole))
    stopping(monkeypatch, 0)  # a finished run takes no step
    again = build("sasrec", seed=5)
    assert without_seconds(fit(again, store, **QUICK | {"epochs": 5}, checkpoint=path)) == without_seconds(expected)
    assert same(weights(again), weights(whole)) and not again.training


def test_patience_survives_resuming(tmp_path, monkeypatch):
    "Stopped after each epoch; the counter goes on, and the best weights are those of the second epoch."
    values, path, model = [.1, .4, .3, .2, .3], tmp_path / "run.safetensors", build("sasrec")
    with monkeypatch.context() as patch:
        seen = scripted(patch, values)
        for epoch in range(1, 51):
            history = fit(model, make_store(), **QUICK | {"epochs": epoch}, patience=3, checkpoint=path)
            if history.finished: break
    assert epoch == 5 and history.best_epoch == 1 and history.best_value == .4 and same(weights(model), seen[1])


OTHERS = {
    "seed": dict(seed=1), "learning rate": dict(lr=.02), "batch size": dict(batch_size=17), "weight decay": dict(weight_decay=.1),
    "decoupled": dict(decoupled=True), "clipping": dict(max_grad_norm=1.), "metric": dict(metric="recall@10"),
    "patience": dict(patience=3), "precision": dict(precision="bf16"),
}
OTHER_MODELS = {
    "class": lambda: build("sasrec"), "size": lambda: build("content_both", hidden_size=8), "modality": lambda: build("content_text"),
    "dropout": lambda: build("content_both", dropout=.4), "heads": lambda: build("content_both", n_heads=4),
    "temperature": lambda: build("content_both", temperature=.5),
    "features": lambda: build("content_both", make_catalogue(seed=1)),
    "items": lambda: build("content_both", replace(make_catalogue(), item_tokens=["[PAD]", *(f"x-{i}" for i in range(V))])),
}


@pytest.fixture(scope="module")
def run_of_another(tmp_path_factory):
    path = tmp_path_factory.mktemp("another") / "run.safetensors"
    fit(build("content_both"), make_store(), **QUICK | {"epochs": 1}, checkpoint=path)
    return path


@pytest.mark.parametrize("what", [*OTHERS, *OTHER_MODELS, "events", "stages", "users"])
def test_a_checkpoint_of_another_run_is_refused(run_of_another, what):
    model, store, options = build("content_both"), make_store(), QUICK
    if what in OTHERS: options = QUICK | OTHERS[what]
    if what in OTHER_MODELS: model = OTHER_MODELS[what]()
    if what == "events": store = make_store(seed=1)
    if what == "stages": store = replace(store, stage=np.where(store.stage == VALID, TEST, store.stage).astype(np.int8))
    if what == "users": store = replace(store, offsets=np.insert(store.offsets, 1, 1))  # the first event is another user's
    before = weights(model)
    with pytest.raises(ValueError, match="run.safetensors belongs to a run with other data or settings; delete it or choose"):
        fit(model, store, **options, checkpoint=run_of_another)
    assert same(weights(model), before)


def test_its_own_checkpoint_is_not_refused(run_of_another):
    assert len(fit(build("content_both", seed=8), make_store(), **QUICK | {"epochs": 1}, checkpoint=run_of_another).epochs) == 1


@pytest.mark.parametrize("how", ["empty", "torn", "text", "changed header", "other tensors", "weights of a model"])
def test_damaged_checkpoints_get_one_sentence(how, tmp_path):
    path, model, store = tmp_path / "run.safetensors", build("sasrec"), make_store()
    fit(model, store, **QUICK | {"epochs": 1}, checkpoint=path)
    whole = path.read_bytes()
    if how == "empty": path.write_bytes(b"")
    if how == "torn": path.write_bytes(whole[:len(whole) // 2])
    if how == "text": path.write_text("not a checkpoint")
    if how == "changed header": path.write_bytes(b"\xff" * 8 + whole[8:])
    if how == "other tensors":
        from safetensors.torch import save_file
        save_file({"x": torch.zeros(2)}, path)
    if how == "weights of a model":
        model.save_pretrained(tmp_path / "saved")
        path.write_bytes((tmp_path / "saved/model.safetensors").read_bytes())
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match="run.safetensors cannot be read as a checkpoint .*; delete it to start anew"):
        fit(build("sasrec"), store, **QUICK, checkpoint=path)
    assert path.read_bytes() == damaged, "a file that is not understood is not overwritten"


def test_checkpoints_hold_everything_and_no_pickle(tmp_path, monkeypatch):
    "Weights, best weights, optimiser, generator and history come back; `torch.load` is never called."
    import pickle
    model, path = build("sasrec"), tmp_path / "run.safetensors"
    optimizer = torch.optim.Adam(model.parameters(), lr=.01)
    model.finetune_loss(prefix_batches(make_store(), TRAIN, 9, 10)[0])["loss"].backward()
    optimizer.step()
    history = History(epoch=3, step=4, sums={"loss": 1.5}, n_targets=7, best_value=.25, best_epoch=1,
                      epochs=[{"epoch": 0, "loss": 1 / 3, "seconds": .1}], seconds=.5)
    best = {key: x + 1 for key, x in weights(model).items()}
    save_checkpoint(path, model, optimizer, history, best, "mark", {"scale": 65536.0})
    draws = torch.rand(5)
    def refuse(*_, **__): raise AssertionError("a pickle is read")
    for owner, function in ((torch, "load"), (pickle, "load"), (pickle, "loads")): monkeypatch.setattr(owner, function, refuse)
    other = build("sasrec", seed=4)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=.01)
    found = load_checkpoint(path, other, other_optimizer, "mark")
    assert found[0] == history and same(found[1], best) and found[2] == {"scale": 65536.0}
    assert torch.equal(torch.rand(5), draws) and same(weights(other), weights(model))
    states = [each.state_dict()["state"] for each in (optimizer, other_optimizer)]
    assert states[0].keys() == states[1].keys() and all(same(states[0][number], states[1][number]) for number in states[0])


# What goes wrong

def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model, path = build("sasrec"), tmp_path / "run.safetensors"
    with torch.no_grad(): model.item_emb.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="no longer a finite number in epoch 0.*lower lr"):
        fit(model, make_store(), **QUICK, checkpoint=path, checkpoint_every=1)
    assert not path.exists(), "a broken state is not kept"


def test_a_run_that_breaks_later_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    model, store, path = build("sasrec"), make_store(), tmp_path / "run.safetensors"
    loss, steps = type(model).finetune_loss, [0]
    def breaks(self, batch):
        steps[0] += 1
        return {"loss": loss(self, batch)["loss"] * (torch.nan if steps[0] == 8 else 1)}
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "finetune_loss", breaks)
        with pytest.raises(FloatingPointError): fit(model, store, **QUICK, checkpoint=path, checkpoint_every=1)
    calm, again = build("sasrec"), build("sasrec", seed=1)
    expected = fit(calm, store, **QUICK)
    assert without_seconds(fit(again, store, **QUICK, checkpoint=path, checkpoint_every=1)) == without_seconds(expected)
    assert same(weights(again), weights(calm))


def test_a_phase_that_does_not_exist_says_so():
    with pytest.raises(NotImplementedError, match="SASRec has no pre-training"): fit(build("sasrec"), make_store(), "pretrain", **QUICK)


@pytest.mark.parametrize("name", ["sasrec", "missrec", "content_missrec"])
def test_the_same_model_goes_on(name, tmp_path):
    "A cell that is run again continues its checkpoint, although the first run has changed the model's interests."
    options = dict(batch_size=16, lr=.01, device="cpu", progress=False, patience=9)
    whole, model = build(name), build(name)
    fit(whole, make_store(), epochs=3, **options)
    for epochs in (1, 3): fit(model, make_store(), epochs=epochs, checkpoint=tmp_path / "run.safetensors", **options)
    assert same(weights(model), weights(whole))


def test_identity_depends_on_what_is_trained():
    marks = [run_identity(model, store) for model, store in (
        (build("sasrec"), make_store()), (build("sasrec", seed=1), make_store()), (build("sasrec"), make_store(seed=1)),
        (build("content_both"), make_store()))]
    assert marks[0] == marks[1] and len(set(marks)) == 3 and all(len(mark) == 16 for mark in marks)


def test_figure():
    history = fit(build("sasrec"), make_store(), **QUICK)
    figure = plot_fit({"a": history, "b": history, "none": History(epochs=[{"epoch": 0, "loss": 1.}])}, colors={"a": "black"})
    left, right = figure.axes
    assert len(left.lines) == 3 and right.get_title() == "Validation NDCG@10" and left.get_title() == "Training loss"
    plt.close("all")
