"The systems that are trained, each on its data and ready to be timed."
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmseqrec.core import get_device, set_seed
from mmseqrec.data.interactions import TRAIN
from mmseqrec.data.sequences import Batch, SequenceStore, prefix_batches
from mmseqrec.data.sources import read_benchmark
from mmseqrec.evaluation import evaluate
from mmseqrec.experiments.run import SYSTEMS, RunConfig, sized
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.models.baselines import GRU4Rec, SASRec
from mmseqrec.models.missrec import MISSRec
from mmseqrec.models.mp4sr import MP4SR
from mmseqrec.training import training_batches

from .machine import SHAPES, count_operations, matrix_rate, measure_seconds
from .reference import reference_loss


@dataclass(frozen=True)
class BenchCase:
    "A system to train, and what it is compared with."
    title: str
    build: Callable  # makes a recommender of a catalogue and a `RunConfig`
    phase: str = "finetune"  # or `"pretrain"`
    peer: str | None = None  # driver `peer_….py`: `"recbole"`, `"unisrec"` or `"missrec"`
    peer_settings: dict = field(default_factory=dict)  # what the peer's program is told beside the sizes
    goal: float | None = None  # least ratio that is asked for
    reads_content: bool = True  # False: features are not read, as the peer does not
    quoted: int | None = None  # targets a second of the released code, measured once on another two-core machine

_DPC = dict(interest_method="dpc_knn")

TRAINING_CASES = {
    "sasrec": BenchCase("SASRec", sized(SASRec), peer="recbole", peer_settings={"model": "SASRec"}, goal=25,
                        reads_content=False, quoted=205),
    "gru4rec": BenchCase("GRU4Rec", sized(GRU4Rec, state_size=300), peer="recbole",
                         peer_settings={"model": "GRU4Rec"}, reads_content=False),
    "bert4rec": BenchCase("BERT4Rec", SYSTEMS["bert4rec"].build, peer="recbole",
                          peer_settings={"model": "BERT4Rec"}, reads_content=False),
    "unisrec": BenchCase("UniSRec, inductive", SYSTEMS["unisrec"].build, peer="unisrec",
                         peer_settings={"stage": "inductive_ft"}, goal=12, quoted=94),
    "unisrec_ids": BenchCase("UniSRec, transductive", SYSTEMS["unisrec_ids"].build, peer="unisrec",
                             peer_settings={"stage": "transductive_ft"}),
    "missrec": BenchCase("MISSRec, inductive", sized(MISSRec, **_DPC), peer="missrec",
                         peer_settings={"stage": "inductive_ft"}, goal=4.5, quoted=189),
    "missrec_pretrain": BenchCase("MISSRec, pre-training", sized(MISSRec, interest_ratio=.02, **_DPC), "pretrain",
                                  peer="missrec", peer_settings={"stage": "pretrain"}, goal=3, quoted=184),
    "content_sasrec": BenchCase("SASRec over content", SYSTEMS["content_sasrec"].build),
    "mmsrec": BenchCase("MMSRec", SYSTEMS["mmsrec"].build),
    "mp4sr": BenchCase("MP4SR, fine-tuning", sized(MP4SR, transductive=True, projections=False)),
    "mp4sr_pretrain": BenchCase("MP4SR, pre-training", sized(MP4SR), "pretrain"),
}

def spread_batches(
    sizes: Sequence[int],  # `[N]` how large each batch is
    n: int,  # how many to take, at most N
    start: int = 0,  # number of the round
) -> np.ndarray:  # `[n]` numbers of batches, in random order
    """Choose batches that stand for all: evenly spaced in the order of size.

    A slow system cannot run an epoch in every round, and batches are bucketed by length: a round is a systematic sample.
    """
    order, n = np.argsort(sizes, kind="stable"), min(n, len(sizes))
    golden = (start * .6180339887) % 1  # rounds spread evenly, too
    chosen = order[((np.arange(n) + golden) * len(sizes) / n).astype(int)]
    return np.random.default_rng(start).permutation(chosen)

class Trainee:
    "A system on its data, ready to be timed: what is timed is what `fit` does (page 43)."
    def __init__(
        self,
        case: BenchCase,
        folder: str,  # prefix rows and feature dumps
        config: RunConfig,
        precision: str = "no",  # or `"bf16"`
        reference: bool = False,  # the reference mode, see `reference_loss`
    ):
        set_seed(0)
        data = read_benchmark(folder)
        features = {f"{kind}_emb": data.features(kind)[1:] for kind in (data.dumps if case.reads_content else ())}
        catalogue = catalogue_from_arrays(data.split.interactions.item_tokens[1:], **features)
        self.case, self.precision, self.reference = case, precision, reference
        self.store, self.device, self.round = SequenceStore.from_split(data.split), get_device(config.device), 0
        self.model = case.build(catalogue, config).set_catalogue(catalogue).to(self.device)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(weights, lr=config.lr, fused=self.device.type in ("cpu", "cuda"))
        self.start()
        if reference:
            self.batches = prefix_batches(self.store, TRAIN, config.batch_size, config.max_len, bucketed=False)
        else: self.batches = training_batches(self.model, self.store, case.phase, config.batch_size)
        self.sizes = [batch.item_seq.numel() for batch in self.batches]
        self.facts = {"steps_per_epoch": len(self.batches), "n_targets": sum(b.n_targets for b in self.batches)}

    def start(self) -> None:
        "Do what happens once an epoch."
        self.model.start_epoch(self.store, 0)

    def losses(self, batch: Batch) -> dict:
        "Compute the losses of a batch."
        if self.reference: return reference_loss(self.model, batch, self.case.phase)
        return self.model(batch, self.case.phase)

    def step(self, batch: Batch) -> None:
        "Take one optimiser step."
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.losses(batch.to(self.device))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()

    def train(self, steps: int) -> dict:
        "Time some optimiser steps that stand for an epoch."
        rate = max(matrix_rate(shape, self.precision, str(self.device), .1) for shape in SHAPES.values())
        batches = self._next_batches(steps)
        self.model.train()
        seconds, _ = measure_seconds(lambda: [self.step(batch) for batch in batches])
        return {"seconds": seconds, "steps": len(batches), "rate": rate}

    def count(self, steps: int = 8) -> dict:
        "Count the operations of a step, averaged over some."
        self.model.train()
        batches = self._next_batches(steps)
        def run(): return [self.losses(batch.to(self.device))["loss"].backward() for batch in batches]
        return {"operations": count_operations(run) / len(batches)}

    def evaluate(self) -> dict:
        "Time the ranking of all test events against all items."
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            seconds, found = measure_seconds(lambda: evaluate(self.model, self.store))
        return {"seconds": seconds, "rows": len(found.ranks)}

    def _next_batches(self, steps):
        self.round += 1
        return [self.batches[i] for i in spread_batches(self.sizes, steps, self.round).tolist()]
