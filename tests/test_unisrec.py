"""UniSRec against loops over the formulas: items, pre-training under both disturbances, fine-tuning, the gradients of all and
where these go; what is frozen, drawn, saved and continued."""
import json
import math
from functools import cache

import numpy as np
import pytest
import torch

import mmseqrec.models.unisrec as unisrec
import mmseqrec.training as training
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore, collate, evaluation_batches, position_batches, prefix_batches
from mmseqrec.evaluation import evaluate
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.blocks.layers import SequenceEncoder, encode_ends
from mmseqrec.models.unisrec import TextItems, UniSRec
from mmseqrec.recommender import transfer_weights
from mmseqrec.training import fit
from slow_streams import dot, next_item, numbers, read, softmax, unit, within
from small_world import (NO_TEXT, NOTHING, SIZES, TEXT_SIZE, V, build, make_catalogue, make_store, ring_store, same, weights,
                         without_seconds)

CLOSE = dict(rtol=0, atol=1e-9)
TAU, LAMBDA = .07, 1e-3
QUICK = dict(epochs=3, batch_size=16, lr=.01, device="cpu", progress=False)
HISTORIES = [[6, 9, 2, 7, 7, 1], [8], [3, 8], [10, 3, 11, 12], [6, 6], [NOTHING, NO_TEXT, 3]]
DISTINCT, REPEATED, LACKING = (9, 1, 6, 2, 8, 12), (9, 1, 9, 9, 8, 1), (9, NO_TEXT, NOTHING, NOTHING, 3, 12)
DROPPED = [[0, 1, 0, 0, 1, 0], [0], [0, 1], [0, 1, 0, 1], [0, 0], [0, 0, 1]]  # what item drop leaves out
SHORTENED = [[1, 0, 0, 1, 0, 0], [1], [0, 1], [0, 0, 1, 0], [0, 0], [0, 1, 1]]  # where word drop speaks

each_target = pytest.mark.parametrize("targets", [DISTINCT, REPEATED, LACKING], ids=["distinct", "repeated", "lacking"])
each_mode = pytest.mark.parametrize("transductive", [False, True], ids=["inductive", "transductive"])
each_drop = pytest.mark.parametrize("words", [False, True], ids=["item drop", "word drop"])
each_arithmetic = pytest.mark.parametrize("legacy", [False, True], ids=["paper", "legacy"])


def shaken(seed=0, std=.3, transductive=False, **options):
    "A model in evaluation mode, with random numbers in every weight, statistics taken, in 64 bits."
    model = build("unisrec" if transductive else "content_unisrec", **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters(): x.copy_(std * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        if model.item_emb is not None: model.item_emb.weight[0] = 0
    model.items.fit_statistics(torch.arange(1, V + 1))
    return model


def asking(targets, histories=HISTORIES):
    batch = collate(histories, 10)
    batch.pos_item = torch.tensor(targets)
    return batch


def padded(rows): return collate([[2 - x for x in row] for row in rows], 10).item_seq == 1


def disturb(patch, words, rates=None):
    "Let `DROPPED` and `SHORTENED` be what is drawn, and note the rates that are asked for."
    def drawn(rows, name):
        def draw(item_pad_mask, rate):
            if rates is not None: rates.append((name, rate))
            return padded(rows)
        return draw
    patch.setattr(unisrec, "draw_item_drop", drawn(DROPPED, "items"))
    patch.setattr(unisrec, "draw_word_drop", drawn(SHORTENED, "words"))
    return {"word_drop_share": float(words)}


# The formulas, item by item

def text_vector(p, sentences, is_padding):
    "One item from the weights of a `TextItems`: mean sentence, centre, experts; zeros without text."
    D = len(p["experts.experts.weight"]) // len(p["experts.center"])
    rows = [s for s, absent in zip(sentences, is_padding) if not absent]
    if not rows: return np.zeros(D)
    mean = sum(rows) / np.float32(len(rows))  # a catalogue averages in 32 bits
    f = (mean.astype(float) - p["centring.center"]) / p["centring.spread"]
    gates = softmax([float(column @ f) for column in p["experts.gate"].T])
    return sum(g * p["experts.experts.weight"][k * D:(k + 1) * D] @ (f - p["experts.center"][k]) for k, g in enumerate(gates))


def text_vectors(p, catalogue, words_dropped=False):
    table = catalogue.dropped_text_emb if words_dropped else catalogue.text_emb
    return np.array([text_vector(p, table[row].numpy(), catalogue.text_pad_mask[row].tolist())
                     for row in range(len(catalogue.item_tokens))])


def slow_terms(p, catalogue, targets, words, legacy):
    "Both terms of pre-training on `HISTORIES`, disturbed as `DROPPED` or `SHORTENED` say."
    z, shorter = (text_vectors(within(p, "items."), catalogue, dropped) for dropped in (False, True))
    ends, other = [], []
    for history, gone, shortened in zip(HISTORIES, DROPPED, SHORTENED):
        ends.append(unit(read(within(p, "encoder."), z[history])[-1]))
        if words: x = np.array([(shorter if short else z)[i] for i, short in zip(history, shortened)])
        else: x = np.array([z[i] for i, left_out in zip(history, gone) if not left_out])
        other.append(unit(read(within(p, "encoder."), x)[-1]))
    lacking = [not z[target].any() for target in targets]
    nobody = [False] * len(targets)
    return {"sequence_item": next_item([[s] for s in ends], [unit(z[i]) for i in targets], targets, lacking, TAU, legacy),
            "sequence_sequence": next_item([[s] for s in ends], other, targets, nobody, TAU, legacy)}


def slow_candidates(p, catalogue):
    z = text_vectors(within(p, "items."), catalogue)
    return z + p["item_emb.weight"] if "item_emb.weight" in p else z


def slow_finetuning(p, catalogue, histories, targets):
    z, total = slow_candidates(p, catalogue), 0.
    for history, target in zip(histories, targets):
        s = unit(read(within(p, "encoder."), z[history])[-1])
        total -= math.log(softmax([dot(s, unit(z[j])) / TAU for j in range(1, V + 1)])[target - 1])
    return total / len(targets)


# Items

@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("words_dropped", [False, True])
def test_items_equal_loops(centred, words_dropped):
    model = shaken(centred=centred)
    p = within(numbers(model), "items.")
    slow = text_vectors(p, model.catalogue, words_dropped)
    assert np.abs(slow).max() > .5 and (p["centring.spread"] != 1) == centred
    ids = torch.tensor([7, 2, 0, 2, NO_TEXT, 1])
    np.testing.assert_allclose(model.items(ids, words_dropped).detach(), slow[ids], **CLOSE)
    assert not slow[[0, NO_TEXT, NOTHING]].any()
    other = text_vectors(p, model.catalogue, not words_dropped)
    assert np.abs(slow[1] - other[1]).max() > .01


def test_what_is_missing_is_zero_and_teaches_nothing():
    model = shaken()
    for row in (0, NO_TEXT, NOTHING, 7):
        model.zero_grad()
        z = model.items(torch.tensor([row]))
        (z * torch.arange(1., SIZES["hidden_size"] + 1)).sum().backward()
        moved = any(x.grad is not None and x.grad.any() for x in model.parameters())
        assert moved == bool(z.any()) == (row == 7), row


def test_items_tell_what_does_not_fit():
    items = TextItems(TEXT_SIZE + 1, 4)
    with pytest.raises(ValueError, match="expects text features of 7 numbers, the catalogue has 6"): items.set_catalogue(make_catalogue())
    with pytest.raises(ValueError, match="the catalogue has none"):
        UniSRec(TEXT_SIZE).set_catalogue(catalogue_from_arrays(["a"], None, np.ones((1, 5))))


@pytest.mark.parametrize("centred", [True, False])
def test_statistics_come_from_training_events_only_and_once(centred):
    items = np.array([1, 2, 6, 9, 10, 6, 7, 1, 11, 12], np.int32)
    stage = np.array([TRAIN, TRAIN, TRAIN, VALID, TEST] * 2, np.int8)
    store = SequenceStore(items, np.array([0, 5, 10]), stage, V)
    model, expected = (build("content_unisrec", centred=centred) for _ in range(2))
    model.start_epoch(store, 0)
    expected.items.fit_statistics(torch.tensor([1, 2, 6, 7]))
    assert same(weights(model), weights(expected)) and bool(model.items.fitted) == centred
    torch.testing.assert_close(model.items.centring.center, model.catalogue.mean_text()[[1, 2, 6, 7]].mean(0) * centred)
    model.start_epoch(make_store(), 1)
    assert same(weights(model), weights(expected))


def test_statistics_leave_items_without_text_out():
    model, whole = (build("content_unisrec") for _ in range(2))
    model.items.fit_statistics(torch.tensor([1, NO_TEXT, 2, NOTHING]))
    whole.items.fit_statistics(torch.tensor([1, 2]))
    assert same(weights(model), weights(whole))


# Histories

@pytest.mark.parametrize("piece_cost", [0, 1, 3, 6, 100, None])
def test_histories_in_pieces_equal_loops_and_have_the_same_gradients(piece_cost):
    model, batch = shaken(), collate(HISTORIES, 10)
    x = torch.randn(*batch.item_seq.shape, 16, dtype=torch.float64, requires_grad=True)
    found, whole = encode_ends(model.encoder, x, batch, piece_cost), encode_ends(model.encoder, x, batch, 10**6)
    slow = [read(within(numbers(model), "encoder."), x[row, :len(h)].detach().numpy())[-1] for row, h in enumerate(HISTORIES)]
    np.testing.assert_allclose(found.detach(), slow, **CLOSE)
    a, b = (torch.autograd.grad(y.square().sum(), [x, *model.encoder.parameters()]) for y in (found, whole))
    for one, other in zip(a, b): torch.testing.assert_close(one, other, **CLOSE)
    assert not a[0][batch.item_pad_mask].any()


def test_pieces_are_as_wide_as_their_own_longest():
    widths, encoder = [], SequenceEncoder(8, inner_size=8)
    encoder.register_forward_pre_hook(lambda module, inputs: widths.append(tuple(inputs[0].shape[:2])))
    batch = collate(HISTORIES, 10)
    encode_ends(encoder, torch.randn(*batch.item_seq.shape, 8), batch, 2)
    assert widths == [(3, 2), (2, 4), (1, 6)]


# Pre-training

@each_target
@each_arithmetic
@each_drop
def test_pretraining_equals_loops(words, legacy, targets, monkeypatch):
    model = shaken(released=("false_negatives",) if legacy else (), **disturb(monkeypatch, words))
    found = {name: x.item() for name, x in model.pretrain_loss(asking(targets)).items()}
    slow = slow_terms(numbers(model), model.catalogue, targets, words, legacy)
    assert found == pytest.approx(slow | {"loss": slow["sequence_item"] + LAMBDA * slow["sequence_sequence"]}, abs=1e-6)
    assert min(slow.values()) > .1


@each_drop
def test_the_arithmetics_differ_where_targets_repeat(words, monkeypatch):
    for targets in (DISTINCT, REPEATED):
        paper, legacy = (shaken(released=("false_negatives",) if way else (), **disturb(monkeypatch, words)).pretrain_loss(asking(targets)) for way in (False, True))
        for name in paper: assert (paper[name].item() != legacy[name].item()) == (targets == REPEATED), name
        assert legacy["loss"] >= paper["loss"]


@pytest.mark.parametrize("options", [{"sequence_weight": .5}, {"temperature": .3}, {"sequence_weight": 0.}], ids=str)
def test_options_of_pretraining(options, monkeypatch):
    model = shaken(**options, **disturb(monkeypatch, False))
    found = model.pretrain_loss(asking(DISTINCT))
    weight = options.get("sequence_weight", LAMBDA)
    torch.testing.assert_close(found["loss"], found["sequence_item"] + weight * found["sequence_sequence"], **CLOSE)
    hot = shaken(**disturb(monkeypatch, False)).pretrain_loss(asking(DISTINCT))["sequence_item"]
    assert (found["sequence_item"] != hot) == ("temperature" in options)


def test_nothing_known_costs_log_b():
    "All items alike and no position: every cosine is 1."
    text = np.ones((V, 2, TEXT_SIZE), np.float32)
    model = shaken().set_catalogue(catalogue_from_arrays([f"i{n}" for n in range(V)], text, dropped_text_emb=text))
    torch.nn.init.zeros_(model.encoder.position_emb.weight)
    for word_drop_share in (0., 1.):
        model.disturbance["word_drop_share"] = word_drop_share
        terms = model.pretrain_loss(asking(DISTINCT, [[1, 2]] * 6))
        for name in ("sequence_item", "sequence_sequence"): assert terms[name].item() == pytest.approx(math.log(6), abs=1e-9)


@each_drop
def test_one_user_alone_has_nothing_to_tell_apart(words):
    model = shaken(word_drop_share=float(words))
    for target in (9, NO_TEXT):
        terms = model.pretrain_loss(asking([target], [[6, 9, 2]]))
        terms["loss"].backward()
        assert all(x.item() == pytest.approx(0, abs=1e-12) for x in terms.values())
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


def test_targets_without_text_leave_only_the_other_task():
    terms = (model := shaken()).pretrain_loss(asking([NO_TEXT, NOTHING, NO_TEXT], [[1, 2, 3], [6], [7, 8]]))
    terms["loss"].backward()
    assert terms["sequence_item"] == 0 and terms["sequence_sequence"] > 0
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


def test_histories_and_targets_of_nothing_stay_finite():
    model = build("content_unisrec").train()
    for share in (0., 1.):
        model.disturbance["word_drop_share"] = share
        loss = model.pretrain_loss(asking([NO_TEXT, NOTHING], [[NOTHING], [NO_TEXT, NOTHING]]))["loss"]
        loss.backward()
        assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


def test_the_disturbance_is_drawn_once_a_step_with_its_share_and_rates(monkeypatch):
    rates = []
    disturb(monkeypatch, False, rates)
    model = build("content_unisrec", word_drop_share=.3, item_drop=.15, word_drop=.4)
    set_seed(0)
    for _ in range(200): model.pretrain_loss(asking(DISTINCT))
    assert len(rates) == 200 and set(rates) == {("items", .15), ("words", .4)}
    assert abs(sum(name == "words" for name, _ in rates) / 200 - .3) < .1
    for share, name in ((0., "items"), (1., "words")):
        rates.clear()
        model.disturbance["word_drop_share"] = share
        for _ in range(20): model.pretrain_loss(asking(DISTINCT))
        assert {drawn for drawn, _ in rates} == {name}


@each_drop
def test_every_item_of_a_step_is_mapped_once(words, monkeypatch):
    model, seen = shaken(**disturb(monkeypatch, words)), []
    model.items.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args[0].tolist(), kwargs)), with_kwargs=True)
    batch = asking(REPEATED)
    model.pretrain_loss(batch)
    everything = sorted({*batch.item_seq.flatten().tolist(), *REPEATED})
    spoken = sorted({i for history, row in zip(HISTORIES, SHORTENED) for i, short in zip(history, row) if short})
    assert seen == [(everything, {})] + [(spoken, {"words_dropped": True})] * words
    seen.clear()
    model.encode_sequence(batch)
    assert seen == [(sorted({*batch.item_seq.flatten().tolist()}), {})]
    seen.clear()
    model.finetune_loss(batch)
    assert seen == [(list(range(V + 1)), {})]


def test_what_pretraining_needs_is_said():
    with pytest.raises(NotImplementedError, match="has no pre-training; pre-train UniSRec\\(transductive=False\\)"):
        shaken(transductive=True).pretrain_loss(asking(DISTINCT))
    rng = np.random.default_rng(0)
    whole = catalogue_from_arrays([f"item-{row}" for row in range(1, V + 1)], rng.standard_normal((V, 2, TEXT_SIZE)))
    model = shaken().set_catalogue(whole)
    with pytest.raises(ValueError, match=r"build_catalogue\(..., word_drop=0.15\), or .* UniSRec\(..., word_drop_share=0\)"):
        model.pretrain_loss(asking(DISTINCT))
    model.disturbance["word_drop_share"] = 0.
    assert model.pretrain_loss(asking(DISTINCT))["loss"].isfinite()
    assert model.finetune_loss(asking(DISTINCT))["loss"].isfinite(), "fine-tuning needs no shortened texts"
    for share in (0., 1.):
        with pytest.raises(ValueError, match="one query (a|per) row"):
            shaken(word_drop_share=share).pretrain_loss(position_batches(make_store(), 99, 10)[0])


# Gradients

def along(model, loss, slow, step=1e-5, seed=0):
    "Slope of a loss along a random direction through all weights: by its gradients, and by two runs of the loops."
    names, values = zip(*((name, x) for name, x in model.named_parameters() if name != "items.experts.gate_noise"))
    gradients = torch.autograd.grad(loss, values)
    generator = torch.Generator().manual_seed(seed)
    ways = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values]
    if model.item_emb is not None: ways[names.index("item_emb.weight")][0] = 0
    p, sides = numbers(model), []
    for sign in (1, -1):
        sides.append(slow(p | {name: p[name] + sign * step * way.numpy() for name, way in zip(names, ways)}))
    return sum((g * way).sum().item() for g, way in zip(gradients, ways)), (sides[0] - sides[1]) / (2 * step)


@each_arithmetic
@each_drop
@pytest.mark.parametrize("targets", [REPEATED, LACKING], ids=["repeated", "lacking"])
def test_gradients_of_pretraining_equal_the_slope_of_the_loops(targets, words, legacy, monkeypatch):
    model = shaken(released=("false_negatives",) if legacy else (), sequence_weight=1., **disturb(monkeypatch, words))
    fast, slow = along(model, model.pretrain_loss(asking(targets))["loss"],
                       lambda p: sum(slow_terms(p, model.catalogue, targets, words, legacy).values()))
    assert abs(fast) > .1 and fast == pytest.approx(slow, rel=1e-5)


@each_mode
def test_gradients_of_finetuning_equal_the_slope_of_the_loops(transductive):
    model = shaken(transductive=transductive)
    fast, slow = along(model, model.finetune_loss(asking(LACKING))["loss"],
                       lambda p: slow_finetuning(p, model.catalogue, HISTORIES, LACKING))
    assert abs(fast) > .1 and fast == pytest.approx(slow, rel=1e-5)


def items_taught(model, term, batch):
    "The items through whose whole and through whose shortened texts a term teaches the adapter."
    for table in (model.items.features, model.items.dropped_features): table.requires_grad_().grad = None
    model.zero_grad()
    model.pretrain_loss(batch)[term].backward()
    return [set() if table.grad is None else set(table.grad.any(1).nonzero()[:, 0].tolist())
            for table in (model.items.features, model.items.dropped_features)]


def test_each_term_teaches_the_items_it_looks_at(monkeypatch):
    "Sequence-item: those of histories and the next items. Sequence-sequence: histories, in both versions, and no next item."
    histories, targets = [[6, 9], [8], [3, 7]], [1, 2, 12]
    shortened = torch.tensor([[False, True], [False, False], [True, False]])
    monkeypatch.setattr(unisrec, "draw_word_drop", lambda item_pad_mask, rate: shortened)
    model, batch = shaken(word_drop_share=1.), asking(targets, histories)
    assert items_taught(model, "sequence_item", batch) == [{6, 9, 8, 3, 7, 1, 2, 12}, set()]
    assert items_taught(model, "sequence_sequence", batch) == [{6, 9, 8, 3, 7}, {9, 3}]
    model.disturbance["word_drop_share"] = 0.
    monkeypatch.setattr(unisrec, "draw_item_drop", lambda item_pad_mask, rate: torch.tensor([[False, True], [False] * 2, [False] * 2]))
    assert items_taught(model, "sequence_sequence", batch) == [{6, 9, 8, 3, 7}, set()]


def test_as_a_target_an_item_teaches_the_adapter():
    "The histories' items are without text, so that all the adapter learns comes from the next items."
    model = shaken(word_drop_share=0.)
    batch = asking([9, 1, 6], [[NOTHING], [NO_TEXT, NOTHING], [NO_TEXT]])
    for term, taught in (("sequence_item", True), ("sequence_sequence", False)):
        model.zero_grad()
        model.pretrain_loss(batch)[term].backward()
        for name, x in model.items.named_parameters():
            moved = x.grad is not None and x.grad.abs().max() > 1e-12
            assert moved == (taught and "noise" not in name), (term, name)
        assert model.encoder.blocks[0].attention.output.weight.grad.any()


# What is trained

def test_parameters_by_hand():
    count = lambda model: sum(x.numel() for x in model.parameters())
    F, D, I, G, items = 768, 300, 256, 8, 4385
    adapter = G * F * D + G * F + F * G + F * G
    block = (3 * D * D + 3 * D) + (D * D + D) + 2 * D + (D * I + I) + (I * D + D) + 2 * D
    inductive = UniSRec(F, hidden_size=D)
    assert count(inductive) == adapter + 50 * D + 2 * D + 2 * block == 2_910_344
    assert count(UniSRec(F, items, D, transductive=True)) == 2_910_344 + (items + 1) * D
    frozen = UniSRec(F, hidden_size=D, frozen_trunk=True)
    assert sum(x.numel() for x in frozen.parameters() if x.requires_grad) == adapter + 2 * D == 1_862_232


@each_mode
def test_a_frozen_trunk_stays_and_the_rest_learns(transductive):
    source = build("content_unisrec")
    fit(source, make_store(), "pretrain", **QUICK | {"epochs": 1})
    name = "unisrec" if transductive else "content_unisrec"
    model = transfer_weights(source, build(name, frozen_trunk=True))
    free = transfer_weights(source, build(name))
    before = weights(model)
    assert before.keys() == weights(free).keys()
    for key in before:
        if not key.startswith("item_emb"): assert torch.equal(before[key], source.state_dict()[key]), key
    adapter = {"items.experts.experts.weight", "items.experts.center", "items.experts.gate", "items.experts.gate_noise"}
    trained = adapter | {"encoder.norm.weight", "encoder.norm.bias"} | ({"item_emb.weight"} if transductive else set())
    assert {key for key, x in model.named_parameters() if x.requires_grad} == trained
    assert all(x.requires_grad for x in free.parameters())
    model.train().finetune_loss(prefix_batches(make_store(), TRAIN, 64, 10)[0])["loss"].backward()
    assert {key for key, x in model.named_parameters() if x.grad is not None and x.grad.any()} == trained
    model.zero_grad(set_to_none=True)
    fit(model, make_store(), **QUICK)
    fit(free, make_store(), **QUICK)
    changed = lambda each: {key for key, _ in each.named_parameters() if not torch.equal(each.state_dict()[key], before[key])}
    assert changed(model) == trained and changed(free) == {key for key, _ in free.named_parameters()}


def test_another_catalogue_leaves_the_frozen_frozen():
    model = build("unisrec", frozen_trunk=True)
    model.set_catalogue(make_catalogue(19, seed=5, name="other"))
    assert model.item_emb.weight.requires_grad and not any(x.requires_grad for x in model.encoder.blocks.parameters())


def test_padding_stays_zero():
    model = build("unisrec")
    fit(model, make_store(), **QUICK)
    assert not model.item_emb.weight[0].any() and model.item_emb.weight[1:].any()


# Fine-tuning

@each_mode
@each_target
def test_finetuning_equals_loops(targets, transductive):
    model = shaken(transductive=transductive)
    slow = slow_finetuning(numbers(model), model.catalogue, HISTORIES, targets)
    assert model.finetune_loss(asking(targets))["loss"].item() == pytest.approx(slow, abs=1e-6) and slow > .5


@each_mode
def test_all_positions_in_one_pass_are_the_prefixes_one_by_one(transductive):
    model, store = shaken(transductive=transductive), make_store()
    batch = position_batches(store, 500, model.max_len)[0]
    rows, found = prefix_batches(store, TRAIN, 500, model.max_len)[0], model.finetune_loss(batch)["loss"]
    assert batch.n_targets == len(rows) and batch.item_seq.numel() < rows.item_seq.numel()
    torch.testing.assert_close(found, model.finetune_loss(rows)["loss"], **CLOSE)


def test_scores_are_cosines_and_an_item_without_text_has_none():
    model, batch = shaken(), collate(HISTORIES, 10)
    items, z = model.encode_items(), slow_candidates(numbers(model), model.catalogue)
    assert items.missing_stream_mask[:, 0].nonzero()[:, 0].tolist() == [NO_TEXT - 1, NOTHING - 1]
    found = model.score(model.encode_sequence(batch), items)
    for row, history in enumerate(HISTORIES):
        s = unit(read(within(numbers(model), "encoder."), z[history])[-1])
        np.testing.assert_allclose(found[row].detach(), [dot(s, unit(z[j])) for j in range(1, V + 1)], **CLOSE)
    assert not found[:, [NO_TEXT - 1, NOTHING - 1]].any() and found.abs().max() <= 1


def test_learned_vectors_are_added_to_inputs_and_candidates():
    model, batch = shaken(transductive=True), collate(HISTORIES, 10)
    items, z = model.encode_items(), slow_candidates(numbers(model), model.catalogue)
    assert items.missing_stream_mask is None
    np.testing.assert_allclose(items.vectors[:, 0].detach(), [unit(x) for x in z[1:]], **CLOSE)
    torch.testing.assert_close(items.vectors[NO_TEXT - 1, 0], torch.nn.functional.normalize(model.item_emb.weight[NO_TEXT], dim=0), **CLOSE)
    before = model.encode_sequence(batch)
    with torch.no_grad(): model.item_emb.weight[9] += torch.arange(16.)
    moved = (model.encode_sequence(batch) - before).abs().amax((1, 2)) > 1e-9
    assert moved.tolist() == [9 in history for history in HISTORIES]


def test_fine_tuning_disturbs_nothing(monkeypatch):
    def refuse(*_): raise AssertionError("something is dropped")
    for name in ("draw_item_drop", "draw_word_drop", "drop_items"): monkeypatch.setattr(unisrec, name, refuse)
    model = shaken()
    model.train().finetune_loss(asking(DISTINCT))["loss"].backward()


def test_attention_equals_the_encoders():
    model, batch = shaken(), collate(HISTORIES, 10)
    found = model.attention(batch)
    expected = model.encoder(model.items(batch.item_seq.flatten()).view(6, 6, -1), batch.item_pad_mask, True)[1]
    assert len(found) == 2 and all(torch.equal(a, b) for a, b in zip(found, expected))


# Saving, and the same digits

OPTIONS = dict(n_experts=3, adapter_dropout=.35, noisy_gate=False, centred=False, transductive=False, frozen_trunk=True, sequence_weight=.5,
               word_drop_share=.25, item_drop=.1, word_drop=.3, released=["false_negatives"], temperature=.2)


@pytest.mark.parametrize("options", [{}, OPTIONS, OPTIONS | {"transductive": True, "centred": True}], ids=["default", "all", "transductive"])
def test_saved_options_come_back(options, tmp_path):
    set_seed(0)
    model = UniSRec(TEXT_SIZE, **SIZES, **options).set_catalogue(make_catalogue())
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["recommender"] == "UniSRec" and options.items() <= config.items() and SIZES.items() <= config.items()
    again = UniSRec.from_pretrained(tmp_path / "saved")
    assert same(weights(again), weights(model)) and torch.equal(again.items.dropped_features, model.items.dropped_features)
    assert [x.requires_grad for x in again.parameters()] == [x.requires_grad for x in model.parameters()]
    for name in ("temperature", "released", "sequence_weight", "disturbance", "has_pretraining"):
        assert getattr(again, name) == getattr(model, name), name
    assert again.items.centred == options.get("centred", True)


def test_defaults_are_the_papers_but_for_the_width():
    defaults = UniSRec(TEXT_SIZE)._hub_mixin_config
    paper = dict(n_layers=2, n_heads=2, inner_size=256, dropout=.5, attention_dropout=.5, max_len=50, temperature=.07,
                 n_experts=8, adapter_dropout=.2, sequence_weight=1e-3, word_drop_share=.1, item_drop=.2, word_drop=.2)
    assert paper.items() <= defaults.items() and defaults["hidden_size"] == 64
    assert defaults["noisy_gate"] and not (defaults["transductive"] or defaults["frozen_trunk"] or defaults["released"]) and defaults["centred"]


@cache
def pretrained(seed=0, noise=0):
    "Two undisturbed epochs of pre-training: the history and the weights."
    model = build("content_unisrec", dropout=.3, word_drop_share=.5)
    set_seed(noise)
    history = fit(model, make_store(), "pretrain", **QUICK | {"epochs": 2}, seed=seed)
    return without_seconds(history), weights(model)


def test_the_same_seed_gives_the_same_pretraining():
    first, second, other = pretrained(), pretrained(noise=1), pretrained(seed=1)
    assert first[0] == second[0] and same(first[1], second[1]) and first[0] != other[0]
    assert set(first[0][0]) >= {"loss", "sequence_item", "sequence_sequence", "ndcg@10"}


class Stop(Exception): pass


@pytest.mark.parametrize("steps", [2, 6])
def test_a_stopped_pretraining_continues_to_the_same_digits(steps, tmp_path, monkeypatch):
    store, path, left, original = make_store(), tmp_path / "run.safetensors", [steps], training._train_step
    def limited(*args):
        left[0] -= 1
        if left[0] < 0: raise Stop
        return original(*args)
    options = QUICK | {"epochs": 2, "checkpoint": path, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train_step", limited)
        with pytest.raises(Stop): fit(build("content_unisrec", dropout=.3, word_drop_share=.5), store, "pretrain", **options)
    again = build("content_unisrec", seed=99, dropout=.3, word_drop_share=.5)
    history = fit(again, store, "pretrain", **options)
    assert without_seconds(history) == pretrained()[0] and same(weights(again), pretrained()[1])


# Learning

def test_pretraining_understands_a_ring():
    "The sequence-item term falls far below what knowing nothing costs, and the held-out next step is nearest."
    store = ring_store(24)
    model = build("content_unisrec", make_catalogue(whole=True), dropout=.1, attention_dropout=0.)
    history = fit(model, store, "pretrain", epochs=20, batch_size=32, lr=.02, device="cpu", progress=False, patience=20)
    first, last = history.epochs[0], history.epochs[-1]
    assert last["sequence_item"] < .6 * math.log(V) < first["sequence_item"]
    batch, = evaluation_batches(store, VALID, 100, model.max_len)
    with torch.no_grad(): nearest = model.score(model.encode_sequence(batch), model.encode_items()).argmax(1) + 1
    assert (nearest == batch.pos_item).float().mean() > 5 / V


def test_the_whole_way():
    "Pre-trained without item vectors, transferred, tuned with a frozen trunk and item vectors: the ring is known."
    store, calm = ring_store(24), dict(dropout=0., attention_dropout=0.)
    source = build("content_unisrec", make_catalogue(whole=True), **calm)
    fit(source, store, "pretrain", epochs=20, batch_size=32, lr=.01, device="cpu", progress=False)
    model = transfer_weights(source, build("unisrec", make_catalogue(whole=True), seed=1, frozen_trunk=True, **calm))
    scratch = build("unisrec", make_catalogue(whole=True), seed=1, **calm)
    batch, = prefix_batches(store, TRAIN, 200, model.max_len)
    with torch.no_grad(): start, nothing = (each.finetune_loss(batch)["loss"].item() for each in (model, scratch))
    assert start < nothing, "what was learned before is of use at once"
    fit(model, store, epochs=40, batch_size=32, lr=.02, device="cpu", progress=False, patience=40)
    assert evaluate(model, store, TEST).metrics(ks=(1,))["recall@1"] > .9


def test_pretraining_in_sixteen_bits():
    model = build("content_unisrec", word_drop_share=.5)
    history = fit(model, make_store(), "pretrain", **QUICK, precision="bf16")
    assert all(x.dtype == torch.float32 for x in model.parameters())
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    narrow = build("content_unisrec", word_drop_share=1.).to(torch.bfloat16).train()
    narrow.pretrain_loss(asking(LACKING))["loss"].backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in narrow.parameters())
