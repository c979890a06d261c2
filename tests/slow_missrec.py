"""MISSRec once more, token by token and user by user, from the formulas of pages 35 and 55: what fast code is compared with.

Nothing of `mmseqrec` is used here but the names of its weights."""
import math

import numpy as np

from slow_streams import dot, gelu, layer_norm, softmax, unit, within


# The encoder-decoder of page 35

def attend(p, x, context, n_heads):
    "Rows of `x` look at rows of `context`, none of them padding; zeros where there is nothing to look at."
    D = x.shape[1]
    if not len(context): return np.zeros_like(x)
    linear, size, out = lambda part, v: p[f"{part}.weight"] @ v + p[f"{part}.bias"], D // n_heads, []
    pairs = [np.split(linear("key_value", c), 2) for c in context]
    for row in x:
        q, heads = linear("query", row), []
        for start in range(0, D, size):
            part = slice(start, start + size)
            a = softmax([dot(q[part], k[part]) / math.sqrt(size) for k, _ in pairs])
            heads.append(sum(w * v[part] for w, (_, v) in zip(a, pairs)))
        out.append(linear("output", np.concatenate(heads)))
    return np.stack(out)


def self_attend(p, x, n_keys, n_heads):
    "The fused matrix of page 30, cut into the three of `attend`; only the first rows are looked at."
    cut, D = {}, x.shape[1]
    for kind in ("weight", "bias"):
        whole = p[f"query_key_value.{kind}"]
        cut |= {f"query.{kind}": whole[:D], f"key_value.{kind}": whole[D:], f"output.{kind}": p[f"output.{kind}"]}
    return attend(cut, x, x[:n_keys], n_heads)


def feed_forward(p, x):
    return np.stack([p["3.weight"] @ gelu(p["0.weight"] @ row + p["0.bias"]) + p["3.bias"] for row in x])


def normed(p, name, rows): return np.stack([layer_norm(row, p[f"{name}.weight"], p[f"{name}.bias"]) for row in rows])


def read(p, x, interests, n_heads=4, width=0):
    """One history `[L, D]` and its interests `[Q, D]`, neither padded, through an `InterestEncoderDecoder`'s weights.

    The context is that of `width` slots, if these are more: empty ones, zeros, look at the interests, or at each other."""
    n, n_blocks = len(interests), len({name.split(".")[1] for name in p if name.startswith("decoder.")})
    c = np.concatenate([interests, np.zeros((max(width - n, 0), x.shape[1]))])
    for i in range(n_blocks if len(c) else 0):
        b = within(p, f"encoder.{i}.")
        c = normed(b, "attention_norm", c + self_attend(within(b, "attention."), c, n or len(c), n_heads))
        c = normed(b, "feed_forward_norm", c + feed_forward(within(b, "feed_forward."), c))
    if len(c): c = normed(p, "encoder_norm", c)
    for i in range(n_blocks):
        b = within(p, f"decoder.{i}.")
        x = normed(b, "norms.0", x + attend(within(b, "self_attention."), x, x, n_heads))
        x = normed(b, "norms.1", x + attend(within(b, "cross_attention."), x, c[:n], n_heads))
        x = normed(b, "norms.2", x + feed_forward(within(b, "feed_forward."), x))
    return normed(p, "decoder_norm", x), c


# Tokens

def names(p): return [name for name in ("text", "image") if f"items.adapters.linear.{name}.weight" in p]


def tokens(p, catalogue, masked=True, dropped=False):
    "For each row of the catalogue and each modality a vector, or `None` where there is no token; row 0 has none."
    found = []
    for row in range(len(catalogue.item_tokens)):
        found.append([])
        for name in names(p):
            emb = catalogue.dropped_text_emb if dropped and name == "text" else getattr(catalogue, f"{name}_emb")
            pad = getattr(catalogue, f"{name}_pad_mask")[row].tolist()
            there = [f for f, padded in zip(emb[row].float().numpy(), pad) if not padded]
            W, b = p[f"items.adapters.linear.{name}.weight"], p[f"items.adapters.linear.{name}.bias"]
            if there:
                f = (sum(there) / np.float32(len(there))).astype(float)  # features are 32 bits
                if f"items.adapters.centring.{name}.center" in p:
                    f = (f - p[f"items.adapters.centring.{name}.center"]) / p[f"items.adapters.centring.{name}.spread"]
                found[-1].append(W @ f + b)
            else: found[-1].append(None if masked or not row else b.copy())
    return found


# Histories

def sequence(p, history, interests, fusion="add", ids=None, n_heads=4, width=0):
    "Vector of a history: a list of the tokens of each item, and the set of its interests. Also how many, and the context."
    x, L = [], len(history)
    learned = [0.] * L if ids is None else [p["item_emb.weight"][i] for i in ids]
    place = lambda l, v: layer_norm(v + p["reader.inputs.position_emb.weight"][l] + learned[l], p["reader.inputs.norm.weight"], p["reader.inputs.norm.bias"])
    zero = np.zeros(p["reader.inputs.norm.weight"].shape)
    if fusion == "add": x, last = [place(l, sum((t for t in item if t is not None), zero)) for l, item in enumerate(history)], L - 1
    else:
        last = None
        for m in range(len(history[0])):
            for l, item in enumerate(history):
                if item[m] is None and any(t is not None for t in item): continue  # hidden; who has nothing keeps its places
                if l == L - 1 and last is None: last = len(x)
                x.append(place(l, zero if item[m] is None else item[m]))
    emb = [p["items.interests.vectors"][i] for i in sorted(interests)]
    y, context = read(within(p, "reader.trunk."), np.stack(x), np.stack(emb) if emb else np.zeros((0, len(zero))), n_heads, width)
    return unit(y[last]), (len(emb), context)


def interest_set(p, history):
    "Interests of all tokens of some items."
    return {int(i) for row in history for i in p["items.interests.of_item"][row]} - {0}


def read_user(p, toks, history, **options):
    "A history of catalogue rows, undisturbed."
    options = {**options, "ids": history if "item_emb.weight" in p else None}
    return sequence(p, [toks[i] for i in history], interest_set(p, history), **options)


# Scores

def score(p, u, item, toks, fusion="shared"):
    "Fused cosine of a history with a catalogue row; a third of it is the learned vector's, if there is one."
    cosines = [dot(u, unit(t)) for t in toks[item] if t is not None]
    kappa = {"shared": lambda: float(p["fusion.kappa"]), "per_item": lambda: float(p["fusion.item_kappa.weight"][item, 0]), "static": lambda: 0.}
    kappa = kappa[fusion]() if len(toks[item]) == 2 else 0.
    fused = sum(w * s for w, s in zip(softmax([kappa * s for s in cosines]), cosines)) if cosines else 0.
    if "item_emb.weight" not in p: return fused
    return (dot(u, unit(p["item_emb.weight"][item])) + 2 * fused) / 3


def log_sum_exp(values): return max(values) + math.log(sum(math.exp(v - max(values)) for v in values))


def alike(contexts, released=False):
    "How alike the interests of each user are: mean squared cosine of pairs; or the released sum over the batch."
    if released: return sum(((n / len(c) * sum(c)) ** 2).sum() / c.shape[1] for n, c in contexts)
    each = []
    for n, c in contexts:
        pairs = [dot(unit(a), unit(b)) ** 2 for i, a in enumerate(c[:n]) for j, b in enumerate(c[:n]) if i != j]
        each.append(sum(pairs) / len(pairs) if pairs else 0.)
    return sum(each) / len(each)


def widest(p, histories, sets, released):
    "Slots of the sets; the released code has one more in a history that is shorter than it may be."
    longest = len(p["reader.inputs.position_emb.weight"])
    return max(*(len(interests) + (released and len(h) < longest) for h, interests in zip(histories, sets)), 1)


# Losses

def finetuning(p, catalogue, histories, targets, tau=.07, fusion="add", candidate="shared", masked=True, released=False):
    "Cross-entropy over all items, and the likeness of interests."
    toks = tokens(p, catalogue, masked)
    width = widest(p, histories, [interest_set(p, h) for h in histories], released)
    users, contexts = zip(*(read_user(p, toks, h, fusion=fusion, width=width) for h in histories))
    losses = []
    for u, target in zip(users, targets):
        logits = [score(p, u, j, toks, candidate) / tau for j in range(1, len(toks))]
        losses.append(log_sum_exp(logits) - logits[target - 1])
    return {"cross_entropy": sum(losses) / len(losses), "diversity": alike(contexts, released)}


def contrast(logits, targets, keep):
    "Mean over the rows of the cross-entropy of the diagonal; other columns with the row's target are left out, unless kept."
    losses = []
    for b, row in enumerate(logits):
        there = [c for c in range(len(row)) if keep or c == b or targets[c] != targets[b]]
        losses.append(log_sum_exp([row[c] for c in there]) - row[b])
    return sum(losses) / len(losses)


def pretraining(p, catalogue, histories, disturbed, targets, tau=.07, keep=False, released=False, masked=True, fusion="add"):
    "The three terms; `disturbed` has for each history its tokens, item by item, and its set of interests."
    toks = tokens(p, catalogue, masked)
    width = widest(p, histories, [interest_set(p, h) for h in histories], released)
    other_width = widest(p, *zip(*disturbed), released)
    users, contexts = zip(*(read_user(p, toks, h, fusion=fusion, width=width) for h in histories))
    others, other_contexts = zip(*(sequence(p, h, interests, fusion, width=other_width) for h, interests in disturbed))
    own = [[score(p, u, j, toks) / tau for j in targets] for u in users]
    pairs = [[dot(u, v) / tau for v in others] for u in users]
    return {"sequence_item": contrast(own, targets, keep), "sequence_sequence": contrast(pairs, targets, keep),
            "diversity": alike(contexts, released) + alike(other_contexts, released)}
