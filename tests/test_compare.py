"The comparison: jobs, parts and pairs, the paired interval against SciPy, what is stored, and sentences that say no more."
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import stats

import mmseqrec.experiments.compare as compare
from mmseqrec.artifacts import artifact_path, fingerprint, read_json
from mmseqrec.experiments.compare import (COMPARED, COMPARISONS, KEPT_METRICS, READERS, asked_pairs, outdated,
                                          paired_over_seeds, plot_differences, run_grid, run_tiny, seed_first_jobs,
                                          store_comparison, store_readers, stored_grid, tiny_config, train_part)
from mmseqrec.config import ALL
from mmseqrec.experiments.run import SYSTEMS, RunData, difference, run_system
from small_shop import quick_config
from small_world import make_catalogue, make_store
from pages import page_functions

of_page = page_functions("experiments.compare")
comparison_table, plain_answer, plot_comparison, plot_costs, under_twice_popularity = of_page.comparison_table, of_page.plain_answer, of_page.plot_comparison, of_page.plot_costs, of_page.under_twice_popularity

QUICK = quick_config(dict(interactions="small/events.csv", items="small/items.csv"), "shipped", epochs=1, pretrain_epochs=1, seeds=(0, 1),
                     systems=("popularity", "markov", "sasrec", "missrec_scratch", "missrec"))


@pytest.fixture(scope="module")
def data(): return RunData("", None, None, make_store(40), None, make_catalogue(), {"n_users": 40}, keyword_catalogue=make_catalogue())

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("grid")

@pytest.fixture(scope="module")
def grid(data, folder): return run_grid(QUICK, data, folder, progress=False)

@pytest.fixture(scope="module", params=COMPARISONS)
def stored(request): return request.param, read_json(artifact_path("compare", f"{request.param}.json"))

def rows(**values): return [{"system": name, "seed": s, "ndcg@10": v} for name, row in values.items() for s, v in row.items()]


# Grids and questions

def test_every_system_is_compared_in_all_its_modes():
    modes, later = {"mp4sr_content", "unisrec_ids", "missrec_ids"}, {"itemknn", "ease", "content_knn"}  # than the stored grids
    names = {*ALL, *modes} - later
    assert set(COMPARED) == {*names, *(f"{name}_scratch" for name in names if SYSTEMS[name].pretrain)}
    for config in COMPARISONS.values():
        assert len(set(config.systems)) == len(config.systems) and set(config.systems) <= set(COMPARED) and config.seeds == (0, 1, 2)

def test_jobs_are_few_and_the_first_seed_comes_first():
    for config in COMPARISONS.values():
        jobs = seed_first_jobs(config)
        assert len(jobs) == len(set(jobs)) <= 60 and [seed for _, seed in jobs] == sorted(seed for _, seed in jobs)
        assert {name for name, seed in jobs if seed == 0} == set(config.systems)
        assert {job[0] for job in jobs if job[1]} == {name for name in config.systems if SYSTEMS[name].has_seed}
        pretrained = [sum(SYSTEMS[name].pretrain is not None for name, _ in jobs[part::2]) for part in (0, 1)]
        assert abs(pretrained[0] - pretrained[1]) <= 3, "two processes have about the same to do"

def test_settings_are_the_same_for_all_and_input_is_named_without_a_machine():
    kitchen, scientific, films = COMPARISONS.values()
    assert (kitchen.lr, kitchen.batch_size, kitchen.patience, kitchen.hidden_size) == (1e-3, 256, 10, 64)
    same = {"interactions", "items", "text_features", "image_features", "systems", "patience", "new_items"}
    assert {k for k, v in kitchen.to_dict().items() if scientific.to_dict()[k] != v} == same
    shorter = {"max_len", "batch_size", "lr", "epochs", "pretrain_epochs"}
    assert {k for k, v in kitchen.to_dict().items() if films.to_dict()[k] != v} == same | shorter
    for config in (scientific, films):
        assert not any(SYSTEMS[name].reads_keywords for name in config.systems)
        for path in (config.interactions, config.items, config.text_features, config.image_features):
            assert path.count("/") == 1 and not path.startswith(("/", ".", "~"))

def test_pairs():
    pairs = asked_pairs(COMPARED)
    assert set(pairs["pre-training"]) == {(name, f"{name}_scratch") for name in COMPARED if SYSTEMS[name].pretrain}
    assert ("mp4sr", "mp4sr_content") in pairs["item vectors"] and ("missrec_ids_scratch", "missrec_scratch") in pairs["item vectors"]
    assert len(pairs["markov"]) == len(pairs["content_sasrec"]) == len(COMPARED) - 1
    assert asked_pairs(("sasrec", "missrec")) == {"markov": [], "content_sasrec": [], "pre-training": [], "item vectors": []}


# Paired

@pytest.mark.parametrize("n", [2, 3, 10, 11, 12, 40])
def test_interval_over_seeds_is_students(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(.1, .01, n), rng.normal(.09, .01, n)
    found = paired_over_seeds(rows(a=dict(enumerate(a)), b=dict(enumerate(b))), "a", "b")
    expected = stats.ttest_rel(a, b).confidence_interval(.95)
    assert found["low"] == pytest.approx(expected.low, abs=1e-12) and found["high"] == pytest.approx(expected.high, abs=1e-12)
    assert found["difference"] == pytest.approx((a - b).mean()) and found["wins"] == (a > b).sum() and found["n"] == n

def test_only_seeds_of_both_are_compared():
    found = paired_over_seeds(rows(a={0: .2, 1: .3, 2: .9}, b={1: .1, 0: .1, 7: .5}), "a", "b")
    np.testing.assert_allclose(found["differences"], [.1, .2])
    with pytest.raises(ValueError, match="a and b have 1 seeds in common"): paired_over_seeds(rows(a={0: 1}, b={0: 1}), "a", "b")

def test_who_only_counts_is_the_same_with_every_seed():
    found = paired_over_seeds(rows(sasrec={3: .2, 4: .4}, markov={3: .1}), "sasrec", "markov")
    np.testing.assert_allclose(found["differences"], [.1, .3])
    with pytest.raises(ValueError, match="1 seeds"): paired_over_seeds(rows(markov={0: .2}, popularity={0: .1}), "markov", "popularity")
    with pytest.raises(ValueError, match="0 seeds"): paired_over_seeds(rows(sasrec={0: .2, 1: .1}), "sasrec", "markov")


# A grid

def test_a_grid_is_what_the_trainings_gave(grid, data, folder):
    assert [(run["system"], run["seed"]) for run in grid["runs"]] == seed_first_jobs(QUICK)
    of = lambda name: [run_system(name, seed, data, QUICK, folder, progress=False) for seed in (QUICK.seeds if SYSTEMS[name].has_seed else (0,))]
    for row in grid["systems"]:
        results = of(row["system"])
        mean = np.mean([r.evaluation.metrics()["ndcg@10"] for r in results])
        assert row["ndcg@10"]["value"] == pytest.approx(mean) and row["n_seeds"] == len(results)
        assert row["ndcg@10"]["low"] <= mean <= row["ndcg@10"]["high"]
    assert grid["users"]["missrec - missrec_scratch"]["recall@10"] == difference(of("missrec"), of("missrec_scratch"), "recall@10")
    assert grid["users"]["sasrec - markov"]["ndcg@10"] == difference(of("sasrec"), of("markov"), "ndcg@10")
    for run in grid["runs"]:
        assert all(0 <= run[metric] <= 1 for metric in KEPT_METRICS) and run["recall@11"] >= run["recall@10"]
        assert len(run["valid"]) > run["kept"] and bool(run["pretraining"]) == (run["system"] == "missrec")

def test_a_grid_that_stands_is_read_not_trained(grid, data, folder, monkeypatch):
    monkeypatch.setattr("mmseqrec.experiments.run.fit", lambda *_, **__: 1 / 0)
    assert run_grid(QUICK, data, folder, progress=False) == grid

def test_a_difference_pairs_the_seeds_that_both_have(data, folder, grid):
    jobs = [("sasrec", 0), ("sasrec", 1), ("missrec", 1), ("markov", 0)]
    found = run_grid(QUICK, data, folder, jobs, {"a": ("sasrec", "missrec"), "b": ("sasrec", "markov"), "c": ("sasrec", "popularity")}, False)
    assert set(found["users"]) == {"a", "b"}
    value = {(run["system"], run["seed"]): run["ndcg@10"] for run in grid["runs"]}
    assert found["users"]["a"]["ndcg@10"]["difference"] == pytest.approx(value["sasrec", 1] - value["missrec", 1], abs=2e-6)
    assert found["users"]["b"]["ndcg@10"]["difference"] == pytest.approx(
        (value["sasrec", 0] + value["sasrec", 1]) / 2 - value["markov", 0], abs=2e-6)

@pytest.fixture
def prepared(data, monkeypatch):
    "A grid of the small world under a name of its own; which folders data were prepared in."
    asked = []
    monkeypatch.setattr(compare, "prepare_data", lambda config, folder, progress=True: asked.append(str(folder)) or data)
    monkeypatch.setitem(COMPARISONS, "small", replace(QUICK, interactions="small/events.csv", items="small/items.csv"))
    monkeypatch.setattr(compare, "run_tiny", lambda config, folder: {"runs": []})
    return asked

def test_parts_are_disjoint_and_together_the_grid(prepared, tmp_path):
    done = []
    for part in (0, 1):
        train_part("small", tmp_path, part, 2, progress=False)
        done.append({path.name for path in (tmp_path / "models").iterdir()} - set().union(*done))
    assert len(done[0]) == 4 and len(done[1]) == 4 and len(prepared) == len(set(prepared)) == 2, "each in a folder of its own"
    record = store_comparison("small", tmp_path, tmp_path / "small.json")
    assert record["result"]["note"].startswith("input not redistributable") and record["result"]["statistics"] == {"n_users": 40}
    assert set(record["result"]) == {"runs", "systems", "users", "ceiling", "statistics", "tiny", "note"}
    assert record["result"]["ceiling"] is None, "not a marketplace"
    assert record["fingerprint"] == fingerprint(record["inputs"]) and record["inputs"]["result_versions"]["sasrec"] == SYSTEMS["sasrec"].result_version
    assert len(record["result"]["runs"]) == 8 and outdated(record) == []

def test_an_interrupted_grid_can_be_cut(prepared, tmp_path, monkeypatch):
    train_part("small", tmp_path, 0, 2, progress=False)
    monkeypatch.setattr("mmseqrec.experiments.run.fit", lambda *_, **__: 1 / 0)
    record = store_comparison("small", tmp_path, tmp_path / "small.json", cut=True)
    assert [(run["system"], run["seed"]) for run in record["result"]["runs"]] == seed_first_jobs(COMPARISONS["small"])[0::2]
    with pytest.raises(ZeroDivisionError): store_comparison("small", tmp_path, tmp_path / "other.json")

def test_a_stored_grid_is_loaded_and_knows_what_is_outdated(prepared, tmp_path, monkeypatch):
    first = stored_grid(tmp_path / "g.json", tmp_path, QUICK, [("markov", 0), ("sasrec", 0)])
    with monkeypatch.context() as patch:
        patch.setattr(compare, "run_grid", lambda *_: 1 / 0)
        assert stored_grid(tmp_path / "g.json", tmp_path, QUICK, [("markov", 0), ("sasrec", 0)]) == first
        with pytest.raises(ZeroDivisionError): stored_grid(tmp_path / "g.json", tmp_path, QUICK, [("markov", 0)])
        patch.setitem(SYSTEMS, "sasrec", replace(SYSTEMS["sasrec"], result_version=99))
        assert outdated(first) == ["sasrec"]
        with pytest.raises(ZeroDivisionError): stored_grid(tmp_path / "g.json", tmp_path, QUICK, [("markov", 0), ("sasrec", 0)])
    old = {"inputs": {"config": {"systems": ["markov", "sasrec"]}, "result_version": 1}}
    assert outdated(old) == [name for name in ("markov", "sasrec") if SYSTEMS[name].result_version != 1]


# What is said and drawn

def made_up():
    "Three systems and Markov: better with every seed, better for customers only, worse."
    value = lambda v: {"value": v, "low": v - .01, "high": v + .01, "spread": None}
    interval = lambda low, high: {"ndcg@10": {"low": low, "high": high}}
    seeds = dict(sasrec=(.2, .21, .22), missrec=(.1, .3, .15), gru4rec=(.01, .02, .01), bert4rec=(.1, .1, .11))
    runs = rows(markov={0: .1}, **{name: dict(enumerate(each)) for name, each in seeds.items()})
    recall = dict(popularity=.1, markov=.3, sasrec=.4, missrec=.21, gru4rec=.19, bert4rec=.2)
    return {"result": {"runs": runs, "users": {"sasrec - markov": interval(.05, .2), "missrec - markov": interval(.01, .2),
                                               "gru4rec - markov": interval(-.2, -.01), "bert4rec - markov": interval(-.1, .1)},
                       "systems": [{"system": name, "title": SYSTEMS[name].title, "n_seeds": 3, "n_parameters": 1000 * (name not in ("popularity", "markov")),
                                    "seconds": 2., **{m: value(v) for m in KEPT_METRICS[:4]}} for name, v in recall.items()]}}

def test_answers_say_what_the_intervals_say():
    pairs = [(name, "markov") for name in ("sasrec", "missrec", "gru4rec", "bert4rec")]
    assert plain_answer(made_up(), pairs) == {"ahead": ["SASRec over IDs *", "MISSRec"], "behind": ["GRU4Rec *"], "cannot tell": ["BERT4Rec"]}
    assert under_twice_popularity(made_up()) == ["GRU4Rec"]
    one_seed = made_up()
    one_seed["result"]["runs"] = [run for run in one_seed["result"]["runs"] if run["seed"] == 0]
    assert plain_answer(one_seed, pairs)["ahead"] == ["SASRec over IDs", "MISSRec"]

def test_the_table_is_sorted_and_counts_in_popularities():
    table = comparison_table(made_up(), "recall@10")
    assert isinstance(table, pl.DataFrame) and table["system"].to_list()[0] == "SASRec over IDs"
    assert table["× popularity"].to_list() == ["4.0", "3.0", "2.1", "2.0", "1.9", "1.0"]
    without = made_up()
    without["result"]["systems"] = without["result"]["systems"][1:]
    assert set(comparison_table(without)["× popularity"]) == {""}

def test_plots():
    ax = plot_comparison(made_up(), title="t")
    assert [label.get_text() for label in ax.get_yticklabels()][0] == "SASRec over IDs" and ax.get_xlabel() == "NDCG@10"
    filled = {line.get_markerfacecolor() for line in ax.lines if line.get_markersize() == 7}
    assert "white" in filled and SYSTEMS["missrec"].color in filled
    left, right = plot_costs(made_up()).axes
    assert [bar.get_width() for bar in left.patches] == [2.] * 4 and [bar.get_width() for bar in right.patches] == [1.] * 4
    ax = plot_differences({"a": paired_over_seeds(rows(a={0: .2, 1: .3}, b={0: .1, 1: .1}), "a", "b")}, "t", "x")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a (2 of 2)"] and ax.get_xlabel() == "x"


# The stored grids

def test_stored_grids_are_of_their_configuration(stored):
    name, record = stored
    config, jobs = COMPARISONS[name], seed_first_jobs(COMPARISONS[name])
    done = [(run["system"], run["seed"]) for run in record["result"]["runs"]]
    assert record["fingerprint"] == fingerprint(record["inputs"]) and [tuple(job) for job in record["inputs"]["jobs"]] == done
    systems = tuple(dict.fromkeys(system for system, _ in done))
    asked, found = replace(config, systems=systems), record["inputs"]["config"]
    if name != "ml1m": assert found == json.loads(json.dumps(asked.changes()))
    else:  # from before settings at their default were left out; they do not read the marketplace, whose size was another
        now = json.loads(json.dumps(asked.to_dict()))
        assert {setting for setting in found if found[setting] != now[setting]} == {"n_users", "n_items"}
    assert done == jobs
    if name != "ml1m": assert outdated(record) == [], "computed by an older version of the code: compute it anew"

def test_stored_grids_hold_aggregates_only(stored):
    name, record = stored
    assert set(record["result"]) - {"ceiling"} == {"runs", "systems", "users", "statistics", "tiny", "note"}
    assert bool(record["result"].get("ceiling")) == (name == "marketplace")
    assert record["result"]["note"].startswith("input not redistributable") == (name != "marketplace")
    for run in record["result"]["runs"]:
        assert set(run) == {"system", "seed", *KEPT_METRICS, "valid", "pretraining", "kept", "seconds", "n_parameters"}

def test_stored_differences_agree_with_stored_runs(stored):
    result = stored[1]["result"]
    pairs = {pair for some in asked_pairs([row["system"] for row in result["systems"]]).values() for pair in some}
    assert set(result["users"]) == {f"{first} - {second}" for first, second in pairs}
    for first, second in pairs:
        try: over_seeds = paired_over_seeds(result["runs"], first, second)
        except ValueError: continue  # one seed, or two that only count
        found = result["users"][f"{first} - {second}"]["ndcg@10"]
        assert found["difference"] == pytest.approx(over_seeds["difference"], abs=2e-6) and found["low"] <= found["high"]

@pytest.mark.drawn
def test_a_tiny_grid_is_as_stored(tmp_path):
    "If this fails after a change, the stored grids are stale: raise result_version of the systems and compute them anew."
    kept = read_json(artifact_path("compare", "marketplace.json"))["result"]["tiny"]["runs"]
    config = COMPARISONS["marketplace"]
    live = run_tiny(tiny_config(config), tmp_path)["runs"]
    for a, b in zip(live, kept, strict=True):
        for key in ("system", "seed", *KEPT_METRICS, "valid", "pretraining", "kept", "n_parameters"):
            assert a[key] == (pytest.approx(b[key], abs=1e-4) if not isinstance(a[key], str) else b[key]), (a["system"], key)

def test_nobody_passes_the_ceiling():
    "Over all test events; a slice that is chosen by its targets may look otherwise."
    result = read_json(artifact_path("compare", "marketplace.json"))["result"]
    for metric in KEPT_METRICS[:4]:
        assert all(row[metric]["value"] < result["ceiling"][metric]["value"] for row in result["systems"])
        assert all(run[metric] < result["ceiling"][metric]["value"] for run in result["runs"])

def test_readers_are_stored_and_made_by_settings(tmp_path, monkeypatch):
    record = read_json(artifact_path("compare", "readers.json"))
    asked = replace(COMPARISONS["marketplace"], systems=("content_sasrec",))
    assert record["fingerprint"] == fingerprint(record["inputs"]) and record["inputs"] == json.loads(json.dumps({
        "config": asked.changes(), "readers": READERS, "result_version": SYSTEMS["content_sasrec"].result_version}))
    seen = [(run["system"], run["seed"]) for run in record["result"]["runs"]]
    assert seen == [(name, seed) for name in READERS for seed in (0, 1, 2)]
    grid = {run["seed"]: run for run in read_json(artifact_path("compare", "marketplace.json"))["result"]["runs"]
            if run["system"] == "content_sasrec"}
    for run in record["result"]["runs"][:3]:
        if run["seed"] in grid: assert run["ndcg@10"] == pytest.approx(grid[run["seed"]]["ndcg@10"], abs=1e-6), "the same training"

def test_readers_read_what_they_say(tmp_path):
    small = replace(tiny_config(COMPARISONS["marketplace"]), epochs=1, seeds=(0,))
    runs = store_readers(tmp_path / "readers.json", tmp_path, small, progress=False)["result"]["runs"]
    assert [run["system"] for run in runs] == list(READERS) and len({run["n_parameters"] for run in runs}) == 3
    from mmseqrec.data.synthetic import perfect_features
    from mmseqrec.experiments.run import open_marketplace
    kept = np.load(tmp_path / "perfect-reader" / "text.npy")
    np.testing.assert_array_equal(kept, perfect_features(open_marketplace(small))["text"])
    assert (tmp_path / "TF-IDF-and-SVD" / "features" / "lsa" / "lsa.json").exists()

def test_a_tiny_grid_needs_no_files():
    for config in COMPARISONS.values():
        tiny = tiny_config(config, ("markov",))
        assert tiny.interactions is tiny.text_features is None and tiny.systems == ("markov",) and tiny.epochs == 2
        assert (tiny.lr, tiny.max_len) == (config.lr, config.max_len)
