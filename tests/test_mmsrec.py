"""MMSRec against loops over the formulas: both towers, both losses and their gradients; places, missing modalities, the
catalogue at a cost kept in hand, and pre-training on pairs."""
import json
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import mmseqrec.models.mmsrec as mmsrec
from mmseqrec.blocks.augment import append_mask, cloze
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore, collate, evaluation_batches, position_batches
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.models.mmsrec import (ItemTokens, MaxFusion, MMSRec, TokenEncoder, draw_candidates, max_present,
                                    pair_pretraining, pair_store, per_item_attention, places_from_end)
from mmseqrec.recommender import transfer_weights
from mmseqrec.training import fit, training_batches
from slow_streams import dot, gelu, layer_norm, numbers, softmax, unit, within
from small_world import (IMAGE_SIZE, NO_IMAGE, NO_TEXT, NOTHING, SIZES, TEXT_SIZE, V, build, make_catalogue, make_store,
                         ring_store, same, weights)
from pages import page_functions

plot_towers = page_functions("models.mmsrec").plot_towers

CLOSE = dict(rtol=0, atol=1e-9)
TAU, MASK = .05, V + 1
CALM = dict(dropout=0., attention_dropout=0.)
QUICK = dict(epochs=2, batch_size=16, lr=.01, device="cpu", progress=False)
HISTORIES = [[4, 9, 2, 7, 7, 1], [5], [3, 8], [10, 3, 11, 12], [6, 6], [NOTHING, NO_TEXT, NO_IMAGE]]
TARGETS = (9, NO_IMAGE, 9, NO_TEXT, 8, 1)
ALL = torch.arange(1, V + 1)
ONLY_TEXT, ONLY_IMAGE = torch.tensor([[False, True]]), torch.tensor([[True, False]])


def shaken(seed=0, std=.3, catalogue=None, **options):
    "A model in evaluation mode, with random numbers in every weight, statistics taken, in 64 bits."
    model, generator = build("content_mmsrec", catalogue, **options).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters(): x.copy_(std * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    model.towers.items.fit_statistics(ALL)
    return model


def asking(targets=TARGETS, histories=HISTORIES):
    batch = collate(histories, 10)
    batch.pos_item = torch.tensor(targets)
    return batch


def number(terms): return {name: x.item() for name, x in terms.items()}


# MMSRec once more, token by token

def slow_tokens(p, catalogue, row, hidden=()):
    "The tokens of an item or of [MASK]: `{modality: vector}`."
    if row == catalogue.n_items + 1: return {m: p["towers.items.mask_emb.weight"][0] for m in (0, 1)}
    found = {}
    for m, name in enumerate(("text", "image")):
        rows = [x.numpy() for x, padded in zip(getattr(catalogue, f"{name}_emb")[row],
                                                        getattr(catalogue, f"{name}_pad_mask")[row]) if not padded]
        if not rows or m in hidden: continue
        a = within(p, f"towers.items.adapters.{name}.")
        f = (sum(rows[1:], rows[0]).astype(float) / len(rows) - a["centring.center"]) / a["centring.spread"]
        found[m] = layer_norm(a["linear.weight"] @ f + a["linear.bias"], a["norm.weight"], a["norm.bias"])
    return found


def slow_encode(p, places, n_heads=2):
    "Places from the oldest to the newest, each `{modality: token}`, through the encoder: the same with its outputs."
    p = within(p, "towers.encoder.")
    keys, h = [], []
    for l, tokens in enumerate(places):
        for m, x in tokens.items():
            keys.append((l, m))
            h.append(layer_norm(x + p["position_emb.weight"][len(places) - 1 - l] + p["modality_emb.weight"][m],
                                p["norm.weight"], p["norm.bias"]))
    for n in range(len({name.split(".")[1] for name in p if name.startswith("blocks.")})):
        b = within(p, f"blocks.{n}.")
        linear = lambda name, v: b[f"{name}.weight"] @ v + b[f"{name}.bias"]
        qkv, new = [linear("attention.query_key_value", v) for v in h], []
        D = len(h[0]) if h else 0
        for l in range(len(h)):
            heads = []
            for start in range(0, D, D // n_heads):
                q, k, v = (slice(part * D + start, part * D + start + D // n_heads) for part in range(3))
                alpha = softmax([dot(qkv[l][q], other[k]) / math.sqrt(D // n_heads) for other in qkv])
                heads.append(sum(a * other[v] for a, other in zip(alpha, qkv)))
            y = layer_norm(h[l] + linear("attention.output", np.concatenate(heads)), b["attention_norm.weight"],
                           b["attention_norm.bias"])
            new.append(layer_norm(y + linear("feed_forward.2", gelu(linear("feed_forward.0", y))),
                                  b["feed_forward_norm.weight"], b["feed_forward_norm.bias"]))
        h = new
    found = [{} for _ in places]
    for (l, m), x in zip(keys, h): found[l][m] = layer_norm(x, p["final_norm.weight"], p["final_norm.bias"])
    return found


def slow_fuse(p, tokens):
    "The largest of the transformed tokens, at length 1; zeros if there is none."
    rows = []
    for m, x in tokens.items():
        t = within(p, f"towers.fusion.transforms.{m}.")
        rows.append(layer_norm(t["0.weight"] @ x + t["0.bias"], t["1.weight"], t["1.bias"]))
    return unit(np.max(rows, 0)) if rows else np.zeros(len(p["towers.items.mask_emb.weight"][0]))


def slow_item(p, catalogue, row, hidden=(), deep=True):
    tokens = slow_tokens(p, catalogue, row, hidden)
    if not deep: return unit(np.max(list(tokens.values()), 0)) if tokens else np.zeros(SIZES["hidden_size"])
    return slow_fuse(p, slow_encode(p, [tokens])[0])


def slow_place(p, catalogue, rows, place=-1):
    "A row that holds a [MASK], read at a place."
    return slow_fuse(p, slow_encode(p, [slow_tokens(p, catalogue, row) for row in rows])[place])


def slow_finetuning(p, catalogue, rows, places, targets, candidates=range(1, V + 1), weight=lambda row: 1., deep=True):
    "Cross-entropy of the targets at places of rows that hold [MASK]s, against weighted candidates."
    c, total = {row: slow_item(p, catalogue, row, deep=deep) for row in candidates}, 0.
    for row, place, target in zip(rows, places, targets):
        u = slow_place(p, catalogue, row, place)
        e = {j: weight(j) * math.exp(dot(u, v) / TAU) for j, v in c.items()}
        total -= math.log(math.exp(dot(u, c[target]) / TAU) / sum(e.values()))
    return total / len(targets)


def slow_nce(a, b, tau=TAU):
    if not a: return 0.
    cosine = [[dot(x, y) / tau for y in b] for x in a]
    rows = [math.log(softmax(row)[i]) for i, row in enumerate(cosine)]
    columns = [math.log(softmax([row[i] for row in cosine])[i]) for i in range(len(a))]
    return -sum(rows) / len(a) - sum(columns) / len(a)


def slow_pretraining(p, catalogue, ids, tau=TAU):
    "The four terms without dropout: the two readings of each kind are the same."
    has = {row: slow_tokens(p, catalogue, row).keys() for row in ids}
    read = lambda rows, hidden: [slow_item(p, catalogue, row, hidden) for row in rows]
    v, t = ([row for row in ids if m in has[row]] for m in (1, 0))
    both = [row for row in v if row in t]
    terms = {"image_image": slow_nce(*[read(v, {0})] * 2, tau), "image_text": slow_nce(read(both, {0}), read(both, {1}), tau),
             "text_text": slow_nce(*[read(t, {1})] * 2, tau),
             "both_both": slow_nce(*[read([row for row in ids if has[row]], ())] * 2, tau)}
    return {"loss": sum(terms.values()) / 4, **terms}


# Parts

def test_places_are_counted_from_the_end():
    found = places_from_end(torch.tensor([4, 1, 2]), 4)
    assert found.tolist() == [[3, 2, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_tokens_equal_loops_and_each_item_is_transformed_once():
    model, seen = shaken(), []
    for adapter in model.towers.items.adapters.values():
        adapter.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    rows = torch.tensor([[4, 9, 4, MASK, 0], [NOTHING, NO_IMAGE, NO_TEXT, 9, MASK]])
    tokens, missing = model.towers.items(rows)
    assert seen == [6, 6] and tokens.shape == (2, 5, 2, 16) and missing.shape == (2, 5, 2)  # 0, 3, 4, 5, 9, [MASK]
    p = numbers(model)
    for b in range(2):
        for l in range(5):
            wanted = {} if rows[b, l] == 0 else slow_tokens(p, model.catalogue, int(rows[b, l]))
            assert [not x for x in missing[b, l].tolist()] == [m in wanted for m in (0, 1)]
            for m in (0, 1):
                torch.testing.assert_close(tokens[b, l, m], torch.from_numpy(wanted.get(m, np.zeros(16))), **CLOSE)


def test_tokens_without_features_say_so():
    with pytest.raises(ValueError, match="give text_size, image_size or both"): ItemTokens(None, None, 8)
    with pytest.raises(ValueError, match="expects text features of 7 numbers"): ItemTokens(7, None, 8).set_catalogue(make_catalogue())


def test_too_long_a_row_says_so():
    encoder = TokenEncoder(2, 3, 8, 1, 2, 16, 0., 0., 0.)
    with pytest.raises(ValueError, match="a row of 4 places, .MASK. included, is longer than the 3 places"):
        encoder(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, dtype=torch.bool), torch.tensor([4]))


def test_maximum_of_what_is_there_and_its_gradient():
    h = torch.tensor([[[1., 5.], [3., 2.]]] * 3).double().requires_grad_()
    missing = torch.tensor([[False, False], [False, True], [True, True]])
    found = max_present(h, missing)
    assert found.tolist() == [[3, 5], [1, 5], [0, 0]]
    found.sum().backward()
    assert h.grad.tolist() == [[[0, 1], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]
    fusion = MaxFusion(2, 2).double()
    torch.testing.assert_close(fusion(h, missing)[1], fusion.transforms[0](h[1, 0]), **CLOSE)


def test_attention_of_places_equals_loops():
    generator = torch.Generator().manual_seed(0)
    missing = torch.tensor([[[False, False], [False, True], [True, True]], [[True, False], [False, False], [False, False]]])
    weights = torch.rand(2, 3, 6, 6, generator=generator).masked_fill(missing.flatten(1)[:, None, None], -torch.inf).softmax(-1)
    found = per_item_attention(weights, missing)
    for b in range(2):
        for l in range(3):
            rows = [m for m in (0, 1) if not missing[b, l, m]] or [0, 1]
            for k in range(3):
                wanted = sum(weights[b, :, 2 * l + m, 2 * k + n] for m in rows for n in (0, 1)) / len(rows)
                torch.testing.assert_close(found[b, :, l, k], wanted)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 3))
    assert not found[0, :, :, 2].any(), "what has no tokens is looked at by nobody"


def test_attention_shows_the_gap():
    model = shaken()
    layers, batch = model.attention(collate(HISTORIES, 10)), append_mask(collate(HISTORIES, 10), MASK)
    assert len(layers) == 2 and all(layer.shape == (6, 2, 7, 7) for layer in layers)
    assert not layers[0][5, :, :, 0].any(), "an item with nothing"
    assert layers[0][1, :, 1, 1].ne(0).all() and batch.item_seq[1, 1] == MASK


def test_the_figure_is_drawn():
    fig, ax = plt.subplots()
    assert plot_towers(2, ax=ax) is ax and len(ax.patches) == 2 * 4 + 2
    plt.close(fig)
    plt.close(plot_towers().figure)


# The towers

@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_items_equal_loops(deep):
    model = shaken(deep_items=deep, items_at_once=5)
    items, p = model.encode_items(), numbers(model)
    for row in range(1, V + 1):
        wanted = slow_item(p, model.catalogue, row, deep=deep)
        torch.testing.assert_close(items.vectors[row - 1, 0], torch.from_numpy(wanted), **CLOSE)
    assert items.missing_stream_mask.nonzero().tolist() == [[NOTHING - 1, 0]]
    for hidden, views in (((0,), ONLY_IMAGE), ((1,), ONLY_TEXT)):
        found = model.item_vectors(ALL, views.expand(V, 2))
        for row in range(1, V + 1):
            torch.testing.assert_close(found[row - 1], torch.from_numpy(slow_item(p, model.catalogue, row, hidden, deep)), **CLOSE)


@pytest.mark.parametrize("options", [{}, dict(n_layers=1, n_heads=2)], ids=str)
def test_histories_equal_loops(options):
    model = shaken(**options)
    found, p = model.encode_sequence(collate(HISTORIES, 10)), numbers(model)
    for row, history in zip(found, HISTORIES):
        torch.testing.assert_close(row[0], torch.from_numpy(slow_place(p, model.catalogue, [*history, MASK])), **CLOSE)
    asked, places = collate(HISTORIES, 10), [(0, 0), (0, 3), (3, 1), (5, 2)]
    found = model.encode_sequence(asked, torch.tensor([b * 6 + l for b, l in places]))
    for row, (b, l) in zip(found, places):
        wanted = slow_place(p, model.catalogue, [*HISTORIES[b][:l + 1], MASK])
        torch.testing.assert_close(row[0], torch.from_numpy(wanted), **CLOSE)


def test_both_towers_are_the_same_weights():
    "An item is what the encoder says of a row that holds nothing else; there is no other weight."
    model = shaken()
    tokens, missing = model.towers.items(ALL[:, None])
    h = model.towers.fusion(model.towers.encoder(tokens, missing, torch.ones(V, dtype=torch.long))[:, 0], missing[:, 0])
    torch.testing.assert_close(torch.nn.functional.normalize(h), model.encode_items().vectors[:, 0], **CLOSE)
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"items", "encoder", "fusion"}
    before = model.encode_items().vectors.clone(), model.encode_sequence(collate(HISTORIES, 10)).clone()
    with torch.no_grad(): model.towers.encoder.blocks[1].feed_forward[0].weight.add_(.1)
    after = model.encode_items().vectors, model.encode_sequence(collate(HISTORIES, 10))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after)), "one change, seen by both"


def test_order_matters_and_company_does_not():
    model = shaken()
    read = lambda *histories: model.encode_sequence(collate(histories, 10))
    assert (read([1, 2, 6]) - read([2, 1, 6])).abs().max() > 1e-3
    torch.testing.assert_close(read([1, 2], [6] * 10)[0], read([1, 2])[0], **CLOSE)
    torch.testing.assert_close(read([1] * 5 + [2, 6] * 5), read([2, 6] * 5), **CLOSE)


# What is missing

def test_what_an_item_lacks_is_as_if_hidden():
    whole, lacking = (shaken(catalogue=make_catalogue(whole=every)) for every in (True, False))
    whole.load_state_dict(lacking.state_dict())
    found = lacking.encode_items().vectors[:, 0]
    for row, views in ((NO_IMAGE, ONLY_TEXT), (NO_TEXT, ONLY_IMAGE)):
        hidden = whole.item_vectors(torch.tensor([row]), views)[0]
        torch.testing.assert_close(found[row - 1], hidden, **CLOSE)
        assert (whole.encode_items().vectors[row - 1, 0] - hidden).abs().max() > 1e-3
    assert not found[NOTHING - 1].any() and found.isfinite().all()


def test_a_history_of_nothing_is_a_gap_alone():
    model = shaken()
    found = model.encode_sequence(collate([[NOTHING], [NOTHING] * 2, [NOTHING] * 7], 10))
    torch.testing.assert_close(found, found[:1].expand_as(found), **CLOSE)
    wanted = slow_place(numbers(model), model.catalogue, [MASK])
    torch.testing.assert_close(found[0, 0], torch.from_numpy(wanted), **CLOSE)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("phase", ["finetune", "pretrain"])
def test_items_with_nothing_give_finite_gradients(phase, train):
    model = build("content_mmsrec").train(train)
    batch = collate([[NOTHING] * 3, [NOTHING]], 10)
    batch.pos_item = torch.tensor([NOTHING, NOTHING])
    loss = model(batch, phase)["loss"]
    loss.backward()
    assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    if phase == "pretrain": assert loss == 0


# Fine-tuning

def test_finetuning_equals_loops():
    model, batch = shaken(), asking()
    rows = [[*history, MASK] for history in HISTORIES]
    wanted = slow_finetuning(numbers(model), model.catalogue, rows, [-1] * 6, TARGETS)
    assert model.finetune_loss(batch)["loss"].item() == pytest.approx(wanted, abs=1e-6)


def hidden_places(batch):
    "Rows, places and targets of a batch from `cloze`, as lists."
    L, length = batch.item_seq.shape[1], batch.item_seq_len.tolist()
    rows = [batch.item_seq[p // L, :length[p // L]].tolist() for p in batch.positions.tolist()]
    return rows, [p % L for p in batch.positions.tolist()], batch.pos_item.tolist()


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_finetuning_with_gaps_everywhere_equals_loops(deep):
    model = shaken(**CALM, cloze_rate=.5, deep_items=deep).train()
    set_seed(3)
    found = model.finetune_loss(asking())["loss"].item()
    set_seed(3)
    rows, places, targets = hidden_places(cloze(asking(), V, .5))
    assert 10 < len(targets) < 24 and any(row[place] != MASK for row, place in zip(rows, places))
    wanted = slow_finetuning(numbers(model), model.catalogue, rows, places, targets, deep=deep)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_gaps_are_drawn_in_training_only(monkeypatch):
    rates = []
    def noting(batch, n_items, rate, known_items):
        rates.append((n_items, rate))
        return cloze(batch, n_items, rate, known_items)
    monkeypatch.setattr(mmsrec, "cloze", noting)
    model = build("content_mmsrec", cloze_rate=.3)
    for training in (True, False): model.train(training).finetune_loss(asking())
    assert rates == [(V, .3), (V, 0.)]


def test_windows_are_refused():
    with pytest.raises(ValueError, match="one next item each"): build("content_mmsrec").finetune_loss(position_batches(make_store(), 99, 10)[0])


def along(model, loss, slow, step=1e-5, seed=0):
    "Slope of a loss along a random direction through all weights: by its gradients, and by two runs of the loops."
    names, values = zip(*model.named_parameters())
    gradients = torch.autograd.grad(loss, values, allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    ways = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values]
    p, sides = numbers(model), []
    for sign in (1, -1): sides.append(slow(p | {name: p[name] + sign * step * way.numpy() for name, way in zip(names, ways)}))
    return sum((g * way).sum().item() for g, way in zip(gradients, ways) if g is not None), (sides[0] - sides[1]) / (2 * step)


def test_gradients_equal_the_slope_of_the_loops():
    model, rows = shaken(), [[*history, MASK] for history in HISTORIES]
    fast, slow = along(model, model.finetune_loss(asking())["loss"],
                       lambda p: slow_finetuning(p, model.catalogue, rows, [-1] * 6, TARGETS))
    assert abs(fast) > .1 and fast == pytest.approx(slow, rel=1e-4)
    ids = torch.tensor([1, NO_IMAGE, NO_TEXT, NOTHING, 8, 12])
    fast, slow = along(model, pair_pretraining(model, ids)["loss"],
                       lambda p: slow_pretraining(p, model.catalogue, ids.tolist())["loss"])
    assert abs(fast) > .1 and fast == pytest.approx(slow, rel=1e-4)


# The catalogue at a cost kept in hand

def test_candidates_are_the_answers_and_others():
    for seed in range(20):
        set_seed(seed)
        ids, target, log_weight = draw_candidates(torch.tensor([7, 2, 7, 12]), V, 4)
        assert ids[target].tolist() == [7, 2, 7, 12] and len(set(ids.tolist())) == 7 and {2, 7, 12} <= set(ids.tolist())
        assert 1 <= ids.min() and ids.max() <= V
        weight = {row: w for row, w in zip(ids.tolist(), log_weight.exp().tolist())}
        assert all(weight[row] == pytest.approx(1 if row in (2, 7, 12) else 9 / 4) for row in weight)
    ids, target, log_weight = draw_candidates(torch.tensor([7, 2]), V)
    assert ids.tolist() == ALL.tolist() and target.tolist() == [6, 1] and not log_weight.any()
    ids, _, log_weight = draw_candidates(ALL, V, 3)
    assert ids.tolist() == ALL.tolist() and not log_weight.any(), "there is nobody else to draw"


def test_every_other_item_is_drawn_equally_often():
    set_seed(0)
    drawn = torch.zeros(V + 1)
    for _ in range(3000): drawn[draw_candidates(torch.tensor([7, 2]), V, 4)[0]] += 1
    assert drawn[0] == 0 and drawn[7] == drawn[2] == 3000
    others = drawn[[j for j in range(1, V + 1) if j not in (2, 7)]] / 3000
    assert (others - .4).abs().max() < .04


def test_a_sampled_catalogue_equals_loops(monkeypatch):
    model = shaken(**CALM, cloze_rate=0., n_candidates=4).train()
    found, drawn = [], []
    def noting(*args):
        drawn.append(draw_candidates(*args))
        return drawn[-1]
    monkeypatch.setattr(mmsrec, "draw_candidates", noting)
    found = model.finetune_loss(asking())["loss"].item()
    ids = drawn[0][0].tolist()
    right = set(TARGETS)
    assert len(ids) == len(right) + 4
    wanted = slow_finetuning(numbers(model), model.catalogue, [[*h, MASK] for h in HISTORIES], [-1] * 6, TARGETS, ids,
                             lambda row: 1. if row in right else (V - len(right)) / 4)
    assert found == pytest.approx(wanted, abs=1e-6)
    whole = shaken(**CALM, cloze_rate=0.).finetune_loss(asking())["loss"].item()
    assert model.eval().finetune_loss(asking())["loss"].item() == pytest.approx(whole, abs=1e-12), "evaluation takes all"
    model.n_candidates = V
    assert model.train().finetune_loss(asking())["loss"].item() == pytest.approx(whole, abs=1e-12), "all are drawn"


def test_no_candidates_say_so():
    with pytest.raises(ValueError, match="n_candidates must be at least 1, got 0"): build("content_mmsrec", n_candidates=0)


def loss_and_gradients(phase, **options):
    model = build("content_mmsrec", dropout=.3, attention_dropout=.3, items_at_once=5, **options).double().train()
    set_seed(1)
    loss = model(asking(), phase)["loss"]
    loss.backward()
    return loss.item(), {name: x.grad for name, x in model.named_parameters()}, torch.rand(3)


@pytest.mark.parametrize("phase, options", [("pretrain", {}), *(("finetune", options) for options in (
    {}, dict(n_candidates=3), dict(deep_items=False)))], ids=str)
def test_gradient_caching_changes_nothing(phase, options):
    "With dropout: losses, gradients, and what is drawn afterwards."
    plain, cached = loss_and_gradients(phase, **options), loss_and_gradients(phase, **options, gradient_caching=True)
    assert plain[0] == cached[0] and torch.equal(plain[2], cached[2])
    for name, gradient in plain[1].items():
        if gradient is None: assert cached[1][name] is None, name
        else: torch.testing.assert_close(cached[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_gradient_caching_encodes_every_block_twice_and_holds_nothing():
    held, calls = {}, {}
    for caching in (False, True):
        for n_items in (40, 160):
            model = build("content_mmsrec", make_catalogue(n_items), items_at_once=20, gradient_caching=caching).train()
            counts = []
            model.towers.fusion.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
            sizes = {}
            def note(x):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): vectors = model.item_vectors(torch.arange(1, n_items + 1))
            loss = vectors.square().sum()
            assert counts == [20] * (n_items // 20)
            loss.backward()
            calls[caching, n_items], held[caching, n_items] = len(counts), sum(sizes.values())
    assert calls == {(False, 40): 2, (False, 160): 8, (True, 40): 4, (True, 160): 16}
    grown = {caching: held[caching, 160] - held[caching, 40] for caching in (False, True)}
    assert grown[True] < .02 * grown[False]


def test_nothing_is_encoded_twice_in_evaluation():
    model, counts = build("content_mmsrec", gradient_caching=True, items_at_once=5), []
    model.towers.fusion.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    with torch.no_grad(): model.encode_items()
    assert counts == [5, 5, 2]


@pytest.mark.parametrize("options", [dict(gradient_caching=True), dict(n_candidates=4), dict(deep_items=False), dict(centred=False),
                                     dict(text_size=None), dict(image_size=None)], ids=str)
def test_switches_learn(options):
    sizes = dict(text_size=TEXT_SIZE, image_size=IMAGE_SIZE)
    set_seed(0)
    model = MMSRec(**sizes | SIZES | dict(items_at_once=5) | options).set_catalogue(make_catalogue())
    history = fit(model, make_store(), **QUICK | {"epochs": 4})
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert model.towers.items.fitted == options.get("centred", True)


# Pre-training

@pytest.mark.parametrize("ids", [(1, 2, 6, 8), (1, NO_IMAGE, NO_TEXT, NOTHING, 8, 12), (NO_IMAGE, NO_TEXT), (7,)], ids=str)
@pytest.mark.parametrize("tau", [TAU, .5])
def test_pretraining_equals_loops(ids, tau):
    model = shaken(temperature=tau)
    found = number(pair_pretraining(model, torch.tensor(ids)))
    assert found == pytest.approx(slow_pretraining(numbers(model), model.catalogue, ids, tau), abs=1e-6)


def test_only_the_next_items_are_looked_at_and_each_once():
    model = shaken()
    found = number(model.pretrain_loss(asking((9, 1, 9, 9, 8, 1))))
    assert found == pytest.approx(number(pair_pretraining(model, torch.tensor([1, 8, 9]))), abs=1e-12)
    assert found == number(model.pretrain_loss(asking((9, 1, 9, 9, 8, 1), [[2]] * 6)))


def test_six_passes_have_six_dropouts(monkeypatch):
    model, seen = build("content_mmsrec", dropout=.5), []
    original = model.item_vectors
    def noting(ids, hidden):
        seen.append((ids.tolist(), hidden.tolist(), original(ids, hidden)))
        return seen[-1][2]
    monkeypatch.setattr(model, "item_vectors", noting)
    pair_pretraining(model.train(), torch.tensor([1, 8]))
    (ids, hidden, vectors), = seen
    assert ids == [1, 8] * 6
    assert hidden == [[True, False]] * 4 + [[False, True]] * 4 + [[False, False]] * 4
    first, second = vectors.unflatten(0, (3, 2, 2)).unbind(1)
    assert ((first - second).abs().amax(-1) > 1e-3).all(), "no two readings are alike"
    seen.clear()
    pair_pretraining(model.eval(), torch.tensor([1, 8]))
    first, second = seen[0][2].unflatten(0, (3, 2, 2)).unbind(1)
    torch.testing.assert_close(first, second)


PARTS = {"text": ("towers.items.adapters.text.", "towers.fusion.transforms.0."), "image": ("towers.items.adapters.image.", "towers.fusion.transforms.1."),
         "both": ("towers.encoder.blocks.", "towers.encoder.norm.", "towers.encoder.final_norm.")}


def reached(model, loss):
    "Which parts a loss teaches; a part is taught if every weight of it gets some gradient."
    model.zero_grad()
    loss.backward(retain_graph=True)
    parts = set()
    for part, prefixes in PARTS.items():
        moved = [x.grad is not None and x.grad.abs().max().item() > 1e-12 for name, x in model.named_parameters() if name.startswith(prefixes)]
        assert moved and (all(moved) or not any(moved)), part
        if any(moved): parts.add(part)
    return parts


@pytest.mark.parametrize("term, expected", [("image_image", {"image", "both"}), ("text_text", {"text", "both"}),
                                            ("image_text", {"text", "image", "both"}), ("both_both", {"text", "image", "both"})])
def test_a_term_teaches_what_it_looks_at(term, expected):
    model = shaken()
    terms = pair_pretraining(model, torch.tensor([1, 2, 6, 8]))
    assert reached(model, terms[term]) == expected
    assert model.towers.items.mask_emb.weight.grad is None or not model.towers.items.mask_emb.weight.grad.any(), "there is no gap"
    places = model.towers.encoder.position_emb.weight.grad
    assert places[0].any() and not places[1:].any(), "an item stands at place 0"


def test_both_sides_of_finetuning_teach(monkeypatch):
    model, batch = shaken(), asking()
    everything = {"text", "image", "both"}
    original = model.item_vectors
    monkeypatch.setattr(model, "item_vectors", lambda ids: original(ids).detach())
    assert reached(model, model.finetune_loss(batch)["loss"]) == everything, "histories alone"
    assert model.towers.items.mask_emb.weight.grad.any()
    monkeypatch.setattr(model, "item_vectors", original)
    read = model.towers.history_vectors
    monkeypatch.setattr(model.towers, "history_vectors", lambda batch: read(batch).detach())
    assert reached(model, model.finetune_loss(batch)["loss"]) == everything, "items alone"
    assert model.towers.items.mask_emb.weight.grad is None or not model.towers.items.mask_emb.weight.grad.any()
    shallow = shaken(deep_items=False)
    read_shallow = shallow.towers.history_vectors
    monkeypatch.setattr(shallow.towers, "history_vectors", lambda batch: read_shallow(batch).detach())
    shallow.finetune_loss(batch)["loss"].backward()
    taught = {name for name, x in shallow.named_parameters() if x.grad is not None and x.grad.any()}
    assert taught and all(name.startswith("towers.items.adapters.") for name in taught), "a shallow item side is the adapters"


@pytest.mark.parametrize("options", [dict(text_size=None), dict(image_size=None), dict(deep_items=False)], ids=str)
def test_one_modality_has_no_pretraining(options):
    model = MMSRec(**dict(text_size=TEXT_SIZE, image_size=IMAGE_SIZE) | SIZES | options).set_catalogue(make_catalogue())
    assert not model.has_pretraining
    with pytest.raises(NotImplementedError, match="has no pre-training with one modality or deep_items=False"):
        model(asking(), "pretrain")


def test_nothing_but_training_items_reaches_pretraining():
    "Features of items that are only held out may be anything: the weights after pre-training are the same."
    items = np.array([1, 2, 6, 9, 10, 6, 7, 1, 11, 12], np.int32)
    stage = np.array([TRAIN, TRAIN, TRAIN, VALID, TEST] * 2, np.int8)
    store = SequenceStore(items, np.array([0, 5, 10]), stage, V)
    found = []
    for factor in (1., 1e3):
        catalogue = make_catalogue(whole=True)
        out = [row for row in range(1, V + 1) if row not in (1, 2, 6, 7)]
        catalogue.text_emb[out] *= factor
        catalogue.image_emb[out] *= factor
        model = build("content_mmsrec", catalogue)
        fit(model, store, "pretrain", **QUICK | {"epochs": 1})
        found.append(weights(model))
    assert same(*found)
    assert not torch.equal(found[0]["towers.fusion.transforms.0.0.weight"], weights(build("content_mmsrec"))["towers.fusion.transforms.0.0.weight"])


def test_pairs_without_histories():
    store = pair_store([6, 2, 2, 9], V)
    assert store.training_items.tolist() == [2, 6, 9] and store.n_items == V
    model = build("content_mmsrec", make_catalogue(whole=True))
    for epoch in range(3):
        asked = [batch.pos_item.tolist() for batch in training_batches(model, store, "pretrain", 2, epoch=epoch)]
        assert sorted(sum(asked, [])) == [2, 6, 9] and max(map(len, asked)) <= 2, "each once, in batches"
    with pytest.raises(ValueError, match="items must lie in 1..12"): pair_store([13], V)
    history = fit(model, pair_store(ALL.numpy(), V), "pretrain", **QUICK | {"epochs": 5})
    assert history.best_epoch == 4 and history.epochs[-1]["loss"] < history.epochs[0]["loss"], "the last epoch is kept"
    assert model.towers.items.fitted


def test_pretraining_brings_texts_to_their_pictures():
    catalogue = make_catalogue(whole=True)
    model = build("content_mmsrec", catalogue, **CALM)
    def found():
        with torch.no_grad(): text, image = (model.item_vectors(ALL, view.expand(V, 2)) for view in (ONLY_TEXT, ONLY_IMAGE))
        return ((text @ image.T).argmax(1) == torch.arange(V)).float().mean().item()
    before = found()
    fit(model, pair_store(ALL.numpy(), V), "pretrain", epochs=60, batch_size=V, lr=.01, device="cpu", progress=False)
    assert before < .5 and found() > .9


def test_everything_but_the_places_is_carried_over():
    source, target = build("content_mmsrec"), build("content_mmsrec", seed=1)
    fit(source, make_store(), "pretrain", **QUICK)
    own = target.towers.encoder.position_emb.weight.clone()
    transfer_weights(source, target, except_for=("towers.encoder.position_emb",))
    given = weights(source)
    for name, x in weights(target).items():
        assert torch.equal(x, own if name == "towers.encoder.position_emb.weight" else given[name]), name
    assert not torch.equal(own, given["towers.encoder.position_emb.weight"])
    longer = build("content_mmsrec", max_len=30)
    transfer_weights(source, longer, except_for=("towers.encoder.position_emb",))


def test_pretraining_in_sixteen_bits():
    model = build("content_mmsrec", gradient_caching=True, items_at_once=5)
    history = fit(model, make_store(), "pretrain", **QUICK | {"epochs": 4}, precision="bf16")
    assert all(x.dtype == torch.float32 for x in model.parameters())
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]


# The whole

def test_finetuning_understands_a_ring():
    store = ring_store(24)
    model = build("content_mmsrec", make_catalogue(whole=True), **CALM, n_layers=1, cloze_rate=0.)
    history = fit(model, store, epochs=30, batch_size=16, lr=.005, patience=30, device="cpu", progress=False)
    assert history.epochs[-1]["loss"] < .5 * math.log(V) < history.epochs[0]["loss"]
    batch, = evaluation_batches(store, VALID, 100, model.max_len)
    with torch.no_grad(): best = model.score(model.encode_sequence(batch), model.encode_items()).argmax(1) + 1
    assert (best == batch.pos_item).float().mean() > .5


def test_a_new_item_needs_only_its_features():
    "The same history, one more item: what was ranked keeps its score."
    model, catalogue = shaken(), make_catalogue()
    expected = model.score(model.encode_sequence(collate(HISTORIES, 10)), model.encode_items())
    twins = replace(catalogue.take([*range(1, V + 1), 7]), item_tokens=[*catalogue.item_tokens, "newcomer"])
    model.set_catalogue(twins)
    found = model.score(model.encode_sequence(collate(HISTORIES, 10)), model.encode_items())
    torch.testing.assert_close(found[:, :V], expected, **CLOSE)
    torch.testing.assert_close(found[:, V], expected[:, 6], **CLOSE)


def test_texts_alone_are_a_catalogue_without_pictures():
    "A model of both kinds ranks items without pictures as the model of texts that has its weights."
    set_seed(0)
    both = MMSRec(TEXT_SIZE, IMAGE_SIZE, **SIZES).double().eval()
    one = MMSRec(TEXT_SIZE, None, **SIZES).double().eval()
    for own, given in zip(("towers.encoder.modality_emb.weight",), (both.towers.encoder.modality_emb.weight[:1],)):
        one.load_state_dict({name: x for name, x in both.state_dict().items() if name in one.state_dict()} | {own: given})
    rng, tokens = np.random.default_rng(0), [f"item-{row}" for row in range(1, V + 1)]
    text = rng.standard_normal((V, TEXT_SIZE))
    one.set_catalogue(catalogue_from_arrays(tokens, text))
    both.set_catalogue(catalogue_from_arrays(tokens, text, np.zeros((V, IMAGE_SIZE))))
    torch.testing.assert_close(both.encode_items().vectors, one.encode_items().vectors, **CLOSE)
    found = [model.encode_sequence(collate([[1, 2], [7]], 10)) for model in (both, one)]
    assert all(x.isfinite().all() for x in found), "a [MASK] has two tokens in one and one in the other: these may differ"


OPTIONS = dict(embedding_dropout=.15, cloze_rate=.35, n_candidates=7, gradient_caching=True, items_at_once=6, deep_items=False,
               centred=False, temperature=.2)


@pytest.mark.parametrize("options", [{}, OPTIONS, dict(image_size=None), dict(text_size=None)], ids=str)
def test_saved_options_come_back(options, tmp_path):
    set_seed(0)
    model = MMSRec(**dict(text_size=TEXT_SIZE, image_size=IMAGE_SIZE) | SIZES | options).set_catalogue(make_catalogue())
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert SIZES.items() <= config.items() and {k: v for k, v in options.items() if v is not None}.items() <= config.items()
    again = MMSRec.from_pretrained(tmp_path / "saved")
    assert same(weights(again), weights(model.eval())) and again.has_pretraining == model.has_pretraining
    owners = {"gradient_caching": "towers", "items_at_once": "towers", "deep_items": "towers", "centred": "towers.items"}
    for name in ("temperature", "cloze_rate", "n_candidates", "max_len", *owners):
        a, b = (getattr(each.get_submodule(owners.get(name, "")), name) for each in (again, model))
        assert a == b == options.get(name, b), name
    assert again.towers.encoder.dropout.p == options.get("embedding_dropout", .2)


def test_the_papers_sizes_count_as_by_hand():
    D, I = 512, 1024
    block = 4 * (D * D + D) + (D * I + I) + (I * D + D) + 2 * 2 * D
    by_hand = 2 * (D * D + D + 2 * D) + D + 20 * D + 2 * D + 2 * D + 2 * block + 2 * D + 2 * (D * D + D + 2 * D)
    model = MMSRec(D, D, hidden_size=D, n_layers=2, n_heads=8, inner_size=I, max_len=19)
    assert sum(x.numel() for x in model.parameters()) == by_hand == 5_274_112
    assert (model.temperature, model.cloze_rate, model.towers.encoder.dropout.p) == (.05, .2, .2)
