"Quotas, draws, pooling and ranking alone, each against a slow version; stored grids and how old they are."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import mmseqrec.experiments.cold_start as cold
from mmseqrec.artifacts import artifact_path, fingerprint, read_json
from mmseqrec.data.interactions import TEST, VALID, Interactions, leave_one_out
from mmseqrec.data.sequences import evaluation_batches
from mmseqrec.evaluation import Evaluation
from mmseqrec.experiments.cold_start import (GRIDS, LENGTHS, QUOTAS, TINY, ColdGrid, open_draw, pooled_metric, quota_of,
                                             quota_split, rank_alone, run_cold_tiny, store_cold, summarise_cold,
                                             train_cold, trained_only)
from mmseqrec.experiments.run import SYSTEMS, run_system
from mmseqrec.recommender import Recommender, encode_catalogue
from pages import page_functions


def shop(n_users=300, n_items=40, seed=0):
    "Random events, some items far more often than others."
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 25, n_users)
    share = 1 / np.arange(1, n_items + 1)
    user = np.repeat(np.arange(n_users, dtype=np.int32), lengths)
    item = 1 + rng.choice(n_items, lengths.sum(), p=share / share.sum()).astype(np.int32)
    names = ["[PAD]", *(f"i{n}" for n in range(n_items))]
    return Interactions(user, item, np.arange(len(user), dtype=np.int64), [f"u{n}" for n in range(n_users)], names, "x")


# Quotas

@pytest.mark.parametrize("seed", range(3))
def test_each_able_item_gets_a_quota_and_groups_are_alike(seed):
    events = shop(seed=seed)
    quota, able = quota_of(events, seed), leave_one_out(events).item_counts() > 20
    np.testing.assert_array_equal(quota >= 0, able)
    sizes = [(quota == q).sum() for q in QUOTAS]
    assert sum(sizes) == able.sum() > 8 and max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(quota, quota_of(events, seed))
    assert (quota != quota_of(events, seed + 1)).any()


def test_a_quota_leaves_so_many_training_events_and_all_test_events():
    events = shop()
    before, quota = leave_one_out(events), quota_of(events)
    split = quota_split(events, quota)
    counts, old = split.item_counts(), before.item_counts()
    for item in range(1, events.n_items + 1):
        free = quota[item] < 0 or quota[item] == QUOTAS[-1]
        assert counts[item] == (old[item] if free else quota[item])
        assert split.item_counts(TEST)[item] == before.item_counts(TEST)[item]
        assert split.item_counts(VALID)[item] == (before.item_counts(VALID)[item] if free else 0)
    assert set(split.cold_items) == set(np.flatnonzero(quota == 0))
    kept = {(events.user_tokens[u], t): s for u, t, s in zip(events.user, events.time, before.stage)}
    left = split.interactions
    assert all(kept[left.user_tokens[u], t] == s for u, t, s in zip(left.user, left.time, split.stage))


def test_which_events_stay_is_drawn():
    events = shop()
    quota = quota_of(events)
    one, same, other = (quota_split(events, quota, seed).interactions for seed in (0, 0, 1))
    assert np.array_equal(one.time, same.time) and not np.array_equal(one.time, other.time)


# Grids

def test_jobs_are_few_and_the_first_seeds_come_first():
    for name, grid in GRIDS.items():
        jobs = grid.jobs()
        assert len(jobs) == len(set(jobs)) and sum(SYSTEMS[job[1]].has_seed for job in jobs) <= 60
        first = [seed == grid.configs[draw].seeds[0] for draw, _, seed in jobs]
        assert first == sorted(first, reverse=True)
        assert all(seed == grid.configs[draw].seeds[0] for draw, system, seed in jobs if system in grid.once)
        assert {draw for draw, *_ in jobs} == set(range(len(grid.configs)))
    assert {config.new_items_seed for config in GRIDS["new"].configs} == {0, 1, 2}


@pytest.mark.parametrize("name", [name for name in GRIDS if (artifact_path("cold_start") / f"{name}.json").exists()])
def test_stored_grids_are_of_their_configuration_and_of_todays_code(name):
    record = read_json(artifact_path("cold_start", f"{name}.json"))
    assert record["fingerprint"] == fingerprint(record["inputs"])
    assert record["inputs"]["configs"] == json.loads(json.dumps([config.changes() for config in GRIDS[name].configs]))
    assert record["inputs"]["jobs"] == [list(job) for job in GRIDS[name].jobs()]
    for system, version in record["inputs"]["result_versions"].items(): assert SYSTEMS[system].result_version == version
    runs = record["result"]["runs"]
    assert [(run["draw"], run["system"], run["seed"]) for run in runs] == GRIDS[name].jobs()
    assert sum(run["seconds"] for run in runs) <= 180 * 60


def test_stored_rows_agree_with_the_stored_runs():
    "Pooled means are near the means of the draws: users differ a little in how many draws they are in."
    result = read_json(artifact_path("cold_start", "new.json"))["result"]
    for row in result["systems"]:
        runs = [run for run in result["runs"] if run["system"] == row["system"]]
        assert row["n_runs"] == (len(runs) or len(GRIDS["new"].configs))  # the ceiling: one a draw
        if not runs: continue
        for quota, kind in (("0", "new"), ("-1", "others")):
            for metric, found in row["by_quota"][quota].items():
                assert found["low"] <= found["value"] <= found["high"]
                assert abs(found["value"] - np.mean([run[kind][metric] for run in runs])) < .02


def test_a_tiny_grid_is_as_stored(tmp_path):
    kept = read_json(artifact_path("cold_start", "new.json"))["result"]["tiny"]
    live = run_cold_tiny(tmp_path)
    assert [run["system"] for run in live] == [run["system"] for run in kept]
    for one, other in zip(live, kept):
        for kind in ("new", "others"): assert one[kind] == pytest.approx(other[kind], abs=.02)


# Pooling, and ranking alone

def test_pooled_metric_is_the_slow_mean():
    rng = np.random.default_rng(0)
    users = [["a", "b", "c", "d"], ["d", "c", "x"]]
    groups, rows = [], []
    for names in users:
        user = rng.integers(0, len(names), 30)
        item = np.ones(30, int)
        groups.append([Evaluation(rng.integers(1, 20, 30).astype(float), item, user, item, None, 99) for _ in range(2)])
        rows.append(rng.random(30) < .6)
    found = pooled_metric(groups, users, rows, "recall@10")
    hits = {}
    for some, names, mask in zip(groups, users, rows):
        for row in np.flatnonzero(mask):
            hits.setdefault(names[some[0].user[row]], []).append(np.mean([each.ranks[row] <= 10 for each in some]))
    assert found["value"] == pytest.approx(np.mean([np.mean(values) for values in hits.values()]))
    assert found["n_events"] == sum(mask.sum() for mask in rows) and found["low"] <= found["value"] <= found["high"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Two draws of a tiny shop, some systems trained once."
    folder = tmp_path_factory.mktemp("cold")
    systems = ("popularity", "markov", "sasrec", "content_sasrec", "missrec_scratch", "mp4sr_content_scratch")
    grid = ColdGrid(tuple(replace(TINY.configs[0], new_items_seed=draw, systems=systems, epochs=1) for draw in range(2)))
    draws = [open_draw(grid, draw, folder, progress=False) for draw in range(2)]
    results = [(draw, run_system(*job, draws[draw].data, draws[draw].config, folder / str(draw), False))
               for draw, *job in grid.jobs()]
    return draws, results


def test_draws_differ_and_quotas_say_what_was_held_out(trained):
    draws, _ = trained
    for draw in draws:
        counts = draw.data.split.item_counts()
        np.testing.assert_array_equal(draw.quota == 0, counts == 0)
        assert set(draw.data.split.cold_items) <= set(np.flatnonzero(draw.quota == 0))
    assert (draws[0].quota != draws[1].quota).any()


def test_alone_is_a_ranking_without_the_new_items(trained):
    "Slowly: score everything, forget the columns of items without training events, count what is above."
    draws, results = trained
    for n, result in results:
        if n or result.system in ("popularity", "markov"): continue  # many ties
        data, store = draws[n].data, draws[n].data.store
        model = Recommender.from_pretrained(result.folder).set_catalogue(data.catalogue_of(result.system)).eval()
        known, expected = torch.from_numpy(store.training_items), []
        with torch.inference_mode():
            items = encode_catalogue(model)
            for batch in evaluation_batches(store, TEST, 64, model.max_len):
                scores = model.score(model.encode_sequence(batch), items)
                targets = store.items[store.rows(TEST)[batch.row.numpy()]]
                for row, item in zip(scores, targets):
                    if item in store.training_items: expected.append(1 + int((row[known - 1] > row[item - 1]).sum()))
        found, small = rank_alone(result, data), trained_only(data)
        assert small.n_items == len(known) == found.n_items and len(found.ranks) == len(expected)
        np.testing.assert_allclose(sorted(found.ranks), sorted(expected), atol=1)


def test_a_summary_has_the_ceiling_and_every_group(trained):
    draws, results = trained
    rows = summarise_cold(draws, results)
    assert [row["system"] for row in rows] == [*dict.fromkeys(result.system for _, result in results), "ceiling"]
    for row in rows:
        assert set(row["by_quota"]) == {"0", "-1"} and set(row["by_length"]) <= set(map(str, LENGTHS))
        assert ("alone" in row) == (row["system"] != "ceiling")
        n = sum(one["recall@10"]["n_events"] for one in row["by_quota"].values())
        assert n == sum(len(draw.data.store.rows(TEST)) for draw in draws)
        assert sum(one["recall@10"]["n_events"] for one in row["by_length"].values()) == row["by_quota"]["-1"]["recall@10"]["n_events"]
    by = {row["system"]: row for row in rows}
    assert by["sasrec"]["by_quota"]["0"]["recall@10"]["value"] == 0
    assert not any("alone" in row for row in summarise_cold(draws[:1], results[:2], alone=False))


def test_parts_train_everything_once_and_a_cut_store_keeps_what_is_there(tmp_path, monkeypatch):
    tiny = ColdGrid((replace(TINY.configs[0], systems=("popularity", "markov"), epochs=1),) * 2)
    monkeypatch.setitem(GRIDS, "new", tiny)
    monkeypatch.setattr(cold, "run_cold_tiny", lambda folder: [])
    train_cold("new", tmp_path, 0, 2, progress=False)
    some = store_cold("new", tmp_path, tmp_path / "some.json", cut=True)["result"]
    assert len(some["runs"]) == 2 and {row["system"] for row in some["systems"]} >= {"ceiling"}
    train_cold("new", tmp_path, 1, 2, progress=False)
    everything = store_cold("new", tmp_path, tmp_path / "all.json")
    assert len(everything["result"]["runs"]) == 4 and everything["result"]["n_new"] == [6, 6]
    assert everything["result"]["runs"] == read_json(tmp_path / "all.json")["result"]["runs"]


# What the page says and draws

of_page = page_functions("experiments.cold_start")

def made_up(new=.05, others=.2, alone=.21, low=.03):
    "A stored grid of one system and the ceiling; 1,000 items."
    def m(value, low): return {"value": value, "low": low, "high": value + .02, "n_events": 100}
    def row(system, value, low):
        return {"system": system, "title": system, "n_runs": 3,
                "by_length": {"1": dict.fromkeys(cold._METRICS, m(others, .1)), "4": dict.fromkeys(cold._METRICS, m(.3, .1))},
                "by_quota": {"0": {"recall@10": m(value, low), "recall@50": m(5 * value, 5 * low), "ndcg@10": m(value / 2, low / 2)},
                             "-1": dict.fromkeys(cold._METRICS, m(others, .1))}}
    return {"statistics": [{"n_items": 1000}], "runs": [{"system": "sasrec", "others": {"recall@10": others}}],
            "systems": [row("ceiling", .4, .3), row("sasrec", new, low) | {"alone": {"recall@10": alone}}]}

@pytest.mark.parametrize("changes, chance, cost", [({}, "yes", "yes"), (dict(new=.019), "NO", "yes"), (dict(low=.009), "NO", "yes"),
                                                   (dict(alone=.221), "yes", "NO")])
def test_verdicts_follow_the_numbers(changes, chance, cost):
    result = made_up(**changes)
    found = of_page.verdict(result["systems"][1], result)
    assert (found["twice chance"], found["small"]) == (chance, cost)

def test_the_table_has_the_ceiling_last_and_counts_in_chances():
    table = of_page.cold_table(made_up())
    assert table["system"].to_list() == ["sasrec", "ceiling"] and table["× chance"].to_list() == ["5.0", "40.0"]
    assert of_page.length_table(made_up()).columns == ["system", "1 to 3", "4 and more"]
    ax = of_page.plot_cold(made_up(), title="t")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sasrec", "ceiling"]
