"The paired comparison against SciPy, the list of trainings, and the stored grid against a tiny live one."
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mmseqrec.artifacts import artifact_path, fingerprint, read_json
from mmseqrec.experiments import RESULT_VERSION
from mmseqrec.pretrain_finetune import (GRID, MOVIES, QUESTIONS, STUDENT, SWITCHES, grid_jobs, paired_over_seeds, plot_curves,
                                        plot_differences, stored_grid, tiny_grid)


@pytest.fixture(scope="module")
def stored(): return read_json(artifact_path("pretraining", "marketplace.json"))


def rows(**values): return [{"system": name, "seed": s, "ndcg@10": v} for name, row in values.items() for s, v in row.items()]


@pytest.mark.parametrize("n", [2, 3, 10, 11])
def test_interval_over_seeds_is_students(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(.1, .01, n), rng.normal(.09, .01, n)
    found = paired_over_seeds(rows(a=dict(enumerate(a)), b=dict(enumerate(b))), "a", "b")
    expected = stats.ttest_rel(a, b).confidence_interval(.95)
    assert found["low"] == pytest.approx(expected.low, abs=1e-5) and found["high"] == pytest.approx(expected.high, abs=1e-5)
    assert found["difference"] == pytest.approx((a - b).mean()) and found["wins"] == (a > b).sum() and found["n"] == n


def test_students_factors():
    np.testing.assert_allclose(STUDENT, stats.t.ppf(.975, np.arange(1, 11)), atol=5e-4)


def test_only_seeds_of_both_are_compared():
    found = paired_over_seeds(rows(a={0: .2, 1: .3, 2: .9}, b={1: .1, 0: .1, 7: .5}), "a", "b")
    np.testing.assert_allclose(found["differences"], [.1, .2])
    with pytest.raises(ValueError, match="a and b have 1 seeds in common"): paired_over_seeds(rows(a={0: 1}, b={0: 1}), "a", "b")


def test_jobs_are_few_and_in_a_useful_order():
    jobs = grid_jobs()
    assert len(jobs) == len(set(jobs)) <= 60
    assert {job for job in jobs[:len([j for j in jobs if j[1] < 3])]} == {job for job in jobs if job[1] < 3}
    for first, second in QUESTIONS.values(): assert {(n, s) for n in (first, second) for s in range(10)} <= set(jobs)
    for first, second in SWITCHES.values(): assert {(n, s) for n in (first, second) for s in range(3)} <= set(jobs)
    assert ("popularity", 1) not in jobs and ("mp4sr_legacy_losses", 3) not in jobs
    assert len(grid_jobs(replace(GRID, seeds=(4, 5)), switch_seeds=1)) < len(jobs)


def test_stored_grid_is_of_this_configuration(stored):
    assert stored["fingerprint"] == fingerprint({"config": GRID.to_dict(), "result_version": RESULT_VERSION})
    assert {(run["system"], run["seed"]) for run in stored["result"]["runs"]} == set(grid_jobs())
    assert "torch" in stored["provenance"]["versions"]


def test_stored_films_are_of_their_configuration_and_hold_aggregates_only():
    films = read_json(artifact_path("pretraining", "ml1m.json"))
    assert films["fingerprint"] == fingerprint({"config": MOVIES.to_dict(), "result_version": RESULT_VERSION})
    assert {(run["system"], run["seed"]) for run in films["result"]["runs"]} == set(grid_jobs(MOVIES))
    assert films["result"]["note"].startswith("input not redistributable")
    assert set(films["result"]) == {"runs", "users", "statistics", "tiny", "note"}
    for question, pair in QUESTIONS.items():
        over_seeds = paired_over_seeds(films["result"]["runs"], *pair)
        assert films["result"]["users"][question]["ndcg@10"]["difference"] == pytest.approx(over_seeds["difference"], abs=2e-6)


def test_a_grid_is_stored_with_its_note(tmp_path, monkeypatch):
    monkeypatch.setattr("mmseqrec.pretrain_finetune.tiny_grid", lambda folder: {})
    monkeypatch.setattr("mmseqrec.pretrain_finetune.run_grid", lambda *_: {"runs": [], "users": {}})
    monkeypatch.setattr("mmseqrec.pretrain_finetune.prepare_data", lambda *_: type("Data", (), {"statistics": {"n_users": 3}}))
    found = stored_grid(tmp_path / "grid.json", tmp_path, MOVIES, note="mine")
    assert found["result"] == {"runs": [], "users": {}, "statistics": {"n_users": 3}, "tiny": {}, "note": "mine"}
    assert found["inputs"]["config"]["max_len"] == 20


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


def test_tiny_grid_is_as_stored(stored, tmp_path):
    "If this fails after a change, the stored grid is stale: raise RESULT_VERSION and compute it anew."
    live, kept = tiny_grid(tmp_path), stored["result"]["tiny"]
    for a, b in zip(live["runs"], kept["runs"], strict=True):
        for key in ("system", "seed", "recall@10", "ndcg@10", "valid", "pretraining", "kept", "n_parameters"):
            assert a[key] == (pytest.approx(b[key], abs=1e-4) if not isinstance(a[key], str) else b[key]), (a["system"], key)


def test_plot():
    ax = plot_differences({"a": paired_over_seeds(rows(a={0: .2, 1: .3}, b={0: .1, 1: .1}), "a", "b")}, "t", "x")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a (2 of 2)"] and ax.get_xlabel() == "x"
