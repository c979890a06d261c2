"""The shop of the gallery: what is stored ranks as stored, moments of a training are what they say."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmseqrec.artifacts import artifact_path, read_json
from mmseqrec.data.interactions import TEST
from mmseqrec.evaluation import evaluate
from mmseqrec.experiments import gallery as g
from mmseqrec.experiments.compare import tiny_config
from mmseqrec.experiments.run import SYSTEMS, prepare_data, run_system

SMALL = replace(tiny_config(g.GALLERY), systems=("sasrec", "mp4sr_content"))


@pytest.fixture(scope="module")
def data(tmp_path_factory): return prepare_data(SMALL, tmp_path_factory.mktemp("gallery"), progress=False)

@pytest.fixture(scope="module")
def stored(): return g.open_gallery()


def test_packing_keeps_rows_and_padding():
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    table = torch.arange(18.).view(3, 2, 3) * ~mask[..., None]
    rows = g.pack(table, mask)
    assert rows.shape == (3, 3) and rows.dtype == torch.float16
    assert torch.equal(g.unpack(rows, mask), table) and g.unpack(rows, mask).dtype == torch.float32

def test_catalogues_come_back(data, tmp_path):
    g.save_catalogues(data, tmp_path)
    plain, described, keywords = g.load_catalogues(tmp_path)
    assert plain.item_tokens == data.catalogue.item_tokens == keywords.item_tokens
    for name in ("text_pad_mask", "image_pad_mask"): assert torch.equal(getattr(plain, name), getattr(data.catalogue, name))
    for one, other in ((plain.text_emb, data.catalogue.text_emb), (plain.image_emb, data.catalogue.image_emb),
                       (described.image_emb, data.keyword_catalogue.image_emb)):
        torch.testing.assert_close(one, other.float(), atol=2e-3, rtol=1e-3)
    assert torch.equal(keywords.top, data.keywords.top) and keywords.words == data.keywords.words

def test_the_last_moment_is_the_training_of_the_main_command(data, tmp_path):
    for name in SMALL.systems:
        model = g.train_moment(name, "trained", data, SMALL, tmp_path / "moments", progress=False)
        result = run_system(name, 0, data, SMALL, tmp_path / "run", progress=False)
        assert np.array_equal(evaluate(model, data.store, progress=False).ranks, result.evaluation.ranks)

def test_moments_continue_one_training(data, tmp_path):
    moments = {moment: g.train_moment("mp4sr_content", moment, data, SMALL, tmp_path, progress=False).state_dict()
               for moment in ("random", "pretrained", "finetune 1")}
    alone = g.train_moment("mp4sr_content", "finetune 1", data, SMALL, tmp_path / "alone", progress=False).state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in moments["finetune 1"].items())
    def differ(a, b): return any(not torch.equal(value, moments[b][name]) for name, value in moments[a].items())
    assert differ("random", "pretrained") and differ("pretrained", "finetune 1")

def test_statistics_of_features_are_those_of_training_items_at_every_moment(data, tmp_path):
    first, last = (g.train_moment("mp4sr_content", moment, data, SMALL, tmp_path, progress=False).state_dict()
                   for moment in ("random", "pretrained"))
    names = [name for name in first if name.endswith(("center", "spread"))]
    assert names and all(torch.equal(first[name], last[name]) for name in names)

def test_items_are_measured_as_loops_measure_them(data, tmp_path):
    model = g.train_moment("mp4sr_content", "random", data, SMALL, tmp_path, progress=False)
    labels = {"parity": np.arange(data.store.n_items + 1) % 2}
    found = g.measure_items(model, data, labels)
    complete = [row for row in range(1, data.store.n_items + 1)
                if not (data.catalogue.missing_text_mask[row] or data.catalogue.missing_image_mask[row])]
    with torch.inference_mode(): vectors = model.encode_items().vectors.flatten(1).double().numpy()
    unit = {row: vectors[row - 1] / np.linalg.norm(vectors[row - 1]) for row in complete}
    shares, distances = [], []
    for row in complete:
        others = sorted((other for other in complete if other != row), key=lambda other: -unit[row] @ unit[other])[:10]
        shares.append(np.mean([other % 2 == row % 2 for other in others]))
        text, image = np.split(vectors[row - 1], 2)
        distances.append(np.sum((text / np.linalg.norm(text) - image / np.linalg.norm(image)) ** 2))
    assert found["parity"] == pytest.approx(np.mean(shares), abs=1e-3)
    assert found["alignment"] == pytest.approx(np.mean(distances), abs=1e-4)
    assert found["ndcg@10"] == evaluate(model, data.store, progress=False).metrics()["ndcg@10"]

def test_a_training_is_followed_from_its_first_to_its_last_epoch(data, tmp_path):
    labels = {"parity": np.arange(data.store.n_items + 1) % 2}
    rows = g.follow_training("mp4sr_content", data, labels, SMALL, tmp_path / "a", progress=False)
    assert [(row["before"], row["after"]) for row in rows] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    for row, moment in ((rows[0], "random"), (rows[1], "pretrained"), (rows[-1], "trained")):
        model = g.train_moment("mp4sr_content", moment, data, SMALL, tmp_path / "b", progress=False)
        assert g.measure_items(model, data, labels) == {name: row[name] for name in ("parity", "alignment", "uniformity", "ndcg@10")}

def test_stored_curves_end_where_the_stored_weights_are(stored):
    for name in g.WATCHED:
        rows = stored.curves(name)
        for row, moment in ((rows[0], "random"), (rows[1], "pretrain 1"), (rows[-1], "trained")):
            assert row["ndcg@10"] == pytest.approx(stored.metrics()[name][moment]["ndcg@10"], abs=1.5e-3), (name, moment)
        steps = [(row["before"], row["after"]) for row in rows]
        n = max(before for before, _ in steps)
        assert steps == [*((k, 0) for k in range(n + 1)), *((n, k) for k in range(1, len(rows) - n))]

def test_stored_weights_rank_as_stored(stored):
    metrics = stored.metrics()
    assert set(metrics) == set(stored.systems) == set(g.GALLERY.systems)
    for name, moments in metrics.items():
        assert list(moments) == stored.moments(name) and set(moments) <= set(g.MOMENTS)
        assert (list(moments) == list(g.MOMENTS)) == (name in g.WATCHED)
        found = evaluate(stored.model(name), stored.data.store, progress=False).metrics((10,))
        assert found == pytest.approx(moments["trained"], abs=2e-4), name

def test_the_shop_is_that_of_the_features(stored):
    assert read_json(artifact_path("gallery") / "features.json")["item_tokens"] == stored.data.interactions.item_tokens
    assert len(stored.data.store.training_items) < stored.data.store.n_items  # some items are new
    titles = dict(stored.market.items.select("item_id", "title").iter_rows())
    tokens = stored.data.interactions.item_tokens
    assert stored.titles([5, 900]) == [titles[tokens[5]], titles[tokens[900]]]
    has_image = [bool(files) for files in stored.data.items.images]
    assert np.array_equal(~np.array(has_image[1:]), stored.data.catalogue.missing_image_mask.numpy()[1:])
    assert [image is not None for image in stored.draw(range(1, 40))] == has_image[1:40]

def test_planted_interests_are_those_of_the_events(stored):
    store, market = stored.data.store, stored.market
    assert stored.planted_events.shape == store.items.shape and stored.planted_items[0] == -1
    table = market.interactions.with_columns(market.truth.events["interest"], market.truth.events["reason"])
    user = stored.data.interactions.user_tokens[7]
    rows = table.filter(table["user_id"] == user).sort("timestamp")
    mine = slice(store.offsets[7], store.offsets[8])
    tokens = np.array(stored.data.interactions.item_tokens)[store.items[mine]]
    kept = dict(zip(zip(rows["item_id"], rows["timestamp"]), rows["interest"]))
    expected = [kept[token, time] for token, time in zip(tokens, stored.data.interactions.time[mine])]
    assert expected == stored.planted_events[mine].tolist()

def test_vectors_score_as_the_system_does(stored):
    model, store = stored.model("mp4sr_content"), stored.data.store
    vectors = stored.vectors("mp4sr_content")
    assert vectors.shape[0] == store.n_items and list(stored.epochs("mp4sr_content")) == stored.moments("mp4sr_content")
    from mmseqrec.data.sequences import collate
    events = store.rows(TEST)[:3]
    histories = [store.items[store.offsets[user]:event].tolist() for user, event in zip(store.user[events], events)]
    with torch.inference_mode():
        batch = collate(histories, 50)
        sequence, items = model.encode_sequence(batch), model.encode_items()
        torch.testing.assert_close(model.score(sequence, items), sequence.flatten(1) @ torch.from_numpy(vectors).T,
                                   atol=1e-4, rtol=1e-4)

def test_a_gallery_of_a_part_is_whole(tmp_path):
    for part in (0, 1): g.train_gallery(tmp_path, part, 2, SMALL, progress=False)
    found = g.measure_gallery(tmp_path, SMALL)
    assert set(found) == set(SMALL.systems) and list(found["mp4sr_content"]) == list(g.MOMENTS)
    assert g.open_gallery(tmp_path, SMALL).metrics() == found
    assert SYSTEMS["sasrec"].title and found["sasrec"]["trained"]["ndcg@10"] > 0
