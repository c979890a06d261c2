"A catalogue, events and recommenders small enough for loops; and the one list of systems that keep the contract."
import numpy as np
import torch

from mmseqrec.core import set_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.models.baselines import BERT4Rec, ContentSASRec, GRU4Rec, Markov, Popularity, SASRec
from mmseqrec.models.classical import EASE, ContentKNN, ItemKNN
from mmseqrec.models.missrec import MISSRec
from mmseqrec.models.mmsrec import MMSRec
from mmseqrec.models.mp4sr import MP4SR, MSM4SR
from mmseqrec.models.unisrec import UniSRec

TEXT_SIZE, IMAGE_SIZE, V = 6, 5, 12
NO_IMAGE, NO_TEXT, NOTHING = 3, 4, 5  # rows of `make_catalogue` that lack something
SIZES = dict(hidden_size=16, n_layers=2, n_heads=2, inner_size=32, max_len=10)

def in_streams(kind, **options):
    "Build MP4SR or MSM4SR; `dropout` also sets that of its experts."
    both = {"adapter_dropout": options["dropout"]} if "dropout" in options else {}
    return kind(text_size=TEXT_SIZE, image_size=IMAGE_SIZE, **SIZES | both | options)


def with_interests(attention_dropout=None, **options):
    "Build MISSRec, which has one rate of dropout."
    return MISSRec(**SIZES | dict(text_size=TEXT_SIZE, image_size=IMAGE_SIZE) | options)


def by_texts(**options):
    "Build UniSRec; `dropout` also sets that of its experts, and without any the gate is quiet, too."
    both = {"adapter_dropout": options["dropout"], "noisy_gate": options["dropout"] > 0} if "dropout" in options else {}
    return UniSRec(TEXT_SIZE, **SIZES | both | options)


def behind_a_gap(**options):
    "Build MMSRec; `dropout` also sets that of its encoder's input, and without any no gap is drawn but the next item's."
    both = {"embedding_dropout": options["dropout"], "cloze_rate": .2 if options["dropout"] else 0.} if "dropout" in options else {}
    return MMSRec(text_size=TEXT_SIZE, image_size=IMAGE_SIZE, **SIZES | both | options)


def step_by_step(attention_dropout=None, **options):
    "Build GRU4Rec, which has no attention."
    return GRU4Rec(**{"hidden_size": 16, "state_size": 24, "max_len": 10} | options)


# A later system is added here, and every test of the contract asks it too.
SYSTEMS = {
    "popularity": lambda **options: Popularity(),
    "markov": lambda **options: Markov(),
    "itemknn": lambda **options: ItemKNN(k=5, shrinkage=2.),
    "ease": lambda **options: EASE(l2=2.),
    "content_knn": lambda **options: ContentKNN(text_size=TEXT_SIZE, image_size=IMAGE_SIZE, n_last=10),
    "sasrec": lambda **options: SASRec(**SIZES | options),
    "gru4rec": lambda **options: step_by_step(**options),
    "bert4rec": lambda **options: BERT4Rec(**SIZES | ({"cloze_rate": 0.} if options.get("dropout") == 0 else {}) | options),
    "content_text": lambda **options: ContentSASRec(text_size=TEXT_SIZE, **SIZES | options),
    "content_image": lambda **options: ContentSASRec(image_size=IMAGE_SIZE, **SIZES | options),
    "content_both": lambda **options: ContentSASRec(text_size=TEXT_SIZE, image_size=IMAGE_SIZE, **SIZES | options),
    "unisrec": lambda **options: by_texts(transductive=True, **options),
    "content_unisrec": lambda **options: by_texts(**options),
    "mp4sr": lambda **options: in_streams(MP4SR, transductive=True, **options),
    "content_mp4sr": lambda **options: in_streams(MP4SR, **options),
    "content_msm4sr": lambda **options: in_streams(MSM4SR, **options),
    "content_mmsrec": lambda **options: behind_a_gap(**options),
    "missrec": lambda **options: with_interests(transductive=True, **options),
    "content_missrec": lambda **options: with_interests(**options),
}
VARIANTS = {  # keep the contract, too: another loss of a system above
    "sasrec_sampled": lambda **options: SASRec(**SIZES | dict(loss="sampled_softmax", n_negatives=6) | options),
    "sasrec_gbce": lambda **options: SASRec(**SIZES | dict(loss="gbce", n_negatives=6) | options),
}
CLASSICAL = ("itemknn", "ease", "content_knn")  # are computed from training events at once
COUNTING = ("popularity", "markov", *CLASSICAL)  # have no weights that learn
WITHOUT_ATTENTION = (*COUNTING, "gru4rec")
CLOZE = ("bert4rec", "content_mmsrec")  # are asked behind a [MASK], and show its attention as well
LEARNING = tuple(name for name in SYSTEMS if name not in COUNTING)
BY_CONTENT = tuple(name for name in LEARNING if name.startswith("content"))  # know items by their features only


def make_catalogue(n_items=V, seed=0, name="item", dtype="float32", whole=False):
    "Two sentences, whole and with words left out, and two pictures an item; unless `whole`, some lack one or both."
    rng = np.random.default_rng([seed, n_items])
    text, image = rng.standard_normal((n_items, 2, TEXT_SIZE)), rng.standard_normal((n_items, 2, IMAGE_SIZE))
    text[1, 1] = image[0, 1] = 0  # one sentence, one picture only
    if not whole: image[NO_IMAGE - 1], text[NO_TEXT - 1], text[NOTHING - 1], image[NOTHING - 1] = 0, 0, 0, 0
    dropped = np.where(text == 0, 0, text + rng.standard_normal(text.shape) / 2)
    return catalogue_from_arrays([f"{name}-{row}" for row in range(1, n_items + 1)], text, image, dtype, dropped)


def make_store(n_users=24, n_items=V, seed=0, longest=9, held_out=True):
    "Users with 1 to `longest` events; the last two of whoever has four or more are held out."
    rng = np.random.default_rng([seed, n_users])
    counts = rng.integers(1, longest + 1, n_users)
    stage = [np.array([TRAIN] * count if count < 4 or not held_out else [TRAIN] * (count - 2) + [VALID, TEST], np.int8)
             for count in counts]
    weights = 1 / np.arange(1, n_items + 1)
    items = rng.choice(n_items, counts.sum(), p=weights / weights.sum()) + 1
    return SequenceStore(items.astype(np.int32), np.r_[0, np.cumsum(counts)], np.concatenate(stage), n_items)


def ring_store(n_users=16, length=7, n_items=V):
    "Users who walk one step forward around a ring of items: everything can be learned."
    items = (np.arange(n_users)[:, None] % n_items + np.arange(length)) % n_items + 1
    stage = np.tile(np.array([TRAIN] * (length - 2) + [VALID, TEST], np.int8), n_users)
    return SequenceStore(items.ravel().astype(np.int32), np.arange(0, items.size + 1, length), stage, n_items)


def build(name, catalogue=None, store=None, seed=0, counted=True, **options):
    "Build a system with seeded weights and a catalogue; counting ones have counted `store`."
    set_seed(seed)
    model = (SYSTEMS | VARIANTS)[name](**options).set_catalogue(make_catalogue() if catalogue is None else catalogue)
    if name in COUNTING and counted:
        model.start_epoch(make_store(n_items=model.catalogue.n_items) if store is None else store, 0)
    return model.eval()


def weights(model): return {name: x.detach().clone() for name, x in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(history):
    "The epochs of a history without their times, which differ from run to run."
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history.epochs]
