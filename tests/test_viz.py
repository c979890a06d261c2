"Maps of embeddings: PCA against the singular value decomposition, gaps against loops, plots that return their axes."
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from mmseqrec.viz.embeddings import modality_gap, pca_2d, plot_map, plot_modality_gap, plot_picture_map, spread_out, umap_2d

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


@pytest.mark.slow  # compiles for half a minute
def test_umap_repeats_itself_and_keeps_neighbours():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8).repeat(20, 0) * 6
    x = centres + rng.standard_normal((60, 8)) * .3
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
    assert len(ax.lines) == 6 and [t.get_text() for t in ax.get_legend().get_texts()] == ["texts", "pictures"]
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
