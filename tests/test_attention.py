"Attention to interests: measurements against loops, figures against what they must show."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

import mmseqrec.models.missrec as missrec
from mmseqrec.data.sequences import collate
from mmseqrec.viz.attention import (attention_effect, image_sheet, interest_mass, majority_interest, nearest_to_interests,
                                    perturb_tokens, plot_history, plot_interest_attention, plot_score_parts, rank_correlation,
                                    target_change)
from small_world import build

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def bars(ax): return [(round(b.get_x() + b.get_width() / 2, 6), round(b.get_y(), 6), round(b.get_height(), 6)) for b in ax.patches]

def words(ax): return [text.get_text() for text in ax.texts]


# Figures

def test_a_history_is_a_strip_with_captions_and_bars():
    ax, = plot_history([RED, None, BLUE], ["one", "two\nlines", "three"], [.1, .4, .2], "a title").axes
    assert ax.get_title() == "a title" and words(ax) == ["one", "two\nlines", "three", ".10", ".40", ".20"]
    shown = [image.get_array()[0, 0, :3].tolist() for image in ax.images]
    assert shown == [[255, 0, 0], [233, 233, 233], [0, 0, 255]]
    heights = [height for _, _, height in bars(ax)]
    np.testing.assert_allclose(np.array(heights) / heights[1], [.25, 1, .5])
    assert heights[1] < 0, "the axis points down, the bars up"
    bottom, top = ax.get_ylim()
    assert bottom > max(y for _, y, _ in bars(ax)) and top == 0, "nothing is clipped"
    assert min(y + height for _, y, height in bars(ax)) >= 1 + .19 * 2, "the bars begin below two lines of captions"
    assert ax.texts[-1].get_position()[1] > max(y for _, y, _ in bars(ax)), "numbers stand under the bars"
    assert not plot_history([RED], weights=[0.]).axes[0].patches[0].get_height()


def test_a_history_needs_neither_captions_nor_weights(tmp_path):
    RED.save(tmp_path / "red.png")
    ax, = plot_history([tmp_path / "red.png", np.zeros((4, 4, 3), np.uint8)]).axes
    assert len(ax.images) == 2 and not ax.texts and not ax.patches


def test_a_sheet_pastes_in_rows_and_leaves_out_what_does_not_fit():
    sheet = image_sheet([RED, None, BLUE], 2, 10)
    assert sheet.size == (20, 20) and sheet.mode == "RGB"
    assert [sheet.getpixel(xy) for xy in ((5, 5), (15, 5), (5, 15), (15, 15))] == [(255, 0, 0), (233, 233, 233), (0, 0, 255), (255, 255, 255)]
    assert image_sheet([RED, BLUE, BLUE], 1, 10).getpixel((5, 5)) == (255, 0, 0) and image_sheet([], 1, 4).getpixel((0, 0)) == (255,) * 3


def test_attention_shows_every_item_and_interest():
    weights = np.array([[.5, .25, .25], [1., 0., 0.]])
    fig = plot_interest_attention(weights, [RED, None], [[RED], [None, BLUE], []], "a title")
    ax, = fig.axes
    assert ax.get_title() == "a title" and words(ax) == [".50", ".25", ".25", "1.00", ".00", ".00"]
    corners = sorted((round(im.get_extent()[0] - .04, 6), round(im.get_extent()[3] - .04, 6)) for im in ax.images)
    assert corners == sorted([(-1.1, 0), (-1.1, 1), (0, -1.1), (1, -1.1), (1, -2.1)])
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert (left, right, bottom) == (-1.1, 3, 2) and top == pytest.approx(-2.1)


def test_every_head_has_a_panel():
    fig = plot_interest_attention({"head 1": np.eye(2), "head 2": np.full((2, 2), .5)}, [RED, RED], [[RED], [RED]], "both")
    assert [ax.get_title() for ax in fig.axes] == ["head 1", "head 2"] and fig.get_suptitle() == "both"
    assert words(fig.axes[1]) == [".50"] * 4


def test_parts_of_a_score_stack_up_and_hang_down():
    parts = {"text": [.3, -.1, -.2], "image": [.1, .2, -.2], "id": [.1, 0, 0]}
    ax, = plot_score_parts([RED, None, BLUE], parts, ["a", "b", "c"], [BLUE, RED, RED], "parts").axes
    assert words(ax) == ["a", "b", "c", ".50", ".10", "-.40"] and len(ax.images) == 6 and ax.get_title() == "parts"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["text", "image", "id"]
    line = ax.collections[0].get_segments()[0][0, 1]
    spans = {}  # item -> (lowest, highest) end of its bars, from the line, in units of the score
    for x, y, height in bars(ax):
        low, high = spans.get(x, (0, 0))
        spans[x] = min(low, line - y, line - y - height), max(high, line - y, line - y - height)
    span = np.array([spans[x] for x in sorted(spans)])
    np.testing.assert_allclose(span / span[0, 1] * .5, [[0, .5], [-.1, .2], [-.4, 0]], atol=1e-5)
    assert len(plot_score_parts([RED], {"text": [0.]}).axes[0].images) == 1


# Interests

def test_nearest_items_equal_a_loop():
    rng = torch.Generator().manual_seed(0)
    vectors, tokens = torch.randn(5, 3, generator=rng), torch.randn(13, 2, 3, generator=rng)
    missing = torch.rand(13, 2, generator=rng) < .3
    missing[0], missing[1] = False, True  # padding is never near, even where nobody marks it
    tokens[0] = vectors[0]
    found = nearest_to_interests(vectors, tokens, missing, 6)
    for q, row in enumerate(found.tolist()):
        far = {}
        for item in range(1, 13):
            some = [float((vectors[q] - tokens[item, m]).norm()) for m in range(2) if not missing[item, m]]
            if some: far[item] = min(some)
        assert row == sorted(far, key=far.get)[:6]


def test_majority_equals_a_loop():
    rng = np.random.default_rng(0)
    of_item, planted = rng.integers(0, 12, (40, 2)), rng.integers(-1, 3, 40)
    found = majority_interest(of_item, planted, 13)
    for c in range(1, 14):
        made = [planted[i] for i in range(40) for m in range(2) if of_item[i, m] == c and planted[i] >= 0]
        counts = sorted(((made.count(k), k) for k in set(made)), reverse=True)
        is_clear = counts and (len(counts) == 1 or counts[0][0] > counts[1][0])
        assert found[c] == (counts[0][1] if is_clear else -1), c
    assert found[0] == -1 and found[13] == -1 and set(found) == {-1, 0, 1, 2}
    assert majority_interest(np.array([[0], [1]]), np.array([-1, 0]), 2).tolist() == [-1, 0, -1]


def drawn(U=30, Q=7, K=4, seed=0):
    rng = np.random.default_rng(seed)
    pad = np.arange(Q) >= rng.integers(1, Q + 1, U)[:, None]
    weights = np.where(pad, 0, rng.random((U, Q)))
    labels = np.where(pad, -1, rng.integers(-1, K, (U, Q)))
    return weights / weights.sum(1, keepdims=True), labels, rng.integers(0, K, U), pad


def test_mass_share_and_chance_equal_loops():
    weights, labels, event, pad = drawn()
    found = interest_mass(weights, labels, event, pad, n_shuffles=4000)
    def gain(u, k):
        real = [q for q in range(7) if not pad[u, q]]
        return sum(weights[u, q] for q in real if labels[u, q] == k), sum(labels[u, q] == k for q in real) / len(real)
    own = np.array([gain(u, event[u]) for u in range(30)])
    assert found["mass"] == pytest.approx(own[:, 0].mean()) and found["share"] == pytest.approx(own[:, 1].mean())
    assert found["excess"] == pytest.approx((own[:, 0] - own[:, 1]).mean())
    rng, means = np.random.default_rng(5), []
    table = np.array([[np.subtract(*gain(u, k)) for k in range(4)] for u in range(30)])
    for _ in range(4000): means.append(table[np.arange(30), rng.permutation(event)].mean())
    assert found["chance"] == pytest.approx(np.mean(means), abs=4 * np.std(means) / 40)
    assert found["p_value"] == pytest.approx(np.mean(np.array(means) >= found["excess"]), abs=.04)
    boot = [(own[:, 0] - own[:, 1])[rng.integers(0, 30, 30)].mean() for _ in range(2000)]
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(boot, [.025, .975]), abs=.02)


def test_mass_finds_what_is_there_and_nothing_else():
    weights, labels, event, pad = drawn(400)
    uniform = ~pad / (~pad).sum(1, keepdims=True)
    found = interest_mass(uniform, labels, event, pad)
    assert found["mass"] == pytest.approx(found["share"]) and abs(found["excess"]) < 1e-12
    knowing = uniform * (1 + (labels == event[:, None]))
    found = interest_mass(knowing / knowing.sum(1, keepdims=True), labels, event, pad)
    assert found["low"] > .03 and found["p_value"] == pytest.approx(1 / 1001) and abs(found["chance"]) < found["low"] / 2
    assert interest_mass(weights, labels, event, pad)["p_value"] > .01
    assert interest_mass(weights, labels, event, pad, seed=1) == interest_mass(weights, labels, event, pad, seed=1)


def test_chance_knows_of_frequent_interests():
    "Attention that prefers one label for everybody is above uniform, and not above chance."
    rng, labels = np.random.default_rng(0), np.tile([0, 1, 2, 3], (500, 1))
    event, weights = rng.choice(4, 500, p=[.7, .1, .1, .1]), np.tile([.4, .2, .2, .2], (500, 1))
    found = interest_mass(weights, labels, event, np.zeros((500, 4), bool))
    assert found["low"] > 0 and found["chance"] == pytest.approx(found["excess"]) and found["p_value"] == 1, "also to rounding"


# Perturbations

def summing(vectors, weights):
    "A reader: a score is the weighted sum of what the tokens give to an item."
    return lambda rows, tokens: (weights[rows].gather(1, tokens)[..., None] * vectors[tokens]).sum(1)


@pytest.mark.parametrize("replaces", [False, True])
def test_one_token_changes_at_a_time(replaces):
    rng = torch.Generator().manual_seed(0)
    vectors, weights = torch.randn(9, 5, generator=rng), torch.rand(3, 9, generator=rng)
    vectors[0] = 0
    tokens = torch.tensor([[1, 4, 0], [2, 3, 7], [8, 0, 0]])
    other = torch.tensor([[5, 5, 5], [6, 1, 4], [2, 2, 2]]) if replaces else None
    rows, change = perturb_tokens(summing(vectors, weights), tokens, other)
    expected = []
    for u in range(3):
        for q in range(3):
            if not (old := int(tokens[u, q])): continue
            gain = weights[u, int(other[u, q])] * vectors[int(other[u, q])] if replaces else 0
            expected.append((u, gain - weights[u, old] * vectors[old]))
    assert rows.tolist() == [u for u, _ in expected]
    torch.testing.assert_close(change, torch.stack([row for _, row in expected]))
    assert tokens.tolist() == [[1, 4, 0], [2, 3, 7], [8, 0, 0]], "the tokens themselves stay"


def test_target_change_equals_a_loop():
    rng = np.random.default_rng(0)
    change, target = rng.standard_normal((6, 20)), rng.random((6, 20)) < .4
    target[0], target[1] = False, True
    found = target_change(change, target)
    assert np.isnan(found[0]) and found[1] == pytest.approx(change[1].mean())
    for r in range(2, 6):
        own, others = ([change[r, v] for v in range(20) if target[r, v] == side] for side in (True, False))
        assert found[r] == pytest.approx(np.mean(own) - np.mean(others))


def test_rank_correlation_is_spearman_of_every_row():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (40, 9)).astype(float), rng.standard_normal((40, 9)).round(1)
    hidden = rng.random((40, 9)) < .3
    hidden[0, 2:], hidden[1] = True, True
    hidden[2], a[2] = False, 1.
    a[hidden] = b[hidden] = np.nan
    found = rank_correlation(a, b)
    assert np.isnan(found[:3]).all(), "two values, no value, equal values"
    for row in range(3, 40):
        there = ~hidden[row]
        assert found[row] == pytest.approx(spearmanr(a[row, there], b[row, there])[0], abs=1e-9)


def test_effect_of_most_and_least_attended_tokens_equals_a_loop():
    weights, labels, _, pad = drawn(50)
    effect = np.where(pad, np.nan, np.random.default_rng(1).standard_normal(pad.shape) + 3 * weights)
    effect[0] = np.nan  # a user of whom nothing is known
    found = attention_effect(weights, effect, seed=2)
    most, least, rho = [], [], []
    for u in range(1, 50):
        real = [q for q in range(7) if not pad[u, q]]
        most.append(effect[u, max(real, key=lambda q: weights[u, q])])
        least.append(effect[u, min(real, key=lambda q: weights[u, q])])
        if len(real) > 2: rho.append(spearmanr(weights[u, real], effect[u, real])[0])
    for name, values in {"most": most, "least": least, "correlation": rho}.items():
        value, low, high = found[name]
        assert value == pytest.approx(np.mean(values)) and low < value < high
        assert high - low == pytest.approx(4 * np.std(values) / len(values) ** .5, rel=.2)


# A MISSRec

@pytest.mark.parametrize("name", ["missrec", "content_missrec"])
def test_parts_of_a_score_add_up(name):
    "Also for items without a text, an image or both; each part is weight times cosine."
    model, generator = build(name), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=generator))
        model.fusion.kappa.fill_(2.)
        u, items = model.encode_sequence(collate([[1, 2, 6], [3], [7, 8]], 10)), model.encode_items()
        parts = missrec.score_parts(model, u, items)
    torch.testing.assert_close(parts.sum(2), model.score(u, items))
    for t in range(3):
        for n in range(12):
            text, image = (float(u[t, 0] @ items.vectors[n, s]) for s in (0, 1))
            weight = 1 / (1 + np.exp(-2 * (text - image)))
            if items.missing_stream_mask[n, 1]: weight = 1
            if items.missing_stream_mask[n, 0]: weight = 0
            expected = np.array([weight * text, (1 - weight) * image, 0])
            if name == "missrec": expected = np.append(2 * expected[:2], float(u[t, 0] @ items.vectors[n, 2])) / 3
            np.testing.assert_allclose(parts[t, n], expected[:parts.shape[2]], atol=1e-5)


def test_parts_of_one_modality_and_ids():
    model = build("missrec", image_size=None)
    with torch.no_grad():
        u, items = model.encode_sequence(collate([[1, 2]], 10)), model.encode_items()
        parts = missrec.score_parts(model, u, items)
    assert parts.shape == (1, 12, 2)
    torch.testing.assert_close(parts.sum(2), model.score(u, items))
