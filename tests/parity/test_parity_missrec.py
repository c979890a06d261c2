"MISSRec beside its released code: tokens, histories, scores, losses, gradients, the disturbance and density peaks."
import pytest
import torch
import torch.nn.functional as F
from theirs import as_released, gradients, meant, one_scale, randomise, run
from world import IMAGE_SIZE, LENGTHS, MAX_LEN, TEXT_SIZE, V, histories, shop, theirs_of

import mmseqrec.models.missrec as ours
from mmseqrec.blocks.augment import drop_items
from mmseqrec.blocks.interests import cluster_dpc_knn

PEER = SYSTEM = "MISSRec"
RELEASED = ("missing_bias", "item_drop_alignment", "false_negatives", "diversity", "untrained_negatives")
SIZES = dict(hidden_size=12, n_layers=4, n_heads=4, inner_size=16)
GAMMA, LAMBDA = .01, .5


def build(catalogue, **options):
    "Our system with random weights, its interests found, nothing dropped."
    options = dict(released=RELEASED, text_size=TEXT_SIZE, image_size=IMAGE_SIZE, word_drop_share=0.) | options
    model = ours.MISSRec(**SIZES, dropout=0., max_len=MAX_LEN, centred=False, interest_ratio=.3, diversity_weight=GAMMA,
                         sequence_weight=LAMBDA, **options).set_catalogue(catalogue)
    randomise(model).items.find_interests()
    return model


PARTS = {"text_adaptor": ["items.adapters.linear.text"], "img_adaptor": ["items.adapters.linear.image"], "LayerNorm": ["reader.inputs.norm"],
         "trm_model.encoder.norm": ["reader.trunk.encoder_norm"], "trm_model.decoder.norm": ["reader.trunk.decoder_norm"]}
ENCODER = {"self_attn.out_proj": ["attention.output"], "linear1": ["feed_forward.0"], "linear2": ["feed_forward.3"],
           "norm1": ["attention_norm"], "norm2": ["feed_forward_norm"], "self_attn.in_proj": ["attention.query_key_value"]}
DECODER = {"linear1": ["feed_forward.0"], "linear2": ["feed_forward.3"], "norm1": ["norms.0"], "norm2": ["norms.1"], "norm3": ["norms.2"]}
for theirs, own in (("self_attn", "self_attention"), ("multihead_attn", "cross_attention")):
    DECODER |= {f"{theirs}.out_proj": [f"{own}.output"], f"{theirs}.in_proj": [f"{own}.query", f"{own}.key_value"]}
for side, block in (("encoder", ENCODER), ("decoder", DECODER)):
    for i in range(SIZES["n_layers"] // 2):
        PARTS |= {f"trm_model.{side}.layers.{i}.{name}": [f"reader.trunk.{side}.{i}.{part}" for part in parts] for name, parts in block.items()}
ALONE = {"position_embedding.weight": "reader.inputs.position_emb.weight", "item_embedding.weight": "item_emb.weight",
         "fusion_factor": "fusion.kappa"}


def renamed(tensors):
    "Our weights, or their gradients, under the released names."
    found = {theirs: tensors[name] for theirs, name in ALONE.items() if name in tensors}
    if "fusion.item_kappa.weight" in tensors: found["fusion_factor"] = tensors["fusion.item_kappa.weight"][:, 0]
    for theirs, parts in PARTS.items():
        for kind in ("weight", "bias"):
            values = [tensors[f"{part}.{kind}"] for part in parts if f"{part}.{kind}" in tensors]
            if values: found[f"{theirs}_{kind}" if theirs.endswith("in_proj") else f"{theirs}.{kind}"] = torch.cat(values)
    return found


def ask(peer, model, stage, batch, **more):
    "Let the released code do what our model is about to do."
    kind = "dynamic_instance" if model.fusion.item_kappa is not None else "static" if model.fusion.kappa is None else "dynamic_shared"
    train_stage = "pretrain" if stage == "pretrain" else "inductive_ft" if model.item_emb is None else "transductive_ft"
    tables = {theirs: getattr(model.items.adapters, f"{name}_features") for theirs, name in (("text", "text"), ("img", "image"))
              if name in model.items.adapters.linear}
    config = SIZES | dict(hidden_dropout_prob=0., attn_dropout_prob=0., plm_size=TEXT_SIZE, img_size=IMAGE_SIZE,
                          MAX_ITEM_LIST_LENGTH=MAX_LEN, temperature=model.temperature, gamma=GAMMA, interest_ratio=.3, id_type="id",
                          modal_type="_".join(tables), train_stage=train_stage, item_mm_fusion=kind,
                          seq_mm_fusion=model.reader.inputs.fusion.replace("stack", "contextual")) | {"lambda": LAMBDA}
    job = dict(stage=stage, config=config, weights=renamed(dict(model.named_parameters())), features=tables, batch=theirs_of(batch),
               interests=model.items.interests.vectors, of_item=model.items.interests.of_item, n_items=V)
    return run("peer_missrec", peer(PEER), **job, **more)


@pytest.mark.parametrize("fusion, kind, transductive", [("add", "shared", False), ("add", "per_item", True), ("add", "static", False),
                                                        ("stack", "shared", True), ("stack", "per_item", False)])
def test_finetuning(peer, compare, fusion, kind, transductive):
    "Tokens, histories, scores, loss, regulariser and gradients, the padding item taken out of the released candidates."
    batch = histories()
    model = build(shop(), fusion=fusion, candidate_fusion=kind, transductive=transductive, n_items=V).eval()
    theirs = ask(peer, model, "finetune", batch, without_padding=True)
    row = lambda what, *pair: compare(PEER, SYSTEM, f"{what}: {fusion}, {kind}" + ", with IDs" * transductive, *pair)
    with torch.no_grad():
        row("tokens of items", model.items.adapters()[1:], theirs["tokens"][1:])
        sequence = model.encode_sequence(batch)
        row("histories", sequence[:, 0], theirs["sequences"])
        row("scores", model.score(sequence, model.encode_items()), theirs["scores"][:, 1:])
    terms = model.train().finetune_loss(batch)
    row("regulariser of fine-tuning", terms["diversity"], theirs["diversity"])
    row("loss of fine-tuning", terms["loss"], theirs["loss"])
    row("gradients of fine-tuning", *one_scale(renamed(gradients(model, terms["loss"])), theirs["gradients"]))


def test_choices_in_finetuning(peer, compare):
    "What the table of page 55 says: padding as a candidate, the bias of missing images, the regulariser."
    batch, catalogue = histories(), shop()
    model = build(catalogue).train()
    theirs = ask(peer, model, "finetune", batch)
    compare(PEER, SYSTEM, "loss of fine-tuning, padding a candidate", model.finetune_loss(batch)["loss"], theirs["loss"],
            "the padding item is among the released candidates; without it the losses are equal", differs=True)
    for quirk, term in (("missing_bias", "cross_entropy"), ("diversity", "diversity")):
        own = build(catalogue, released=[name for name in RELEASED if name != quirk])
        own.items.interests.load_state_dict(model.items.interests.state_dict())
        compare(PEER, SYSTEM, f"fine-tuning without {quirk}", own.train().finetune_loss(batch)[term],
                theirs["diversity"] if term == "diversity" else theirs["loss"] - GAMMA * theirs["diversity"],
                f"released=({quirk!r},) follows the released code", differs=True)


def test_last_item_without_text(peer, compare):
    "Stacked, the released code reads the text's place even where there is no text; here the answer stands at the image."
    batch, note = histories(last_has_text=False), "read at the image of an item without a text; at its text there"
    model = build(shop(), fusion="stack").eval()
    theirs, rest = ask(peer, model, "finetune", batch)["sequences"], torch.arange(len(batch)) != 3
    found = model.encode_sequence(batch)[:, 0]
    compare(PEER, SYSTEM, "histories, stacked, that end without a text", found[~rest], theirs[~rest], note, differs=True)
    compare(PEER, SYSTEM, "histories, stacked, that end with a text", found[rest], theirs[rest])


def test_one_modality(peer, compare):
    "Texts alone: the same without IDs; with IDs the released code compares with the sum of both vectors."
    batch, whole = histories(), shop()
    for transductive in (False, True):
        model = build(whole, image_size=None, transductive=transductive, n_items=V).eval()
        theirs = ask(peer, model, "finetune", batch, without_padding=True)
        sequence, items = model.encode_sequence(batch), model.encode_items()
        compare(PEER, SYSTEM, "histories: texts alone" + ", with IDs" * transductive, sequence[:, 0], theirs["sequences"])
        compare(PEER, SYSTEM, "scores: texts alone" + ", with IDs" * transductive, model.score(sequence, items), theirs["scores"][:, 1:],
                "cosine with the sum of token and ID embedding there, with each of them here" * transductive, differs=transductive)
    summed = F.normalize(model.items.adapters()[1:, 0] + model.item_emb.weight[1:], dim=-1)
    compare(PEER, SYSTEM, "scores: texts alone, with IDs, by the sum", sequence[:, 0] @ summed.T, theirs["scores"][:, 1:])


def test_item_drop(peer, compare):
    "The released scatter writes each dropped item over the kept one before it: the last survives, and the first need not."
    batch, kept = histories(), torch.rand(len(LENGTHS), MAX_LEN, generator=torch.Generator().manual_seed(3)) > .4
    theirs = pretraining(peer, build(shop()), batch, kept)
    found, same = drop_items(batch, meant(batch, kept)), drop_items(batch, as_released(batch, kept))
    fill = lambda rows: F.pad(rows.item_seq, (0, MAX_LEN - rows.item_seq.shape[1]))
    compare(PEER, SYSTEM, "item drop, the same draws", fill(found), theirs["item_seq_aug"],
            "the first item always stays here; on a CPU the last one there", differs=True)
    compare(PEER, SYSTEM, "item drop, each draw for the item before", fill(same), theirs["item_seq_aug"])
    compare(PEER, SYSTEM, "item drop, lengths", same.item_seq_len, theirs["item_length_aug"])
    last = lambda rows, lengths: rows[torch.arange(len(rows)), lengths - 1]
    compare(PEER, SYSTEM, "item drop, the last item", last(batch.item_seq, batch.item_seq_len), last(theirs["item_seq_aug"], theirs["item_length_aug"]))


def pretraining(peer, model, batch, kept, drops_words=False):
    "Let the released code take a step of pre-training, with the random choices of the test."
    adapters, interests = model.items.adapters, model.items.interests
    tables = dict(plm_embedding=adapters.text_features, img_embedding=adapters.image_features, interest_embeddings=interests.vectors,
                  plm_embedding_aug=adapters.dropped_text_features, plm_embedding_empty_mask=adapters.missing_modality_mask[:, 0],
                  img_embedding_empty_mask=adapters.missing_modality_mask[:, 1], plm_interest_lookup_table=interests.of_item[:, 0],
                  img_interest_lookup_table=interests.of_item[:, 1])
    return ask(peer, model, "pretrain", batch, kept=kept, drops_words=drops_words, tables=tables)


@pytest.mark.parametrize("fusion, disturbance", [("add", "item drop"), ("stack", "item drop"), ("add", "word drop")])
def test_pretraining(peer, compare, monkeypatch, fusion, disturbance):
    "Each term of the loss, and the gradients; then the names of `released` that are needed for it, one by one."
    batch, words = histories(), disturbance == "word drop"
    kept = torch.rand(len(LENGTHS), MAX_LEN, generator=torch.Generator().manual_seed(3)) > .4
    monkeypatch.setattr(ours, "draw_item_drop", lambda *_: as_released(batch, kept))
    monkeypatch.setattr(ours, "draw_word_drop", lambda *_: ~kept & ~batch.item_pad_mask)
    model = build(shop(), fusion=fusion, word_drop_share=float(words)).train()
    theirs = pretraining(peer, model, batch, kept, words)
    terms = model.pretrain_loss(batch)
    for name in ("loss", "sequence_item", "sequence_sequence", "diversity"):
        compare(PEER, SYSTEM, f"{name} of pre-training: {fusion}, {disturbance}", terms[name], theirs[name])
    found = renamed(gradients(model, terms["loss"]))
    compare(PEER, SYSTEM, f"gradients of pre-training: {fusion}, {disturbance}", *one_scale(found, theirs["gradients"]))
    for quirk, term in (("item_drop_alignment", "sequence_sequence"), ("false_negatives", "sequence_item")):
        if (fusion, disturbance) != ("add", "item drop"): continue
        own = build(shop(), released=[name for name in RELEASED if name != quirk], word_drop_share=0.).train()
        compare(PEER, SYSTEM, f"pre-training without {quirk}", own.pretrain_loss(batch)[term], theirs[term],
                f"released=({quirk!r},) follows the released code", differs=True)


def test_density_peaks(peer, compare):
    "The same clusters; the released centres are means with 0.0001 more in the denominator."
    tokens = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    cluster, centres = run("peer_missrec", peer(PEER), stage="cluster", tokens=tokens, n_clusters=9, n_neighbours=6)
    own_centres, own_cluster = cluster_dpc_knn(tokens, 9, 6)
    sizes = cluster.bincount()[:, None]
    compare(PEER, SYSTEM, "density peaks: clusters", own_cluster, cluster)
    compare(PEER, SYSTEM, "density peaks: centres", own_centres, centres, "divided by the size + 0.0001 there", differs=True)
    compare(PEER, SYSTEM, "density peaks: centres, by the size", own_centres, centres * (sizes + 1e-4) / sizes)
