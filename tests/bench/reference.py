"""The reference mode, which is *not* the released code: our model and loss with the released code's way of batching.

Every prefix is a row, every row is padded to `max_len`, and adapters run on every position. A ratio to it says less than
one to the released code: anomaly mode, say, is off.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseqrec.blocks.augment import draw_item_drop, drop_items
from mmseqrec.blocks.contrastive import sequence_item_loss, sequence_sequence_loss

from mmseqrec.blocks.losses import draw_candidates, full_softmax_cross_entropy, interest_diversity
from mmseqrec.data.sequences import Batch
from mmseqrec.models.baselines import SASRec
from mmseqrec.models.missrec import MISSRec
from mmseqrec.blocks.towers import take_positions
from mmseqrec.recommender import Recommender

def _padded(batch, width):
    "Pad the histories of a batch to a width."
    return replace(batch, item_seq=F.pad(batch.item_seq, (0, width - batch.item_seq.shape[1])))

def _read_everywhere(model, batch):
    "Encode padded histories with adapters on every position: `[B, S, D]`, and MISSRec's context."
    ids = batch.item_seq.flatten()
    if not isinstance(model, MISSRec):
        x = model.item_vectors(ids)[:, 0].unflatten(0, batch.item_seq.shape)
        h = take_positions(model.encoder(x, batch.item_pad_mask), batch)
        return (h if isinstance(model, SASRec) else F.normalize(h, dim=-1))[:, None], None
    tokens = model.items.adapters(ids).unflatten(0, batch.item_seq.shape)
    missing = model.items.adapters.missing_token_mask[batch.item_seq]
    x, hidden, last = model.reader.inputs(tokens, missing, batch.item_pad_mask)
    interest_seq = model.items.interests.sets(batch.item_seq)
    y, context = model.reader.trunk(x, hidden, model.items.interests(interest_seq), interest_seq == 0)
    h = F.normalize(y[torch.arange(len(batch), device=last.device), last], dim=-1)
    return h[:, None], interest_diversity(context, interest_seq == 0)

def reference_loss(
    model: Recommender,  # SASRec, UniSRec or MISSRec
    batch: Batch,  # one target a row
    phase: str = "finetune",  # or `"pretrain"`, for MISSRec
) -> dict[str, Tensor]:  # `"loss"`
    "Compute the loss the slow way: each prefix padded to `max_len`, adapters on every position."
    h, diversity = _read_everywhere(model, _padded(batch, model.max_len))
    if phase == "pretrain":
        short = drop_items(batch, draw_item_drop(batch.item_pad_mask, model.disturbance["item_drop"]))
        other, diversity_of_other = _read_everywhere(model, _padded(short, model.max_len))
        scores = model.score(h, model.encode_items(batch.pos_item))
        loss = (sequence_item_loss(scores, batch.pos_item, model.temperature) + model.sequence_weight *
                sequence_sequence_loss(h[:, 0], other[:, 0], batch.pos_item, model.temperature))
        return {"loss": loss + model.diversity_weight * (diversity + diversity_of_other)}
    ids, target, _ = draw_candidates(batch.pos_item, model.catalogue.n_items, known_items=model.known_items)
    items = model.encode_items(ids)
    score = lambda u, vectors: model.score(u, replace(items, vectors=vectors))
    loss = full_softmax_cross_entropy(h, items.vectors, target, model.temperature, score)
    return {"loss": loss if diversity is None else loss + model.diversity_weight * diversity}
