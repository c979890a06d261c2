"ItemKNN, EASE and the neighbours by content, each against loops over users and items."
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from mmseqrec.data.interactions import TEST, TRAIN
from mmseqrec.data.sequences import SequenceStore, collate
from mmseqrec.experiments.run import prepare_data
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.models import classical
from mmseqrec.models.classical import EASE, ContentKNN, ItemKNN, ease_weights, nearest_neighbours, newest_first, user_item_matrix
from mmseqrec.recommender import Recommender
from mmseqrec.training import fit
from small_shop import quick_config, write_shop
from small_world import CLASSICAL, IMAGE_SIZE, NO_IMAGE, NOTHING, TEXT_SIZE, V, build, make_catalogue, make_store, same, weights

HISTORIES = [[1, 2, 3], [7], [4, 5, 6, 6, 1, 12, 11, 10], [5, 3, 5], [2, 2, 2, 1]]
BY_USERS = ("itemknn", "ease")

each = pytest.mark.parametrize("name", CLASSICAL)
by_users = pytest.mark.parametrize("name", BY_USERS)


@pytest.fixture(params=range(3))
def store(request): return make_store(60, seed=request.param, longest=12)


def scores(model, histories=HISTORIES):
    with torch.no_grad(): return model.score(model.encode_sequence(collate(histories, model.max_len)), model.encode_items())


# The slow versions: sets of users, one pair of items at a time

def users_of(store):
    "The users who took each item in training events."
    users = {item: set() for item in range(1, store.n_items + 1)}
    for event in range(len(store.items)):
        if store.stage[event] == TRAIN: users[int(store.items[event])].add(int(store.user[event]))
    return users


def slow_knn(store, k, shrinkage):
    users, found = users_of(store), np.zeros((store.n_items + 1, store.n_items + 1))
    for i in range(1, store.n_items + 1):
        similar = {}
        for j in range(1, store.n_items + 1):
            both = len(users[i] & users[j])
            if i != j and both: similar[j] = both / ((len(users[i]) * len(users[j])) ** .5 + shrinkage)
        for j in sorted(similar, key=lambda j: (-similar[j], j))[:k]: found[i, j] = similar[j]
    return found


def slow_ease(store, l2):
    "Each column is a ridge regression of one item on all others, by lists of equations."
    users, found = users_of(store), np.zeros((store.n_items + 1, store.n_items + 1))
    table = np.array([[user in users[item] for item in range(1, store.n_items + 1)] for user in range(len(store.offsets) - 1)], float)
    for j in range(store.n_items):
        others = np.delete(np.arange(store.n_items), j)
        rows = np.concatenate([table[:, others], np.sqrt(l2) * np.eye(len(others))])
        found[1 + others, 1 + j] = np.linalg.lstsq(rows, np.r_[table[:, j], np.zeros(len(others))], rcond=None)[0]
    return found


def slow_content(store, catalogue):
    "Cosines of joined directions of centred features."
    trained = sorted({int(i) for i, stage in zip(store.items, store.stage) if stage == TRAIN})
    vectors = []
    for item in range(catalogue.n_items + 1):
        parts = []
        for name in ("text", "image"):
            features, absent = getattr(catalogue, f"mean_{name}")().double().numpy(), getattr(catalogue, f"missing_{name}_mask").numpy()
            part = features[item] - np.mean([features[i] for i in trained if not absent[i]], axis=0)
            parts.append(0 * part if absent[item] else part / np.linalg.norm(part))
        joined = np.concatenate(parts)
        vectors.append(joined / max(np.linalg.norm(joined), 1e-12))
    return np.array([[a @ b for b in vectors] for a in vectors])


def slow_scores(similarity, history, decay, n_last):
    total, seen = np.zeros(len(similarity)), set()
    for place, item in enumerate(history[::-1][:n_last]):
        if item not in seen: total += decay ** place * similarity[item]
        seen.add(item)
    return total[1:]


def slow_table(name, store, catalogue):
    if name == "itemknn": return slow_knn(store, 5, 2.)
    return slow_ease(store, 2.) if name == "ease" else slow_content(store, catalogue)


@each
def test_scores_are_those_of_the_loops(name, store):
    model, catalogue = build(name, store=store), make_catalogue()
    table = slow_table(name, store, catalogue)
    for decay in (0, .3, 1.):
        model.decay = decay
        expected = [slow_scores(table, history, decay, model.max_len) for history in HISTORIES]
        np.testing.assert_allclose(scores(model), expected, rtol=0, atol=2e-6)
    assert not list(model.parameters()), "nothing to train"


@each
def test_only_the_last_items_count(name, store):
    model = build(name, store=store)
    model.max_len = 2
    shorter = [history[-2:] for history in HISTORIES]
    torch.testing.assert_close(scores(model), scores(model, shorter))


def test_newest_first_lists_each_item_once():
    batch = collate([[4, 4, 2, 4, 7], [9]], 10)
    assert newest_first(batch, n_last=4).tolist() == [[7, 4, 2, 0], [9, 0, 0, 0]]
    assert newest_first(batch, torch.tensor([0, 3, 5]), 3).tolist() == [[4, 0, 0], [4, 2, 0], [9, 0, 0]]


# The pieces

def test_a_user_counts_once_and_held_out_events_never(store):
    matrix, users = user_item_matrix(store), users_of(store)
    assert matrix.shape == (60, len(store.training_items)) and set(matrix.data) == {1.}
    for column, item in enumerate(store.training_items): assert set(np.flatnonzero(matrix.toarray()[:, column])) == users[item]


@pytest.mark.parametrize("k, shrinkage", [(1, 0.), (3, 10.), (40, 0.)])
def test_blocks_do_not_matter(k, shrinkage):
    rng = np.random.default_rng(k)
    matrix = sparse.csr_array((rng.random((30, 25)) < .2).astype(float))
    whole = nearest_neighbours(matrix, k, shrinkage)
    for at_once in (1, 70):
        for a, b in zip(nearest_neighbours(matrix, k, shrinkage, at_once), whole): assert np.array_equal(a, b)
    neighbour, similarity = whole
    assert neighbour.shape == similarity.shape == (26, k) and not (neighbour == np.arange(26)[:, None])[1:].any()
    assert (np.diff(similarity, axis=1) <= 0).all() and ((neighbour > 0) == (similarity > 0)).all() and not similarity[0].any()


def test_memory_of_neighbours_grows_with_pairs_not_with_all_items():
    "Sixty thousand items and a table of all pairs would be 29 GB."
    items = np.random.default_rng(0).permutation(60_000)
    matrix = sparse.csr_array((np.ones(60_000), (np.arange(60_000) // 3, items)))
    neighbour, similarity = nearest_neighbours(matrix, 4)
    assert (np.count_nonzero(neighbour[1:], axis=1) == 2).all() and np.allclose(similarity[1:, :2], 1)
    assert set(neighbour[items[0] + 1, :2]) == {items[1] + 1, items[2] + 1}


def test_ease_is_a_minimum():
    "Any other weights with a zero diagonal have a larger loss."
    rng = np.random.default_rng(0)
    X = (rng.random((20, 6)) < .4).astype(float)
    def loss(B): return ((X - X @ B) ** 2).sum() + 3 * (B ** 2).sum()
    B = ease_weights(sparse.csr_array(X), 3.)
    assert not np.diag(B).any()
    for _ in range(20):
        step = rng.standard_normal(B.shape) * 1e-3
        np.fill_diagonal(step, 0)
        assert loss(B + step) > loss(B)


# Items without training events

@by_users
def test_an_item_without_training_events_has_no_similarity(name):
    "Item 12 is in test events only; item 11 in none."
    store = make_store(60, n_items=10)
    items = np.where(store.stage == TEST, 12, store.items).astype(np.int32)
    model = build(name, store=SequenceStore(items, store.offsets, store.stage, V))
    assert model.known.number.tolist() == [0, *range(1, 11), 0, 0]
    found = scores(model, [[1, 2], [12, 1], [12], [11, 12]])
    assert not found[:, 10:].any() and not found[2:].any() and found[0].any()


def test_content_finds_an_item_that_nobody_took():
    store, catalogue = make_store(60), make_catalogue(whole=True)
    model = build("content_knn", catalogue, store)
    center = weights(model)
    grown = catalogue.take([*range(1, V + 1), 7])
    model.set_catalogue(replace(grown, item_tokens=[*catalogue.item_tokens, "new"]))
    answer, = model.recommend([["item-7"]], k=2)
    assert set(answer.items) == {"item-7", "new"} and answer.scores[1] == pytest.approx(1)
    assert same(weights(model), center), "a new item moves no centre"


def test_content_weighs_modalities_alike_and_reads_one_if_there_is_one():
    text, image = np.eye(3, dtype=np.float32), np.float32([[5, 0], [5, 0], [0, 9]])
    model = ContentKNN(text_size=3, image_size=2).set_catalogue(catalogue_from_arrays(list("abc"), text_emb=text, image_emb=image))
    assert scores(model, [[1]])[0].tolist() == pytest.approx([1, .5, 0])  # before any centring
    catalogue = make_catalogue()
    of_text, both = (ContentKNN(**sizes).set_catalogue(catalogue) for sizes in (
        dict(text_size=TEXT_SIZE), dict(text_size=TEXT_SIZE, image_size=IMAGE_SIZE)))
    for model in (of_text, both): model.start_epoch(make_store(), 0)
    both, alone = scores(both, [[NO_IMAGE], [NOTHING]]), scores(of_text, [[NO_IMAGE]])
    assert not both[1].any(), "nothing is like an item without content"
    torch.testing.assert_close(both[0, 0], alone[0, 0] / 2 ** .5)  # item 1 has an image to which nothing corresponds


def test_content_asks_no_user():
    "The same training items in other histories: the same answers, bit for bit."
    store = make_store(60)
    other = SequenceStore(store.items[::-1].copy(), store.offsets, np.zeros_like(store.stage), V)
    whole = replace(store, stage=np.zeros_like(store.stage))
    assert torch.equal(*(scores(build("content_knn", store=one)) for one in (whole, other)))


# Counting again, other catalogues, saving

@each
def test_counting_again_forgets_the_first_count(name):
    first, second = make_store(30, seed=1), make_store(50, seed=2, n_items=V)
    model = build(name, store=first)
    model.start_epoch(second, 0)
    assert same(weights(model), weights(build(name, store=second)))


@by_users
def test_items_that_stay_keep_their_similarities(name):
    catalogue, order = make_catalogue(), [7, 2, 9, 1, 4]
    model = build(name, catalogue)
    columns = [item - 1 for item in order]
    before = scores(model, [[item] for item in order])[:, columns]
    model.set_catalogue(catalogue.take(order))
    assert before.any() and torch.equal(scores(model, [[n] for n in range(1, 6)]), before)
    after = scores(model.set_catalogue(catalogue), [[item] for item in range(1, V + 1)])
    assert torch.equal(after[columns][:, columns], before)
    gone = [item - 1 for item in range(1, V + 1) if item not in order]
    assert not after[gone].any() and not after[:, gone].any()
    assert not scores(model.set_catalogue(make_catalogue(name="other"))).any()


@each
def test_a_saved_model_answers_as_before_also_in_part_of_its_catalogue(name, tmp_path):
    "Twelve items, ten of them trained: sizes of both kinds are in the saved configuration."
    store = make_store(60, n_items=10)
    store, catalogue = SequenceStore(store.items, store.offsets, store.stage, V), make_catalogue()
    model = build(name, store=store)
    model.save_pretrained(tmp_path / "whole")
    again = Recommender.from_pretrained(tmp_path / "whole")
    assert type(again) is type(model) and again.decay == model.decay and torch.equal(scores(again), scores(model))
    few = catalogue.take([3, 12, 1])
    model.set_catalogue(few).save_pretrained(tmp_path / "few")
    assert torch.equal(scores(Recommender.from_pretrained(tmp_path / "few"), [[1, 2], [3]]), scores(model, [[1, 2], [3]]))
    assert torch.equal(scores(again.set_catalogue(few), [[1, 2], [3]]), scores(model, [[1, 2], [3]]))


@each
def test_a_process_that_only_imported_the_package_loads_it(name, tmp_path):
    import subprocess
    import sys
    build(name).save_pretrained(tmp_path / "saved")
    code = f"import mmseqrec as mm; print(type(mm.Recommender.from_pretrained({str(tmp_path / 'saved')!r})).__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == type(build(name)).__name__, ran.stderr


# Errors

@pytest.mark.parametrize("make, says", [
    (lambda: ItemKNN(k=0), "k must be at least 1, got 0"), (lambda: ItemKNN(shrinkage=-1), "shrinkage must be at least 0"),
    (lambda: ItemKNN(decay=1.5), "decay must lie between 0 and 1, got 1.5"), (lambda: EASE(decay=float("nan")), "decay must lie"),
    (lambda: EASE(l2=0), "l2 must be at least 1e-06, got 0"), (lambda: ItemKNN(max_len=0), "max_len"),
    (lambda: ContentKNN(4, n_last=0), "n_last must be at least 1"), (lambda: ContentKNN(), "give text_size, image_size or both")])
def test_bad_settings(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_features_must_fit():
    with pytest.raises(ValueError, match="expects image features of 7 numbers"): ContentKNN(image_size=7).set_catalogue(make_catalogue())


def test_too_many_items_are_refused_before_anything_is_computed(monkeypatch):
    n = 20_001
    store = SequenceStore(np.arange(1, n + 1, dtype=np.int32), np.array([0, n]), np.zeros(n, np.int8), n)
    model = EASE().set_catalogue(catalogue_from_arrays([f"i{row}" for row in range(n)], text_emb=np.zeros((n, 1), np.float32)))
    monkeypatch.setattr(classical, "user_item_matrix", lambda store: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=r"20,001 x 20,001 numbers.*\(3.2 GB\); it takes 20,000 at most: use ItemKNN"):
        fit(model, store, device="cpu", progress=False)
    assert model.weights.shape == (1, 1) and not model.known.number.any()


def test_a_run_says_so_before_anything_is_encoded(tmp_path, monkeypatch):
    "Asked for, it is one error; among the standard systems, EASE is left out with a sentence."
    files = write_shop(tmp_path / "shop")
    monkeypatch.setattr(classical, "MOST_ITEMS", 5)
    config = quick_config(files, "shipped", systems=("popularity", "ease"))
    with monkeypatch.context() as patch:
        patch.setattr("mmseqrec.experiments.run.build_catalogue", lambda *_, **__: pytest.fail("something was encoded"))
        with pytest.raises(ValueError, match="takes 5 at most: use ItemKNN; leave ease out of the systems"):
            prepare_data(config, tmp_path / "a", progress=False)
    data = prepare_data(replace(config, systems=None), tmp_path / "b", progress=False)
    assert "ease" not in data.systems and {"itemknn", "content_knn"} <= set(data.systems)
    assert any(note.startswith("EASE needs") and note.endswith("use ItemKNN: it was left out.") for note in data.notes)
