"""How RecBole names the weights that ours has, and what both are asked: UniSRec's code is built on RecBole's SASRec.

A pair names some of our weights and some of theirs that hold the same numbers, one after the other."""
import torch
from theirs import gradients, one_scale

from mmseqrec.data.sequences import collate, expand_prefixes

V, MAX_LEN = 12, 10
HISTORIES = [[6, 9, 2, 7, 7, 1], [8], [3, 8], [10, 3, 11, 12], [6, 6], [5, 4, 3, 2, 1, 12, 11, 10, 9, 8], [1, 2]]
TARGETS = [9, 1, 9, 9, 8, 1, 4]  # some of them the same
SIZES = dict(hidden_size=16, n_layers=2, n_heads=2, inner_size=32)
THEIRS = dict(**SIZES, MAX_ITEM_LIST_LENGTH=MAX_LEN, hidden_dropout_prob=0, attn_dropout_prob=0, hidden_act="gelu",
              layer_norm_eps=1e-12, initializer_range=.02, loss_type="CE", device="cpu", ITEM_ID_FIELD="item_id",
              USER_ID_FIELD="user_id", LIST_SUFFIX="_list", ITEM_LIST_LENGTH_FIELD="item_length", NEG_PREFIX="neg_")


def encoder_pairs(n_layers=2):
    "Pair the weights of a Transformer: position vectors, norm, blocks."
    def pair(ours, *theirs): return [([f"encoder.{ours}.{x}"], [f"{name}.{x}" for name in theirs]) for x in ("weight", "bias")]
    pairs = [(["encoder.position_emb.weight"], ["position_embedding.weight"]), *pair("norm", "LayerNorm")]
    for i in range(n_layers):
        block, layer = f"blocks.{i}", f"trm_encoder.layer.{i}"
        attention = f"{layer}.multi_head_attention"
        pairs += pair(f"{block}.attention.query_key_value", *(f"{attention}.{x}" for x in ("query", "key", "value")))
        pairs += pair(f"{block}.attention.output", f"{attention}.dense")
        pairs += pair(f"{block}.attention_norm", f"{attention}.LayerNorm")
        pairs += pair(f"{block}.feed_forward.0", f"{layer}.feed_forward.dense_1")
        pairs += pair(f"{block}.feed_forward.2", f"{layer}.feed_forward.dense_2")
        pairs += pair(f"{block}.feed_forward_norm", f"{layer}.feed_forward.LayerNorm")
    return pairs


@torch.no_grad()
def give_equal_weights(ours, theirs, pairs):
    "Draw numbers for every weight of both; only the padding items differ, zeros here and as they draw it there."
    named = {name for pair in pairs for name in pair[1]}
    assert named == {name for name, x in theirs.named_parameters() if x.requires_grad}, "a weight of theirs has no pair"
    assert {name for pair in pairs for name in pair[0]} == {name for name, _ in ours.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for our_names, their_names in pairs:
        numbers = torch.cat([theirs.get_parameter(name).flatten() for name in their_names])
        numbers = .3 * torch.randn(numbers.shape, generator=generator)
        for model, names in ((ours, our_names), (theirs, their_names)):
            sizes = [model.get_parameter(name).numel() for name in names]
            for name, part in zip(names, numbers.split(sizes)): model.get_parameter(name).view(-1).copy_(part)
    for part in ours.modules():
        if getattr(part, "padding_idx", None) is not None: part.weight[part.padding_idx] = 0


def compare_losses(compare, peer, system, what, ours, our_loss, theirs, their_loss, pairs):
    "Compare a loss and its gradients for every weight; those of a pair as shares of the largest of them."
    compare(peer, system, f"{what}: loss", our_loss, their_loss)
    mine, other = gradients(ours, our_loss), gradients(theirs, their_loss)
    def of_pairs(found, model, side):
        return {k: torch.cat([found.get(name, torch.zeros_like(model.get_parameter(name))).flatten() for name in pair[side]])
                for k, pair in enumerate(pairs)}
    mine, other = of_pairs(mine, ours, 0), of_pairs(other, theirs, 1)
    assert sum(bool(x.any()) for x in other.values()) > len(pairs) / 2, "there are no gradients to compare"
    compare(peer, system, f"{what}: gradients of all weights", *one_scale(mine, other))


def rows(histories=HISTORIES, targets=TARGETS):
    "A batch with one question a row."
    batch = collate(histories, MAX_LEN)
    batch.pos_item = torch.tensor(targets)
    return batch


def windows():
    "A batch with a question at every position, and the same questions with a row each, as RecBole has them."
    batch = collate(HISTORIES, MAX_LEN)
    batch.positions = (~batch.item_pad_mask).flatten().nonzero()[:, 0]
    batch.pos_item = torch.randint(1, V + 1, batch.positions.shape, generator=torch.Generator().manual_seed(1))
    return batch, expand_prefixes(batch, batch.positions)
