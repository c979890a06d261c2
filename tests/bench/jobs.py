"What else takes time, and what grows: every function is one point of a curve, run in a process of its own."
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import torch
from PIL import Image

from mmseqrec.blocks.interests import cluster_dpc_knn, cluster_kmeans
from mmseqrec.blocks.losses import full_softmax_cross_entropy
from mmseqrec.data.interactions import TRAIN, k_core, leave_one_out, read_interactions, save_split
from mmseqrec.data.sequences import SequenceStore
from mmseqrec.evaluation import evaluate
from mmseqrec.experiments.run import SYSTEMS, RunConfig
from mmseqrec.features.encoders import catalogue_from_arrays, resolve_encoders
from mmseqrec.training import training_batches

from .data import synthetic_store
from .machine import SHAPES, matrix_rate, measure_seconds


def _machine(device):
    "Measure the rate of the machine by shape and precision."
    return {"rates": {name: {precision: matrix_rate(shape, precision, device, 1.0) for precision in ("no", "bf16")}
                      for name, shape in SHAPES.items()}}

def _interests(method, n_tokens, device):
    "Cluster random tokens of 64 numbers, one cluster for every 50 (k-means: 500) of them."
    tokens = torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(0)).to(device)
    if method == "dpc_knn": run = lambda: cluster_dpc_knn(tokens, max(n_tokens // 50, 2))
    else: run = lambda: cluster_kmeans(tokens, max(n_tokens // 500, 2), max_steps=5)
    seconds, _ = measure_seconds(run)
    return {"n": n_tokens, "seconds": seconds}

def _paper_interests(device, n_tokens=900_000, n_clusters=17_900, width=300):
    "Run one step of k-means at the size of MISSRec's pre-training: draw all centres, join the nearest, average."
    tokens = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
    seconds, (centers, _) = measure_seconds(lambda: cluster_kmeans(tokens, n_clusters, max_steps=1))
    return {"n": n_tokens, "n_clusters": len(centers), "seconds": seconds, "held": tokens.nbytes + centers.nbytes}

def _features(modality, n, device):
    "Encode sentences of ten words, or images of 96 x 96 pixels."
    rng, encoder = np.random.default_rng(0), getattr(resolve_encoders("shipped", "shipped", device), modality)
    words = "red blue round small steel wooden mug pan shirt robot for with striped dotted large soft".split()
    if modality == "text": contents = [" ".join(rng.choice(words, 10)) for _ in range(n)]
    else: contents = [Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)) for _ in range(n)]
    encoder.encode(contents[:64])
    seconds, _ = measure_seconds(lambda: encoder.encode(contents))
    return {"n": n, "seconds": seconds}

def _prepare(suffix, n_events, device):
    "Read, filter, split and store a table of random events, ten a user, in random order."
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"events.{suffix}"
        frame = pl.DataFrame({"user_id": rng.integers(0, n_events // 10, n_events),
                              "item_id": (n_events // 50 * rng.random(n_events) ** 2).astype(np.int64),
                              "timestamp": 1_500_000_000 + rng.integers(0, 10 ** 8, n_events)})
        getattr(frame, f"write_{suffix}")(path)
        del frame
        def run():
            split = leave_one_out(k_core(read_interactions(path)))
            save_split(split, Path(folder) / "split")
            return SequenceStore.from_split(split)
        seconds, store = measure_seconds(run)
    return {"n": n_events, "seconds": seconds, "n_kept": len(store.items)}

def _small_sasrec(store, max_len, device):
    "Make a SASRec of 64 numbers for a store, and its trainer."
    config = RunConfig(hidden_size=64, max_len=max_len, device=device)
    catalogue = catalogue_from_arrays([f"i{row}" for row in range(store.n_items)])
    model = SYSTEMS["sasrec"].build(catalogue, config).set_catalogue(catalogue).to(device)
    return model, torch.optim.Adam(model.parameters())

def _epoch(n_users, mean_length, device, steps=40):
    "Time an epoch: plan all its batches, train on some of them."
    store = synthetic_store(n_users, 3000, mean_length, max_length=int(2.5 * mean_length))
    max_len = int(2.5 * mean_length)
    model, optimizer = _small_sasrec(store, max_len, device)
    def step(batch):
        optimizer.zero_grad()
        model.finetune_loss(batch.to(device))["loss"].backward()
        optimizer.step()
    step(training_batches(model, store)[0])
    planning, batches = measure_seconds(lambda: training_batches(model, store))
    some = [batches[int(place)] for place in np.linspace(0, len(batches) - 1, steps).astype(int)]
    training, _ = measure_seconds(lambda: [step(batch) for batch in some])
    n_targets = len(store.rows(TRAIN))
    seconds = planning + training / len(some) * len(batches)
    return {"n_targets": n_targets, "seconds": seconds, "targets_per_second": n_targets / seconds}

def _growth_users(n, device): return {"n": n, **_epoch(n, 9.0, device)}

def _growth_length(n, device): return {"n": n, **_epoch(max(40_000 // n, 100), float(n), device)}

def _growth_items_loss(n, rows, device):
    "Compute the full-softmax loss of some rows and its gradients."
    vectors = torch.randn(n, 1, 64, device=device).requires_grad_()
    sequence = torch.randn(rows, 1, 64, device=device).requires_grad_()
    target = torch.arange(rows, device=device) % n
    def run(): full_softmax_cross_entropy(sequence, vectors, target).backward()
    seconds, _ = measure_seconds(run)
    return {"n": n, "rows": rows, "seconds": seconds, "held": 2 * vectors.nbytes, "all_scores": 4 * rows * n}

def _growth_items_evaluation(n, rows, device):
    "Rank the test events of some users against all items."
    store = synthetic_store(rows, n)
    model, _ = _small_sasrec(store, 50, device)
    seconds, _ = measure_seconds(lambda: evaluate(model, store))
    return {"n": n, "rows": rows, "seconds": seconds, "held": 2 * 4 * 64 * n, "all_scores": 4 * rows * n}

JOBS = {"machine": _machine, "interests": _interests, "paper_interests": _paper_interests, "features": _features,
         "prepare": _prepare, "growth_users": _growth_users, "growth_length": _growth_length,
         "growth_items_loss": _growth_items_loss, "growth_items_evaluation": _growth_items_evaluation}
