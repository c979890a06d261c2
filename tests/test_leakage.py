"Nothing leaks: what is held out can be anything, and nothing that was learned moves by a digit."
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from killed_runs import make_clip
from mmseqrec import recommender, training
from mmseqrec.blocks import interests
from mmseqrec.blocks.augment import cloze
from mmseqrec.data import interactions, sequences
from mmseqrec.data.interactions import (TEST, TRAIN, VALID, Split, combine_domains, global_time_split,
                                        hold_out_items, k_core, leave_one_out, read_interactions)
from mmseqrec.data.sequences import SequenceStore, position_batches, prefix_batches
from mmseqrec.data.sources import read_benchmark
from mmseqrec.evaluation import evaluate
from mmseqrec.experiments import cold_start
from mmseqrec.experiments import run as experiments
from mmseqrec.experiments.cold_start import quota_split
from mmseqrec.experiments.run import prepare_data
from mmseqrec.features import keywords
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.models import baselines
from mmseqrec.models.baselines import transition_counts
from mmseqrec.training import fit, training_batches
from small_shop import describe, quick_config, write_shop
from small_world import (BY_CONTENT, CLASSICAL, COUNTING, IMAGE_SIZE, LEARNING, SYSTEMS, TEXT_SIZE, V, build, make_catalogue,
                         make_store, same, weights, without_seconds)
from test_sources import write_benchmark

QUICK = dict(epochs=3, batch_size=16, lr=.01, device="cpu", progress=False)
PLANTED = V + 1  # an item that occurs in held-out events only
PRETRAINED = ("content_unisrec", "content_mp4sr", "content_msm4sr", "content_mmsrec", "content_missrec")

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

@pytest.mark.parametrize("name", CLASSICAL)
def test_the_planted_item_has_no_similarity(name):
    "It has no number among the training items, and no digit depends on it; likeness of content is nobody's event."
    store, catalogue = planted_store([VALID, TEST]), make_catalogue(PLANTED)
    model = build(name, catalogue, store=store)
    answer, = model.recommend([["item-1"]], k=PLANTED)
    if name != "content_knn":
        assert model.known.number[PLANTED] == 0 and answer.scores[answer.items.index(f"item-{PLANTED}")] == 0
    only_training = replace(store, items=np.where(store.stage == TRAIN, store.items, 1).astype(np.int32))
    assert same(weights(model), weights(build(name, catalogue, store=only_training)))


@pytest.mark.parametrize("name", sorted(set(COUNTING) - set(CLASSICAL)))
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
    for name in ("popularity", "markov"): assert build(name, catalogue, store=store).counts.item_counts[code] == 0
    for name in ("itemknn", "ease"): assert build(name, catalogue, store=store).known.number[code] == 0
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


# The rules again, each also broken on purpose: a check that cannot fail guards nothing

KEPT_BACK = 4  # users of `events_table` who have the planted item early, too: `hold_out_items` must take it away


def check_split(kind, early=False):
    "The planted item is in test rows only, for training batches and counts alike."
    table = events_table()
    if early:  # the item that these users took second
        named = {f"u{user}" for user in range(5, 5 + KEPT_BACK)}
        is_early = pl.col("user_id").is_in(sorted(named)) & (pl.col("timestamp") == 11)
        table = table.with_columns(item_id=pl.when(is_early).then(pl.lit("PLANTED")).otherwise(pl.col("item_id")))
    core = k_core(read_interactions(table), 5, 5)
    split = SPLITS[kind](core)
    store, code = SequenceStore.from_split(split), core.item_tokens.index("PLANTED")
    assert code not in store.training_items and (store.items[store.stage == TEST] == code).any()
    for batch in all_batches(store): assert not (batch.item_seq == code).any() and not (batch.pos_item == code).any()


def check_published(folder):
    "What stands in the files of validation and test rows is in no training batch."
    histories = {str(user): [user % 5, (user + 2) % 5, (user + 3) % 5, 5, 5] for user in range(6)}
    write_benchmark(folder, histories)
    split = read_benchmark(folder).split
    store, code = SequenceStore.from_split(split), split.interactions.item_tokens.index("5")
    assert (store.items == code).sum() == 12 and code not in store.training_items
    for batch in all_batches(store): assert not (batch.item_seq == code).any() and not (batch.pos_item == code).any()


def check_quota():
    "An item with the quota 0 is in no training batch, and other items have as many training events as their quota says."
    rng = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{item}", place) for user in range(60) for place, item in enumerate(rng.integers(0, 6, 8))]
    events = read_interactions(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"))
    quota = np.array([-1, 0, 3, -1, 0, 5, -1])
    split = quota_split(events, quota)
    store, limited = SequenceStore.from_split(split), quota >= 0
    assert (split.item_counts(TRAIN)[limited] == quota[limited]).all() and split.item_counts(TEST)[1] > 0
    for batch in all_batches(store): assert not np.isin(batch.item_seq, [1, 4]).any() and not np.isin(batch.pos_item, [1, 4]).any()


def check_pretraining_sequences(name):
    "No batch of pre-training holds the planted item."
    model, store = build(name, make_catalogue(PLANTED)), planted_store([VALID, TEST])
    for epoch in range(3):
        for batch in training_batches(model, store, "pretrain", 16, 0, epoch):
            assert not (batch.item_seq == PLANTED).any() and not (batch.pos_item == PLANTED).any()


def check_pretraining_pairs():
    "MMSRec pairs pictures and texts of training items only."
    pairs = experiments.SYSTEMS["mmsrec"].pretrain_store(planted_store([VALID, TEST]))
    assert PLANTED not in pairs.items and len(pairs.items)


def check_pretraining_digits(name):
    "Pre-training ends at the same digits, whatever the test events are."
    store, found = make_store(40), []
    for each in (store, swapped(store, [TEST])):
        model = build(name)
        found.append((without_seconds(fit(model, each, "pretrain", **QUICK | dict(epochs=1))), weights(model)))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])


def first_loss(name, catalogue, **options):
    "Take the loss of a first step, and its gradients; return model and loss."
    model, store = build(name, catalogue, **options).train(), planted_store([VALID, TEST])
    model.start_epoch(store, 0)
    loss = model(training_batches(model, store, "finetune", 64)[0], "finetune")["loss"]
    loss.backward()
    return model, loss.item()


def wild_catalogue():
    "The catalogue of V + 1 items, but the planted one looks otherwise."
    plain = make_catalogue(PLANTED)
    tables = {f"{kind}_emb": getattr(plain, f"{kind}_emb").clone() for kind in ("text", "image")}
    for table in tables.values(): table[PLANTED] = 5 * table[PLANTED].flip(-1) + 1
    return plain, replace(plain, **tables)


def check_candidates(name, **options):
    "The planted item is no candidate of a softmax: its looks move no loss, its embedding has no gradient and is zero."
    found = [first_loss(name, catalogue, **options) for catalogue in wild_catalogue()]
    assert found[0][1] == found[1][1]
    table = getattr(found[0][0], "item_emb", None)
    if table is not None: assert not table.weight.grad[PLANTED].any() and not table.weight[PLANTED].any()


def check_gaps():
    "An item that BERT4Rec shows in another's place is one of the training items."
    model, _ = first_loss("bert4rec", make_catalogue(PLANTED))
    batch = prefix_batches(planted_store([VALID, TEST]), TRAIN, 500, 10)[0]
    for seed in range(3):
        torch.manual_seed(seed)
        assert not (cloze(batch, PLANTED, 1., model.known_items).item_seq == PLANTED).any()


def check_lsa(clip, folder):
    "A word of held-out texts is no word of TF-IDF; the texts of training items keep their digits."
    found = []
    for place, say in (("a", describe), ("b", lambda row: f"A {WILD} chair of wool {row}.")):
        files = write_shop(folder / place / "shop", HELD_OUT, lambda row: (say if row >= 30 else describe)(row))
        found.append(prepare_data(quick_config(files, clip, text_encoder="lsa", systems=("popularity",)), folder / place / "run", False))
        assert WILD not in (folder / place / "run/features/lsa/lsa.json").read_text()
    rows = np.unique(found[0].store.items[found[0].store.stage == TRAIN])
    assert len(rows) == 30 and torch.equal(*(data.catalogue.text_emb[rows] for data in found))


def check_domains():
    "Pre-training on other domains: an item of the target is refused among the sources, also after they were combined."
    table = events_table()
    source, target = (read_interactions(table.with_columns(item_id=pl.lit(name) + pl.col("item_id"))) for name in ("a-", "b-"))
    both = combine_domains({"a": source, "b": target})
    assert interactions.check_disjoint(source, target) is not None
    try: interactions.check_disjoint(both, target)
    except ValueError: return
    raise AssertionError("the target is among the sources")


# How each rule is broken

def broken(owner, name, value): return lambda patch: patch.setattr(owner, name, value)


def rows_of_all(store, stage): return np.flatnonzero(store.history_length(np.arange(len(store.items))) > 0)

def all_items(store): return np.arange(1, store.n_items + 1)

def count_all(self, store): self.item_counts.copy_(torch.from_numpy(np.bincount(store.items, minlength=store.n_items + 1)))

def forgetful(split):
    "Take a split whose first user has training events only."
    events = split.interactions
    return SequenceStore(events.item, events.offsets, np.where(events.user == 0, TRAIN, split.stage).astype(np.int8), events.n_items)

def gather_later(items, starts, lengths, gather=sequences.pad_gather):
    return gather(np.r_[items, items[-2:]], starts + 2, lengths)

def seen_by_all(store, events):
    users = store.user[events]
    row, event = sequences.flat_ranges(store.offsets[users], np.diff(store.offsets)[users])
    return row, store.items[event].astype(np.int64)

def tell_nothing(model, store): model.known_items = None

TRAINING_READS_ALL = broken(SequenceStore, "rows", rows_of_all)
ALL_ITEMS_COUNT_AS_TRAINED = broken(SequenceStore, "training_items", property(all_items))
A_TEST_ROW_IS_TRAINING = broken(SequenceStore, "from_split", forgetful)
NOTHING_IS_TOLD = broken(recommender, "note_known_items", tell_nothing)
ALL_TEXTS_COUNT = broken(keywords, "_training_rows", lambda items, n_rows: list(range(1, n_rows)))

RULES = {  # what must hold -> (check of the folders `tmp` and `clip`, the rule broken)
    **{f"split, {kind}": (lambda tmp, clip, kind=kind: check_split(kind), A_TEST_ROW_IS_TRAINING) for kind in SPLITS},
    **{f"held out, {kind}": (lambda tmp, clip, kind=kind: check_split(kind, early=True), broken(
        interactions, "_choose_cold", lambda *_: np.zeros(0, np.int64))) for kind in ("strictly cold", "strictly cold in time")},
    "split, published": (lambda tmp, clip: check_published(tmp), A_TEST_ROW_IS_TRAINING),
    "split, quota": (lambda tmp, clip: check_quota(), broken(cold_start, "VALID", -1)),
    "training batches": (lambda tmp, clip: test_the_planted_item_is_in_no_training_batch(), TRAINING_READS_ALL),
    "counts, popularity": (lambda tmp, clip: test_the_planted_item_is_not_counted("popularity"),
                           broken(baselines.ItemCounts, "count", count_all)),
    "counts, transitions": (lambda tmp, clip: test_the_planted_item_is_not_counted("markov"), TRAINING_READS_ALL),
    **{f"similarities, {name}": (lambda tmp, clip, name=name: test_the_planted_item_has_no_similarity(name),
                                    ALL_ITEMS_COUNT_AS_TRAINED) for name in ("itemknn", "ease")},
    **{f"test events, {name}": (lambda tmp, clip, name=name: test_other_test_events_change_no_digit(name), TRAINING_READS_ALL)
       for name in ("sasrec", "bert4rec")},
    **{f"validation events, {name}": (lambda tmp, clip, name=name: test_other_validation_events_change_nothing_but_the_choice(name),
                                      TRAINING_READS_ALL) for name in ("sasrec", "bert4rec")},
    "the chosen epoch": (lambda tmp, clip: test_other_test_events_change_no_digit("sasrec"), broken(training, "VALID", TEST)),
    **{f"statistics, {name}": (lambda tmp, clip, name=name: test_features_of_items_outside_training_change_no_digit_of_the_batches(name),
                               ALL_ITEMS_COUNT_AS_TRAINED) for name in BY_CONTENT},
    "interests": (lambda tmp, clip: test_features_of_items_outside_training_change_no_digit_of_the_batches("content_missrec"),
                  broken(interests, "_training_mask", lambda items, there: torch.ones_like(there))),
    **{f"candidates, {name}": (lambda tmp, clip, name=name: check_candidates(name), NOTHING_IS_TOLD) for name in LEARNING},
    **{f"sampled candidates, {name}": (lambda tmp, clip, name=name: check_candidates(name, n_candidates=3), NOTHING_IS_TOLD)
       for name in ("sasrec", "content_unisrec", "content_mmsrec", "content_missrec")},
    "gaps": (lambda tmp, clip: check_gaps(), NOTHING_IS_TOLD),
    **{f"pre-training sequences, {name}": (lambda tmp, clip, name=name: check_pretraining_sequences(name), TRAINING_READS_ALL)
       for name in PRETRAINED},
    **{f"pre-training, {name}": (lambda tmp, clip, name=name: check_pretraining_digits(name), TRAINING_READS_ALL)
       for name in PRETRAINED},
    "pre-training pairs": (lambda tmp, clip: check_pretraining_pairs(), ALL_ITEMS_COUNT_AS_TRAINED),
    "words": (lambda tmp, clip: test_a_word_of_held_out_items_is_no_keyword(clip, tmp), ALL_TEXTS_COUNT),
    "words and levels": (lambda tmp, clip: test_held_out_items_change_no_keyword_of_the_others(clip, tmp), ALL_TEXTS_COUNT),
    "words, training items": (lambda tmp, clip: test_a_word_of_held_out_items_is_no_keyword(clip, tmp), ALL_ITEMS_COUNT_AS_TRAINED),
    "TF-IDF": (lambda tmp, clip: check_lsa(clip, tmp), broken(
        Split, "unseen_item_mask", property(lambda split: np.zeros(split.interactions.n_items + 1, bool)))),
    "history": (lambda tmp, clip: test_a_history_holds_no_later_event("sasrec"), broken(sequences, "pad_gather", gather_later)),
    "seen items": (lambda tmp, clip: test_a_history_holds_no_later_event("popularity"), broken(SequenceStore, "seen_items", seen_by_all)),
    "domains": (lambda tmp, clip: check_domains(), broken(interactions, "check_disjoint", lambda sources, target: 0)),
}
OTHERWISE = ("split,", "held out,", "pre-training", "candidates", "sampled", "gaps", "TF-IDF", "domains")  # not tested above


@pytest.mark.parametrize("name", [name for name in RULES if name.startswith(OTHERWISE)])
def test_the_rule_holds(name, tmp_path, clip): RULES[name][0](tmp_path, clip)


@pytest.mark.parametrize("name", RULES)
def test_the_rule_broken_on_purpose_is_found_out(name, tmp_path, clip, monkeypatch):
    check, break_it = RULES[name]
    break_it(monkeypatch)
    with pytest.raises(AssertionError): check(tmp_path, clip)
