"What every recommender promises, asked of every recommender there is: see the list in `small_world.py`."
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmseqrec.blocks.augment import append_mask
from mmseqrec.data.interactions import TEST
from mmseqrec.data.sequences import TRAIN, collate, position_batches, prefix_batches
from mmseqrec.evaluation import evaluate
from mmseqrec.recommender import Items, Recommender
from mmseqrec.training import fit
from small_world import (BY_CONTENT, CLOZE, COUNTING, LEARNING, NO_IMAGE, NO_TEXT, NOTHING, SIZES, SYSTEMS, V,
                         VARIANTS, WITHOUT_ATTENTION, build, make_catalogue, make_store, same, weights)

CLOSE = dict(rtol=0, atol=1e-9)
HISTORIES = [[1, 2, 3], [7], [4, 5, 6, 6, 1, 12, 11, 10], [5, 3]]

every = pytest.mark.parametrize("name", (*SYSTEMS, *VARIANTS))
learning = pytest.mark.parametrize("name", (*LEARNING, *VARIANTS))
by_content = pytest.mark.parametrize("name", BY_CONTENT)


def scores(model, histories=HISTORIES, positions=None):
    with torch.no_grad():
        batch = collate(histories, model.max_len)
        return model.score(model.encode_sequence(batch, positions), model.encode_items())


# Shapes

@every
def test_shapes(name):
    model = build(name)
    items, batch = model.encode_items(), collate(HISTORIES, model.max_len)
    N, S, D = items.vectors.shape
    assert isinstance(items, Items) and N == len(items) == V and items.ids.tolist() == list(range(1, V + 1))
    assert items.missing_stream_mask is None or items.missing_stream_mask.shape == (V, S)
    sequence = model.encode_sequence(batch)
    assert sequence.ndim == 3 and len(sequence) == 4
    asked = torch.tensor([0, 2, 8, 23, 16])  # five queries on three rows of eight positions
    assert model.encode_sequence(batch, asked).shape == (5, *sequence.shape[1:])
    found = model.score(sequence, items)
    assert found.shape == (4, V) and found.isfinite().all()


@every
def test_some_items_are_rows_of_all(name):
    model, ids = build(name).double(), torch.tensor([5, 2, 2, 9])
    every_item, some = model.encode_items(), model.encode_items(ids)
    assert torch.equal(some.ids, ids)
    torch.testing.assert_close(some.vectors, every_item.vectors[ids - 1], **CLOSE)
    sequence = model.encode_sequence(collate(HISTORIES, model.max_len))
    whole = model.score(sequence, every_item)
    torch.testing.assert_close(model.score(sequence, some), whole[:, ids - 1], **CLOSE)
    chunks = [model.score(sequence, every_item[start:start + 5]) for start in range(0, V, 5)]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, **CLOSE)
    rows = [model.score(part, every_item) for part in sequence.split(1)]
    torch.testing.assert_close(torch.cat(rows), whole, **CLOSE)


# What must not matter

@every
def test_other_rows_and_padding_do_not_matter(name):
    model = build(name, dropout=.5, attention_dropout=.5).double()
    together = scores(model)
    torch.testing.assert_close(torch.cat([scores(model, [h]) for h in HISTORIES]), together, **CLOSE)
    torch.testing.assert_close(scores(model, HISTORIES[::-1]).flip(0), together, **CLOSE)
    torch.testing.assert_close(scores(model, [*HISTORIES, list(range(1, 11))])[:4], together, **CLOSE)


@every
def test_events_after_the_end_do_not_matter(name):
    model = build(name).double()
    batch = collate([h[:3] for h in HISTORIES], model.max_len)
    late = replace(batch, item_seq=torch.cat([batch.item_seq, torch.tensor([[9, 8]] * 4)], 1))
    if name in COUNTING or model.causal:  # others see the padding mask only, and nothing ever stands there
        late.item_seq[1, 1:] = 9
        for asked, same_asked in ((None, None), (torch.tensor([0, 1, 3, 7]), torch.tensor([0, 1, 5, 11]))):
            torch.testing.assert_close(model.encode_sequence(late, same_asked), model.encode_sequence(batch, asked), **CLOSE)
    longer = [h + [9, 8] for h in HISTORIES]
    torch.testing.assert_close(scores(model, [h[:-2] for h in longer]), scores(model), **CLOSE)


@every
def test_a_position_of_a_causal_model_is_the_prefix(name):
    model = build(name).double()
    if not (model.causal or name in COUNTING): pytest.skip("not causal")
    batch = collate(HISTORIES, model.max_len)
    asked = (~batch.item_pad_mask).flatten().nonzero()[:, 0]
    prefixes = [h[:end] for h in HISTORIES for end in range(1, len(h) + 1)]
    torch.testing.assert_close(scores(model, HISTORIES, asked), scores(model, prefixes), **CLOSE)


@every
def test_only_the_last_max_len_items_matter(name):
    model = build(name).double()
    long = np.random.default_rng(0).integers(1, V + 1, model.max_len + 7).tolist()
    torch.testing.assert_close(scores(model, [long]), scores(model, [long[-model.max_len:]]), **CLOSE)


@every
def test_evaluation_and_recommendation_leave_no_trace(name):
    "Weights, mode and answers are as before; with dropout, a second answer equals the first."
    model, store = build(name, dropout=.5), make_store()
    for training in (True, False):
        model.train(training)
        before = weights(model)
        first = evaluate(model, store, TEST), model.recommend([["item-1", "item-2"]])
        again = evaluate(model, store, TEST), model.recommend([["item-1", "item-2"]])
        assert np.array_equal(first[0].ranks, again[0].ranks) and first[1] == again[1]
        assert model.training == training and same(weights(model), before)


@every
def test_recommendations_are_the_best_scores(name):
    model = build(name)
    tokens = model.catalogue.item_tokens
    for history, row in zip(HISTORIES, scores(model)):
        answer, = model.recommend([[tokens[i] for i in history]], k=V)
        rows = [tokens.index(token) for token in answer.items]
        assert sorted(rows) == list(range(1, V + 1)) and answer.unknown == []
        np.testing.assert_allclose(answer.scores, row.float()[torch.tensor(rows) - 1], rtol=1e-5, atol=1e-6)
        assert answer.scores == sorted(answer.scores, reverse=True)
        fresh, = model.recommend([[tokens[i] for i in history]], k=V, exclude_seen=True)
        assert set(fresh.items) == {token for row, token in enumerate(tokens) if row and row not in history}


# Losses

@every
def test_loss_is_the_cross_entropy_of_the_scores(name):
    model, store = build(name, dropout=0., attention_dropout=0.).double(), make_store()
    for batch in (prefix_batches(store, TRAIN, 16, model.max_len)[0], position_batches(store, 16, model.max_len)[0]):
        if batch.positions is not None and not model.causal: continue
        found = model.finetune_loss(batch)
        table = model.score(model.encode_sequence(batch, batch.positions), model.encode_items()) / model.temperature
        slow = sum(torch.logsumexp(row, 0) - row[target - 1] for row, target in zip(table, batch.pos_item)) / batch.n_targets
        own = found.get("cross_entropy", found["loss"])  # MISSRec's loss has another term beside it
        torch.testing.assert_close(own, slow, rtol=0, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(model(batch)["loss"], found["loss"], **CLOSE)


@learning
def test_every_weight_learns(name):
    model, store = build(name), make_store()
    batch = prefix_batches(store, TRAIN, 64, model.max_len)[0]
    model.train().finetune_loss(batch)["loss"].backward()
    if model.has_pretraining:  # heads of its losses learn there
        before = {key for key, weight in model.named_parameters() if weight.grad is not None}
        model.pretrain_loss(batch)["loss"].backward()
        assert {key.partition(".")[0] for key, _ in model.named_parameters() if key not in before} <= {"heads"}
    for key, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), key


@learning
def test_items_with_nothing_break_nothing(name):
    "A batch of nothing but the item without text and picture: finite loss, finite gradients."
    model = build(name)
    batch = collate([[NOTHING], [NOTHING, NOTHING]], model.max_len)
    batch.pos_item = torch.tensor([NOTHING, NO_IMAGE])
    loss = model.finetune_loss(batch)["loss"]
    loss.backward()
    assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    tokens = model.catalogue.item_tokens
    for row in (NO_IMAGE, NO_TEXT, NOTHING):
        answer, = model.recommend([[tokens[row]]], k=V)
        assert len(answer.items) == V and np.isfinite(answer.scores).all()


@every
def test_phases_that_do_not_exist_say_so(name):
    model = build(name)
    batch = collate(HISTORIES, model.max_len)
    if not model.has_pretraining:
        with pytest.raises(NotImplementedError, match="has no pre-training"): model(batch, "pretrain")
    if name in WITHOUT_ATTENTION:
        with pytest.raises(NotImplementedError, match="no attention"): model.attention(batch)
    else:
        item_pad_mask = append_mask(batch, V + 1).item_pad_mask if name in CLOZE else batch.item_pad_mask
        for layer in model.attention(batch):
            rows = layer.permute(0, 2, 1, 3)[~item_pad_mask]
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
            assert not layer.permute(0, 3, 1, 2)[item_pad_mask][..., 0].any(), "no real position looks at padding"


# Saving

@every
def test_saved_and_loaded_scores_are_equal_bit_for_bit(name, tmp_path, monkeypatch):
    model = build(name)
    if name not in COUNTING: fit(model, make_store(), epochs=2, lr=.01, device="cpu", progress=False)
    expected, folder = scores(model), tmp_path / "saved"
    model.save_pretrained(folder)
    def refuse(*_, **__): raise AssertionError("a pickle is read")
    for owner, function in ((torch, "load"), (pickle, "load"), (pickle, "loads")): monkeypatch.setattr(owner, function, refuse)
    again = type(model).from_pretrained(folder)
    assert not again.training and again.catalogue.item_tokens == model.catalogue.item_tokens
    assert same(weights(again), weights(model))
    assert torch.equal(scores(again), expected)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(names) == ["catalogue/catalogue.json", "catalogue/catalogue.safetensors", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "something temporary stays"
    again.save_pretrained(tmp_path / "second")
    for file in names: assert (tmp_path / "second" / file).read_bytes() == (folder / file).read_bytes(), file


@every
def test_saved_in_its_own_folder_again(name, tmp_path):
    "The catalogue of a loaded model is mapped from the very files that the second save replaces."
    build(name).save_pretrained(tmp_path / "saved")
    model = type(build(name)).from_pretrained(tmp_path / "saved")
    expected = scores(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(scores(model), expected)
    assert torch.equal(scores(type(model).from_pretrained(tmp_path / "saved")), expected)


@every
def test_loaded_without_catalogue(name, tmp_path):
    model = build(name)
    expected = scores(model)
    model.save_pretrained(tmp_path / "saved", with_catalogue=False)
    assert not (tmp_path / "saved/catalogue").exists()
    again = type(model).from_pretrained(tmp_path / "saved")
    assert again.catalogue is None
    with pytest.raises(ValueError, match="call set_catalogue first"): again.recommend([["item-1"]])
    assert torch.equal(scores(again.set_catalogue(make_catalogue())), expected)


@every
def test_any_class_loads_the_system_that_was_saved(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "saved")
    expected, others = scores(model), {type(build(other)) for other in SYSTEMS}
    for kind in (Recommender, *others):
        again = kind.from_pretrained(tmp_path / "saved")
        assert type(again) is type(model)
        assert torch.equal(scores(again), expected)


@every
def test_sizes_are_json_and_suffice(name, tmp_path):
    model = build(name, make_catalogue(17))
    model.save_pretrained(tmp_path / "saved", with_catalogue=False)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config.pop("recommender") == type(model).__name__
    rebuilt = type(model)(**config)
    assert {key: x.shape for key, x in rebuilt.state_dict().items()} == {key: x.shape for key, x in model.state_dict().items()}


# Other items

@learning
def test_another_shop_keeps_the_weights_that_belong_to_no_item(name, tmp_path):
    model = build(name)
    before, other = weights(model), make_catalogue(19, seed=5, name="other")
    assert model.set_catalogue(other) is model
    for key, weight in before.items():
        if key.startswith(("item_emb", "item_bias", "items.interests.of_item")): continue
        assert torch.equal(model.state_dict()[key], weight), key
    found = scores(model, [[1, 19], [18]])
    assert found.shape == (2, 19) and found.isfinite().all()
    answer, = model.recommend([["other-3", "item-3"]], k=3)
    assert answer.unknown == ["item-3"] and all(token.startswith("other-") for token in answer.items)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(scores(type(model).from_pretrained(tmp_path / "saved"), [[1, 19], [18]]), found)


@by_content
def test_content_there_and_back_changes_nothing(name):
    model = build(name)
    expected = scores(model)
    model.set_catalogue(make_catalogue(19, seed=5, name="other")).set_catalogue(make_catalogue())
    assert torch.equal(scores(model), expected)


@by_content
def test_items_are_known_by_content_not_by_row(name):
    "Shuffled rows give shuffled scores; a new item with an old one's features gets its score."
    model, order = build(name).double(), torch.randperm(V, generator=torch.Generator().manual_seed(0)) + 1
    expected, place = scores(model), torch.argsort(torch.cat([torch.tensor([0]), order]))
    catalogue = make_catalogue()
    model.set_catalogue(catalogue.take(order.tolist()))
    moved = scores(model, [[int(place[i]) for i in h] for h in HISTORIES])
    torch.testing.assert_close(moved, expected[:, order - 1], **CLOSE)
    twins = replace(catalogue.take([*range(1, V + 1), 7]), item_tokens=[*catalogue.item_tokens, "newcomer"])
    model.set_catalogue(twins)
    found = scores(model)
    torch.testing.assert_close(found[:, :V], expected, **CLOSE)
    torch.testing.assert_close(found[:, V], expected[:, 6], **CLOSE)


@every
def test_new_items_beside_old_ones(name):
    "A cold item joins: everything runs, and old items keep what was known of them."
    model, old = build(name), make_catalogue()
    before, expected = model.encode_items().vectors.clone(), scores(model)
    rows = torch.cat([torch.arange(V, 0, -1), torch.tensor([1, 2])]).tolist()
    new = replace(old.take(rows), item_tokens=["[PAD]", *old.item_tokens[:0:-1], "cold-1", "cold-2"])
    after = model.set_catalogue(new).encode_items().vectors
    assert len(after) == V + 2
    if name not in ("popularity", "markov"):  # their scores are shares of all events
        torch.testing.assert_close(after[:V].flip(0), before)
        found = scores(model, [[V + 1 - i for i in h] for h in HISTORIES])
        torch.testing.assert_close(found[:, :V].flip(1), expected)
    answer, = model.recommend([["cold-1", "item-2"]], k=V + 2)
    assert answer.unknown == [] and sorted(answer.items) == sorted(new.item_tokens[1:])


@every
def test_the_same_items_again_change_nothing(name):
    model = build(name)
    before, expected = weights(model), scores(model)
    model.set_catalogue(make_catalogue())
    assert same(weights(model), before) and torch.equal(scores(model), expected)


# Precision

@every
def test_sixteen_bits(name):
    model, history = build(name), [[h for h in history if h != NOTHING] or [1] for history in HISTORIES]
    expected = scores(model, history)
    narrow = build(name).to(torch.bfloat16)
    found = scores(narrow, history).float()
    assert found.isfinite().all() and (found - expected).abs().max() <= .03 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16): found = scores(model, history).float()
    assert (found - expected).abs().max() <= .03 * expected.abs().max()
    narrow.set_catalogue(make_catalogue(19, seed=5, name="other"))
    assert scores(narrow, [[1, 19]]).isfinite().all()
    assert len(narrow.recommend([["other-1"]], k=3)[0].items) == 3


@learning
def test_training_in_sixteen_bits(name):
    model, store = build(name), make_store()
    history = fit(model, store, epochs=3, lr=.01, precision="bf16", device="cpu", progress=False)
    assert all(x.dtype == torch.float32 for x in model.parameters())
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]


@every
def test_double_precision_agrees_with_single(name):
    model = build(name)
    single = scores(model)
    torch.testing.assert_close(scores(model.double()).float(), single, rtol=1e-4, atol=1e-5)
