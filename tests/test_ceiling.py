"The ceiling against an enumeration by hand; arrivals; splits and new items of a run; chance."
import itertools
import json

import numpy as np
import polars as pl
import pytest
import torch

from mmseqrec.config import RunConfig
from mmseqrec.data.interactions import k_core, leave_one_out, make_interactions, read_interactions
from mmseqrec.data.sequences import TEST, TRAIN, SequenceStore
from mmseqrec.data.synthetic import Behaviour, make_marketplace, planted_probabilities
from mmseqrec.evaluation import Evaluation, user_means
from mmseqrec.experiments import run as runs
from mmseqrec.experiments.run import (Result, ceiling, new_item_metrics, open_marketplace, prepare_data, result_table, run_all,
                                      split_events)
from mmseqrec.features.sentences import load_lsa
from mmseqrec.metrics import ndcg_at_k, recall_at_k
from mmseqrec.training import History
from pathlib import Path


# The probabilities, by enumeration

def chosen(p, score, n):
    "Enumerate all n draws: the first of the best is taken."
    found = np.zeros(len(p))
    for drawn in itertools.product(range(len(p)), repeat=n):
        best = max(range(n), key=lambda k: (score[drawn[k]], -k))
        found[drawn[best]] += np.prod(p[list(drawn)])
    return found


def by_hand(market, event):
    "Follow the description of page 10, one event, one reason after the other."
    shop, how, truth = market.truth.shops[0], market.truth.behaviour, market.truth
    V = len(shop.codes)
    name = market.interactions["user_id"][event]
    mine = [row for row in range(len(market.interactions)) if market.interactions["user_id"][row] == name]
    row_of = {token: row for row, token in enumerate(market.items["item_id"])}
    history = [row_of[market.interactions["item_id"][row]] for row in mine if row < event]
    user = truth.users.filter(pl.col("user_id") == name).row(0, named=True)
    now, t = market.interactions["timestamp"][event], len(history)
    there = np.array([shop.arrival[v] <= now for v in range(V)])
    shelves = shop.shelves.reshape(-1, V)
    def p_of(shelf):
        edges = [shelf, *shelves[shelf]]
        p = np.array([edges[v + 1] - edges[v] for v in range(V)]) * there
        return p / p.sum()
    liked = [sum(shop.codes[v, a] == wanted for a, wanted in enumerate(user["taste"])) for v in range(V)]
    new = [-100 * (v in history) for v in range(V)]
    def choose(interest):
        explored = chosen(p_of(shop.n_interests), new, how.taste)
        suits = chosen(p_of(interest), [a + b for a, b in zip(liked, new)], how.taste)
        return how.explore * explored + (1 - how.explore) * suits
    share = t / len(mine)
    weights = [(1 - share) * a + share * b for a, b in zip(user["first_weights"], user["last_weights"])]
    begins = sum(w * choose(c) for w, c in zip(weights, user["interests"]))
    if not history: return begins
    goes_on = choose(truth.events["interest"][event - 1])
    follows, harmonic = np.zeros(V), sum(1 / k for k in range(1, 9))
    for k, companion in enumerate(shop.companions[history[-1]], 1):
        if companion in history or not there[companion]: follows += goes_on / k / harmonic
        else: follows[companion] += 1 / k / harmonic
    goes_on = how.follow * follows + (1 - how.follow) * goes_on
    repeats = np.array([history.count(v) / t for v in range(V)])
    p_new = 1 / how.session_length
    return how.repeat * repeats + (1 - how.repeat) * (p_new * begins + (1 - p_new) * goes_on)


@pytest.mark.parametrize("arrivals", [0., .5])
def test_probabilities_equal_an_enumeration_by_hand(arrivals):
    market = make_marketplace("toys", n_users=6, n_items=9, seed=3, n_interests=4,
                              behaviour=Behaviour(arrivals=arrivals, taste=3, repeat=.1, explore=.3, follow=.4))
    events = np.array([0, 1, 2, 4, 7, len(market.interactions) - 1])
    found = planted_probabilities(market, events)
    assert found.shape == (6, 9)
    for row, event in zip(found, events.tolist()): np.testing.assert_allclose(row, by_hand(market, event), atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1)


def test_probabilities_are_of_one_shop():
    market = make_marketplace(("toys", "kitchen"), n_users=5, n_items=12)
    with pytest.raises(ValueError, match="one shop"): planted_probabilities(market, np.arange(3))
    alone = make_marketplace("toys", n_users=5, n_items=12)
    rows = np.arange(len(alone.interactions))
    np.testing.assert_array_equal(planted_probabilities(market.domain("toys"), rows), planted_probabilities(alone, rows))


# Arrivals

def test_nobody_takes_what_has_not_arrived():
    market = make_marketplace("kitchen", n_users=300, n_items=60, behaviour=Behaviour(arrivals=.5))
    arrival = market.truth.attributes["arrival"]
    assert (arrival > 0).sum() == 30 and (arrival == 0).sum() == 30
    when = market.interactions["item_id"].replace_strict(market.truth.attributes["item_id"], arrival)
    assert (when <= market.interactions["timestamp"]).all()
    late = market.interactions.filter(when > 0)
    assert len(late) > 100, "they are taken afterwards"


def test_without_arrivals_the_shop_is_the_same():
    one, other = (make_marketplace("kitchen", n_users=50, n_items=30, behaviour=b) for b in (Behaviour(), Behaviour(arrivals=0)))
    assert one.interactions.equals(other.interactions) and one.items.equals(other.items)
    assert (one.truth.attributes["arrival"] == 0).all()


# Splits of a run

SMALL = RunConfig(n_users=120, n_items=60, systems=("popularity", "markov"), min_item=1, device="cpu")

@pytest.fixture(scope="module")
def events(tmp_path_factory):
    paths = open_marketplace(SMALL).write(tmp_path_factory.mktemp("shop") / "data", progress=False)
    return k_core(read_interactions(paths["interactions"]), 5, 1)


@pytest.mark.parametrize("split", ["leave-one-out", "global-time"])
@pytest.mark.parametrize("share", [0., .2])
def test_splits_keep_their_promises(events, split, share):
    from dataclasses import replace
    found = split_events(events, replace(SMALL, split=split, new_items=share))
    stage, item, time = found.stage, found.interactions.item, found.interactions.time
    assert len(found.cold_items) == round(share * events.n_items)
    assert not np.isin(item[stage != TEST], found.cold_items).any(), "no training or validation event has a new item"
    assert found.interactions.item_tokens == events.item_tokens
    if split == "global-time": assert time[stage == TRAIN].max() < time[stage == TEST].min()
    else: assert (np.bincount(found.interactions.user, stage == TEST) == (found.interactions.lengths >= 3)).all()
    if share: assert np.isin(item[stage == TEST], found.cold_items).any()
    elif split == "leave-one-out": np.testing.assert_array_equal(stage, leave_one_out(events).stage)
    elif split == "global-time": assert .08 < (stage == TEST).mean() < .12 and .08 < (stage == 1).mean() < .12


def test_the_marketplace_holds_out_one_item_in_twenty_and_own_data_none(events):
    from dataclasses import replace
    assert len(split_events(events, SMALL).cold_items) == round(.05 * events.n_items)
    assert not len(split_events(events, replace(SMALL, interactions="a.csv", items="b.csv")).cold_items)
    other = split_events(events, replace(SMALL, new_items_seed=1)).cold_items
    assert set(other) != set(split_events(events, SMALL).cold_items)


@pytest.mark.parametrize("settings, said", [(dict(new_items=1.), "less than 1"), (dict(arrivals=-.1), "at least 0"),
                                            (dict(new_items=.1, source="benchmark:x"), "leave new_items out")])
def test_impossible_shares(settings, said):
    with pytest.raises(ValueError, match=said): RunConfig(**settings)


# The rows of a run

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from dataclasses import replace
    config = replace(SMALL, new_items=.2, text_encoder="lsa", systems=("popularity", "markov", "content_sasrec"), epochs=1)
    return run_all(config, tmp_path_factory.mktemp("run"), progress=False)


def test_the_ceiling_ranks_the_test_events_by_the_planted_probabilities(finished):
    data, found = finished.data, finished.ceiling.evaluation
    other = finished.results[0].evaluation
    for name in ("pos_item", "user", "history_length"): np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
    market = open_marketplace(finished.config)
    tokens = data.catalogue.item_tokens
    place = {token: row for row, token in enumerate(market.items["item_id"])}
    columns = [place[token] for token in tokens[1:]]
    keys = {key: row for row, key in enumerate(market.interactions.select("user_id", "timestamp").iter_rows())}
    inter = data.split.interactions
    for r in range(0, len(found.ranks), 7):
        event = data.store.rows(TEST)[r]
        row = keys[inter.user_tokens[inter.user[event]], inter.time[event]]
        assert market.interactions["item_id"][row] == tokens[found.pos_item[r]]
        p = planted_probabilities(market, np.array([row]))[0, columns]
        mine = p[found.pos_item[r] - 1]
        assert found.ranks[r] == 1 + (p > mine).sum() + ((p == mine).sum() - 1) / 2
        np.testing.assert_allclose(p[found.top_items[r] - 1], np.sort(p)[::-1][:10])


def test_the_ceiling_can_leave_out_what_was_seen(finished):
    from dataclasses import replace
    config, data = replace(finished.config, exclude_seen=True), finished.data
    found = ceiling(config, data).evaluation
    row, item = data.store.seen_items(data.store.rows(TEST))
    seen = set(zip(row.tolist(), item.tolist()))
    shown = [(r, v) for r, top in enumerate(found.top_items.tolist()) for v in top if (r, v) in seen and v != found.pos_item[r]]
    assert not shown and (found.ranks <= finished.ceiling.evaluation.ranks).all()


def test_own_data_have_no_ceiling(finished):
    from dataclasses import replace
    assert ceiling(replace(finished.config, interactions="a.csv", items="b.csv"), finished.data) is None


def test_every_row_of_the_table_has_its_new_items(finished):
    table = result_table(finished)
    assert [row["system"] for row in table] == ["popularity", "markov", "content_sasrec", "ceiling"]
    split, cold = finished.data.split, set(finished.data.split.cold_items.tolist())
    for row, result in zip(table, [*finished.results, finished.ceiling]):
        new, evaluation = row["new_items"], result.evaluation
        rows = [r for r, item in enumerate(evaluation.pos_item.tolist()) if item in cold]
        assert new["n_items"] == len(cold) and new["n_events"] == len(rows) > 5
        ranks = evaluation.ranks[rows]
        for k in (10, 50):
            assert new[f"recall@{k}"]["value"] == pytest.approx(np.mean(ranks <= k))
            assert new[f"recall@{k}"]["chance"] == pytest.approx(k / evaluation.n_items)
            assert new[f"recall@{k}"]["low"] <= new[f"recall@{k}"]["value"] <= new[f"recall@{k}"]["high"]
    assert json.loads(json.dumps(table)) == table
    recall = {row["system"]: row["recall@10"]["value"] for row in table}
    assert recall["ceiling"] == max(recall.values()), "nobody is better over all events"


@pytest.mark.parametrize("metric", ["recall@10", "recall@50", "ndcg@10"])
@pytest.mark.parametrize("n", [7, 30, 80])
def test_chance_is_the_mean_over_all_ranks(metric, n):
    name, k = metric.split("@")
    values = {"recall": recall_at_k, "ndcg": ndcg_at_k}[name](torch.arange(1., n + 1), int(k))
    assert runs._chance(metric, np.array([n, n])) == pytest.approx(float(values.mean()))


def test_new_items_are_averaged_over_seeds_and_users():
    def result(ranks):
        rows = np.array([1, 2, 3, 3]), np.array([0, 0, 1, 1])
        return Result("sasrec", 0, Evaluation(np.array(ranks, float), *rows, np.ones(4, int), np.zeros((4, 1), int), 9), History(), {}, 0., 0., 0, Path())
    inter = make_interactions(pl.Series(["a", "a", "b", "b"]), pl.Series(["x", "y", "z", "z"]), np.arange(4), "made up")
    store = lambda stage: SequenceStore.from_split(runs.Split(inter, np.array(stage, np.int8)))
    new = new_item_metrics([result([1, 1, 3, 30]), result([1, 1, 30, 30])], store([0, 0, 2, 2]))["new_items"]
    assert new["n_items"] == 1 and new["n_events"] == 2 and new["recall@10"]["value"] == pytest.approx(.25)
    assert new_item_metrics([result([1, 1, 1, 1])], store([0, 0, 0, 0])) == {}


# Texts that only held-out items have

def test_lsa_is_fitted_to_the_texts_of_training_items(tmp_path, monkeypatch):
    from dataclasses import replace
    market = open_marketplace(SMALL)
    cold = split_events(k_core(read_interactions(market.write(tmp_path / "a", progress=False)["interactions"]), 5, 1),
                        replace(SMALL, new_items=.2)).cold_items
    events = k_core(read_interactions(tmp_path / "a" / "interactions.csv"), 5, 1)
    new = {events.item_tokens[row] for row in cold.tolist()}
    rows = [json.loads(line) for line in (tmp_path / "a" / "items.jsonl").read_text().splitlines()]
    for row in rows: row["title"] += " zanzibar" if row["item_id"] in new else " knownword"
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = replace(SMALL, new_items=.2, text_encoder="lsa", interactions=str(tmp_path / "a" / "interactions.csv"),
                     items=str(tmp_path / "items.jsonl"), images=str(tmp_path / "a" / "images"), image_encoder="shipped")
    data = prepare_data(config, tmp_path / "run", progress=False)
    encoder = load_lsa(tmp_path / "run" / "features" / "lsa")
    assert "knownword" in encoder.words and "zanzibar" not in encoder.words
    assert "TF-IDF and SVD" in data.notes[0] and "as asked" in data.notes[0]
    assert not data.catalogue.missing_text_mask[1:].all() and data.catalogue.encoders["text"]["name"] == "lsa"


def test_own_texts_are_read_by_lsa_where_no_checkpoint_can_be_had(tmp_path, monkeypatch):
    from small_shop import write_shop
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = prepare_data(RunConfig(**write_shop(tmp_path / "shop"), systems=("popularity",), device="cpu"), tmp_path / "run", progress=False)
    said = data.notes[0]
    assert "TF-IDF and SVD, fitted to the texts of the training items (because" in said
    assert "small CLIP shipped with mmseqrec (because" in said


# What the report and the terminal say about new items

def test_the_report_shows_new_items_and_to_whom(finished):
    from mmseqrec.app.report import new_items_section, render_part, report_html, system_summaries, who_sees
    from mmseqrec.data.sequences import collate
    from mmseqrec.recommender import Recommender
    data, cold, result = finished.data, finished.data.split.cold_items, finished.results[-1]
    section = new_items_section(finished, system_summaries(finished), n=3)
    assert [row["title"] for row in section["rows"]] == ["Popularity", "First-order Markov", "SASRec over content", "Ceiling"]
    assert len(section["shown"]) == 3 and [row["title"] for row in section["shown"][0]["to"]] == ["SASRec over content"]
    rows, ranks = who_sees(result, data, cold.tolist())
    model = Recommender.from_pretrained(str(result.folder)).eval()
    events, best = data.store.rows(TEST), {}
    for r, event in enumerate(events.tolist()):
        user = data.store.user[event]
        batch = collate([data.store.items[data.store.offsets[user]:event].tolist()], model.max_len)
        with torch.inference_mode(): scores = model.score(model.encode_sequence(batch), model.encode_items())[0]
        for item in cold.tolist(): best.setdefault(item, []).append(1 + int((scores > scores[item - 1]).sum()))
    for item, row, rank in zip(cold.tolist(), rows, ranks):
        assert abs(min(best[item]) - rank) <= 1 and abs(best[item][row] - rank) <= 1, "but for roundings"
    html = str(render_part("new_items_section", json.loads(json.dumps(section))))
    assert "chance" in html and "on place" in html and f"{len(cold)} items have no training event" in html
    page = report_html(finished, n_examples=1)
    assert 'id="new-items"' in page and "no system can be expected to pass it" in page


def test_the_terminal_has_a_table_of_new_items(finished):
    from mmseqrec.app.cli import run_table
    text = run_table(finished)
    assert text.count("Ceiling") == 2 and "new items:" in text and text.splitlines()[-1].startswith("chance")


def test_a_run_is_evaluated_with_its_own_split(finished, capsys):
    from mmseqrec.app.cli import main
    out = finished.folder / "evaluation.json"
    assert main(["evaluate", str(finished.results[-1].folder), "--json", str(out), "--quiet"]) == 0
    capsys.readouterr()
    found = json.loads(out.read_text())
    assert found["n_events"] == len(finished.results[-1].evaluation.ranks)
    assert found["metrics"]["recall@10"]["value"] == pytest.approx(finished.results[-1].evaluation.metrics(ks=(10,))["recall@10"])


def test_the_terminal_says_that_texts_are_read_by_lsa(tmp_path, monkeypatch, capsys):
    from mmseqrec.app.cli import main
    from small_shop import write_shop
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = write_shop(tmp_path / "shop", pictures=False)
    words = [word for name in ("interactions", "items", "min_item") for word in (f"--{name.replace('_', '-')}", str(files[name]))]
    assert main(["run", *words, "--systems", "popularity", "--device", "cpu", "--quiet", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "Texts are encoded by TF-IDF and SVD, fitted to the texts of the training items (because" in said
    assert "TF-IDF and SVD" in (tmp_path / "run" / "report.html").read_text()
