"""Sequences and batches against loops over samples: same rows, same padding, same questions, each exactly once."""
from collections import Counter

import numpy as np
import pytest
import torch

from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import (Batch, SequenceStore, best_cuts, collate, evaluation_batches, expand_prefixes,
                                     flat_ranges, length_chunks, pad_gather, position_batches, prefix_batches,
                                     training_windows)
from pages import page_functions

of_page = page_functions("data.sequences")
padding_share, plot_batch, plot_padding = of_page.padding_share, of_page.plot_batch, of_page.plot_padding


def make_store(seed, n_users=30, longest=40, n_items=50):
    "Make users with 0 to `longest` events and a random number of training events each."
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, longest + 1, n_users) * (rng.random(n_users) < .9)
    stage = [np.sort(rng.choice([TRAIN] * 6 + [VALID, TEST], count)) for count in counts]
    stage = np.concatenate([np.zeros(0, np.int8), *stage]).astype(np.int8)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return SequenceStore(rng.integers(1, n_items + 1, offsets[-1]).astype(np.int32), offsets, stage, n_items)


def slow_rows(store, stage):
    "List `(user, event, history, target)` of a stage with plain loops."
    rows = []
    for user in range(len(store.offsets) - 1):
        first, end = store.offsets[user], store.offsets[user + 1]
        for event in range(first + 1, end):
            if store.stage[event] == stage:
                rows.append((user, event, store.items[first:event].tolist(), int(store.items[event])))
    return rows


def questions(batches):
    "Count `(user, history, target)` over batches with plain loops."
    counter = Counter()
    for batch in batches:
        width = batch.item_seq.shape[1]
        for query, target in zip(batch.query_index().tolist(), batch.pos_item.tolist()):
            row, column = divmod(query, width)
            counter[int(batch.user[row]), tuple(batch.item_seq[row, :column + 1].tolist()), target] += 1
    return counter


def check_padding(batch):
    "Padded on the right, to the longest row, with zeros and nothing else zero."
    width = batch.item_seq.shape[1]
    assert width == batch.item_seq_len.max()
    padding = torch.arange(width) >= batch.item_seq_len[:, None]
    assert torch.equal(batch.item_pad_mask, padding)
    for name in ("item_seq", "item_seq_len", "pos_item", "user"): assert getattr(batch, name).dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_rows_equal_a_loop(seed):
    store = make_store(seed)
    for stage in (TRAIN, VALID, TEST):
        rows = slow_rows(store, stage)
        events = store.rows(stage)
        assert events.tolist() == [event for _, event, _, _ in rows] and events.dtype == np.int64
        assert store.user[events].tolist() == [user for user, *_ in rows]
        assert store.history_length(events).tolist() == [len(history) for _, _, history, _ in rows]
        row, item = store.seen_items(events)
        assert list(zip(row.tolist(), item.tolist())) == [(i, x) for i, (_, _, h, _) in enumerate(rows) for x in h]


def test_test_history_holds_the_validation_item():
    store = SequenceStore(np.array([5, 6, 7, 8]), np.array([0, 4]), np.array([TRAIN, TRAIN, VALID, TEST]), 9)
    (batch,) = evaluation_batches(store, TEST, 4, 50)
    assert batch.item_seq.tolist() == [[5, 6, 7]] and batch.pos_item.tolist() == [8]
    (batch,) = prefix_batches(store, TRAIN, 4, 50)
    assert batch.item_seq.tolist() == [[5]] and batch.pos_item.tolist() == [6]


def test_nothing_held_out_reaches_training():
    "Items of held-out events are numbered from 1000: none may appear in any training batch."
    store = make_store(3)
    items = np.where(store.stage == TRAIN, store.items, 1000 + store.items)
    store = SequenceStore(items, store.offsets, store.stage, 2000)
    for batches in (prefix_batches(store, TRAIN, 16, 10), position_batches(store, 16, 10),
                    prefix_batches(store, TRAIN, 16, 10, one_per_user=True)):
        for batch in batches: assert batch.item_seq.max() < 1000 and batch.pos_item.max() < 1000


@pytest.mark.parametrize("options", [dict(), dict(bucketed=False), dict(one_per_user=True)])
@pytest.mark.parametrize("stage", [TRAIN, VALID])
def test_prefix_batches_hold_each_row_once(stage, options):
    store, max_len = make_store(1), 7
    expected = Counter((user, tuple(history[-max_len:]), target) for user, _, history, target in slow_rows(store, stage))
    batches = prefix_batches(store, stage, 16, max_len, seed=4, epoch=2, **options)
    for batch in batches:
        check_padding(batch)
        assert len(batch) <= 16 and batch.positions is None
    assert questions(batches) == expected
    assert sorted(torch.cat([b.row for b in batches]).tolist()) == list(range(len(store.rows(stage))))
    events = store.rows(stage)
    for batch in batches: assert torch.equal(batch.pos_item, torch.from_numpy(store.items[events[batch.row]]).long())


@pytest.mark.parametrize("make", [
    lambda store, **k: prefix_batches(store, TRAIN, 16, 10, **k),
    lambda store, **k: prefix_batches(store, TRAIN, 16, 10, bucketed=False, **k),
    lambda store, **k: prefix_batches(store, TRAIN, 16, 10, one_per_user=True, **k),
    lambda store, **k: position_batches(store, 16, 10, **k)])
def test_order_is_a_pure_function_of_seed_and_epoch(make):
    store = make_store(2)
    epoch = lambda **k: [b.item_seq.tolist() for b in make(store, **k)]
    np.random.seed(0); torch.manual_seed(0)
    first = epoch(seed=7, epoch=3)
    np.random.seed(1); torch.manual_seed(1)
    assert first == epoch(seed=7, epoch=3)
    assert first != epoch(seed=7, epoch=4) and first != epoch(seed=8, epoch=3)
    batches = make(store, seed=7, epoch=3)
    assert [b.item_seq.tolist() for b in batches[5:]] == first[5:]  # an interrupted epoch continues
    shares = [[b.item_seq.tolist() for b in batches[process::2]] for process in range(2)]
    assert sorted(map(str, shares[0] + shares[1])) == sorted(map(str, first)) and len(batches) == len(first)


def test_batches_are_shared_out_evenly_and_shuffled():
    store = make_store(5, n_users=200)
    batches = prefix_batches(store, TRAIN, 64, 50)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= 64 and max(sizes) - min(sizes) <= 1 and len(sizes) == -(-len(store.rows(TRAIN)) // 64)
    widths = [batch.item_seq.shape[1] for batch in batches]
    assert widths != sorted(widths)
    random = prefix_batches(store, TRAIN, 64, 50, bucketed=False)
    assert padding_share(batches) < .3 * padding_share(random) < padding_share(random, width=50)


@pytest.mark.parametrize("seed", range(40))
def test_one_per_user(seed):
    batch_size, longest = np.random.default_rng(seed).integers([1, 0], [41, 31]).tolist()
    store = make_store(seed, n_users=12, longest=longest)
    batches = prefix_batches(store, TRAIN, batch_size, 5, seed=seed, one_per_user=True)
    for batch in batches: assert len(batch.user.unique()) == len(batch) <= batch_size
    rows = [row for batch in batches for row in batch.row.tolist()]
    assert sorted(rows) == list(range(len(store.rows(TRAIN))))


@pytest.mark.parametrize("seed", range(20))
def test_most_per_user(seed):
    "The bound holds, users below it keep every row, and every row of the others has its turn."
    store = make_store(seed, n_users=12, longest=30)
    own = Counter(store.user[store.rows(TRAIN)].tolist())
    seen = set()
    for epoch in range(60):
        batches = prefix_batches(store, TRAIN, 8, 5, seed=seed, epoch=epoch, one_per_user=True, most_per_user=4)
        for batch in batches: assert len(batch.user.unique()) == len(batch) <= 8
        rows = [row for batch in batches for row in batch.row.tolist()]
        assert len(rows) == len(set(rows))
        assert Counter(store.user[store.rows(TRAIN)[rows]].tolist()) == {user: min(n, 4) for user, n in own.items()}
        assert len(batches) == max(-(-len(rows) // 8), min(4, max(own.values())))
        seen |= set(rows)
    assert seen == set(range(len(store.rows(TRAIN))))
    same = lambda **k: [b.row.tolist() for b in prefix_batches(store, TRAIN, 8, 5, seed=seed, one_per_user=True, **k)]
    assert same() == same(most_per_user=30)
    with pytest.raises(ValueError, match="most_per_user must be at least 1, got 0"): same(most_per_user=0)


@pytest.mark.parametrize("seed", range(60))
def test_position_batches(seed):
    n_targets, max_len, bucketed = np.random.default_rng(seed).integers([1, 1, 0], [61, 46, 2]).tolist()
    store = make_store(seed, n_users=12)
    batches = list(position_batches(store, n_targets, max_len, seed=seed, bucketed=bucketed))
    rows = slow_rows(store, TRAIN)
    asked = Counter()
    for batch in batches:
        check_padding(batch)
        width = batch.item_seq.shape[1]
        assert batch.n_targets == len(batch.pos_item) and width <= max_len
        for query, target in zip(batch.positions.tolist(), batch.pos_item.tolist()):
            row, column = divmod(query, width)
            asked[int(batch.user[row]), target] += 1
            assert column < batch.item_seq_len[row]
    assert asked == Counter((user, target) for user, _, _, target in rows)  # each target exactly once
    total = len(rows)
    assert len(batches) <= -(-total // n_targets)
    longest = max([len(history) for _, _, history, _ in rows], default=0)
    assert all(batch.n_targets <= n_targets + min(longest, max_len) for batch in batches)
    if total and n_targets >= max_len: assert len(batches) == -(-total // n_targets)
    # equal to prefix rows where the history fits, and never shorter than half of it where it does not
    prefixes = Counter((user, tuple(history), target) for user, _, history, target in rows)
    if longest <= max_len: assert questions(batches) == prefixes
    for (user, history, target), count in questions(batches).items():
        full = [h for u, _, h, t in rows if u == user and t == target and tuple(h[-len(history):]) == history]
        assert len(full) >= 1
        assert any(len(history) == len(h) or len(history) >= max_len // 2 + 1 for h in full)


def test_windows_by_hand():
    store = SequenceStore(np.arange(1, 10), np.array([0, 9]), np.zeros(9, np.int8), 9)
    windows = sorted(zip(*(values.tolist() for values in training_windows(store, 4))))
    assert windows == [(0, 4, 4), (2, 4, 2), (4, 4, 2)]
    windows = sorted(zip(*(values.tolist() for values in training_windows(store, 5))))
    assert windows == [(0, 5, 5), (3, 5, 3)]


def test_prefixes_equal_positions():
    store = make_store(9, n_users=60)
    assert questions(prefix_batches(store, TRAIN, 32, 50)) == questions(position_batches(store, 32, 50))


# A query as a row of its own

@pytest.mark.parametrize("seed", range(20))
def test_expand_prefixes_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, 50, n).tolist() for n in rng.integers(1, 9, 6)]
    batch = collate(histories, 10)
    batch.user, batch.row = torch.arange(6) + 100, torch.arange(6) + 200
    there = (~batch.item_pad_mask).flatten().nonzero()[:, 0]
    positions = there[torch.from_numpy(rng.integers(0, len(there), rng.integers(1, 12)))]  # in any order, some twice
    batch.pos_item = torch.from_numpy(rng.integers(1, 50, len(positions)))
    before = {name: getattr(batch, name).clone() for name in ("item_seq", "item_seq_len", "pos_item", "user", "row")}
    rows = expand_prefixes(batch, positions)
    places = [divmod(position, batch.item_seq.shape[1]) for position in positions.tolist()]
    expected = collate([histories[b][:column + 1] for b, column in places], 10)
    assert torch.equal(rows.item_seq, expected.item_seq) and torch.equal(rows.item_seq_len, expected.item_seq_len)
    check_padding(rows)
    assert torch.equal(rows.pos_item, batch.pos_item) and rows.positions is None and rows.n_targets == len(positions)
    assert rows.user.tolist() == [100 + b for b, _ in places] and rows.row.tolist() == [200 + b for b, _ in places]
    assert rows.item_seq.flatten()[rows.query_index()].tolist() == batch.item_seq.flatten()[positions].tolist()
    for name, x in before.items(): assert torch.equal(getattr(batch, name), x), f"{name} of the batch itself"


@pytest.mark.parametrize("max_len", [50, 7])
def test_expanded_windows_ask_the_same_questions(max_len):
    windows = list(position_batches(make_store(9, n_users=60), 32, max_len))
    assert questions([expand_prefixes(batch, batch.positions) for batch in windows]) == questions(windows)


def test_expanding_the_last_positions_changes_nothing():
    batch = prefix_batches(make_store(2), TRAIN, 16, 20)[0]
    assert expand_prefixes(batch) is batch
    again = expand_prefixes(batch, batch.query_index())
    for name in ("item_seq", "item_seq_len", "pos_item", "user", "row"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name


def test_targets_of_other_queries_are_not_kept():
    windows = position_batches(make_store(2), 32, 20)[0]
    assert expand_prefixes(windows, windows.positions[:3]).pos_item is None
    none = expand_prefixes(windows, windows.positions[:0])
    assert none.item_seq.shape == (0, 0) and len(none) == 0


def test_a_position_in_the_padding_is_refused():
    batch = collate([[1, 2, 3], [4, 5]], 10)
    with pytest.raises(ValueError, match="lies in the padding; ask where a history has an item"):
        expand_prefixes(batch, torch.tensor([0, 5]))
    assert len(expand_prefixes(batch, torch.tensor([0, 4]))) == 2


@pytest.mark.parametrize("seed", range(5))
def test_training_items_are_those_of_training_events(seed):
    store = make_store(seed, n_items=1000)
    expected = sorted({int(item) for item, stage in zip(store.items, store.stage) if stage == TRAIN})
    assert store.training_items.tolist() == expected and store.training_items.dtype == np.int64
    assert set(expected) < set(store.items.tolist()), "some item occurs in held-out events only"
    assert store.training_items is store.training_items  # counted once


@pytest.mark.parametrize("stage", [VALID, TEST])
def test_evaluation_batches_can_be_put_back(stage):
    store = make_store(6)
    events = store.rows(stage)
    target, user = np.zeros(len(events), int), np.zeros(len(events), int)
    widths = []
    for batch in evaluation_batches(store, stage, 8, 5):
        check_padding(batch)
        target[batch.row], user[batch.row] = batch.pos_item, batch.user
        widths.append(batch.item_seq.shape[1])
    np.testing.assert_array_equal(target, store.items[events])
    np.testing.assert_array_equal(user, store.user[events])
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("seed", range(60))
def test_collate_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, 10, length).tolist() for length in rng.integers(1, 9, rng.integers(0, 7))]
    max_len = int(rng.integers(1, 10))
    batch = collate(histories, max_len)
    width = max((min(len(h), max_len) for h in histories), default=0)
    assert tuple(batch.item_seq.shape) == (len(histories), width)
    assert batch.item_seq.tolist() == [h[-max_len:] + [0] * (width - len(h[-max_len:])) for h in histories]
    assert batch.item_seq_len.tolist() == [len(h[-max_len:]) for h in histories]
    assert batch.pos_item is None and batch.n_targets == len(histories)


@pytest.mark.parametrize("seed", range(30))
def test_flat_ranges(seed):
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, 50, (2, rng.integers(0, 9))) % [[50], [7]]
    row, member = flat_ranges(starts, lengths)
    expected = [(i, x) for i, (s, n) in enumerate(zip(starts, lengths)) for x in range(s, s + n)]
    assert list(zip(row.tolist(), member.tolist())) == expected


def test_pad_gather_of_nothing():
    assert pad_gather(np.arange(5), np.zeros(0, int), np.zeros(0, int)).shape == (0, 0)
    store = SequenceStore(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int8), 3)
    for batches in (prefix_batches(store, TRAIN, 4, 5), prefix_batches(store, TRAIN, 4, 5, one_per_user=True),
                    position_batches(store, 4, 5), evaluation_batches(store, TEST, 4, 5)):
        assert len(batches) == 0 and list(batches) == []


def test_batch_index_and_rows():
    item_seq = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]])
    batch = Batch(item_seq, torch.tensor([3, 1, 2]))
    assert batch.query_index().tolist() == [2, 3, 7] and batch.query_row().tolist() == [0, 1, 2]
    assert item_seq.flatten()[batch.query_index()].tolist() == [3, 4, 6]
    batch.positions = torch.tensor([0, 1, 6])
    assert batch.n_targets == 3 and batch.query_row().tolist() == [0, 0, 2]
    moved = batch.to("cpu")
    assert moved.user is None and torch.equal(moved.item_seq, item_seq) and len(moved) == 3


@pytest.mark.parametrize("piece_cost", [0, 10, 10**6, None])
def test_length_chunks_cover_the_batch(piece_cost):
    store = make_store(8)
    batch = prefix_batches(store, TRAIN, 40, 20, bucketed=False)[0]
    pieces = length_chunks(batch, piece_cost)
    assert sorted(torch.cat([rows for rows, _ in pieces]).tolist()) == list(range(len(batch)))
    if piece_cost == 0: assert len(pieces) == len(batch.item_seq_len.unique())
    if piece_cost == 10**6: assert len(pieces) == 1
    for rows, piece in pieces:
        check_padding(piece)
        assert torch.equal(piece.pos_item, batch.pos_item[rows])
        assert torch.equal(piece.item_seq, batch.item_seq[rows, :piece.item_seq.shape[1]])
    with pytest.raises(ValueError, match="one query per row"):
        length_chunks(position_batches(store, 40, 20)[0])


@pytest.mark.parametrize("piece_cost", [0, 1, 3, 10, 1000])
def test_best_cuts_are_the_cheapest_of_all(piece_cost):
    "Every way of cutting nine sorted rows is tried."
    rng = np.random.default_rng(piece_cost)
    for _ in range(10):
        lengths = np.sort(rng.integers(1, 12, 9))
        def cost(sizes):
            ends = np.cumsum(sizes)
            return sum(size * lengths[end - 1] + piece_cost for size, end in zip(sizes, ends))
        ways = []
        for pattern in range(2 ** 8):
            cuts = [place + 1 for place in range(8) if pattern >> place & 1]
            ways.append(np.diff([0, *cuts, 9]).tolist())
        found = best_cuts(lengths, piece_cost)
        assert sum(found) == 9 and cost(found) == min(map(cost, ways))
    assert best_cuts(np.array([], np.int64), piece_cost) == []


@pytest.mark.parametrize("change, message", [
    (dict(stage=np.array([0, 0, 0])), "stage has 3 entries for 4 events"),
    (dict(offsets=np.array([0, 3])), "offsets must rise from 0 to the number of events 4"),
    (dict(offsets=np.array([0, 5, 4])), "offsets must rise"),
    (dict(items=np.array([1, 0, 2, 3])), r"items must lie in 1..5 \(0 is padding\), got 0..3"),
    (dict(items=np.array([1, 6, 2, 3])), "got 1..6"),
    (dict(stage=np.array([0, 0, 2, 1])), "event 3 of user 1 has an earlier stage")])
def test_bad_stores_are_refused(change, message):
    good = dict(items=np.array([1, 2, 3, 4]), offsets=np.array([0, 2, 4]), stage=np.array([0, 1, 0, 1]), n_items=5)
    SequenceStore(**good)
    with pytest.raises(ValueError, match=message): SequenceStore(**{**good, **change})


def test_bad_sizes_are_refused():
    store = make_store(0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"): prefix_batches(store, TRAIN, 0, 5)
    with pytest.raises(ValueError, match="max_len must be at least 1"): position_batches(store, 4, 0)
    with pytest.raises(ValueError, match="history 1 is empty"): collate([[1], [], [2]], 5)


def test_figures():
    import matplotlib.pyplot as plt
    store = make_store(4, n_users=100)
    figure = plot_padding(store)
    assert len(figure.axes) == 2
    axes = plot_batch(position_batches(store, 32, 10)[0], "windows")
    assert axes.get_title(loc="left") or axes.get_title()
    plt.close("all")
