"Shares of users, transfer between shops, likeness and what is compared, each against a slow version; stored grids."
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import mmseqrec.experiments.cross_domain as cross
from mmseqrec.artifacts import artifact_path, fingerprint, read_json
from mmseqrec.data.interactions import HISTORY, TEST, TRAIN, VALID, Interactions, Split
from mmseqrec.data.sequences import SequenceStore, evaluation_batches, position_batches, prefix_batches
from mmseqrec.experiments.compare import tiny_config
from mmseqrec.experiments.cross_domain import (BASE, FAMILIES, GRIDS, OTHERS, TARGET, Laboratory, Transfer, compared,
                                               keep_users, rank_by_likeness, run_transfers_tiny, settings_of, statistics_of,
                                               store_transfers, take_shops, train_transfers)
from mmseqrec.experiments.run import SYSTEMS, prepare_data, result_fingerprint
from mmseqrec.models.baselines import transition_counts
from mmseqrec.recommender import Recommender
from mmseqrec.training import fit
from pages import page_functions
from small_shop import write_shop
from small_world import build, make_store, same, weights

SMALL = replace(tiny_config(BASE), n_users=70, n_items=40, epochs=1)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("cross"), SMALL, progress=False)


# Known, but nothing is learned from it

def with_history(seed=0):
    "A store in which every third user is history but for the test event, and the same store without these users."
    store = make_store(40, seed=seed)
    stage, others = store.stage.copy(), store.user % 3 == 0
    stage[others & (stage < TEST)] = HISTORY
    kept = ~others
    lengths = np.bincount(store.user[kept], minlength=len(store.offsets) - 1)
    return (replace(store, stage=stage), SequenceStore(
        store.items[kept], np.concatenate([[0], np.cumsum(lengths)]), store.stage[kept], store.n_items))


def test_history_is_no_target_no_candidate_and_in_no_batch():
    store, without = with_history()
    users = set(np.flatnonzero(np.arange(len(store.offsets) - 1) % 3 == 0))
    for batches in (prefix_batches(store, TRAIN, 16, 10), prefix_batches(store, VALID, 16, 10), position_batches(store, 16, 10),
                    prefix_batches(store, TRAIN, 16, 10, one_per_user=True)):
        seen = [user for batch in batches for user in batch.user.tolist()]
        assert seen and not users & set(seen)
    np.testing.assert_array_equal(store.training_items, without.training_items)
    for one, other in zip(transition_counts(store), transition_counts(without)): np.testing.assert_array_equal(one, other)


def test_history_is_there_when_the_test_event_is_ranked():
    store, _ = with_history()
    users = [user for user in range(0, 40, 3) if np.diff(store.offsets)[user] > 3]
    for user in users[:4]:
        first, last = store.offsets[user], store.offsets[user + 1] - 1
        row = list(store.rows(TEST)).index(last)
        found = next(batch.item_seq[list(batch.row).index(row)] for batch in evaluation_batches(store, TEST, 16, 50)
                     if row in batch.row)
        assert found[found > 0].tolist() == store.items[first:last].tolist()


@pytest.mark.parametrize("name", ["sasrec", "content_both"])
def test_nothing_is_learned_from_history(name):
    "Other items in the history of users that training may not learn from change no weight."
    store, _ = with_history()
    rng, hidden = np.random.default_rng(1), store.stage == HISTORY
    known = store.training_items.astype(np.int32)
    other = replace(store, items=np.where(hidden, rng.choice(known, len(hidden)), store.items).astype(np.int32))
    found = []
    for events in (store, other):
        model = build(name, seed=1)
        fit(model, events, epochs=2, batch_size=16, lr=.01, device="cpu", progress=False)
        found.append(weights(model))
    assert same(*found)


def test_a_split_counts_its_stages():
    store, _ = with_history()
    events = Interactions(store.user.astype(np.int32), store.items, np.arange(len(store.items)),
                          [f"u{n}" for n in range(len(store.offsets) - 1)], ["[PAD]", *map(str, range(store.n_items))], "x")
    split = Split(events, store.stage)
    counts = [(store.stage == stage).sum() for stage in (TRAIN, VALID, TEST)]
    assert repr(split) == "Split({} training, {} validation, {} test events)".format(*counts)
    assert split.item_counts().sum() == counts[0] == split.training().n_events


# Shops

def test_a_shop_among_others_is_the_shop_alone(laboratory, tmp_path):
    alone = prepare_data(replace(SMALL, systems=("popularity", "unisrec")), tmp_path, progress=False)
    target = laboratory.target
    assert sorted(target.interactions.item_tokens) == sorted(alone.interactions.item_tokens)
    assert target.statistics == alone.statistics
    rows = [alone.interactions.item_tokens.index(token) for token in target.interactions.item_tokens[1:]]
    torch.testing.assert_close(target.catalogue.mean_text()[1:], alone.catalogue.mean_text()[rows], atol=2e-3, rtol=0)


def test_nothing_of_the_target_is_in_what_is_learned_before(laboratory):
    for data, names in ((laboratory.others, OTHERS), (laboratory.target, (TARGET,))):
        tokens = [*data.interactions.user_tokens, *data.interactions.item_tokens[1:], *data.catalogue.item_tokens[1:],
                  *data.items.item_tokens[1:]]
        assert {token.partition("-")[0] for token in tokens} == set(names)


def test_words_come_from_training_items_of_one_side(laboratory, monkeypatch):
    asked = []
    def spy(catalogue, texts, words, encoder, rows, **options):
        asked.append({laboratory.shops.data.items.item_tokens[row] for row in rows})
        return original(catalogue, texts, words, encoder, rows, **options)
    original = cross.keyword_catalogue
    monkeypatch.setattr(cross, "keyword_catalogue", spy)
    zero, half = laboratory.described(0., 5), laboratory.described(.1, 5)
    assert {token.partition("-")[0] for token in asked[0]} == set(OTHERS)
    known = [half.interactions.item_tokens[item] for item in half.store.training_items]
    assert asked[1] == set(known) and len(known) < half.store.n_items
    assert zero.keyword_catalogue.item_tokens == half.keyword_catalogue.item_tokens == half.catalogue.item_tokens


@pytest.mark.parametrize("share", [0., .1, .5, 1.])
def test_a_share_of_the_users_keeps_its_stages(laboratory, share):
    data = laboratory.target
    kept, smaller = keep_users(data, share, 3), keep_users(data, share / 2, 3)
    learned = np.unique(data.store.user[kept.split.stage == TRAIN])
    assert len(learned) == round(share * data.interactions.n_users)
    assert set(np.unique(data.store.user[smaller.split.stage == TRAIN])) <= set(learned)
    inside = np.isin(data.store.user, learned)
    np.testing.assert_array_equal(kept.split.stage[inside], data.split.stage[inside])
    assert set(kept.split.stage[~inside]) <= {HISTORY, TEST}
    np.testing.assert_array_equal(kept.split.stage == TEST, data.split.stage == TEST)


def test_which_users_are_kept_is_drawn(laboratory):
    one, other = (keep_users(laboratory.target, .3, seed).split.stage for seed in (0, 1))
    assert (one != other).any()


# Transfer

def test_statistics_are_named_and_nothing_else(laboratory):
    for family in FAMILIES:
        catalogue = laboratory.others.catalogue_of(family)
        model = SYSTEMS[family].build(catalogue, SMALL).set_catalogue(catalogue)
        learned, measured = {name for name, _ in model.named_parameters()}, statistics_of(model)
        assert measured and not learned & set(measured)
        assert any(name.endswith("fitted") for name in measured)


def test_zero_shot_has_the_weights_of_the_source(laboratory):
    job = Transfer("unisrec", "others", 0.)
    source, history = laboratory.source_of("unisrec", 0)
    model = Recommender.from_pretrained(laboratory.train(job).folder)
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in model.state_dict().items())
    assert history.epochs and not laboratory.train(job).history.epochs


def test_centre_is_of_the_kitchen_or_carried_over(laboratory):
    source, _ = laboratory.source_of("unisrec", 0)
    own = laboratory.train(Transfer("unisrec", "others", .5))
    carried = laboratory.train(Transfer("unisrec", "others", .5, centred="others"))
    data = laboratory.data_of(.5, 0)
    ids = torch.from_numpy(data.store.training_items)
    ids = ids[~data.catalogue.missing_text_mask[ids]]
    for result, expected in ((own, data.catalogue.mean_text()[ids].mean(0)), (carried, source.items.centring.center)):
        center = Recommender.from_pretrained(result.folder).items.centring.center
        torch.testing.assert_close(center, expected, atol=1e-5, rtol=1e-4)
    assert own.folder != carried.folder


def test_pretraining_is_done_once(laboratory, monkeypatch):
    laboratory.source_of("unisrec", 0)
    again = Laboratory.__new__(Laboratory)
    again.__dict__ |= laboratory.__dict__
    monkeypatch.setattr("mmseqrec.training._train_epoch", None)  # training would fail
    source, _ = again.source_of.__wrapped__(again, "unisrec", 0)
    known = laboratory.source_of("unisrec", 0)[0].state_dict()
    assert all(torch.equal(x, known[name]) for name, x in source.state_dict().items())


def test_what_a_result_depends_on(laboratory):
    given = laboratory.arguments(Transfer("unisrec", "others", .5))
    del given["folder"]
    def mark(**changes): return result_fingerprint("unisrec", 0, **given | changes)
    other, _ = laboratory.source_of("unisrec", 1)
    marks = [mark(), mark(stays=()), mark(source=None, stays=()), mark(source=other)]
    assert len(set(marks)) == 4 and marks[0] == mark()


def test_own_is_pretrained_on_the_users_of_the_fine_tuning(laboratory, monkeypatch):
    stores = []
    def spy(model, store, phase="finetune", **options):
        stores.append((phase, store))
        return fit(model, store, phase, **options)
    monkeypatch.setattr("mmseqrec.experiments.run.fit", spy)
    laboratory.train(Transfer("unisrec", "own", .3))
    laboratory.train(Transfer("unisrec", "none", .3))
    data = laboratory.data_of(.3, 0)
    assert [phase for phase, _ in stores] == ["pretrain", "finetune", "finetune"]
    assert all(store is data.store for _, store in stores)


def test_settings_follow_the_share():
    assert settings_of(Transfer("unisrec", share=0.)).epochs == 0 and settings_of(Transfer("unisrec")) == BASE
    few = settings_of(Transfer("unisrec", share=.1, lr=.5))
    assert few.lr == .5 and few.batch_size < BASE.batch_size and few.epochs > BASE.epochs


# Likeness

def test_likeness_is_the_slow_ranking(laboratory):
    data, store = laboratory.target, laboratory.target.store
    text = data.catalogue.mean_text()
    text = text / text.norm(dim=1, keepdim=True).clamp_min(1e-12)
    found = rank_by_likeness(data, n_last=3)
    for place, event in enumerate(store.rows(TEST)):
        first = max(store.offsets[store.user[event]], event - 3)
        query = sum(text[item] for item in store.items[first:event])
        scores = text[1:] @ query
        target = scores[store.items[event] - 1]
        above, level = int((scores > target + 1e-6).sum()), int((scores >= target - 1e-6).sum())
        assert above + 1 <= found.ranks[place] <= level


# Grids

def test_grids_are_small_and_every_comparison_has_two_sides():
    for name, jobs in GRIDS.items():
        assert len(jobs) == len(set(jobs)) and sum(job.share > 0 and SYSTEMS[job.key].has_seed for job in jobs) <= 60
        assert all(job.key in SYSTEMS for job in jobs)
        for one, other in compared(jobs).values():
            assert [replace(job, before="none", centred=TARGET) for job in one] == other and len(one) == 3
    assert len(compared(GRIDS["kitchen"])) == 16


def test_a_comparison_keeps_to_the_seeds_of_both_sides():
    jobs = [Transfer("unisrec", "none", .1, seed) for seed in (0, 1)] + [Transfer("unisrec", "others", .1, 1)]
    (one, other), = compared(jobs).values()
    assert [job.seed for job in one] == [job.seed for job in other] == [1]
    assert compared(jobs[:2]) == {} == compared(jobs[2:])


stored = [name for name in GRIDS if (artifact_path("cross_domain") / f"{name}.json").exists()]

@pytest.mark.parametrize("name", stored)
def test_stored_grids_are_of_their_trainings_and_of_todays_code(name):
    record = read_json(artifact_path("cross_domain", f"{name}.json"))
    assert record["fingerprint"] == fingerprint(record["inputs"])
    assert record["inputs"]["base"] == json.loads(json.dumps(BASE.changes()))
    for system, version in record["inputs"]["result_versions"].items(): assert SYSTEMS[system].result_version == version
    jobs, result = [asdict(job) for job in GRIDS[name]], record["result"]
    assert record["inputs"]["jobs"] and all(job in jobs for job in record["inputs"]["jobs"])
    assert [{key: run[key] for key in jobs[0]} for run in result["runs"]] == record["inputs"]["jobs"]
    assert sum(run["seconds"] for run in result["runs"] + result["before"]) <= 180 * 60
    for question, found in result["users"].items():
        for metric, one in found.items(): assert one["low"] <= one["difference"] <= one["high"]


@pytest.mark.drawn
def test_a_tiny_grid_is_as_stored(tmp_path):
    kept = read_json(artifact_path("cross_domain", "kitchen.json"))["result"]["tiny"]
    live = run_transfers_tiny(tmp_path)
    assert [run["before"] for run in live] == [run["before"] for run in kept] == ["none", "own", "others"]
    for one, other in zip(live, kept):
        for metric in ("ndcg@10", "recall@10"): assert one[metric] == pytest.approx(other[metric], abs=.02)


def test_parts_train_everything_once_and_a_cut_store_keeps_what_is_there(tmp_path, laboratory, monkeypatch):
    jobs = (*(Transfer("unisrec", "none", share, seed) for seed in (0, 1) for share in (0., .5)),
            Transfer("unisrec", "others", .5))
    monkeypatch.setitem(GRIDS, "kitchen", jobs)
    monkeypatch.setattr(cross, "run_transfers_tiny", lambda folder: [])
    def opened(folder, *_, **__):
        made = Laboratory.__new__(Laboratory)
        made.__dict__ |= laboratory.__dict__ | {"folder": tmp_path, "models": tmp_path}
        return made
    monkeypatch.setattr(cross, "Laboratory", opened)
    train_transfers("kitchen", tmp_path, 1, 2, progress=False)
    some = store_transfers("kitchen", tmp_path, tmp_path / "some.json", cut=True)["result"]
    assert [(run["seed"], run["share"]) for run in some["runs"]] == [(1, 0.), (1, .5)] and some["users"] == {}
    train_transfers("kitchen", tmp_path, 0, 2, progress=False)
    everything = store_transfers("kitchen", tmp_path, tmp_path / "all.json")["result"]
    assert len(everything["runs"]) == 5 and list(everything["users"]) == [jobs[-1].question]
    assert [(row["system"], row["seed"]) for row in everything["before"]] == [("unisrec", 0)]


def test_a_real_shop_takes_the_weights_but_not_the_place_of_the_kitchen(tmp_path):
    files = write_shop(tmp_path / "shop")
    real = replace(SMALL, interactions=str(files["interactions"]), items=str(files["items"]), new_items=None, text_encoder="shipped", min_user=1, min_item=1)
    here = Laboratory(tmp_path / "cross", SMALL, real, progress=False)
    job = Transfer("unisrec", "others", 1.)
    assert not here.is_finished(job)
    result = here.train(job)
    assert here.is_finished(job) and result.folder.is_relative_to(tmp_path / "cross" / "shop" / job.folder)
    assert not any(token.startswith(TARGET) for token in here.target.interactions.item_tokens)
    source, _ = here.source_of("unisrec", 0)
    kitchen = Laboratory(tmp_path / "cross", SMALL, progress=False)
    assert same(weights(source), weights(kitchen.source_of("unisrec", 0)[0])) and not kitchen.is_finished(job)


# What the page says

of_page = page_functions("experiments.cross_domain")

def made_up(gain):
    "Rows of three seeds: pre-training changes every metric by `gain`."
    return [{**asdict(Transfer("unisrec", before, .1, seed)), "ndcg@10": .1 + .01 * seed + gain * (before == "others")}
            for seed in range(3) for before in ("none", "others")]


@pytest.mark.parametrize("gain, low, high, word", [(.05, .01, .09, "helps *"), (-.05, -.09, -.01, "harms *"),
                                                   (.05, -.01, .09, "cannot tell"), (0., .01, .02, "helps")])
def test_verdicts_follow_the_numbers(gain, low, high, word):
    runs = [{**run, "ndcg@10": run["ndcg@10"] + 1e-4 * (run["seed"] == 1 and run["before"] == "others")}
            for run in made_up(gain)]
    users = {Transfer("unisrec", "others", .1).question: {"ndcg@10": {"low": low, "high": high}}}
    assert of_page.verdict(runs, users, "unisrec", "others", .1).partition(" (")[0] == word
    assert of_page.verdict(runs, users, "missrec", "others", .1) == ""


def test_cells_and_tables_choose_like_trainings():
    runs = made_up(.05) + [{**run, "lr": .5, "ndcg@10": 9.} for run in made_up(0)]
    assert of_page.cell(of_page.runs_of(runs, "unisrec", "none", .1)) == "0.110 ± 0.010"
    assert len(of_page.runs_of(runs, "unisrec", "others", .1, lr=.5)) == 3
    table = of_page.transfer_table(runs)
    assert table["a tenth, others"].to_list() == ["0.160 ± 0.010", "", "", ""]


def test_the_learning_rate_is_chosen_by_validation_for_each_seed():
    runs = [{**asdict(Transfer("unisrec", "none", .1, seed, lr)), "valid": [.1, valid], "ndcg@10": test}
            for seed, lr, valid, test in ((0, 3e-4, .3, .1), (0, 1e-3, .2, .9), (1, 3e-4, .2, .8), (1, 3e-3, .4, .2))]
    runs.append({**runs[0], "before": "others", "valid": [.9], "ndcg@10": 1.})
    assert [(run["seed"], run["lr"], run["ndcg@10"]) for run in of_page.chosen(runs, "unisrec", "none")] == [(0, 3e-4, .1), (1, 3e-3, .2)]


def test_modes_are_compared_seed_by_seed():
    def rows(system, before, *values):
        return [{**asdict(Transfer(system, before, 1., seed)), "ndcg@10": value} for seed, value in enumerate(values)]
    runs = (rows("missrec", "none", .1, .2) + rows("missrec", "others", .1, .1) + rows("missrec_frozen", "others", .3, .4)
            + rows("missrec_frozen", "own", .2, .2))
    row = of_page.mode_row(runs, "missrec", 1.)
    assert (row["all, none"], row["frozen, others"], row["frozen, own"], row["with IDs, others"]) == ("0.150 ± 0.071", "0.350 ± 0.071", "0.200 ± 0.000", "")
    found = {name: text.partition(" ")[0] for name, text in of_page.mode_differences(runs, "missrec", 1.).items()}
    assert found == {"frozen - none": "+0.2000", "frozen - all": "+0.2500", "with IDs - all": "", "frozen: others - own": "+0.1500"}


def test_rows_of_page_61_become_transfers():
    rows = [{"system": name, "seed": 0, "ndcg@10": .1, "recall@10": .2} for name in ("missrec", "missrec_scratch", "sasrec", "mp4sr")]
    found = of_page.as_transfers(rows)
    assert [(row["system"], row["before"], row["share"]) for row in found] == [("missrec", "own", 1.), ("missrec", "none", 1.)]
