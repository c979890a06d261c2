"Every plot returns what can be changed, and the same data give the same bytes."
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from mmseqrec.figures import COLORS, figure_to_png, plot_bars, plot_categories, plot_heatmap, plot_images, plot_lines, set_style

PLOTS = {
    "lines": lambda: plot_lines({"a": [1, 2, 3], "b": ([0, 1], [3, 1])}, bands={"a": ([0, 1, 2], [2, 3, 4])},
                                colors={"a": COLORS["text"]}, title="t", xlabel="x", ylabel="y", marker="o"),
    "one line": lambda: plot_lines({"a": [1]}),
    "bars": lambda: plot_bars({"a": .1, "b": .3}, intervals={"a": (.05, .2)}, title="t"),
    "one bar": lambda: plot_bars({"a": 0}),
    "heatmap": lambda: plot_heatmap(np.eye(3), ["a", "b", "c"], ["first", "second", "third"], digits=1),
    "signed heatmap": lambda: plot_heatmap(np.array([[-1., 2.]]), center=0),
    "categories": lambda: plot_categories(np.array([[0, 1], [1, -1]]), {"a": "red", "b": "blue"}, ["r", "s"], ["1", "2"]),
    "images": lambda: plot_images([np.zeros((4, 4, 3), np.uint8), Image.new("RGB", (4, 4)), None], ["a", "b\nc", "d"],
                                  n_cols=2, title="t", border_colors=["red", None, None]),
    "no image": lambda: plot_images([]),
}

@pytest.fixture(autouse=True)
def style():
    plt.close("all")  # what other tests have left open
    with plt.rc_context():
        set_style()
        yield
    plt.close("all")

@pytest.mark.parametrize("name", PLOTS)
def test_plot_returns_axes_or_figure_with_the_same_bytes(name):
    first, second = PLOTS[name](), PLOTS[name]()
    assert isinstance(first, (plt.Axes, plt.Figure))
    png = figure_to_png(first)
    assert png[:4] == b"\x89PNG" and png == figure_to_png(second)
    assert not plt.get_fignums(), "figure_to_png closes what it has drawn"

def test_plots_draw_where_they_are_told():
    axes = plt.subplots(1, 3)[1]
    assert plot_lines({"a": [1, 2]}, ax=axes[0]) is axes[0] and plot_bars({"a": 1}, ax=axes[1]) is axes[1]
    assert plot_heatmap(np.eye(2), ax=axes[2]) is axes[2]
    assert len(plt.get_fignums()) == 1

def test_labels_are_written():
    ax = plot_bars({"a": .25, "b": .5}, digits=2, title="t", xlabel="Recall@10")
    assert ax.get_title(loc="left") == "t" and ax.get_xlabel() == "Recall@10"
    assert [t.get_text() for t in ax.texts] == ["0.25", "0.50"]

def test_picture_files_are_opened(tmp_path):
    Image.new("L", (4, 4), 255).save(tmp_path / "a.png")
    figure = plot_images([tmp_path / "a.png", str(tmp_path / "a.png")])
    assert [ax.images[0].get_array().shape for ax in figure.axes] == [(4, 4, 3)] * 2


def test_a_heat_map_keeps_its_labels():
    ax = plot_heatmap(np.eye(2), title="t", xlabel="x", ylabel="y")
    assert (ax.get_title(loc="left") or ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("t", "x", "y")


def test_each_category_has_the_colour_that_the_legend_names():
    colors = {name: COLORS[name] for name in ("text", "image", "both")}
    ax = plot_categories(np.array([[0, 2], [-1, 0]]), colors, ["r", "s"], ["1", "2"], "t", "x")
    mesh = ax.collections[0]
    ax.figure.canvas.draw()
    shown = [to_hex(color) for color in mesh.get_facecolors()]
    assert shown[:2] == [COLORS["text"], COLORS["both"]] and shown[3] == COLORS["text"] and mesh.get_array().mask[1, 0]
    assert {h.get_label(): to_hex(h.get_facecolor()) for h in ax.get_legend().legend_handles} == colors
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_yticklabels()] == ["r", "s"] and ax.get_xlabel() == "x"
    own = plt.subplots()[1]
    assert plot_categories(np.zeros((1, 1), int), {"a": "red"}, ["r"], ["c"], ax=own) is own
