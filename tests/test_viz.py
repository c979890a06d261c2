"Maps of embeddings: PCA against the singular value decomposition, measures against loops, plots that return their axes."
import tracemalloc
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from mmseqrec.viz.embeddings import (alignment, map_trustworthiness, modality_gap, nearest_neighbours, neighbour_agreement, pca_2d,
                                     plot_map, plot_modality_gap, plot_picture_map, spread_out, umap_2d, uniformity)

CLOSE = dict(rtol=0, atol=1e-8)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def cloud(N=60, D=9, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, D)) * np.geomspace(5, .1, D) + rng.standard_normal(D) * 10


@pytest.mark.parametrize("N, D", [(60, 9), (9, 60), (5, 5), (2, 3), (300, 2)])
def test_pca_equals_svd(N, D):
    x = cloud(N, D)
    points, share = pca_2d(x)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=0, atol=1e-6)
    np.testing.assert_allclose(share, (s ** 2 / (s ** 2).sum())[:2], **CLOSE)
    assert 0 <= share.min() and share.sum() <= 1 + 1e-9 and share[0] >= share[1]
    np.testing.assert_allclose(points.mean(0), 0, **CLOSE)


def test_pca_is_the_same_whatever_the_order_and_the_origin():
    x, order = cloud(), np.random.default_rng(1).permutation(60)
    points, share = pca_2d(x)
    np.testing.assert_allclose(pca_2d(x[order])[0], points[order], **CLOSE)
    np.testing.assert_allclose(pca_2d(x + 100)[0], points, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(pca_2d(x)[0], points)


def test_pca_of_floats_of_other_kinds_and_of_nothing_to_see():
    x = cloud()
    np.testing.assert_allclose(pca_2d(x.astype(np.float32))[0], pca_2d(x)[0], rtol=0, atol=1e-3)
    assert np.isfinite(pca_2d(x.astype(np.float16))[0]).all()
    points, share = pca_2d(np.ones((4, 3)))  # all the same: no direction, no division by zero
    assert not points.any() and not share.any()


def slow_neighbours(x):
    "Rank all other points by cosine, one by one: `[N]` lists, nearest first."
    cosine = lambda a, b: a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b))
    return [sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine(x[i], x[j])) for i in range(len(x))]

@pytest.mark.parametrize("block", [1, 7, 1024])
def test_nearest_neighbours_equal_a_loop(block):
    x = cloud(41, 5)
    found, cosines = nearest_neighbours(x, 6, block)
    assert found.tolist() == [row[:6] for row in slow_neighbours(x)] and found.shape == cosines.shape == (41, 6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines, (unit[:, None] * unit[found]).sum(-1), **CLOSE)
    assert nearest_neighbours(9 * x, 40)[0].tolist() == slow_neighbours(x), "all others, whatever the length"
    with pytest.raises(ValueError, match="41 vectors have 40 neighbours, not 41"): nearest_neighbours(x, 41)
    assert nearest_neighbours(np.ones((4, 2)), 3)[0].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]], "never itself"

def test_alignment_and_uniformity_equal_loops():
    x, y = cloud(23, 6), cloud(23, 6, seed=1)
    u, v = ([row / np.sqrt((row ** 2).sum()) for row in z] for z in (x, y))
    assert alignment(x, y) == pytest.approx(np.mean([((a - b) ** 2).sum() for a, b in zip(u, v)]), abs=1e-9)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-12) and alignment(x, -x) == pytest.approx(4)
    for t in (2, .5):
        pairs = [np.exp(-t * ((u[a] - u[b]) ** 2).sum()) for a in range(23) for b in range(23) if a != b]
        for block in (1, 5, 1024): assert uniformity(x, t, block) == pytest.approx(np.log(np.mean(pairs)), abs=1e-9)
    assert abs(uniformity(np.ones((5, 3)))) < 1e-9 and uniformity(x) < 0
    even = uniformity(np.random.default_rng(0).standard_normal((500, 400)))
    assert even == pytest.approx(-4, abs=.05), "at right angles: -2 t"

def test_nothing_quadratic_is_held():
    x = np.random.default_rng(0).standard_normal((4000, 4))
    for measure in (lambda: uniformity(x, block=128), lambda: nearest_neighbours(x, 5, block=128)):
        tracemalloc.start()
        measure()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4000 * 4000 * 8 / 4, peak

def slow_trustworthiness(x, points, k):
    "Venna and Kaski (2001), equation by equation."
    N, total = len(x), 0
    for n, near in enumerate(slow_neighbours(x)):
        on_map = sorted((m for m in range(N) if m != n), key=lambda m: ((points[n] - points[m]) ** 2).sum())[:k]
        total += sum(max(0, near.index(m) + 1 - k) for m in on_map)
    return 1 - 2 / (N * k * (2 * N - 3 * k - 1)) * total

@pytest.mark.parametrize("k", [1, 5])
def test_trustworthiness_equals_its_equation(k):
    x = cloud(50, 6)
    for points in (pca_2d(x)[0], np.random.default_rng(2).random((50, 2))):
        assert map_trustworthiness(x, points, k) == pytest.approx(slow_trustworthiness(x, points, k), abs=1e-9)
    plane = cloud(50, 2) - 10  # a map that is the space: nothing is lost
    circle = plane / np.linalg.norm(plane, axis=1, keepdims=True)
    assert map_trustworthiness(plane, circle, k) == 1

def test_neighbour_agreement_equals_sets():
    x, y = cloud(40, 5), np.hstack([cloud(40, 3), cloud(40, 4, seed=3)])
    expected = np.mean([len(set(a[:4]) & set(b[:4])) / 4 for a, b in zip(slow_neighbours(x), slow_neighbours(y))])
    assert neighbour_agreement(x, y, k=4) == pytest.approx(expected) and 0 < expected < 1
    assert neighbour_agreement(x, 5 * x) == 1 and neighbour_agreement(x, y, k=4) == neighbour_agreement(y, x, k=4)
    chance = [neighbour_agreement(*np.random.default_rng(s).standard_normal((2, 200, 9)), k=10) for s in range(5)]
    assert np.mean(chance) == pytest.approx(10 / 199, abs=.015)

@pytest.mark.slow  # compiles for half a minute
def test_umap_repeats_itself_and_keeps_neighbours():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8).repeat(20, 0) * 6
    x = centres + rng.standard_normal((60, 8)) * .3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first, second = umap_2d(x, seed=1), umap_2d(x, seed=1)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (60, 2) and np.isfinite(first).all() and not np.array_equal(first, umap_2d(x, seed=2))
    distance = np.linalg.norm(first[:, None] - first[None], axis=-1) + np.eye(60) * 1e9
    assert (distance.argmin(1) // 20 == np.arange(60) // 20).mean() > .95
    assert umap_2d(x[:5]).shape == (5, 2)  # fewer points than neighbours asked for


def test_spread_out_equals_a_loop():
    points = np.random.default_rng(0).random((200, 2)) * [3, 50] + [10, -5]
    scaled = (points - points.min(0)) / np.ptp(points, axis=0)
    kept = []
    for i in range(200):
        if all(max(abs(scaled[i, 0] - scaled[j, 0]), abs(scaled[i, 1] - scaled[j, 1])) >= .1 for j in kept): kept.append(i)
    assert spread_out(points, .1, limit=200).tolist() == kept and 20 < len(kept) < 122
    assert spread_out(points, .1, limit=7).tolist() == kept[:7]
    assert spread_out(np.ones((5, 2))).tolist() == [0] and spread_out(points[:1]).tolist() == [0]


def test_modality_gap_equals_loops():
    text, image = cloud(12, 5), cloud(12, 5, seed=1)
    unit = lambda x: [row / np.sqrt(sum(row ** 2)) for row in x]
    t, i = unit(text), unit(image)
    pairs = [(a, b) for a in range(12) for b in range(12) if a != b]
    found = modality_gap(text, image)
    assert found["matching"] == pytest.approx(np.mean([t[k] @ i[k] for k in range(12)]), abs=1e-9)
    assert found["other"] == pytest.approx(np.mean([t[a] @ i[b] for a, b in pairs]), abs=1e-9)
    assert found["text"] == pytest.approx(np.mean([t[a] @ t[b] for a, b in pairs]), abs=1e-9)
    assert found["image"] == pytest.approx(np.mean([i[a] @ i[b] for a, b in pairs]), abs=1e-9)
    assert found["gap"] == pytest.approx(np.linalg.norm(np.mean(t, 0) - np.mean(i, 0)), abs=1e-9)
    assert modality_gap(text, 7 * text) == pytest.approx(modality_gap(text, text)) and modality_gap(text, text)["gap"] < 1e-12


def test_plots_return_their_axes(tmp_path):
    points, groups = cloud(30)[:, :2], [f"kind {k % 10}" for k in range(30)]
    ax = plot_map(points, groups, n_colors=4, title="T", axis_names=("one", "two"))
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("T", "one", "two")
    assert len(ax.get_legend().get_texts()) == 5 and ax.get_legend().get_texts()[0].get_text() == "other"
    assert sum(len(c.get_offsets()) for c in ax.collections) == 30, "each point is drawn once"
    assert plot_map(points).get_legend() is None
    Image.new("RGBA", (9, 7), "red").save(tmp_path / "a.png")
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.new("L", (5, 5)), np.zeros((4, 4, 3), np.uint8), None] * 6
    ax = plot_picture_map(points, images, distance=.05, title="T")
    shown = [place for place in spread_out(points, .05) if images[place] is not None]
    assert len(ax.artists) == len(shown) > 5 and ax.get_title() == "T"
    ax = plot_modality_gap(cloud(20), cloud(20, seed=1), n_lines=6, title="T")
    assert len(ax.lines) == 6 and [t.get_text() for t in ax.get_legend().get_texts()] == ["texts", "images"]
    _, own = plt.subplots()
    for draw in (lambda: plot_map(points, ax=own), lambda: plot_picture_map(points, images, ax=own),
                 lambda: plot_modality_gap(cloud(9), cloud(9), ax=own)):
        assert draw() is own


def test_picture_files_are_closed(tmp_path):
    "A thousand pictures must not leave a thousand files open."
    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.png")
    opened, original = [], Image.open
    def recording(*args, **kwargs):
        opened.append(original(*args, **kwargs))
        return opened[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", recording)
        plot_picture_map(cloud(10)[:, :2], [tmp_path / "a.png"] * 10)
    assert opened and all(getattr(image, "fp", None) is None for image in opened)
