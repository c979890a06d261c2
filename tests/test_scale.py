"Large catalogues: samples in training, bounded memory in evaluation, vectors for a search index."
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmseqrec.artifacts import read_json
from mmseqrec.core import set_seed
from mmseqrec.data.sequences import collate, position_batches
from mmseqrec.evaluation import evaluate
from mmseqrec.blocks.layers import SequenceEncoder, last_outputs
from mmseqrec.blocks.losses import dot_score, items_of_step
from mmseqrec.metrics import count_better
from mmseqrec.blocks.towers import take_positions
from mmseqrec.recommender import Items, Recommender, encode_catalogue, export_vectors, top_items
from mmseqrec.training import fit
from small_world import SYSTEMS, V, build, make_catalogue, make_store, ring_store

SAMPLING = ("sasrec", "gru4rec", "content_both", "unisrec", "content_unisrec", "mp4sr", "content_mp4sr")
CALM = dict(dropout=0., attention_dropout=0.)


def calm(name, **options):
    return build(name, **({"dropout": 0.} if name == "gru4rec" else CALM) | options).double()


# Training on a sample

@pytest.mark.parametrize("name", SAMPLING)
def test_a_sample_of_everything_is_everything(name):
    batch = position_batches(make_store(), 40, 10)[0]
    whole, model = calm(name).train(), calm(name, n_candidates=V - 1).train()
    sampled = []
    for each in (whole, model):
        each.finetune_loss(batch)["loss"].backward()
        sampled.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert model.finetune_loss(batch)["loss"].item() == pytest.approx(whole.finetune_loss(batch)["loss"].item(), abs=1e-10)
    assert sampled[0].keys() == sampled[1].keys()
    for n, grad in sampled[0].items(): torch.testing.assert_close(sampled[1][n], grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLING)
def test_only_what_a_step_looks_at_passes_through_the_tower(name, monkeypatch):
    model, seen = calm(name, catalogue=make_catalogue(300), n_candidates=5).train(), []
    own = model.item_vectors
    monkeypatch.setattr(model, "item_vectors", lambda ids=None: seen.append(ids) or own(ids))
    batch = collate([[7, 9], [200]], 10)
    batch.pos_item, batch.positions = torch.tensor([9, 40, 3]), torch.tensor([0, 1, 2])
    model.finetune_loss(batch)
    ids = set(seen[0].tolist())
    assert len(seen) == 1 and {0, 7, 9, 200, 40, 3} <= ids and len(ids) <= 6 + 5
    model.eval().finetune_loss(batch)
    assert seen[1] is None or len(seen[1]) == 301, "evaluation looks at everything"


@pytest.mark.parametrize("name", SAMPLING)
def test_a_sampled_loss_equals_a_loop(name):
    model = calm(name, n_candidates=4).train()
    batch = position_batches(make_store(), 12, 10)[0]
    set_seed(5)
    found = model.finetune_loss(batch)["loss"].item()
    set_seed(5)
    step = items_of_step(batch.item_seq, batch.pos_item, V, 4)
    chosen = step.candidates(step.ids[:, None])[:, 0].tolist()
    right = set(batch.pos_item.tolist())
    with torch.no_grad():
        scores = dot_score(model.encode_sequence(batch, batch.positions), model.encode_items().vectors) / model.temperature
    weight = {item: 1. if item in right else (V - len(right)) / (len(chosen) - len(right)) for item in chosen}
    loss = 0.
    for row, item in zip(scores.tolist(), batch.pos_item.tolist()):
        loss -= row[item - 1] - np.log(sum(weight[j] * np.exp(row[j - 1]) for j in chosen))
    assert found == pytest.approx(loss / len(scores), rel=1e-6)


def test_a_sample_teaches_the_ring():
    set_seed(0)
    model = build("sasrec", n_candidates=4, **CALM)
    fit(model, ring_store(), epochs=40, batch_size=16, lr=1e-2, progress=False, device="cpu")
    assert evaluate(model, ring_store()).metrics()["recall@5"] == 1 and model._hub_mixin_config["n_candidates"] == 4


# Counting

@pytest.mark.parametrize("T, N", [(1, 1), (7, 300_000), (900, 3000)])
def test_counts_by_blocks_equal_sorted_lists(T, N):
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(T, N, generator=generator) * N).round() / N if N > 1 else torch.zeros(1, 1)
    column = torch.randint(N, (T,), generator=generator)
    target = scores.gather(1, column[:, None])[:, 0]
    greater, ties = count_better(scores, target, column)
    for t in range(0, T, max(1, T // 9)):
        row = np.sort(scores[t].numpy())
        low, high = np.searchsorted(row, target[t].item(), "left"), np.searchsorted(row, target[t].item(), "right")
        assert (greater[t], ties[t]) == (N - high, high - low - 1)


# Memory

class Counting(Recommender):
    "Cosines of made-up vectors; notes how many scores are asked for at once, and how many items the tower makes."
    max_len = 5

    def __init__(self, n_items):
        super().__init__()
        self.asked, self.made, self.read = [], [], []
        self.catalogue = SimpleNamespace(n_items=n_items)
        self.register_buffer("table", torch.randn(n_items + 1, 4, generator=torch.Generator().manual_seed(0)))

    def encode_items(self, ids=None):
        ids = torch.arange(1, len(self.table)) if ids is None else ids
        self.made.append(len(ids))
        return Items(self.table[ids][:, None], ids)

    def encode_sequence(self, batch, positions=None):
        self.read.append(len(batch))
        return take_positions(self.table[batch.item_seq], batch, positions)[:, None]

    def score(self, sequence, items):
        self.asked.append(len(sequence) * len(items))
        return super().score(sequence, items)


@pytest.mark.parametrize("n_users", [30, 300])
@pytest.mark.parametrize("n_items", [1000, 40_000])
def test_memory_of_evaluation_is_flat_in_rows_times_items(n_users, n_items):
    model, store = Counting(n_items), make_store(n_users, n_items, longest=6)
    found = evaluate(model, store, max_elements=1 << 17)
    assert max(model.asked) <= 1 << 17 and max(model.made) <= 1 << 13 and sum(model.made) == n_items
    assert sum(model.asked) == len(found.ranks) * n_items
    np.testing.assert_array_equal(found.ranks, evaluate(model, store, max_elements=1 << 30).ranks)


def test_memory_of_recommendations_is_flat():
    model = Counting(20_000)
    histories = [[1 + n % 20_000, 3] for n in range(2500)]
    ids, _ = top_items(model, histories, 3, max_elements=1 << 22)
    assert max(model.asked) <= 1 << 22 and max(model.read) <= 1024 and max(model.made) <= 1 << 13
    few = Counting(10)
    top_items(few, [[1 + n % 10] for n in range(2500)], 3)
    assert max(few.read) <= 1024, "many histories are not read at once, however small the catalogue is"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_catalogue_encoded_in_pieces_is_the_catalogue(name):
    model = build(name).double()
    whole, pieces = model.encode_items(), encode_catalogue(model, items_at_once=5)
    torch.testing.assert_close(pieces.vectors, whole.vectors.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(pieces.ids, whole.ids)
    if whole.missing_stream_mask is None: assert pieces.missing_stream_mask is None
    else: assert torch.equal(pieces.missing_stream_mask, whole.missing_stream_mask)
    assert encode_catalogue(model).vectors.requires_grad is False


def test_missing_streams_are_zero_without_a_copy_where_they_are():
    vectors, absent = torch.randn(5, 2, 3), torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) < .4
    items = Items(vectors, torch.arange(1, 6), absent)
    assert torch.equal(items.present, vectors.masked_fill(absent[..., None], 0)) and items.present is items.present
    clean = dataclasses.replace(items, vectors=items.present)
    assert clean.present is clean.vectors
    assert Items(vectors, items.ids).present is vectors
    u = torch.randn(4, 2, 3)
    torch.testing.assert_close(dot_score(u, vectors, absent), dot_score(u, items.present))


# Vectors for a search index

@pytest.mark.parametrize("items_at_once", [5, 1 << 13])
@pytest.mark.parametrize("name", SYSTEMS)
def test_exported_vectors_give_the_score(name, items_at_once, tmp_path):
    model = build(name)
    histories = [["item-1", "item-7"], ["item-3", "unheard of"], ["item-9"]]
    shapes = export_vectors(model, tmp_path, histories, items_at_once)
    files = {kind: load_file(tmp_path / f"{kind}.safetensors") for kind in ("items", "sequences")}
    with torch.no_grad():
        items, sequence = model.encode_items(), model.encode_sequence(collate([[1, 7], [3], [9]], model.max_len))
    torch.testing.assert_close(files["items"]["vectors"], items.present.float())
    torch.testing.assert_close(files["sequences"]["vectors"], sequence.float())
    assert shapes == {kind: list(file["vectors"].shape) for kind, file in files.items()}
    assert read_json(tmp_path / "items.json") == model.catalogue.item_tokens[1:]
    assert read_json(tmp_path / "sequences.json") == histories
    assert ("missing_stream_mask" in files["items"]) == (items.missing_stream_mask is not None)
    with safe_open(tmp_path / "items.safetensors", "pt") as file: is_score = file.metadata()["inner_product_is_score"]
    inner = name not in ("markov", "itemknn", "ease", "missrec", "content_missrec")
    assert (is_score == "yes") == inner and (inner or is_score == f"no: candidates, to be ranked by {type(model).__name__}")
    if inner: torch.testing.assert_close(files["sequences"]["vectors"].flatten(1) @ files["items"]["vectors"].flatten(1).T,
                                         model.score(sequence, items), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.json", "items.safetensors", "sequences.json",
                                                                "sequences.safetensors"]


def test_a_history_that_names_nothing_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="history 2 names no item"):
        export_vectors(build("sasrec"), tmp_path / "new", [["item-1"], ["unheard of"]])
    assert not (tmp_path / "new").exists()


def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    model = build("sasrec")
    own = model.encode_items
    def failing(ids):
        if ids[0] > 5: raise RuntimeError("out of memory")
        return own(ids)
    monkeypatch.setattr(model, "encode_items", failing)
    with pytest.raises(RuntimeError): export_vectors(model, tmp_path, items_at_once=5)
    assert list(tmp_path.iterdir()) == []


def test_streams_find_candidates_that_missrec_ranks():
    model = build("content_missrec", catalogue=make_catalogue(2000)).eval()
    with torch.no_grad():
        model.fusion.kappa.fill_(6.)
        items, sequence = encode_catalogue(model), model.encode_sequence(collate([[5, 9, 3]], 10))
        exact = model.score(sequence, items)[0].topk(10)
        near = [(sequence[0, 0] @ stream.T).topk(200) for stream in items.vectors.unbind(1)]
        rows = torch.cat([found.indices for found in near]).unique()
        best = model.score(sequence, items[rows])[0].topk(10)
    assert best.values[-1] >= max(found.values[-1] for found in near), "the bound that makes it certain"
    assert len(rows) <= 400 and torch.equal(rows[best.indices], exact.indices)
    torch.testing.assert_close(best.values, exact.values)


# Histories of which only the end is asked for

@pytest.mark.parametrize("name", ("sasrec", "gru4rec", "content_both", "content_unisrec", "content_mp4sr"))
def test_the_end_alone_equals_the_end_of_everything(name):
    model, batch = build(name).double(), collate([[3, 9, 3, 1], [5], [7, 2, 8], list(range(1, 11))], 10)
    positions = batch.query_index()
    fast, slow = [], []
    for found, asked in ((fast, None), (slow, positions)):
        model.zero_grad()
        vectors = model.encode_sequence(batch, asked)
        (vectors * torch.arange(vectors.numel()).view_as(vectors)).sum().backward()
        found += [vectors.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(fast) == len(slow) > 1
    for a, b in zip(fast, slow): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_last_outputs_equal_the_encoder(causal, n_layers):
    set_seed(0)
    encoder = SequenceEncoder(8, n_layers, 2, 16, dropout=0., attention_dropout=0., max_len=6, causal=causal).double()
    x, batch = torch.randn(3, 5, 8, dtype=torch.float64), collate([[1, 2, 3], [1], [1, 2, 3, 4, 5]], 9)
    torch.testing.assert_close(last_outputs(encoder, x, batch.item_seq_len),
                               take_positions(encoder(x, batch.item_pad_mask), batch))
    with pytest.raises(ValueError, match="longer than max_len = 6"):
        last_outputs(encoder, torch.randn(1, 7, 8).double(), torch.tensor([7]))


def test_last_outputs_drop_in_training_only():
    set_seed(0)
    encoder = SequenceEncoder(8, 2, 2, 16, dropout=.5, attention_dropout=.5, max_len=6)
    x, lengths = torch.randn(4, 5, 8), torch.tensor([5, 1, 3, 5])
    draws = [last_outputs(encoder, x, lengths) for _ in range(2)]
    assert not torch.equal(*draws) and torch.equal(last_outputs(encoder.eval(), x, lengths), last_outputs(encoder, x, lengths))
