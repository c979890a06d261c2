"""MISSRec against loops over the formulas: tokens, histories, scores, both phases and the gradients of both; interests that follow
the catalogue and the checkpoint; what is frozen, what is released, what is drawn."""
import copy
import json
import math
from dataclasses import replace
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmseqrec.blocks.interests as interests
import mmseqrec.models.missrec as missrec
import mmseqrec.training as training
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore, collate, position_batches, prefix_batches
from mmseqrec.evaluation import evaluate
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.blocks.interest_decoder import InterestEncoderDecoder
from mmseqrec.blocks.losses import full_softmax_cross_entropy
from mmseqrec.models.missrec import (MISSRec, HistoryInput, HistoryView, InterestReader, ItemAdapters, disturbed_view, fuse_modalities,
                                     fused_score, interest_attention, view_histories)
from mmseqrec.recommender import transfer_weights
from slow_missrec import finetuning, interest_set, pretraining, read_user, score, tokens
from slow_streams import numbers, softmax
from small_world import (IMAGE_SIZE, NO_IMAGE, NO_TEXT, NOTHING, SIZES, TEXT_SIZE, V, build, make_catalogue, make_store, same, weights,
                         with_interests)

CLOSE = dict(rtol=0, atol=1e-9)
TAU, D = .07, SIZES["hidden_size"]
QUICK = dict(epochs=3, batch_size=16, lr=.01, device="cpu", progress=False)
HISTORIES = [[4, 9, 2, 7, 7, 1], [5], [3, 8], [10, 3, 11, 12], [6, 6], [NOTHING, NO_TEXT, NO_IMAGE]]
DISTINCT, REPEATED, LACKING = (9, 1, 6, 2, 8, 12), (9, 1, 9, 9, 8, 1), (9, NO_IMAGE, NO_TEXT, NOTHING, NO_IMAGE, 12)

each_target = pytest.mark.parametrize("targets", [DISTINCT, REPEATED, LACKING], ids=["distinct", "repeated", "lacking"])
each_mode = pytest.mark.parametrize("transductive", [False, True], ids=["inductive", "transductive"])
each_fusion = pytest.mark.parametrize("fusion", ["add", "stack"])


def shake(model, seed=0, std=.3):
    "Random numbers in every weight, statistics taken, interests found; in 64 bits and evaluation mode."
    model, generator = model.double().eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters(): x.copy_(std * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        for table in (model.item_emb, model.fusion.item_kappa):
            if table is not None: table.weight[0] = 0
    model.items.adapters.fit_statistics(torch.arange(1, V + 1))
    model.items.find_interests()
    return model


def shaken(seed=0, n_heads=4, catalogue=None, **options):
    set_seed(seed)
    options = dict(n_heads=n_heads, word_drop_share=0.) | options
    return shake(with_interests(**options).set_catalogue(catalogue or make_catalogue()), seed)


def asking(targets, histories=HISTORIES):
    batch = collate(histories, 10)
    batch.pos_item = torch.tensor(targets)
    return batch


def number(terms): return {name: x.item() for name, x in terms.items()}


def total(terms, gamma=1e-4, lam=1e-3):
    factor = {"cross_entropy": 1., "sequence_item": 1., "sequence_sequence": lam, "diversity": gamma}
    return sum(factor[name] * x for name, x in terms.items())


# Tokens

@pytest.mark.parametrize("options", [{}, dict(centred=False), dict(released=("missing_bias",)), dict(centred=False, released=("missing_bias",)),
                                     dict(text_size=None), dict(image_size=None)], ids=str)
def test_tokens_equal_loops(options):
    model = shaken(**options)
    slow, fast, catalogue = tokens(numbers(model), model.catalogue, "missing_bias" not in options.get("released", ())), model.items.adapters(), model.catalogue
    zero = np.zeros(D)
    np.testing.assert_allclose(fast.detach(), [[zero if t is None else t for t in row] for row in slow], rtol=0, atol=1e-9)
    assert model.items.adapters.missing_token_mask.tolist() == [[t is None for t in row] for row in slow]
    names = [name for name in ("text", "image") if options.get(f"{name}_size", 1)]
    assert model.items.adapters.missing_modality_mask.T.tolist() == [getattr(catalogue, f"missing_{name}_mask").tolist() for name in names]
    some = torch.tensor([5, 0, 2, 2])
    torch.testing.assert_close(model.items.adapters(some), fast[some], **CLOSE)


@pytest.mark.parametrize("masked", [True, False])
def test_what_is_missing_teaches_nothing_but_a_released_bias(masked):
    adapters = shaken(released=() if masked else ("missing_bias",)).items.adapters
    for row, lacking in ((0, (0, 1)), (NO_IMAGE, (1,)), (NO_TEXT, (0,)), (NOTHING, (0, 1)), (7, ())):
        adapters.zero_grad()
        (adapters(torch.tensor([row])) * torch.arange(1., D + 1)).sum().backward()
        for place, linear in enumerate(adapters.linear.values()):
            assert bool(linear.weight.grad.any()) == (place not in lacking), (row, place)
            assert bool(linear.bias.grad.any()) == (row > 0 and (place not in lacking or not masked)), (row, place)


@pytest.mark.parametrize("ids", [[1, 2, NO_IMAGE, NO_TEXT, NOTHING], [6, 7, 8, 9]], ids=["lacking", "whole"])
def test_centre_and_spread_are_of_the_given_items_and_taken_once(ids):
    catalogue = make_catalogue()
    adapters = ItemAdapters(TEXT_SIZE, IMAGE_SIZE, D).double()
    adapters.set_catalogue(catalogue)
    assert not adapters.fitted
    adapters.fit_statistics(torch.tensor(ids))
    for name, centring in adapters.centring.items():
        mean, missing = getattr(catalogue, f"mean_{name}")().double(), getattr(catalogue, f"missing_{name}_mask")
        there = torch.stack([mean[i] for i in ids if not missing[i]])
        torch.testing.assert_close(centring.center, there.mean(0), **CLOSE)
        torch.testing.assert_close(centring.spread, (there - there.mean(0)).square().mean().sqrt(), **CLOSE)
    before = weights(adapters)
    adapters.fit_statistics(torch.arange(1, V + 1))
    assert adapters.fitted and same(weights(adapters), before)


def test_features_are_not_among_the_weights_and_centres_are():
    names = set(MISSRec(6, 5).state_dict())
    assert {"items.adapters.fitted", "items.adapters.centring.text.center", "items.interests.vectors", "items.interests.of_item", "fusion.kappa"} <= names
    assert not any("features" in name or "mask" in name for name in names)
    assert not any("centring" in name for name in MISSRec(6, 5, centred=False).state_dict())
    assert set(shaken().state_dict()) == names


@pytest.mark.parametrize("sizes, message", [
    (dict(text_size=6, image_size=4), "expects image features of 4 numbers, the catalogue has 5 numbers"),
    (dict(text_size=7), "expects text features of 7 numbers, the catalogue has 6 numbers")])
def test_a_refused_catalogue_leaves_the_old_one(sizes, message):
    model = MISSRec(**sizes)
    with pytest.raises(ValueError, match=message): model.set_catalogue(make_catalogue())
    assert model.catalogue is None
    good = shaken(transductive=True)
    before, features = weights(good), good.items.adapters.text_features
    with pytest.raises(ValueError, match="expects text features"):
        good.set_catalogue(catalogue_from_arrays(["a", "b"], np.ones((2, 9), np.float32), np.ones((2, 5), np.float32)))
    assert same(weights(good), before) and good.items.adapters.text_features is features and good.catalogue.n_items == V


@pytest.mark.parametrize("options, message", [
    ({}, "give text_size, image_size or both"), (dict(text_size=6, fusion="sum"), "fusion must be 'add' or 'stack', got 'sum'"),
    (dict(text_size=6, image_size=5, candidate_fusion="mean"), "candidate_fusion must be 'shared', 'per_item' or 'static', got 'mean'"),
    (dict(text_size=6, n_layers=3), "n_layers must be even"), (dict(text_size=6, hidden_size=10), "multiple of n_heads")])
def test_arguments_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message): MISSRec(**options)


# Input

@each_fusion
@pytest.mark.parametrize("learned", [False, True])
def test_the_input_is_laid_out_by_hand(fusion, learned):
    set_seed(0)
    module = HistoryInput(4, max_len=6, fusion=fusion).double().eval()
    nn.init.normal_(module.norm.weight), nn.init.normal_(module.norm.bias)
    given = torch.randn(3, 4, 2, 4, dtype=torch.float64)
    missing = torch.zeros(3, 4, 2, dtype=torch.bool)
    missing[0, 1, 1] = missing[1, 2, 0] = missing[2, 0] = True  # no picture; no text, at the end; neither, alone
    given[missing] = 0
    pad, lengths = torch.arange(4) >= torch.tensor([[4], [3], [1]]), [4, 3, 1]
    vectors = torch.randn(3, 4, 4, dtype=torch.float64) if learned else None
    x, hidden, asked = module(given, missing, pad, vectors)
    own = lambda b, l, v: module.norm(v + module.position_emb.weight[l] + (vectors[b, l] if learned else 0))
    if fusion == "add":
        assert x.shape == (3, 4, 4) and hidden is pad and asked.tolist() == [3, 2, 0]
        for b, length in enumerate(lengths):
            for l in range(length): torch.testing.assert_close(x[b, l], own(b, l, given[b, l].sum(0)), **CLOSE)
        return
    assert x.shape == (3, 8, 4) and asked.tolist() == [3, 4 + 2, 0]
    visible = [[True] * 4 + [True, False, True, True], [True, True, False, False] + [True, True, True, False],
               [True, False, False, False] + [True, False, False, False]]
    assert (~hidden).tolist() == visible
    for b in range(3):
        for place in (~hidden[b]).nonzero()[:, 0].tolist():
            torch.testing.assert_close(x[b, place], own(b, place % 4, given[b, place % 4, place // 4]), **CLOSE)


def test_too_long_a_history_is_refused():
    with pytest.raises(ValueError, match="a history of 5 items is longer than max_len = 4"):
        HistoryInput(4, max_len=4)(torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 2, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool))


# Fusion

@pytest.mark.parametrize("per_item", [False, True])
def test_fusion_equals_a_softmax_over_what_is_present(per_item):
    generator = torch.Generator().manual_seed(0)
    text, image = 2 * torch.rand(2, 3, 8, generator=generator, dtype=torch.float64) - 1
    missing = torch.rand(8, 2, generator=generator) < .4
    kappa = 5 * torch.randn(8 if per_item else (), generator=generator, dtype=torch.float64)
    text[:, missing[:, 0]], image[:, missing[:, 1]] = 0, 0
    fast = fuse_modalities(text, image, kappa, missing)
    assert missing.all(1).any() and (~missing).all(1).any() and (missing.sum(1) == 1).any()
    for t in range(3):
        for n in range(8):
            pair = [s for s, gone in zip((text[t, n].item(), image[t, n].item()), missing[n]) if not gone]
            w = softmax([(kappa[n] if per_item else kappa).item() * s for s in pair]) if pair else []
            assert fast[t, n].item() == pytest.approx(sum(a * s for a, s in zip(w, pair)), abs=1e-12)


def test_fusion_starts_as_the_average_and_goes_to_the_better_or_the_worse():
    text, image, all_there = torch.tensor([[.9, -.2]]), torch.tensor([[.1, .4]]), torch.zeros(2, 2, dtype=torch.bool)
    for kappa, expected in ((0., [.5, .1]), (1e4, [.9, .4]), (-1e4, [.1, -.2])):
        torch.testing.assert_close(fuse_modalities(text, image, torch.tensor(kappa), all_there), torch.tensor([expected]))
    kappa = torch.zeros((), requires_grad=True)
    fuse_modalities(text, image, kappa, all_there).sum().backward()
    assert kappa.grad.item() == pytest.approx((.8 ** 2 + .6 ** 2) / 4)  # a quarter of the squared difference


@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("n_modalities", [1, 2])
def test_scores_and_their_gradients(has_ids, n_modalities):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    u, vectors, kappa = draw(2, 1, 3), draw(4, n_modalities + has_ids, 3), draw()
    missing = torch.zeros(4, n_modalities + has_ids, dtype=torch.bool)
    with torch.no_grad():
        missing[1, 0] = True
        vectors[missing] = 0
    found = fused_score(u, vectors, kappa, missing, has_ids)
    for t in range(2):
        for n in range(4):
            s = [(u[t, 0] @ v).item() for v, gone in zip(vectors[n, :n_modalities], missing[n]) if not gone]
            slow = sum(w * x for w, x in zip(softmax([kappa.item() * x for x in s]), s)) if s else 0.
            if has_ids: slow = ((u[t, 0] @ vectors[n, -1]).item() + 2 * slow) / 3
            assert found[t, n].item() == pytest.approx(slow, abs=1e-12)
    assert torch.autograd.gradcheck(lambda *x: fused_score(*x, missing, has_ids), (u, vectors, kappa))


# Histories

OPTIONS = [{}, dict(fusion="stack"), dict(transductive=True), dict(fusion="stack", transductive=True), dict(text_size=None),
           dict(image_size=None), dict(image_size=None, transductive=True), dict(text_size=None, fusion="stack"),
           dict(released=("missing_bias",)), dict(centred=False, n_layers=4), dict(candidate_fusion="static"),
           dict(candidate_fusion="per_item", transductive=True)]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "plain")


def slow_users(model, histories=HISTORIES, **options):
    p, catalogue = numbers(model), model.catalogue
    toks = tokens(p, catalogue, model.items.adapters.masked_missing)
    return [read_user(p, toks, h, fusion=model.reader.inputs.fusion)[0] for h in histories], toks, p


@each_option
def test_histories_and_scores_equal_loops(options):
    model = shaken(**options)
    users, toks, p = slow_users(model)
    batch = collate(HISTORIES, 10)
    found = model.encode_sequence(batch)
    assert found.shape == (6, 1, D)
    np.testing.assert_allclose(found[:, 0].detach(), users, rtol=0, atol=1e-9)
    items, kind = model.encode_items(), options.get("candidate_fusion", "shared")
    assert items.vectors.shape[1] == len(model.items.adapters.linear) + ("transductive" in options)
    slow = [[score(p, u, j, toks, kind) for j in range(1, V + 1)] for u in users]
    np.testing.assert_allclose(model.score(found, items).detach(), slow, rtol=0, atol=1e-9)


@each_option
def test_a_query_is_the_history_up_to_its_position(options):
    model, batch = shaken(**options), collate(HISTORIES, 10)
    asked = (~batch.item_pad_mask).flatten().nonzero()[:, 0]
    prefixes = [h[:end] for h in HISTORIES for end in range(1, len(h) + 1)]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([model.encode_sequence(collate([h], 10)) for h in prefixes])
    torch.testing.assert_close(model.encode_sequence(batch, asked[order]), alone[order], **CLOSE)


def test_what_a_single_modality_does_not_read_does_not_matter():
    for name, kept in (("text", dict(image_size=None)), ("image", dict(text_size=None))):
        model, expected = shaken(**kept), None
        other = "image" if name == "text" else "text"
        for catalogue in (make_catalogue(), replace(make_catalogue(), **{f"{other}_emb": None})):
            model.set_catalogue(catalogue)
            found = model.score(model.encode_sequence(collate(HISTORIES, 10)), model.encode_items())
            if expected is None: expected = found
            assert torch.equal(found, expected)
        assert model.fusion.kappa is None and model.encode_items().vectors.shape == (V, 1, D)


def test_items_with_nothing_score_zero_and_have_no_interest():
    model = shaken()
    assert not model.items.interests.of_item[NOTHING].any() and model.items.interests.of_item[NO_IMAGE, 1] == 0 < model.items.interests.of_item[NO_IMAGE, 0]
    found = model.score(model.encode_sequence(collate(HISTORIES, 10)), model.encode_items())
    assert (found[:, NOTHING - 1] == 0).all() and (found[:, :NOTHING - 1] != 0).all()
    assert model.items.interests.sets(collate([[NOTHING, NOTHING]], 10).item_seq).tolist() == [[0]]


def test_every_item_of_a_step_is_encoded_once():
    model, asked = shaken(), []
    model.items.adapters.register_forward_pre_hook(lambda module, args: asked.append(None if not args or args[0] is None else args[0].tolist()))
    model.encode_sequence(collate(HISTORIES, 10))
    model.pretrain_loss(asking(REPEATED))
    for ids in asked: assert len(set(ids)) == len(ids)
    asked.clear()
    model.finetune_loss(asking(REPEATED))
    assert asked == [None], "the table of candidates also gives the inputs"


@pytest.mark.parametrize("options", [{}, dict(transductive=True), dict(candidate_fusion="per_item", transductive=True),
                                     dict(text_size=None)], ids=str)
def test_a_sample_of_everything_is_everything(options):
    "The loss and each gradient; fewer candidates are fewer items in the adapters."
    found = []
    for n_candidates in (None, V - 1):
        model = shaken(**options, n_candidates=n_candidates).train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout): part.p = 0.
        loss = model.finetune_loss(asking(REPEATED))["loss"]
        found.append((loss.item(), gradients_of(model, loss)))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-9)
    for name, g in found[0][1].items(): torch.testing.assert_close(found[1][1][name], g, **CLOSE, msg=name)
    model, asked = shaken(**options, n_candidates=1).train(), []
    model.items.adapters.register_forward_pre_hook(lambda module, args: asked.append(args[0] if args else None))
    model.finetune_loss(asking([3], [[1, 2]]))
    assert {1, 2, 3} <= set(asked[0].tolist()) and len(asked[0]) <= 4
    model.eval().finetune_loss(asking(REPEATED))
    assert asked[1] is None, "evaluation compares with all"


def views_of(model):
    batch = collate(HISTORIES, 10)
    return model.items.table(model.items.adapters()), view_histories(batch, model.items.interests)


@pytest.mark.parametrize("piece_cost", [0, 1, 3, None])
@each_fusion
def test_pieces_are_read_as_one_batch(piece_cost, fusion):
    model, results = shaken(fusion=fusion), []
    for cost in (10**6, piece_cost):
        table, view = views_of(model)
        assert isinstance(view, HistoryView)
        users, contexts = model.reader(*table, view, model.items.interests, model.item_emb, cost)
        results.append((users, len(contexts), sum(len(pad) for _, pad in contexts)))
        model.zero_grad()
        (users * torch.randn(users.shape, generator=torch.Generator().manual_seed(0), dtype=users.dtype)).sum().backward()
        results[-1] += ({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None},)
    (a, one, n, a_gradients), (b, many, m, b_gradients) = results
    torch.testing.assert_close(a, b, **CLOSE)
    assert one == 1 and n == m == 6 and (piece_cost != 0 or many == len(set(map(len, HISTORIES))))
    for name in a_gradients: torch.testing.assert_close(a_gradients[name], b_gradients[name], **CLOSE, msg=name)


def test_few_places_are_read_at_a_time(monkeypatch):
    "The same vectors and gradients, in parts as small as asked for."
    model, sizes = shaken().eval(), []
    original = InterestEncoderDecoder.forward
    monkeypatch.setattr(InterestEncoderDecoder, "forward", lambda self, x, *a, **k: sizes.append(x.shape[:2].numel()) or original(self, x, *a, **k))
    def vectors_and_gradients():
        u = model.encode_sequence(asking(REPEATED))
        weights = torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=u.dtype)
        return u.detach(), gradients_of(model, (u * weights).sum())
    (whole, whole_gradients), before, _ = vectors_and_gradients(), max(sizes), sizes.clear()
    monkeypatch.setattr(model.reader, "part_numbers", 6 * 2 * model.items.interests.vectors.shape[1])
    parts, gradients = vectors_and_gradients()
    torch.testing.assert_close(parts, whole, **CLOSE)
    for name, g in whole_gradients.items(): torch.testing.assert_close(gradients[name], g, **CLOSE, msg=name)
    assert max(sizes) <= 6 < before


@pytest.mark.parametrize("phase", ["finetune", "pretrain"])
def test_what_is_computed_twice_has_the_same_numbers_and_gradients(phase, monkeypatch):
    "With dropout on; and nothing is computed twice while the interests of a step are few."
    found, passes = [], []
    original = InterestEncoderDecoder.forward
    monkeypatch.setattr(InterestEncoderDecoder, "forward", lambda *a, **k: passes.append(1) or original(*a, **k))
    for kept_numbers in (1 << 20, 100, 0):
        model = shaken(dropout=.3).train()
        monkeypatch.setattr(model.reader, "kept_numbers", kept_numbers)
        set_seed(0)
        terms = model(asking(REPEATED), phase)
        passes.clear()
        found.append((number(terms), gradients_of(model, terms["loss"]), len(passes), torch.rand(3)))
    few, some, all_of_it = found
    assert few[2] == 0 < some[2] <= all_of_it[2]
    for other in (some, all_of_it):
        assert other[0] == few[0] and torch.equal(other[3], few[3]), "later draws are the same, too"
        for name, g in few[1].items(): assert torch.equal(other[1][name], g), name


# Fine-tuning

@each_option
@each_target
def test_finetuning_equals_loops(options, targets):
    model = shaken(**options)
    slow = finetuning(numbers(model), model.catalogue, HISTORIES, targets, fusion=model.reader.inputs.fusion,
                      candidate=options.get("candidate_fusion", "shared"), masked=model.items.adapters.masked_missing)
    assert number(model.finetune_loss(asking(targets))) == pytest.approx({"loss": total(slow), **slow}, abs=1e-8)
    assert slow["cross_entropy"] > .1


@pytest.mark.parametrize("options", [dict(temperature=.5), dict(diversity_weight=3.), dict(released=("diversity",), diversity_weight=1.)], ids=str)
def test_options_of_finetuning_equal_loops(options):
    model = shaken(**options)
    slow = finetuning(numbers(model), model.catalogue, HISTORIES, REPEATED, options.get("temperature", TAU),
                      released="diversity" in options.get("released", ()))
    whole = total(slow, options.get("diversity_weight", 1e-4))
    assert number(model.finetune_loss(asking(REPEATED))) == pytest.approx({"loss": whole, **slow}, abs=1e-8, rel=1e-7)  # the released R counts in 32 bits


def test_released_bias_of_what_is_missing_is_hidden_where_stacked():
    model = shaken(released=("missing_bias",), fusion="stack")
    adapters = model.items.adapters
    assert adapters.missing_token_mask[1:].any().item() is False and adapters.missing_modality_mask[1:].any()
    assert torch.equal(model.items.table(adapters())[1], adapters.missing_modality_mask.flatten())


def test_windows_are_finetuned_as_prefixes():
    model, store = shaken(), make_store(40)
    found = [model.finetune_loss(batches[0])["loss"] for batches in (prefix_batches(store, TRAIN, 10_000, 10), position_batches(store, 10_000, 10))]
    torch.testing.assert_close(*found, **CLOSE)


def gradients_of(model, loss):
    names, values = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, values, allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for name, x, g in zip(names, values, found)}


@pytest.mark.parametrize("options", [{}, dict(transductive=True), dict(candidate_fusion="per_item"), dict(candidate_fusion="static"),
                                     dict(image_size=None)], ids=str)
def test_a_chunked_loss_has_the_same_gradients_also_for_kappa(options, monkeypatch):
    model, found = shaken(**options), []
    for max_elements in (1 << 25, 10, 3 * V):
        monkeypatch.setattr(missrec, "full_softmax_cross_entropy", partial(full_softmax_cross_entropy, max_elements=max_elements))
        loss = model.finetune_loss(asking(LACKING))["loss"]
        found.append((loss.detach(), gradients_of(model, loss)))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], **CLOSE)
        for name, g in found[0][1].items(): torch.testing.assert_close(gradients[name], g, **CLOSE, msg=name)
    for name in ("fusion.kappa", "fusion.item_kappa.weight"):
        if name in found[0][1]: assert found[-1][1][name].any(), name


def along(model, loss, slow, step=1e-6, seed=0):
    "Slope of a loss along a random direction through all weights: by its gradients, and by two runs of the loops."
    gradients, p, generator = gradients_of(model, loss), numbers(model), torch.Generator().manual_seed(seed)
    ways = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in gradients.items()}
    for name in ("item_emb.weight", "fusion.item_kappa.weight"):
        if name in ways: ways[name][0] = 0
    sides = [slow(p | {name: p[name] + sign * step * way.numpy() for name, way in ways.items()}) for sign in (1, -1)]
    return sum((g * ways[name]).sum().item() for name, g in gradients.items()), (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize("options", [dict(diversity_weight=1.), dict(fusion="stack", transductive=True), dict(candidate_fusion="per_item"),
                                     dict(released=("missing_bias", "diversity")), dict(image_size=None)], ids=str)
def test_gradients_of_finetuning_equal_the_slope_of_the_loops(options):
    model = shaken(**options)
    def slow(p):
        terms = finetuning(p, model.catalogue, HISTORIES, LACKING, fusion=model.reader.inputs.fusion, candidate=options.get("candidate_fusion", "shared"),
                           masked=model.items.adapters.masked_missing, released="diversity" in model.released)
        return total(terms, model.diversity_weight)
    a, b = along(model, model.finetune_loss(asking(LACKING))["loss"], slow)
    assert abs(a) > .01 and a == pytest.approx(b, rel=1e-5)


# Pre-training

def no_drop(monkeypatch): monkeypatch.setattr(missrec, "draw_item_drop", lambda item_pad_mask, rate: torch.zeros_like(item_pad_mask))


def some_drop(monkeypatch):
    "Drop a fixed choice, never the first; returns the kept histories as they will be."
    drop = (torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < .45) & (torch.arange(6) > 0)
    monkeypatch.setattr(missrec, "draw_item_drop", lambda item_pad_mask, rate: drop & ~item_pad_mask)
    return [[i for i, gone in zip(h, row) if not gone] for h, row in zip(HISTORIES, drop.tolist())]


def undisturbed(p, toks, histories): return [([toks[i] for i in h], interest_set(p, h)) for h in histories]


@each_target
@pytest.mark.parametrize("keep", [False, True], ids=["removed", "kept"])
def test_pretraining_equals_loops(targets, keep, monkeypatch):
    model, kept = shaken(released=("false_negatives",) if keep else ()), some_drop(monkeypatch)
    assert kept != HISTORIES
    p = numbers(model)
    slow = pretraining(p, model.catalogue, HISTORIES, undisturbed(p, tokens(p, model.catalogue), kept), targets, keep=keep)
    assert number(model.pretrain_loss(asking(targets))) == pytest.approx({"loss": total(slow), **slow}, abs=1e-8)


def test_keeping_false_negatives_matters_where_targets_repeat(monkeypatch):
    no_drop(monkeypatch)
    losses = {(keep, targets): number(shaken(released=("false_negatives",) if keep else ()).pretrain_loss(asking(targets)))
              for keep in (False, True) for targets in (DISTINCT, REPEATED)}
    assert losses[False, DISTINCT] == losses[True, DISTINCT]
    for term in ("sequence_item", "sequence_sequence"): assert losses[True, REPEATED][term] > losses[False, REPEATED][term] + 1e-4


@pytest.mark.parametrize("options", [dict(temperature=.5), dict(sequence_weight=2., diversity_weight=.5), dict(fusion="stack"),
                                     dict(released=("diversity",)), dict(released=("missing_bias",)), dict(text_size=None), dict(image_size=None)], ids=str)
def test_options_of_pretraining_equal_loops(options, monkeypatch):
    model, kept = shaken(**options), some_drop(monkeypatch)
    p = numbers(model)
    toks = tokens(p, model.catalogue, model.items.adapters.masked_missing)
    slow = pretraining(p, model.catalogue, HISTORIES, undisturbed(p, toks, kept), REPEATED, options.get("temperature", TAU),
                       released="diversity" in model.released, masked=model.items.adapters.masked_missing, fusion=model.reader.inputs.fusion)
    whole = total(slow, model.diversity_weight, model.sequence_weight)
    assert number(model.pretrain_loss(asking(REPEATED))) == pytest.approx({"loss": whole, **slow}, abs=1e-8, rel=1e-7)  # the released R counts in 32 bits


def test_released_item_drop_equals_loops(monkeypatch):
    "Texts close ranks, pictures stay where they were, and so do the interests of all pictures."
    model, kept = shaken(released=("item_drop_alignment",)), some_drop(monkeypatch)
    p = numbers(model)
    toks, of_item, disturbed = tokens(p, model.catalogue), p["items.interests.of_item"], []
    for h, short in zip(HISTORIES, kept):
        pairs = [[toks[i][0], toks[h[l]][1]] for l, i in enumerate(short)]
        disturbed.append((pairs, ({int(of_item[i, 0]) for i in short} | {int(of_item[i, 1]) for i in h}) - {0}))
    slow = pretraining(p, model.catalogue, HISTORIES, disturbed, REPEATED)
    found = number(model.pretrain_loss(asking(REPEATED)))
    assert found == pytest.approx({"loss": total(slow), **slow}, abs=1e-8)
    aligned = number(shaken().pretrain_loss(asking(REPEATED)))
    assert abs(aligned["sequence_sequence"] - found["sequence_sequence"]) > 1e-4 and aligned["sequence_item"] == pytest.approx(found["sequence_item"])


def test_word_drop_equals_loops(monkeypatch):
    "Some texts speak with words left out; pictures, interests and targets do not change."
    catalogue, drop = make_catalogue(), torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < .5
    model = shaken(word_drop_share=1.)
    monkeypatch.setattr(missrec, "draw_word_drop", lambda item_pad_mask, rate: drop & ~item_pad_mask)
    p = numbers(model)
    toks, short, disturbed = tokens(p, catalogue), tokens(p, catalogue, dropped=True), []
    for h, row in zip(HISTORIES, drop.tolist()):
        disturbed.append(([[short[i][0], toks[i][1]] if gone else toks[i] for i, gone in zip(h, row)], interest_set(p, h)))
    slow = pretraining(p, catalogue, HISTORIES, disturbed, REPEATED)
    assert number(model.pretrain_loss(asking(REPEATED))) == pytest.approx({"loss": total(slow), **slow}, abs=1e-8)
    monkeypatch.setattr(missrec, "draw_word_drop", lambda item_pad_mask, rate: torch.zeros_like(item_pad_mask))
    still = number(model.pretrain_loss(asking(REPEATED)))
    assert abs(still["sequence_sequence"] - slow["sequence_sequence"]) > 1e-4


@pytest.mark.parametrize("options", [{}, dict(released=("item_drop_alignment",)), dict(released=("diversity",), fusion="stack")], ids=str)
@pytest.mark.parametrize("piece_cost", [0, 1, 3])
def test_pretraining_in_pieces_is_one_padded_batch(options, piece_cost, monkeypatch):
    model, found = shaken(**options, diversity_weight=1., sequence_weight=1.), []
    some_drop(monkeypatch)
    original = InterestReader.forward
    for cost in (10**6, piece_cost):
        monkeypatch.setattr(InterestReader, "forward", partialmethod(original, piece_cost=cost))
        terms = model.pretrain_loss(asking(REPEATED))
        found.append((number(terms), gradients_of(model, terms["loss"])))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-9)
    for name, g in found[0][1].items(): torch.testing.assert_close(found[1][1][name], g, **CLOSE, msg=name)


@pytest.mark.parametrize("options", [{}, dict(released=("item_drop_alignment", "false_negatives")), dict(released=("diversity",))], ids=str)
def test_gradients_of_pretraining_equal_the_slope_of_the_loops(options, monkeypatch):
    model, kept = shaken(**options, diversity_weight=1., sequence_weight=1.), some_drop(monkeypatch)
    def slow(p):
        toks, of_item = tokens(p, model.catalogue), p["items.interests.of_item"]
        disturbed = undisturbed(p, toks, kept)
        if "item_drop_alignment" in model.released:
            disturbed = [([[toks[i][0], toks[h[l]][1]] for l, i in enumerate(short)],
                          ({int(of_item[i, 0]) for i in short} | {int(of_item[i, 1]) for i in h}) - {0}) for h, short in zip(HISTORIES, kept)]
        return total(pretraining(p, model.catalogue, HISTORIES, disturbed, REPEATED, keep="false_negatives" in model.released,
                                 released="diversity" in model.released), 1., 1.)
    a, b = along(model, model.pretrain_loss(asking(REPEATED))["loss"], slow)
    assert abs(a) > .01 and a == pytest.approx(b, rel=1e-5)


PARTS = {"text adapter": "items.adapters.linear.text.", "image adapter": "items.adapters.linear.image.", "input": "reader.inputs.",
         "encoder": "reader.trunk.encoder", "decoder": "reader.trunk.decoder", "kappa": "fusion.kappa"}


def reached(model, term):
    "Which parts a term teaches; a part is taught if every weight of it gets some gradient."
    found = gradients_of(model, term)
    moved = {part: [g.abs().max().item() > 1e-12 for name, g in found.items() if name.startswith(prefix)] for part, prefix in PARTS.items()}
    for part, some in moved.items(): assert all(some) or not any(some), f"only some weights of {part}"
    return {part for part, some in moved.items() if any(some)}


ADAPTERS = {"text adapter", "image adapter"}


@pytest.mark.parametrize("phase, term, expected", [
    ("finetune", "cross_entropy", set(PARTS)), ("finetune", "diversity", {"encoder"}),
    ("pretrain", "sequence_item", set(PARTS)), ("pretrain", "sequence_sequence", set(PARTS) - {"kappa"}), ("pretrain", "diversity", {"encoder"})])
def test_each_term_teaches_what_the_paper_says(phase, term, expected):
    "Interests are no weights, so the push that keeps them apart ends in the context encoder."
    model = shaken()
    assert reached(model, model(asking(DISTINCT), phase)[term]) == expected
    assert not model.items.interests.vectors.requires_grad


def test_as_a_candidate_an_item_teaches_adapters_and_kappa_only(monkeypatch):
    original = InterestReader.forward
    def silent(*args):
        users, contexts = original(*args)
        return users.detach(), [(xi.detach(), pad) for xi, pad in contexts]
    monkeypatch.setattr(InterestReader, "forward", silent)
    model = shaken()
    assert reached(model, model.finetune_loss(asking(DISTINCT))["cross_entropy"]) == ADAPTERS | {"kappa"}
    assert reached(model, model.pretrain_loss(asking(DISTINCT))["sequence_item"]) == ADAPTERS | {"kappa"}


def test_steps_disturb_words_one_time_of_ten(monkeypatch):
    kinds = []
    model = shaken(word_drop_share=.1, item_drop=.3, word_drop=.4)
    def noting(name, original):
        def draw(item_pad_mask, rate):
            kinds.append((name, rate))
            return original(item_pad_mask, rate)
        return draw
    for name in ("draw_item_drop", "draw_word_drop"): monkeypatch.setattr(missrec, name, noting(name, getattr(missrec, name)))
    table, batch, ids = model.items.table(model.items.adapters()), asking(DISTINCT), torch.arange(V + 1)
    set_seed(0)
    for _ in range(500): disturbed_view(model.items, *table, batch, ids, **model.disturbance)
    assert len(kinds) == 500 and 30 <= kinds.count(("draw_word_drop", .4)) <= 70 and kinds.count(("draw_item_drop", .3)) == 500 - kinds.count(("draw_word_drop", .4))


def test_word_drop_without_words_is_refused_before_anything_is_drawn():
    wordless = replace(make_catalogue(), dropped_text_emb=None)
    model = shaken(word_drop_share=.1, catalogue=wordless)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"build_catalogue\(\.\.\., word_drop=0\.15\), or set word_drop_share=0"): model.pretrain_loss(asking(DISTINCT))
    assert model.finetune_loss(asking(DISTINCT))["loss"].isfinite()
    for options in (dict(text_size=None, word_drop_share=.1), dict(word_drop_share=0.)):  # pictures have no words
        assert shaken(**options, catalogue=wordless).pretrain_loss(asking(DISTINCT))["loss"].isfinite()
    assert model.set_catalogue(make_catalogue()).pretrain_loss(asking(DISTINCT))["loss"].isfinite()
    model.set_catalogue(wordless)
    assert model.items.adapters.dropped_text_features is None, "no words of the last catalogue stay"


def test_one_user_alone_has_nothing_to_tell_apart():
    model = shaken(diversity_weight=0.)
    terms = model.pretrain_loss(asking((6,), [[1, 2, 3]]))
    assert terms["sequence_item"] == 0 == terms["sequence_sequence"]
    assert not any(g.abs().max() > 1e-9 for g in gradients_of(model, terms["loss"]).values())


def test_transductive_models_have_no_pretraining():
    model = shaken(transductive=True)
    assert not model.has_pretraining
    with pytest.raises(NotImplementedError, match="MISSRec with learned item vectors has no pre-training"): model.pretrain_loss(asking(DISTINCT))


def test_windows_are_refused_in_pretraining():
    with pytest.raises(ValueError, match="one query per row"): shaken().pretrain_loss(position_batches(make_store(), 99, 10)[0])


# What is trained

def test_sizes_of_the_paper():
    paper = dict(text_size=512, image_size=512, hidden_size=300, n_layers=2, n_heads=4, inner_size=256, max_len=50)
    count = lambda model: (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad))
    for n_items, extra in ((None, 0), (4385, 300 * 4386)):
        kind = {} if n_items is None else dict(transductive=True, n_items=n_items)
        assert count(MISSRec(**paper, **kind, frozen_trunk=True)) == (1_719_513 + extra, 308_401 + extra)


FREE = {"fusion.kappa", *(f"items.adapters.linear.{name}.{kind}" for name in ("text", "image") for kind in ("weight", "bias")),
        "reader.inputs.norm.weight", "reader.inputs.norm.bias"}


@each_mode
def test_a_frozen_trunk_stays_and_the_rest_learns(transductive):
    model = build("missrec" if transductive else "content_missrec", frozen_trunk=True)
    free = FREE | ({"item_emb.weight"} if transductive else set())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == free
    before = weights(model)
    fit_quick(model)
    for name, p in model.named_parameters(): assert torch.equal(p, before[name]) == (name not in free), name


def fit_quick(model, store=None, **options):
    return training.fit(model, store or make_store(held_out=False), options.pop("phase", "finetune"), **QUICK | options)


def test_first_weights():
    set_seed(0)
    model = MISSRec(256, 256, transductive=True, n_items=300, hidden_size=128)
    for x in (model.items.adapters.linear["text"].weight, model.reader.inputs.position_emb.weight, model.reader.trunk.decoder[0].cross_attention.query.weight,
              model.item_emb.weight[1:]):
        assert x.std().item() == pytest.approx(.02, rel=.05)
    assert model.fusion.kappa == 0 and not model.items.adapters.linear["image"].bias.any() and (model.reader.inputs.norm.weight == 1).all()
    kappas = MISSRec(6, 5, n_items=7, candidate_fusion="per_item")
    assert kappas.fusion.kappa is None and kappas.fusion.item_kappa.weight.shape == (8, 1) and not kappas.fusion.item_kappa.weight.any()
    static = MISSRec(6, 5, candidate_fusion="static")
    assert not any("kappa" in name for name in static.state_dict())


def test_only_candidates_of_the_batch_teach_a_kappa_of_their_own():
    model = shaken(candidate_fusion="per_item")
    g = gradients_of(model, model.finetune_loss(asking(DISTINCT))["loss"])["fusion.item_kappa.weight"]
    moved = [bool(x) for x in g[:, 0] != 0]
    assert moved == [i not in (0, NO_IMAGE, NO_TEXT, NOTHING) for i in range(V + 1)], "one modality leaves nothing to weigh"
    g = gradients_of(model, model.pretrain_loss(asking(DISTINCT))["loss"])["fusion.item_kappa.weight"]
    assert {i for i in range(V + 1) if g[i]} == set(DISTINCT) - {NO_IMAGE, NO_TEXT, NOTHING}


# Interests and the catalogue

def spy(monkeypatch):
    calls, original = [], interests.discover_interests
    def noting(tokens, missing, training_items, ratio, method, seed):
        calls.append((tokens.clone(), None if training_items is None else training_items.tolist(), ratio, method, seed))
        return original(tokens, missing, training_items, ratio, method, seed)
    monkeypatch.setattr(interests, "discover_interests", noting)
    return calls


def test_interests_are_found_at_the_first_catalogue_and_at_every_epoch(monkeypatch):
    calls, store = spy(monkeypatch), make_store()
    model = build("content_missrec", interest_ratio=.3)
    assert [call[1:4] for call in calls] == [(None, .3, "kmeans")] and len(model.items.interests.vectors) == math.ceil(.3 * 20) + 1
    model.set_catalogue(make_catalogue())
    assert len(calls) == 1, "the same items again need nothing"
    fit_quick(model, store)
    assert [call[1:4] for call in calls[1:]] == [(store.training_items.tolist(), .3, "kmeans")] * 3
    assert len({call[4] for call in calls[1:]}) == 3, "each epoch draws anew"
    assert not torch.equal(calls[1][0], calls[2][0]), "the adapters have moved"
    other = spy(monkeypatch)
    build("content_missrec", interest_method="dpc_knn")
    assert other[0][3] == "dpc_knn"


def test_epochs_are_prepared_without_luck_gradients_or_dropout():
    "Twice the same, whatever was drawn before; random numbers of training are not used up."
    model, store, found = build("content_missrec", dropout=.5).train(), make_store(), []
    for noise in (1, 2):
        set_seed(noise)
        state = torch.get_rng_state()
        model.start_epoch(store, 4)
        assert torch.equal(state, torch.get_rng_state()) and model.training
        found.append((model.items.interests.vectors.clone(), model.items.interests.of_item.clone()))
    assert all(torch.equal(*pair) for pair in zip(*found))
    assert not model.items.interests.vectors.requires_grad and not model.items.interests.vectors[0].any()
    model.start_epoch(store, 5)
    assert not torch.equal(model.items.interests.vectors, found[0][0])


def test_items_outside_training_leave_no_trace():
    "Other features of items that occur in held-out events only: same centres, same interests."
    items, stage = np.tile(np.array([1, 2, 6, 7, 11, 12], np.int32), 4), np.tile(np.array([TRAIN] * 4 + [VALID, TEST], np.int8), 4)
    store = SequenceStore(items, np.arange(0, 25, 6), stage, V)
    found, planted = [], make_catalogue()
    for row in (11, 12): planted.text_emb[row], planted.image_emb[row] = 100., -100.
    for catalogue in (make_catalogue(), planted):
        set_seed(0)
        model = with_interests().set_catalogue(catalogue)
        model.start_epoch(store, 0)
        found.append((model.items.interests.vectors, model.items.interests.of_item[[1, 2, 6, 7]], model.items.adapters.centring["text"].center))
    assert store.training_items.tolist() == [1, 2, 6, 7]
    assert all(torch.equal(*pair) for pair in zip(*found))


def brute_nearest(model, row, place):
    token = model.items.adapters(torch.tensor([row]))[0, place]
    return int((model.items.interests.vectors[1:] - token).square().sum(1).argmin()) + 1


def test_new_items_get_the_nearest_interest_and_old_ones_keep_theirs():
    model, old = shaken(), make_catalogue()
    with torch.no_grad():
        for x in model.items.adapters.parameters(): x.mul_(-1)  # now the nearest interests are others, as in the middle of an epoch
    before, table = model.items.interests.of_item.clone(), model.items.interests.vectors.clone()
    rows = [*range(V, 0, -1), 1, 2, NO_IMAGE]
    model.set_catalogue(replace(old.take(rows), item_tokens=["[PAD]", *old.item_tokens[:0:-1], "new-1", "new-2", "new-3"]))
    assert torch.equal(model.items.interests.vectors, table)
    assert torch.equal(model.items.interests.of_item[1:V + 1], before[1:].flip(0))
    for row in (V + 1, V + 2, V + 3):
        for place in (0, 1):
            expected = 0 if (row, place) == (V + 3, 1) else brute_nearest(model, row, place)
            assert model.items.interests.of_item[row, place] == expected
    assert any(model.items.interests.of_item[V + 1, place] != before[1, place] for place in (0, 1)), "or the test says nothing"


def test_a_picture_that_comes_or_goes_takes_its_interest_along():
    model, catalogue = shaken(), make_catalogue()
    before = model.items.interests.of_item.clone()
    image, pad = catalogue.image_emb.clone(), catalogue.image_pad_mask.clone()
    image[NO_IMAGE], pad[NO_IMAGE], image[7], pad[7] = image[8], pad[8], 0, True
    model.set_catalogue(replace(catalogue, image_emb=image, image_pad_mask=pad))
    assert model.items.interests.of_item[7].tolist() == [before[7, 0], 0]
    assert model.items.interests.of_item[NO_IMAGE].tolist() == [before[NO_IMAGE, 0], brute_nearest(model, NO_IMAGE, 1)]


def test_a_kappa_and_a_vector_of_each_item_follow_the_catalogue():
    model, old = shaken(transductive=True, candidate_fusion="per_item"), make_catalogue()
    kappa, vector = model.fusion.item_kappa.weight.clone(), model.item_emb.weight.clone()
    model.set_catalogue(replace(old.take([7, 2, 1]), item_tokens=["[PAD]", "item-7", "item-2", "new"]))
    assert torch.equal(model.fusion.item_kappa.weight, torch.stack([kappa[0], kappa[7], kappa[2], torch.zeros(1, dtype=kappa.dtype)]))
    assert torch.equal(model.item_emb.weight[1:3], vector[[7, 2]]) and not model.item_emb.weight[3].any()
    assert model.items.interests.of_item.shape == (4, 2) and model.fusion.item_kappa.weight.requires_grad


# Interests and saved weights

def test_weights_with_another_number_of_interests_are_loaded(tmp_path):
    first, second = shaken(interest_ratio=.2), shaken(seed=1, interest_ratio=.8)
    assert len(first.items.interests.vectors) != len(second.items.interests.vectors)
    second.load_state_dict(first.state_dict())
    assert same(weights(second), weights(first))
    batch = collate(HISTORIES, 10)
    assert torch.equal(second.score(second.encode_sequence(batch), second.encode_items()), first.score(first.encode_sequence(batch), first.encode_items()))
    second.float().save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["n_interests"] == len(first.items.interests.vectors) - 1 and config["n_items"] == V
    again = MISSRec.from_pretrained(tmp_path / "saved")
    assert same(weights(again), weights(second))


def test_loading_a_saved_model_clusters_nothing(tmp_path, monkeypatch):
    model = build("missrec")
    fit_quick(model)
    model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without", with_catalogue=False)
    calls = spy(monkeypatch)
    for name in ("with", "without"):
        again = MISSRec.from_pretrained(tmp_path / name)
        if name == "without": again.set_catalogue(make_catalogue())
        assert same(weights(again), weights(model)) and calls == []


@pytest.mark.parametrize("change, message", [
    (lambda state: state | {"items.interests.vectors": torch.zeros(5, D + 1)}, "size mismatch for items.interests.vectors"),
    (lambda state: state | {"items.interests.of_item": torch.zeros(V + 3, 2, dtype=torch.long)}, "size mismatch for items.interests.of_item"),
    (lambda state: {name: x for name, x in state.items() if name != "items.interests.vectors"}, "Missing key.*items.interests.vectors")])
def test_weights_that_do_not_fit_are_refused(change, message):
    model = shaken()
    before = weights(model)
    with pytest.raises(RuntimeError, match=f"(?s){message}"): model.load_state_dict(change(model.state_dict()))
    assert same(weights(model), before)


def test_the_best_epoch_comes_back_with_its_interests(monkeypatch):
    seen, values = [], iter([.1, .3, .2])
    def validate(model, store, metric):
        seen.append(weights(model))
        return next(values)
    monkeypatch.setattr(training, "_validate", validate)
    model = build("content_missrec")
    fit_quick(model, make_store())
    assert same(weights(model), seen[1]) and not torch.equal(seen[1]["items.interests.vectors"], seen[2]["items.interests.vectors"])


def test_a_run_stopped_in_an_epoch_goes_on_with_the_interests_of_that_epoch(tmp_path, monkeypatch):
    "Another ratio would be another run; the same run in a new model continues to the digits of an undisturbed one."
    store, path, options = make_store(), tmp_path / "run.safetensors", dict(checkpoint_every=1, epochs=2)
    calm = build("content_missrec", dropout=.3)
    expected = fit_quick(calm, store, **options, checkpoint=tmp_path / "calm.safetensors")
    step, left = training._train_step, [len(training.training_batches(calm, store, batch_size=16)) + 2]
    def limited(*args):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return step(*args)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train_step", limited)
        with pytest.raises(KeyboardInterrupt): fit_quick(build("content_missrec", dropout=.3), store, **options, checkpoint=path)
    calls, rough = spy(monkeypatch), build("content_missrec", seed=7, dropout=.3)
    history = fit_quick(rough, store, **options, checkpoint=path)
    without = lambda h: [{k: v for k, v in e.items() if k != "seconds"} for e in h.epochs]
    assert without(history) == without(expected) and same(weights(rough), weights(calm))
    assert len(calls) == 1, "at the catalogue; the epoch that was under way did not look for interests again"


def test_pretraining_hands_on_everything_but_items_and_interests():
    source, store = build("content_missrec", interest_ratio=.2), make_store()
    fit_quick(source, store, phase="pretrain")
    target = build("missrec", seed=5)
    own = weights(target)
    transfer_weights(source, target, ("item_emb.", "items.interests."))
    given = weights(source)
    for name, x in weights(target).items():
        if name.startswith(("item_emb", "items.interests.")): assert torch.equal(x, own[name])
        else: assert torch.equal(x, given[name]), name
    fit_quick(target, store)


# Training

@pytest.mark.parametrize("options", [dict(fusion="stack"), dict(text_size=None), dict(image_size=None), dict(candidate_fusion="per_item"),
                                     dict(candidate_fusion="static"), dict(interest_method="dpc_knn"), dict(released=("missing_bias",)),
                                     dict(released=("item_drop_alignment", "diversity", "false_negatives"))], ids=str)
def test_every_kind_learns_in_both_phases(options):
    set_seed(0)
    model, store = with_interests(**options).set_catalogue(make_catalogue()), make_store(12)
    for phase in ("pretrain", "finetune"):
        before = weights(model)
        history = fit_quick(model, store, phase=phase, batch_size=8)
        assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
        for name, p in model.named_parameters():
            if phase == "finetune": assert not torch.equal(p, before[name]), name
    assert evaluate(model, store, TEST).ranks.min() >= 1


def test_word_drop_trains_too():
    set_seed(0)
    model = with_interests(word_drop_share=.5).set_catalogue(make_catalogue())
    history = fit_quick(model, make_store(12), phase="pretrain", epochs=5)
    assert history.epochs[-1]["sequence_item"] < history.epochs[0]["sequence_item"]


def test_dropout_acts_in_training_only():
    model = shaken(dropout=.5)
    batch = collate(HISTORIES, 10)
    calm = model.encode_sequence(batch)
    assert torch.equal(model.encode_sequence(batch), calm)
    assert not torch.allclose(model.train().encode_sequence(batch), calm)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {.5}


# Attention

@each_fusion
@pytest.mark.parametrize("n_layers", [2, 4])
def test_shown_attention_is_over_items_and_over_the_interests_of_the_history(fusion, n_layers):
    model, batch = shaken(fusion=fusion, n_layers=n_layers), collate(HISTORIES, 10)
    width = 6 * (2 if fusion == "stack" else 1)
    found = model.attention(batch)
    assert [tuple(layer.shape) for layer in found] == [(6, 4, width, width)] * (n_layers // 2)
    layers, ids = interest_attention(model, batch)
    p = numbers(model)
    for row, h in enumerate(HISTORIES): assert [i for i in ids[row].tolist() if i] == sorted(interest_set(p, h))
    for layer in layers:
        assert layer.shape == (6, 4, width, ids.shape[1])
        sums = (ids > 0).any(1).double()[:, None, None].expand(6, 4, width)
        torch.testing.assert_close(layer.sum(-1), sums, **CLOSE)
        assert not layer.masked_select((ids == 0)[:, None, None]).any()


def test_attention_is_that_of_the_network(monkeypatch):
    "The answer read at the last item is the one whose weights are shown."
    model, batch, shown = shaken(), collate(HISTORIES, 10), []
    original = InterestEncoderDecoder.forward
    def noting(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        shown.append(result[0])
        return result
    monkeypatch.setattr(InterestEncoderDecoder, "forward", noting)
    u = model.encode_sequence(batch)
    model.attention(batch)
    last = shown[-1][torch.arange(6), batch.item_seq_len - 1]
    torch.testing.assert_close(F.normalize(last, dim=-1), u[:, 0], **CLOSE)


def test_it_looks_both_ways():
    assert not MISSRec(6, 5).causal, "it looks both ways, so `fit` gives it one row a prefix"
    batches = training.training_batches(build("missrec"), make_store())
    assert all(batch.positions is None for batch in batches)


def test_a_copy_answers_alike():
    model = shaken(transductive=True)
    batch = collate(HISTORIES, 10)
    assert torch.equal(copy.deepcopy(model).encode_sequence(batch), model.encode_sequence(batch))
