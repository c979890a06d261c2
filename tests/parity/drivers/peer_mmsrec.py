"MMSRec's released encoder, asked by the job. Item i of ours is item i + 2 there: 0 is padding, 1 [MASK], 2 a prompt."
from common import answer, gradients, load, prepare

prepare()

import torch
from loss.ce_loss import CELoss
from loss.combinatorial_loss import CombinatorialLoss
from model.fusion import FusionEncoder, FusionEncoderForMaskedLM
from torch import nn


class Args(dict):
    "The arguments, by name and by attribute, as the released scripts hand them over."
    __getattr__ = dict.__getitem__


class FromTheEnd(nn.Embedding):
    "Places counted from the end of each row, as ours are."
    def forward(self, places): return super().forward(places.shape[1] - 1 - places)


def build(job, kind):
    "Build a released encoder with the weights of the job; `eps` and `from_the_end` take two differences away."
    args = Args(job["config"], initializer_range=.02, fusion_embed_dropout=0., fusion_dropout=0., device="cpu")
    model = kind(args)
    if "rows" in job: model.modality_embedding.weight_init(job["image"], job["has_image"], job["text"], job["has_text"])
    model.embedding.prompt_embeddings.requires_grad_(False)  # of an id that no script uses
    load(model, job["weights"])
    if job.get("from_the_end"): model.embedding.position_embeddings.__class__ = FromTheEnd
    for part in model.modules():
        if job.get("eps") and isinstance(part, nn.LayerNorm): part.eps = job["eps"]
    return args, model


def finetune(job):
    "Items, and the scores of histories whose last place is asked; loss and gradients at the places that the job hides."
    args, model = build(job, FusionEncoderForMaskedLM)
    with torch.no_grad():
        items = nn.functional.normalize(model.eval().modality_embedding_hidden(), dim=-1)
        scores = model(job["rows"], mode="pred")[0]
    said = {"items": items, "scores": scores}
    if "hidden" not in job: return said
    draws = iter((job["hidden"], job["other"], job["own"]))
    torch.bernoulli = lambda p: next(draws).to(p)
    torch.randint_like = lambda rows, low, high: said.update(drawn=torch.tensor([low, high])) or job["others"]
    predicted, labels = model.train()(job["rows"], mode="mlm")
    loss = CELoss(args)(predicted, labels)
    return said | {"loss": loss.detach(), "gradients": gradients(model, loss)}


def pretrain(job):
    "The loss of pairs, its four terms and its gradients."
    args, model = build(job, FusionEncoder)
    ids, pairs = torch.full((len(job["text"]), 1), 3), [job[name][:, None] for name in ("image", "has_image", "text", "has_text")]
    whole, terms = CombinatorialLoss(args, model.train()), []
    compare = whole.loss
    whole.loss = lambda *views: terms.append(compare(*views)) or terms[-1]
    loss = whole(ids, *pairs)
    return {"loss": loss[0].detach(), "terms": torch.stack(terms).detach(), "gradients": gradients(model, loss)}


if __name__ == "__main__": answer(lambda job: {"finetune": finetune, "pretrain": pretrain}[job["stage"]](job))
