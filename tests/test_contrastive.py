"The contrastive tasks against loops over the papers' formulas, with every exponential written out."
import math

import pytest
import torch
from torch.nn import functional as F

from mmseqrec.blocks.contrastive import (cross_modality_loss, modality_combination_loss, next_item_loss, sequence_item_loss,
                                  sequence_sequence_loss, symmetric_nce)
from mmseqrec.blocks.losses import same_target_mask

CLOSE = dict(rtol=0, atol=1e-9)
TAU = .3  # mild: in 64 bits the loops need no tricks
DISTINCT, REPEATED, ALL_ALIKE = (5, 3, 8, 9, 1), (5, 3, 5, 9, 5), (4, 4, 4, 4, 4)
B, D = 5, 4

each_target = pytest.mark.parametrize("items", [DISTINCT, REPEATED, ALL_ALIKE], ids=["distinct", "repeated", "all_alike"])
each_legacy = pytest.mark.parametrize("legacy", [False, True], ids=["paper", "legacy"])


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def false_negatives(items): return same_target_mask(torch.tensor(items))


def e(a, b, tau=TAU): return math.exp(sum(x * y for x, y in zip(a.tolist(), b.tolist())) / tau)


# A history and its next item, a history and its disturbed self

ways = pytest.mark.parametrize("way", ["removed", "one", "kept"])  # what becomes of rows with the same next item


def options(way): return {"keep_false_negatives": way == "kept", "legacy_false_negatives": way == "one"}


def slow_sequence_item(scores, items, way, tau=TAU):
    "Row by row: same-target rows are removed, kept, or leave an exponential of zero behind."
    total = 0.0
    for b in range(len(items)):
        below = 0.0
        for c in range(len(items)):
            if c == b or items[c] != items[b] or way == "kept": below += math.exp(scores[b][c] / tau)
            elif way == "one": below += math.exp(0.0)
        total -= math.log(math.exp(scores[b][b] / tau) / below)
    return total / len(items)


def random_scores(seed=3): return 2 * torch.rand(B, B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


@each_target
@ways
def test_sequence_item_loss_equals_the_formula(way, items):
    scores, pos_item = random_scores(), torch.tensor(items)
    loss = sequence_item_loss(scores, pos_item, TAU, **options(way))
    assert loss.ndim == 0 and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(slow_sequence_item(scores.tolist(), items, way), abs=1e-9)
    default = sequence_item_loss(scores, pos_item).item()
    assert default == pytest.approx(slow_sequence_item(scores.tolist(), items, "removed", .07), abs=1e-9)
    assert torch.autograd.gradcheck(lambda x: sequence_item_loss(x, pos_item, TAU, **options(way)), (scores.requires_grad_(),))


def test_the_history_asks_and_the_items_answer():
    "Rows are histories: a column whose item everybody likes costs every other row, and not its own."
    scores = torch.zeros(B, B, dtype=torch.float64)
    scores[:, 2] = 5
    expected = slow_sequence_item(scores.tolist(), DISTINCT, "removed", 1.)
    assert sequence_item_loss(scores, torch.tensor(DISTINCT), 1.).item() == pytest.approx(expected, abs=1e-9)
    assert abs(sequence_item_loss(scores.T, torch.tensor(DISTINCT), 1.).item() - expected) > .1


def slow_cosine(x, y):
    dot = lambda a, b: sum(u * v for u, v in zip(a.tolist(), b.tolist()))
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


@each_target
@ways
def test_sequence_sequence_loss_equals_the_formula(way, items):
    own, other = 3 * unit(B, D), unit(B, D, seed=1) * torch.arange(1, B + 1)[:, None]  # lengths do not matter
    cosines = [[slow_cosine(x, y) for y in other] for x in own]
    loss = sequence_sequence_loss(own, other, torch.tensor(items), TAU, **options(way))
    assert loss.item() == pytest.approx(slow_sequence_item(cosines, items, way), abs=1e-9)
    default = sequence_sequence_loss(own, other, torch.tensor(items)).item()
    assert default == pytest.approx(slow_sequence_item(cosines, items, "removed", .07), abs=1e-9)
    own.requires_grad_(), other.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: sequence_sequence_loss(a, b, torch.tensor(items), TAU, **options(way)), (own, other))


@ways
def test_false_negatives_get_no_gradient_unless_kept(way):
    scores = random_scores().requires_grad_()
    sequence_item_loss(scores, torch.tensor(REPEATED), TAU, **options(way)).backward()
    same = false_negatives(REPEATED)
    assert scores.grad[~same].abs().min() > 1e-9 and bool(scores.grad[same].any()) == (way == "kept")


# Next item prediction

def slow_next_item(queries, targets, items, lacking=(), tau=TAU):
    "The paper's formula; rows whose target is lacking neither ask nor answer."
    rows, total = [b for b in range(len(items)) if b not in lacking], 0.0
    for b in rows:
        above = sum(e(q, targets[b], tau) for q in queries[b])
        others = [c for c in rows if c == b or items[c] != items[b]]
        total -= math.log(above / sum(e(q, targets[c], tau) for c in others for q in queries[b]))
    return total / len(rows)


def released_next_item(queries, targets, items, tau=TAU):
    "The released arithmetic: the logits of other rows with the same target are set to zero, their exponentials stay."
    total = 0.0
    for b in range(len(items)):
        above = sum(e(q, targets[b], tau) for q in queries[b])
        below = 0.0
        for q in queries[b]:
            for c in range(len(items)):
                below += math.exp(0.0) if c != b and items[c] == items[b] else e(q, targets[c], tau)
        total -= math.log(above / below)
    return total / len(items)


@each_target
@pytest.mark.parametrize("P", [1, 2, 3])
def test_next_item_loss_equals_the_formula(P, items):
    queries, targets = unit(B, P, D), unit(B, D, seed=1)
    loss = next_item_loss(queries, targets, false_negatives(items), TAU)
    assert loss.ndim == 0 and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(slow_next_item(queries, targets, items), abs=1e-9)


@pytest.mark.parametrize("P", [1, 2])
def test_next_item_loss_uses_its_temperature(P):
    queries, targets = unit(B, P, D), unit(B, D, seed=1)
    for tau in (.07, 1.0):
        loss = next_item_loss(queries, targets, false_negatives(REPEATED), tau)
        assert loss.item() == pytest.approx(slow_next_item(queries, targets, REPEATED, tau=tau), abs=1e-9)
    default = next_item_loss(queries, targets, false_negatives(REPEATED))
    assert default.item() == pytest.approx(slow_next_item(queries, targets, REPEATED, tau=.07), abs=1e-9)


@each_target
@pytest.mark.parametrize("P", [1, 2])
def test_next_item_loss_of_the_released_code(P, items):
    queries, targets = unit(B, P, D), unit(B, D, seed=1)
    legacy = next_item_loss(queries, targets, false_negatives(items), TAU, legacy_false_negatives=True).item()
    assert legacy == pytest.approx(released_next_item(queries, targets, items), abs=1e-9)
    paper = next_item_loss(queries, targets, false_negatives(items), TAU).item()
    assert (legacy == pytest.approx(paper, abs=1e-9)) == (items == DISTINCT)
    if items == ALL_ALIKE: assert paper == pytest.approx(0, abs=1e-9), "nothing is wrong, so nothing is to be learned"


@each_legacy
@each_target
@pytest.mark.parametrize("lacking", [(0,), (1, 4), (0, 1, 2, 3)])
def test_rows_with_a_missing_target_neither_ask_nor_answer(lacking, items, legacy):
    queries, targets = unit(B, 2, D).requires_grad_(), unit(B, D, seed=1).requires_grad_()
    missing = torch.tensor([b in lacking for b in range(B)])
    loss = next_item_loss(queries, targets, false_negatives(items), TAU, missing, legacy)
    rows = [b for b in range(B) if b not in lacking]
    slow = (released_next_item(queries[rows], targets[rows], [items[b] for b in rows]) if legacy else
            slow_next_item(queries, targets, items, lacking))
    assert loss.item() == pytest.approx(slow, abs=1e-9)
    loss.backward()
    for x in (queries, targets): assert x.grad.isfinite().all() and not x.grad[missing].any()
    with torch.no_grad(): targets[missing] = torch.nan  # not even looked at
    assert next_item_loss(queries, targets, false_negatives(items), TAU, missing, legacy).item() == loss.item()


def test_nothing_missing_is_no_mask():
    queries, targets, same = unit(B, 2, D), unit(B, D, seed=1), false_negatives(REPEATED)
    nobody = torch.zeros(B, dtype=torch.bool)
    assert next_item_loss(queries, targets, same, TAU, nobody) == next_item_loss(queries, targets, same, TAU)


@each_legacy
def test_all_targets_missing_cost_and_teach_nothing(legacy):
    queries, targets = unit(B, 2, D).requires_grad_(), unit(B, D, seed=1).requires_grad_()
    loss = next_item_loss(queries, targets, false_negatives(REPEATED), TAU, torch.ones(B, dtype=torch.bool), legacy)
    assert loss.item() == 0 and loss.ndim == 0
    loss.backward()
    assert torch.equal(queries.grad, torch.zeros(B, 2, D, dtype=torch.float64))
    assert targets.grad is None or not targets.grad.any()


@each_legacy
def test_next_item_gradients_equal_finite_differences(legacy):
    queries, targets = unit(B, 2, D).requires_grad_(), unit(B, D, seed=1).requires_grad_()
    missing = torch.tensor([False, False, False, True, False])
    for mask in (None, missing):
        loss = lambda q, a: next_item_loss(q, a, false_negatives(REPEATED), TAU, mask, legacy)
        assert torch.autograd.gradcheck(loss, (queries, targets))


def test_row_b_asks_the_targets_of_other_items_only():
    "The rows' losses apart, as far as they can be told apart: each row's query gets no gradient from a false negative."
    queries, targets = unit(B, 2, D), unit(B, D, seed=1)
    moved = targets.clone()
    moved[[0, 4]] = unit(2, D, seed=7)
    def gradient_of_row_2(a):
        q = queries.clone().requires_grad_()
        next_item_loss(q, a, false_negatives(REPEATED), TAU).backward()
        return q.grad[2]
    torch.testing.assert_close(gradient_of_row_2(moved), gradient_of_row_2(targets), **CLOSE)
    moved[1] = unit(D, seed=8)
    assert (gradient_of_row_2(moved) - gradient_of_row_2(targets)).abs().max() > 1e-3


def test_every_query_and_target_learns_and_the_other_modality_does_not():
    "In the projected space of one modality, both streams are moved and the targets of this modality only."
    h, z = unit(B, 2, D).requires_grad_(), unit(B, 2, D, seed=1).requires_grad_()
    next_item_loss(h, z[:, 0], false_negatives(REPEATED), TAU).backward()
    assert (h.grad.abs().sum(-1) > 1e-6).all() and (z.grad[:, 0].abs().sum(-1) > 1e-6).all()
    assert not z.grad[:, 1].any()
    h.grad = None
    next_item_loss(h[:, :1], z[:, 0].detach(), false_negatives(REPEATED), TAU).backward()  # without projections
    assert (h.grad[:, 0].abs().sum(-1) > 1e-6).all() and not h.grad[:, 1].any()


def test_the_order_of_queries_does_not_matter_but_both_count():
    queries, targets, same = unit(B, 2, D), unit(B, D, seed=1), false_negatives(REPEATED)
    both = next_item_loss(queries, targets, same, TAU)
    torch.testing.assert_close(next_item_loss(queries.flip(1), targets, same, TAU), both, **CLOSE)
    for one in (0, 1): assert abs(next_item_loss(queries[:, [one]], targets, same, TAU) - both) > 1e-3
    twice = next_item_loss(queries[:, [0, 0]], targets, same, TAU)  # the same query twice is this query once
    torch.testing.assert_close(twice, next_item_loss(queries[:, :1], targets, same, TAU), **CLOSE)


@pytest.mark.parametrize("P", [1, 2])
def test_next_item_of_nothing_known_costs_log_b(P):
    queries, targets = unit(B, P, D), unit(1, D, seed=1).expand(B, D)
    for tau in (.07, 1.0):
        loss = next_item_loss(queries, targets, false_negatives(DISTINCT), tau)
        assert loss.item() == pytest.approx(math.log(B), abs=1e-9)


# Agreement across modalities

def slow_cross_modality(own, other, items, tau=TAU):
    "The paper's formula: one half seen from each stream."
    def half(x, y):
        total = 0.0
        for b in range(len(items)):
            different = [c for c in range(len(items)) if items[c] != items[b]]
            below = sum(e(x[b], y[c], tau) for c in [b, *different]) + sum(e(x[b], x[c], tau) for c in different)
            total -= math.log(e(x[b], y[b], tau) / below)
        return total / len(items)
    return (half(own, other) + half(other, own)) / 2


def released_cross_modality(own, other, items, zeroed=True, rows=True, tau=TAU):
    "The released arithmetic: sums over whole rows, from which the vector's own exponential is then subtracted."
    n, total = len(items), 0.0
    def row_sum(x, y, b):
        below = 0.0
        for c in range(n):
            same = c != b and items[c] == items[b]
            if not same: below += e(x[b], y[c], tau)
            elif zeroed: below += math.exp(0.0)
        return below
    for b in range(n):
        above, cross = e(own[b], other[b], tau), row_sum(own, other, b)
        total -= math.log(above / (cross + row_sum(own, own, b) - e(own[b], own[b], tau)))
        cross = cross if rows else row_sum(other, own, b)
        total -= math.log(above / (cross + row_sum(other, other, b) - e(other[b], other[b], tau)))
    return total / (2 * n)


@each_target
@pytest.mark.parametrize("tau", [.07, TAU, 1.0])
def test_cross_modality_loss_equals_the_formula(tau, items):
    own, other = unit(B, D), unit(B, D, seed=1)
    loss = cross_modality_loss(own, other, false_negatives(items), tau)
    assert loss.ndim == 0 and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(slow_cross_modality(own, other, items, tau), abs=1e-9)
    if tau == .07: assert cross_modality_loss(own, other, false_negatives(items)).item() == loss.item()


@each_target
@pytest.mark.parametrize("zeroed, rows", [(True, True), (True, False), (False, True), (False, False)])
def test_cross_modality_loss_of_the_released_code(zeroed, rows, items):
    own, other = unit(B, D), unit(B, D, seed=1)
    loss = cross_modality_loss(own, other, false_negatives(items), TAU, zeroed, rows).item()
    assert loss == pytest.approx(released_cross_modality(own, other, items, zeroed, rows), abs=1e-9)
    paper = cross_modality_loss(own, other, false_negatives(items), TAU).item()
    if not rows: assert (loss == pytest.approx(paper, abs=1e-9)) == (not zeroed or items == DISTINCT)
    if items == ALL_ALIKE: assert paper == pytest.approx(0, abs=1e-9)
    if rows and items != ALL_ALIKE: assert abs(loss - paper) > 1e-4


def test_the_released_broadcast_has_the_same_mean():
    "Released, each half is a `[B, B]` matrix of every numerator over every denominator; with length 1 its mean is the loss."
    own, other, items = unit(B, D), unit(B, D, seed=1), REPEATED
    same = false_negatives(items)
    above = ((own * other).sum(1, keepdim=True) / TAU).exp()
    sums = [(x @ y.T / TAU).masked_fill(same, 0).exp().sum(1) for x, y in ((own, other), (own, own), (other, other))]
    itself = [((x * x).sum(1, keepdim=True) / TAU).exp() for x in (own, other)]
    halves = [-(above / (sums[0] + sums[k] - itself[k - 1])).log() for k in (1, 2)]
    assert halves[0].shape == (B, B)
    expected = (halves[0].mean() + halves[1].mean()) / 2
    torch.testing.assert_close(cross_modality_loss(own, other, same, TAU, True, True), expected, **CLOSE)


@each_target
@each_legacy
def test_streams_may_be_exchanged_unless_rows_are_used_twice(legacy, items):
    own, other, same = unit(B, D), unit(B, D, seed=1), false_negatives(items)
    there, back = (cross_modality_loss(*pair, same, TAU, legacy) for pair in ((own, other), (other, own)))
    torch.testing.assert_close(there, back, **CLOSE)
    there, back = (cross_modality_loss(*pair, same, TAU, legacy, legacy_rows=True) for pair in ((own, other), (other, own)))
    if items != ALL_ALIKE: assert abs(there - back) > 1e-4


@each_legacy
@pytest.mark.parametrize("rows", [False, True])
def test_cross_modality_gradients_equal_finite_differences(rows, legacy):
    own, other = unit(B, D).requires_grad_(), unit(B, D, seed=1).requires_grad_()
    loss = lambda a, b: cross_modality_loss(a, b, false_negatives(REPEATED), TAU, legacy, rows)
    assert torch.autograd.gradcheck(loss, (own, other))
    loss(own, other).backward()
    for x in (own, other): assert x.grad.isfinite().all() and (x.grad.abs().sum(1) > 1e-6).all()


@each_legacy
def test_false_negatives_do_not_push_each_other(legacy):
    "Two users who want the same: wherever one of them stands, the other's gradient is what it was."
    gradients = {}
    for items in ((5, 5), (5, 6)):
        for seed in (2, 3):
            own, other = (torch.cat([unit(1, D, seed=s), unit(1, D, seed=seed + s)]).requires_grad_() for s in (0, 1))
            cross_modality_loss(own, other, false_negatives(items), TAU, legacy).backward()
            gradients[items, seed] = torch.stack([own.grad[0], other.grad[0]])
    torch.testing.assert_close(gradients[(5, 5), 2], gradients[(5, 5), 3], **CLOSE)
    assert (gradients[(5, 6), 2] - gradients[(5, 6), 3]).abs().max() > 1e-3
    assert bool(gradients[(5, 5), 2].abs().max() > 1e-3) == legacy  # the constant 1 still pulls a user's own pair together


def test_a_vector_is_never_its_own_wrong_answer():
    "Not as a large number, nor as the 1 that false negatives leave behind."
    own, other, same = 3 * unit(B, D), 2 * unit(B, D, seed=1), false_negatives(DISTINCT)
    for legacy in (False, True):
        loss = cross_modality_loss(own, other, same, 1.0, legacy)
        assert loss.item() == pytest.approx(slow_cross_modality(own, other, DISTINCT, 1.0), abs=1e-9)
        alone = cross_modality_loss(own[:1], other[:1], same[:1, :1], TAU, legacy)
        assert alone.item() == pytest.approx(0, abs=1e-12)  # one user, one right answer, no wrong one


def test_cross_modality_of_nothing_known_and_of_agreement():
    alike = unit(1, D).expand(B, D)
    assert cross_modality_loss(alike, alike, false_negatives(DISTINCT), TAU).item() == pytest.approx(math.log(2 * B - 1), abs=1e-9)
    corners = torch.eye(B, dtype=torch.float64)  # orthogonal users whose streams agree
    expected = math.log(1 + (2 * B - 2) * math.exp(-1 / TAU))
    assert cross_modality_loss(corners, corners, false_negatives(DISTINCT), TAU).item() == pytest.approx(expected, abs=1e-9)


# One item, seen in several ways

def slow_nce(a, b, tau):
    "Both directions, pair by pair."
    n, total = len(a), 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(n):
            terms = [math.exp(slow_cosine(x[i], y[j]) / tau) for j in range(n)]
            total -= math.log(terms[i] / sum(terms)) / n
    return total


def passes(n=6, seed=0):
    return torch.randn(3, 2, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tau", [.05, TAU, 1.])
def test_symmetric_nce_equals_the_formula(tau):
    a, b = passes()[0]
    loss = symmetric_nce(a, b, tau)
    assert loss.ndim == 0 and loss.item() == pytest.approx(slow_nce(a, b, tau), abs=1e-9)
    if tau == .05: assert symmetric_nce(a, b).item() == loss.item()
    torch.testing.assert_close(symmetric_nce(b, a, tau), loss, **CLOSE)
    torch.testing.assert_close(symmetric_nce(5 * a, b / 3, tau), loss, **CLOSE)
    torch.testing.assert_close(symmetric_nce(a.flip(0), b.flip(0), tau), loss, **CLOSE)
    assert torch.autograd.gradcheck(lambda a, b: symmetric_nce(a, b, TAU), (a.requires_grad_(), b.requires_grad_()))


def test_symmetric_nce_of_one_item_and_of_none():
    a = passes()[0].requires_grad_()
    assert symmetric_nce(a[0, :1], a[1, :1]).item() == pytest.approx(0, abs=1e-12)
    nothing = symmetric_nce(a[0, :0], a[1, :0])
    nothing.backward()
    assert nothing.item() == 0 and not a.grad.any()


LACKING = {"nobody": [], "some": [(0, 1), (3, 1), (5, 0)], "one_has_nothing": [(2, 0), (2, 1), (4, 1)],
           "no_pictures": [(i, 1) for i in range(6)], "nothing_in_common": [(i, i % 2) for i in range(6)]}


def lacks(which):
    missing_modality_mask = torch.zeros(6, 2, dtype=torch.bool)
    for place in LACKING[which]: missing_modality_mask[place] = True
    return missing_modality_mask


@pytest.mark.parametrize("which", LACKING)
def test_modality_combinations_equal_the_formula(which):
    (v, t, vt), missing = passes(), lacks(which)
    terms = modality_combination_loss(v, t, vt, missing, TAU)
    has = [(not missing[i, 0], not missing[i, 1]) for i in range(6)]  # text, picture
    rows = {"image_image": [i for i in range(6) if has[i][1]], "text_text": [i for i in range(6) if has[i][0]],
            "image_text": [i for i in range(6) if all(has[i])], "both_both": [i for i in range(6) if any(has[i])]}
    pairs = {"image_image": (v[0], v[1]), "image_text": (v[0], t[0]), "text_text": (t[0], t[1]), "both_both": (vt[0], vt[1])}
    assert set(terms) == {"loss", *pairs}
    for name, (a, b) in pairs.items():
        expected = slow_nce(a[rows[name]], b[rows[name]], TAU) if rows[name] else 0
        assert terms[name].item() == pytest.approx(expected, abs=1e-9), name
    assert terms["loss"].item() == pytest.approx(sum(terms[name].item() for name in pairs) / 4, abs=1e-9)
    default = modality_combination_loss(v, t, vt, missing)["text_text"].item()
    assert default == pytest.approx(slow_nce(t[0][rows["text_text"]], t[1][rows["text_text"]], .05), abs=1e-9)


@pytest.mark.parametrize("which", LACKING)
def test_what_is_missing_is_not_looked_at(which):
    x, missing = passes(), lacks(which)
    expected = modality_combination_loss(*x, missing)
    x[0, :, missing[:, 1]] = x[1, :, missing[:, 0]] = x[2, :, missing.all(1)] = torch.nan
    x.requires_grad_()
    found = modality_combination_loss(*x, missing)
    for name, term in expected.items(): torch.testing.assert_close(found[name], term, **CLOSE)
    found["loss"].backward()
    assert x.grad.isfinite().all()
    assert not x.grad[0, :, missing[:, 1]].any() and not x.grad[1, :, missing[:, 0]].any()
    assert (x.grad[2][:, ~missing.all(1)].abs().sum(-1) > 0).all()


def test_gradients_of_modality_combinations_equal_finite_differences():
    loss = lambda v, t, vt: modality_combination_loss(v, t, vt, lacks("some"), TAU)["loss"]
    assert torch.autograd.gradcheck(loss, tuple(x.clone().requires_grad_() for x in passes()))


# All

@each_target
@ways
def test_the_order_of_histories_does_not_matter(way, items):
    order, scores, pos_item = torch.tensor([3, 0, 4, 1, 2]), random_scores(), torch.tensor(items)
    torch.testing.assert_close(sequence_item_loss(scores[order][:, order], pos_item[order], TAU, **options(way)),
                               sequence_item_loss(scores, pos_item, TAU, **options(way)), **CLOSE)


def test_sixteen_bits_are_summed_in_thirty_two():
    a, b = passes(64)[0].bfloat16()
    pos_item = torch.arange(64)
    for loss in (symmetric_nce(a, b), sequence_sequence_loss(a, b, pos_item)):
        assert loss.dtype == torch.float32 and loss.isfinite()
    exact = sequence_sequence_loss(a.double(), b.double(), pos_item).item()
    assert sequence_sequence_loss(a, b, pos_item).item() == pytest.approx(exact, rel=.03)


@each_legacy
@each_target
def test_the_order_of_a_batch_does_not_matter(items, legacy):
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = [items[b] for b in order.tolist()]
    queries, targets, missing = unit(B, 2, D), unit(B, D, seed=1), torch.tensor([False, True, False, False, False])
    torch.testing.assert_close(
        next_item_loss(queries[order], targets[order], false_negatives(shuffled), TAU, missing[order], legacy),
        next_item_loss(queries, targets, false_negatives(items), TAU, missing, legacy), **CLOSE)
    own, other = queries.unbind(1)
    torch.testing.assert_close(
        cross_modality_loss(own[order], other[order], false_negatives(shuffled), TAU, legacy, legacy),
        cross_modality_loss(own, other, false_negatives(items), TAU, legacy, legacy), **CLOSE)


@each_legacy
@pytest.mark.parametrize("sign", [1, -1])
def test_a_temperature_that_overflows_exponentials_does_no_harm(sign, legacy):
    "In 32 bits the exponential of 100 is infinite."
    h = F.normalize(torch.randn(B, D, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    other, same = (sign * h).detach(), false_negatives(REPEATED)
    pos_item = torch.tensor(REPEATED)
    for loss in (next_item_loss(h[:, None], other, same, .01, None, legacy), cross_modality_loss(h, other, same, .01, legacy),
                 sequence_item_loss(h @ other.T, pos_item, .01, False, legacy), symmetric_nce(h, other, .01),
                 sequence_sequence_loss(h, other, pos_item, .01, False, legacy)):
        h.grad = None
        loss.backward(retain_graph=True)
        assert loss.isfinite() and h.grad.isfinite().all()


def test_wrong_shapes_are_named():
    queries, targets, same = unit(B, 2, D), unit(B, D, seed=1), false_negatives(REPEATED)
    with pytest.raises(ValueError, match="3 axes"): next_item_loss(targets, targets, same)
    with pytest.raises(ValueError, match=r"\(D\).*must be 4, got 3"): next_item_loss(queries, targets[:, :3], same)
    with pytest.raises(ValueError, match=r"\(B\).*must be 5, got 4"): next_item_loss(queries, targets[:4], same)
    with pytest.raises(ValueError, match=r"\(B\).*must be 5, got 1"): next_item_loss(queries[:, :1], targets, same[:, :1])
    with pytest.raises(ValueError, match=r"\(D\).*must be 4, got 3"): cross_modality_loss(targets, targets[:, :3], same)
    with pytest.raises(ValueError, match=r"\(B\).*must be 5, got 4"): cross_modality_loss(targets, targets[:4], same)
    with pytest.raises(ValueError, match=r"\(B\).*must be 5, got 4"): cross_modality_loss(targets, targets, same[:4])
    scores, pos_item, (v, t, vt) = random_scores(), torch.tensor(REPEATED), passes()
    with pytest.raises(ValueError, match=r"\(B\).*must be 5, got 4"): sequence_item_loss(scores, pos_item[:4])
    with pytest.raises(ValueError, match=r"\(B\).*must be 5, got 4"): sequence_item_loss(scores[:, :4], pos_item)
    with pytest.raises(ValueError, match=r"\(D\).*must be 4, got 3"): sequence_sequence_loss(targets, targets[:, :3], pos_item)
    with pytest.raises(ValueError, match=r"\(N\).*must be 6, got 5"): symmetric_nce(v[0], v[1, :5])
    with pytest.raises(ValueError, match=r"\(P\).*must be 2, got 1"): modality_combination_loss(v, t, vt[:1], lacks("some"))
    with pytest.raises(ValueError, match=r"\(N\).*must be 6, got 5"): modality_combination_loss(v[:, :5], t, vt, lacks("some"))
    with pytest.raises(ValueError, match=r"\(M\).*must be 2, got 1"): modality_combination_loss(v, t, vt, lacks("some")[:, :1])
