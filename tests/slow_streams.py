"""M2SE and MP4SR once more, item by item and position by position, from the papers' formulas: what fast code is compared with.

Nothing of `mmseqrec` is used here but the names of its weights."""
import math

import numpy as np


def numbers(module):
    "Weights by name, in 64 bits."
    return {name: x.detach().cpu().double().numpy() for name, x in module.state_dict().items()}


def within(p, prefix):
    "The weights of a part."
    return {name[len(prefix):]: x for name, x in p.items() if name.startswith(prefix)}


def softmax(logits):
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


def layer_norm(x, scale, shift):
    centred = x - x.mean()
    return centred / math.sqrt((centred ** 2).mean() + 1e-12) * scale + shift


def gelu(x): return np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def unit(x):
    length = math.sqrt(float(x @ x))
    return x / length if length else x


def dot(a, b): return sum(float(x) * float(y) for x, y in zip(a, b))


# M2SE

def item_vector(p, features, is_padding, masked=True):
    "One modality of one item from the weights of a `ModalityEncoder`: pool, centre, ask the experts; zeros if there is nothing."
    n_experts, D = p["experts.scale"].shape
    if all(is_padding): return np.zeros(D)
    rows = [f for f, padded in zip(features, is_padding) if not (masked and padded)]
    logits = [float(p["pooling.second.weight"][0] @ (p["pooling.first.weight"] @ f)) for f in rows]
    e = (sum(w * f for w, f in zip(softmax(logits), rows)) - p["centring.center"]) / p["centring.spread"]
    gates = softmax([float(column @ e) for column in p["experts.gate"].T])
    z = np.zeros(D)
    for g in range(n_experts):
        W, b = (p[f"experts.experts.{part}"][g * D:(g + 1) * D] for part in ("weight", "bias"))
        z += gates[g] * layer_norm(W @ e + b, p["experts.scale"][g], p["experts.shift"][g])
    return z


def item_vectors(p, catalogue, masked=True):
    "`[V+1, 2, D]` from the weights of `ItemStreams`: text, then pictures."
    rows = []
    for row in range(len(catalogue.item_tokens)):
        rows.append([item_vector(within(p, f"{name}."), getattr(catalogue, f"{name}_emb")[row].double().numpy(),
                                 getattr(catalogue, f"{name}_pad_mask")[row].tolist(), masked) for name in ("text", "image")])
    return np.array(rows)


def read(p, x, n_heads=2):
    "One history in one stream `[L, D]` through a `SequenceEncoder`'s weights: SASRec, position by position."
    D = x.shape[1]
    size = D // n_heads
    h = [layer_norm(x[l] + p["position_emb.weight"][l], p["norm.weight"], p["norm.bias"]) for l in range(len(x))]
    n_blocks = len({name.split(".")[1] for name in p if name.startswith("blocks.")})
    for n in range(n_blocks):
        b = within(p, f"blocks.{n}.")
        linear = lambda name, v: b[f"{name}.weight"] @ v + b[f"{name}.bias"]
        qkv = [linear("attention.query_key_value", v) for v in h]
        new = []
        for l in range(len(h)):
            heads = []
            for start in range(0, D, size):
                q = qkv[l][start:start + size]
                weights = softmax([dot(q, qkv[j][D + start:D + start + size]) / math.sqrt(size) for j in range(l + 1)])
                heads.append(sum(w * qkv[j][2 * D + start:2 * D + start + size] for j, w in enumerate(weights)))
            y = layer_norm(h[l] + linear("attention.output", np.concatenate(heads)), b["attention_norm.weight"],
                           b["attention_norm.bias"])
            y = layer_norm(y + linear("feed_forward.2", gelu(linear("feed_forward.0", y))), b["feed_forward_norm.weight"],
                           b["feed_forward_norm.bias"])
            new.append(y)
        h = new
    return np.array(h)


def read_both(p, x, n_heads=2):
    "Two streams `[L, 2, D]` of one history, one after the other, from the weights of an `M2SE`."
    return np.stack([read(within(p, "encoder."), x[:, stream], n_heads) for stream in (0, 1)], 1)


# MP4SR: pre-training

def next_item(asking, targets, items, lacking, tau, legacy):
    "NIP in one modality: `asking[b]` are the vectors of row b that ask, `targets[b]` the vector of its next item."
    rows, total = [b for b in range(len(items)) if not lacking[b]], 0.0
    for b in rows:
        above = sum(math.exp(dot(a, targets[b]) / tau) for a in asking[b])
        below = 0.0
        for other in rows:
            for a in asking[b]:
                if other != b and items[other] == items[b]: below += 1.0 if legacy else 0.0
                else: below += math.exp(dot(a, targets[other]) / tau)
        total -= math.log(above / below)
    return total / len(rows) if rows else 0.0


def agreement(own, other, items, tau, legacy):
    """CMCL in one space: `own[b]` and `other[b]` are the two streams of row b. The paper's formula treats both alike;
    the released arithmetic does not, and its `own` is the stream of texts in every space."""
    B = len(items)
    halves = []
    for this, that in ((own, other), (other, own)):
        total = 0.0
        for b in range(B):
            above = math.exp(dot(own[b], other[b]) / tau)
            below = above
            for c in range(B):
                if c == b: continue
                if items[c] == items[b]:
                    below += 2.0 if legacy else 0.0
                    continue
                across = dot(own[b], other[c]) if legacy else dot(this[b], that[c])  # the released code turns nothing round
                below += math.exp(across / tau) + math.exp(dot(this[b], this[c]) / tau)
            total -= math.log(above / below)
        halves.append(total / B)
    return sum(halves) / 2


def spaces(p, h):
    "Vectors `[[own, other] of text, [own, other] of pictures]` of one history from its two streams; without heads own ones only."
    if "heads.text.weight" not in p: return [[unit(h[0])], [unit(h[1])]]
    head = lambda name, v: unit(p[f"heads.{name}.weight"] @ v + p[f"heads.{name}.bias"])
    return [[head("text", h[0]), head("text", h[1])], [head("image", h[1]), head("image", h[0])]]


def pretraining(p, catalogue, histories, targets, tau, legacy=False, swapped=None, masked=True, n_heads=2):
    "All terms of an `MP4SR`'s pre-training from its weights; `swapped[b][l]` says where the streams change places."
    z = item_vectors(within(p, "m2se.items."), catalogue, masked)
    found = []
    for b, history in enumerate(histories):
        x = np.array([z[i][::-1] if swapped and swapped[b][l] else z[i] for l, i in enumerate(history)])
        found.append(spaces(p, read_both(within(p, "m2se."), x, n_heads)[-1]))
    return terms(found, [[unit(z[i][0]), unit(z[i][1])] for i in targets],
                 [[not z[i][0].any(), not z[i][1].any()] for i in targets], targets, tau, legacy)


def terms(found, targets, lacking, items, tau, legacy):
    "The terms of MP4SR from vectors: `found[b][space]`, `targets[b][space]`, `lacking[b][space]`."
    result = {}
    for space, name in enumerate(("text", "image")):
        result[f"nip_{name}"] = next_item([row[space] for row in found], [row[space] for row in targets], items,
                                          [row[space] for row in lacking], tau, legacy)
    if len(found[0][0]) == 1:
        return result | {"cmcl": agreement([row[0][0] for row in found], [row[1][0] for row in found], items, tau, legacy)}
    text, image = 0, 1
    result["cmcl_text"] = agreement([row[text][0] for row in found], [row[text][1] for row in found], items, tau, legacy)
    result["cmcl_image"] = agreement([row[image][1] for row in found], [row[image][0] for row in found], items, tau, legacy)
    return result


# MP4SR: fine-tuning

def candidates(p, catalogue):
    "`[V+1, 2, D]`: content and, where there is one, the learned vector; not yet of length 1."
    z = item_vectors(within(p, "m2se.items."), catalogue)
    return z + p["item_emb.weight"][:, None] if "item_emb.weight" in p else z


def scores(p, catalogue, history):
    "Sum of the two cosines of one history with every item, 1 to V."
    x = candidates(p, catalogue)
    h = read_both(within(p, "m2se."), x[history])[-1]
    return [dot(unit(h[0]), unit(x[j][0])) + dot(unit(h[1]), unit(x[j][1])) for j in range(1, len(x))]


def finetuning(p, catalogue, histories, targets, tau):
    "Mean cross-entropy of the next items among all items."
    total = 0.0
    for history, target in zip(histories, targets):
        total -= math.log(softmax([s / tau for s in scores(p, catalogue, history)])[target - 1])
    return total / len(targets)
