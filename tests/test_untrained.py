"What was never taken is no wrong answer: an item without a training event leaves no trace in any weight."
import dataclasses

import numpy as np
import pytest
import torch
from small_world import BY_CONTENT, COUNTING, LEARNING, SIZES, V, VARIANTS, build, make_catalogue, same, weights

from mmseqrec.blocks.augment import cloze
from mmseqrec.blocks.losses import draw_candidates, draw_negatives, items_of_step
from mmseqrec.blocks.towers import IDEmbedding
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore, collate
from mmseqrec.models.mmsrec import pair_store
from mmseqrec.training import fit, training_batches

KNOWN = 9  # items 1 to 9 have training events
PRETRAINED = ("content_unisrec", "content_mp4sr", "content_msm4sr", "content_mmsrec", "content_missrec")
SAMPLING = tuple(name for name in LEARNING if name != "bert4rec")
learning = pytest.mark.parametrize("name", (*LEARNING, *VARIANTS))


def make_store(n_items=V, held_out=True):
    "Training events of items 1 to 9 only; the new items occur in validation and test."
    rng = np.random.default_rng(0)
    events = rng.integers(1, KNOWN + 1, (20, 7)).astype(np.int32)
    events[:9, 0] = np.arange(1, KNOWN + 1)
    stage = np.tile(np.array([TRAIN] * 5 + [VALID, TEST], np.int8), 20)
    if held_out: events[:, 5:] = rng.integers(1, n_items + 1, (20, 2))
    else: stage[:] = TRAIN
    return SequenceStore(events.ravel(), np.arange(0, events.size + 1, 7), stage, n_items)


def other_looks(catalogue, rows=slice(KNOWN + 1, None)):
    "Replace the features of some items."
    tables = {}
    for name in ("text_emb", "image_emb", "dropped_text_emb"):
        tables[name] = getattr(catalogue, name).clone()
        tables[name][rows] = torch.randn(tables[name][rows].shape, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(catalogue, **tables)


def ready(name, **options):
    "Build a system that knows which items have training events, ready to train."
    model = build(name, make_catalogue(whole=True), **options).train()
    model.start_epoch(make_store(), 0)
    return model


def step_loss(model, phase="finetune", store=None):
    return model(training_batches(model, store or make_store(), phase, 64)[0], phase)["loss"]


def watch_features(model):
    "Let gradients reach the features of a model's items; return them."
    found = {}
    for module in model.modules():
        for name, table in list(module._buffers.items()):
            if table is None or table.ndim < 2 or not table.is_floating_point() or len(table) != V + 1: continue
            module._buffers[name] = found[f"{id(module)} {name}"] = table.clone().requires_grad_()
    return found


# ------------------------------------------------------------------------------------------------------- the rule

@learning
def test_gradients_of_untrained_items_are_zero(name):
    model = ready(name)
    features = watch_features(model)
    step_loss(model).backward()
    tables = [x.grad for x in features.values()]
    if getattr(model, "item_emb", None) is not None: tables.append(model.item_emb.weight.grad)
    seen = [grad for grad in tables if grad is not None]
    assert seen and any(grad[1:KNOWN + 1].any() for grad in seen)
    assert all(not grad[KNOWN + 1:].any() for grad in seen)


@learning
def test_the_switch_compares_with_the_whole_catalogue(name):
    model = ready(name, released=("untrained_negatives",))
    assert model.known_items is None
    features = watch_features(model)
    step_loss(model).backward()
    tables = [x.grad for x in features.values()]
    if getattr(model, "item_emb", None) is not None: tables.append(model.item_emb.weight.grad)
    assert any(grad is not None and grad[KNOWN + 1:V + 1].any() for grad in tables)


@pytest.mark.parametrize("phase", ["finetune", "pretrain"])
@pytest.mark.parametrize("name", BY_CONTENT)
def test_the_looks_of_untrained_items_change_no_digit(name, phase):
    if phase == "pretrain" and name not in PRETRAINED: pytest.skip("has no pre-training")
    found = []
    for change in (lambda catalogue: catalogue, other_looks):
        store = make_store(held_out=False)
        model = build(name, change(make_catalogue(whole=True)))
        if name == "content_mmsrec" and phase == "pretrain": store = pair_store(store.training_items, V)
        fit(model, store, phase, epochs=2, batch_size=32, device="cpu", progress=False)
        found.append(weights(model))
    for given in found: given.pop("items.interests.of_item", None)  # the interests of new items follow their looks
    assert same(*found)


@pytest.mark.parametrize("name", BY_CONTENT)
def test_the_number_of_untrained_items_changes_next_to_nothing(name):
    found = []
    for n_items in (V, KNOWN):
        catalogue = make_catalogue(whole=True).take(range(1, n_items + 1))
        model = build(name, catalogue)
        fit(model, make_store(n_items, held_out=False), epochs=2, batch_size=32, device="cpu", progress=False)
        found.append(weights(model))
    for given in found: given.pop("items.interests.of_item", None)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items(): torch.testing.assert_close(value, found[1][key], rtol=0, atol=1e-5)


@learning
def test_loss_is_the_cross_entropy_over_known_items(name):
    model = ready(name).eval()
    batch = training_batches(model, make_store(), "finetune", 64)[0]
    terms = model.finetune_loss(batch)
    loss = terms.get("cross_entropy", terms["loss"]).item()
    with torch.no_grad():
        scores = model.score(model.encode_sequence(batch, batch.positions), model.encode_items())[:, :KNOWN]
        expected = torch.nn.functional.cross_entropy(scores.double() / model.temperature, batch.pos_item - 1)
    assert loss == pytest.approx(float(expected), abs=2e-5)


@learning
def test_new_items_are_candidates_of_evaluation_and_recommendation(name):
    model = ready(name).eval()
    assert len(model.encode_items()) == V
    assert len(model.recommend([["item-1", "item-2"]], k=V)[0].items) == V


def test_counting_systems_have_no_rule():
    for name in COUNTING: assert build(name).known_items is None


def test_a_swap_of_the_catalogue_forgets_which_items_were_known():
    model = ready("content_both")
    assert model.known_items.tolist() == list(range(1, KNOWN + 1))
    assert model.set_catalogue(make_catalogue(7)).known_items is None


def test_a_target_without_training_event_is_a_candidate_for_once():
    known = torch.tensor([2, 4, 5])
    ids, target, weight = draw_candidates(torch.tensor([4, 7, 4]), 9, None, known)
    assert ids.tolist() == [2, 4, 5, 7] and ids[target].tolist() == [4, 7, 4] and not weight.any()
    step = items_of_step(torch.tensor([[4, 8, 0]]), torch.tensor([7]), 9, None, known)
    assert step.candidates(step.ids[:, None])[:, 0].tolist() == [2, 4, 5, 7] and step.log_weight is None
    assert step.ids[step.place].tolist() == [[4, 8, 0]]


# ------------------------------------------------------------------------------------------- samples, gaps, embeddings

def test_untrained_items_are_never_drawn():
    known, pos_item = torch.arange(1, 10), torch.tensor([3, 5])
    set_seed(0)
    for _ in range(20):
        ids, target, log_weight = draw_candidates(pos_item, V, 4, known)
        assert set(ids.tolist()) <= set(range(1, 10)) and len(ids) == 6 and ids[target].tolist() == [3, 5]
        torch.testing.assert_close(log_weight, torch.tensor([0, 0, *[np.log(7 / 4)] * 4]), check_dtype=False)


def test_untrained_items_are_no_negatives():
    known, pos_item = torch.tensor([2, 5, 6, 11]), torch.tensor([5, 9])  # 9: a validation event
    set_seed(0)
    ids, is_right, n_known = draw_negatives(pos_item, V, 200, known)
    assert set(ids.unique().tolist()) == set(known.tolist()) and n_known == 4
    assert is_right[0].equal(ids[0] == 5) and is_right[0].any() and not is_right[1].any()


@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_training_leaves_untrained_items_alone(name):
    model = ready(name, n_candidates=3)
    features = watch_features(model)
    step_loss(model).backward()
    assert all(not x.grad[KNOWN + 1:].any() for x in features.values() if x.grad is not None)


def test_cloze_shows_known_items_only():
    batch = collate([[1, 2, 3] * 3] * 200, 10)
    batch.pos_item = torch.full((200,), 4)
    set_seed(0)
    rows, known = cloze(batch, V, 1., torch.tensor([1, 2, 3, 9])), {0, 1, 2, 3, 9, V + 1}
    assert set(rows.item_seq.unique().tolist()) <= known and (rows.item_seq == 9).any()
    set_seed(0)
    assert set(cloze(batch, V, 1.).item_seq.unique().tolist()) - known


def test_embeddings_of_untrained_items_are_zero():
    model = ready("sasrec")
    assert not model.item_emb.weight[KNOWN + 1:].any() and model.item_emb.weight[1:KNOWN + 1].any(1).all()
    fit(model, make_store(), epochs=2, device="cpu", progress=False)
    assert not model.item_emb.weight[KNOWN + 1:].any()
    noise = ready("sasrec", released=("untrained_negatives",))
    assert noise.item_emb.weight[1:].any(1).all()


def test_an_embedding_remembers_what_was_trained():
    table = IDEmbedding(4, 3)
    torch.nn.init.normal_(table.weight)
    table.prepare_for(torch.tensor([1, 2]))
    trained = table.weight.detach().clone()
    assert trained[1:3].any(1).all() and not trained[3:].any()
    table.prepare_for(torch.tensor([2, 3]))  # other events: 1 stays as it was trained, 3 begins
    assert torch.equal(table.weight[:3], trained[:3]) and table.weight[3].any() and not table.weight[4].any()
    before = table.weight.detach().clone()
    table.set_catalogue(make_catalogue(4, whole=True))
    table.set_catalogue(make_catalogue(6, whole=True))
    assert torch.equal(table.weight[:5], before) and not table.weight[5:].any()
    again = IDEmbedding(6, 3)
    again.load_state_dict(table.state_dict())
    again.prepare_for(torch.tensor([2]))
    assert torch.equal(again.weight, table.weight)  # loaded weights are not zeroed


@pytest.mark.parametrize("name", ["sasrec", "content_both", "content_missrec", "bert4rec", *VARIANTS])
def test_a_run_that_was_stopped_within_an_epoch_knows_the_same_items(name, tmp_path, monkeypatch):
    how = dict(epochs=2, batch_size=8, device="cpu", progress=False, checkpoint_every=2)
    whole = build(name, make_catalogue(whole=True))
    fit(whole, make_store(), checkpoint=tmp_path / "whole.safetensors", **how)
    stopped = build(name, make_catalogue(whole=True))
    from mmseqrec import training
    keep, calls = training.save_checkpoint, []
    def save(*args, **kwargs):
        keep(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(training, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt): fit(stopped, make_store(), checkpoint=tmp_path / "stopped.safetensors", **how)
    monkeypatch.setattr(training, "save_checkpoint", keep)
    resumed = build(name, make_catalogue(whole=True), seed=7)
    fit(resumed, make_store(), checkpoint=tmp_path / "stopped.safetensors", **how)
    assert same(weights(whole), weights(resumed))
