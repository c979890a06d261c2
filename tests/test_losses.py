"Full-softmax cross-entropy, InfoNCE and interest diversity against loops: the loss, every gradient, the memory."
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmseqrec.blocks.losses import (dot_score, draw_negatives, full_softmax_cross_entropy, gbce, grouped_scores, info_nce,
                             interest_diversity, items_of_step, same_target_mask, sampled_softmax)
from mmseqrec.core import set_seed

CLOSE = dict(rtol=0, atol=1e-9)


def problem(T=7, N=11, S=2, D=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sequence, vectors = (torch.randn(n, S, D, generator=generator, dtype=dtype) for n in (T, N))
    return sequence, vectors, torch.randint(0, N, (T,), generator=generator)


def slow_scores(sequence, vectors, missing=None):
    "Scores as lists, with loops."
    return [[sum(float(sequence[t, s, d]) * float(vectors[n, s, d]) for s in range(vectors.shape[1])
                 for d in range(vectors.shape[2]) if missing is None or not missing[n, s])
             for n in range(len(vectors))] for t in range(len(sequence))]


def slow_loss(sequence, vectors, target, temperature):
    "Mean surprise, with loops."
    surprises = []
    for row, wanted in zip(slow_scores(sequence, vectors), target.tolist()):
        logits = [score / temperature for score in row]
        top = max(logits)
        surprises.append(math.log(sum(math.exp(x - top) for x in logits)) + top - logits[wanted])
    return sum(surprises) / len(surprises)


def slow_gradients(sequence, vectors, target, temperature):
    "Gradients by the formula (p - [right]) / (tau T), with NumPy."
    u, c = sequence.numpy(), vectors.numpy()
    logits = np.einsum("tsd,nsd->tn", u, c) / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(p)), target.numpy()] -= 1
    p /= temperature * len(p)
    return np.einsum("tn,nsd->tsd", p, c), np.einsum("tn,tsd->nsd", p, u)


def test_dot_score_equals_loops():
    sequence, vectors, _ = problem()
    missing = torch.rand(11, 2, generator=torch.Generator().manual_seed(1)) < .4
    np.testing.assert_allclose(dot_score(sequence, vectors), slow_scores(sequence, vectors), **CLOSE)
    np.testing.assert_allclose(dot_score(sequence, vectors, missing), slow_scores(sequence, vectors, missing), **CLOSE)
    vectors[missing] = torch.nan  # what is missing is not even looked at
    assert dot_score(sequence, vectors, missing).isfinite().all()


def test_dot_score_refuses_other_sizes():
    sequence, vectors, _ = problem()
    with pytest.raises(ValueError, match=r"\(S\).*must be 2, got 1"): dot_score(sequence, vectors[:, :1])
    with pytest.raises(ValueError, match=r"\(D\).*must be 3, got 2"): dot_score(sequence, vectors[..., :2])


@pytest.mark.parametrize("temperature", [1.0, .07])
@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 7, 100])
def test_loss_and_gradients_equal_loops(rows_at_once, temperature):
    sequence, vectors, target = problem()
    expected, expected_gradients = slow_loss(sequence, vectors, target, temperature), slow_gradients(sequence, vectors, target, temperature)
    u, c = (x.clone().requires_grad_() for x in (sequence, vectors))
    loss = full_softmax_cross_entropy(u, c, target, temperature, max_elements=rows_at_once * 11)
    assert loss.ndim == 0
    (3 * loss).backward()  # the factor must reach the gradients
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    for x, gradient in zip((u, c), expected_gradients): np.testing.assert_allclose(x.grad, 3 * gradient, **CLOSE)


def scaled_score(sequence, vectors, scale, bias): return scale * dot_score(sequence, vectors) + bias


@pytest.mark.parametrize("wanted", [(1, 1, 1, 1), (1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 1, 0), (1, 0, 0, 0)])
def test_chunks_give_every_gradient_that_is_wanted_and_no_other(wanted):
    "`wanted`: sequence, vectors, scale and bias require a gradient or not."
    sequence, vectors, target = problem()
    inputs = sequence, vectors, torch.tensor(1.7, dtype=torch.float64), torch.linspace(-1, 1, 11, dtype=torch.float64)
    results = []
    for max_elements in (10**9, 22):
        x = [each.clone().requires_grad_(bool(flag)) for each, flag in zip(inputs, wanted)]
        loss = full_softmax_cross_entropy(x[0], x[1], target, .3, scaled_score, x[2:], max_elements)
        loss.backward()
        results.append((loss.detach(), [each.grad for each in x]))
    (whole, whole_gradients), (chunked, gradients) = results
    torch.testing.assert_close(chunked, whole, **CLOSE)
    for flag, a, b in zip(wanted, whole_gradients, gradients):
        assert (a is not None) == (b is not None) == bool(flag)
        if flag: torch.testing.assert_close(b, a, **CLOSE)
    if wanted[2]: assert gradients[2].abs() > 1e-3


@pytest.mark.parametrize("rows_at_once", [2, 100])
def test_gradients_equal_finite_differences(rows_at_once):
    sequence, vectors, target = problem(T=5, N=6)
    inputs = [x.requires_grad_() for x in (sequence, vectors, torch.tensor(1.3, dtype=torch.float64))]
    function = lambda u, c, scale: full_softmax_cross_entropy(u, c, target, .5, lambda a, b, s: s * dot_score(a, b), (scale,),
                                                             max_elements=6 * rows_at_once)
    assert torch.autograd.gradcheck(function, inputs)


def test_a_parameter_that_score_ignores_gets_nothing():
    sequence, vectors, target = problem()
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = full_softmax_cross_entropy(sequence.requires_grad_(), vectors, target, 1.0, lambda u, c, _: dot_score(u, c), (unused,), 11)
    loss.backward()
    assert sequence.grad.abs().sum() > 0 and (unused.grad is None or not unused.grad.any())


@pytest.mark.parametrize("with_gradients", [True, False])
def test_scores_are_never_held_whole(with_gradients):
    "300 x 200 scores, at most 1,000 at once: each chunk is freed before the next is made."
    sequence, vectors, target = problem(T=300, N=200, dtype=torch.float32)
    shapes, alive = [], []
    class Recorded(torch.Tensor): pass
    import weakref
    def score(u, c):
        assert not any(reference() is not None for reference in alive), "an earlier chunk is still held"
        out = dot_score(u, c).as_subclass(Recorded)
        shapes.append(tuple(out.shape))
        alive.append(weakref.ref(out))
        return out
    with torch.set_grad_enabled(with_gradients):
        loss = full_softmax_cross_entropy(sequence.requires_grad_(with_gradients), vectors, target, 1.0, score, max_elements=1000)
    assert max(math.prod(shape) for shape in shapes) <= 1000 and sum(shape[0] for shape in shapes) == 300
    torch.testing.assert_close(torch.as_tensor(loss).detach().as_subclass(torch.Tensor),
                               full_softmax_cross_entropy(sequence, vectors, target).detach(), rtol=1e-5, atol=1e-5)


def test_a_row_longer_than_the_limit_is_taken_alone():
    sequence, vectors, target = problem()
    shapes = []
    def score(u, c):
        shapes.append(tuple(u.shape))
        return dot_score(u, c)
    full_softmax_cross_entropy(sequence.requires_grad_(), vectors, target, 1.0, score, max_elements=5).backward()
    assert [shape[0] for shape in shapes] == [1] * 7


@pytest.mark.parametrize("max_elements", [1, 10**9])
@pytest.mark.parametrize("temperature", [.05, 1.0, 3.0])
def test_knowing_nothing_costs_log_v(temperature, max_elements):
    sequence, _, target = problem(N=11)
    vectors = torch.ones(11, 2, 3, dtype=torch.float64, requires_grad=True)
    loss = full_softmax_cross_entropy(sequence, vectors, target, temperature, max_elements=max_elements)
    assert loss.item() == pytest.approx(math.log(11), abs=1e-9)


def test_sixteen_bits_are_scored_in_thirty_two():
    sequence, vectors, target = problem(T=20, N=50)
    narrow = [F.normalize(x, dim=-1).bfloat16().requires_grad_() for x in (sequence, vectors)]
    wide = [x.detach().float() for x in narrow]
    for max_elements in (10**9, 150):
        loss = full_softmax_cross_entropy(*narrow, target, .07, max_elements=max_elements)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full_softmax_cross_entropy(*wide, target, .07).item(), rel=.02)
        loss.backward()
        assert narrow[0].grad.dtype == torch.bfloat16 and narrow[0].grad.isfinite().all()


@pytest.mark.parametrize("max_elements", [1, 10**9])
def test_nothing_asked_and_wrong_sizes_are_errors(max_elements):
    sequence, vectors, target = problem()
    with pytest.raises(ValueError, match="no targets"):
        full_softmax_cross_entropy(sequence[:0], vectors, target[:0], max_elements=max_elements)
    with pytest.raises(ValueError, match=r"\(T\).*must be 7, got 6"):
        full_softmax_cross_entropy(sequence, vectors, target[:-1], max_elements=max_elements)


def contrast(B=5, N=9, seed=0):
    "Logits with 1, 2, 3, ... positives a row and some false negatives among the rest."
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, N, generator=generator, dtype=torch.float64)
    rank = torch.rand(B, N, generator=generator).argsort(1)
    is_positive = rank < torch.arange(1, B + 1)[:, None]
    return logits, is_positive, (rank > N - 3) & (torch.arange(B)[:, None] != 1)  # row 1 has no false negatives


def slow_info_nce(logits, is_positive, left_out=None, legacy=False):
    "The formula, exponential by exponential."
    total = 0.0
    for b in range(len(logits)):
        above = below = 0.0
        for n in range(logits.shape[1]):
            if left_out is not None and left_out[b, n]:
                if legacy: below += 1.0
                continue
            e = math.exp(float(logits[b, n]))
            below += e
            if is_positive[b, n]: above += e
        total -= math.log(above / below)
    return total / len(logits)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("removed", [False, True])
def test_info_nce_equals_loops(removed, legacy):
    logits, is_positive, false_negatives = contrast()
    assert is_positive.sum(1).tolist() == [1, 2, 3, 4, 5] and false_negatives.sum(1).tolist() == [2, 0, 2, 2, 2]
    assert not (is_positive & false_negatives).any()
    left_out = false_negatives if removed else None
    loss = info_nce(logits, is_positive, left_out, legacy)
    assert loss.ndim == 0 and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(slow_info_nce(logits, is_positive, left_out, legacy), abs=1e-9)


def test_false_negatives_are_removed_or_count_exactly_one():
    logits, is_positive, false_negatives = contrast()
    row = lambda **options: info_nce(logits[:1], is_positive[:1], **options).exp().item()  # denominator / numerator
    above = logits[0][is_positive[0]].exp().sum().item()
    removed, legacy = (row(false_negative_mask=false_negatives[:1], legacy_false_negatives=flag) for flag in (False, True))
    assert (legacy - removed) * above == pytest.approx(2, abs=1e-9)
    assert removed == pytest.approx(logits[0][~false_negatives[0]].exp().sum().item() / above, abs=1e-9)
    for flag in (False, True):  # what stands there does not matter, however large
        other = logits.masked_fill(false_negatives, 300.0)
        assert info_nce(other, is_positive, false_negatives, flag) == info_nce(logits, is_positive, false_negatives, flag)
    assert info_nce(logits, is_positive).item() != pytest.approx(info_nce(logits, is_positive, false_negatives).item(), abs=1e-3)


@pytest.mark.parametrize("legacy", [False, True])
def test_info_nce_gradients(legacy):
    "Softmax over all minus softmax over the positives; exactly nothing where a logit was removed."
    logits, is_positive, false_negatives = contrast()
    logits.requires_grad_()
    (2 * info_nce(logits, is_positive, false_negatives, legacy)).backward()
    z = np.where(false_negatives, 0.0 if legacy else -np.inf, logits.detach().numpy())
    p, right = np.exp(z), np.exp(z) * is_positive.numpy()
    expected = 2 * (p / p.sum(1, keepdims=True) - right / right.sum(1, keepdims=True)) / len(z)
    expected[false_negatives.numpy()] = 0
    np.testing.assert_allclose(logits.grad, expected, **CLOSE)
    assert (logits.grad[false_negatives] == 0).all() and (logits.grad[~false_negatives] != 0).all()
    assert torch.autograd.gradcheck(lambda z: info_nce(z, is_positive, false_negatives, legacy), (logits,))


def test_info_nce_with_one_positive_is_cross_entropy():
    logits, _, _ = contrast(B=6, N=6)
    expected = F.cross_entropy(logits, torch.arange(6))
    torch.testing.assert_close(info_nce(logits, torch.eye(6, dtype=torch.bool)), expected, **CLOSE)


def test_info_nce_of_nothing_known_and_of_everything_right():
    even, is_positive = torch.full((4, 10), 7.0, dtype=torch.float64), torch.arange(10).expand(4, 10) < 3
    assert info_nce(even, is_positive).item() == pytest.approx(math.log(10 / 3), abs=1e-9)
    logits, _, _ = contrast()
    assert info_nce(logits, torch.ones(5, 9, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("legacy", [False, True])
def test_info_nce_of_huge_logits_is_finite(legacy, dtype):
    "Cosines of 1 and -1 over a temperature of 0.01: an exponential overflows 32 bits, a logsumexp does not."
    assert torch.tensor(1 / .01).exp().isinf()
    diagonal = torch.eye(4, dtype=torch.bool)
    for sign in (1, -1):
        logits = torch.where(diagonal, sign, -sign).div(.01).to(dtype).requires_grad_()
        false_negatives = same_target_mask(torch.tensor([1, 2, 1, 3]))
        loss = info_nce(logits, diagonal, false_negatives, legacy)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        assert loss.item() == pytest.approx(0 if sign == 1 else 200 + (2 * math.log(2) + 2 * math.log(3)) / 4, abs=1e-4)


def test_info_nce_of_sixteen_bits_is_computed_in_thirty_two():
    logits, is_positive, false_negatives = contrast(B=8, N=40)
    narrow = logits.bfloat16().requires_grad_()
    loss = info_nce(narrow, is_positive, false_negatives)
    assert loss.dtype == torch.float32
    expected = info_nce(narrow.detach().double(), is_positive, false_negatives)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)  # 16 bits would be off by about 0.01
    loss.backward()
    assert narrow.grad.dtype == torch.bfloat16 and narrow.grad.isfinite().all()


def test_same_target_mask_equals_loops():
    pos_item = torch.tensor([5, 3, 5, 9, 3, 5])
    found = same_target_mask(pos_item)
    slow = [[a != b and pos_item[a] == pos_item[b] for b in range(6)] for a in range(6)]
    assert found.dtype == torch.bool and found.tolist() == slow and found.sum() == 6 + 2
    assert not same_target_mask(torch.arange(4)).any()
    assert torch.equal(same_target_mask(torch.full((3,), 7)), ~torch.eye(3, dtype=torch.bool))


# Sampled softmax and gBCE

def sample(T=5, n=7, seed=0):
    "Logits, which negatives are the right item, and the log of how often each is expected."
    generator = torch.Generator().manual_seed(seed)
    positive, negatives = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((T,), (T, n)))
    log_q = torch.randn(n, generator=generator, dtype=torch.float64)
    return positive, negatives, torch.rand(T, n, generator=generator) < .3, log_q


def slow_sampled_softmax(positive, negatives, is_right, log_q):
    "The formula, exponential by exponential."
    total = 0.
    for t in range(len(positive)):
        above = below = math.exp(positive[t])
        for j in range(negatives.shape[1]):
            if not is_right[t, j]: below += math.exp(negatives[t, j]) / math.exp(log_q[j])
        total -= math.log(above / below)
    return total / len(positive)


def slow_gbce(positive, negatives, is_right, n_items, t):
    "The formula with probabilities and a power."
    n, total = negatives.shape[1], 0.
    alpha = n / (n_items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    sigmoid = lambda z: 1 / (1 + math.exp(-z))
    for row in range(len(positive)):
        total += math.log(sigmoid(positive[row]) ** beta)
        total += sum(math.log(1 - sigmoid(negatives[row, j])) for j in range(n) if not is_right[row, j])
    return -total / (n + 1) / len(positive)


def test_sampled_softmax_equals_loops():
    positive, negatives, is_right, log_q = sample()
    assert is_right.any() and not is_right.all(1).any()
    found = sampled_softmax(positive, negatives, is_right, log_q)
    assert found.ndim == 0 and found.dtype == torch.float64
    assert found.item() == pytest.approx(slow_sampled_softmax(positive, negatives, is_right, log_q), abs=1e-12)
    nothing, none = torch.zeros(7), torch.zeros(5, 7, dtype=torch.bool)
    assert sampled_softmax(positive, negatives).item() == pytest.approx(
        slow_sampled_softmax(positive, negatives, none, nothing), abs=1e-12)
    assert torch.equal(sampled_softmax(positive, negatives, log_q=log_q), sampled_softmax(positive, negatives, log_q=log_q.expand(5, 7)))


@pytest.mark.parametrize("t", [0., .4, .75, 1.])
def test_gbce_equals_loops(t):
    positive, negatives, is_right, _ = sample()
    found = gbce(positive, negatives, 60, t, is_right)
    assert found.ndim == 0 and found.dtype == torch.float64
    assert found.item() == pytest.approx(slow_gbce(positive, negatives, is_right, 60, t), abs=1e-12)
    for n_items in (3, 8):  # more are drawn than there are others, and as many
        assert gbce(positive, negatives, n_items, t, is_right).item() == pytest.approx(
            slow_gbce(positive, negatives, is_right, n_items, t), abs=1e-12)


def test_gbce_without_calibration_is_binary_cross_entropy():
    positive, negatives, _, _ = sample()
    logits = torch.cat([positive[:, None], negatives], 1)
    labels = F.one_hot(torch.zeros(5, dtype=torch.long), 8).double()
    for n_items in (8, 100, 10**6):
        torch.testing.assert_close(gbce(positive, negatives, n_items, 0.), F.binary_cross_entropy_with_logits(logits, labels), **CLOSE)


def test_gradients_against_a_sample():
    positive, negatives, is_right, log_q = sample()
    inputs = positive.requires_grad_(), negatives.requires_grad_()
    for loss in (lambda u, v: sampled_softmax(u, v, is_right, log_q), lambda u, v: gbce(u, v, 60, .75, is_right)):
        assert torch.autograd.gradcheck(loss, inputs)
        of_positive, of_negatives = torch.autograd.grad(loss(*inputs), inputs)
        assert (of_positive < 0).all() and (of_negatives[~is_right] > 0).all() and not of_negatives[is_right].any()


def test_sampled_softmax_of_everything_is_the_softmax():
    logits, target = torch.randn(6, 9, dtype=torch.float64), torch.tensor([0, 8, 3, 3, 1, 5])
    right, is_right = logits[torch.arange(6), target], F.one_hot(target, 9).bool()
    torch.testing.assert_close(sampled_softmax(right, logits, is_right), F.cross_entropy(logits, target), **CLOSE)


def test_the_correction_makes_the_expected_sum_that_of_the_catalogue():
    "All samples of two among four items, each with its probability; item 1 is right, in a second count it may be drawn."
    z, q = torch.tensor([.3, -1., 2., .5], dtype=torch.float64), torch.tensor([.1, .4, .3, .2], dtype=torch.float64)
    drawn = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    share = q[drawn].prod(1)
    for is_right, others in ((None, z.exp().sum()), (drawn == 1, z[[0, 2, 3]].exp().sum())):
        losses = torch.stack([sampled_softmax(z[1:2], z[pair][None], None if is_right is None else is_right[row:row + 1],
                                              (2 * q[pair]).log()[None]) for row, pair in enumerate(drawn)])
        sums = (losses + z[1]).exp() - z[1].exp()
        assert (share * sums).sum().item() == pytest.approx(others.item(), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_calibrated_gbce_is_least_at_the_true_probabilities(n):
    "Every right item with its probability beside every sample of others: the gradient vanishes at t = 1, not at t = 0."
    p = torch.tensor([.5, .3, .15, .05], dtype=torch.float64)
    rows = [(right, sample) for right in range(4) for sample in np.ndindex(*[4] * n) if right not in sample]
    target, others = torch.tensor([right for right, _ in rows]), torch.tensor([sample for _, sample in rows])
    for t in (0., 1.):
        z = (p / (1 - p)).log().requires_grad_()
        each = torch.stack([gbce(z[a:a + 1], z[b][None], 4, t) for a, b in zip(target, others)])
        gradient, = torch.autograd.grad((p[target] * each).sum() / 3**n, z)
        assert (gradient.abs().max() < 1e-12) == (t == 1)
        if t == 0: assert (gradient < 0).all(), "plain binary cross-entropy wants more than the truth"


@pytest.mark.parametrize("loss", [sampled_softmax, lambda u, v, hits: gbce(u, v, 50, .75, hits)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_logits_against_a_sample_are_finite(loss, dtype):
    for sign in (1, -1):
        positive, negatives = (torch.full(shape, sign * way * 150.).to(dtype).requires_grad_() for shape, way in (((3,), 1), ((3, 4), -1)))
        found = loss(positive, negatives, torch.eye(3, 4, dtype=torch.bool))
        found.backward()
        assert found.dtype == torch.float32 and found.isfinite() and (found < 1e-4) == (sign == 1)
        assert positive.grad.isfinite().all() and negatives.grad.isfinite().all()


@pytest.mark.parametrize("T, G", [(1, 1), (7, 1), (7, 7), (8, 2), (9, 2), (9, 4), (17, 3)])
def test_grouped_scores_equal_loops(T, G):
    generator = torch.Generator().manual_seed(T)
    u, c = (torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((T, 2, 3), (G, 4, 2, 3)))
    rows = math.ceil(T / G)
    slow = torch.stack([torch.stack([(u[t] * c[t // rows, j]).sum() for j in range(4)]) for t in range(T)])
    found = grouped_scores(u, c)
    torch.testing.assert_close(found, slow, **CLOSE)
    weight = torch.randn(T, 4, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (u, c)) for x in (found, slow))): torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("rows_together, n_groups", [(8, 3), (1, 19), (5, 4), (100, 1)])
def test_negatives_are_drawn_evenly_and_shared_in_groups(rows_together, n_groups):
    set_seed(0)
    pos_item, counts = torch.arange(19) % 6 + 1, torch.zeros(7)
    for _ in range(300):
        ids, is_right, n_known = draw_negatives(pos_item, 6, 10, None, rows_together)
        counts += ids.flatten().bincount(minlength=7)
    assert ids.shape == (n_groups, 10) and is_right.shape == (19, 10) and n_known == 6 and counts[0] == 0
    assert (counts[1:] / counts.sum() - 1 / 6).abs().max() < 4 * (5 / 36 / counts.sum()) ** .5
    rows = math.ceil(19 / n_groups)
    for t in range(19): assert is_right[t].equal(ids[t // rows] == pos_item[t])
    set_seed(5)
    again = [draw_negatives(pos_item, 6, 10)[0] for _ in range(2)]
    set_seed(5)
    assert draw_negatives(pos_item, 6, 10)[0].equal(again[0]) and not again[0].equal(again[1])


@pytest.mark.parametrize("T, n", [(0, 5), (3, 0), (3, -1)])
def test_nothing_to_draw_is_an_error(T, n):
    with pytest.raises(ValueError, match=f"{T} targets and n_negatives {n}: both must be at least 1"):
        draw_negatives(torch.ones(T, dtype=torch.long), 9, n)


def slow_diversity(interests, pad):
    "Pair after pair."
    total = 0.
    for xi, absent in zip(interests, pad):
        real = [x for x, gone in zip(xi, absent) if not gone]
        pairs = [(a, b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j]
        cosines = [sum(a * b) / (sum(a * a) ** .5 * sum(b * b) ** .5) for a, b in pairs]
        total += sum(c * c for c in cosines) / max(len(pairs), 1)
    return total / len(interests)


def some_interests():
    interests = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return interests, torch.arange(4) >= torch.tensor([4, 3, 2, 1, 0])[:, None]


def test_diversity_equals_loops():
    interests, pad = some_interests()
    found = interest_diversity(interests, pad)
    assert found.ndim == 0 and found.item() == pytest.approx(slow_diversity(interests.numpy(), pad.numpy()), abs=1e-9)
    released = sum(((1 - absent.double().mean()) * xi.sum(0)).square().sum() for xi, absent in zip(interests, pad)) / 3
    torch.testing.assert_close(interest_diversity(interests, pad, released=True), released, rtol=0, atol=1e-9)


def test_gradients_of_diversity():
    "Finite differences; what is padding, and a user with one interest, gets none."
    interests, pad = some_interests()
    for released in (False, True):
        assert torch.autograd.gradcheck(lambda x: interest_diversity(x, pad, released), interests.clone().requires_grad_())
    leaf = interests.clone().requires_grad_()
    interest_diversity(leaf, pad).backward()
    assert leaf.grad[~pad][:9].abs().sum(1).gt(1e-6).all() and not leaf.grad[pad].any() and not leaf.grad[3].any()


def test_diversity_knows_directions_only():
    interests, pad = some_interests()
    expected = interest_diversity(interests, pad)
    lengths = torch.rand(5, 4, 1, dtype=torch.float64) + .5
    torch.testing.assert_close(interest_diversity(interests * lengths, pad), expected)
    filled = interests.masked_fill(pad[..., None], torch.nan)
    torch.testing.assert_close(interest_diversity(filled, pad), expected)
    torch.testing.assert_close(interest_diversity(F.pad(interests, (0, 0, 0, 3)), F.pad(pad, (0, 3), value=True)), expected)
    torch.testing.assert_close(interest_diversity(interests.repeat(3, 1, 1), pad.repeat(3, 1)), expected)
    torch.testing.assert_close(interest_diversity(torch.eye(4).expand(2, 4, 4), torch.zeros(2, 4, dtype=torch.bool)), torch.zeros(()))
    torch.testing.assert_close(interest_diversity(torch.ones(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool)), torch.ones(()))


def test_diversity_of_nothing_and_of_zeros_is_finite():
    for interests in (torch.zeros(2, 3, 4), torch.randn(2, 3, 4, dtype=torch.bfloat16)):
        for released in (False, True):
            for pad in (torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
                leaf = interests.clone().requires_grad_()
                loss = interest_diversity(leaf, pad, released)
                loss.backward()
                assert loss.dtype == torch.float32 and loss.isfinite() and leaf.grad.isfinite().all()
    with pytest.raises(ValueError): interest_diversity(torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.bool))


# A sample of the catalogue

def test_weighted_candidates_equal_loops_with_all_gradients():
    sequence, vectors, target = problem()
    log_weight = torch.rand(11, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    weight, total = log_weight.exp().tolist(), 0.
    for row, wanted in zip(slow_scores(sequence, vectors), target.tolist()):
        shares = [w * math.exp(s / .3) for w, s in zip(weight, row)]
        total -= math.log(shares[wanted] / sum(shares)) / len(target)
    u, c = sequence.numpy(), vectors.numpy()
    p = np.exp(np.einsum("tsd,nsd->tn", u, c) / .3 + log_weight.numpy())
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(p)), target.numpy()] -= 1
    by_formula = np.einsum("tn,nsd->tsd", p, c) / .3 / len(p), np.einsum("tn,tsd->nsd", p, u) / .3 / len(p)
    for max_elements in (11, 25, 1 << 25):
        a, b = sequence.clone().requires_grad_(), vectors.clone().requires_grad_()
        loss = full_softmax_cross_entropy(a, b, target, .3, max_elements=max_elements, log_weight=log_weight)
        loss.backward()
        assert loss.item() == pytest.approx(total, abs=1e-9)
        for found, wanted in zip((a.grad, b.grad), by_formula): np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("n_drawn", [None, 4, 11, 50])
def test_the_items_of_a_step_are_found_where_it_says(n_drawn):
    torch.manual_seed(0)
    item_seq, pos_item = torch.tensor([[3, 7, 3], [9, 0, 0]]), torch.tensor([7, 2, 7, 12])
    step = items_of_step(item_seq, pos_item, 12, n_drawn)
    assert step.ids.tolist() == sorted(set(step.ids.tolist())) and step.ids.max() <= 12
    assert torch.equal(step.ids[step.place], item_seq)
    chosen = step.candidates(step.ids[:, None]).squeeze(1)
    assert torch.equal(chosen[step.target], pos_item) and 0 not in chosen and len(chosen.unique()) == len(chosen)
    assert len(chosen) == (12 if n_drawn in (None, 11, 50) else 3 + 4)
    if n_drawn == 4: assert set(step.ids.tolist()) == {0, 3, 7, 9} | set(chosen.tolist())
    else: assert step.log_weight is None or step.log_weight.abs().max() == 0


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="n_drawn .n_candidates of a model. must be at least 1, got 0"):
        items_of_step(torch.tensor([[1]]), torch.tensor([2]), 5, 0)


def test_the_sampled_sum_is_right_on_average_and_the_loss_nearly():
    torch.manual_seed(0)
    sequence, vectors, _ = problem(T=3, N=40)
    vectors = vectors * .4
    target, sums, losses = torch.tensor([4, 4, 9]), [], []
    scores = dot_score(sequence, vectors)
    for _ in range(4000):
        step = items_of_step(torch.tensor([[1]]), target + 1, 40, 10)
        chosen = step.candidates(step.ids[:, None])[:, 0] - 1
        sums.append((scores[:, chosen] + step.log_weight).exp().sum(1))
        losses.append(full_softmax_cross_entropy(sequence, vectors[chosen], step.target, log_weight=step.log_weight))
    sums, losses = torch.stack(sums), torch.stack(losses)
    assert ((sums.mean(0) - scores.exp().sum(1)).abs() < 4 * sums.std(0) / 4000 ** .5).all()
    whole = full_softmax_cross_entropy(sequence, vectors, target)
    assert whole - .15 < losses.mean() < whole, "the logarithm of a mean is above the mean of logarithms"
