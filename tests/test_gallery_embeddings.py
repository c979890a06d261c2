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
