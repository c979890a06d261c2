"Layers against NumPy loops; what is padding, absent, in another row or in the future changes nothing."
import numpy as np
import pytest
import torch
from torch import nn

from mmseqrec.core import set_seed
from mmseqrec.data.sequences import collate
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.blocks.layers import (AttentionPooling, Centring, ContentAdapter, Dropout, MixtureOfExperts,
                             MultiHeadAttention, SequenceEncoder, TransformerBlock, WhiteningExperts, check_features,
                             drops_openly, encode_ends, init_weights, open_attention)
from mmseqrec.blocks.towers import ContentEmbedding
from small_world import IMAGE_SIZE, NO_IMAGE, NO_TEXT, NOTHING, TEXT_SIZE, V, make_catalogue

CLOSE = dict(rtol=0, atol=1e-9)
B, L, D, H = 3, 5, 8, 2
LENGTHS = torch.tensor([5, 3, 1])
PAD = torch.arange(L) >= LENGTHS[:, None]

each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def numbers(module): return {name: x.detach().double().numpy() for name, x in module.state_dict().items()}


def slow_linear(x, p, name): return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def slow_attention(x, p, n_heads, length, causal):
    "Attention of one row `[L, D]`, head by head and query by query; returns the result and the weights."
    (L, D), size = x.shape, x.shape[1] // n_heads
    q, k, v = np.split(slow_linear(x, p, "query_key_value"), 3, axis=1)
    mixed, weights = np.zeros((L, D)), np.zeros((n_heads, L, L))
    for head in range(n_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(L):
            visible = range(i + 1) if causal else range(length)
            strength = {j: np.exp(sum(q[i, part] * k[j, part]) / np.sqrt(size)) for j in visible}
            for j in visible:
                weights[head, i, j] = strength[j] / sum(strength.values())
                mixed[i, part] += weights[head, i, j] * v[j, part]
    return slow_linear(mixed, p, "output"), weights


def slow_norm(x, p, name):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-12) * p[f"{name}.weight"] + p[f"{name}.bias"]


def slow_gelu(x):
    from math import erf
    return np.vectorize(lambda z: z * (1 + erf(z / 2 ** .5)) / 2)(x)


def part_of(p, name): return {key[len(name) + 1:]: x for key, x in p.items() if key.startswith(name + ".")}


def slow_block(x, p, n_heads, length, causal):
    h = slow_norm(x + slow_attention(x, part_of(p, "attention"), n_heads, length, causal)[0], p, "attention_norm")
    inner = slow_gelu(slow_linear(h, p, "feed_forward.0"))
    return slow_norm(h + slow_linear(inner, p, "feed_forward.2"), p, "feed_forward_norm")


def slow_encoder(x, p, n_layers, n_heads, length, causal):
    h = slow_norm(x + p["position_emb.weight"][:len(x)], p, "norm")
    for layer in range(n_layers): h = slow_block(h, part_of(p, f"blocks.{layer}"), n_heads, length, causal)
    return h


@pytest.fixture()
def x(): return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make(module, *sizes, **options):
    "A module with seeded, lively weights in fp64, not training."
    set_seed(1)
    module = module(*sizes, **options)
    for weight in module.parameters(): nn.init.normal_(weight, std=.4)
    return module.double().eval()


@each_direction
def test_attention_equals_loops_open_and_fused(x, causal):
    layer = make(MultiHeadAttention, D, H)
    mixed, weights = layer(x, PAD, causal, return_attention=True)
    fused = layer(x, PAD, causal)
    for row, length in enumerate(LENGTHS.tolist()):
        slow, slow_weights = slow_attention(x[row].numpy(), numbers(layer), H, length, causal)
        for fast in (mixed, fused): np.testing.assert_allclose(fast[row, :length].detach(), slow[:length], **CLOSE)
        np.testing.assert_allclose(weights[row, :, :length].detach(), slow_weights[:, :length], **CLOSE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, L, dtype=torch.float64), **CLOSE)
    if causal: assert not weights.triu(1).any()
    else: assert not weights.permute(0, 3, 1, 2)[PAD].any()


@each_direction
def test_open_and_fused_have_the_same_gradients(x, causal):
    layer, found = make(MultiHeadAttention, D, H), []
    for open in (True, False):
        inputs = x.clone().requires_grad_()
        y = layer(inputs, PAD, causal, return_attention=open)
        y = y[0] if open else y
        found.append(torch.autograd.grad(y[~PAD].square().sum(), [inputs, *layer.parameters()]))
    for a, b in zip(*found): torch.testing.assert_close(a, b, **CLOSE)


def test_attention_without_a_mask_sees_everything(x):
    layer = make(MultiHeadAttention, D, H)
    nobody = torch.zeros(B, L, dtype=torch.bool)
    for options in ({}, {"return_attention": True}):
        a, b = (layer(x, mask, **options) for mask in (None, nobody))
        if options: a, b = a[0], b[0]
        torch.testing.assert_close(a, b, **CLOSE)


def test_attention_weights_are_dropped_in_training_only(x):
    layer = make(MultiHeadAttention, D, H, dropout=.5)
    for open in (False, True):
        once, twice = (layer.train()(x, causal=True, return_attention=open) for _ in range(2))
        assert not torch.equal(once[0] if open else once, twice[0] if open else twice)
        once, twice = (layer.eval()(x, causal=True, return_attention=open) for _ in range(2))
        torch.testing.assert_close(once, twice, rtol=0, atol=0)


def test_dropout_keeps_the_mean():
    "Averaged over many draws, dropped attention is attention: the kept weights are scaled up."
    layer, x = make(MultiHeadAttention, 4, 1, dropout=.3), torch.randn(1, 4, 4, dtype=torch.float64)
    expected, many = layer(x), x.expand(20_000, -1, -1)
    for open in (False, True):
        y = layer.train()(many, return_attention=open)
        torch.testing.assert_close((y[0] if open else y).mean(0, keepdim=True), expected, rtol=0, atol=.05)


@each_direction
def test_block_equals_loops(x, causal):
    block = make(TransformerBlock, D, H, 16)
    y, (again, weights) = block(x, PAD, causal), block(x, PAD, causal, return_attention=True)
    torch.testing.assert_close(y[~PAD], again[~PAD], **CLOSE)
    assert weights.shape == (B, H, L, L)
    for row, length in enumerate(LENGTHS.tolist()):
        slow = slow_block(x[row].numpy(), numbers(block), H, length, causal)
        np.testing.assert_allclose(y[row, :length].detach(), slow[:length], **CLOSE)


def encoder(causal=True, **options):
    return make(SequenceEncoder, D, n_layers=2, n_heads=H, inner_size=16, max_len=7, causal=causal, **options)


@each_direction
def test_encoder_equals_loops(x, causal):
    module = encoder(causal)
    y, (again, weights) = module(x, PAD), module(x, PAD, return_attention=True)
    torch.testing.assert_close(y[~PAD], again[~PAD], **CLOSE)
    assert [w.shape for w in weights] == [(B, H, L, L)] * 2
    for row, length in enumerate(LENGTHS.tolist()):
        slow = slow_encoder(x[row].numpy(), numbers(module), 2, H, length, causal)
        np.testing.assert_allclose(y[row, :length].detach(), slow[:length], **CLOSE)


@each_direction
def test_padding_changes_nothing(x, causal):
    "Other content of the padding, a wider rectangle, and the row on its own give the same digits."
    module = encoder(causal)
    expected, garbage = module(x, PAD)[~PAD], x.clone()
    garbage[PAD] = 1e3
    torch.testing.assert_close(module(garbage, PAD)[~PAD], expected, **CLOSE)
    wider = torch.cat([garbage, torch.full((B, 2, D), -7., dtype=torch.float64)], 1)
    wider_pad = torch.cat([PAD, torch.ones(B, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(module(wider, wider_pad)[~wider_pad], expected, **CLOSE)
    alone = [module(x[row:row + 1, :n], PAD[row:row + 1, :n])[0] for row, n in enumerate(LENGTHS.tolist())]
    torch.testing.assert_close(torch.cat(alone), expected, **CLOSE)


@each_direction
def test_other_rows_change_nothing(x, causal):
    module, other = encoder(causal), x.clone()
    other[1:] = torch.randn_like(other[1:])
    torch.testing.assert_close(module(other, PAD)[0], module(x, PAD)[0], **CLOSE)
    torch.testing.assert_close(module(x.flip(0), PAD.flip(0)).flip(0)[~PAD], module(x, PAD)[~PAD], **CLOSE)


def test_the_future_changes_a_position_only_when_both_directions_are_seen(x):
    for causal in (True, False):
        module = encoder(causal)
        inputs = x[:1].clone().requires_grad_()
        gradient, = torch.autograd.grad(module(inputs, PAD[:1])[0, 2].square().sum(), inputs)
        moved = gradient[0].abs().sum(1) > 1e-9
        assert moved.tolist() == [True] * 3 + [not causal] * 2


@each_direction
def test_padding_gets_no_gradient(x, causal):
    module, inputs = encoder(causal), x.clone().requires_grad_()
    gradient, = torch.autograd.grad(module(inputs, PAD)[~PAD].square().sum(), inputs)
    assert not gradient[PAD].any() and (gradient[~PAD].abs().sum(1) > 0).all()


def test_order_matters_through_positions_only(x):
    "Without positions, a bidirectional encoder cannot tell one order from another."
    module, none = encoder(False), torch.zeros(B, L, dtype=torch.bool)
    assert (module(x.flip(1), none).flip(1) - module(x, none)).abs().max() > 1e-3
    nn.init.zeros_(module.position_emb.weight)
    torch.testing.assert_close(module(x.flip(1), none).flip(1), module(x, none), **CLOSE)


def count(module): return sum(x.numel() for x in module.parameters())


def test_parameters_by_hand():
    attention = 3 * (D * D + D) + D * D + D
    block = attention + 2 * 2 * D + (D * 16 + 16) + (16 * D + D)
    assert count(MultiHeadAttention(D, H)) == attention == 288
    assert count(TransformerBlock(D, H, 16)) == block
    assert count(SequenceEncoder(D, 2, H, 16, max_len=7)) == 7 * D + 2 * D + 2 * block
    assert count(ContentAdapter(6, D)) == 6 * D + D + 2 * D
    assert count(ContentEmbedding(6, 5, D)) == count(ContentAdapter(6, D)) + count(ContentAdapter(5, D))
    assert count(ContentEmbedding(None, 5, D)) == count(ContentAdapter(5, D))
    assert count(Centring(6)) == 0
    assert count(AttentionPooling(6, inner_size=4)) == 6 * 4 + 4
    assert count(MixtureOfExperts(6, D, n_experts=3)) == 3 * (6 * D + D + 2 * D) + 6 * 3


def test_initial_weights():
    set_seed(0)
    module = init_weights(nn.ModuleDict({
        "linear": nn.Linear(300, 300), "bare": nn.Linear(300, 300, bias=False), "norm": nn.LayerNorm(9),
        "emb": nn.Embedding(900, 100, padding_idx=0), "free": nn.Embedding(900, 100)}), std=.05)
    for name in ("linear", "bare", "emb", "free"):
        weight = module[name].weight.detach()[name == "emb":]
        assert weight.std().item() == pytest.approx(.05, rel=.02) and abs(weight.mean().item()) < .001
    assert not module["linear"].bias.any() and not module["emb"].weight[0].any() and module["free"].weight[0].all()
    assert module["norm"].weight.eq(1).all() and not module["norm"].bias.any()
    module["emb"](torch.tensor([0, 1])).sum().backward()  # the padding row stays zero: it never gets a gradient
    assert not module["emb"].weight.grad[0].any() and module["emb"].weight.grad[1].all()


@pytest.mark.parametrize("size", [1e-9, 1., 1e4])
def test_centring_does_not_enlarge_rounding_errors(size):
    "Equal features stay equal to nothing at any scale; features that differ are scaled to a spread of 1."
    row = size * torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    centring = Centring(5)
    centring.fit_statistics(row.repeat(1001, 1))
    assert centring.spread == 1 and centring(row).abs().max() <= 1e-5 * size
    centring.fit_statistics(row * torch.linspace(.99, 1.01, 1001)[:, None])
    assert centring(row * torch.linspace(.99, 1.01, 1001)[:, None]).square().mean().sqrt() == pytest.approx(1, rel=1e-3)
    centring.fit_statistics(torch.zeros(3, 5))
    assert centring.spread == 1


def test_centring_equals_loops():
    rows = 3 * torch.randn(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 7
    centring = Centring(4).double()
    torch.testing.assert_close(centring(rows), rows, **CLOSE)  # before any statistics: nothing is changed
    centring.fit_statistics(rows[:6])
    centre = [sum(float(row[f]) for row in rows[:6]) / 6 for f in range(4)]
    squares = [(float(row[f]) - centre[f]) ** 2 for row in rows[:6] for f in range(4)]
    spread = (sum(squares) / len(squares)) ** .5
    slow = [[(float(row[f]) - centre[f]) / spread for f in range(4)] for row in rows]
    np.testing.assert_allclose(centring.center, centre, **CLOSE)
    assert centring.spread.ndim == 0 and centring.spread.item() == pytest.approx(spread, abs=1e-9)
    np.testing.assert_allclose(centring(rows), slow, **CLOSE)
    assert centring(rows[:6]).mean(0).abs().max() < 1e-9
    assert centring(rows[:6]).square().mean().item() == pytest.approx(1, abs=1e-9)


def test_centring_is_kept_with_the_weights_and_never_trained():
    centring, again = Centring(4), Centring(4)
    features = torch.randn(5, 4, requires_grad=True)
    centring.fit_statistics(features)
    assert set(centring.state_dict()) == {"center", "spread"} and not list(centring.parameters())
    assert not centring.center.requires_grad and not centring.spread.requires_grad
    again.load_state_dict(centring.state_dict())
    torch.testing.assert_close(again(features), centring(features), rtol=0, atol=0)
    centring(features).sum().backward()  # statistics are numbers, not functions of the features
    torch.testing.assert_close(features.grad, torch.full((5, 4), 1 / centring.spread.item()))


def test_centring_of_nothing_changes_nothing_and_of_equal_rows_stays_finite():
    centring, rows = Centring(4), torch.randn(3, 4)
    centring.fit_statistics(rows)
    before = {name: x.clone() for name, x in centring.state_dict().items()}
    centring.fit_statistics(rows[:0])
    assert all(torch.equal(x, before[name]) for name, x in centring.state_dict().items())
    centring.fit_statistics(rows[:1].expand(2, -1))  # the mean of two equal numbers is exact; of three it may be off by a rounding
    assert not centring(rows[:1]).any() and centring(rows).isfinite().all()


def test_adapter_equals_loops():
    adapter, features = make(ContentAdapter, 6, D), torch.randn(4, 6, dtype=torch.float64)
    adapter.centring.fit_statistics(features[:3])
    p, missing = numbers(adapter), torch.tensor([False, True, False, False])
    centred = (features.numpy() - p["centring.center"]) / p["centring.spread"]
    slow = slow_norm(slow_linear(centred, p, "linear"), p, "norm")
    slow[1] = 0
    np.testing.assert_allclose(adapter(features, missing).detach(), slow, **CLOSE)


def test_check_features_names_what_does_not_fit():
    both = catalogue_from_arrays(["a"], np.ones((1, TEXT_SIZE)), np.ones((1, IMAGE_SIZE)))
    only_text = catalogue_from_arrays(["a"], np.ones((1, TEXT_SIZE)))
    for fine in ({}, {"text": TEXT_SIZE}, {"image": IMAGE_SIZE}, {"text": TEXT_SIZE, "image": IMAGE_SIZE}):
        assert check_features(both, **fine) is None
    check_features(only_text, text=TEXT_SIZE)  # pictures that nobody expects need not be there
    with pytest.raises(ValueError, match="expects text features of 7 numbers, the catalogue has 6 numbers.*text_size"):
        check_features(both, text=7, image=IMAGE_SIZE)
    with pytest.raises(ValueError, match="expects image features of 6 numbers, the catalogue has 5 numbers.*image_size"):
        check_features(both, text=TEXT_SIZE, image=6)
    with pytest.raises(ValueError, match="expects image features of 5 numbers, the catalogue has none.*encode it"):
        check_features(only_text, image=IMAGE_SIZE)


F, K = 6, 4  # numbers in a feature; room for sentences
COUNTS = torch.tensor([4, 2, 1, 0])
NO_SENTENCE = torch.arange(K) >= COUNTS[:, None]


@pytest.fixture()
def sentences():
    "Features `[4, K, F]` of items with 4, 2, 1 and no sentences, zeros at padding."
    x = torch.randn(4, K, F, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.masked_fill(NO_SENTENCE[..., None], 0)


def slow_pooling(x, first, second, taken, b1=0.0, b2=0.0):
    "Weights and mean of one item `[K, F]` over the sentences `taken`: both matrices one after the other, with biases."
    hidden = {j: [sum(first[i, f] * x[j, f] for f in range(F)) + b1 for i in range(len(first))] for j in taken}
    strength = {j: np.exp(sum(second[0, i] * h for i, h in enumerate(hidden[j])) + b2) for j in taken}
    weights, e = np.zeros(K), np.zeros(F)
    for j in taken:
        weights[j] = strength[j] / sum(strength.values())
        e += weights[j] * x[j]
    return weights, e


@pytest.mark.parametrize("biases", [(0.0, 0.0), (.7, -3.0)], ids=["no_biases", "biases_as_in_the_paper"])
@pytest.mark.parametrize("masked", [True, False])
def test_pooling_equals_loops(sentences, masked, biases):
    pooling = make(AttentionPooling, F, inner_size=5, masked=masked)
    p = numbers(pooling)
    weights, e = pooling.weights(sentences, NO_SENTENCE).detach(), pooling(sentences, NO_SENTENCE).detach()
    for item, n in enumerate(COUNTS.tolist()):
        taken = range(n) if masked else range(K)
        slow_weights, slow_e = slow_pooling(sentences[item].numpy(), p["first.weight"], p["second.weight"], taken, *biases)
        np.testing.assert_allclose(e[item], slow_e, **CLOSE)
        if taken: np.testing.assert_allclose(weights[item], slow_weights, **CLOSE)
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64), **CLOSE)
    padded_but_something = NO_SENTENCE & (COUNTS > 0)[:, None]
    if masked: assert not weights[padded_but_something].any(), "padding weighs exactly nothing"
    else: assert (weights[padded_but_something] > .01).all()


def test_pooling_by_the_two_layers_of_the_released_code(sentences):
    "A network of two linear layers with biases, over all rows, is what `masked=False` computes."
    pooling, network = make(AttentionPooling, F, 5, masked=False), make(nn.Sequential, nn.Linear(F, 5), nn.Linear(5, 1))
    pooling.load_state_dict({"first.weight": network[0].weight, "second.weight": network[1].weight})
    assert network[0].bias.abs().sum() > .1 and network[1].bias.abs() > .01
    expected = network(sentences).squeeze(-1).softmax(-1)
    torch.testing.assert_close(pooling.weights(sentences, NO_SENTENCE), expected, **CLOSE)
    torch.testing.assert_close(pooling(sentences, NO_SENTENCE), (expected[..., None] * sentences).sum(1), **CLOSE)


@pytest.mark.parametrize("masked", [True, False])
def test_an_item_with_nothing_is_zero_and_teaches_nothing(sentences, masked):
    pooling = make(AttentionPooling, F, masked=masked)
    e = pooling(sentences, NO_SENTENCE)
    assert e.isfinite().all() and not e[3].any()
    e[3].sum().backward(retain_graph=True)
    for weight in pooling.parameters(): assert not weight.grad.any()
    e.square().sum().backward()
    for weight in pooling.parameters(): assert weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pooling_of_nothing_is_finite_in_every_precision(sentences, dtype):
    pooling = make(AttentionPooling, F).to(dtype)
    x = sentences.to(dtype)
    weights, e = pooling.weights(x, NO_SENTENCE), pooling(x, NO_SENTENCE)
    assert e.dtype == dtype and e.isfinite().all() and not e[3].any()
    assert not weights[NO_SENTENCE & (COUNTS > 0)[:, None]].any()


def test_what_stands_at_masked_padding_does_not_matter(sentences):
    pooling, other = make(AttentionPooling, F), sentences.clone()
    other[NO_SENTENCE] = 1e4
    torch.testing.assert_close(pooling(other, NO_SENTENCE)[:3], pooling(sentences, NO_SENTENCE)[:3], **CLOSE)


def test_order_and_more_padding_do_not_matter(sentences):
    pooling = make(AttentionPooling, F)
    expected = pooling(sentences, NO_SENTENCE)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(pooling(sentences[:, order], NO_SENTENCE[:, order]), expected, **CLOSE)
    torch.testing.assert_close(pooling.weights(sentences[:, order], NO_SENTENCE[:, order])[:3],
                               pooling.weights(sentences, NO_SENTENCE)[:3, order], **CLOSE)
    wider = torch.cat([sentences, torch.zeros(4, 3, F, dtype=torch.float64)], 1)
    wider_pad = torch.cat([NO_SENTENCE, torch.ones(4, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(pooling(wider, wider_pad), expected, **CLOSE)
    torch.testing.assert_close(pooling(sentences[:, :1], NO_SENTENCE[:, :1])[2], sentences[2, 0], **CLOSE)
    legacy = make(AttentionPooling, F, masked=False)  # there, each row of zeros takes from the others
    assert (legacy(wider, wider_pad)[:3].norm(dim=1) < .95 * legacy(sentences, NO_SENTENCE)[:3].norm(dim=1)).all()


def test_pooling_is_trained_or_not(sentences):
    features = sentences.clone().requires_grad_()
    frozen = make(AttentionPooling, F, trained=False)
    assert not any(weight.requires_grad for weight in frozen.parameters()) and set(frozen.state_dict())
    frozen(features, NO_SENTENCE).square().sum().backward()
    assert features.grad.any() and all(weight.grad is None for weight in frozen.parameters())
    trained = make(AttentionPooling, F)
    torch.testing.assert_close(trained(sentences, NO_SENTENCE), frozen(sentences, NO_SENTENCE), **CLOSE)
    x = sentences.clone().requires_grad_()
    first, second = trained.first.weight, trained.second.weight
    def pool(x, first, second):
        p = {"first.weight": first, "second.weight": second}
        return torch.func.functional_call(trained, p, (x, NO_SENTENCE))
    assert torch.autograd.gradcheck(pool, (x, first, second))


def experts(n_experts=3, dropout=0.0):
    "Experts with lively weights, norms and gate."
    return make(MixtureOfExperts, F, D, n_experts, dropout)


def slow_experts(f, p, n_experts):
    "One item, one expert after the other, each with its own matrix and normalisation."
    logits = [sum(f[i] * p["gate"][i, g] for i in range(len(f))) for g in range(n_experts)]
    z = np.zeros(D)
    for g in range(n_experts):
        rows = slice(g * D, (g + 1) * D)
        answer = p["experts.weight"][rows] @ f + p["experts.bias"][rows]
        answer = slow_norm(answer, {"n.weight": p["scale"][g], "n.bias": p["shift"][g]}, "n")
        z += np.exp(logits[g]) / sum(map(np.exp, logits)) * answer
    return z


@pytest.mark.parametrize("n_experts", [1, 3, 8])
def test_experts_equal_loops(n_experts):
    module, f = experts(n_experts), torch.randn(5, F, dtype=torch.float64)
    p = numbers(module)
    if n_experts > 1: assert module.gates(f).std(0).min() > .02, "the gate looks at the item"
    torch.testing.assert_close(module.gates(f).sum(1), torch.ones(5, dtype=torch.float64), **CLOSE)
    slow = np.stack([slow_experts(row.numpy(), p, n_experts) for row in f])
    np.testing.assert_allclose(module(f).detach(), slow, **CLOSE)
    assert module(f[:0]).shape == (0, D)


def test_experts_equal_separate_modules():
    "G small networks of PyTorch's own layers, and a gate on top."
    module, f = experts(), torch.randn(5, F, dtype=torch.float64)
    answers = []
    for g in range(3):
        linear, norm = nn.Linear(F, D).double(), nn.LayerNorm(D, eps=1e-12).double()
        linear.load_state_dict({name: x.unflatten(0, (3, D))[g] for name, x in module.experts.state_dict().items()})
        norm.load_state_dict({"weight": module.scale[g], "bias": module.shift[g]})
        answers.append(norm(linear(f)))
    expected = sum(module.gates(f)[:, g, None] * answer for g, answer in enumerate(answers))
    torch.testing.assert_close(module(f), expected, **CLOSE)


def test_all_experts_are_asked_alike_at_first():
    set_seed(0)
    module, f = MixtureOfExperts(F, D), 100 * torch.randn(7, F)
    for each in (module, init_weights(module)):
        assert not each.gate.any()
        torch.testing.assert_close(each.gates(f), torch.full((7, 8), 1 / 8))
        assert each.scale.eq(1).all() and not each.shift.any() and each.experts.weight.any()
    module.eval()(f).square()[:, 0].sum().backward()
    assert module.gate.grad.abs().sum() > 0, "zero is a start, not a trap"


def test_experts_gradients_equal_finite_differences():
    module, f = experts(), torch.randn(3, F, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters())
    assert set(names) == {"experts.weight", "experts.bias", "scale", "shift", "gate"}
    ask = lambda f, *values: torch.func.functional_call(module, dict(zip(names, values)), (f,))
    assert torch.autograd.gradcheck(ask, (f, *values))


def test_experts_drop_in_training_only_and_before_the_norm():
    module, f = experts(dropout=.5), torch.randn(50, F, dtype=torch.float64)
    assert not torch.equal(module.train()(f), module.train()(f))
    torch.testing.assert_close(module.eval()(f), module.eval()(f), rtol=0, atol=0)
    torch.testing.assert_close(module.eval()(f), experts(dropout=0.0)(f), rtol=0, atol=0)
    everything = experts(dropout=1.0).train()  # a norm of zeros is zero: only the shifts are left
    torch.testing.assert_close(everything(f), everything.gates(f) @ everything.shift, **CLOSE)


def whitening(n_experts=3, dropout=0.0):
    "Experts with lively weights, centres and gate."
    return make(WhiteningExperts, F, D, n_experts, dropout)


def slow_whitening(f, p, n_experts, gates=None):
    "One item `[F]`, or one input of each expert `[G, F]`."
    if gates is None:
        logits = [sum(f[i] * p["gate"][i, g] for i in range(F)) for g in range(n_experts)]
        gates = [np.exp(z) / sum(map(np.exp, logits)) for z in logits]
    inputs = np.broadcast_to(f, (n_experts, F))
    z = np.zeros(D)
    for g in range(n_experts):
        for d in range(D):
            z[d] += gates[g] * sum(p["experts.weight"][g * D + d, i] * (inputs[g, i] - p["center"][g, i]) for i in range(F))
    return z


@pytest.mark.parametrize("n_experts", [1, 3])
def test_whitening_experts_equal_loops(n_experts):
    module, f = whitening(n_experts, dropout=.5), torch.randn(5, F, dtype=torch.float64)
    if n_experts > 1: assert module.gates(f).std(0).min() > .02, "the gate looks at the item"
    slow = np.stack([slow_whitening(row.numpy(), numbers(module), n_experts) for row in f])
    np.testing.assert_allclose(module(f).detach(), slow, **CLOSE)
    assert module(f[:0]).shape == (0, D) and module.train()(f[:0]).shape == (0, D)


def test_whitening_experts_in_training_equal_loops(monkeypatch):
    "Every expert has its own dropout, before its centre is subtracted; the gate has noise and sees all numbers."
    module, f = whitening(dropout=.5).train(), torch.randn(5, F, dtype=torch.float64)
    seen, drop = [], module.dropout.forward
    monkeypatch.setattr(module.dropout, "forward", lambda x: seen.append(drop(x)) or seen[-1])
    torch.manual_seed(3)
    found = module(f).detach()
    dropped = torch.stack(seen)
    assert dropped.shape == (3, 5, F)
    for a, b in ((0, 1), (0, 2), (1, 2)): assert not torch.equal(dropped[a] == 0, dropped[b] == 0)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (2 * f.expand(3, -1, -1))[kept], **CLOSE)
    torch.manual_seed(3)
    n, p = torch.randn(5, 3, dtype=torch.float64), numbers(module)
    spread = np.log1p(np.exp(f.numpy() @ p["gate_noise"])) + .01
    logits = f.numpy() @ p["gate"] + n.numpy() * spread
    gates = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    slow = np.stack([slow_whitening(dropped[:, row].numpy(), p, 3, gates[row]) for row in range(5)])
    np.testing.assert_allclose(found, slow, **CLOSE)


def test_whitening_experts_without_dropout_take_one_path():
    "Training without dropout differs from evaluation by the gate's noise alone; without both, it does not differ."
    module, f = whitening(dropout=0.0), torch.randn(5, F, dtype=torch.float64)
    expected, quiet = module(f), module.gates(f)
    assert not torch.equal(module.train()(f), expected)
    module.gates = lambda features: quiet
    torch.testing.assert_close(module(f), expected, **CLOSE)
    calm = WhiteningExperts(F, D, 3, 0.0, noisy=False).double()
    assert set(calm.state_dict()) == {"experts.weight", "center", "gate"}
    torch.testing.assert_close(calm.train()(f), calm.eval()(f), **CLOSE)


def test_whitening_dropout_keeps_the_mean():
    module, f = whitening(dropout=.2), torch.randn(1, F, dtype=torch.float64)
    expected, quiet = module(f), module.gates(f)
    module.gates = lambda features: quiet.expand(len(features), -1)
    torch.testing.assert_close(module.train()(f.expand(40_000, -1)).mean(0, keepdim=True), expected, rtol=0, atol=.03)


def test_whitening_experts_start_even_quiet_and_without_centre():
    module, f = WhiteningExperts(F, D), torch.randn(7, F)
    assert count(module) == 8 * (F * D + F) + 2 * F * 8
    for each in (module, init_weights(module)):
        assert not (each.gate.any() or each.gate_noise.any() or each.center.any()) and each.experts.weight.any()
        torch.testing.assert_close(each.eval().gates(f), torch.full((7, 8), 1 / 8))
        noisy = each.train().gates(f.repeat(2000, 1)).log()
        spread = (noisy - noisy.mean(1, keepdim=True)).std() * (8 / 7) ** .5
        assert spread.item() == pytest.approx(.7031, rel=.02)
    module(f)[:, 0].square().sum().backward()
    assert all(weight.grad.any() for weight in module.parameters()), "zero is a start, not a trap"


def test_whitening_gradients_equal_finite_differences():
    module, f = whitening(), torch.randn(3, F, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters())
    assert set(names) == {"experts.weight", "center", "gate", "gate_noise"}
    ask = lambda f, *values: torch.func.functional_call(module, dict(zip(names, values)), (f,))
    assert torch.autograd.gradcheck(ask, (f, *values))
    module.train()
    module.dropout.p = .5
    def again(f, *values):
        torch.manual_seed(0)
        return ask(f, *values)
    assert torch.autograd.gradcheck(again, (f, *values))


def test_whitening_experts_in_sixteen_bits():
    module, f = whitening(dropout=.2).float(), torch.randn(5, F)
    expected = module(f)
    with torch.autocast("cpu", torch.bfloat16):
        assert (module(f).float() - expected).abs().max() < .03 * expected.abs().max()
        assert module.train()(f).isfinite().all()
    module = module.eval().to(torch.bfloat16)
    assert (module(f.bfloat16()).float() - expected).abs().max() < .03 * expected.abs().max()
    assert module.train()(f.bfloat16()).dtype == torch.bfloat16


def content(text=True, image=True, catalogue=None):
    module = make(ContentEmbedding, TEXT_SIZE if text else None, IMAGE_SIZE if image else None, D)
    module.set_catalogue(catalogue or make_catalogue())
    return module.double()


def slow_content(module, catalogue, row):
    "The vector of one item, by hand: mean over what there is, linear map, normalisation, sum."
    vector, p = np.zeros(D), numbers(module)
    for name in module.adapters:
        table, pad = getattr(catalogue, f"{name}_emb"), getattr(catalogue, f"{name}_pad_mask")
        there = [table[row, k].double().numpy() for k in range(table.shape[1]) if not pad[row, k]]
        if there:
            mean = np.float32(sum(there) / len(there)).astype(float)
            mean = (mean - p[f"adapters.{name}.centring.center"]) / p[f"adapters.{name}.centring.spread"]
            vector += slow_norm(slow_linear(mean, p, f"adapters.{name}.linear"), p, f"adapters.{name}.norm")
    return vector


@pytest.mark.parametrize("text, image", [(True, True), (True, False), (False, True)])
def test_content_equals_loops(text, image):
    catalogue, module = make_catalogue(), content(text, image)
    slow = np.stack([slow_content(module, catalogue, row) for row in range(V + 1)])
    np.testing.assert_allclose(module(torch.arange(V + 1)).detach(), slow, rtol=0, atol=1e-6)
    assert not module(torch.tensor([0, NOTHING])).any(), "padding and items with nothing are zero"
    order = torch.tensor([7, 2, 2, 0])
    torch.testing.assert_close(module(order), module(torch.arange(V + 1))[order], **CLOSE)


def test_centre_and_spread_come_from_the_given_items_that_have_the_modality():
    catalogue, module, ids = make_catalogue(), content(), [1, 2, NO_IMAGE, NO_TEXT, NOTHING]
    module.fit_statistics(torch.tensor(ids))
    for name, absent in (("text", NO_TEXT), ("image", NO_IMAGE)):
        rows = [getattr(catalogue, f"mean_{name}")()[i].double().numpy() for i in ids if i not in (absent, NOTHING)]
        centre, centring = sum(rows) / len(rows), module.adapters[name].centring
        spread = np.sqrt(np.mean([(row - centre) ** 2 for row in rows]))
        np.testing.assert_allclose(centring.center, centre, rtol=0, atol=1e-6)
        assert centring.spread.item() == pytest.approx(spread, abs=1e-6)
    slow = np.stack([slow_content(module, catalogue, row) for row in range(V + 1)])
    np.testing.assert_allclose(module(torch.arange(V + 1)).detach(), slow, rtol=0, atol=1e-6)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    module.fit_statistics(torch.arange(1, V + 1))  # once and for all: other items must fit the same weights
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


@pytest.mark.parametrize("ids", [[], [NOTHING], [1], [1, 1, 1]])
def test_nothing_to_fit_statistics_to_gives_finite_vectors(ids):
    module = content()
    module.fit_statistics(torch.tensor(ids, dtype=torch.long))
    assert module(torch.arange(V + 1)).isfinite().all()


def test_a_missing_modality_adds_nothing_and_gets_no_gradient():
    module = content()
    for row, absent in ((NO_IMAGE, ["image"]), (NO_TEXT, ["text"]), (NOTHING, ["text", "image"])):
        module.zero_grad()
        module(torch.tensor([row])).square().sum().backward()
        for name, adapter in module.adapters.items():
            moved = any(x.grad is not None and x.grad.any() for x in adapter.parameters())
            assert moved == (name not in absent), (row, name)
        for name in absent:  # whatever stands in the table there
            before = module(torch.tensor([row]))
            getattr(module, f"{name}_features")[row] = 1e4
            torch.testing.assert_close(module(torch.tensor([row])), before, **CLOSE)


def test_content_of_another_size_is_refused():
    catalogue = make_catalogue()
    for sizes, message in (((7, None), "expects text features of 7 numbers, the catalogue has 6 numbers"),
                           ((None, 4), "expects image features of 4 numbers, the catalogue has 5 numbers")):
        with pytest.raises(ValueError, match=message): ContentEmbedding(*sizes, D).set_catalogue(catalogue)
    only_text = catalogue_from_arrays(["a"], np.ones((1, TEXT_SIZE)))
    with pytest.raises(ValueError, match="expects image features of 5 numbers, the catalogue has none"):
        ContentEmbedding(TEXT_SIZE, IMAGE_SIZE, D).set_catalogue(only_text)
    with pytest.raises(ValueError, match="text_size, image_size or both"): ContentEmbedding(None, None, D)


def test_a_refused_catalogue_leaves_the_old_one():
    "Text would fit, pictures do not: nothing may be half exchanged."
    module = content()
    before = module(torch.arange(V + 1))
    wrong = catalogue_from_arrays(["a", "b"], np.ones((2, TEXT_SIZE)), np.ones((2, IMAGE_SIZE + 1)))
    with pytest.raises(ValueError, match="image features"): module.set_catalogue(wrong)
    torch.testing.assert_close(module(torch.arange(V + 1)), before, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_take_the_type_of_the_weights(dtype):
    module = ContentEmbedding(TEXT_SIZE, IMAGE_SIZE, D).to(dtype)
    module.set_catalogue(make_catalogue(dtype="float16"))
    assert module(torch.tensor([1, NOTHING])).dtype == dtype


def test_tables_are_not_among_the_weights():
    assert not any("features" in name or "missing" in name for name in content().state_dict())


def test_wrong_sizes_are_named(x):
    with pytest.raises(ValueError, match=r"hidden_size \(8\) must be a multiple of n_heads \(3\)"): MultiHeadAttention(8, 3)
    module = encoder()
    with pytest.raises(ValueError, match="a history of 8 items is longer than max_len = 7"):
        module(torch.zeros(1, 8, D, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(L\).*must be 5, got 4"): module(x, PAD[:, :4])
    with pytest.raises(ValueError, match=r"\(B\).*must be 3, got 2"): module(x, PAD[:2])
    with pytest.raises(ValueError, match="3 axes"): module(x[0], PAD)


# Dropout

@pytest.mark.parametrize("p", [.1, .2, .5, .9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dropout_zeroes_its_share_and_scales_the_others(p, dtype):
    set_seed(0)
    x, level = torch.full((401, 499), 2., dtype=dtype, requires_grad=True), round(p * 2 ** 16)
    y = Dropout(p)(x)
    expected = torch.tensor(2., dtype=dtype) * (2 ** 16 / (2 ** 16 - level))
    assert y.dtype == dtype and sorted(y.unique().tolist()) == [0, expected.item()]
    share = (y == 0).double().mean().item()
    assert abs(share - level / 2 ** 16) < 5 * (p * (1 - p) / y.numel()) ** .5
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0), "the gradient passes where the number passed"
    torch.testing.assert_close(x.grad * 2, y.detach())


def test_dropout_decisions_are_independent_and_follow_the_seed():
    x, draws = torch.ones(50_000, 4), []
    for seed in (1, 1, 2):
        set_seed(seed)
        draws.append(Dropout(.5)(x) > 0)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    found = torch.corrcoef(draws[0].double().T) - torch.eye(4, dtype=torch.double)
    assert found.abs().max() < .03, "the four decisions of one draw know nothing of each other"
    assert abs(torch.corrcoef(torch.stack([draws[0].flatten()[:-1], draws[0].flatten()[1:]]).double())[0, 1]) < .02


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (0, 4), (2, 3, 5)], ids=str)
def test_dropout_takes_any_shape(shape):
    assert Dropout(.5)(torch.ones(shape)).shape == shape


def test_dropout_at_the_ends_and_outside_training():
    x = torch.randn(100)
    assert torch.equal(Dropout(0.)(x), x) and not Dropout(1.)(x).any() and torch.equal(Dropout(.5).eval()(x), x)
    with pytest.raises(ValueError, match="between 0 and 1"): Dropout(1.5)


def test_dropout_of_a_transposed_tensor_keeps_its_places():
    set_seed(0)
    x = torch.arange(1., 13).view(3, 4).T
    y = Dropout(.5)(x)
    assert torch.equal(y[y != 0], 2 * x[y != 0])


# Histories in pieces, attention between any queries and keys

@pytest.mark.parametrize("piece_cost", [0, 5, None])
def test_encode_ends_reads_each_history_at_its_end(piece_cost):
    encoder = SequenceEncoder(8, inner_size=8).eval()
    batch = collate([[1], [1, 2, 3], [4, 5], [1, 2, 3, 4, 5, 6], [7]], 10)
    x = torch.randn(*batch.item_seq.shape, 8)
    found = encode_ends(encoder, x, batch, piece_cost)
    for row, n in enumerate(batch.item_seq_len.tolist()):
        torch.testing.assert_close(found[row], encoder(x[row:row + 1, :n], batch.item_pad_mask[row:row + 1, :n])[0, -1])


@pytest.mark.parametrize("causal", [False, True])
def test_open_attention_equals_the_library(causal):
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    pad_mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    y, weights = open_attention(q, k, v, pad_mask, causal, nn.Identity())
    visible = torch.ones(5, 5).tril().bool() if causal else ~pad_mask[:, None, None]
    torch.testing.assert_close(y, nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible))
    torch.testing.assert_close(weights @ v, y)
    assert not weights.masked_select(~visible).any()
    assert not drops_openly(nn.Dropout(.1).eval(), q) and not drops_openly(nn.Dropout(0.), q) and drops_openly(nn.Dropout(.1), q)
    assert not drops_openly(nn.Dropout(.1), q.to("meta"))
