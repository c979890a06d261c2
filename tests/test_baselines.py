"Popularity and Markov against dictionaries; GRU4Rec, SASRec, its content twin and BERT4Rec put together by hand."
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmseqrec.blocks.augment import cloze
from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN
from mmseqrec.blocks.losses import draw_negatives
from mmseqrec.blocks.towers import IDEmbedding
from mmseqrec.data.sequences import SequenceStore, collate, position_batches, prefix_batches
from mmseqrec.evaluation import evaluate
from mmseqrec.models import baselines
from mmseqrec.models.baselines import (BERT4Rec, ContentSASRec, GRU4Rec, GRUEncoder,
                                       Markov, Popularity, SASRec, transition_counts)
from mmseqrec.training import fit
from small_world import IMAGE_SIZE, NOTHING, SIZES, TEXT_SIZE, V, build, make_catalogue, make_store, ring_store, weights

CLOSE = dict(rtol=0, atol=1e-9)


def slow_counts(store):
    "Events of each item, and followers of each item, in training; one event at a time."
    counts, followers = Counter(), defaultdict(Counter)
    for user in range(len(store.offsets) - 1):
        last = None
        for event in range(store.offsets[user], store.offsets[user + 1]):
            if store.stage[event] != TRAIN: break
            item = int(store.items[event])
            counts[item] += 1
            if last is not None: followers[last][item] += 1
            last = item
    return counts, followers


def slow_markov(counts, followers, last, item, epsilon=1e-3):
    total = sum(followers[last].values())
    return (followers[last][item] / total if total else 0) + epsilon * counts[item] / max(sum(counts.values()), 1)


@pytest.fixture(params=range(3))
def store(request): return make_store(80, n_items=V, seed=request.param, longest=20)


def scores(model, histories):
    batch = collate(histories, model.max_len)
    return model.score(model.encode_sequence(batch), model.encode_items())


def test_popularity_counts_like_a_dictionary(store):
    model, (counts, _) = build("popularity", store=store), slow_counts(store)
    expected = [counts[item] for item in range(1, V + 1)]
    for row in scores(model, [[1], [5, 6], [12]]).tolist(): assert row == expected
    assert model.counts.item_counts[0] == 0
    order = sorted(range(1, V + 1), key=lambda i: -counts[i])
    found = model.recommend([["item-1"]], k=V)[0]
    assert found.scores == [counts[i] for i in order]


def test_transitions_are_counted_like_a_dictionary(store):
    _, followers = slow_counts(store)
    item, after, times = transition_counts(store)
    assert {(int(i), int(j)): int(n) for i, j, n in zip(item, after, times)} == {
        (i, j): n for i, row in followers.items() for j, n in row.items()}
    assert (np.diff(item) >= 0).all() and times.sum() == len(store.rows(TRAIN))


def test_markov_scores_like_a_dictionary(store):
    model, (counts, followers) = build("markov", store=store).double(), slow_counts(store)
    histories = [[9, 4, item] for item in range(1, V + 1)]
    expected = [[slow_markov(counts, followers, last, item) for item in range(1, V + 1)] for last in range(1, V + 1)]
    np.testing.assert_allclose(scores(model, histories), expected, rtol=0, atol=1e-6)


def test_markov_looks_at_the_last_item_only(store):
    model = build("markov", store=store)
    torch.testing.assert_close(scores(model, [[1, 2, 3, 7], [7], [5, 7]]), scores(model, [[7]]).expand(3, -1), **CLOSE)
    assert not torch.equal(scores(model, [[7, 1]]), scores(model, [[1, 7]]))


def test_markov_at_every_position(store):
    model = build("markov", store=store)
    batch = collate([[1, 2, 3], [4, 5]], 10)
    found = model.score(model.encode_sequence(batch, torch.tensor([0, 2, 3])), model.encode_items())
    torch.testing.assert_close(found, scores(model, [[1], [3], [4]]), **CLOSE)


def test_popularity_decides_between_items_that_followed_equally_often():
    "1 was followed once by 2 and once by 3; 3 and 5 are the popular ones; 4 and 5 never followed."
    events = [[1, 2], [1, 3], [3, 5, 5, 5, 3], [3, 5, 5, 4]]
    flat, lengths = np.concatenate(events).astype(np.int32), [len(e) for e in events]
    store = SequenceStore(flat, np.r_[0, np.cumsum(lengths)], np.zeros(len(flat), np.int8), 6)
    model = Markov().set_catalogue(make_catalogue(6, whole=True))
    model.start_epoch(store, 0)
    assert model.recommend([["item-1"]], k=5)[0].items == ["item-3", "item-2", "item-5", "item-1", "item-4"]
    never = model.recommend([["item-4"]], k=2)[0]  # nothing ever followed 4: popularity alone
    assert never.items == ["item-5", "item-3"]
    assert model.recommend([["item-6"]], k=1)[0].items == ["item-5"]
    plain = Markov(popularity_weight=0.).set_catalogue(make_catalogue(6, whole=True))
    plain.start_epoch(store, 0)
    assert scores(plain, [[1]])[0].tolist() == [0, .5, .5, 0, 0, 0]


def test_users_do_not_follow_each_other():
    store = SequenceStore(np.array([1, 2, 3, 4], np.int32), np.array([0, 2, 4]), np.zeros(4, np.int8), 5)
    item, after, times = transition_counts(store)
    assert list(zip(item.tolist(), after.tolist(), times.tolist())) == [(1, 2, 1), (3, 4, 1)]


def test_nobody_with_a_history():
    "One event a user: no transition at all, and everything still answers."
    store = SequenceStore(np.array([1, 2, 2], np.int32), np.arange(4), np.zeros(3, np.int8), V)
    model = build("markov", store=store)
    assert len(transition_counts(store)[0]) == 0
    assert model.recommend([["item-9"]], k=1)[0].items == ["item-2"]


@pytest.mark.parametrize("kind", [Popularity, Markov])
def test_counting_again_forgets_the_first_count(kind):
    first, second = (make_store(30, seed=seed) for seed in (1, 2))
    model, fresh = kind().set_catalogue(make_catalogue()), kind().set_catalogue(make_catalogue())
    for store in (first, second): model.start_epoch(store, 0)
    fresh.start_epoch(second, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(fresh).values()))
    model.set_catalogue(make_catalogue(name="other"))
    assert not model.counts.item_counts.any() and not scores(model, [[1]]).any()


@pytest.mark.parametrize("kind", [Popularity, Markov])
def test_counts_of_items_that_stay_are_kept(kind):
    "Fewer items, in another order, then all again: what stayed scores as before, what left and came back scores zero."
    catalogue, order = make_catalogue(), [7, 2, 9, 1, 4]
    model = (Markov(popularity_weight=0.) if kind is Markov else kind()).set_catalogue(catalogue)  # a share of all events
    model.start_epoch(make_store(30), 0)
    before = scores(model, [[item] for item in order])[:, [item - 1 for item in order]]
    model.set_catalogue(catalogue.take(order))
    assert before.any() and torch.equal(scores(model, [[n] for n in range(1, 6)]), before)
    model.set_catalogue(catalogue)
    after = scores(model, [[item] for item in order])
    assert torch.equal(after[:, [item - 1 for item in order]], before)
    gone = [item for item in range(1, catalogue.n_items + 1) if item not in order]
    assert not after[:, [item - 1 for item in gone]].any() and not scores(model, [[gone[0]]])[:, [item - 1 for item in gone]].any()


def test_counts_are_exact_where_there_are_many(tmp_path):
    "Seventeen million events: more than 32-bit floats count one by one."
    model = build("popularity")
    model.counts.item_counts[1], model.counts.item_counts[2] = 16_777_216, 16_777_218
    model.save_pretrained(tmp_path / "m")
    assert Popularity.from_pretrained(tmp_path / "m").recommend([["item-3"]], k=1)[0].items == ["item-2"]


# SASRec

def by_hand(model, histories):
    "Scores from the parts: look vectors up, encode each row on its own, compare with every item."
    rows = []
    for history in histories:
        x = model.item_vectors(torch.tensor(history))[:, 0][None]
        u = model.encoder(x, torch.zeros(1, len(history), dtype=torch.bool))[0, -1]
        vectors = model.item_vectors(torch.arange(1, V + 1))[:, 0]
        if isinstance(model, ContentSASRec): u, vectors = F.normalize(u, dim=-1), F.normalize(vectors, dim=-1)
        rows.append(vectors @ u)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "content_text", "content_image", "content_both"])
def test_scores_are_what_the_parts_say(name):
    model, histories = build(name).double(), [[1, 2, 3], [7], [4, NOTHING, 6, 6, 1], [NOTHING]]
    torch.testing.assert_close(scores(model, histories), by_hand(model, histories), **CLOSE)


@pytest.mark.parametrize("name", ["content_text", "content_image", "content_both"])
def test_content_scores_are_cosines(name):
    model = build(name).double()
    found = scores(model, [[1, 2, 3], [7]])
    assert found.abs().max() <= 1 and not found[:, NOTHING - 1].any(), "an item with nothing has no direction"
    assert model.temperature == .07
    norms = model.encode_items().vectors.norm(dim=-1)[:, 0]
    torch.testing.assert_close(norms[norms > 0], torch.ones(int((norms > 0).sum()), dtype=torch.float64), **CLOSE)


def test_parameters_by_hand():
    D, inner, L = 16, 32, 10
    block = 3 * (D * D + D) + D * D + D + 2 * 2 * D + D * inner + inner + inner * D + D
    encoder = L * D + 2 * D + 2 * block
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(build("sasrec")) == (V + 1) * D + encoder
    assert count(build("bert4rec")) == (V + 1) * (D + 1) + D + encoder + D + D * D + 3 * D  # [MASK], its position, head
    assert count(build("gru4rec")) == (V + 1) * D + 3 * 24 * (D + 24) + 24 * D + D
    assert count(build("content_text")) == TEXT_SIZE * D + 3 * D + encoder
    assert count(build("content_both")) == (TEXT_SIZE + IMAGE_SIZE) * D + 6 * D + encoder
    assert count(build("popularity")) == count(build("markov")) == 0


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "bert4rec"])
def test_first_loss_is_log_v(name):
    "Small initial weights know nothing: the first loss is that of guessing."
    model = build(name, dropout=0., attention_dropout=0.)
    batch = collate([[1, 2], [3]], 10)
    batch.pos_item = torch.tensor([4, 5])
    assert model.finetune_loss(batch)["loss"].item() == pytest.approx(np.log(V), abs=.2)


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "bert4rec"])
def test_padding_is_never_a_candidate_and_never_learns(name):
    model = build(name).train()
    batch = collate([[1, 2, 3], [4]], 10)
    batch.pos_item = torch.tensor([5, 6])
    model.finetune_loss(batch)["loss"].backward()
    assert not model.item_emb.weight.grad[0].any() and model.item_emb.weight.grad[1:].abs().sum(1).all()
    model.train(False)
    expected = scores(model, [[1, 2]])
    with torch.no_grad(): model.item_emb.weight[0] = 1e3
    torch.testing.assert_close(scores(model, [[1, 2], [1, 2, 3]])[:1], expected)


# GRU4Rec

def slow_gru(encoder, x):
    "One history, one number at a time."
    w, u = (getattr(encoder.gru, f"weight_{kind}_l0").detach().numpy() for kind in ("ih", "hh"))
    H = u.shape[1]
    sigmoid, h, out = lambda a: 1 / (1 + np.exp(-a)), np.zeros(H), []
    for vector in x.detach().numpy():
        new = np.zeros(H)
        for k in range(H):
            reset = sigmoid(w[k] @ vector + u[k] @ h)
            keep = sigmoid(w[H + k] @ vector + u[H + k] @ h)
            new[k] = (1 - keep) * np.tanh(w[2 * H + k] @ vector + reset * (u[2 * H + k] @ h)) + keep * h[k]
        h = new
        out.append(encoder.output.weight.detach().numpy() @ h + encoder.output.bias.detach().numpy())
    return np.stack(out)


def test_gru_encoder_equals_the_equations():
    set_seed(0)
    encoder = GRUEncoder(hidden_size=4, state_size=7).double().eval()
    x, item_pad_mask = torch.randn(3, 5, 4, dtype=torch.float64), torch.arange(5) >= torch.tensor([5, 2, 1])[:, None]
    y = encoder(x, item_pad_mask)
    for b, n in enumerate((5, 2, 1)): np.testing.assert_allclose(y[b, :n].detach(), slow_gru(encoder, x[b, :n]), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"\(L\).*must be 5, got 4"): encoder(x, item_pad_mask[:, :4])


def test_reading_to_the_end_equals_reading_every_position(monkeypatch):
    set_seed(0)
    encoder, table = GRUEncoder(hidden_size=4, state_size=7).double().eval(), torch.randn(9, 4, dtype=torch.float64)
    place, lengths = torch.randint(9, (4, 6)), torch.tensor([2, 6, 1, 6])
    every = encoder(table[place], torch.arange(6) >= lengths[:, None])
    batch = collate([(row[:length] + 1).tolist() for row, length in zip(place, lengths)], 10)
    ends = baselines._gru_ends(encoder, lambda ids: table[ids - 1], batch)
    torch.testing.assert_close(ends, every[torch.arange(4), lengths - 1], **CLOSE)
    model, batch, fast = build("gru4rec").double(), collate([[1, 2, 3], [7], [4, 5, 6, 6, 1]], 10), []
    original = baselines._gru_ends
    monkeypatch.setattr(baselines, "_gru_ends", lambda *a: fast.append(1) or original(*a))
    slow = model.encode_sequence(batch)
    with torch.no_grad():
        assert not fast
        torch.testing.assert_close(model.encode_sequence(batch), slow, **CLOSE)
        assert len(fast) == 1 and model.encode_sequence(batch, torch.tensor([0, 1])).shape == (2, 1, model.item_emb.embedding_dim)
        assert not torch.equal(model.train().encode_sequence(batch), model.encode_sequence(batch)), "dropout is on"
        build("gru4rec", n_gru_layers=2).double().encode_sequence(batch)
    assert len(fast) == 1


def test_gru_drops_what_it_reads_in_training_only():
    x, item_pad_mask = torch.ones(1, 4, 4), torch.zeros(1, 4, dtype=torch.bool)
    encoder = GRUEncoder(4, dropout=.5)
    assert torch.equal(encoder.eval()(x, item_pad_mask), encoder(x, item_pad_mask))
    assert not torch.equal(encoder.train()(x, item_pad_mask), encoder(x, item_pad_mask))
    assert sum(p.numel() for p in GRUEncoder(4, 6, n_gru_layers=2).parameters()) == 18 * 10 + 18 * 12 + 6 * 4 + 4


def test_item_vectors_of_gru4rec_start_larger():
    for model in (GRU4Rec(2000), GRU4Rec().set_catalogue(make_catalogue(2000))):
        assert model.item_emb.weight[1:].std().item() == pytest.approx(.1, rel=.03) and not model.item_emb.weight[0].any()
    assert SASRec().set_catalogue(make_catalogue(2000)).item_emb.weight[1:].std().item() == pytest.approx(.02, rel=.03)


def test_what_systems_share():
    for kind in (GRU4Rec, SASRec, BERT4Rec): assert isinstance(kind().item_emb, IDEmbedding)
    for kind in (GRU4Rec, SASRec, ContentSASRec): assert kind.causal
    assert not BERT4Rec.causal


# SASRec against drawn items

def slow_sampled_loss(model, batch, ids, known):
    "Target by target: its history, its group's items, and the two losses in their first form."
    total, n = 0., model.n_negatives
    rows = -(-len(batch.pos_item) // len(ids))
    for t, (flat, target) in enumerate(zip(batch.positions.tolist(), batch.pos_item.tolist())):
        b, column = divmod(flat, batch.item_seq.shape[1])
        history = batch.item_seq[b, :column + 1]
        u = model.encoder(model.item_emb.weight[history][None], torch.zeros(1, column + 1, dtype=torch.bool))[0, -1]
        logit = lambda item: u @ model.item_emb.weight[item] / model.temperature
        others = [logit(item) for item in ids[t // rows].tolist() if item != target]
        if model.loss == "gbce":
            alpha = n / (known - 1)
            beta = alpha * (model.calibration * (1 - 1 / alpha) + 1 / alpha)
            terms = [beta * logit(target).sigmoid().log(), *((1 - z.sigmoid()).log() for z in others)]
            total -= sum(terms) / (n + 1)
        else:
            weight = known / n if model.logq else 1
            total -= (logit(target).exp() / (logit(target).exp() + sum(weight * z.exp() for z in others))).log()
    return total / len(batch.pos_item)


@pytest.mark.parametrize("untrained", [0, 4])
@pytest.mark.parametrize("options", [{}, dict(logq=False, temperature=.3), dict(n_negatives=1)])
@pytest.mark.parametrize("name", ["sasrec_sampled", "sasrec_gbce"])
def test_loss_against_drawn_items_target_by_target(name, options, untrained):
    model = build(name, dropout=0., attention_dropout=0., **options).double().train()
    torch.nn.init.normal_(model.item_emb.weight, std=.3)
    batch = position_batches(make_store(), 30, 10)[0]
    if untrained: model.known_items = torch.arange(1, V + 1 - untrained)
    set_seed(3)
    ids, _, known = draw_negatives(batch.pos_item, V, model.n_negatives, model.known_items)
    assert known == V - untrained and len(ids) > 1
    set_seed(3)
    found = model.finetune_loss(batch)["loss"]
    slow = slow_sampled_loss(model, batch, ids, known)
    torch.testing.assert_close(found, slow, **CLOSE)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(found, weights), torch.autograd.grad(slow, weights)): torch.testing.assert_close(a, b, **CLOSE)


def test_only_a_loss_against_drawn_items_draws():
    batch = position_batches(make_store(), 30, 10)[0]
    for loss, training in (("softmax", True), ("softmax", False), ("sampled_softmax", False), ("gbce", False)):
        model, twin = (SASRec(**SIZES, dropout=0., attention_dropout=0., **how) for how in (dict(loss=loss), {}))
        for each in (model, twin): each.set_catalogue(make_catalogue())
        twin.load_state_dict(model.state_dict())
        before = torch.get_rng_state()
        found = model.train(training).finetune_loss(batch)["loss"]
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(found, twin.train(training).finetune_loss(batch)["loss"]), "the default is the full softmax"
    model.train().finetune_loss(batch)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["sasrec_sampled", "sasrec_gbce"])
def test_what_can_be_learned_is_learned_against_drawn_items(name):
    model = build(name, make_catalogue(whole=True), dropout=0., attention_dropout=0.)
    fit(model, ring_store(), epochs=60, batch_size=32, lr=.01, patience=60, device="cpu", progress=False)
    assert evaluate(model, ring_store()).metrics(ks=(1,))["recall@1"] == 1


def test_losses_of_sasrec_have_names():
    with pytest.raises(ValueError, match="loss 'bpr' is none of .*softmax.*sampled_softmax.*gbce"): SASRec(loss="bpr")
    model = build("sasrec_gbce", n_negatives=0).train()
    with pytest.raises(ValueError, match="n_negatives 0: both must be at least 1"): model.finetune_loss(position_batches(make_store(), 30, 10)[0])


# BERT4Rec

def filled_by_hand(model, history):
    "Put a [MASK] behind one history and compare what the encoder makes of it with every item."
    x = torch.stack([*(model.item_emb.weight[i] for i in history), model.mask_emb.weight[0]])[None]
    u = model.encoder(x, torch.zeros(1, len(history) + 1, dtype=torch.bool))[0, -1]
    linear, _, norm = model.head
    u = norm(torch.nn.functional.gelu(linear.weight @ u + linear.bias))
    return torch.stack([u @ model.item_emb.weight[i] + model.item_bias.weight[i, 0] for i in range(1, V + 1)])


def test_bert4rec_fills_the_gap_at_the_end():
    model, histories = build("bert4rec").double(), [[1, 2, 3], [7], [4, 5, 6, 6, 1], list(range(1, 11))]
    assert not model.item_bias.weight.any(), "biases begin at zero"
    torch.nn.init.normal_(model.item_bias.weight)
    expected = torch.stack([filled_by_hand(model, h) for h in histories])
    torch.testing.assert_close(scores(model, histories), expected, **CLOSE)


def test_bert4rec_reads_a_position_as_a_history_of_its_own():
    model = build("bert4rec").double()
    batch = collate([[1, 2, 3, 9], [7], [4, 5, 6]], 10)
    asked = torch.tensor([2, 0, 4, 9, 10])
    found = model.score(model.encode_sequence(batch, asked), model.encode_items())
    torch.testing.assert_close(found, scores(model, [[1, 2, 3], [1], [7], [4, 5], [4, 5, 6]]), **CLOSE)
    late = collate([[1, 2, 3, 8], [7], [4, 5, 6]], 10)
    assert torch.equal(model.encode_sequence(late, asked[:2]), model.encode_sequence(batch, asked[:2]))


@pytest.mark.parametrize("rows_a_part", [1, 5, 14])
def test_bert4rec_in_parts(rows_a_part, monkeypatch):
    "The same vectors and gradients, few rows at a time; what is computed twice draws the same dropout."
    model, batch, sizes = build("bert4rec", dropout=0., attention_dropout=0.).double(), prefix_batches(make_store(), TRAIN, 16, 10)[0], []
    whole = type(model.encoder).forward
    monkeypatch.setattr(type(model.encoder), "forward", lambda self, x, *a, **k: sizes.append(len(x)) or whole(self, x, *a, **k))
    def loss_and_gradients():
        set_seed(3)
        loss = model.train().finetune_loss(batch)["loss"]
        return loss, torch.autograd.grad(loss, list(model.parameters()))
    loss, gradients = loss_and_gradients()
    assert sizes == [len(batch)] == [14]
    width = batch.item_seq.shape[1] + 1
    monkeypatch.setattr(baselines, "PART_NUMBERS", rows_a_part * width * model.item_emb.embedding_dim)
    sizes.clear()
    few, few_gradients = loss_and_gradients()
    assert max(sizes) == rows_a_part and (sum(sizes) > 14) == (rows_a_part < 14)
    torch.testing.assert_close(few, loss, **CLOSE)
    for a, b in zip(few_gradients, gradients): torch.testing.assert_close(a, b, **CLOSE)


def test_bert4rec_computes_twice_with_the_same_dropout(monkeypatch):
    model, batch = build("bert4rec", dropout=.4, attention_dropout=.4).double(), prefix_batches(make_store(), TRAIN, 16, 10)[0]
    monkeypatch.setattr(baselines, "PART_NUMBERS", 1)
    found = []
    for once in (False, True):
        if once: monkeypatch.setattr("mmseqrec.models.baselines.checkpoint", lambda run, *a, use_reentrant: run(*a))
        set_seed(3)
        loss = model.train().finetune_loss(batch)["loss"]
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    (twice, gradients), (once, expected) = found
    assert torch.equal(twice, once)
    for a, b in zip(gradients, expected): assert torch.equal(a, b)


def test_bert4rec_looks_both_ways():
    model = build("bert4rec").double()
    weights = model.attention(collate([[1, 2, 3]], 10))
    assert len(weights) == 2 and all(layer.shape == (1, 2, 4, 4) and (layer > 0).all() for layer in weights)


@pytest.mark.parametrize("rate", [0., .2, .7])
def test_loss_of_bert4rec_place_by_place(rate):
    "The hidden places of a seeded draw, each encoded and scored on its own."
    model = build("bert4rec", dropout=0., attention_dropout=0., cloze_rate=rate).double()
    torch.nn.init.normal_(model.item_bias.weight)
    batch = prefix_batches(make_store(), TRAIN, 16, 10)[0]
    set_seed(3)
    rows, total = cloze(batch, V, rate), 0.
    vectors = torch.cat([model.item_emb.weight, model.mask_emb.weight])
    for place, target in zip(rows.positions.tolist(), rows.pos_item.tolist()):
        b, column = divmod(place, rows.item_seq.shape[1])
        history = rows.item_seq[b, :rows.item_seq_len[b]]
        u = model.encoder(vectors[history][None], torch.zeros(1, len(history), dtype=torch.bool))[0, column]
        logits = model.item_emb.weight[1:] @ model.head(u) + model.item_bias.weight[1:, 0]
        total += torch.logsumexp(logits, 0) - logits[target - 1]
    set_seed(3)
    found = model.train().finetune_loss(batch)["loss"]
    torch.testing.assert_close(found, total / len(rows.positions), rtol=0, atol=1e-9)
    assert len(rows.positions) > len(batch) or rate == 0
    only_last = [model.eval().finetune_loss(batch)["loss"] for _ in range(2)]
    assert torch.equal(*only_last) and torch.equal(only_last[0], found) == (rate == 0)


def test_windows_would_show_bert4rec_the_answers():
    model = build("bert4rec")
    with pytest.raises(ValueError, match="would be in sight"): model.finetune_loss(position_batches(make_store(), 16, 10)[0])


def test_missing_content_of_a_used_modality_is_refused():
    from mmseqrec.features.encoders import catalogue_from_arrays
    only_text = catalogue_from_arrays(["a", "b"], np.ones((2, TEXT_SIZE)))
    with pytest.raises(ValueError, match="expects image features"): ContentSASRec(image_size=IMAGE_SIZE, **SIZES).set_catalogue(only_text)
    ContentSASRec(text_size=TEXT_SIZE, **SIZES).set_catalogue(only_text)
    with pytest.raises(ValueError, match="text_size, image_size or both"): ContentSASRec(**SIZES)
    model = build("content_both")
    with pytest.raises(ValueError, match="expects image features"): model.set_catalogue(only_text)
    assert model.catalogue.n_items == V and model.recommend([["item-1"]], k=2)[0].items


def test_learning_beats_counting_where_order_decides():
    "What follows item 1 depends on what came before it: Markov cannot know, the others can. Half of the users are new."
    start = np.random.default_rng(0).integers(2, 7, 80)
    items = np.stack([start, np.ones(80, int), start + 5], 1).astype(np.int32)
    stage = np.repeat([[TRAIN, TRAIN, TRAIN], [TRAIN, TRAIN, TEST]], 40, axis=0).astype(np.int8)
    store, found = SequenceStore(items.ravel(), np.arange(0, 241, 3), stage.ravel(), V), {}
    for name in ("markov", "sasrec", "gru4rec", "bert4rec"):
        model = build(name, make_catalogue(whole=True), counted=False, dropout=0., attention_dropout=0.)
        fit(model, store, epochs=200, batch_size=64, lr=.003, device="cpu", progress=False)
        found[name] = evaluate(model, store).metrics(ks=(1,))["recall@1"]
    assert found.pop("markov") < .5 and min(found.values()) > .95, found
