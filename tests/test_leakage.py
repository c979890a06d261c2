"Nothing leaks: what is held out can be anything, and nothing that was learned moves by a digit."
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

import mmseqrec.training as training
from killed_runs import make_clip
from mmseqrec.data.interactions import (TEST, TRAIN, VALID, global_time_split, hold_out_items, k_core, leave_one_out,
                                        read_interactions)
from mmseqrec.data.sequences import SequenceStore, position_batches, prefix_batches
from mmseqrec.evaluation import evaluate
from mmseqrec.experiments.run import prepare_data
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.models.baselines import transition_counts
from mmseqrec.training import fit
from small_shop import describe, quick_config, write_shop
from small_world import (BY_CONTENT, COUNTING, IMAGE_SIZE, LEARNING, SYSTEMS, TEXT_SIZE, V, build, make_catalogue, make_store,
                         same, weights, without_seconds)

QUICK = dict(epochs=3, batch_size=16, lr=.01, device="cpu", progress=False)
PLANTED = V + 1  # an item that occurs in held-out events only

every = pytest.mark.parametrize("name", SYSTEMS)


def planted_store(stages, seed=0):
    "The events of `make_store`, with the planted item in all events of some stages."
    store = make_store(40, seed=seed)
    return SequenceStore(np.where(np.isin(store.stage, stages), PLANTED, store.items).astype(np.int32), store.offsets,
                         store.stage, PLANTED)


def all_batches(store, max_len=10):
    "Everything that training ever looks at, over some epochs."
    for epoch in range(3):
        for batches in (prefix_batches(store, TRAIN, 16, max_len, 0, epoch), position_batches(store, 16, max_len, 0, epoch),
                        prefix_batches(store, TRAIN, 16, max_len, 0, epoch, one_per_user=True)):
            yield from batches


# Batches

def test_the_planted_item_is_in_no_training_batch():
    store, count = planted_store([VALID, TEST]), 0
    for batch in all_batches(store):
        assert not (batch.item_seq == PLANTED).any() and not (batch.pos_item == PLANTED).any()
        count += batch.n_targets
    assert count == 9 * len(store.rows(TRAIN)) and (store.items == PLANTED).sum() > 30


def test_the_planted_item_is_found_where_it_was_planted():
    "The test above can fail: planted in one training event, the item is seen by every kind of batch."
    store = planted_store([VALID, TEST])
    items = store.items.copy()
    items[store.rows(TRAIN)[0]] = PLANTED
    for batches in (prefix_batches, position_batches):
        arguments = (TRAIN, 16, 10) if batches is prefix_batches else (16, 10)
        assert any((batch.pos_item == PLANTED).any() for batch in batches(replace(store, items=items), *arguments))


# Counting

@pytest.mark.parametrize("name", COUNTING)
def test_the_planted_item_is_not_counted(name):
    store = planted_store([VALID, TEST])
    model = build(name, make_catalogue(PLANTED), store=store)
    assert model.counts.item_counts[PLANTED] == 0 and model.counts.item_counts.sum() == (store.stage == TRAIN).sum()
    item, after, times = transition_counts(store)
    assert PLANTED not in item and PLANTED not in after and times.sum() == len(store.rows(TRAIN))
    answer, = model.recommend([["item-1"]], k=PLANTED)
    assert answer.scores[answer.items.index(f"item-{PLANTED}")] == 0


# Training

def swapped(store, stages, seed=5):
    "The same events with other items in some stages."
    other = np.random.default_rng(seed).integers(1, store.n_items + 1, len(store.items))
    return replace(store, items=np.where(np.isin(store.stage, stages), other, store.items).astype(np.int32))


@every
def test_other_test_events_change_no_digit(name):
    "Weights, counts, losses and the chosen epoch: the same digits, whatever the test events are."
    store, found = make_store(40), []
    for each in (store, swapped(store, [TEST])):
        model = build(name, counted=False)
        found.append((without_seconds(fit(model, each, **QUICK)), weights(model)))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])


@every
def test_other_validation_events_change_nothing_but_the_choice(name):
    "Each epoch ends at the same weights; only which epoch is kept may differ."
    store, found = make_store(40), []
    for each in (store, swapped(store, [VALID, TEST])):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_validate", lambda model, *_: seen.append(weights(model)) or 0.)
            fit(build(name, counted=False), each, **QUICK)
        found.append(seen)
    assert len(found[0]) == len(found[1]) > 0
    for a, b in zip(*found): assert same(a, b)


@pytest.mark.parametrize("name", LEARNING)
def test_training_events_do_change_the_weights(name):
    "The two tests above can fail: one other training event is another result."
    store = make_store(40)
    items = store.items.copy()
    items[store.rows(TRAIN)[3]] = items[store.rows(TRAIN)[3]] % V + 1
    found = []
    for each in (store, replace(store, items=items)):
        model = build(name)
        fit(model, each, **QUICK)
        found.append(weights(model))
    assert not same(*found)


@pytest.mark.parametrize("name", BY_CONTENT)
def test_features_of_items_outside_training_change_no_digit_of_the_batches(name):
    "Statistics of features come from training items: a cold item's features may be anything."
    store, plain = planted_store([TEST]), make_catalogue(PLANTED)
    wild = {"text": plain.text_emb.clone(), "image": plain.image_emb.clone()}
    for table in wild.values(): table[PLANTED] *= 1000
    other = replace(plain, text_emb=wild["text"], image_emb=wild["image"])
    found = []
    for catalogue in (plain, other):
        model = build(name, catalogue)
        model.start_epoch(store, 0)
        batch = prefix_batches(store, TRAIN, 50, 10)[0]
        assert not (batch.item_seq == PLANTED).any()
        known = {key: x[:PLANTED] if x.ndim and len(x) == PLANTED + 1 else x for key, x in weights(model).items()}  # not its row
        found.append((known, model.encode_items(torch.arange(1, V + 1)).vectors, model.encode_sequence(batch)))
    assert same(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:]): torch.testing.assert_close(a, b, rtol=0, atol=0)


# Histories

@every
def test_a_history_holds_no_later_event(name):
    "Later events of the same user can be anything: the rank of a validation event does not move."
    store = make_store(40)
    later = store.items.copy()
    later[store.stage == TEST] = np.random.default_rng(1).integers(1, V + 1, (store.stage == TEST).sum())
    model = build(name, store=store)
    for exclude_seen in (False, True):
        ranks = [evaluate(model, replace(store, items=items), VALID, exclude_seen).ranks for items in (store.items, later)]
        np.testing.assert_array_equal(*ranks)


# From a table to batches

def events_table():
    "Thirty users with eight events each; PLANTED is everybody's last item, RARE occurs four times, u0 has two events."
    rng, rows = np.random.default_rng(0), [("u0", "i1", 0), ("u0", "i2", 1)]
    for user in range(1, 31):
        items = [f"i{i}" for i in rng.integers(1, 13, 8)]
        if user <= 4: items[2] = "RARE"
        items[-1] = "PLANTED"
        rows += [(f"u{user}", item, 10 + place) for place, item in enumerate(items)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").sample(fraction=1, shuffle=True, seed=0)


SPLITS = {
    "leave one out": leave_one_out,
    "global time": lambda events: global_time_split(events, 16, 17),
    "strictly cold": lambda events: hold_out_items(events, items=["PLANTED"]),
    "strictly cold in time": lambda events: hold_out_items(events, items=["PLANTED"], split=lambda e: global_time_split(e, 16, 17)),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_from_table_to_batches_a_planted_item_stays_where_it_belongs(kind):
    core = k_core(read_interactions(events_table()), 5, 5)
    assert "RARE" not in core.item_tokens and "u0" not in core.user_tokens, "removed from catalogue and users alike"
    split = SPLITS[kind](core)
    store, code = SequenceStore.from_split(split), core.item_tokens.index("PLANTED")
    assert (store.items[store.stage == TEST] == code).all() and split.item_counts(TRAIN)[code] == 0
    for batch in all_batches(store):
        assert not (batch.item_seq == code).any() and not (batch.pos_item == code).any()
    rng = np.random.default_rng(0)
    catalogue = catalogue_from_arrays(core.item_tokens, rng.standard_normal((len(core.item_tokens), TEXT_SIZE)),
                                      rng.standard_normal((len(core.item_tokens), IMAGE_SIZE)))
    for name in COUNTING: assert build(name, catalogue, store=store).counts.item_counts[code] == 0
    assert not np.isin(code, transition_counts(store)[:2])
    for batch in prefix_batches(store, TEST, 64, 10):  # nor in the history of its own question
        assert not (batch.item_seq == code).any()


def test_random_cold_items_are_in_no_batch():
    events = k_core(read_interactions(events_table()), 5, 5)
    split = hold_out_items(events, .25, seed=3)
    store = SequenceStore.from_split(split)
    assert len(split.cold_items) == 3
    for batch in all_batches(store):
        assert not np.isin(batch.item_seq, split.cold_items).any() and not np.isin(batch.pos_item, split.cold_items).any()
    counts = build("popularity", catalogue_from_arrays(events.item_tokens, np.ones((len(events.item_tokens), 2))), store=store).counts.item_counts
    assert not counts[torch.from_numpy(split.cold_items.astype(int))].any()
    for stage in (VALID, TEST):
        for batch in prefix_batches(store, stage, 64, 10): assert not np.isin(batch.item_seq, split.cold_items).any()


# Words

HELD_OUT = tuple(f"new{n}" for n in range(8))  # everybody's last item is one of these
WILD = "zyzzyva"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder)
    return folder


def prepared(folder, clip, of_held_out=describe, of_all=describe, seed=0):
    "A shop from files to keywords; held-out items are rows 30 to 37 of its table."
    files = write_shop(folder / "shop", HELD_OUT, lambda row: (of_held_out if row >= 30 else of_all)(row), seed)
    return prepare_data(quick_config(files, clip), folder / "run", progress=False)


def test_a_word_of_held_out_items_is_no_keyword(clip, tmp_path):
    "Eight held-out items share a word, more than a word needs; it is found nowhere, neither among words nor among keywords."
    data = prepared(tmp_path, clip, of_held_out=lambda row: f"A {WILD} {row}. A red mug.")
    rows = [data.interactions.item_tokens.index(name) for name in HELD_OUT]
    assert not np.isin(data.store.items[data.store.stage == TRAIN], rows).any()
    assert all(WILD in " ".join(data.items.texts[row]) for row in rows)
    assert WILD not in data.keywords.words and data.keywords.words
    assert all(data.keywords.of(row) and WILD not in data.keywords.of(row) for row in range(1, len(data.items.item_tokens)))


def test_the_word_is_found_where_training_items_have_it(clip, tmp_path):
    "The test above can fail: in eight training items, the same word is one of the vocabulary."
    data = prepared(tmp_path, clip, of_all=lambda row: describe(row) + f" A {WILD}." * (row < 8))
    assert WILD in data.keywords.words


def test_held_out_items_change_no_keyword_of_the_others(clip, tmp_path):
    "Vocabulary and keywords of training items stay when held-out items have other texts and pictures."
    plain = prepared(tmp_path / "a", clip)
    other = prepared(tmp_path / "b", clip, of_held_out=lambda row: f"A {WILD} chair {row}.", seed=9)
    assert plain.keywords.words == other.keywords.words and plain.interactions.item_tokens == other.interactions.item_tokens
    rows = np.unique(plain.store.items[plain.store.stage == TRAIN])
    assert len(rows) == 30
    assert torch.equal(plain.keywords.top[rows], other.keywords.top[rows])
    torch.testing.assert_close(plain.keyword_catalogue.image_emb[rows], other.keyword_catalogue.image_emb[rows])
    assert not torch.equal(plain.catalogue.image_emb, other.catalogue.image_emb)
