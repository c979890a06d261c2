"What page 70 counts among neighbours, against loops; its findings are asserted on the page itself."
import matplotlib.pyplot as plt
import numpy as np
import pytest

from pages import page_functions

page = page_functions("gallery_embeddings")


def test_neighbours_are_counted_as_a_loop_counts_them():
    rng = np.random.default_rng(0)
    x, labels, events = rng.standard_normal((40, 5)), rng.integers(0, 3, 40), rng.integers(0, 50, 40)
    near = page.neighbours(x)
    assert near.shape == (40, 10)
    same = [labels[m] == labels[n] for n in range(40) for m in near[n]]
    assert page.like_labels(near, labels) == pytest.approx(np.mean(same))
    assert page.chance(labels) == pytest.approx(np.mean([a == b for a in labels for b in labels]))
    around = [np.mean([np.log(1 + events[m]) for m in near[n]]) for n in range(40)]
    assert page.like_popularity(near, events) == pytest.approx(np.corrcoef(np.log(1 + events), around)[0, 1])
    twice = np.vstack([x, x * 2])  # each item beside its double
    assert page.like_labels(page.nearest_neighbours(twice, 1)[0], np.tile(np.arange(40), 2)) == 1


def test_maps_are_drawn_in_rows():
    points, colors = np.random.default_rng(0).random((9, 2)), ["red"] * 9
    figure = page.plot_spaces({"above": {"a": (points, colors, "A"), "b": (points, colors, "B")}, "below": {"a": (points, colors, "C")}})
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() or ax.get_title(loc="left") for ax in axes.flat][:3] == ["A", "B", "C"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["above", "below"]
    np.testing.assert_array_equal(axes[0, 1].collections[0].get_offsets(), points)
    plt.close("all")


def test_stored_layouts_are_of_every_third_complete_item():
    gallery = page.open_gallery()
    masks = gallery.data.catalogue
    complete = int((~(masks.missing_text_mask | masks.missing_image_mask)).sum())
    found = page.load_file(page.artifact_path("gallery") / "layouts.safetensors")
    assert set(found) == {"text", "image", "keywords", "adapted", "ID"}
    for name, points in found.items():
        assert points.shape == ((complete + 2) // 3, 2) and np.isfinite(points).all() and (points.std(0) > .5).all(), name


def test_layouts_are_stored_as_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(page.mm, "umap_2d", lambda x: x[:, :2])
    monkeypatch.setitem(page.lay_out.__globals__, "mm", page.mm)
    x = np.random.default_rng(0).normal(size=(7, 4)) * 9
    page.store_layouts({"one": x}, tmp_path / "layouts.safetensors")
    unit = x[[0, 3, 6]] / np.linalg.norm(x[[0, 3, 6]], axis=1)[:, None]
    np.testing.assert_allclose(page.load_file(tmp_path / "layouts.safetensors")["one"], unit[:, :2], atol=1e-3)
