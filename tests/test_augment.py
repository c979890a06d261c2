"Dropping, swapping and hiding against loops: what moves, what stays, how often, and where gradients go."
import pytest
import torch

from mmseqrec.blocks.augment import append_mask, cloze, draw_item_drop, draw_swaps, draw_word_drop, drop_items, swap_streams
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TRAIN
from mmseqrec.data.sequences import Batch, collate, position_batches, prefix_batches
from small_world import make_store

LENGTHS = (6, 1, 4, 2)
PAD = torch.arange(6) >= torch.tensor(LENGTHS)[:, None]
FIRST = torch.arange(6).expand(4, 6) == 0


def histories(): return collate([[10 * b + l + 1 for l in range(n)] for b, n in enumerate(LENGTHS)], max_len=10)


# Drawing

@pytest.mark.parametrize("draw, never", [(draw_item_drop, PAD | FIRST), (draw_word_drop, PAD), (draw_swaps, PAD)])
def test_what_may_be_drawn_is_drawn_at_the_rate_and_the_rest_never(draw, never):
    set_seed(0)
    rounds = torch.stack([draw(PAD, .3) for _ in range(2000)])
    assert rounds.dtype == torch.bool and rounds.shape == (2000, 4, 6)
    assert not rounds[:, never].any()
    share = rounds[:, ~never].float().mean(0)
    assert (share - .3).abs().max() < .05  # each place for itself: five standard deviations
    assert abs(share.mean() - .3) < .015


@pytest.mark.parametrize("draw", [draw_item_drop, draw_word_drop, draw_swaps])
def test_places_are_drawn_independently(draw):
    "The number of drawn places among 400 varies as it does for independent coins."
    set_seed(1)
    counts = torch.stack([draw(torch.zeros(20, 21, dtype=torch.bool), .3)[:, 1:].sum() for _ in range(1000)]).float()
    assert counts.mean().item() == pytest.approx(120, abs=2)
    assert counts.var().item() == pytest.approx(400 * .3 * .7, rel=.25)


@pytest.mark.parametrize("draw, never", [(draw_item_drop, PAD | FIRST), (draw_word_drop, PAD), (draw_swaps, PAD)])
def test_rates_zero_and_one(draw, never):
    for zero in (0, 0.0, torch.tensor(0.0)): assert not draw(PAD, zero).any()
    for one in (1, 1.0, torch.tensor(1.0)): assert torch.equal(draw(PAD, one), ~never)


@pytest.mark.parametrize("draw", [draw_item_drop, draw_word_drop, draw_swaps])
def test_a_seed_repeats_the_draw_and_the_mask_stays_as_it_was(draw):
    before, drawn = PAD.clone(), []
    for seed in (3, 3, 4):
        set_seed(seed)
        drawn += [draw(PAD, .5)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(draw(PAD, 1.0), draw(PAD, 1.0)) and torch.equal(PAD, before)


# Dropping

def slow_drop(batch, item_drop_mask):
    "Histories as lists, item by item."
    return [[int(batch.item_seq[b, l]) for l in range(int(batch.item_seq_len[b])) if not item_drop_mask[b, l]]
            for b in range(len(batch))]


@pytest.mark.parametrize("seed", range(5))
def test_drop_items_equals_loops(seed):
    batch = histories()
    set_seed(seed)
    item_drop_mask = draw_item_drop(PAD, .5)
    shorter, slow = drop_items(batch, item_drop_mask), slow_drop(batch, item_drop_mask)
    assert shorter.item_seq_len.tolist() == [len(row) for row in slow]
    assert shorter.item_seq.shape == (4, max(map(len, slow)))  # no wider than its longest row
    expected = collate(slow, max_len=10)
    assert torch.equal(shorter.item_seq, expected.item_seq) and torch.equal(shorter.item_seq_len, expected.item_seq_len)
    assert shorter.item_seq.dtype == torch.int64 and shorter.item_seq_len.dtype == torch.int64
    assert shorter.query_row().tolist() == [0, 1, 2, 3]
    last = shorter.item_seq.flatten()[shorter.query_index()]
    assert last.tolist() == [row[-1] for row in slow]


def test_drop_items_by_hand():
    batch = histories()
    item_drop_mask = torch.zeros(4, 6, dtype=torch.bool)
    item_drop_mask[0, [1, 2, 5]] = item_drop_mask[2, 0] = item_drop_mask[3, 1] = True  # the first may go, too
    item_drop_mask |= PAD  # what is marked in the padding does not matter
    shorter = drop_items(batch, item_drop_mask)
    assert shorter.item_seq.tolist() == [[1, 4, 5], [11, 0, 0], [22, 23, 24], [31, 0, 0]]
    assert shorter.item_seq_len.tolist() == [3, 1, 3, 1]


def test_repeated_items_and_nothing_dropped():
    batch = collate([[7, 7, 3, 7], [3, 3]], max_len=10)
    same = drop_items(batch, torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(same.item_seq, batch.item_seq) and torch.equal(same.item_seq_len, batch.item_seq_len)
    item_drop_mask = torch.tensor([[False, True, False, False], [False, True, False, False]])
    assert drop_items(batch, item_drop_mask).item_seq.tolist() == [[7, 3, 7], [3, 0, 0]]


def test_only_the_history_changes():
    batch = next(iter(prefix_batches(make_store(), TRAIN, batch_size=8, max_len=6, bucketed=False)))
    before = {name: getattr(batch, name).clone() for name in ("item_seq", "item_seq_len", "pos_item", "user", "row")}
    set_seed(0)
    shorter = drop_items(batch, draw_item_drop(batch.item_pad_mask, .6))
    assert shorter.item_seq_len.sum() < batch.item_seq_len.sum() and isinstance(shorter, Batch)
    for name in ("pos_item", "user", "row"): assert torch.equal(getattr(shorter, name), before[name])
    assert shorter.positions is None
    for name, x in before.items(): assert torch.equal(getattr(batch, name), x), f"{name} of the batch itself"
    assert torch.equal(shorter.item_seq[:, 0], batch.item_seq[:, 0])


def test_windows_and_wrong_shapes_are_refused():
    windows = next(iter(position_batches(make_store(), n_targets=16, max_len=6)))
    with pytest.raises(ValueError, match="one query a row"): drop_items(windows, torch.zeros_like(windows.item_pad_mask))
    batch = histories()
    with pytest.raises(ValueError, match=r"\(L\).*must be 6, got 5"): drop_items(batch, torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(B\).*must be 4, got 3"): drop_items(batch, torch.zeros(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 axes"): drop_items(batch, torch.zeros(6, dtype=torch.bool))


def test_a_history_may_not_vanish():
    item_drop_mask = torch.zeros(4, 6, dtype=torch.bool)
    item_drop_mask[1, 0] = True
    with pytest.raises(ValueError, match="without items.*keep the first"): drop_items(histories(), item_drop_mask)


# Swapping

def streams(requires_grad=False):
    return torch.randn(4, 6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(requires_grad)


def test_swap_streams_equals_loops():
    x = streams()
    set_seed(2)
    is_swapped = draw_swaps(PAD, .5)
    assert 0 < is_swapped.sum() < (~PAD).sum()
    mixed, slow = swap_streams(x, is_swapped), torch.empty_like(x)
    for b in range(4):
        for l in range(6):
            m = 1.0 if is_swapped[b, l] else 0.0  # the paper's formulas, with m as a number
            slow[b, l, 0] = (1 - m) * x[b, l, 0] + m * x[b, l, 1]
            slow[b, l, 1] = (1 - m) * x[b, l, 1] + m * x[b, l, 0]
    assert torch.equal(mixed, slow)
    assert torch.equal(mixed[PAD], x[PAD])


def test_streams_stay_complementary():
    "Together they hold what they held; twice swapped is not swapped; everywhere swapped is exchanged."
    x, is_swapped = streams(), torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < .5
    mixed = swap_streams(x, is_swapped)
    assert not torch.equal(mixed, x)
    assert torch.equal(mixed.sort(2).values, x.sort(2).values)
    assert torch.equal(swap_streams(mixed, is_swapped), x)
    assert torch.equal(swap_streams(x, torch.ones(4, 6, dtype=torch.bool)), x.flip(2))
    assert torch.equal(swap_streams(x, torch.zeros(4, 6, dtype=torch.bool)), x)


@pytest.mark.parametrize("stream", [0, 1])
def test_gradients_reach_exactly_what_a_stream_shows(stream):
    x, is_swapped = streams(requires_grad=True), torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < .5
    factor = torch.rand(4, 6, 3, dtype=torch.float64) + 1
    (swap_streams(x, is_swapped)[:, :, stream] * factor).sum().backward()
    shown = torch.where(is_swapped, 1 - stream, stream)
    for b in range(4):
        for l in range(6):
            assert torch.equal(x.grad[b, l, shown[b, l]], factor[b, l])
            assert not x.grad[b, l, 1 - shown[b, l]].any()
    assert torch.autograd.gradcheck(lambda x: swap_streams(x, is_swapped), (x,))


def test_swap_streams_refuses_other_shapes():
    x, nothing = streams(), torch.zeros(4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(S\).*must be 2, got 1"): swap_streams(x[:, :, :1], nothing)
    with pytest.raises(ValueError, match="4 axes"): swap_streams(x[:, :, 0], nothing)
    with pytest.raises(ValueError, match=r"\(L\).*must be 6, got 5"): swap_streams(x, nothing[:, :5])
    with pytest.raises(ValueError, match=r"\(B\).*must be 4, got 1"): swap_streams(x, nothing[:1])


# Hiding

def test_append_mask_equals_a_loop():
    batch = histories()
    batch.pos_item, batch.user = torch.tensor([1, 2, 3, 4]), torch.tensor([9, 8, 7, 6])
    before = batch.item_seq.clone()
    asked = append_mask(batch, 99)
    expected = collate([[*row, 99] for row in slow_drop(batch, torch.zeros(4, 6, dtype=torch.bool))], 10)
    assert torch.equal(asked.item_seq, expected.item_seq) and torch.equal(asked.item_seq_len, expected.item_seq_len)
    assert asked.positions is None and asked.item_seq.flatten()[asked.query_index()].tolist() == [99] * 4
    assert torch.equal(asked.pos_item, batch.pos_item) and torch.equal(asked.user, batch.user)
    assert torch.equal(batch.item_seq, before) and batch.item_seq_len.tolist() == list(LENGTHS)


def test_append_mask_to_windows_asks_once_a_row_and_forgets_their_targets():
    windows = next(iter(position_batches(make_store(), n_targets=16, max_len=6)))
    asked = append_mask(windows, 99)
    assert asked.positions is None and asked.pos_item is None and asked.n_targets == len(windows)


def rows_of_seven(n_rows=3000, n_items=40):
    "Histories of one to six items, and their next items, from a shop of `n_items`."
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(n_rows) % 6 + 1
    items = torch.randint(1, n_items + 1, (n_rows, 6), generator=generator)
    items[torch.arange(6) >= lengths[:, None]] = 0
    return Batch(items, lengths, pos_item=torch.randint(1, n_items + 1, (n_rows,), generator=generator))


@pytest.mark.parametrize("rate", [0., .25, 1.])
def test_cloze_row_by_row(rate):
    "Every chosen place is asked for its true item; places that are not chosen show theirs; the next item never shows."
    batch, N = rows_of_seven(), 40
    before = batch.item_seq.clone()
    set_seed(0)
    hidden = cloze(batch, N, rate)
    assert torch.equal(batch.item_seq, before) and batch.positions is None
    assert hidden.item_seq.shape == (3000, 7) and hidden.item_seq_len.tolist() == (batch.item_seq_len + 1).tolist()
    asked = dict(zip(hidden.positions.tolist(), hidden.pos_item.tolist()))
    assert len(asked) == len(hidden.positions) == hidden.n_targets and sorted(asked) == hidden.positions.tolist()
    seen = {"mask": 0, "own": 0, "chosen": 0, "places": 0}
    for b, (shown, n) in enumerate(zip(hidden.item_seq.tolist(), batch.item_seq_len.tolist())):
        truth = [*batch.item_seq[b, :n].tolist(), int(batch.pos_item[b])]
        assert shown[n + 1:] == [0] * (6 - n) and not any(b * 7 + l in asked for l in range(n + 1, 7))
        assert shown[n] == N + 1 and asked[b * 7 + n] == truth[n]
        for l in range(n):
            seen["places"] += 1
            if b * 7 + l not in asked:
                assert shown[l] == truth[l]
                continue
            assert asked[b * 7 + l] == truth[l] and 1 <= shown[l] <= N + 1
            seen["chosen"] += 1
            seen["mask"] += shown[l] == N + 1
            seen["own"] += shown[l] == truth[l]
    assert seen["chosen"] / seen["places"] == pytest.approx(rate, abs=.02)
    if rate:
        assert seen["mask"] / seen["chosen"] == pytest.approx(.8, abs=.03)
        assert seen["own"] / seen["chosen"] == pytest.approx(.1 + .1 / N, abs=.02)


def test_cloze_may_show_any_item_and_draws_each_place_for_itself():
    batch, N = rows_of_seven(8000, n_items=5), 5
    set_seed(1)
    hidden = cloze(batch, N, 1.)
    others = hidden.item_seq[(hidden.item_seq > 0) & (hidden.item_seq <= N)]
    assert others.unique().tolist() == [1, 2, 3, 4, 5]
    first, second = (cloze(batch, N, .5).positions for _ in range(2))
    assert not torch.equal(first, second)
    set_seed(1)
    again = cloze(batch, N, 1.)
    assert torch.equal(again.item_seq, hidden.item_seq) and torch.equal(again.positions, hidden.positions)
    six = cloze(Batch(torch.ones(4000, 6, dtype=torch.long), torch.full((4000,), 6), torch.ones(4000, dtype=torch.long)), N, .5)
    counts = (six.positions // 7).bincount(minlength=4000).float() - 1  # chosen places of each history
    assert counts.mean().item() == pytest.approx(3, abs=.1) and counts.var().item() == pytest.approx(1.5, abs=.15)


def test_cloze_at_rate_zero_asks_what_a_recommendation_asks():
    batch = rows_of_seven(50)
    only_last, asked = cloze(batch, 40, 0), append_mask(batch, 41)
    assert torch.equal(only_last.item_seq, asked.item_seq) and torch.equal(only_last.positions, asked.query_index())
    assert torch.equal(only_last.pos_item, batch.pos_item)


def test_cloze_needs_one_next_item_a_row():
    windows = next(iter(position_batches(make_store(), n_targets=16, max_len=6)))
    with pytest.raises(ValueError, match="one next item each.*would be in sight"): cloze(windows, 12)
    with pytest.raises(ValueError, match="one next item each"): cloze(histories(), 99)
