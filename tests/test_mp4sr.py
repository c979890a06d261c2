"""MSM4SR and MP4SR against loops over the formulas: pre-training, fine-tuning, the gradients of both and where these go;
what is drawn, what is saved, what is continued."""
import json
import math
from functools import cache

import numpy as np
import pytest
import torch

import mmseqrec.models.mp4sr as mp4sr
import mmseqrec.training as training
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore, collate, evaluation_batches, position_batches, prefix_batches
from mmseqrec.blocks.layers import encode_ends
from mmseqrec.models.mp4sr import MP4SR, MSM4SR, Projections, pretraining_terms
from mmseqrec.recommender import transfer_weights
from mmseqrec.training import fit, training_batches
from slow_streams import candidates, dot, finetuning, item_vectors, numbers, pretraining, scores, terms, unit, within
from small_world import (IMAGE_SIZE, NO_IMAGE, NO_TEXT, NOTHING, SIZES, TEXT_SIZE, V, build, make_catalogue, make_store,
                         ring_store, same, weights, without_seconds)

CLOSE = dict(rtol=0, atol=1e-9)
TAU = .07
STILL = dict(max_drop=0., mixup=False)
QUICK = dict(epochs=3, batch_size=16, lr=.01, device="cpu", progress=False)
HISTORIES = [[4, 9, 2, 7, 7, 1], [5], [3, 8], [10, 3, 11, 12], [6, 6], [NOTHING, NO_TEXT, NO_IMAGE]]
DISTINCT, REPEATED, LACKING = (9, 1, 6, 2, 8, 12), (9, 1, 9, 9, 8, 1), (9, NO_IMAGE, NO_TEXT, NOTHING, NO_IMAGE, 12)

each_target = pytest.mark.parametrize("targets", [DISTINCT, REPEATED, LACKING], ids=["distinct", "repeated", "lacking"])
each_kind = pytest.mark.parametrize("name", ["content_mp4sr", "content_msm4sr"])
each_mode = pytest.mark.parametrize("transductive", [False, True], ids=["inductive", "transductive"])


def shaken(name="content_mp4sr", seed=0, std=.3, **options):
    "A model in evaluation mode, with random numbers in every weight, statistics taken, in 64 bits."
    model, generator = build(name, **options).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters(): x.copy_(std * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        if model.item_emb is not None: model.item_emb.weight[0] = 0
    model.m2se.items.fit_statistics(torch.arange(1, V + 1))
    return model


def asking(targets, histories=HISTORIES):
    batch = collate(histories, 10)
    batch.pos_item = torch.tensor(targets)
    return batch


def number(terms): return {name: x.item() for name, x in terms.items()}


def total(terms, w=1., cmcl=.01): return sum((w if name.startswith("nip") else cmcl) * x for name, x in terms.items())


def unit_rows(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


# The terms from vectors

@each_target
@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("legacy", [False, True], ids=["paper", "legacy"])
def test_terms_equal_loops(P, legacy, targets):
    found, wanted = unit_rows(6, 2, P, 5), unit_rows(6, 2, 5, seed=1)
    lacking = torch.tensor([[i in (NO_TEXT, NOTHING), i in (NO_IMAGE, NOTHING)] for i in targets])
    fast = pretraining_terms(found, wanted, lacking, torch.tensor(targets), TAU, legacy, legacy)
    assert list(fast) == ["nip_text", "nip_image", *(["cmcl"] if P == 1 else ["cmcl_text", "cmcl_image"])]
    slow = terms(found.numpy(), wanted.numpy(), lacking.tolist(), targets, TAU, legacy)
    assert number(fast) == pytest.approx(slow, abs=1e-9)


def test_projections_send_both_streams_into_both_spaces():
    set_seed(0)
    heads, h = Projections(4).double(), torch.randn(3, 2, 4, dtype=torch.float64)
    found = heads(h)
    assert found.shape == (3, 2, 2, 4)
    for b in range(3):
        for space, (own, other, head) in enumerate(((0, 1, heads.text), (1, 0, heads.image))):
            for place, stream in enumerate((own, other)):
                torch.testing.assert_close(found[b, space, place], head.weight @ h[b, stream] + head.bias, **CLOSE)


# Pre-training against loops

@each_kind
@each_target
@pytest.mark.parametrize("legacy", [False, True], ids=["paper", "legacy"])
def test_pretraining_equals_loops(name, targets, legacy):
    model = shaken(name, **STILL, released=("false_negatives", "cmcl_rows") if legacy else ())
    found = number(model.pretrain_loss(asking(targets)))
    slow = pretraining(numbers(model), model.catalogue, HISTORIES, targets, TAU, legacy)
    assert found == pytest.approx({"loss": total(slow), **slow}, abs=1e-8)
    assert all(value > .01 for value in slow.values())


@pytest.mark.parametrize("options", [dict(temperature=.5), dict(nip_weight=.5, cmcl_weight=2.), dict(nip_weight=0., cmcl_weight=1.),
                                     dict(cmcl_weight=0.), dict(released=("padded_pooling",)), dict(n_heads=4, n_layers=1)])
@each_kind
def test_options_of_pretraining_equal_loops(name, options):
    model = shaken(name, **STILL, **options)
    slow = pretraining(numbers(model), model.catalogue, HISTORIES, REPEATED, options.get("temperature", TAU),
                       masked="padded_pooling" not in options.get("released", ()), n_heads=options.get("n_heads", 2))
    whole = total(slow, options.get("nip_weight", 1.), options.get("cmcl_weight", .01))
    assert number(model.pretrain_loss(asking(REPEATED))) == pytest.approx({"loss": whole, **slow}, abs=1e-8)


@each_kind
def test_the_arithmetics_differ_where_targets_repeat(name):
    losses = [number(shaken(name, **STILL, released=("false_negatives", "cmcl_rows") if legacy else ()).pretrain_loss(asking(REPEATED))) for legacy in (False, True)]
    assert all(abs(losses[0][term] - losses[1][term]) > 1e-4 for term in losses[0])
    losses = [number(shaken(name, **STILL, released=("false_negatives", "cmcl_rows") if legacy else ()).pretrain_loss(asking(DISTINCT))) for legacy in (False, True)]
    for term in losses[0]: assert (losses[0][term] == pytest.approx(losses[1][term], abs=1e-9)) == term.startswith("nip"), term


def test_no_mixup_is_mixup_at_rate_zero():
    "Which draws are made must not matter where nothing can be drawn."
    off, zero = (shaken(max_drop=0., **options) for options in (dict(mixup=False), dict(max_swap=0.)))
    assert number(off.pretrain_loss(asking(DISTINCT))) == pytest.approx(number(zero.pretrain_loss(asking(DISTINCT))), abs=1e-12)


@each_kind
def test_disturbed_histories_equal_loops(name, monkeypatch):
    "Dropped first and moved together, then swapped where what is left now stands; targets are never disturbed."
    model, kept = shaken(name), []
    generator = torch.Generator().manual_seed(0)
    def drop(item_pad_mask, rate):
        mask = (torch.rand(item_pad_mask.shape, generator=generator) < .4) & ~item_pad_mask & (torch.arange(item_pad_mask.shape[1]) > 0)
        kept.extend([[i for i, out in zip(h, row) if not out] for h, row in zip(HISTORIES, mask.tolist())])
        return mask
    swaps = []
    def swap(item_pad_mask, rate):
        assert item_pad_mask.logical_not().sum(1).tolist() == [len(h) for h in kept], "what was dropped is gone"
        swaps.append((torch.rand(item_pad_mask.shape, generator=generator) < .5) & ~item_pad_mask)
        return swaps[0]
    monkeypatch.setattr(mp4sr, "draw_item_drop", drop)
    monkeypatch.setattr(mp4sr, "draw_swaps", swap)
    found = number(model.pretrain_loss(asking(REPEATED)))
    assert kept != HISTORIES and swaps[0].any()
    slow = pretraining(numbers(model), model.catalogue, kept, REPEATED, TAU, swapped=swaps[0].tolist())
    assert found == pytest.approx({"loss": total(slow), **slow}, abs=1e-8)


def test_all_streams_swapped_is_both_streams_exchanged(monkeypatch):
    monkeypatch.setattr(mp4sr, "draw_swaps", lambda item_pad_mask, rate: ~item_pad_mask)
    model = shaken("content_msm4sr", max_drop=0.)
    slow = pretraining(numbers(model), model.catalogue, HISTORIES, DISTINCT, TAU, swapped=[[True] * 6] * 6)
    found = number(model.pretrain_loss(asking(DISTINCT)))
    assert found == pytest.approx({"loss": total(slow), **slow}, abs=1e-8)
    still = number(shaken("content_msm4sr", **STILL).pretrain_loss(asking(DISTINCT)))
    assert abs(found["nip_text"] - still["nip_text"]) > 1e-3 and found["cmcl"] == pytest.approx(still["cmcl"], abs=1e-9)


@pytest.mark.parametrize("options", [{}, dict(max_drop=.6, max_swap=.2)])
def test_rates_are_drawn_uniformly_and_once_a_step(options, monkeypatch):
    rates = {"drop": [], "swap": []}
    def noting(name, original):
        def draw(item_pad_mask, rate):
            rates[name].append(float(rate))
            return original(item_pad_mask, rate)
        return draw
    monkeypatch.setattr(mp4sr, "draw_item_drop", noting("drop", mp4sr.draw_item_drop))
    monkeypatch.setattr(mp4sr, "draw_swaps", noting("swap", mp4sr.draw_swaps))
    model = build("content_msm4sr", hidden_size=4, n_layers=1, inner_size=4, **options)
    set_seed(0)
    with torch.no_grad():
        for _ in range(120): model.pretrain_loss(asking(DISTINCT[:2], HISTORIES[:2]))
    for name, most in (("drop", options.get("max_drop", .2)), ("swap", options.get("max_swap", .5))):
        drawn = np.array(rates[name]) / most
        assert drawn.shape == (120,) and 0 <= drawn.min() < .05 and .95 < drawn.max() <= 1
        assert abs(drawn.mean() - .5) < .09 and drawn.std() == pytest.approx(1 / math.sqrt(12), rel=.15)
    assert abs(np.corrcoef(rates["drop"], rates["swap"])[0, 1]) < .25, "one rate says nothing about the other"


def test_every_item_of_a_step_is_encoded_once():
    "So an item has one vector under dropout too, in every history and as a target."
    model, asked = build("content_mp4sr"), []
    model.m2se.items.register_forward_pre_hook(lambda module, args: asked.append(args[0].tolist()))
    model.train().pretrain_loss(asking(REPEATED))
    assert len(asked) == 1 and len(set(asked[0])) == len(asked[0])


@each_kind
def test_one_user_alone_has_nothing_to_tell_apart(name):
    model = shaken(name)
    terms = model.pretrain_loss(asking((6,), [[1, 2, 3]]))
    terms["loss"].backward()
    assert number(terms) == pytest.approx(dict.fromkeys(terms, 0.), abs=1e-12)
    assert all(x.grad is None or not x.grad.abs().max() > 1e-9 for x in model.parameters())


@each_kind
def test_targets_with_nothing_leave_only_agreement(name):
    model = shaken(name, **STILL)
    found = model.pretrain_loss(asking((NOTHING,) * 6))
    assert found["nip_text"] == 0 == found["nip_image"] and found["loss"].isfinite()
    found["loss"].backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


def test_windows_are_refused():
    with pytest.raises(ValueError, match="one query a row"): shaken().pretrain_loss(position_batches(make_store(), 99, 10)[0])


# Gradients

def along(model, loss, slow, step=1e-5, seed=0):
    "Slope of a loss along a random direction through all weights: by its gradients, and by two runs of the loops."
    names, values = zip(*((name, x) for name, x in model.named_parameters() if name != "item_emb.weight"))
    if model.item_emb is not None: names, values = (*names, "item_emb.weight"), (*values, model.item_emb.weight)
    gradients = torch.autograd.grad(loss, values)
    generator = torch.Generator().manual_seed(seed)
    ways = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values]
    if model.item_emb is not None: ways[-1][0] = 0
    p, sides = numbers(model), []
    for sign in (1, -1):
        sides.append(slow(p | {name: p[name] + sign * step * way.numpy() for name, way in zip(names, ways)}))
    return sum((g * way).sum().item() for g, way in zip(gradients, ways)), (sides[0] - sides[1]) / (2 * step)


@each_kind
@pytest.mark.parametrize("legacy", [False, True], ids=["paper", "legacy"])
def test_gradients_of_pretraining_equal_the_slope_of_the_loops(name, legacy):
    model = shaken(name, **STILL, released=("false_negatives", "cmcl_rows") if legacy else (), cmcl_weight=1.)
    loss = model.pretrain_loss(asking(REPEATED))["loss"]
    fast, slow = along(model, loss, lambda p: total(pretraining(p, model.catalogue, HISTORIES, REPEATED, TAU, legacy), cmcl=1.))
    assert abs(fast) > .1 and fast == pytest.approx(slow, rel=1e-5)


@each_mode
def test_gradients_of_finetuning_equal_the_slope_of_the_loops(transductive):
    model = shaken(transductive=transductive, projections=False)
    loss = model.finetune_loss(asking(LACKING))["loss"]
    fast, slow = along(model, loss, lambda p: finetuning(p, model.catalogue, HISTORIES, LACKING, TAU))
    assert abs(fast) > .1 and fast == pytest.approx(slow, rel=1e-5)


PARTS = {"text encoder": "m2se.items.text.", "image encoder": "m2se.items.image.", "Transformer": "m2se.encoder.",
         "text head": "heads.text.", "image head": "heads.image."}


def reached(model, term, batch):
    "Which parts a term teaches; a part is taught if every weight of it gets some gradient."
    model.zero_grad()
    found = model.pretrain_loss(batch)[term]
    found.backward()
    parts = set()
    for part, prefix in PARTS.items():
        weights_of_it = [x for name, x in model.named_parameters() if name.startswith(prefix)]
        moved = [x.grad is not None and x.grad.abs().max().item() > 1e-12 for x in weights_of_it]
        assert all(moved) or not any(moved), f"{term} teaches only some weights of {part}"
        if any(moved): parts.add(part)
    return parts


TEXT, IMAGE, BOTH = {"text encoder"}, {"image encoder"}, {"text encoder", "image encoder"}


@pytest.mark.parametrize("term, expected", [
    ("nip_text", {*BOTH, "Transformer", "text head"}), ("nip_image", {*BOTH, "Transformer", "image head"}),
    ("cmcl_text", {*BOTH, "Transformer", "text head"}), ("cmcl_image", {*BOTH, "Transformer", "image head"})])
def test_with_projections_each_term_teaches_both_encoders_and_its_own_head(term, expected):
    for options in (STILL, {}): assert reached(shaken("content_mp4sr", **options), term, asking(DISTINCT)) == expected


@pytest.mark.parametrize("term, expected", [("nip_text", TEXT), ("nip_image", IMAGE), ("cmcl", BOTH)])
def test_without_projections_and_mixup_a_modality_learns_from_its_own_term(term, expected):
    assert reached(shaken("content_msm4sr", **STILL), term, asking(DISTINCT)) == expected | {"Transformer"}


@pytest.mark.parametrize("term", ["nip_text", "nip_image", "cmcl"])
def test_mixup_opens_the_way_to_the_other_encoder(term, monkeypatch):
    "With every position swapped: one encoder through the target, the other through the history."
    monkeypatch.setattr(mp4sr, "draw_swaps", lambda item_pad_mask, rate: ~item_pad_mask)
    assert reached(shaken("content_msm4sr", max_drop=0.), term, asking(DISTINCT)) == {*BOTH, "Transformer"}


@pytest.mark.parametrize("name, term, expected", [
    ("content_mp4sr", "nip_text", {*TEXT}), ("content_mp4sr", "nip_image", {*IMAGE}), ("content_msm4sr", "nip_text", {*TEXT}),
    ("content_msm4sr", "nip_image", {*IMAGE})])
def test_as_a_target_an_item_teaches_only_the_encoder_of_the_modality(name, term, expected, monkeypatch):
    "Histories give no gradient here, whatever was swapped in them."
    original = mp4sr.encode_ends
    monkeypatch.setattr(mp4sr, "encode_ends", lambda *args: original(*args).detach())
    assert reached(shaken(name), term, asking(DISTINCT)) - {"text head", "image head"} == expected


@each_kind
def test_agreement_looks_at_no_target(name, monkeypatch):
    original = mp4sr.encode_ends
    monkeypatch.setattr(mp4sr, "encode_ends", lambda *args: original(*args).detach())
    model = shaken(name, nip_weight=0.)
    found = [term for term in model.pretrain_loss(asking(DISTINCT)) if term.startswith("cmcl")]
    if name == "content_msm4sr": assert not model.pretrain_loss(asking(DISTINCT))["cmcl"].requires_grad
    else: assert [reached(model, term, asking(DISTINCT)) for term in found] == [{"text head"}, {"image head"}]


@pytest.mark.parametrize("P", [1, 2])
def test_terms_teach_only_their_own_space(P):
    for space, term in enumerate(("nip_text", "nip_image", "cmcl_text", "cmcl_image")):
        if term.startswith("cmcl") and P == 1: continue
        found, wanted = unit_rows(6, 2, P, 5).requires_grad_(), unit_rows(6, 2, 5, seed=1).requires_grad_()
        pretraining_terms(found, wanted, torch.zeros(6, 2, dtype=torch.bool), torch.tensor(REPEATED), TAU)[term].backward()
        here, there = space % 2, 1 - space % 2
        assert found.grad[:, here].any() and not found.grad[:, there].any()
        assert term.startswith("cmcl") and wanted.grad is None or wanted.grad[:, here].any() and not wanted.grad[:, there].any()


def test_there_is_nothing_else_to_teach_in_pretraining():
    model = build("content_mp4sr")
    assert model.item_emb is None and "item_emb.weight" not in model.state_dict()
    before = dict(model.named_buffers())
    assert not any(x.requires_grad for x in before.values())
    model.start_epoch(make_store(), 0)
    before = {name: x.clone() for name, x in model.named_buffers()}
    untrained = weights(model)
    fit(model, make_store(held_out=False), "pretrain", **QUICK)
    assert same(dict(model.named_buffers()), before), "features, centres and spreads stay"
    for name, x in model.named_parameters(): assert not torch.equal(x, untrained[name]), name


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_frozen_pooling_stays_and_the_rest_learns(phase):
    model = build("content_mp4sr", released=("untrained_pooling",))
    before = weights(model)
    fit(model, make_store(held_out=False), phase, **QUICK, weight_decay=.01)
    for name, x in model.named_parameters():
        frozen = ".pooling." in name
        stays = frozen or phase == "finetune" and name.startswith("heads")
        assert x.requires_grad != frozen and torch.equal(x, before[name]) == stays, name


@pytest.mark.parametrize("options", [{}, dict(weight_decay=.1), dict(weight_decay=.1, decoupled=True)])
def test_padding_stays_zero(options):
    assert not MP4SR(TEXT_SIZE, IMAGE_SIZE, V, transductive=True).item_emb.weight[0].any(), "from the start"
    model = build("mp4sr", n_items=V)  # the first catalogue has as many items: the rows are kept
    fit(model, make_store(held_out=False), **QUICK, **options)
    assert not model.item_emb.weight[0].any() and model.item_emb.weight[1:].any(1).all()
    model.train().finetune_loss(prefix_batches(make_store(), TRAIN, 16, 10)[0])["loss"].backward()
    assert not model.item_emb.weight.grad[0].any() and model.item_emb.weight.grad[1:].any(1).all()
    assert not model.item_vectors(torch.tensor([0])).any()


# Fine-tuning against loops

@each_mode
@each_kind
@each_target
def test_finetuning_equals_loops(name, transductive, targets):
    model = shaken(name, transductive=transductive)
    slow = finetuning(numbers(model), model.catalogue, HISTORIES, targets, TAU)
    assert model.finetune_loss(asking(targets))["loss"].item() == pytest.approx(slow, abs=1e-9)
    assert slow > 1


@each_mode
def test_the_temperature_of_finetuning(transductive):
    model = shaken(transductive=transductive, temperature=.5)
    slow = finetuning(numbers(model), model.catalogue, HISTORIES, REPEATED, .5)
    assert model.finetune_loss(asking(REPEATED))["loss"].item() == pytest.approx(slow, abs=1e-9)


@each_mode
def test_all_positions_in_one_pass_are_the_prefixes_one_by_one(transductive):
    model = shaken(transductive=transductive)
    store = SequenceStore(np.array([4, 9, 2, 7, 7, 1, 3, 8, 10, 3, 5, 12], np.int32), np.array([0, 6, 8, 12]),
                          np.full(12, TRAIN, np.int8), V)
    batch, = position_batches(store, 100, 10)
    assert batch.n_targets == 9
    histories, targets = [], []
    for start, end in ((0, 6), (6, 8), (8, 12)):
        for place in range(start + 1, end):
            histories.append(store.items[start:place].tolist())
            targets.append(int(store.items[place]))
    slow = finetuning(numbers(model), model.catalogue, histories, targets, TAU)
    assert model.finetune_loss(batch)["loss"].item() == pytest.approx(slow, abs=1e-9)


@each_mode
def test_scores_are_sums_of_two_cosines(transductive):
    model = shaken(transductive=transductive)
    with torch.no_grad(): found = model.score(model.encode_sequence(collate(HISTORIES, 10)), model.encode_items())
    for row, history in zip(found, HISTORIES):
        np.testing.assert_allclose(row, scores(numbers(model), model.catalogue, history), rtol=0, atol=1e-9)
    assert found.abs().max() <= 2


def test_without_learned_vectors_a_missing_modality_is_a_missing_stream():
    model = shaken()
    with torch.no_grad(): items, sequence = model.encode_items(), model.encode_sequence(collate(HISTORIES, 10))
    for row, lacking in ((7, []), (NO_IMAGE, [1]), (NO_TEXT, [0]), (NOTHING, [0, 1])):
        vector = items.vectors[row - 1]
        assert items.missing_stream_mask[row - 1].nonzero().flatten().tolist() == lacking
        for stream in (0, 1): assert vector[stream].norm().item() == pytest.approx(0 if stream in lacking else 1, abs=1e-12)
        alone = [dot(u[s], vector[s]) for u in sequence for s in (0, 1) if s not in lacking]
        found = model.score(sequence, items)[:, row - 1]
        if len(lacking) == 1: np.testing.assert_allclose(found, alone, rtol=0, atol=1e-9)
        if len(lacking) == 2: assert not found.any()
    assert items.missing_stream_mask.sum() == 4


def test_with_learned_vectors_every_item_has_both_streams():
    model = shaken(transductive=True)
    with torch.no_grad(): items = model.encode_items()
    assert items.missing_stream_mask is None
    torch.testing.assert_close(items.vectors.norm(dim=-1), torch.ones(V, 2, dtype=torch.float64), **CLOSE)
    p = numbers(model)
    z, learned = item_vectors(within(p, "m2se.items."), model.catalogue), p["item_emb.weight"]
    for row, lacking in ((NO_IMAGE, [1]), (NO_TEXT, [0]), (NOTHING, [0, 1]), (7, [])):
        for stream in (0, 1):
            expected = unit(learned[row] + (0 if stream in lacking else z[row, stream]))
            np.testing.assert_allclose(items.vectors[row - 1, stream], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.item_vectors().detach(), candidates(p, model.catalogue), rtol=0, atol=1e-9)


def test_learned_vectors_stand_at_the_input_too():
    model = shaken(transductive=True)
    batch = collate([[3, 8]], 10)
    before = model.encode_sequence(batch)
    with torch.no_grad(): model.item_emb.weight[8, 0] += .5
    assert not torch.allclose(model.encode_sequence(batch), before)


def test_fine_tuning_drops_and_swaps_nothing(monkeypatch):
    def refuse(*_): raise AssertionError("something is drawn")
    for function in ("draw_item_drop", "draw_swaps"): monkeypatch.setattr(mp4sr, function, refuse)
    model = build("content_mp4sr", max_drop=1., max_swap=1.).train()
    model.finetune_loss(asking(DISTINCT))["loss"].backward()
    assert all(x.grad is None for x in model.heads.parameters()), "projections belong to pre-training"
    with pytest.raises(AssertionError, match="something is drawn"): model.pretrain_loss(asking(DISTINCT))


def test_attention_of_the_text_stream_comes_first():
    model = shaken()
    batch = collate(HISTORIES, 10)
    x = model.m2se.items(batch.item_seq.flatten()).unflatten(0, batch.item_seq.shape)
    for layer, found in enumerate(model.attention(batch)):
        assert found.shape == (6, 4, 6, 6)
        for stream in (0, 1):
            alone = model.m2se.encoder(x[:, :, stream], batch.item_pad_mask, return_attention=True)[1][layer]
            torch.testing.assert_close(found[:, 2 * stream:2 * stream + 2], alone, **CLOSE)


# What is drawn

def unequal_store():
    "A user with many events beside users with few: the many decide how many batches there are."
    lengths = [30, 3, 2, 5, 1, 8, 8, 8]
    rng = np.random.default_rng(0)
    stage = [[TRAIN] * n if n < 4 else [TRAIN] * (n - 2) + [VALID, TEST] for n in lengths]
    return SequenceStore(rng.integers(1, V + 1, sum(lengths)).astype(np.int32), np.r_[0, np.cumsum(lengths)],
                         np.concatenate(stage).astype(np.int8), V)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 1000])
@pytest.mark.parametrize("store", [make_store(40), unequal_store(), ring_store()], ids=["small", "unequal", "ring"])
def test_a_batch_of_pretraining_has_a_user_once_and_an_epoch_max_len_targets_of_each(store, batch_size):
    model, epochs = build("content_mp4sr"), []
    events = store.rows(TRAIN)
    for epoch in range(3):
        found = []
        for batch in training_batches(model, store, "pretrain", batch_size, seed=1, epoch=epoch):
            assert len(batch) <= batch_size and batch.positions is None
            assert len(set(batch.user.tolist())) == len(batch), "two rows of one user would be each other's negatives"
            for row, history, length in zip(batch.row.tolist(), batch.item_seq.tolist(), batch.item_seq_len.tolist()):
                start = store.offsets[store.user[events[row]]]
                assert history[:length] == store.items[start:events[row]][-model.max_len:].tolist() and not any(history[length:])
            assert batch.pos_item.tolist() == store.items[events[batch.row.numpy()]].tolist()
            found += batch.row.tolist()
        own, drawn = (np.bincount(store.user[x], minlength=len(store.offsets) - 1) for x in (events, events[found]))
        assert len(set(found)) == len(found) and np.array_equal(drawn, np.minimum(own, model.max_len))
        epochs.append(found)
    assert epochs[0] != epochs[1] != epochs[2]


@each_kind
def test_statistics_come_from_training_events_only(name):
    "Items that are only held out, and what comes after training, change neither centre nor spread."
    items = np.array([1, 2, 6, 9, 10, 6, 7, 1, 11, 12], np.int32)
    stage = np.array([TRAIN, TRAIN, TRAIN, VALID, TEST] * 2, np.int8)
    store = SequenceStore(items, np.array([0, 5, 10]), stage, V)
    model, expected = build(name), build(name)
    model.start_epoch(store, 0)
    expected.m2se.items.fit_statistics(torch.tensor([1, 2, 6, 7]))
    assert same(weights(model), weights(expected)) and model.m2se.items.fitted
    model.start_epoch(make_store(), 1)
    assert same(weights(model), weights(expected)), "once"


# The same digits

@cache
def pretrained(name="content_mp4sr", seed=0, noise=0):
    "Two undisturbed epochs of pre-training: the history and the weights."
    model = build(name, dropout=.3)
    set_seed(noise)
    history = fit(model, make_store(), "pretrain", **QUICK | {"epochs": 2}, seed=seed)
    return without_seconds(history), weights(model)


@each_kind
def test_the_same_seed_gives_the_same_pretraining(name):
    first, second, other = pretrained(name), pretrained(name, noise=1), pretrained(name, seed=1)
    assert first[0] == second[0] and same(first[1], second[1]) and first[0] != other[0]
    assert set(first[0][0]) >= {"loss", "nip_text", "nip_image", "ndcg@10", "cmcl" if name == "content_msm4sr" else "cmcl_image"}


class Stop(Exception): pass


def stop_before_step(monkeypatch, step):
    left, original = [step], training._train_step
    def limited(*args):
        left[0] -= 1
        if left[0] < 0: raise Stop
        return original(*args)
    monkeypatch.setattr(training, "_train_step", limited)


@pytest.mark.parametrize("name, steps", [("content_mp4sr", None), ("content_msm4sr", None), ("content_mp4sr", 2), ("content_mp4sr", 6)])
def test_a_stopped_pretraining_continues_to_the_same_digits(name, steps, tmp_path, monkeypatch):
    "After an epoch, in the first or in the second: what is drawn for dropout, drop and mixup goes on where it stopped."
    store, path, rough = make_store(), tmp_path / "run.safetensors", build(name, dropout=.3)
    options = QUICK | {"epochs": 2, "checkpoint": path, "checkpoint_every": 1}
    if steps is None: fit(rough, store, "pretrain", **options | {"epochs": 1})
    else:
        with monkeypatch.context() as patch:
            stop_before_step(patch, steps)
            with pytest.raises(Stop): fit(rough, store, "pretrain", **options)
    again = build(name, seed=99, dropout=.3)  # its weights do not matter: the checkpoint has them
    expected, history = pretrained(name), fit(again, store, "pretrain", **options)
    assert len(history.epochs) == 2 and without_seconds(history) == expected[0] and same(weights(again), expected[1])


def test_a_checkpoint_of_the_other_phase_is_refused(tmp_path):
    fit(build("content_mp4sr"), make_store(), "pretrain", **QUICK | {"epochs": 1}, checkpoint=tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="other data or settings"):
        fit(build("content_mp4sr"), make_store(), **QUICK, checkpoint=tmp_path / "run.safetensors")


# Saving

OPTIONS = dict(transductive=False, projections=True, mixup=False, nip_weight=.5, cmcl_weight=.25, max_drop=.1, max_swap=.3,
               released=["untrained_pooling", "padded_pooling", "false_negatives", "cmcl_rows"], adapter_dropout=.35)


@pytest.mark.parametrize("kind", [MP4SR, MSM4SR])
@pytest.mark.parametrize("options", [{}, OPTIONS, OPTIONS | {"projections": False}, dict(transductive=True, projections=True),
                                     dict(transductive=True, temperature=.2, released=["false_negatives", "cmcl_rows"])], ids=str)
def test_saved_options_come_back(kind, options, tmp_path):
    set_seed(0)
    model = kind(text_size=TEXT_SIZE, image_size=IMAGE_SIZE, **SIZES, **options).set_catalogue(make_catalogue())
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["recommender"] == kind.__name__ and options.items() <= config.items() and SIZES.items() <= config.items()
    again = kind.from_pretrained(tmp_path / "saved")
    assert same(weights(again), weights(model.eval()))
    for name in ("temperature", "nip_weight", "cmcl_weight", "max_len", "has_pretraining"):
        assert getattr(again, name) == getattr(model, name) == options.get(name, getattr(model, name)), name
    assert again.disturbance == model.disturbance and again.released == model.released == set(options.get("released", ()))
    pooling = again.m2se.items.image.pooling
    assert pooling.first.weight.requires_grad == ("untrained_pooling" not in again.released)
    assert pooling.masked == ("padded_pooling" not in again.released)
    assert again.m2se.items.text.experts.dropout.p == options.get("adapter_dropout", .2)
    assert (again.item_emb is not None) == options.get("transductive", False) == (not again.has_pretraining)
    losses = []
    for each in (model, again):
        set_seed(0)
        with torch.no_grad(): losses.append(number(each(asking(DISTINCT), "pretrain" if each.has_pretraining else "finetune")))
    assert losses[0] == losses[1]


def test_presets():
    "MP4SR projects, MSM4SR does not; both can be told otherwise; who learns item vectors has nothing to project."
    heads = lambda kind, **options: build(kind, **options).heads is not None
    assert heads("content_mp4sr") and not heads("content_mp4sr", projections=False)
    assert not heads("content_msm4sr") and heads("content_msm4sr", projections=True)
    assert not heads("mp4sr") and not heads("mp4sr", projections=True)
    first, second = MP4SR(TEXT_SIZE, IMAGE_SIZE, 0), MSM4SR(text_size=TEXT_SIZE, image_size=IMAGE_SIZE)
    assert {name for name in first.state_dict() if name not in second.state_dict()} == {f"heads.{head}.{part}" for head in
                                                                                       ("text", "image") for part in ("weight", "bias")}
    same_options = ("temperature", "nip_weight", "cmcl_weight", "disturbance", "released", "max_len")
    assert [getattr(first, name) for name in same_options] == [getattr(second, name) for name in same_options]
    papers = [.07, 1., .01, dict(max_drop=.2, max_swap=.5, mixup=True), frozenset(), 50]
    assert [getattr(first, name) for name in same_options] == papers, "the papers' numbers"


@pytest.mark.parametrize("kind", [MP4SR, MSM4SR])
def test_sizes_may_be_given_in_order(kind, tmp_path):
    kind(TEXT_SIZE, IMAGE_SIZE, 0, 16, 1, transductive=True).set_catalogue(make_catalogue()).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    wanted = {"text_size": TEXT_SIZE, "image_size": IMAGE_SIZE, "n_items": V, "hidden_size": 16, "n_layers": 1}
    assert wanted.items() <= config.items()
    assert kind.from_pretrained(tmp_path / "saved").item_emb.weight.shape == (V + 1, 16)


def test_both_presets_save_every_size():
    "A default that changes one day must not change what was saved before."
    configs = [build(name)._hub_mixin_config for name in ("content_mp4sr", "content_msm4sr")]
    assert configs[0].keys() == configs[1].keys()


# Learning

def eight_sequences():
    rng = np.random.default_rng(0)
    items = np.concatenate([[[user + 1, *rng.integers(1, V + 1, 4)]] for user in range(8)]).astype(np.int32)
    return SequenceStore(items.ravel(), np.arange(0, 41, 5), np.full(40, TRAIN, np.int8), V)


@each_kind
def test_pretraining_understands_a_ring(name):
    """All terms fall, NIP far below what knowing nothing costs, and the held-out next step is nearest in the very spaces
    that were trained: after the heads, where there are some."""
    store = ring_store(24)
    model = build(name, make_catalogue(whole=True), dropout=.1, attention_dropout=0., cmcl_weight=.1)
    history = fit(model, store, "pretrain", epochs=20, batch_size=32, lr=.02, device="cpu", progress=False, patience=20)
    first, last = history.epochs[0], history.epochs[-1]
    for term in last:
        if term.startswith("nip"): assert last[term] < .6 * math.log(V) < first[term], term
        if term.startswith("cmcl"): assert last[term] < first[term], term
    batch, = evaluation_batches(store, VALID, 100, model.max_len)
    with torch.no_grad():
        h, targets = encode_ends(model.m2se, model.m2se.items()[batch.item_seq], batch), model.encode_items().vectors
        own = torch.nn.functional.normalize(h if model.heads is None else model.heads(h)[:, :, 0], dim=-1)
    nearest = torch.einsum("bsd,nsd->bn", own, targets).argmax(1) + 1
    assert (nearest == batch.pos_item).float().mean() > 5 / V


def test_the_whole_way():
    "Pre-trained without item vectors, transferred, fine-tuned with them: eight sequences are known by heart."
    store, calm = eight_sequences(), dict(dropout=0., attention_dropout=0., adapter_dropout=0.)
    source = build("content_mp4sr", make_catalogue(whole=True), **calm)
    fit(source, store, "pretrain", epochs=10, batch_size=8, lr=.01, device="cpu", progress=False)
    model = transfer_weights(source, build("mp4sr", make_catalogue(whole=True), seed=1, **calm))
    scratch = build("mp4sr", make_catalogue(whole=True), seed=1, **calm)
    batch, = prefix_batches(store, TRAIN, 100, model.max_len)
    with torch.no_grad(): start, nothing = (each.finetune_loss(batch)["loss"].item() for each in (model, scratch))
    assert start < nothing, "what was learned before is of use at once"
    history = fit(model, store, epochs=60, batch_size=32, lr=.02, device="cpu", progress=False)
    assert history.epochs[-1]["loss"] < .1
    best = model.score(model.encode_sequence(batch), model.encode_items()).argmax(1) + 1
    assert torch.equal(best, batch.pos_item)


def test_pretraining_in_sixteen_bits():
    model = build("content_mp4sr")
    history = fit(model, make_store(), "pretrain", **QUICK, precision="bf16")
    assert all(x.dtype == torch.float32 for x in model.parameters())
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
