"The list of trainings, the grids that are stored, what of them is of today's code, and the curves."
import json
from dataclasses import replace

import numpy as np
import pytest

import mmseqrec.experiments.compare as compare
from mmseqrec.artifacts import artifact_path, fingerprint, read_json
from mmseqrec.config import RunConfig
from mmseqrec.experiments.compare import outdated, paired_over_seeds, run_tiny
from mmseqrec.experiments.pretraining import GRID, MOVIES, QUESTIONS, SWITCHES, TINY_GRID, grid_jobs, store_answers
from pages import page_functions

plot_curves = page_functions("experiments.pretraining").plot_curves

CONFIGS = {"marketplace": GRID, "ml1m": MOVIES}


@pytest.fixture(scope="module")
def stored(): return read_json(artifact_path("pretraining", "marketplace.json"))

@pytest.fixture(scope="module")
def again(): return read_json(artifact_path("compare", "marketplace.json"))


def test_jobs_are_few_and_in_a_useful_order():
    jobs = grid_jobs()
    assert len(jobs) == len(set(jobs)) <= 60
    assert {job for job in jobs[:len([j for j in jobs if j[1] < 3])]} == {job for job in jobs if job[1] < 3}
    for first, second in QUESTIONS.values(): assert {(n, s) for n in (first, second) for s in range(10)} <= set(jobs)
    for first, second in SWITCHES.values(): assert {(n, s) for n in (first, second) for s in range(3)} <= set(jobs)
    assert ("popularity", 1) not in jobs and ("mp4sr_legacy_losses", 3) not in jobs
    assert len(grid_jobs(replace(GRID, seeds=(4, 5)), switch_seeds=1)) < len(jobs)


@pytest.mark.parametrize("name", CONFIGS)
def test_stored_grids_are_of_their_configuration(name):
    record = read_json(artifact_path("pretraining", f"{name}.json"))
    now, found = json.loads(json.dumps(CONFIGS[name].to_dict())), record["inputs"]["config"]
    assert record["fingerprint"] == fingerprint(record["inputs"])
    assert {setting for setting in found if found[setting] != now[setting]} == {"n_users", "n_items"}, "the shop was another"
    assert {(run["system"], run["seed"]) for run in record["result"]["runs"]} == set(grid_jobs(CONFIGS[name]))
    assert "torch" in record["provenance"]["versions"]


def test_the_smaller_grid_is_of_todays_code_and_of_the_same_kitchen(again):
    assert outdated(again) == []
    found, asked = RunConfig.from_dict(again["inputs"]["config"]).to_dict(), GRID.to_dict()
    assert {name for name in asked if found[name] != asked[name]} == {"systems", "seeds", "patience", "pretrain_epochs"}


def test_stored_films_hold_aggregates_only():
    films = read_json(artifact_path("pretraining", "ml1m.json"))
    assert films["result"]["note"].startswith("input not redistributable")
    assert set(films["result"]) == {"runs", "users", "statistics", "tiny", "note"}
    for question, pair in QUESTIONS.items():
        over_seeds = paired_over_seeds(films["result"]["runs"], *pair)
        assert films["result"]["users"][question]["ndcg@10"]["difference"] == pytest.approx(over_seeds["difference"], abs=2e-6)


def test_a_grid_is_stored_with_its_note(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "run_tiny", lambda config, folder: {"tiny of": config.systems})
    monkeypatch.setattr(compare, "run_grid", lambda *args: asked.extend(args) or {"runs": [], "users": {}})
    monkeypatch.setattr(compare, "prepare_data", lambda *_: type("Data", (), {"statistics": {"n_users": 3}}))
    found = store_answers(tmp_path / "grid.json", tmp_path, MOVIES, note="mine")
    assert found["result"] == {"runs": [], "users": {}, "ceiling": None, "statistics": {"n_users": 3}, "tiny": {"tiny of": list(TINY_GRID.systems)},
                               "note": "mine"}
    assert found["inputs"]["config"]["max_len"] == 20 and asked[3] == grid_jobs(MOVIES) and asked[4] == QUESTIONS


def test_curves_hold_the_best_of_who_has_stopped():
    runs = [{"system": "mp4sr", "pretraining": [.1], "valid": row} for row in ([.1, .3, .2], [.1])]
    left, right = plot_curves(runs, ("mp4sr",), ("mp4sr",)).axes
    np.testing.assert_allclose(right.lines[0].get_ydata(), [.1, .2, .15])
    np.testing.assert_allclose(left.lines[0].get_ydata(), [.1])


def test_stored_users_agree_with_stored_runs(stored):
    for question, (first, second) in (QUESTIONS | SWITCHES).items():
        for metric in ("recall@10", "ndcg@10"):
            over_seeds = paired_over_seeds(stored["result"]["runs"], first, second, metric)
            assert stored["result"]["users"][question][metric]["difference"] == pytest.approx(over_seeds["difference"], abs=2e-6)


def test_stored_users_of_today_agree_with_their_runs(again):
    for pair in (QUESTIONS["pre-training"], QUESTIONS["against SASRec over content"]):
        over_seeds, kept = paired_over_seeds(again["result"]["runs"], *pair), again["result"]["users"][" - ".join(pair)]
        assert kept["ndcg@10"]["difference"] == pytest.approx(over_seeds["difference"], abs=2e-6)


@pytest.mark.drawn
def test_tiny_grid_is_as_stored(again, tmp_path):
    "If this fails after a change, the stored grid is stale: raise result_version of the systems and compute it anew."
    kept = {run["system"]: run for run in again["result"]["tiny"]["runs"]}
    for a in run_tiny(TINY_GRID, tmp_path)["runs"]:
        b = kept[a["system"]]
        for key in ("system", "seed", "recall@10", "ndcg@10", "valid", "pretraining", "kept", "n_parameters"):
            assert a[key] == (pytest.approx(b[key], abs=1e-4) if not isinstance(a[key], str) else b[key]), (a["system"], key)
