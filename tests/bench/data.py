"Histories and features of a given size, written as the peers read them; the sizes of the peers' configuration files."
from pathlib import Path

import numpy as np

from mmseqrec.core import derive_seed
from mmseqrec.data.interactions import TEST, TRAIN, VALID
from mmseqrec.data.sequences import SequenceStore
from mmseqrec.experiments.run import RunConfig


def synthetic_store(
    n_users: int,  # U
    n_items: int,  # V
    mean_length: float = 9.0,  # events of a user, on average; at least 4 each
    max_length: int = 50,  # longer histories are cut
    seed: int = 0,
) -> SequenceStore:  # each user's last event is for test, the one before for validation
    "Draw histories of geometric length over items of unequal popularity."
    rng = np.random.default_rng(derive_seed(seed, "bench", n_users, n_items))
    lengths = np.minimum(3 + rng.geometric(1 / max(mean_length - 3, 1), n_users), max_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.minimum(n_items * rng.random(offsets[-1]) ** 2, n_items - 1).astype(np.int32) + 1
    stage = np.full(len(items), TRAIN, np.int8)
    stage[offsets[1:] - 1], stage[offsets[1:] - 2] = TEST, VALID
    return SequenceStore(items, offsets, stage, n_items)

def write_prefixes(
    store: SequenceStore,
    folder: str | Path,  # gets `Syn.train.inter`, ... and feature dumps of every item
    feature_size: int = 512,  # numbers in a text or image feature
    seed: int = 0,
) -> Path:  # the folder
    "Write histories as UniSRec and MISSRec read them, with random features."
    folder, rng = Path(folder), np.random.default_rng(derive_seed(seed, "bench features"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, stage in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        events = store.rows(stage)[::-1]  # as published: the longest prefix of a user first
        events = events[np.argsort(store.user[events], kind="stable")]
        first = store.offsets[store.user[events]]
        rows = (f"{u}\t{' '.join(map(str, store.items[a:e] - 1))}\t{store.items[e] - 1}"
                for u, a, e in zip(store.user[events], first, events))
        lines = ["user_id:token\titem_id_list:token_seq\titem_id:token", *rows]
        (folder / f"Syn.{name}.inter").write_text("\n".join(lines) + "\n")
    (folder / "Syn.item2index").write_text("".join(f"i{row}\t{row}\n" for row in range(store.n_items)))
    for suffix in ("feat1CLS", "feat2CLS", "feat3CLS"):
        rng.normal(size=(store.n_items, feature_size)).astype(np.float32).tofile(folder / f"Syn.{suffix}")
    return folder

def peer_config(
    folder: str | Path,  # prefix rows and feature dumps
    **changes,  # other settings
) -> RunConfig:
    "Return the peers' sizes, for data in their format."
    return RunConfig(**{**dict(source=f"benchmark:{folder}", systems=("sasrec",), hidden_size=300, inner_size=256,
                               n_layers=2, n_heads=2, dropout=.5, max_len=50, batch_size=256, lr=1e-3), **changes})
