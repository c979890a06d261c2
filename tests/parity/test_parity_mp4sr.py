"MP4SR and its backbone beside the released code: items, histories, scores, losses, gradients and the two disturbances."
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from theirs import as_released, gradients, meant, one_scale, randomise, run
from world import LENGTHS, MAX_LEN, V, histories, shop, theirs_of

import mmseqrec.models.mp4sr as ours
from mmseqrec.blocks.augment import drop_items

pytestmark = pytest.mark.skipif(find_spec("recbole") is None, reason="RecBole is not installed: it lends its SASRec, which the released tree lacks")
PEER = SYSTEM = "MP4SR"
RELEASED = ("false_negatives", "cmcl_rows", "untrained_pooling", "padded_pooling")
SIZES, FEATURES = dict(hidden_size=64, n_layers=2, n_heads=2, inner_size=24), 768  # fixed in the released code, as are 64 columns of the pooling
LAMBDA, WEIGHT = .4, .7


def sentences():
    "A shop of items with one to three sentences and pictures, none without."
    catalogue = shop(missing=False, n_contents=3, text_size=FEATURES, image_size=FEATURES)
    for table, mask in ((catalogue.text_emb, catalogue.text_pad_mask), (catalogue.image_emb, catalogue.image_pad_mask)):
        for item in range(1, V + 1, 2):
            mask[item, 1 + item % 4 // 2:] = True
            table[mask] = 0
    return catalogue


def build(system=ours.MP4SR, **options):
    "Our system with random weights, nothing dropped."
    model = system(FEATURES, FEATURES, n_items=V, **SIZES, dropout=0., attention_dropout=0., adapter_dropout=0., max_len=MAX_LEN,
                   cmcl_weight=LAMBDA, nip_weight=WEIGHT, **dict(released=RELEASED) | options)
    return randomise(model.set_catalogue(sentences()), .05)


PARTS = {"position_embedding": "m2se.encoder.position_emb", "LayerNorm": "m2se.encoder.norm", "item_embedding": "item_emb",
         "linear_desc": "heads.text", "linear_img": "heads.image"}
for i in range(SIZES["n_layers"]):
    PARTS |= {f"trm_encoder.layer.{i}.{theirs}": f"m2se.encoder.blocks.{i}.{own}" for theirs, own in (
        ("multi_head_attention.dense", "attention.output"), ("multi_head_attention.LayerNorm", "attention_norm"),
        ("feed_forward.dense_1", "feed_forward.0"), ("feed_forward.dense_2", "feed_forward.2"), ("feed_forward.LayerNorm", "feed_forward_norm"))}
MODALITIES = {"text": ("desc_attn", "moe_1"), "image": ("img_attn", "moe_2")}


def renamed(tensors):
    "Our weights, or their gradients, under the released names: one matrix for queries, keys and values, one for all experts."
    found = {f"{theirs}.{kind}": tensors[f"{name}.{kind}"] for theirs, name in PARTS.items() for kind in ("weight", "bias")
             if f"{name}.{kind}" in tensors}
    for i in range(SIZES["n_layers"]):
        for kind in ("weight", "bias"):
            parts = tensors[f"m2se.encoder.blocks.{i}.attention.query_key_value.{kind}"].chunk(3)
            found |= {f"trm_encoder.layer.{i}.multi_head_attention.{name}.{kind}": part for name, part in zip(("query", "key", "value"), parts)}
    for modality, (pooling, moe) in MODALITIES.items():
        place = f"m2se.items.{modality}"
        found[f"{moe}.w_gate"] = tensors[f"{place}.experts.gate"]
        for name, own in (("lin.weight", "experts.weight"), ("lin.bias", "experts.bias"), ("norm.weight", "scale"), ("norm.bias", "shift")):
            for k, part in enumerate(tensors[f"{place}.experts.{own}"].view(8, SIZES["hidden_size"], -1)):
                found[f"{moe}.experts.{k}.{name}"] = part if name == "lin.weight" else part[:, 0]
        for k, name in enumerate(("first", "second")):
            if f"{place}.pooling.{name}.weight" in tensors:
                found[f"{pooling}.feature_att_layer.projection.{k}.weight"] = tensors[f"{place}.pooling.{name}.weight"]
    return found


def ask(peer, model, job, batch, **more):
    "Let the released code do what our model is about to do."
    weights, items = renamed(dict(model.named_parameters())), model.catalogue
    for pooling, moe in MODALITIES.values():  # a noise that is never added, and biases that shift all logits alike
        weights |= {f"{moe}.w_noise": torch.randn(FEATURES, 8), f"{pooling}.feature_att_layer.projection.0.bias": torch.randn(64),
                    f"{pooling}.feature_att_layer.projection.1.bias": torch.randn(1)}
    config = SIZES | {"train_stage": "pretrain" if model.item_emb is None else "finetune", "temperature": model.temperature,
                      "lambda": LAMBDA, "nip_weight": WEIGHT, "mflag": not model.disturbance["mixup"], "proj": model.heads is not None,
                      "MAX_ITEM_LIST_LENGTH": MAX_LEN}
    lists = lambda table, mask: {str(i): table[i][~mask[i]] for i in range(1, V + 1)}
    return run("peer_mp4sr", peer(PEER), stage=job, config=config, weights=weights, text=lists(items.text_emb, items.text_pad_mask),
               image=lists(items.image_emb, items.image_pad_mask), batch=theirs_of(batch), **more)


def seen(compare, model, batch, theirs, kind):
    "Compare items, histories and scores in evaluation."
    with torch.no_grad():
        sequence = model.encode_sequence(batch)
        compare(PEER, SYSTEM, f"items in two streams: {kind}", model.m2se.items()[1:], theirs["items"][1:])
        compare(PEER, SYSTEM, f"histories in two streams: {kind}", sequence, theirs["histories"])
        compare(PEER, SYSTEM, f"scores: {kind}", model.score(sequence, model.encode_items()), theirs["scores"][:, 1:])


def test_finetuning(peer, compare):
    "With IDs, as the released code fine-tunes: what is seen, loss and gradients; then the padding among the candidates."
    batch, model = histories(), build(transductive=True).eval()
    theirs = ask(peer, model, "finetune", batch, without_padding=True)
    seen(compare, model, batch, theirs, "with IDs")
    loss = model.train().finetune_loss(batch)["loss"]
    compare(PEER, SYSTEM, "loss of fine-tuning", loss, theirs["loss"])
    compare(PEER, SYSTEM, "gradients of fine-tuning", *one_scale(renamed(gradients(model, loss)), theirs["gradients"]))
    even = build(transductive=True, temperature=1.).train()  # at 0.07 these random weights give the padding no chance
    theirs = ask(peer, even, "finetune", batch)
    compare(PEER, SYSTEM, "loss of fine-tuning, padding a candidate", even.finetune_loss(batch)["loss"], theirs["loss"],
            "the padding item is among the released candidates; without it the losses are equal", differs=True)


@pytest.mark.parametrize("system, mixup", [(ours.MP4SR, True), (ours.MSM4SR, True), (ours.MSM4SR, False)])
def test_pretraining(peer, compare, monkeypatch, system, mixup):
    "Each term and the gradients, with the same drop and swaps; then the names of `released`, one by one."
    batch, draw = histories(), torch.Generator().manual_seed(3)
    kept, swapped = (torch.rand(len(LENGTHS), MAX_LEN, generator=draw) > share for share in (.3, .6))
    monkeypatch.setattr(ours, "draw_item_drop", lambda *_: as_released(batch, kept))
    monkeypatch.setattr(ours, "draw_swaps", lambda pad, _: swapped[:, :pad.shape[1]] & ~pad)
    model, kind = build(system, mixup=mixup).train(), system.__name__ + ", no mixup" * (not mixup)
    theirs = ask(peer, model, "pretrain", batch, kept=kept, swapped=swapped)
    terms = model.pretrain_loss(batch)
    for name, value in by_term(terms).items(): compare(PEER, SYSTEM, f"{name}: {kind}", value, theirs["terms"][ORDER.index(name)])
    compare(PEER, SYSTEM, f"gradients of pre-training: {kind}", *one_scale(renamed(gradients(model, terms["loss"])), theirs["gradients"]))
    for quirk, term in (("false_negatives", "nip_text"), ("cmcl_rows", "cmcl"), ("padded_pooling", "nip_image")):
        own = build(system, mixup=mixup, released=[name for name in RELEASED if name != quirk]).train()
        compare(PEER, SYSTEM, f"{term} without {quirk}: {kind}", by_term(own.pretrain_loss(batch))[term], theirs["terms"][ORDER.index(term)],
                f"released=({quirk!r},) follows the released code", differs=True)


ORDER = ("nip_text", "nip_image", "cmcl")


def by_term(terms):
    "Weigh the terms and add those of CMCL up, as the released code returns them."
    return {"nip_text": WEIGHT * terms["nip_text"], "nip_image": WEIGHT * terms["nip_image"],
            "cmcl": LAMBDA * sum(value for name, value in terms.items() if name.startswith("cmcl"))}


def test_scores_of_pretraining(peer, compare):
    "The model without IDs, which chooses the best epoch of pre-training, and a pooling that is trained here and not there."
    batch, model = histories(), build().eval()
    theirs = ask(peer, model, "finetune", batch)
    seen(compare, model, batch, theirs, "without IDs")
    trained = build(transductive=True, released=[name for name in RELEASED if name != "untrained_pooling"]).train()
    grads = gradients(trained, trained.finetune_loss(batch)["loss"])
    compare(PEER, SYSTEM, "gradient of the pooling", grads["m2se.items.text.pooling.first.weight"], torch.zeros(64, FEATURES),
            "released=('untrained_pooling',) follows the released code, where nothing reaches the pooling", differs=True)


def test_sequence_dropout(peer, compare):
    "The released scatter writes each dropped item over the kept one before it: the last survives, and the first need not."
    batch, kept = histories(), torch.rand(len(LENGTHS), MAX_LEN, generator=torch.Generator().manual_seed(3)) > .4
    theirs = ask(peer, build(), "pretrain", batch, kept=kept, swapped=kept)["item_seq"]
    fill = lambda drop: F.pad(found := drop_items(batch, drop).item_seq, (0, MAX_LEN - found.shape[1]))
    compare(PEER, SYSTEM, "sequence dropout, the same draws", fill(meant(batch, kept)), theirs,
            "the first item always stays here; on a CPU the last one there", differs=True)
    compare(PEER, SYSTEM, "sequence dropout, each draw for the item before", fill(as_released(batch, kept)), theirs)
