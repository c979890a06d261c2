"The interest-aware decoder against loops, against `torch.nn.Transformer`, and where there is nothing to look at."
import numpy as np
import pytest
import torch
from torch import nn

from mmseqrec.core import set_seed
from mmseqrec.blocks.interest_decoder import ContextBlock, CrossAttention, InterestDecoderBlock, InterestEncoderDecoder
from slow_missrec import read
from slow_streams import numbers

CLOSE = dict(rtol=0, atol=1e-9)
D, H, I = 12, 4, 10
LENGTHS, COUNTS = [5, 1, 3, 2], [4, 1, 0, 2]  # items and interests of each row; one has no interest

each_depth = pytest.mark.parametrize("n_layers", [2, 4])


def shaken(module, seed=0, std=.4):
    "In 64 bits, with random numbers in every weight, in evaluation mode."
    generator, module = torch.Generator().manual_seed(seed), module.double().eval()
    with torch.no_grad():
        for x in module.parameters(): x.copy_(std * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        for part in module.modules():
            if isinstance(part, nn.LayerNorm): part.weight += 1
    return module


def model(n_layers=2, dropout=0., n_heads=H): return shaken(InterestEncoderDecoder(D, n_layers, n_heads, I, dropout))


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pad_mask(counts, width=None): return torch.arange(max(counts) if width is None else width) >= torch.tensor(counts)[:, None]


def inputs(lengths=LENGTHS, counts=COUNTS, seed=0):
    item_pad_mask, interest_pad_mask = pad_mask(lengths), pad_mask(counts, max(*counts, 1))
    return normal(*item_pad_mask.shape, D, seed=seed), item_pad_mask, normal(*interest_pad_mask.shape, D, seed=seed + 1), interest_pad_mask


# Loops

@each_depth
def test_everything_equals_loops(n_layers):
    module, (x, item_pad_mask, interests, interest_pad_mask) = model(n_layers), inputs()
    y, context = module(x, item_pad_mask, interests, interest_pad_mask)
    p = numbers(module)
    for row, (length, count) in enumerate(zip(LENGTHS, COUNTS)):
        slow, slow_context = read(p, x[row, :length].numpy(), interests[row, :count].numpy(), H)
        np.testing.assert_allclose(y[row, :length].detach(), slow, rtol=0, atol=1e-9)
        np.testing.assert_allclose(context[row, :count].detach(), slow_context.reshape(count, D), rtol=0, atol=1e-9)


# The library

@torch.no_grad()
def library(module, n_heads=H):
    "A `torch.nn.Transformer` with the weights of `module`, by the names of both."
    n = len(module.encoder)
    theirs = nn.Transformer(D, n_heads, n, n, I, .5, "gelu", layer_norm_eps=1e-12, batch_first=True).double().eval()
    own, state = module.state_dict(), {}
    for kind in ("weight", "bias"):
        for i in range(n):
            for side, names in (("encoder", {"self_attn": "attention"}), ("decoder", {"self_attn": "self_attention", "multihead_attn": "cross_attention"})):
                here = f"{side}.{i}"
                for their, our in names.items():
                    parts = ["query_key_value"] if side == "encoder" else ["query", "key_value"]
                    stacked = torch.cat([own[f"{here}.{our}.{part}.{kind}"] for part in parts])
                    state[f"{side}.layers.{i}.{their}.in_proj_{kind}"] = stacked
                    state[f"{side}.layers.{i}.{their}.out_proj.{kind}"] = own[f"{here}.{our}.output.{kind}"]
                for place, linear in ((0, "linear1"), (3, "linear2")):
                    state[f"{side}.layers.{i}.{linear}.{kind}"] = own[f"{here}.feed_forward.{place}.{kind}"]
            norms = {"encoder": ("attention_norm", "feed_forward_norm"), "decoder": ("norms.0", "norms.1", "norms.2")}
            for side, ours in norms.items():
                for place, our in enumerate(ours, 1): state[f"{side}.layers.{i}.norm{place}.{kind}"] = own[f"{side}.{i}.{our}.{kind}"]
        for side in ("encoder", "decoder"): state[f"{side}.norm.{kind}"] = own[f"{side}_norm.{kind}"]
    theirs.load_state_dict(state)
    assert sum(x.numel() for x in theirs.parameters()) == sum(x.numel() for x in module.parameters())
    return theirs


def both_ways(module, theirs, seed=0):
    "Outputs at real positions, and gradients of the inputs, ours and theirs; every row has interests."
    found = []
    for kind in (module, theirs):
        x, item_pad_mask, interests, interest_pad_mask = inputs(counts=[4, 1, 3, 2], seed=seed)
        x.requires_grad_(), interests.requires_grad_()
        if kind is module: y, _ = module(x, item_pad_mask, interests, interest_pad_mask)
        else: y = theirs(interests, x, src_key_padding_mask=interest_pad_mask, tgt_key_padding_mask=item_pad_mask,
                         memory_key_padding_mask=interest_pad_mask)
        y = y[~item_pad_mask]
        factor = normal(*y.shape, seed=9)
        found.append((y, *torch.autograd.grad((y * factor).sum(), [x, interests])))
    return found


@each_depth
@pytest.mark.parametrize("n_heads", [2, 4])
def test_the_library_computes_the_same(n_layers, n_heads):
    module = model(n_layers, n_heads=n_heads)
    for ours, theirs in zip(*both_ways(module, library(module, n_heads))): torch.testing.assert_close(ours, theirs, **CLOSE)


def test_dropout_is_where_the_library_has_it():
    "The same places in each block, all of one rate."
    module = InterestEncoderDecoder(D, 2, H, I, .37)
    rates = [part.p for part in module.modules() if isinstance(part, nn.Dropout)]
    rates += [part.dropout for part in module.modules() if isinstance(getattr(part, "dropout", None), float)]
    theirs = nn.Transformer(D, H, 1, 1, I, .37, "gelu", batch_first=True)
    places = lambda block: (isinstance(block.feed_forward[2], nn.Dropout), len(block.feed_forward))
    assert set(rates) == {.37} and places(module.encoder[0]) == places(module.decoder[0]) == (True, 4)
    library_rates = [part.p for part in theirs.modules() if isinstance(part, nn.Dropout)]
    library_rates += [part.dropout for part in theirs.modules() if isinstance(part, nn.MultiheadAttention)]
    # theirs has one module for each residual; ours shares one in a block
    assert len(library_rates) == 2 + 3 + 2 + 3 and len(rates) == 2 + 2 + 1 + 2


@pytest.mark.parametrize("place", range(7))
def test_each_dropout_acts_in_training_only(place):
    module, given = model(dropout=0.), inputs()
    parts = [part for part in module.modules() if isinstance(part, nn.Dropout) or isinstance(getattr(part, "dropout", None), float)]
    assert len(parts) == 7
    calm, _ = module(*given)
    if isinstance(parts[place], nn.Dropout): parts[place].p = .5
    else: parts[place].dropout = .5
    torch.testing.assert_close(module(*given)[0], calm, **CLOSE)
    set_seed(0)
    assert not torch.allclose(module.train()(*given)[0], calm)


# Nothing to look at

@each_depth
@pytest.mark.parametrize("return_attention", [False, True], ids=["fused", "open"])
def test_rows_without_interests_give_numbers_and_finite_gradients(n_layers, return_attention):
    module, (x, item_pad_mask, interests, interest_pad_mask) = model(n_layers), inputs()
    x.requires_grad_(), interests.requires_grad_()
    y, context, *_ = module(x, item_pad_mask, interests, interest_pad_mask, return_attention)
    assert y.isfinite().all() and context.isfinite().all()
    gradients = torch.autograd.grad(y[2, :3].square().sum(), [x, interests, *module.parameters()], retain_graph=True, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert gradients[0][2, :3].any() and not gradients[0][[0, 1, 3]].any() and not gradients[1].any()
    named = dict(zip((name for name, _ in module.named_parameters()), gradients[2:]))
    for name, g in named.items():
        silent = name.startswith("encoder") or ".cross_attention." in name
        assert (g is None or not g.any()) == silent, name
    y[~item_pad_mask].square().sum().backward()
    assert interests.grad.isfinite().all() and not interests.grad[interest_pad_mask].any()


def test_a_row_without_interests_is_read_without_cross_attention():
    module, given = model(), inputs(counts=[0, 0, 0, 0])
    y, _ = module(*given)
    with torch.no_grad():
        for part in (module.decoder[0].cross_attention.output.weight, module.decoder[0].cross_attention.output.bias): part.zero_()
    torch.testing.assert_close(y, module(*inputs())[0], **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_attention_to_nothing_is_zero(training):
    attention = shaken(CrossAttention(D, H, .5 if training else 0.)).train(training)
    x, context = normal(2, 3, D), normal(2, 4, D, seed=1)
    empty = torch.tensor([[True] * 4, [False, True, False, True]])
    y, weights = attention(x, context, empty, return_attention=True)
    assert not y[0].any() and not weights[0].any() and y[1].any() and attention.output.bias.all()
    assert not attention(x, context, empty)[0].any()
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(H, 3, dtype=torch.float64), **CLOSE)
    assert not weights[1][..., [1, 3]].any()


# What must not matter

def test_padding_and_other_rows_do_not_matter():
    module, (x, item_pad_mask, interests, interest_pad_mask) = model(4), inputs()
    y, context = module(x, item_pad_mask, interests, interest_pad_mask)
    for row, (length, count) in enumerate(zip(LENGTHS, COUNTS)):
        alone, own = module(x[row:row + 1, :length], item_pad_mask[row:row + 1, :length], interests[row:row + 1, :max(count, 1)],
                            interest_pad_mask[row:row + 1, :max(count, 1)])
        torch.testing.assert_close(alone[0], y[row, :length], **CLOSE)
        torch.testing.assert_close(own[0, :count], context[row, :count], **CLOSE)
    x[item_pad_mask], interests[interest_pad_mask] = 1e3, -1e3
    torch.testing.assert_close(module(x, item_pad_mask, interests, interest_pad_mask)[0][~item_pad_mask], y[~item_pad_mask], **CLOSE)


def test_the_order_of_interests_does_not_matter_and_that_of_items_only_to_themselves():
    module, (x, item_pad_mask, interests, interest_pad_mask) = model(4), inputs([5], [4])
    y, _ = module(x, item_pad_mask, interests, interest_pad_mask)
    turned, _ = module(x, item_pad_mask, interests[:, [2, 0, 3, 1]], interest_pad_mask)
    torch.testing.assert_close(turned, y, **CLOSE)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(module(x[:, order], item_pad_mask, interests, interest_pad_mask)[0], y[:, order], **CLOSE)


def test_it_looks_both_ways():
    module, given = model(), inputs([4], [2])
    x = given[0].requires_grad_()
    module(*given)[0][0, 0].sum().backward()
    assert x.grad.abs().amax(-1).all(), "the first position sees the last"


# Asked positions and weights

@each_depth
def test_asked_positions_have_the_same_numbers_and_gradients(n_layers):
    module, asked, found = model(n_layers), torch.tensor([length - 1 for length in LENGTHS]), []
    for some in (None, asked):
        x, item_pad_mask, interests, interest_pad_mask = inputs()
        x.requires_grad_(), interests.requires_grad_()
        y, context = module(x, item_pad_mask, interests, interest_pad_mask, asked=some)
        assert y.shape == ((4, 5, D) if some is None else (4, 1, D))
        u = y[torch.arange(4), asked] if some is None else y[:, 0]
        loss = (u * normal(4, D, seed=5)).sum() + context[~interest_pad_mask].square().sum()
        found.append((u, *torch.autograd.grad(loss, [x, interests, *module.parameters()])))
    for whole, some in zip(*found): torch.testing.assert_close(whole, some, **CLOSE)


@each_depth
def test_shown_weights_are_the_used_ones(n_layers):
    module, (x, item_pad_mask, interests, interest_pad_mask) = model(n_layers), inputs()
    y, context, weights = module(x, item_pad_mask, interests, interest_pad_mask, return_attention=True)
    for a, b in zip((y, context), module(x, item_pad_mask, interests, interest_pad_mask)): torch.testing.assert_close(a, b, **CLOSE)
    n = n_layers // 2
    assert {side: [tuple(w.shape) for w in found] for side, found in weights.items()} == {
        "context": [(4, H, 4, 4)] * n, "items": [(4, H, 5, 5)] * n, "interests": [(4, H, 5, 4)] * n}
    for items, to_interests in zip(weights["items"], weights["interests"]):
        torch.testing.assert_close(items.sum(-1), torch.ones(4, H, 5, dtype=torch.float64), **CLOSE)
        assert not items.masked_select(item_pad_mask[:, None, None]).any()
        sums = (torch.tensor(COUNTS) > 0).double()[:, None, None].expand(4, H, 5)
        torch.testing.assert_close(to_interests.sum(-1), sums, **CLOSE)
        assert not to_interests.masked_select(interest_pad_mask[:, None, None]).any()
    with_asked = module(x, item_pad_mask, interests, interest_pad_mask, True, torch.tensor([4, 0, 2, 1]))[2]
    torch.testing.assert_close(with_asked["interests"][-1][:, :, 0], weights["interests"][-1][torch.arange(4), :, [4, 0, 2, 1]], **CLOSE)


def test_attention_shows_what_it_computes_by_values():
    "Weights times values, through the output matrix, is the answer."
    attention, x, context, pad = shaken(CrossAttention(D, H)), normal(2, 3, D), normal(2, 4, D, seed=1), pad_mask([4, 2])
    y, weights = attention(x, context, pad, return_attention=True)
    values = attention.key_value(context)[..., D:].unflatten(-1, (H, -1))
    slow = torch.einsum("bhlq,bqhd->blhd", weights, values).flatten(2) @ attention.output.weight.T + attention.output.bias
    torch.testing.assert_close(y, slow, **CLOSE)
    torch.testing.assert_close(attention(x, context, pad), slow, **CLOSE)


# Gradients, precision, sizes

def test_gradients_equal_finite_differences():
    module, (x, item_pad_mask, interests, interest_pad_mask) = shaken(InterestEncoderDecoder(4, 2, 2, 3, 0.)), inputs([3, 1], [2, 0])
    x, interests = x[..., :4].contiguous(), interests[..., :4].contiguous()
    ask = lambda x, interests: module(x, item_pad_mask, interests, interest_pad_mask)[0][~item_pad_mask]
    assert torch.autograd.gradcheck(ask, (x.requires_grad_(), interests.requires_grad_()))


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.bfloat16, .2)])
def test_fewer_bits_give_about_the_same(dtype, close):
    given = inputs()
    expected = model()(*given)[0]
    found = model().to(dtype)(*(x.to(dtype) if x.is_floating_point() else x for x in given))[0]
    assert found.dtype == dtype and (found.double() - expected)[~given[1]].abs().max() < close


def test_blocks_by_themselves():
    context, decoder = shaken(ContextBlock(D, H, I, .3)), shaken(InterestDecoderBlock(D, H, I, .3))
    x, item_pad_mask, interests, interest_pad_mask = inputs(counts=[4, 1, 3, 2])
    assert context(interests, interest_pad_mask).shape == interests.shape
    y, nothing = decoder(x, x, item_pad_mask, interests, interest_pad_mask)
    some, weights = decoder(x[:, 1:3], x, item_pad_mask, interests, interest_pad_mask, return_attention=True)
    torch.testing.assert_close(some, y[:, 1:3], **CLOSE)
    assert nothing == () and [tuple(w.shape) for w in weights] == [(4, H, 2, 5), (4, H, 2, 4)]


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_layers_are_split_in_half(n_layers):
    with pytest.raises(ValueError, match=f"n_layers must be even and at least 2.*got {n_layers}"): InterestEncoderDecoder(D, n_layers)


def test_wrong_shapes_are_named():
    module, (x, item_pad_mask, interests, interest_pad_mask) = model(), inputs()
    with pytest.raises(ValueError, match=r"axis 1 \(L\).*must be 5, got 4"): module(x, item_pad_mask[:, :4], interests, interest_pad_mask)
    with pytest.raises(ValueError, match=r"axis 2 \(D\)"): module(x, item_pad_mask, interests[..., :4], interest_pad_mask)
    with pytest.raises(ValueError, match=r"axis 1 \(Q\)"): module(x, item_pad_mask, interests, interest_pad_mask[:, :2])
    for kind in (CrossAttention, lambda *sizes: InterestEncoderDecoder(sizes[0], n_heads=sizes[1])):
        with pytest.raises(ValueError, match="must be a multiple of n_heads"): kind(10, 4)
