"MMSRec beside its released code: items, scores, the loss at gaps, the loss of pairs, and all gradients."
import torch
from theirs import gradients, one_scale, randomise, run
from world import IMAGE_SIZE, LENGTHS, MAX_LEN, TEXT_SIZE, V, histories, shop

import mmseqrec.models.mmsrec as ours
from mmseqrec.blocks.augment import append_mask
from mmseqrec.data.sequences import Batch

PEER = SYSTEM = "MMSRec"
SIZES = dict(hidden_size=12, n_layers=2, n_heads=4, inner_size=16)
AS_OURS = dict(eps=1e-12, from_the_end=True)

PARTS = {"embedding.layer_norm": "encoder.norm", "encoder_blocks.transform.norm": "encoder.final_norm",
         "embedding.position_embeddings": "encoder.position_emb", "embedding.mask_embeddings": "items.mask_emb"}
for name, theirs, place in (("text", "text", 0), ("image", "vision", 1)):
    PARTS |= {f"input_transform.{theirs}_transform": f"items.adapters.{name}.linear",
              f"input_transform.{theirs}_layer_norm": f"items.adapters.{name}.norm",
              f"output_transform.{theirs}_transform": f"fusion.transforms.{place}.0",
              f"output_transform.{theirs}_layer_norm": f"fusion.transforms.{place}.1"}
for i in range(SIZES["n_layers"]):
    PARTS |= {f"encoder_blocks.transform.layers.{i}.{theirs}": f"encoder.blocks.{i}.{own}" for theirs, own in (
        ("self_attn.in_proj", "attention.query_key_value"), ("self_attn.out_proj", "attention.output"), ("linear1", "feed_forward.0"),
        ("linear2", "feed_forward.2"), ("norm1", "attention_norm"), ("norm2", "feed_forward_norm"))}


def build(missing=True):
    "Our system with random weights, nothing dropped, features as they are."
    model = ours.MMSRec(TEXT_SIZE, IMAGE_SIZE, **SIZES, dropout=0., attention_dropout=0., embedding_dropout=0., max_len=MAX_LEN, centred=False)
    return randomise(model.set_catalogue(shop(missing)))


def renamed(tensors):
    "Our weights, or their gradients, under the released names; vision comes before text there."
    found = {}
    for theirs, own in PARTS.items():
        for kind in ("weight", "bias"):
            name = f"{theirs}_{kind}" if theirs.endswith("in_proj") else f"{theirs}.{kind}"
            if f"towers.{own}.{kind}" in tensors: found[name] = tensors[f"towers.{own}.{kind}"]
    if "towers.encoder.modality_emb.weight" in tensors:
        found["embedding.modal_type_embeddings.weight"] = tensors["towers.encoder.modality_emb.weight"].flip(0)
    return found


def left(rows, lengths):
    "Move the padding of each row to the left, where it is in the released code."
    return torch.stack([row.roll(len(row) - int(n)) for row, n in zip(rows, lengths)])


def ask(peer, model, stage, **more):
    "Let the released code do what our model is about to do."
    items, weights = model.towers.items, renamed(dict(model.named_parameters()))
    weights["embedding.prompt_embeddings.weight"] = torch.randn(1, SIZES["hidden_size"])
    config = dict(fusion_embed_dim=SIZES["hidden_size"], fusion_layers=SIZES["n_layers"], fusion_heads=SIZES["n_heads"],
                  fusion_feedforward_dim=SIZES["inner_size"], max_seq_length=MAX_LEN + 1, vision_feature_embed_dim=IMAGE_SIZE,
                  text_feature_embed_dim=TEXT_SIZE, ce_mask_ratio=.2, contrastive_temperature=model.temperature, train_item_num=V, eval_item_num=V)
    return run("peer_mmsrec", peer(PEER), stage=stage, config=config, weights=weights, text=items.text_features[1:], image=items.image_features[1:],
               has_text=~items.missing_text_mask[1:], has_image=~items.missing_image_mask[1:], **more)


def gaps(batch):
    "Rows of a history and its next item, and three sets of places: hidden, of these shown as another item, or as the own."
    lengths, draw = batch.item_seq_len + 1, torch.rand(len(LENGTHS), MAX_LEN + 1, generator=torch.Generator().manual_seed(5))
    rows = append_mask(batch, 0).item_seq.scatter(1, lengths[:, None] - 1, batch.pos_item[:, None])
    is_last = torch.arange(MAX_LEN + 1) == lengths[:, None] - 1
    hidden = (draw < .5) & (rows > 0) | is_last
    return rows, lengths, hidden, (draw < .1) & hidden & ~is_last, (draw > .4) & (draw < .5) & hidden & ~is_last


def released_rows(rows, lengths): return left(torch.where(rows > 0, rows + 2, 0), lengths)


def test_scores(peer, compare):
    "Items and scores, with places counted from the end on both sides and one eps; then each difference by itself."
    batch, model = histories(), build().eval()
    rows = released_rows(*gaps(batch)[:2])
    with torch.no_grad():
        items = model.encode_items()
        scores = model.score(model.encode_sequence(batch), items)
    found = ask(peer, model, "finetune", rows=rows, **AS_OURS)
    compare(PEER, SYSTEM, "items", items.vectors[:, 0], found["items"])
    compare(PEER, SYSTEM, "scores", scores, found["scores"])
    for what, note in (("eps", "eps of layer normalisation is 1e-5 there, 1e-12 here"),
                       ("from_the_end", "places are counted from the beginning of the longest row there, from the end here")):
        found = ask(peer, model, "finetune", rows=rows, **{name: value for name, value in AS_OURS.items() if name != what})
        compare(PEER, SYSTEM, f"scores without {what}", scores, found["scores"], note, differs=True)


def test_finetuning(peer, compare, monkeypatch):
    "The loss at the same gaps, and its gradients."
    batch, model = histories(), build().train()
    rows, lengths, hidden, other, own = gaps(batch)
    others = torch.full_like(rows, 4)
    shown = torch.where(other, others, rows.masked_fill(hidden & ~own, V + 1))
    monkeypatch.setattr(ours, "cloze", lambda *_: Batch(shown, lengths, rows[hidden], hidden.flatten().nonzero()[:, 0]))
    found = ask(peer, model, "finetune", rows=released_rows(rows, lengths), hidden=left(hidden, lengths), other=left(other, lengths),
                own=left(own, lengths), others=others + 2, **AS_OURS)
    loss = model.finetune_loss(batch)["loss"]
    assert other.any() and own.any()
    compare(PEER, SYSTEM, "random items of gaps, first and behind the last", torch.tensor([1, V + 1]) + 2, found["drawn"],
            "the last item is never drawn there", differs=True)
    compare(PEER, SYSTEM, "loss of fine-tuning", loss, found["loss"])
    compare(PEER, SYSTEM, "gradients of fine-tuning", *one_scale(renamed(gradients(model, loss)), found["gradients"]))


def test_pretraining(peer, compare):
    "The loss of pairs, its terms and its gradients; all items have both, since the released code has no answer for others."
    model, ids = build(missing=False).train(), torch.arange(1, V + 1)
    found = ask(peer, model, "pretrain", **AS_OURS)
    terms = ours.pair_pretraining(model, ids)
    compare(PEER, SYSTEM, "loss of pre-training", terms["loss"], found["loss"])
    for name, theirs in zip(("image_image", "image_text", "text_text", "both_both"), found["terms"]):
        compare(PEER, SYSTEM, f"{name} of pre-training", terms[name], theirs)
    compare(PEER, SYSTEM, "gradients of pre-training", *one_scale(renamed(gradients(model, terms["loss"])), found["gradients"]))
