"Full ranking against loops over items; chunks, batches and their order change nothing."
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mmseqrec.core import derive_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore, collate
from mmseqrec.evaluation import (Evaluation, compare_evaluations, evaluate, history_groups, plot_slices, popularity_groups,
                                 quantile_groups, rank_batch, slice_table, user_means)
from mmseqrec.blocks.towers import take_positions
from mmseqrec.recommender import Items, Recommender
from small_world import SYSTEMS, V, build, make_catalogue, make_store


class Table(Recommender):
    "Scores looked up by last item, rounded so that many are tied."
    max_len = 3

    def __init__(self, n_items=V, levels=4):
        super().__init__()
        table = torch.rand(n_items + 1, n_items + 1, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", (table * levels).round())

    def encode_items(self, ids=None):
        ids = torch.arange(1, len(self.table)) if ids is None else ids
        return Items(torch.eye(len(self.table))[ids][:, None], ids)

    def encode_sequence(self, batch, positions=None):
        return take_positions(self.table[batch.item_seq], batch, positions)[:, None]


def slow_rank(scores, target, excluded=()):
    "Rank of `target` in `{item: score}`: one plus the better ones plus half of the tied others."
    others = {item: s for item, s in scores.items() if item != target and item not in excluded}
    return 1 + sum(s > scores[target] for s in others.values()) + sum(s == scores[target] for s in others.values()) / 2


def slow_evaluation(model, store, stage, exclude_seen):
    "`(user, target, history length, rank)` of every event of a stage that has a history, one at a time."
    rows = []
    for user in range(len(store.offsets) - 1):
        events = range(store.offsets[user], store.offsets[user + 1])
        for place, event in enumerate(events):
            if store.stage[event] != stage or place == 0: continue
            history, target = [int(store.items[e]) for e in events[:place]], int(store.items[event])
            batch = collate([history], model.max_len)
            row = model.score(model.encode_sequence(batch), model.encode_items())[0]
            scores = {item: float(score) for item, score in enumerate(row.float(), 1)}
            rows.append((user, target, place, slow_rank(scores, target, set(history) if exclude_seen else ())))
    return np.array(rows)


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("stage", [VALID, TEST])
def test_ranks_equal_loops_with_many_ties(stage, exclude_seen):
    store, model = make_store(40, seed=3), Table().set_catalogue(make_catalogue())
    slow, fast = slow_evaluation(model, store, stage, exclude_seen), evaluate(model, store, stage, exclude_seen)
    for name, column in (("user", 0), ("pos_item", 1), ("history_length", 2), ("ranks", 3)):
        np.testing.assert_array_equal(getattr(fast, name), slow[:, column], name)
    assert len(slow) > 15 and (slow[:, 3] % 1 == .5).any() and (slow[:, 2] > model.max_len).any()
    assert fast.n_items == V and fast.ranks.dtype == np.float64


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_ranked_as_loops_do(name, exclude_seen):
    model, store = build(name).double(), make_store()
    with torch.no_grad(): slow = slow_evaluation(model, store, TEST, exclude_seen)
    np.testing.assert_array_equal(evaluate(model, store, TEST, exclude_seen).ranks, slow[:, 3])


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_batches_and_chunks_change_nothing(exclude_seen):
    store = make_store(60, seed=1)
    for model in (Table().set_catalogue(make_catalogue()), build("content_both").double()):
        whole = evaluate(model, store, TEST, exclude_seen)
        for options in ({"batch_size": 1}, {"batch_size": 7}, {"max_elements": 1}, {"batch_size": 11, "max_elements": 3 * V + 1}):
            again = evaluate(model, store, TEST, exclude_seen, **options)
            np.testing.assert_array_equal(again.ranks, whole.ranks)
            np.testing.assert_array_equal(again.top_items, whole.top_items)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_top_items_are_what_recommend_says(exclude_seen):
    model, store = build("content_both"), make_store()
    result, tokens = evaluate(model, store, TEST, exclude_seen, n_top=4), model.catalogue.item_tokens
    for row, event in enumerate(store.rows(TEST)):
        history = store.items[store.offsets[store.user[event]]:event]
        answer, = model.recommend([[tokens[i] for i in history]], k=V, exclude_seen=exclude_seen)
        listed = [tokens[i] for i in result.top_items[row]]
        if not exclude_seen: assert listed == answer.items[:4]
        else:  # the target stays a candidate even if it was taken before
            target = tokens[result.pos_item[row]]
            assert [t for t in listed if t != target] == [t for t in answer.items if t != target][:4 - (target in listed)]
        hit = result.pos_item[row] in result.top_items[row]
        assert hit == (result.ranks[row] <= 4)
    assert evaluate(model, store, n_top=100).top_items.shape[1] == V and evaluate(model, store, n_top=0).top_items.shape[1] == 0


def test_a_repeated_target_is_never_excluded():
    store = SequenceStore(np.array([1, 2, 1], np.int32), np.array([0, 3]), np.array([TRAIN, TRAIN, TEST], np.int8), V)
    model = Table(levels=1000).set_catalogue(make_catalogue())
    row = model.table[2, 1:]
    others = [i for i in range(1, V + 1) if i not in (1, 2)]
    result = evaluate(model, store, exclude_seen=True)
    assert result.ranks.tolist() == [1 + sum(row[i - 1] > row[0] for i in others).item()]
    assert 2 not in result.top_items


def test_the_best_possible_and_the_worst():
    store = make_store()
    class Oracle(Table):
        def score(self, sequence, items): return self.sign * (items.ids == self.target.pop(0)[:, None]).float()
    model = Oracle().set_catalogue(make_catalogue())
    from mmseqrec.data.sequences import evaluation_batches
    for model.sign, rank in ((1, 1), (-1, V)):
        model.target = [batch.pos_item for batch in evaluation_batches(store, TEST, 512, 3)]
        assert (evaluate(model, store).ranks == rank).all()
    model.sign, model.target = 0, [batch.pos_item for batch in evaluation_batches(store, TEST, 512, 3)]
    assert (evaluate(model, store).ranks == (V + 1) / 2).all(), "who knows nothing stands in the middle"


def test_rank_batch_by_hand():
    model = Table().set_catalogue(make_catalogue())
    batch = collate([[1], [2, 3]], 3)
    batch.pos_item = torch.tensor([4, 5])
    items, table = model.encode_items(), model.table
    seen = torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3])
    ranks, top = rank_batch(model, items, batch, seen, n_top=3, max_elements=V)
    for place, (last, target, history) in enumerate([(1, 4, {1}), (3, 5, {2, 3})]):
        scores = {i: table[last, i].item() for i in range(1, V + 1)}
        assert ranks[place].item() == slow_rank(scores, target, history)
        assert not history & set(top[place].tolist())


def test_nothing_to_rank_and_other_items_are_errors():
    model = build("sasrec")
    with pytest.raises(ValueError, match="nothing to evaluate"): evaluate(model, make_store(held_out=False))
    with pytest.raises(ValueError, match="events know 9 items, the recommender's catalogue 12"):
        evaluate(model, make_store(n_items=9))
    with pytest.raises(ValueError, match="recommender's catalogue none"): evaluate(Table(), make_store())
    model.item_emb.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="NaN"): evaluate(model, make_store())


# Numbers

def some_evaluation(R=60, n_users=25, n_items=40, seed=0):
    rng = np.random.default_rng(seed)
    user = np.sort(rng.integers(0, n_users, R))
    ranks = rng.integers(1, n_items + 1, R) + rng.choice([0, .5], R)
    return Evaluation(ranks, rng.integers(1, n_items + 1, R), user, rng.integers(1, 9, R),
                      rng.integers(1, n_items + 1, (R, 10)), n_items)


def test_metrics_equal_loops():
    result = some_evaluation()
    slow = {"recall@3": [float(r <= 3) for r in result.ranks], "mrr": [1 / r for r in result.ranks],
            "ndcg@7": [1 / np.log2(r + 1) if r <= 7 else 0. for r in result.ranks],
            "mrr@5": [1 / r if r <= 5 else 0. for r in result.ranks]}
    for name, values in slow.items(): np.testing.assert_allclose(result.values(name), values, rtol=0, atol=1e-12)
    table = result.metrics(ks=(3, 7))
    assert list(table) == ["recall@3", "ndcg@3", "recall@7", "ndcg@7", "mrr"]
    for name in table:  # every user counts once
        means = [np.mean([v for v, u in zip(result.values(name), result.user) if u == user]) for user in set(result.user)]
        assert table[name] == pytest.approx(sum(means) / len(means), abs=1e-12)


@pytest.mark.parametrize("name", ["recall", "ndcg@", "hits@10", "recall@ten", "recall@-1", "precision@5", ""])
def test_unknown_metrics_are_named(name):
    with pytest.raises(ValueError, match="unknown metric"): some_evaluation().values(name)


def test_users_not_rows_are_resampled():
    "One user with most of the rows counts once: the interval equals one over user means, drawn with loops."
    result = some_evaluation()
    values, means = result.values("ndcg@10"), []
    for user in sorted(set(result.user.tolist())):
        own = [v for v, u in zip(values, result.user) if u == user]
        means.append(sum(own) / len(own))
    np.testing.assert_allclose(user_means(values, result.user), means, rtol=0, atol=1e-12)
    rng = np.random.default_rng(derive_seed(3, "bootstrap"))
    draws = [np.mean([means[i] for i in row]) for row in rng.integers(0, len(means), (1000, len(means)))]
    np.testing.assert_allclose(result.interval("ndcg@10", seed=3), np.quantile(draws, [.025, .975]), rtol=0, atol=1e-9)
    order = np.random.default_rng(0).permutation(len(values))
    np.testing.assert_allclose(user_means(values[order], result.user[order]), means, rtol=0, atol=1e-12)


def test_clustering_widens_the_interval_where_rows_repeat():
    "Ten rows a user that say the same are one observation, not ten."
    hits, user = np.random.default_rng(0).integers(0, 2, 50), np.repeat(np.arange(50), 10)
    ranks = np.where(np.repeat(hits, 10) == 1, 1., 100.)
    clustered = Evaluation(ranks, np.ones(500, int), user, user, np.zeros((500, 0), int), 100).interval("recall@10")
    apart = Evaluation(ranks, np.ones(500, int), np.arange(500), user, np.zeros((500, 0), int), 100).interval("recall@10")
    ratio = (clustered[1] - clustered[0]) / (apart[1] - apart[0])
    assert 2.5 < ratio < 4  # the square root of ten


# Slices

@pytest.mark.parametrize("n_groups", [1, 2, 3, 7])
@pytest.mark.parametrize("counts", [np.zeros(20, int), np.arange(31), np.r_[np.zeros(50, int), np.arange(9)],
                                    np.random.default_rng(0).zipf(1.5, 400), np.array([7])], ids=["tied", "even", "half", "tail", "one"])
def test_groups_hold_each_row_once(counts, n_groups):
    groups = quantile_groups(counts, n_groups, "events")
    assert np.array_equal(np.sum(list(groups.values()), 0), np.ones(len(counts)))
    assert 1 <= len(groups) <= n_groups and all(rows.dtype == bool and rows.any() for rows in groups.values())
    previous = -1
    for name, rows in groups.items():  # rising, without overlap, named for what they hold
        assert counts[rows].min() > previous
        previous = counts[rows].max()
        assert name == f"{counts[rows].min():,} to {previous:,} events"
    if len(set(counts)) == len(counts) >= n_groups: assert np.ptp([rows.sum() for rows in groups.values()]) <= 1


def test_slices_add_up():
    "One row a user: the mean of the slices, weighted by rows, is the mean of all."
    result, item_counts = some_evaluation(400, 90), np.r_[0, np.random.default_rng(1).zipf(1.6, 40)]
    result = replace(result, user=np.arange(400))
    for groups in (popularity_groups(result, item_counts), history_groups(result, 4)):
        table = slice_table(result, groups, "recall@10")
        assert sum(part["rows"] for part in table.values()) == 400
        total = sum(part["rows"] * part["value"] for part in table.values()) / 400
        assert total == pytest.approx(result.metrics(ks=(10,))["recall@10"], abs=1e-12)
        for name, rows in groups.items():
            assert table[name]["value"] == pytest.approx(np.mean([r <= 10 for r in result.ranks[rows]]), abs=1e-12)
            assert table[name]["low"] <= table[name]["high"]
    for name, rows in popularity_groups(result, item_counts).items():
        low, high = (int(x.replace(",", "")) for x in name.split(" training")[0].split(" to "))
        for row in np.flatnonzero(rows): assert low <= item_counts[result.pos_item[row]] <= high


def test_numbers_lie_in_their_own_intervals():
    "Users with many rows pull the mean of rows away from the mean of users: value, interval and test must be of one kind."
    user = np.r_[np.zeros(90, int), np.arange(1, 11)]
    ranks = np.r_[np.ones(90), np.full(10, 100.)]
    result = Evaluation(ranks, np.ones(100, int), user, np.ones(100, int), np.zeros((100, 0), int), 100)
    part, = slice_table(result, {"all": np.ones(100, bool)}, "recall@10").values()
    assert part["low"] <= part["value"] <= part["high"]
    low, high = result.interval("recall@10")
    assert low <= result.metrics(ks=(10,))["recall@10"] <= high
    other = replace(result, ranks=result.ranks[::-1].copy())
    assert compare_evaluations(result, other, "recall@10")["difference"] == pytest.approx(
        result.metrics(ks=(10,))["recall@10"] - other.metrics(ks=(10,))["recall@10"], abs=1e-12)


def test_coverage_and_novelty():
    result, counts = some_evaluation(), np.r_[0, np.arange(40)]
    found = result.beyond_accuracy(counts)
    assert found["coverage"] == len(set(result.top_items.ravel().tolist())) / 40
    surprise = [-np.log2((counts[i] + 1) / (counts[1:].sum() + 40)) for i in result.top_items.ravel()]
    assert found["novelty"] == pytest.approx(np.mean(surprise), abs=1e-9)


# Comparisons

def better(result, gain): return replace(result, ranks=np.maximum(1, result.ranks - gain))


def test_compare_pairs_users():
    result = some_evaluation(200, 60)
    up = better(result, 8)
    found = compare_evaluations(up, result, "mrr")
    a, b = (user_means(x.values("mrr"), x.user) for x in (up, result))
    assert found["difference"] == pytest.approx((a - b).mean(), abs=1e-12) and found["low"] > 0 and found["p_value"] < .01
    back = compare_evaluations(result, up, "mrr")
    assert back["difference"] == -found["difference"] and back["p_value"] == pytest.approx(found["p_value"], abs=.01)
    assert compare_evaluations(result, result)["p_value"] == 1


def test_compare_refuses_other_rows():
    result = some_evaluation()
    for change in ({"pos_item": result.pos_item + 1}, {"user": result.user + 1}, {"pos_item": result.pos_item[:-1]}):
        with pytest.raises(ValueError, match="different rows"): compare_evaluations(result, replace(result, **change))


def test_figure():
    result = some_evaluation(300, 80)
    table = slice_table(result, history_groups(result))
    ax = plot_slices({"a": table, "b": table}, "T", "NDCG@10", {"a": "black"})
    assert ax.get_title() == "T" and [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert len(ax.get_xticklabels()) == len(table)
    _, own = plt.subplots()
    assert plot_slices({"a": table}, ax=own) is own
    constant = replace(result, ranks=np.full(300, 2.))  # 0.63 everywhere: an interval of no width, up to the last digit
    plot_slices({"a": slice_table(constant, history_groups(constant))})
    plt.close("all")
