"Published numbers: claims that can be run, rankings against slow ones, verdicts, the command, and what is stored."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import mmseqrec.experiments.published as published
from mmseqrec.artifacts import artifact_path, fingerprint, read_json
from mmseqrec.config import RunConfig
from mmseqrec.experiments.compare import ONLY_NUMBERS
from mmseqrec.experiments.published import (CLAIMS, SPLITS, TOLERANCE, Claim, compare_claim, describe_claim, main,
                                            popularity_of_all_events, reproduce, run_published_tiny, store_published)
from mmseqrec.experiments.run import SYSTEMS
from mmseqrec.recommender import Recommender
from pages import page_functions

QUICK = dict(hidden_size=8, n_heads=1, epochs=2, batch_size=64, lr=.01, device="cpu")


# Made-up files, and slow versions

def write_lists(folder, n_users=60, n_items=25, seed=0):
    "Write Beauty's file: histories without repetitions, popular items more often."
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, n_items + 1)
    lists = [rng.choice(n_items, rng.integers(3, 9), replace=False, p=share / share.sum()) for _ in range(n_users)]
    folder.mkdir(exist_ok=True)
    (folder / "Beauty.txt").write_text("".join(f"{u} {' '.join(map(str, items))}\n" for u, items in enumerate(lists)))
    return [items.tolist() for items in lists]

def write_prefixes(folder, lists):
    "Write Scientific's files: a row for every prefix."
    folder.mkdir(exist_ok=True)
    files = {"train": [], "valid": [], "test": []}
    for u, items in enumerate(lists):
        for end in range(1, len(items)):
            stage = {len(items) - 1: "test", len(items) - 2: "valid"}.get(end, "train")
            files[stage].append(f"{u}\t{' '.join(map(str, items[:end]))}\t{items[end]}")
    for stage, rows in files.items():
        head = "user_id:token\titem_id_list:token_seq\titem_id:token"
        (folder / f"Scientific.{stage}.inter").write_text("\n".join([head, *rows]) + "\n")

def slow_means(ranks, k=10):
    "Average Recall and NDCG with a loop."
    gains = [1 / np.log2(rank + 1) if rank <= k else 0. for rank in ranks]
    return np.mean([rank <= k for rank in ranks]), np.mean(gains)

def slow_ranks(scores_of, lists, exclude_seen, zeros=False):
    "Rank the last item of each history, item by item; ties count one half; `zeros`: seen items have the score 0."
    ranks = []
    for items in lists:
        scores, target = dict(scores_of(items[:-1])), items[-1]
        if zeros: scores |= {i: 0. for i in items[:-1] if i != target}
        rivals = [i for i in scores if i != target and not (exclude_seen and i in items[:-1])]
        better = sum(scores[i] > scores[target] for i in rivals)
        ranks.append(1 + better + sum(scores[i] == scores[target] for i in rivals) / 2)
    return ranks

def counts_of(lists, held_out):
    "Count items without the last `held_out` of each history."
    counts = dict.fromkeys({i for items in lists for i in items}, 0)
    for items in lists:
        for item in items[:len(items) - held_out]: counts[item] += 1
    return counts

@pytest.fixture
def quick(monkeypatch):
    "Two claims of a fraction of a second in place of the real ones."
    claims = {"beauty-popularity": CLAIMS["beauty-popularity"],
              "beauty-sasrec": replace(CLAIMS["beauty-sasrec"], settings=QUICK)}
    monkeypatch.setattr(published, "CLAIMS", claims)
    monkeypatch.setattr(published, "run_published_tiny", lambda folder: {})
    return claims


# Claims

@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_claim_can_be_configured(name, tmp_path):
    claim = CLAIMS[name]
    assert name.startswith(claim.data.lower()) and claim.by and claim.protocol
    assert 0 < claim.published[1] < claim.published[0] < 1 and claim.cutoff in (10, 11)
    assert (claim.cutoff == 11) == claim.by.startswith("MISSRec")
    with pytest.raises(FileNotFoundError, match="is not there; get it from .*github.com.* by --data"): claim.config(tmp_path)
    (tmp_path / SPLITS[claim.data].file).write_text("")
    assert claim.system in SYSTEMS
    config = claim.config(tmp_path, "some/folder")
    assert config.source.startswith("benchmark:") and config.exclude_seen == (claim.data == "Beauty")
    assert config.text_encoder == "some/folder" and config.systems == (claim.system,)
    assert claim.config(tmp_path).text_encoder == claim.settings.get("text_encoder", "auto")
    assert not set(claim.settings) - set(RunConfig().to_dict())

def test_claims_share_trainings_of_the_same_settings_only():
    assert CLAIMS["scientific-unisrec"].folder == CLAIMS["scientific-unisrec-ids"].folder  # two systems, one preparation
    assert CLAIMS["beauty-sasrec"].folder != CLAIMS["beauty-gru4rec"].folder
    places = [(claim.folder, claim.system) for claim in CLAIMS.values()]
    assert len(set(places)) == len(places)


# The comparison

@pytest.mark.parametrize("recall, ndcg, verdict", [
    (1, 1, "within 5 %"), (1.04, .96, "within 5 %"), (1.06, 1, "above"), (1, 1.06, "above"), (.94, 1.2, "below"), (1, .94, "below")])
def test_verdicts_follow_the_ratios(recall, ndcg, verdict):
    claim = Claim("Beauty", "sasrec", (.1, .05), "x", "y", {}, cutoff=11)
    runs = [{"recall@11": .1 * recall + d, "ndcg@11": .05 * ndcg - d, "recall@10": 0., "ndcg@10": 0.} for d in (-.001, .001)]
    found = compare_claim(claim, runs)
    assert found["verdict"] == verdict and TOLERANCE == .05
    assert found["recall"]["ratio"] == pytest.approx(recall) and found["ndcg"]["ratio"] == pytest.approx(ndcg)
    assert found["ndcg"]["spread"] == pytest.approx(.001 * 2 ** .5)
    assert compare_claim(claim, runs[:1])["recall"]["spread"] is None


# Training and ranking

def test_popularity_is_the_slow_one_seen_items_removed_and_ranked(tmp_path):
    lists = write_lists(tmp_path)
    run, = reproduce(CLAIMS["beauty-popularity"], tmp_path, tmp_path / "out", (0, 1, 2), progress=False)
    scores = counts_of(lists, 2)
    for exclude_seen, means in ((True, run), (False, run["other_seen"])):
        recall, ndcg = slow_means(slow_ranks(lambda items: scores, lists, exclude_seen))
        assert (means["recall@10"], means["ndcg@10"]) == pytest.approx((recall, ndcg), abs=1e-6)
    recall, ndcg = slow_means(slow_ranks(lambda items: counts_of(lists, 0), lists, True))
    leaked = popularity_of_all_events(tmp_path, tmp_path / "out")
    assert (leaked["recall@10"], leaked["ndcg@10"]) == pytest.approx((recall, ndcg), abs=1e-6)
    assert leaked["ndcg@11"] > run["ndcg@11"]

def test_a_trained_row_is_ranked_as_published_and_the_other_way(tmp_path):
    "Scientific: seen items are ranked; some users take their first item again at the end."
    lists = [[*items, items[0]] if u % 4 == 0 else items for u, items in enumerate(write_lists(tmp_path))]
    write_prefixes(tmp_path / "data", lists)
    claim = replace(CLAIMS["scientific-sasrec"], settings=QUICK)
    run, = reproduce(claim, tmp_path / "data", tmp_path / "out", (0,), progress=False)
    model = Recommender.from_pretrained(tmp_path / "out" / claim.folder / "models/sasrec-seed0").eval()
    tokens = model.catalogue.item_tokens

    @torch.no_grad()
    def scores_of(items):
        answer, = model.recommend([list(map(str, items))], len(tokens) - 1)
        return {int(token): score for token, score in zip(answer.items, answer.scores)}

    for *how, means in ((False, False, run), (True, False, run["other_seen"]), (False, True, run["seen_zero"])):
        recall, ndcg = slow_means(slow_ranks(scores_of, lists, *how))
        assert (means["recall@10"], means["ndcg@10"]) == pytest.approx((recall, ndcg), abs=1e-4)
    assert run["repeated"] == pytest.approx(np.mean([items[-1] in items[:-1] for items in lists]), abs=1e-4)
    first = [max(scores, key=scores.get) in items[:-1] for items in lists for scores in [scores_of(items[:-1])]]
    assert run["seen_first"] == pytest.approx(np.mean(first), abs=1e-4)

def test_what_is_trained_is_not_trained_again(tmp_path, quick, monkeypatch):
    write_lists(tmp_path)
    first = reproduce(quick["beauty-sasrec"], tmp_path, tmp_path / "out", (0, 1), progress=False)
    assert [run["seed"] for run in first] == [0, 1] and first[0]["ndcg@10"] != first[1]["ndcg@10"]
    monkeypatch.setattr("mmseqrec.experiments.run.fit", None)
    assert reproduce(quick["beauty-sasrec"], tmp_path, tmp_path / "out", (0, 1), progress=False) == first


# The command, and what is stored

def test_the_command_prints_the_comparison(tmp_path, quick, capsys):
    write_lists(tmp_path / "data")
    out = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(["all", *out, "--seeds", "1"]) == 0
    text = capsys.readouterr().out
    assert "beauty-popularity: Popularity, 1 trained; published by S3Rec" in text
    assert "beauty-sasrec: SASRec over IDs, 1 trained" in text and text.count("recall@10: published") == 2
    runs = reproduce(quick["beauty-popularity"], tmp_path / "data", tmp_path / "out", progress=False)
    assert describe_claim("beauty-popularity", runs) in text

def test_wrong_input_of_the_command_is_one_sentence(tmp_path, quick, capsys):
    for argv, problem in (([str(tmp_path)], "Beauty.txt is not there; get it from"), ([str(tmp_path), "--seeds", "0"], "at least 1")):
        with pytest.raises(SystemExit) as end: main(["beauty-popularity", "--data", *argv])
        assert end.value.code == 2 and problem in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["beauty-none", "--data", str(tmp_path)])
    assert "choose from" in capsys.readouterr().err

def test_a_cut_store_keeps_what_is_trained_and_nothing_of_the_data(tmp_path, quick):
    write_lists(tmp_path)
    some = tmp_path / "some.json"
    reproduce(quick["beauty-sasrec"], tmp_path, tmp_path / "out", (1,), progress=False)
    record = store_published(some, tmp_path, tmp_path / "out", cut=True)
    assert record["inputs"]["jobs"] == {"beauty-sasrec": [1]} and list(record["result"]["runs"]) == ["beauty-sasrec"]
    assert record["inputs"]["note"] == ONLY_NUMBERS and str(tmp_path) not in some.read_text()
    assert store_published(some, "nowhere", tmp_path / "out", cut=True) == record, "read, not computed again"
    everything = store_published(tmp_path / "all.json", tmp_path, tmp_path / "out", seeds=(0, 1))
    assert everything["inputs"]["jobs"] == {"beauty-popularity": [0], "beauty-sasrec": [0, 1]}

STORED = read_json(artifact_path("published.json"))

def test_the_stored_numbers_are_of_todays_claims_and_code():
    inputs, result = STORED["inputs"], STORED["result"]
    assert STORED["fingerprint"] == fingerprint(inputs) and inputs["note"] == ONLY_NUMBERS
    for name, seeds in inputs["jobs"].items():
        claim = CLAIMS[name]
        assert inputs["settings"][name] == json.loads(json.dumps(claim.settings))
        assert SYSTEMS[claim.system].result_version == inputs["result_versions"][claim.system]
        assert [run["seed"] for run in result["runs"][name]] == seeds
    assert list(result["runs"]) == list(inputs["jobs"])

def test_a_tiny_row_is_as_stored(tmp_path):
    live, kept = run_published_tiny(tmp_path), STORED["result"]["tiny"]
    assert live.keys() == kept.keys()
    for name in ("recall@10", "ndcg@10", "valid"): assert live[name] == pytest.approx(kept[name], abs=.02)


# What the page says and draws

def test_tables_and_figure_have_a_row_for_each_number():
    page, runs = page_functions("experiments.published"), dict(STORED["result"]["runs"])
    run = dict(runs["beauty-popularity"][0], kept=3)
    runs |= {name: [run] for name in CLAIMS if name not in runs}
    table = page.claims_table(runs)
    assert table["verdict"].to_list() == [compare_claim(CLAIMS[name], some)["verdict"] for name, some in runs.items()]
    assert [label.get_text() for label in page.plot_ratios(runs).get_yticklabels()] == list(runs)
    losses = page.losses_table(runs)
    assert losses["loss"].to_list() == [page.LOSSES[name] for name in ("sasrec_bce", "sasrec_sampled", "sasrec")]
    kept = [[row["kept"] + 1 for row in runs[f"beauty-{name}"]] for name in ("sasrec-bce", "sasrec-sampled", "sasrec")]
    assert losses["epochs"].to_list() == [f"{sum(some) / len(some):.0f}" for some in kept] and not len(page.losses_table({}))
    seen = page.seen_table({"beauty-popularity": [run | {"ndcg@10": .06, "other_seen": {"ndcg@10": .05}}],
                            "scientific-sasrec": [run | {"ndcg@10": .05, "other_seen": {"ndcg@10": .06}}]})
    assert seen["removed against ranked"].to_list() == ["+20%", "+20%"]
