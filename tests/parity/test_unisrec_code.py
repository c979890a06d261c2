"""The released code of UniSRec beside ours (pages 31 and 51)."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drivers.common import WithoutPadding
from recbole_weights import HISTORIES, MAX_LEN, SIZES, THEIRS, V, compare_losses, encoder_pairs, give_equal_weights, rows, windows
from theirs import one_before
from world import theirs_of

import mmseqrec.models.unisrec as unisrec
from mmseqrec.blocks.augment import drop_items
from mmseqrec.features.encoders import catalogue_from_arrays

pytestmark = pytest.mark.filterwarnings("default")  # of theirs
TEXT_SIZE, N_EXPERTS, NO_TEXT = 6, 3, 4
DROP = .4
each_stage = pytest.mark.parametrize("stage", ["inductive_ft", "transductive_ft"])
each_noise = pytest.mark.parametrize("noisy", [False, True], ids=["quiet", "noisy"])


@pytest.fixture
def code(peer, monkeypatch):
    "Their model and their disturbances, imported from their folder and forgotten afterwards."
    folder = peer("UniSRec")
    pytest.importorskip("recbole", reason="RecBole 1.2.1 is not installed")
    monkeypatch.syspath_prepend(folder)
    import unisrec as model
    from data import transform
    yield SimpleNamespace(model=model, transform=transform)
    for name in ("unisrec", "data", "data.transform"): sys.modules.pop(name)


def features(seed, lacking=()):
    "Text features `[V + 1, TEXT_SIZE]`, in 32 bits as catalogues hold them; row 0 and what lacks a text are zeros."
    found = np.random.default_rng(seed).standard_normal((V + 1, TEXT_SIZE)).astype(np.float32)
    found[[0, *lacking]] = 0
    return found


def table(numbers): return torch.nn.Embedding.from_pretrained(torch.from_numpy(numbers).double(), padding_idx=0)


def build(code, stage, lacking=(), **options):
    "Both systems with equal weights and features, and how the weights are paired."
    texts, shortened = features(0, lacking), features(1, lacking)
    ours = unisrec.UniSRec(TEXT_SIZE, V, **SIZES, dropout=0, attention_dropout=0, max_len=MAX_LEN, n_experts=N_EXPERTS,
                           adapter_dropout=0, centred=False, transductive=stage == "transductive_ft",
                           sequence_weight=.5, **options)
    ours.set_catalogue(catalogue_from_arrays([f"item-{i}" for i in range(1, V + 1)], texts[1:], dropped_text_emb=shortened[1:]))
    config = THEIRS | dict(train_stage=stage, temperature=.07, n_exps=N_EXPERTS, adaptor_layers=[TEXT_SIZE, 16],
                           adaptor_dropout_prob=0, item_drop_ratio=DROP, item_drop_coefficient=.9) | {"lambda": .5}
    data = SimpleNamespace(num=lambda field: V + 1, plm_embedding=table(texts), plm_embedding_aug=table(shortened))
    theirs = code.model.UniSRec(config, data)
    experts = [f"moe_adaptor.experts.{i}" for i in range(N_EXPERTS)]
    pairs = [(["items.experts.experts.weight"], [f"{x}.lin.weight" for x in experts]),
             (["items.experts.center"], [f"{x}.bias" for x in experts]),
             (["items.experts.gate"], ["moe_adaptor.w_gate"]), *encoder_pairs()]
    if ours.items.experts.gate_noise is not None: pairs += [(["items.experts.gate_noise"], ["moe_adaptor.w_noise"])]
    else: theirs.moe_adaptor.noisy_gating, theirs.moe_adaptor.w_noise = False, None
    if ours.item_emb is not None: pairs += [(["item_emb.weight"], ["item_embedding.weight"])]
    give_equal_weights(ours, theirs, pairs)
    return SimpleNamespace(ours=ours, theirs=theirs, pairs=pairs, data=data, config=config)


def read_zeros(ours):
    "Let the experts read a zero vector where an item has no text, as the released code does."
    ours.items.missing_text_mask.fill_(False)


@each_stage
def test_vectors_and_scores(code, compare, stage):
    both, batch = build(code, stage, noisy_gate=False), rows()
    ours, theirs = both.ours.eval(), both.theirs.eval()
    inputs = theirs.moe_adaptor(both.data.plm_embedding.weight)
    compare("UniSRec", stage, "item vectors", ours.items(torch.arange(1, V + 1)), inputs[1:])
    sequence = F.normalize(theirs(batch.item_seq, inputs[batch.item_seq], batch.item_seq_len), dim=1)
    compare("UniSRec", stage, "sequence vectors", ours.encode_sequence(batch)[:, 0], sequence)
    scores = ours.score(ours.encode_sequence(batch), ours.encode_items())
    compare("UniSRec", stage, "scores of the catalogue", scores, theirs.full_sort_predict(theirs_of(batch))[:, 1:])


def test_items_without_text(code, compare):
    both, batch = build(code, "inductive_ft", lacking=[NO_TEXT], noisy_gate=False), rows()
    ours, theirs = both.ours.eval(), both.theirs.eval()
    def check(what, *note, **more):
        scores = ours.score(ours.encode_sequence(batch), ours.encode_items())
        compare("UniSRec", "inductive_ft", what, scores, theirs.full_sort_predict(theirs_of(batch))[:, 1:], *note, **more)
    check("scores where an item has no text",
          "an item without text is zero here; there the experts read a zero vector", differs=True)
    read_zeros(ours)
    check("scores where an item has no text, read as zeros here")


@each_noise
def test_experts_in_training(code, compare, noisy):
    "The same numbers are drawn for the noise: both draw one for each item and expert."
    both = build(code, "inductive_ft", noisy_gate=noisy)
    def drawn(adapter, x):
        torch.manual_seed(0)
        return adapter(x)
    x = torch.randn(5, TEXT_SIZE)
    compare("UniSRec", "experts", "noisy in training" if noisy else "without noise", drawn(both.ours.items.experts, x),
            drawn(both.theirs.moe_adaptor, x))


@each_stage
def test_finetuning(code, compare, stage):
    both = build(code, stage, noisy_gate=False)
    loss = lambda batch: both.ours(batch)["loss"]
    batch, (window, prefixes) = rows(), windows()
    compare("UniSRec", stage, "fine-tuning as released: loss", loss(batch), both.theirs.calculate_loss(theirs_of(batch)),
            "their padding item is a candidate", differs=True)
    both.theirs.loss_fct = WithoutPadding()
    for what, mine, other in (("a row a question", batch, batch), ("a window, its prefixes there", window, prefixes)):
        compare_losses(compare, "UniSRec", stage, f"fine-tuning, {what}", both.ours, loss(mine), both.theirs,
                       both.theirs.calculate_loss(theirs_of(other)), both.pairs)


def draws(batch):
    "Which items of a batch are left out or speak their shortened text: never the first, never padding."
    drawn = torch.rand(batch.item_seq.shape, generator=torch.Generator().manual_seed(3)) < DROP
    return drawn & ~batch.item_pad_mask & (torch.arange(drawn.shape[1]) > 0)


def disturbed(both, code, monkeypatch, batch, drawn, words):
    "Their fields of a batch under their own disturbance, with given draws."
    from recbole.data.interaction import Interaction
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda share: (~drawn).double())
        patch.setattr(code.transform.random, "random", lambda: float(words))
        return code.transform.PLMEmb(both.config)(both.data, Interaction(theirs_of(batch)))


def test_item_drop(code, compare, monkeypatch):
    "Theirs writes what stays and what goes to the same places: on a CPU the one that is written last stands there."
    both, batch = build(code, "pretrain", noisy_gate=False), rows()
    drawn = draws(batch)
    assert drawn[:, 1].any() and drawn[torch.arange(len(batch)), batch.item_seq_len - 1].any()
    made = disturbed(both, code, monkeypatch, batch, drawn, words=False)
    item_seq, lengths = made["item_id_list_aug"], made["item_length_aug"]
    def check(what, mask, *note, **more):
        mine = drop_items(batch, mask)
        assert torch.equal(mine.item_seq_len, lengths)
        compare("UniSRec", "item drop", what, F.pad(mine.item_seq, (0, MAX_LEN - mine.item_seq.shape[1])), item_seq,
                *note, **more)
    check("what stays of histories", drawn, "theirs leaves out the item before a drawn one: the last one always stays, the first "
          "need not", differs=True)
    check("what stays of histories, the item before a drawn one left out here", one_before(drawn))
    last = torch.tensor([history[-1] for history in HISTORIES])
    assert torch.equal(item_seq.gather(1, lengths[:, None] - 1)[:, 0], last), "the last one always stays"
    assert (item_seq[:, 0] != batch.item_seq[:, 0]).any(), "the first one need not"


CASES = {"item drop": {}, "word drop": {"words": True}, "item drop, an item without text": {"lacking": (9,)}}
each_case = pytest.mark.parametrize("what", CASES)


@each_case
def test_pretraining(code, compare, monkeypatch, what):
    words, lacking = CASES[what].get("words", False), CASES[what].get("lacking", ())
    both = build(code, "pretrain", lacking, noisy_gate=False, released=("false_negatives",), word_drop_share=float(words))
    batch = rows()
    drawn = draws(batch)
    made = disturbed(both, code, monkeypatch, batch, drawn, words)
    for name in ("draw_item_drop", "draw_word_drop"):
        mine = drawn if words else one_before(drawn)
        monkeypatch.setattr(unisrec, name, lambda mask, rate: mine)
    ours = lambda: both.ours(batch, "pretrain")["loss"]
    theirs = lambda: both.theirs.calculate_loss(made)
    if lacking:
        compare("UniSRec", "pretrain", f"{what}: loss", ours(), theirs(), "a next item without text is neither asked for nor "
                "offered here", differs=True)
        read_zeros(both.ours)
        what += ", read as zeros here"
    if not lacking and not words:
        both.ours.released = frozenset()
        compare("UniSRec", "pretrain", f"{what} without released names: loss", ours(), theirs(),
                "rows with the same next item are no negatives here; there each adds 1", differs=True)
        both.ours.released = frozenset({"false_negatives"})
    compare_losses(compare, "UniSRec", "pretrain", what, both.ours, ours(), both.theirs, theirs(), both.pairs)
