"""MP4SR's released model, asked by the job; its own copy of RecBole is the one on the path.

Its tree lacks the file of SASRec, whose encoder it takes: that of the installed RecBole stands in.
"""
import importlib.util
import pickle
import random
import sys
from importlib.metadata import distribution
from types import SimpleNamespace

from common import WithoutPadding, answer, gradients, load, noting, prepare

prepare()
NAME = "recbole.model.sequential_recommender.sasrec"
spec = importlib.util.spec_from_file_location(NAME, distribution("recbole").locate_file(NAME.replace(".", "/") + ".py"))
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])

import torch
import torch.nn.functional as F
from recbole.model.sequential_recommender.mp4sr import MP4SR

NAMES = dict(USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id", LIST_SUFFIX="_list", ITEM_LIST_LENGTH_FIELD="item_length",
             NEG_PREFIX="neg_", device=torch.device("cpu"), hidden_act="gelu", layer_norm_eps=1e-12, initializer_range=.02,
             loss_type="CE", num_imgtokens=15, n_exps=8, adaptor_dropout_prob=0., hidden_dropout_prob=0., attn_dropout_prob=0.,
             pretrained_path=None, data_path=".")


def build(job):
    "Build the released model on features in files, with the weights of the job."
    tokens = ["[PAD]", *job["text"]]
    for name, values in (("desc_emb", job["text"]), ("image_emb_15", job["image"])):
        with open(f"{name}.pkl", "wb") as file: pickle.dump({item: list(rows.numpy()) for item, rows in values.items()}, file)
    shop = SimpleNamespace(num=lambda field: len(tokens), field2id_token={"item_id": tokens})
    model = MP4SR(NAMES | job["config"], shop)
    model.desc_tensor, model.img_tensor = model.desc_tensor.double(), model.img_tensor.double()
    if job.get("without_padding"): model.loss_fct = WithoutPadding()
    return load(model, job["weights"])


def finetune(job):
    "Items, histories and scores in evaluation; loss and gradients in training, where the stage has them."
    model, batch, ends = build(job).eval(), job["batch"], []
    forward = model.forward
    model.forward = lambda *args: ends.append(forward(*args)) or ends[-1]
    with torch.no_grad(): scores, _ = model.full_sort_predict(batch)
    items = [moe(table.weight) for moe, table in ((model.moe_1, model.desc_embedding), (model.moe_2, model.img_embedding))]
    said = {"scores": scores, "items": torch.stack(items, 1).detach(), "histories": F.normalize(torch.stack(ends, 1), dim=-1)}
    if model.train_stage == "pretrain": return said
    loss = model.train().calculate_loss(batch)
    return said | {"loss": loss.detach(), "gradients": gradients(model, loss)}


def pretrain(job):
    "The terms of the loss and its gradients, with the random choices of the job."
    model, said = build(job).train(), {}
    draws = iter((job["kept"], job["swapped"]))
    torch.bernoulli = lambda p: next(draws).to(p)
    model.item_seq_rand_drop = noting(said, "dropped", model.item_seq_rand_drop)
    terms = model.calculate_loss(job["batch"])
    return {"terms": torch.stack(terms).detach(), "gradients": gradients(model, sum(terms)), "item_seq": said["dropped"][0],
            "item_length": said["dropped"][1]}


if __name__ == "__main__": answer(lambda job: {"finetune": finetune, "pretrain": pretrain}[job["stage"]](job))
