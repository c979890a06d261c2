"The options of a benchmark, which are kept with its results."
import os
from dataclasses import dataclass, field
from pathlib import Path

from .data import peer_config


@dataclass(frozen=True)
class BenchOptions:
    "What to measure, with what, and how long."
    bench: str | None = None  # folder of prefix rows and feature dumps; `None` writes one
    recbole_python: str | None = None  # interpreter that has RecBole
    unisrec_code: str | None = None  # checkout of UniSRec's released code
    missrec_code: str | None = None  # checkout of MISSRec's released code
    only: tuple[str, ...] | None = None  # names or beginnings of names of cases
    rounds: int = 5  # of each side
    round_seconds: float = 8.0  # about how long a side trains in a round
    threads: int = os.cpu_count() or 1
    device: str = "cpu"  # or `"cuda"`
    size: str = "normal"  # of the growth curves: `"quick"`, `"normal"`, `"full"`
    n_users: int = 5000  # of the data that are written
    n_items: int = 3000  # likewise
    sizes: dict = field(default_factory=lambda: {key: getattr(peer_config("."), key) for key in (
        "hidden_size", "inner_size", "n_layers", "n_heads", "dropout", "max_len", "batch_size", "lr")})

    def __post_init__(self):
        for name in ("bench", "unisrec_code", "missrec_code"):
            if (path := getattr(self, name)) is not None and not Path(path).is_dir():
                raise FileNotFoundError(f"there is no folder {path}; correct --{name.replace('_', '-')}")
        if self.bench and not list(Path(self.bench).glob("*.train.inter")):
            raise FileNotFoundError(f"{self.bench} holds no .train.inter file: it is no data set in the peers' format")
        if self.recbole_python and not Path(self.recbole_python).is_file():
            raise FileNotFoundError(f"there is no interpreter {self.recbole_python}; correct --recbole-python")
        if (self.unisrec_code or self.missrec_code) and not self.recbole_python:
            raise ValueError("released code needs an interpreter that has RecBole: give --recbole-python, too")

    def settings(self) -> dict:
        "Return what results depend on, without paths of this machine."
        keep = ("rounds", "round_seconds", "threads", "device", "size", "sizes")
        data = Path(self.bench).resolve().name if self.bench else [self.n_users, self.n_items]
        peers = [bool(path) for path in (self.recbole_python, self.unisrec_code, self.missrec_code)]
        return {**{name: getattr(self, name) for name in keep}, "data": data, "peers": peers}

    def feature_size(self, folder: str) -> int:
        "Read the number of features from the size of a dump."
        listed, = Path(folder).glob("*.item2index")
        n_rows = sum(1 for line in listed.read_text().splitlines() if line.strip())
        dump, = Path(folder).glob("*.feat1CLS")
        return dump.stat().st_size // 4 // n_rows
