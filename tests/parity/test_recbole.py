"""RecBole 1.2.1's SASRec, GRU4Rec and BERT4Rec beside ours (page 50)."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from drivers.common import WithoutPadding
from recbole_weights import (HISTORIES, MAX_LEN, SIZES, THEIRS, V, compare_losses, encoder_pairs, give_equal_weights, rows,
                             windows)
from world import theirs_of

import mmseqrec.models.baselines as baselines
from mmseqrec.blocks.augment import append_mask, cloze
from mmseqrec.data.sequences import collate
from mmseqrec.features.encoders import catalogue_from_arrays

pytestmark = pytest.mark.filterwarnings("default")  # of theirs
OURS = dict(**SIZES, max_len=MAX_LEN, dropout=0, attention_dropout=0)
PADDING = "their padding item, with its random vector, is a candidate"


@pytest.fixture
def recbole():
    "RecBole's sequential recommenders."
    return pytest.importorskip("recbole.model.sequential_recommender", reason="RecBole 1.2.1 is not installed")


def their_model(kind, **options): return kind(THEIRS | options, SimpleNamespace(num=lambda field: V + 1))


def with_catalogue(model):
    return model.set_catalogue(catalogue_from_arrays([f"item-{i}" for i in range(1, V + 1)], torch.eye(V).numpy()))


def sasrec(recbole):
    "Both SASRecs with equal weights, and how these are paired."
    ours, theirs = with_catalogue(baselines.SASRec(V, **OURS)), their_model(recbole.SASRec)
    pairs = [(["item_emb.weight"], ["item_embedding.weight"]), *encoder_pairs()]
    give_equal_weights(ours, theirs, pairs)
    return ours, theirs, pairs


def gru4rec(recbole, n_layers=1):
    "Both GRU4Recs, alike."
    ours = baselines.GRU4Rec(V, hidden_size=16, state_size=24, n_gru_layers=n_layers, dropout=0, max_len=MAX_LEN)
    theirs = their_model(recbole.GRU4Rec, embedding_size=16, hidden_size=24, num_layers=n_layers, dropout_prob=0)
    gates = [f"weight_{x}_l{i}" for i in range(n_layers) for x in ("ih", "hh")]
    pairs = [(["item_emb.weight"], ["item_embedding.weight"]), *(([f"encoder.gru.{x}"], [f"gru_layers.{x}"]) for x in gates)]
    pairs += [([f"encoder.output.{x}"], [f"dense.{x}"]) for x in ("weight", "bias")]
    give_equal_weights(with_catalogue(ours), theirs, pairs)
    return ours, theirs, pairs


def bert4rec(recbole):
    "Both BERT4Recs, alike; in both there is a position more than the longest history has items."
    ours = with_catalogue(baselines.BERT4Rec(V, **OURS))
    theirs = their_model(recbole.BERT4Rec, MAX_ITEM_LIST_LENGTH=MAX_LEN + 1, mask_ratio=.2, MASK_ITEM_SEQ="masked",
                         POS_ITEMS="hidden", NEG_ITEMS="others", MASK_INDEX="places")
    pairs = [(["item_emb.weight", "mask_emb.weight"], ["item_embedding.weight"]), *encoder_pairs(),
             (["item_bias.weight"], ["output_bias"])]
    parts = ((0, "output_ffn"), (2, "output_ln"))
    pairs += [([f"head.{i}.{x}"], [f"{name}.{x}"]) for i, name in parts for x in ("weight", "bias")]
    give_equal_weights(ours, theirs, pairs)
    return ours, theirs, pairs


CAUSAL = {"SASRec": sasrec, "GRU4Rec": gru4rec, "GRU4Rec, 2 layers": lambda recbole: gru4rec(recbole, 2)}
each_causal = pytest.mark.parametrize("name", CAUSAL)


@each_causal
def test_vectors_and_scores(recbole, compare, name):
    ours, theirs, _ = CAUSAL[name](recbole)
    ours, theirs, batch = ours.eval(), theirs.eval(), rows()
    compare("RecBole", name, "item vectors", ours.encode_items().vectors[:, 0], theirs.item_embedding.weight[1:])
    known = theirs(batch.item_seq, batch.item_seq_len)
    compare("RecBole", name, "sequence vectors", ours.encode_sequence(batch)[:, 0], known)
    with torch.no_grad():  # GRU4Rec reads ends another way then
        scores = ours.score(ours.encode_sequence(batch), ours.encode_items())
        compare("RecBole", name, "scores of the catalogue", scores, theirs.full_sort_predict(theirs_of(batch))[:, 1:])


@each_causal
def test_losses(recbole, compare, name):
    ours, theirs, pairs = CAUSAL[name](recbole)
    batch, (window, prefixes) = rows(), windows()
    loss = lambda some: ours(some)["loss"]
    compare("RecBole", name, "fine-tuning as released: loss", loss(batch), theirs.calculate_loss(theirs_of(batch)),
            PADDING, differs=True)
    theirs.loss_fct = WithoutPadding()
    for what, mine, other in (("a row a question", batch, batch), ("a window, its prefixes there", window, prefixes)):
        compare_losses(compare, "RecBole", name, f"fine-tuning, {what}", ours, loss(mine), theirs,
                       theirs.calculate_loss(theirs_of(other)), pairs)


def padded(batch, n_more=0):
    "Histories as RecBole has them: padded to the longest that may be, `n_more` items put in front."
    item_seq = F.pad(batch.item_seq, (n_more, 0), value=1)
    item_seq = F.pad(item_seq, (0, MAX_LEN + 1 - item_seq.shape[1]))
    return {"item_id_list": item_seq, "item_length": batch.item_seq_len + n_more}


def test_bert4rec_vectors_and_scores(recbole, compare):
    "Their evaluation loses the first item of every history, also of a short one: with any item in front it loses that."
    ours, theirs, _ = bert4rec(recbole)
    ours, theirs, batch = ours.eval(), theirs.eval(), rows()
    items = ours.encode_items()
    compare("RecBole", "BERT4Rec", "item vectors", items.vectors[:, 0, :-1], theirs.item_embedding.weight[1:-1])
    asked = append_mask(batch, V + 1)
    vectors = theirs(asked.item_seq).flatten(0, 1)[asked.query_index()]
    sequence = ours.encode_sequence(batch)
    compare("RecBole", "BERT4Rec", "sequence vectors", sequence[:, 0, :-1], vectors)
    scores = ours.score(sequence, items)
    compare("RecBole", "BERT4Rec", "scores of the catalogue as released", scores, theirs.full_sort_predict(padded(batch))[:, 1:],
            "their evaluation leaves out the first item of every history", differs=True)
    compare("RecBole", "BERT4Rec", "scores of the catalogue, an item in front there", scores,
            theirs.full_sort_predict(padded(batch, 1))[:, 1:])
    short = collate([h[1:] for h in HISTORIES if len(h) > 1], MAX_LEN)
    longer = collate([h for h in HISTORIES if len(h) > 1], MAX_LEN)
    compare("RecBole", "BERT4Rec", "scores of the catalogue, the first item left out here",
            ours.score(ours.encode_sequence(short), items), theirs.full_sort_predict(padded(longer))[:, 1:])


def with_gaps(hidden):
    "Name a batch of rows with gaps as their loss does: places and items of each row, zeros in front."
    n_rows, length = hidden.item_seq.shape
    places, items = torch.zeros(2, n_rows, length, dtype=torch.long)
    for row, at, item in zip(hidden.query_row(), hidden.positions % length, hidden.pos_item):
        places[row], items[row] = places[row].roll(-1), items[row].roll(-1)
        places[row, -1], items[row, -1] = at, item
    return {"masked": hidden.item_seq, "hidden": items, "others": items, "places": places}


def test_bert4rec_loss(recbole, compare, monkeypatch):
    "With the same gaps: theirs does not ask for the first item of a row, since place 0 marks padding there."
    ours, theirs, pairs = bert4rec(recbole)
    torch.manual_seed(0)
    batch = rows()
    gaps = cloze(batch, V, rate=.5)
    is_first = gaps.positions % gaps.item_seq.shape[1] == 0
    assert is_first.any() and not is_first.all()
    later = replace(gaps, positions=gaps.positions[~is_first], pos_item=gaps.pos_item[~is_first])
    def loss(hidden):
        monkeypatch.setattr(baselines, "cloze", lambda *given: hidden)
        return ours(batch)["loss"]
    what = "cloze as released: loss"
    compare("RecBole", "BERT4Rec", what, loss(later), theirs.calculate_loss(with_gaps(later)), PADDING, differs=True)
    theirs.output_bias.data[0] = -1e4  # takes the padding item away from the candidates
    compare("RecBole", "BERT4Rec", "cloze without padding item: loss", loss(gaps), theirs.calculate_loss(with_gaps(gaps)),
            "a hidden item at the first place is asked for here, not there", differs=True)
    compare_losses(compare, "RecBole", "BERT4Rec", "cloze, first places not asked, no padding item", ours, loss(later), theirs,
                   theirs.calculate_loss(with_gaps(later)), pairs)


def test_bert4rec_rows(recbole, compare):
    "Their rows have gaps in the history only: the item that came next is in none of them."
    from recbole.data.interaction import Interaction
    from recbole.data.transform import MaskItemSequence
    class Config(dict): ft_ratio = 0
    batch, dataset = rows(), SimpleNamespace(num=lambda field: V + 1)
    for ft_ratio in (0, 1):
        config = Config(THEIRS, mask_ratio=.5, MAX_ITEM_LIST_LENGTH=MAX_LEN)
        config.ft_ratio = config["ft_ratio"] = ft_ratio
        made = MaskItemSequence(config)(dataset, Interaction(theirs_of(batch)))
        shown = made["Mask_item_id_list"]
        assert ((shown == batch.item_seq) | (shown == V + 1)).all() and (shown.count_nonzero(1) == batch.item_seq_len).all()
        if ft_ratio: assert (shown.flatten()[batch.query_index()] == V + 1).all(), "the last item of the history is hidden"
    ours = append_mask(batch, V + 1)
    compare("RecBole", "BERT4Rec", "items in a training row", ours.item_seq_len, shown.count_nonzero(1),
            "ours has a place more, for the item that came next", differs=True)
    compare("RecBole", "BERT4Rec", "items in a training row, the next item left out here", ours.item_seq_len - 1,
            shown.count_nonzero(1))
