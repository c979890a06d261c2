"""MISSRec's released model and transform, asked by the job; its own copy of RecBole is the one on the path.

Its k-means needs CUDA kernels, which are not imported; interests come with the job.
"""
import random
import sys
import types
from types import SimpleNamespace

from common import WithoutPadding, answer, gradients, load, noting, prepare

prepare()
for name in ("torchpq", "torchpq.clustering"): sys.modules[name] = types.ModuleType(name)
sys.modules["torchpq.clustering"].MinibatchKMeans = None

import torch
from cluster_utils import cluster_dpc_knn
from data.transform import PLMImgInterestEmb
from missrec import MISSRec
from recbole.data.interaction import Interaction
from torch import nn

NAMES = dict(USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id", LIST_SUFFIX="_list", ITEM_LIST_LENGTH_FIELD="item_length",
             NEG_PREFIX="neg_", device=torch.device("cpu"), hidden_act="gelu", layer_norm_eps=1e-12, initializer_range=.02,
             loss_type="CE", knn_local_ratio=.1)


def shop(job):
    "Stand in for the data set: the tables that the released loader reads from files."
    tables = {"plm_embedding": job["features"].get("text"), "img_embedding": job["features"].get("img")}
    tables = {name: nn.Embedding.from_pretrained(values, padding_idx=0) for name, values in tables.items() if values is not None}
    return SimpleNamespace(num=lambda field: job["n_items"] + 1, **tables)


def build(job):
    "Build the released model with the weights and interests of the job."
    model = load(MISSRec(NAMES | job["config"], shop(job)), job["weights"])
    if model.train_stage == "pretrain": return model
    model.interest_embeddings = job["interests"]
    for name, lookup in zip(job["features"], job["of_item"].T):
        setattr(model, f"{name.replace('text', 'plm')}_interest_lookup_table", lookup)
    if job.get("without_padding"): model.loss_fct = WithoutPadding()
    return model


def finetune(job):
    "Items, histories, scores in evaluation; loss, regulariser and gradients in training."
    model, batch = build(job).eval(), Interaction(job["batch"])
    adapt = {"text": lambda: model.text_adaptor(model.plm_embedding.weight), "img": lambda: model.img_adaptor(model.img_embedding.weight)}
    said = {"tokens": torch.stack([adapt[name]() for name in job["features"]], 1).detach()}
    with torch.no_grad():
        said["sequences"], _ = model._compute_seq_embeddings(batch["item_id_list"], batch["item_length"])
        said["scores"] = model.full_sort_predict(batch) * model.temperature
    model.train()
    model._compute_seq_embeddings = noting(said, "found", model._compute_seq_embeddings)
    loss = model.calculate_loss(batch)
    said["diversity"] = said.pop("found")[1].detach()
    return said | {"loss": loss.detach(), "gradients": gradients(model, loss)}


def disturb(job):
    "Let the released transform disturb the batch with the choices of the job."
    tables, table = job["tables"], lambda values: values.__getitem__
    shop = SimpleNamespace(**{name: table(values) for name, values in tables.items()})
    torch.bernoulli, random.random = (lambda p: job["kept"].to(p)), (lambda: float(job["drops_words"]))
    transform = PLMImgInterestEmb({"item_drop_ratio": .2, "item_drop_coefficient": .9})
    return transform(SimpleNamespace(dataset=shop), Interaction(dict(job["batch"])))


def pretrain(job):
    "The terms of the loss and its gradients, and the disturbed histories."
    model, batch, said = build(job).train(), disturb(job), {}
    model.seq_item_contrastive_task = noting(said, "item", model.seq_item_contrastive_task)
    model.seq_seq_contrastive_task = noting(said, "sequence", model.seq_seq_contrastive_task)
    loss = model.calculate_loss(batch)
    found = {"loss": loss.detach(), "gradients": gradients(model, loss), "sequence_item": said["item"].detach(),
             "sequence_sequence": said["sequence"][0].detach()}
    rest = found["loss"] - found["sequence_item"] - model.lam * found["sequence_sequence"]
    return found | {"diversity": rest / model.gamma, "item_seq_aug": batch["item_id_list_aug"], "item_length_aug": batch["item_length_aug"]}


def cluster(job):
    "Clusters and centres by density peaks."
    return cluster_dpc_knn(job["tokens"], job["n_clusters"], job["n_neighbours"])


if __name__ == "__main__": answer(lambda job: {"finetune": finetune, "pretrain": pretrain, "cluster": cluster}[job["stage"]](job))
