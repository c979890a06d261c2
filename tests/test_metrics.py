"""Metrics against sorting, loops, enumeration and SciPy, to 1e-6 and better in float64."""
import itertools
import math

import numpy as np
import pytest
import torch

import mmseqrec.metrics as m
from pages import page_functions

page = page_functions("metrics")

CLOSE = dict(rtol=0, atol=1e-9)


def sorted_places(scores, target):
    "List the target's place under every order of the items, by a stable sort."
    places = []
    for order in itertools.permutations(range(len(scores))):
        places.append(1 + sorted(order, key=lambda j: -scores[j]).index(target))
    return places


@pytest.mark.parametrize("seed", range(60))
def test_ranks_equal_enumeration_of_tie_breaks(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, rng.integers(1, 7)).tolist()
    target = int(rng.integers(len(scores)))
    places = sorted_places(scores, target)
    tensor, index = torch.tensor([scores], dtype=torch.float32), torch.tensor([target])
    assert m.rank_of_target(tensor, index, "mean").item() == pytest.approx(np.mean(places), abs=1e-12)
    assert m.rank_of_target(tensor, index, "best").item() == min(places)
    assert m.rank_of_target(tensor, index, "worst").item() == max(places)


@pytest.mark.parametrize("seed", range(60))
def test_chunks_add_up(seed):
    rng = np.random.default_rng(seed)
    n_items, chunk, levels = rng.integers(1, [41, 51, 10])
    scores = torch.from_numpy(rng.integers(0, levels, (7, n_items)).astype(np.float32))
    target = torch.from_numpy(rng.integers(0, n_items, 7))
    target_scores = scores[torch.arange(7), target]
    total = torch.zeros(2, 7, dtype=torch.int64)
    for start in range(0, n_items, chunk):
        part = scores[:, start:start + chunk]
        column = torch.where((target >= start) & (target < start + part.shape[1]), target - start, -1)
        total += torch.stack(m.count_better(part, target_scores, column))
    for row in range(7):
        others = [s for j, s in enumerate(scores[row].tolist()) if j != target[row]]
        assert total[0, row] == sum(s > target_scores[row].item() for s in others)
        assert total[1, row] == sum(s == target_scores[row].item() for s in others)
    assert torch.equal(m.ranks_from_counts(*total), m.rank_of_target(scores, target))


def test_count_better_without_the_target_and_with_rounding():
    scores = torch.tensor([[.1, .5, .5]])
    assert [c.item() for c in m.count_better(scores, torch.tensor([.5]))] == [0, 2]
    # a target score that was computed elsewhere and differs in the last bits is not counted against itself
    for off in (-1e-6, 1e-6):
        greater, ties = m.count_better(torch.tensor([[.1, .5, .2]]), torch.tensor([.5 + off]), torch.tensor([1]))
        assert (greater.item(), ties.item()) == (0, 0)
    assert [c.tolist() for c in m.count_better(torch.zeros(2, 0), torch.zeros(2))] == [[0, 0], [0, 0]]
    infinite = torch.tensor([[-math.inf, 1., -math.inf, 0.]])  # masked items tie with each other
    assert m.rank_of_target(infinite, torch.tensor([0])).item() == 3.5


def test_nan_and_bad_arguments_are_errors():
    good = torch.tensor([[.1, .2], [.3, .4]])
    bad = torch.tensor([[.1, .2], [.3, math.nan]])
    for column in (0, 1):
        with pytest.raises(ValueError, match="query 1 hold NaN"): m.rank_of_target(bad, torch.tensor([0, column]))
    with pytest.raises(ValueError, match="NaN"): m.count_better(good, torch.tensor([.1, math.nan]))
    with pytest.raises(ValueError, match="ties_rule must be one of mean, best, worst, got 'random'"):
        m.rank_of_target(good, torch.tensor([0, 0]), "random")
    with pytest.raises(ValueError, match=r"axis 0 \(T\)"): m.count_better(good, torch.zeros(3))
    with pytest.raises(ValueError, match="no ranks"): page.metric_table(torch.zeros(0))
    with pytest.raises(ValueError, match="no values"): m.bootstrap_interval([])
    with pytest.raises(ValueError, match="got 3 and 4"): m.paired_test(np.zeros(3), np.zeros(4))


def slow_list_metrics(ranked, relevant, k):
    "Compute the metrics of one list with plain loops."
    ranked, relevant = ranked[:k], set(relevant)
    hits = [item in relevant for item in ranked]
    precisions = [sum(hits[:j + 1]) / (j + 1) for j in range(len(hits)) if hits[j]]
    dcg = sum(1 / math.log2(j + 2) for j, hit in enumerate(hits) if hit)
    ideal = sum(1 / math.log2(j + 2) for j in range(min(k, len(relevant))))
    return {"recall": sum(hits) / len(relevant), "hit": float(any(hits)), "precision": sum(hits) / k,
            "map": sum(precisions) / min(k, len(relevant)), "ndcg": dcg / ideal}


@pytest.mark.parametrize("k", [1, 3, 10, 20])
def test_rank_metrics_equal_slow_lists(k):
    rng = np.random.default_rng(k)
    scores = torch.from_numpy(rng.standard_normal((50, 20)))
    target = torch.from_numpy(rng.integers(0, 20, 50))
    ranks = m.rank_of_target(scores, target)
    functions = {"recall": m.recall_at_k, "hit": m.recall_at_k, "precision": m.precision_at_k, "map": m.map_at_k,
                 "ndcg": m.ndcg_at_k}
    for row in range(50):
        ranked = sorted(range(20), key=lambda j: -scores[row, j].item())
        assert ranks[row] == 1 + ranked.index(target[row])
        expected = slow_list_metrics(ranked, [target[row].item()], k)
        for name, function in functions.items():
            value = function(ranks, k)
            assert value.dtype == torch.float64 and value[row].item() == pytest.approx(expected[name], abs=1e-12)
        assert m.mrr(ranks)[row].item() == pytest.approx(1 / (1 + ranked.index(target[row])), abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_list_metrics_equal_loops(seed):
    rng = np.random.default_rng(seed)
    k, n_relevant = rng.integers(1, [13, 16]).tolist()
    ranked = [rng.permutation(20).tolist() for _ in range(4)]
    relevant = [rng.choice(20, n_relevant, replace=False).tolist() for _ in range(4)]
    hits = torch.tensor([[item in wanted for item in items[:k]] for items, wanted in zip(ranked, relevant)])
    values = page.list_metrics(hits, torch.full((4,), n_relevant))
    for row in range(4):
        for name, expected in slow_list_metrics(ranked[row], relevant[row], k).items():
            assert values[name][row].item() == pytest.approx(expected, abs=1e-12), name


def test_metric_table():
    ranks = torch.tensor([1., 4., 10.5, 60.])
    table = page.metric_table(ranks)
    assert list(table) == ["recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20", "ndcg@20", "recall@50", "ndcg@50",
                           "mrr"]
    assert table["recall@10"] == .5 and table["recall@20"] == .75
    assert table["ndcg@20"] == pytest.approx((1 + 1 / math.log2(5) + 1 / math.log2(11.5)) / 4, abs=1e-12)
    assert table["mrr"] == pytest.approx((1 + 1 / 4 + 1 / 10.5 + 1 / 60) / 4, abs=1e-12)
    assert page.metric_table(torch.tensor([1, 2])) == page.metric_table(torch.tensor([1., 2.], dtype=torch.float64))


def test_float32_ranks_lose_nothing():
    "A million ranks of one third each: a float32 sum would be off in the fourth digit."
    ranks = torch.full((1_000_000,), 3)
    assert page.metric_table(ranks)["mrr"] == pytest.approx(1 / 3, abs=1e-12)


def test_coverage_and_novelty():
    lists, counts = torch.tensor([[1, 2], [2, 4], [4, 0]]), np.array([9, 3, 0, 5, 2])
    assert m.coverage_at_k(lists, 5) == 3 / 5
    share = {item: (counts[item] + 1) / (counts[1:].sum() + 4) for item in range(1, 5)}
    expected = np.mean([-math.log2(share[item]) for row in lists.tolist() for item in row if item])
    assert m.novelty(lists, counts) == pytest.approx(expected, abs=1e-12)
    assert m.novelty(lists, torch.from_numpy(counts)) == m.novelty(lists, counts)
    assert math.isfinite(m.novelty(torch.tensor([[2]]), counts))  # an item that was never taken


def test_bootstrap_equals_a_loop_over_one_matrix_of_draws():
    values = np.random.default_rng(0).random(37)
    whole = m.bootstrap_interval(values, n=200, seed=3)
    assert whole == m.bootstrap_interval(torch.from_numpy(values), n=200, seed=3)
    assert whole != m.bootstrap_interval(values, n=200, seed=4)
    rng = np.random.default_rng(m.derive_seed(3, "bootstrap"))
    indices = rng.integers(0, 37, (200, 37))
    means = [sum(values[i] for i in row) / 37 for row in indices]
    np.testing.assert_allclose(whole, np.quantile(means, [.025, .975]), **CLOSE)
    low, high = m.bootstrap_interval(values, n=200, seed=3, level=.5)
    assert whole[0] < low < values.mean() < high < whole[1]


def test_many_users_are_resampled_block_by_block():
    values = np.random.default_rng(1).random((1 << 22) // 100 + 1)  # a block holds fewer resamples than are asked for
    blocks = list(m._draw_resamples(150, len(values), 5))
    assert len(blocks) > 1 and sum(map(len, blocks)) == 150 and all(block.size <= 1 << 22 for block in blocks)
    whole = np.random.default_rng(m.derive_seed(5, "bootstrap")).integers(0, len(values), (150, len(values)))
    assert np.array_equal(np.concatenate(blocks), whole)
    expected = np.quantile([values[row].mean() for row in whole], [.025, .975])
    np.testing.assert_allclose(m.bootstrap_interval(values, n=150, seed=5), expected, **CLOSE)


def test_bootstrap_covers_the_true_mean():
    "About 95 of 100 intervals hold the true mean; fewer than 88 would be rarer than one in a thousand."
    rng = np.random.default_rng(1)
    hits = sum(low <= .3 <= high for low, high in (m.bootstrap_interval(rng.random(400) < .3, n=400, seed=s)
                                                    for s in range(100)))
    assert hits >= 88


def test_student_factor_equals_tables_and_scipy():
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %, 1 to 10 degrees of freedom
    for n, factor in enumerate(table, 2): assert m.student_factor(n) == pytest.approx(factor, abs=5e-4)
    stats = pytest.importorskip("scipy.stats")
    for n in (2, 12, 30, 1000): assert m.student_factor(n, .9) == pytest.approx(stats.t.ppf(.95, n - 1), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 11, 12, 40])
def test_mean_interval_equals_scipy(n):
    stats, values = pytest.importorskip("scipy.stats"), np.random.default_rng(n).standard_normal(n) + 1
    for level in (.5, .95):
        expected = stats.ttest_1samp(values, 0).confidence_interval(level)
        np.testing.assert_allclose(m.mean_interval(values, level), expected, **CLOSE)
    assert m.mean_interval(torch.from_numpy(values)) == m.mean_interval(values.tolist())
    with pytest.raises(ValueError, match="two values or more; got 1"): m.mean_interval(values[:1])
    assert m.mean_interval([.25, .25, .25]) == (.25, .25)


def test_paired_test_equals_exact_enumeration():
    rng = np.random.default_rng(0)
    for shift in (0, .3, .8):
        a, b = rng.standard_normal(10) + shift, rng.standard_normal(10)
        b[:2] = a[:2]
        d = a - b
        flips = [abs(sum(s * x for s, x in zip(signs, d))) >= abs(d.sum()) - 1e-12
                 for signs in itertools.product([-1, 1], repeat=10)]
        result = m.paired_test(a, b, n=40_000)
        assert result["p_value"] == pytest.approx(np.mean(flips), abs=.012)
        assert result["difference"] == pytest.approx(d.mean(), abs=1e-12)
        assert (result["low"], result["high"]) == m.paired_interval(a, b)
        assert m.paired_test(b, a, n=40_000)["difference"] == -result["difference"]


def test_paired_test_of_equal_models():
    same = np.random.default_rng(0).random(50)
    assert m.paired_test(same, same) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_paired_test_is_calibrated():
    rng = np.random.default_rng(2)
    values = [m.paired_test(rng.random(60), rng.random(60), n=500)["p_value"] for _ in range(200)]
    assert .01 <= np.mean(np.array(values) <= .05) <= .10


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("n_items, n_negatives, k", [(2000, 100, 10), (50, 49, 10), (50, 5, 10), (12, 3, 1), (300, 99, 20)])
def test_expected_sampled_recall_equals_scipy(n_items, n_negatives, k, replacement):
    stats = pytest.importorskip("scipy.stats")
    ranks = np.arange(1, n_items + 1)
    if replacement: expected = stats.binom.cdf(k - 1, n_negatives, (ranks - 1) / (n_items - 1))
    else: expected = stats.hypergeom.cdf(k - 1, n_items - 1, ranks - 1, n_negatives)
    values = page.expected_sampled_recall(torch.from_numpy(ranks), n_items, n_negatives, k, replacement)
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-9)
    assert values[0].item() == pytest.approx(1, abs=1e-9) and (values.diff() <= 1e-9).all()


def test_expected_sampled_recall_by_counting_samples():
    "Five others of which two are better, three drawn: count all ten samples."
    samples = list(itertools.combinations([True, True, False, False, False], 3))
    for k in (1, 2, 3):
        expected = np.mean([sum(sample) <= k - 1 for sample in samples])
        assert page.expected_sampled_recall(torch.tensor([3]), 6, 3, k).item() == pytest.approx(expected, abs=1e-12)


def test_all_negatives_give_the_true_recall():
    ranks = torch.arange(1, 201)
    torch.testing.assert_close(page.expected_sampled_recall(ranks, 200, 199), m.recall_at_k(ranks, 10), **CLOSE)
    with pytest.raises(ValueError, match="cannot draw 200 different negatives from 199"):
        page.expected_sampled_recall(ranks, 200, 200)
    with pytest.raises(ValueError, match=r"whole numbers in 1..200"):
        page.expected_sampled_recall(torch.tensor([1.5]), 200, 20)


def test_figures():
    import matplotlib.pyplot as plt
    ranks = torch.randint(1, 101, (50,), generator=torch.Generator().manual_seed(0))
    assert len(page.plot_gains().lines) == 3
    assert len(page.plot_sampled_recall(100, (20,)).lines) == 2
    assert len(page.plot_sampled_models({"a": ranks, "b": ranks}, 100).lines) == 2
    assert len(page.plot_intervals({"a": ranks, "b": ranks}).lines) == 4
    plt.close("all")
