"Interests against NumPy loops; equal tokens, missing tokens and held-out items; memory, seeds and precision."
import copy
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score
from torch.overrides import TorchFunctionMode

from mmseqrec.blocks import interests
from mmseqrec.blocks.interests import (Interests, InterestTables, _distinct, _draw_centers, _fill_empty,
                                       _mean_of_clusters, _nearest, _nearest_again, assign_interests, cluster_dpc_knn,
                                       cluster_kmeans, count_interests, density_peaks, discover_interests,
                                       interest_sets, plot_interests)
from pages import page_functions

of_page = page_functions("blocks.interests")
plot_clusters, plot_decision_graph = of_page.plot_clusters, of_page.plot_decision_graph

METHODS = {"kmeans": cluster_kmeans, "dpc_knn": cluster_dpc_knn}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_name = pytest.mark.parametrize("name", METHODS)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def groups(n_groups, size, D=8, spread=5, seed=0):
    label = torch.arange(n_groups).repeat_interleave(size)
    return spread * random(n_groups, D, seed=seed)[label] + random(len(label), D, seed=seed + 1), label


def slow_distances(a, b): return np.array([[((x - y) ** 2).sum() for y in b] for x in a])


class Calls(TorchFunctionMode):
    "Count calls of PyTorch and remember the size of the largest tensor that one returned."
    n, largest = 0, 0
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.n += 1
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor): self.largest = max(self.largest, x.numel())
        return result


def test_count_interests():
    assert [count_interests(n, r) for n, r in ((10, .5), (11, .5), (1, .02), (894_000, .02), (7, 1))] == [5, 6, 1, 17880, 7]
    for ratio in (0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="ratio"): count_interests(10, ratio)


# Nearest centres

def test_nearest_equals_a_loop_in_blocks_of_any_size():
    tokens, centers = random(23, 4), random(7, 4, seed=1)
    slow = slow_distances(tokens.numpy(), centers.numpy())
    for block in (None, 1, 7, 50, 10_000):
        place, distance = _nearest(tokens, centers, block)
        assert place.tolist() == slow.argmin(1).tolist()
        np.testing.assert_allclose(distance, slow.min(1), rtol=1e-9)


def test_nearest_takes_the_first_of_equals():
    grid = torch.cartesian_prod(torch.arange(4.), torch.arange(4.))
    centers = torch.tensor([[1.5, 1.5], [1.5, 1.5], [9., 9.], [1.5, 1.5]])
    assert _nearest(grid, centers)[0].unique().tolist() == [0]


def test_nearest_is_right_far_from_the_origin():
    tokens, centers = random(200, 8, dtype=torch.float32), random(20, 8, seed=1, dtype=torch.float32)
    assert torch.equal(_nearest(tokens + 4096, centers + 4096)[0],
                       torch.cdist((tokens + 4096).double(), (centers + 4096).double()).argmin(1))


# Equal tokens

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distinct_finds_what_unique_finds(dtype):
    tokens = torch.randint(-1, 2, (300, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens[::3] *= -1  # zeros become negative zeros
    first, place = _distinct(tokens)
    slow = {}
    for row, token in enumerate(tokens.tolist()): slow.setdefault(tuple(x + 0.0 for x in token), row)
    assert first.tolist() == list(slow.values())
    assert [first[p].item() for p in place] == [slow[tuple(x + 0.0 for x in token)] for token in tokens.tolist()]


def test_distinct_tells_signs_and_permutations_apart():
    tokens = torch.cartesian_prod(*[torch.tensor([-1., 1.])] * 12)
    assert len(_distinct(tokens)[0]) == 4096
    assert len(_distinct(torch.eye(64))[0]) == 64


@each_method
def test_no_more_clusters_than_distinct_tokens(method):
    tokens = random(30, 3, dtype=torch.float32)
    tokens[10:20], tokens[20:] = 0, tokens[:10]
    for n_clusters in (11, 12, 30):
        centers, cluster = method(tokens, n_clusters)
        assert len(centers) == 11 and cluster.unique().tolist() == list(range(11))
        torch.testing.assert_close(centers[cluster], tokens)
        assert torch.equal(cluster[20:], cluster[:10])
    centers, cluster = method(torch.zeros(5, 3), 4)
    assert centers.tolist() == [[0, 0, 0]] and cluster.tolist() == [0] * 5


@each_method
@pytest.mark.parametrize("n_clusters", [1, 3, 20, 60, 99])
def test_no_cluster_is_empty_whatever_repeats(method, n_clusters):
    for seed in range(5):
        tokens = random(100, 2, seed=seed, dtype=torch.float32)
        tokens[::4], tokens[1::4] = 0, tokens[1]
        n_distinct = len(tokens.unique(dim=0))
        centers, cluster = method(tokens, n_clusters)
        assert centers.isfinite().all() and len(centers) == min(n_clusters, n_distinct)
        assert cluster.bincount(minlength=len(centers)).min() > 0


def hard_to_tell_apart():
    "Tokens whose distances of thousandths get lost between squares of thousands, in 32 bits."
    tokens = torch.cat([torch.arange(50.) * 1e-3, 1e4 + torch.arange(50.) * 1e-3])[:, None]
    assert (_nearest(tokens[1:50], tokens[[0, 50]])[1] == 0).any() and len(tokens.unique()) == 100
    return tokens


@each_method
@pytest.mark.parametrize("n_clusters", [50, 99, 100])
def test_no_cluster_is_empty_where_rounding_hides_distances(method, n_clusters):
    centers, cluster = method(hard_to_tell_apart(), n_clusters)
    assert cluster.unique().tolist() == list(range(n_clusters)) and centers.isfinite().all()


@each_method
def test_repeated_tokens_count_as_often_as_they_occur(method):
    tokens, label = groups(3, 10)
    repeated = torch.cat([tokens, tokens[:1].expand(15, -1)])
    centers, cluster = method(repeated, 3)
    assert adjusted_mutual_info_score(label, cluster[:30]) > .99 and (cluster[30:] == cluster[0]).all()
    for c in range(3): torch.testing.assert_close(centers[c], repeated[cluster == c].mean(0))


# k-means

def slow_kmeans(tokens, centers):
    cluster = slow_distances(tokens, centers).argmin(1)
    while True:
        centers = np.array([tokens[cluster == c].mean(0) for c in range(len(centers))])
        before, cluster = cluster, slow_distances(tokens, centers).argmin(1)
        if (cluster == before).all(): return centers, cluster


@pytest.mark.parametrize("n_clusters", [1, 4, 12])
def test_kmeans_equals_a_loop(n_clusters):
    tokens = random(60, 3)
    start = _draw_centers(tokens, torch.ones(60, dtype=torch.long), n_clusters, seed=3, block=None)[0]
    centers, cluster = slow_kmeans(tokens.numpy(), start.numpy())
    found = cluster_kmeans(tokens, n_clusters, seed=3)
    np.testing.assert_allclose(found[0], centers, rtol=1e-9)
    assert found[1].tolist() == cluster.tolist()


@pytest.mark.parametrize("n_clusters", [1, 5, 40, 150, 300])
def test_converged_kmeans_is_a_fixed_point(n_clusters):
    tokens = random(300, 5, dtype=torch.float32)
    centers, cluster = cluster_kmeans(tokens, n_clusters)
    slow = torch.cdist(tokens.double(), centers.double())
    torch.testing.assert_close(slow.gather(1, cluster[:, None])[:, 0], slow.amin(1), rtol=0, atol=1e-5)
    for c in range(n_clusters): torch.testing.assert_close(centers[c], tokens[cluster == c].mean(0))


def test_kmeans_goes_down_and_stops():
    tokens, history = random(400, 4), []
    centers, cluster = cluster_kmeans(tokens, 10, history=history)
    assert 2 < len(history) < 50 and all(b <= a + 1e-12 for a, b in zip(history, history[1:]))
    assert history[-1] == pytest.approx((tokens - centers[cluster]).square().sum(1).mean().item())
    short = []
    cluster_kmeans(tokens, 10, max_steps=2, history=short)
    assert short == history[:2]


@pytest.mark.parametrize("max_steps", [1, 2])
def test_kmeans_stopped_early_has_no_empty_cluster(max_steps):
    for seed in range(20):
        tokens = random(50, 2, seed=seed)
        centers, cluster = cluster_kmeans(tokens, 30, seed, max_steps=max_steps)
        assert cluster.unique().tolist() == list(range(30)) and centers.isfinite().all()


def test_empty_clusters_are_filled_from_the_farthest():
    tokens = torch.tensor([[0.], [1.], [8.], [9.5], [100.]])
    centers = torch.tensor([[0.], [50.], [60.], [90.]])
    cluster, distance = torch.tensor([0, 0, 0, 0, 3]), torch.tensor([0., 1., 64., 90.25, 100.])
    filled = _fill_empty(tokens, centers, cluster, distance)
    assert filled.tolist() == [0, 0, 2, 1, 3]  # 100 is alone in its cluster and stays
    assert centers.flatten().tolist() == [0, 9.5, 8, 90]


def test_filling_never_ends_with_an_empty_cluster():
    for seed in range(20):
        tokens, generator = random(12, 2, seed=seed), torch.Generator().manual_seed(seed)
        centers = random(12, 2, seed=seed + 1)
        cluster = torch.randint(3, (12,), generator=generator)
        filled = _fill_empty(tokens, centers, cluster, torch.rand(12, generator=generator).double())
        assert sorted(filled.tolist()) == list(range(12))


def test_means_count_tokens():
    tokens, cluster, counts = random(9, 2), torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1]), torch.arange(1, 10)
    slow = torch.stack([(tokens * counts[:, None])[cluster == c].sum(0) / counts[cluster == c].sum() for c in range(3)])
    torch.testing.assert_close(_mean_of_clusters(tokens, counts, cluster, 3), slow)


def test_draws_are_distinct_tokens_and_prefer_far_ones():
    tokens = torch.cat([.01 * random(97, 2), torch.tensor([[50., 0.], [0., 50.], [50., 50.]], dtype=torch.float64)])
    ones = torch.ones(100, dtype=torch.long)
    for seed in range(10):
        drawn = _draw_centers(tokens, ones, 100, seed, None)[0]
        assert len(drawn.unique(dim=0)) == 100
        assert (_draw_centers(tokens, ones, 8, seed, None)[0].norm(dim=1) > 10).sum() == 3


def test_draws_are_distinct_where_rounding_hides_distances():
    for seed in range(5):
        drawn = _draw_centers(hard_to_tell_apart(), torch.ones(100, dtype=torch.long), 100, seed, None)[0]
        assert len(drawn.unique()) == 100


def test_kmeans_finds_groups_that_are_apart():
    found = []
    for seed in range(5):
        tokens, label = groups(20, 30, D=16, seed=seed)
        found.append(adjusted_mutual_info_score(label, cluster_kmeans(tokens, 20, seed)[1]))
    assert np.mean(found) > .93


# Density peaks

def slow_peaks(tokens, k):
    d = np.sqrt(slow_distances(tokens, tokens) / tokens.shape[1])
    log_density = np.array([-np.sort(row)[:k].__pow__(2).mean() for row in d])
    delta = []
    for i in range(len(d)):
        denser = [j for j in range(len(d)) if log_density[j] > log_density[i]]
        delta.append(min(d[i, denser]) if denser else d.max())
    return log_density, np.array(delta), d


@pytest.mark.parametrize("n_neighbours", [None, 1, 4, 45])
def test_density_peaks_equal_loops_in_blocks_of_any_size(n_neighbours):
    tokens = random(45, 3)
    k = 5 if n_neighbours is None else n_neighbours
    log_density, delta, _ = slow_peaks(tokens.numpy(), k)
    for block in (None, 45, 200):
        found = density_peaks(tokens, n_neighbours, block)
        np.testing.assert_allclose(found[0], log_density, rtol=1e-9, atol=1e-12)
        if k > 1: np.testing.assert_allclose(found[1], delta, rtol=1e-9)


@pytest.mark.parametrize("n_clusters", [1, 5, 20, 45])
def test_dpc_knn_equals_loops(n_clusters):
    tokens = random(45, 3)
    log_density, delta, d = slow_peaks(tokens.numpy(), 5)
    peaks = sorted(range(45), key=lambda i: -(np.exp(log_density[i]) * delta[i]))[:n_clusters]
    cluster = d[:, peaks].argmin(1)
    for place, peak in enumerate(peaks): cluster[peak] = place
    for block in (None, 45, 200):
        centers, found = cluster_dpc_knn(tokens, n_clusters, block=block)
        assert found.tolist() == cluster.tolist()
        for c in range(n_clusters): torch.testing.assert_close(centers[c], tokens[found == c].mean(0))


def test_of_equally_dense_tokens_one_has_none_denser():
    ring = torch.arange(12) * 2 * math.pi / 12
    tokens = torch.stack([ring.cos(), ring.sin()], 1).double().round(decimals=12)
    log_density, delta = density_peaks(torch.tensor([[0.], [1.], [2.], [3.]]), n_neighbours=1)
    assert log_density.tolist() == [0] * 4 and delta.tolist() == [3, 1, 1, 1]
    centers, cluster = cluster_dpc_knn(tokens, 4)
    assert len(centers) == 4 and cluster.unique().tolist() == [0, 1, 2, 3]


def test_repeated_tokens_share_density_and_distance():
    tokens = random(20, 2)
    tokens[5:9] = tokens[0]
    log_density, delta = density_peaks(tokens, 3)
    assert (log_density[5:9] == log_density[0]).all() and (delta[5:9] == delta[0]).all() and delta[0] > 0
    assert log_density[0].abs() < 1e-12  # its three nearest tokens are itself, so often it occurs


def test_density_does_not_underflow():
    tokens = torch.cat([F.pad(64 * torch.eye(16), (0, 1), value=1024. * group) for group in range(4)])
    log_density, _ = density_peaks(tokens, 10)  # all are about equally far from their neighbours
    assert (log_density.exp() == 0).all() and log_density.isfinite().all()
    label = torch.arange(4).repeat_interleave(16)
    assert adjusted_mutual_info_score(label, cluster_dpc_knn(tokens, 4, 10)[1]) == pytest.approx(1)


def test_density_peaks_rejects_impossible_neighbours():
    for n_neighbours in (0, 6):
        with pytest.raises(ValueError, match="n_neighbours must be from 1 to 5"): density_peaks(random(5, 2), n_neighbours)


# All ways of clustering

@each_method
def test_global_random_state_is_untouched_and_seeds_decide(method):
    tokens = random(80, 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = method(tokens, 20)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = method(tokens, 20)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    if method is cluster_kmeans: assert not torch.equal(first[1], method(tokens, 20, seed=1)[1])


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_of_the_centers(method, dtype):
    tokens, label = groups(4, 20)
    centers, cluster = method(tokens.to(dtype).requires_grad_(), 4)
    assert centers.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not centers.requires_grad and cluster.dtype == torch.int64
    with torch.autocast("cpu", torch.bfloat16): inside = method(tokens.to(dtype), 4)
    assert torch.equal(inside[0], centers) and torch.equal(inside[1], cluster)


@each_method
def test_no_tensor_grows_with_the_square_of_the_tokens(method):
    for N in (500, 2000):
        with Calls() as calls: method(random(N, 8), N // 2, block=1 << 12)
        assert calls.largest <= max(1 << 12, 8 * N)
    with Calls() as calls: method(random(2200, 2), 2200 - 1)
    assert calls.largest <= 1 << 20 < 2200 ** 2


@each_method
def test_bad_tokens_are_named(method):
    tokens = random(6, 2)
    tokens[4, 1] = math.nan
    with pytest.raises(ValueError, match="token 4 .* not finite"): method(tokens, 2)
    for bad, n_clusters in ((random(0, 2), 1), (random(3, 2), 0)):
        with pytest.raises(ValueError, match="at least one token and one cluster"): method(bad, n_clusters)
    with pytest.raises(ValueError, match=r"expected 2 axes \[N, D\]"): method(random(3, 2, 2), 1)


@each_method
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu(method):
    tokens = random(500, 8)
    for n_clusters in (5, 250):
        here, there = method(tokens, n_clusters), method(tokens.cuda(), n_clusters)
        assert all(x.is_cuda for x in there) and torch.equal(here[1], there[1].cpu())
        torch.testing.assert_close(here[0], there[0].cpu())
        assert all(torch.equal(a, b) for a, b in zip(there, method(tokens.cuda(), n_clusters)))


# Interests of a catalogue

V, M, D = 30, 2, 4


def make_tokens(seed=0):
    tokens, missing = random(V + 1, M, D, seed=seed), torch.zeros(V + 1, M, dtype=torch.bool)
    missing[[3, 4, 5], [1, 0, 0]], missing[5, 1], missing[0] = True, True, True  # item 5 has nothing
    return tokens, missing


@each_name
def test_every_present_token_has_an_interest_and_no_other(name):
    tokens, missing = make_tokens()
    interests = discover_interests(tokens, missing, torch.arange(1, 21), ratio=.3, method=name)
    assert interests.vectors.shape == (1 + math.ceil(.3 * 36), D) and interests.vectors[0].tolist() == [0] * D
    assert interests.of_item.dtype == torch.int64 and torch.equal(interests.of_item == 0, missing)
    assert interests.of_item[1:21].unique().tolist() == list(range(len(interests.vectors)))
    there = ~missing
    there[:21] = False  # what did not train gets the nearest interest
    slow = slow_distances(tokens[there].numpy(), interests.vectors[1:].numpy()).argmin(1) + 1
    assert interests.of_item[there].tolist() == slow.tolist()


@pytest.mark.parametrize("ratio", [.1, .5, 1])
def test_assignment_reproduces_kmeans(ratio):
    for seed in range(5):
        tokens, missing = make_tokens(seed)
        tokens[7:12] = tokens[12:17].flip(1)
        interests = discover_interests(tokens.float(), missing, ratio=ratio, seed=seed)
        assert torch.equal(assign_interests(tokens.float(), missing, interests.vectors), interests.of_item)
        _, cluster = cluster_kmeans(tokens.float()[~missing], count_interests(int((~missing).sum()), ratio), seed)
        assert torch.equal(interests.of_item[~missing], cluster + 1)


def test_dpc_knn_keeps_the_members_of_a_peak():
    tokens, missing = make_tokens()
    interests = discover_interests(tokens, missing, ratio=.2, method="dpc_knn")
    centers, cluster = cluster_dpc_knn(tokens[~missing], 12)
    assert torch.equal(interests.vectors[1:], centers) and torch.equal(interests.of_item[~missing], cluster + 1)


@each_name
def test_held_out_items_leave_no_trace(name):
    tokens, missing = make_tokens()
    train = torch.arange(1, 21)
    first = discover_interests(tokens, missing, train, method=name)
    tokens[21:] = 1e3 * random(V - 20, M, D, seed=9)
    missing[25] = True
    second = discover_interests(tokens, missing, train.flip(0).repeat(2), method=name)
    assert torch.equal(first.vectors, second.vectors) and torch.equal(first.of_item[:21], second.of_item[:21])
    as_array = discover_interests(tokens, missing, train.numpy(), method=name)
    assert torch.equal(as_array.of_item, second.of_item)


@each_name
def test_what_stands_at_missing_places_does_not_matter(name):
    tokens, missing = make_tokens()
    first = discover_interests(tokens, missing, method=name)
    tokens[missing] = math.nan
    second = discover_interests(tokens, missing, method=name)
    assert torch.equal(first.vectors, second.vectors) and torch.equal(first.of_item, second.of_item)


@each_name
def test_missing_tokens_take_part_when_asked(name):
    tokens, missing = make_tokens()
    tokens[missing] = 50.
    interests = discover_interests(tokens, missing, ratio=.2, method=name, include_missing=True)
    assert len(interests.vectors) == 1 + 12 and interests.of_item[0].tolist() == [0, 0]
    assert (interests.of_item[1:] > 0).all()
    shared = interests.of_item[1:][missing[1:]].unique()
    assert len(shared) == 1
    if name == "kmeans": torch.testing.assert_close(interests.vectors[shared], torch.full((1, D), 50.).double())


def test_interests_in_low_precision():
    tokens, missing = make_tokens()
    whole = discover_interests(tokens.bfloat16().float(), missing)
    with torch.autocast("cpu", torch.bfloat16): half = discover_interests(tokens.bfloat16(), missing)
    assert half.vectors.dtype == torch.float32 and torch.equal(half.of_item, whole.of_item)
    rounded = assign_interests(tokens.bfloat16(), missing, whole.vectors.bfloat16())
    assert torch.equal(rounded, assign_interests(tokens.bfloat16().double(), missing, whole.vectors.bfloat16()))


def test_catalogue_mistakes_are_named():
    tokens, missing = make_tokens()
    with pytest.raises(ValueError, match="method must be 'kmeans' or 'dpc_knn', got 'dbscan'"):
        discover_interests(tokens, missing, method="dbscan")
    for ids in ([0, 1], [1, V + 1]):
        with pytest.raises(ValueError, match=f"training_items holds {ids[ids[0]]}, but must hold rows from 1 to {V}"):
            discover_interests(tokens, missing, torch.tensor(ids))
    for ids in ([5], []):
        with pytest.raises(ValueError, match="no training item has a token"):
            discover_interests(tokens, missing, torch.tensor(ids, dtype=torch.long))
    with pytest.raises(ValueError, match=r"axis 1 \(M\)"): discover_interests(tokens, missing[:, :1])
    with pytest.raises(ValueError, match="padding only"): assign_interests(tokens, missing, tokens[:1, 0])
    with pytest.raises(ValueError, match=r"axis 1 \(D\)"): assign_interests(tokens, missing, tokens[:, 0, :2])
    tokens[8, 1, 2] = math.inf
    for ask in (discover_interests, lambda *a: assign_interests(*a, tokens[:4, 0])):
        with pytest.raises(ValueError, match="item 8, modality 1 holds a number that is not finite"): ask(tokens, missing)


# Interest sets

def slow_sets(of_item, item_seq):
    sets = [sorted({i for item in row for i in of_item[item] if i}) for row in item_seq.tolist()]
    width = max(1, *map(len, sets))
    return [ids + [0] * (width - len(ids)) for ids in sets]


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
@pytest.mark.parametrize("n_interests", [1, 4, 60])
def test_interest_sets_equal_a_loop(n_modalities, n_interests):
    generator = torch.Generator().manual_seed(0)
    of_item = torch.randint(n_interests + 1, (V + 1, n_modalities), generator=generator)
    of_item[0] = 0
    for L in (1, 5, 12):
        item_seq = torch.randint(V + 1, (8, L), generator=generator)
        item_seq[2], item_seq[3, L // 2:] = 0, 0
        sets = interest_sets(of_item, item_seq)
        assert sets.dtype == torch.int64 and sets.tolist() == slow_sets(of_item.tolist(), item_seq)


def test_histories_without_interests_are_rows_of_padding():
    of_item = torch.tensor([[0, 0], [0, 0], [4, 4], [2, 0]])
    assert interest_sets(of_item, torch.tensor([[1, 1, 1], [0, 0, 0]])).tolist() == [[0], [0]]
    assert interest_sets(of_item, torch.tensor([[1, 0], [2, 3], [2, 2]])).tolist() == [[0, 0], [2, 4], [4, 0]]


def test_interest_sets_do_not_loop_over_rows():
    of_item, counts = torch.randint(1, 9, (V + 1, 2), generator=torch.Generator().manual_seed(0)), []
    for B in (2, 200):
        with Calls() as calls: interest_sets(of_item, torch.ones(B, 6, dtype=torch.long))
        counts.append(calls.n)
    assert counts[0] == counts[1]


# The module that keeps them

def kept_interests(method="kmeans", ratio=.3, dtype=torch.float64):
    tokens, missing = make_tokens()
    kept = Interests(V, hidden_size=D, ratio=ratio, method=method).to(dtype)
    kept.discover(tokens, missing, torch.arange(1, 21), seed=2)
    return kept, tokens, missing


def names(rows): return ["[PAD]", *(f"item {row}" for row in rows)]


@each_name
def test_the_module_keeps_what_is_discovered(name):
    kept, tokens, missing = kept_interests(name)
    found = discover_interests(tokens, missing, torch.arange(1, 21), .3, name, seed=2)
    assert torch.equal(kept.vectors, found.vectors) and torch.equal(kept.of_item, found.of_item)
    assert kept.n_items == V and kept.n_interests == len(found.vectors) - 1 == 11
    item_seq = torch.tensor([[1, 2, 20], [4, 0, 0]])
    sets = kept.sets(item_seq)
    assert torch.equal(sets, interest_sets(found.of_item, item_seq)) and torch.equal(kept(sets), found.vectors[sets])
    assert not list(kept.parameters()) and {*kept.state_dict()} == {"vectors", "of_item"}


def test_the_module_writes_in_place_where_there_is_room_and_keeps_its_dtype():
    kept, tokens, missing = kept_interests(dtype=torch.bfloat16)
    vectors, of_item = kept.vectors, kept.of_item
    kept.discover(tokens + 1, missing, torch.arange(1, 21))
    assert kept.vectors is vectors and kept.of_item is of_item and vectors.dtype == torch.bfloat16
    kept.discover(tokens, missing)
    assert kept.vectors is not vectors and kept.of_item is of_item and kept.vectors.dtype == torch.bfloat16


def test_the_first_catalogue_is_discovered_and_weights_wait_for_theirs():
    kept, (tokens, missing) = Interests(hidden_size=D, ratio=.3).double(), make_tokens()
    assert kept.n_items == kept.n_interests == 0
    kept.follow(lambda: tokens, missing, None, names(range(V)))
    found = discover_interests(tokens, missing, ratio=.3)
    assert torch.equal(kept.vectors, found.vectors) and torch.equal(kept.of_item, found.of_item)
    kept.follow(lambda: pytest.fail("nothing is computed"), missing, None, names(range(V)))
    assert torch.equal(kept.of_item, found.of_item)


@each_name
def test_known_items_keep_their_interests_and_others_get_the_nearest(name):
    kept, tokens, missing = kept_interests(name)
    before, vectors = kept.of_item.clone(), kept.vectors.clone()
    old, new = names(range(V)), names([40, 7, 3, 41, 29])
    tokens, missing = random(6, M, D, seed=5), torch.zeros(6, M, dtype=torch.bool)
    missing[0], missing[2, 0] = True, True  # item 7 lost its text
    kept.follow(lambda: tokens, missing, old, new)
    nearest = assign_interests(tokens, missing, vectors)
    assert torch.equal(kept.vectors, vectors) and kept.n_items == 5
    for row, token in enumerate(new):
        known = before[old.index(token)] if row and token in old else [0] * M
        expected = [0 if gone else int(own or other) for gone, own, other in zip(missing[row], known, nearest[row])]
        assert kept.of_item[row].tolist() == expected, token
    assert kept.of_item[3].all() and not before[4].all(), "what lacked a text and has one now gets the nearest"


def test_another_number_of_interests_is_loaded_and_another_number_of_items_is_not():
    kept = kept_interests()[0]
    other = Interests(V, n_interests=2, hidden_size=D).double()
    other.load_state_dict(kept.state_dict())
    assert torch.equal(other.vectors, kept.vectors) and torch.equal(other.of_item, kept.of_item)
    own = other.vectors
    other.load_state_dict(kept.state_dict())
    assert other.vectors is own
    for sizes, name in (((V + 1, 2, M, D), "of_item"), ((V, 2, M, D + 1), "vectors")):
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            Interests(*sizes).load_state_dict(kept.state_dict())


def test_a_copy_of_the_module_makes_room_in_itself_only():
    kept, vectors = Interests(V, n_interests=2, hidden_size=D).double(), kept_interests()[0].vectors
    copied = copy.deepcopy(kept)
    copied.load_state_dict({"vectors": vectors, "of_item": kept.of_item})
    assert torch.equal(copied.vectors, vectors) and kept.n_interests == 2 and not kept.vectors.any()


# Figures

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_plots():
    tokens, label = groups(3, 20, D=2)
    assert plot_clusters(tokens).get_title() == ""
    ax = plot_clusters(tokens, label, tokens[:3], "here")
    assert [len(part.get_offsets()) for part in ax.collections] == [60, 3] and ax.get_title() == "here"
    log_density, delta = density_peaks(tokens)
    peaks = plot_decision_graph(log_density, delta, 3).collections[1].get_offsets()
    best = (log_density + delta.log()).topk(3).indices
    np.testing.assert_allclose(sorted(peaks[:, 1]), sorted(delta[best]))


def test_plot_interests_shows_members_and_what_brought_them():
    of_item = torch.tensor([[0, 0], [1, 1], [1, 2], [2, 1], [3, 3]])
    pictures = [None, *(np.full((4, 4, 3), 60 * row, np.uint8) for row in range(4))]
    figure = plot_interests(InterestTables(torch.zeros(4, 2), of_item), pictures, n_cols=3)
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert [t for t in texts if t not in ([], [""])] == [["1: 3 items"], ["2: 2 items"], ["3: 1 items"]]
    framed = [[patch.get_edgecolor() for patch in ax.patches] for ax in figure.axes]
    assert [len(f) for f in framed] == [1, 1, 1, 1, 1, 0, 1, 0, 0]
    assert framed[0] == framed[6] and framed[1] == framed[4] and framed[2] == framed[3] != framed[1]
    chosen = plot_interests(InterestTables(torch.zeros(4, 2), of_item), pictures, shown=[3], n_cols=2, title="one")
    assert len(chosen.axes) == 2 and chosen.get_suptitle() == "one"


def lloyd(tokens, n_clusters, seed, max_steps=50):
    "k-means that compares every token with every centre in every step."
    first, place = _distinct(tokens)
    tokens, counts = tokens[first], place.bincount()
    centers = _draw_centers(tokens, counts, min(n_clusters, len(tokens)), seed, None)[0]
    cluster, distance = _nearest(tokens, centers)
    for _ in range(max_steps):
        before = _fill_empty(tokens, centers, cluster, distance)
        centers = _mean_of_clusters(tokens, counts, before, len(centers))
        cluster, distance = _nearest(tokens, centers)
        if torch.equal(cluster, before): break
    return centers, _fill_empty(tokens, centers, cluster, distance)[place]


@pytest.mark.parametrize("n_clusters", [2, 40, 150, 299])
@pytest.mark.parametrize("seed", range(3))
def test_comparing_only_what_moved_changes_nothing(n_clusters, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    tokens[250:] = tokens[:50]
    for fast, slow in zip(cluster_kmeans(tokens, n_clusters, seed, block=1000), lloyd(tokens, n_clusters, seed)):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


def test_few_comparisons_once_little_moves(monkeypatch):
    tokens, compared = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)), []
    own = interests._nearest
    def counting(tokens, centers, block=None):
        compared.append(len(tokens) * len(centers))
        return own(tokens, centers, block)
    monkeypatch.setattr(interests, "_nearest", counting)
    history = []
    cluster_kmeans(tokens, 1000, history=history)
    assert 2 <= len(history) and sum(compared) < .7 * (len(history) + 2) * 2000 * 1000
    assert sum(compared[:8]) == 2000 * 1000, "the rounds of drawing are one step"


@pytest.mark.parametrize("n_moved", [0, 1, 30, 100])
def test_nearest_again_equals_nearest(n_moved):
    generator = torch.Generator().manual_seed(n_moved)
    tokens, old = (torch.randint(0, 4, (n, 3), generator=generator).double() for n in (400, 100))  # many ties
    centers = old.clone()
    centers[torch.randperm(100, generator=generator)[:n_moved]] += 1
    place, distance = _nearest(tokens, old)
    known = place.clone(), distance.clone()
    found, squares = _nearest_again(tokens, centers, old, place, distance, 500)
    slow = torch.cdist(tokens, centers).square()  # among equals any may be found: sums are rounded
    for distances in (squares, slow.gather(1, found[:, None])[:, 0]):
        torch.testing.assert_close(distances, slow.amin(1), rtol=0, atol=1e-12)
    assert torch.equal(place, known[0]) and torch.equal(distance, known[1]), "what is given is not changed"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(value):
    tokens = torch.zeros(50, 4)
    tokens[31, 2] = value
    with pytest.raises(ValueError, match="token 31 holds"): cluster_kmeans(tokens, 3)
