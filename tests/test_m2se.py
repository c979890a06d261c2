"The two item encoders and the Transformer they share, against loops; large batches in pieces against one batch."
import numpy as np
import pytest
import torch

from mmseqrec.core import set_seed
from mmseqrec.data.sequences import collate, position_batches
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.blocks.layers import encode_ends
from mmseqrec.models.m2se import M2SE, ItemStreams, ModalityEncoder
from slow_streams import item_vector, item_vectors, numbers, read_both
from small_world import IMAGE_SIZE, NO_IMAGE, NO_TEXT, NOTHING, TEXT_SIZE, V, make_catalogue, make_store, same, weights

CLOSE = dict(rtol=0, atol=1e-9)
D, ALL = 8, torch.arange(1, V + 1)
SMALL = dict(hidden_size=D, n_layers=2, n_heads=2, inner_size=12, max_len=10, n_experts=3)
HISTORIES = [[4, 9, 2, 7, 7, 1], [5], [3, 8], [10, 3, 11, 12], [6, 6], [NOTHING, NO_TEXT, NO_IMAGE]]


def shaken(module, seed=0, std=.4):
    "Random numbers in every weight, so that none of them is one or zero by chance; 64 bits, no dropout."
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for x in module.parameters(): x.copy_(std * torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return module


def streams(catalogue=None, fitted=True, **options):
    module = shaken(ItemStreams(TEXT_SIZE, IMAGE_SIZE, D, n_experts=3, **options))
    module.set_catalogue(catalogue or make_catalogue())
    if fitted: module.fit_statistics(ALL)
    return module


def m2se(catalogue=None, **options):
    module = shaken(M2SE(TEXT_SIZE, IMAGE_SIZE, **SMALL | options))
    module.items.set_catalogue(catalogue or make_catalogue())
    module.items.fit_statistics(ALL)
    return module


def vectors(module, batch): return module.items(batch.item_seq.flatten()).unflatten(0, batch.item_seq.shape)


# Items

@pytest.mark.parametrize("masked", [True, False])
def test_items_equal_loops(masked):
    catalogue = make_catalogue()
    module = streams(catalogue, masked_pooling=masked)
    slow = item_vectors(numbers(module), catalogue, masked)
    assert slow.shape == (V + 1, 2, D) and np.abs(slow).max() > .5
    np.testing.assert_allclose(module().detach(), slow, rtol=0, atol=1e-9)
    np.testing.assert_allclose(module(torch.tensor([7, 2, 0, 2])).detach(), slow[[7, 2, 0, 2]], rtol=0, atol=1e-9)
    other = item_vectors(numbers(module), catalogue, not masked)
    assert np.abs(slow[1, 1] - other[1, 1]).max() > .01, "item 1 has one picture and a row of zeros beside it"


def test_one_modality_equals_loops_whatever_the_number_of_sentences():
    "Zero to five sentences an item, written by hand; a fresh centring changes nothing."
    rng, F = np.random.default_rng(0), 4
    text = rng.standard_normal((6, 5, F)).astype("float32")
    for row in range(6): text[row, row:] = 0
    catalogue = catalogue_from_arrays([f"item-{row}" for row in range(6)], text)
    module = shaken(ModalityEncoder(F, D, n_experts=2))
    module.set_features(catalogue.text_emb, catalogue.text_pad_mask)
    for row in range(6):
        slow = item_vector(numbers(module), text[row, :row].astype(float), [False] * row)
        np.testing.assert_allclose(module(torch.tensor([row + 1]))[0].detach(), slow, rtol=0, atol=1e-9)
        assert slow.any() == (row > 0)


def test_what_is_missing_is_zero_and_teaches_nothing():
    module = streams()
    for row, lacking in ((0, ("text", "image")), (NO_IMAGE, ("image",)), (NO_TEXT, ("text",)), (NOTHING, ("text", "image")), (7, ())):
        module.zero_grad()
        z = module(torch.tensor([row]))
        (z * torch.arange(1., D + 1)).sum().backward()
        for place, name in enumerate(("text", "image")):
            assert z[0, place].any() == (name not in lacking), (row, name)
            moved = any(x.grad.any() for x in getattr(module, name).parameters())
            assert moved == (name not in lacking), (row, name)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_the_item_encoder_equal_finite_differences(masked):
    module = streams(masked_pooling=masked).text
    names, values = zip(*module.named_parameters())
    ask = lambda *values: torch.func.functional_call(module, dict(zip(names, values)), (torch.tensor([1, 2, NO_TEXT, 6]),))
    assert torch.autograd.gradcheck(ask, tuple(x.detach().clone().requires_grad_() for x in values), fast_mode=True)


def test_each_modality_has_weights_of_its_own():
    module = streams()
    before = module().detach()
    with torch.no_grad():
        for x in module.text.parameters(): x += .1
    after = module().detach()
    assert torch.equal(after[:, 1], before[:, 1]) and not torch.allclose(after[1:NO_TEXT, 0], before[1:NO_TEXT, 0])


def test_frozen_pooling_learns_nothing_and_only_pooling_is_frozen():
    for trained in (True, False):
        module = M2SE(TEXT_SIZE, IMAGE_SIZE, **SMALL, trained_pooling=trained)
        frozen = {name for name, x in module.named_parameters() if not x.requires_grad}
        pooling = {f"items.{name}.pooling.{part}.weight" for name in ("text", "image") for part in ("first", "second")}
        assert frozen == (set() if trained else pooling)
        assert all(module.get_parameter(name).any() for name in pooling), "frozen at random numbers, not at zeros"


# Centre and spread

def slow_statistics(catalogue, name, ids):
    "Mean over the given items that have the modality, each with the mean of its sentences; one spread for all numbers."
    table, pad = getattr(catalogue, f"{name}_emb").double().numpy(), getattr(catalogue, f"{name}_pad_mask")
    means = []
    for i in ids:
        there = [table[i, k] for k in range(table.shape[1]) if not pad[i, k]]
        if there: means.append(sum(there) / len(there))
    centre = sum(means) / len(means)
    return centre, np.sqrt(np.mean([(mean - centre) ** 2 for mean in means]))


@pytest.mark.parametrize("ids", [[1, 2, NO_IMAGE, NO_TEXT, NOTHING], [6, 7, 8, 9], list(range(1, V + 1))], ids=["lacking", "whole", "all"])
def test_centre_and_spread_equal_loops_over_the_given_items(ids):
    catalogue, module = make_catalogue(), streams(fitted=False)
    assert not module.fitted and not module.text.centring.center.any() and module.text.centring.spread == 1
    module.fit_statistics(torch.tensor(ids))
    for name in ("text", "image"):
        centre, spread = slow_statistics(catalogue, name, ids)
        centring = getattr(module, name).centring
        np.testing.assert_allclose(centring.center, centre, rtol=0, atol=1e-12)
        assert centring.spread.item() == pytest.approx(spread, abs=1e-12)


def test_centre_and_spread_are_taken_once():
    module = streams(fitted=False)
    module.fit_statistics(torch.tensor([1, 2, 6]))
    before = weights(module)
    assert before["fitted"]
    module.fit_statistics(ALL)
    module.set_catalogue(make_catalogue(19, seed=5))
    module.fit_statistics(torch.arange(1, 20))
    assert same(weights(module), before)


def test_a_loaded_model_does_not_take_them_again():
    first, second = streams(fitted=False), streams(fitted=False)
    first.fit_statistics(torch.tensor([1, 2, 6]))
    second.load_state_dict(first.state_dict())
    second.fit_statistics(ALL)
    assert same(weights(second), weights(first))


@pytest.mark.parametrize("ids, taken", [([], []), ([NOTHING], []), ([NO_IMAGE], ["text"]), ([NO_TEXT, NOTHING], ["image"])])
def test_where_no_item_has_a_modality_features_stay_as_they_are(ids, taken):
    module = streams(fitted=False)
    module.fit_statistics(torch.tensor(ids, dtype=torch.long))
    for name in ("text", "image"):
        centring = getattr(module, name).centring
        assert bool(centring.center.any()) == (name in taken) and centring.spread == 1, "one item alone has no spread"
    assert module().isfinite().all()


# Catalogues

def test_features_are_not_among_the_weights():
    module = m2se()
    plain = M2SE(TEXT_SIZE, IMAGE_SIZE, **SMALL)
    assert module.state_dict().keys() == plain.state_dict().keys(), "a catalogue adds nothing to what is saved"
    assert not any("features" in name or "mask" in name for name in module.state_dict())
    buffers = {name for name, _ in module.items.named_buffers()}
    assert {"text.features", "image.content_pad_mask", "fitted", "text.centring.center"} <= buffers


@pytest.mark.parametrize("sizes, message", [
    ((TEXT_SIZE, IMAGE_SIZE + 1), "expects image features of 5 numbers, the catalogue has 6 numbers"),
    ((TEXT_SIZE + 1, IMAGE_SIZE), "expects text features of 6 numbers, the catalogue has 7 numbers"),
    ((TEXT_SIZE, None), "expects image features of 5 numbers, the catalogue has none"),
    ((None, IMAGE_SIZE), "expects text features of 6 numbers, the catalogue has none")])
def test_a_refused_catalogue_leaves_the_old_one(sizes, message):
    module = streams()
    before, buffers = module().detach(), {name: x.clone() for name, x in module.named_buffers()}
    wrong = catalogue_from_arrays(["a", "b"], *(None if size is None else np.ones((2, 3, size)) for size in sizes))
    with pytest.raises(ValueError, match=message): module.set_catalogue(wrong)
    assert same(dict(module.named_buffers()), buffers) and torch.equal(module(), before)


@pytest.mark.parametrize("sizes", [(None, 5), (6, None), (0, 5), (None, None)])
def test_both_sizes_are_needed(sizes):
    for kind in (ItemStreams, M2SE):
        with pytest.raises(ValueError, match="reads texts and pictures: give text_size and image_size"): kind(*sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_take_the_type_of_the_weights(dtype):
    module = ItemStreams(TEXT_SIZE, IMAGE_SIZE, D).to(dtype)
    module.set_catalogue(make_catalogue(dtype="float16"))
    module.fit_statistics(ALL)
    assert module().dtype == dtype and module().isfinite().all()
    assert module.double()().dtype == torch.float64, "features follow the weights when these change"


def test_another_catalogue_replaces_all_of_the_old_one():
    "More items, more sentences, other gaps: as if the first had never been there."
    rng = np.random.default_rng(1)
    text, image = rng.standard_normal((15, 4, TEXT_SIZE)), rng.standard_normal((15, 1, IMAGE_SIZE))
    text[9], image[2] = 0, 0
    other = catalogue_from_arrays([f"other-{row}" for row in range(15)], text, image)
    module = streams()
    module.set_catalogue(other)
    np.testing.assert_allclose(module().detach(), item_vectors(numbers(module), other), rtol=0, atol=1e-9)


# Histories

@pytest.mark.parametrize("n_layers, n_heads", [(1, 1), (2, 2), (1, 4)])
def test_histories_equal_loops(n_layers, n_heads):
    module, batch = m2se(n_layers=n_layers, n_heads=n_heads), collate(HISTORIES, 10)
    x = vectors(module, batch)
    h = module(x, batch.item_pad_mask).detach()
    assert h.shape == (6, 6, 2, D)
    for row, history in enumerate(HISTORIES):
        slow = read_both(numbers(module), x[row, :len(history)].detach().numpy(), n_heads)
        np.testing.assert_allclose(h[row, :len(history)], slow, rtol=0, atol=1e-9)


def test_one_pass_is_two_passes():
    "Vectors, attention weights and gradients of both streams together are those of each stream alone."
    module, batch = m2se(), collate(HISTORIES, 10)
    real = ~batch.item_pad_mask
    x = vectors(module, batch).detach().requires_grad_()
    h, attention = module(x, batch.item_pad_mask, return_attention=True)
    torch.testing.assert_close(module(x, batch.item_pad_mask)[real], h[real], **CLOSE)
    alone = [module.encoder(x[:, :, stream], batch.item_pad_mask, return_attention=True) for stream in (0, 1)]
    torch.testing.assert_close(h, torch.stack([found for found, _ in alone], 2), **CLOSE)
    assert len(attention) == 2 and attention[0].shape == (6, 2, 2, 6, 6)
    for layer, (text, image) in zip(attention, zip(*(found for _, found in alone))):
        torch.testing.assert_close(layer, torch.stack([text, image], 1), **CLOSE)
    factor = torch.randn(h.shape, generator=torch.Generator().manual_seed(0), dtype=h.dtype) * real[..., None, None]
    wanted = [x, *module.encoder.parameters()]
    together = torch.autograd.grad((h * factor).sum(), wanted)
    apart = torch.autograd.grad(sum((found * factor[:, :, stream]).sum() for stream, (found, _) in enumerate(alone)), wanted)
    for a, b in zip(together, apart): torch.testing.assert_close(a, b, **CLOSE)


def test_exchanged_streams_exchange_the_answers():
    module, batch = m2se(), collate(HISTORIES, 10)
    x = vectors(module, batch)
    h = module(x, batch.item_pad_mask)
    assert not torch.allclose(h[:, :, 0], h[:, :, 1]), "or the symmetry would say nothing"
    torch.testing.assert_close(module(x.flip(2), batch.item_pad_mask), h.flip(2), **CLOSE)
    one = torch.cat([x[:2], x[2:3].flip(2), x[3:]])  # only one row: the others notice nothing
    torch.testing.assert_close(module(one, batch.item_pad_mask), torch.cat([h[:2], h[2:3].flip(2), h[3:]]), **CLOSE)


def test_streams_do_not_see_each_other():
    module, batch = m2se(), collate(HISTORIES, 10)
    x = vectors(module, batch).detach()
    for stream in (0, 1):
        leaf = x.clone().requires_grad_()
        module(leaf, batch.item_pad_mask)[:, :, stream].square().sum().backward()
        assert leaf.grad[:, :, stream].any() and not leaf.grad[:, :, 1 - stream].any()


def test_wrong_shapes_are_named():
    module = m2se()
    with pytest.raises(ValueError, match=r"\(S\).*must be 2, got 3"): module(torch.zeros(1, 2, 3, D), torch.zeros(1, 2).bool())
    with pytest.raises(ValueError, match="4 axes"): module(torch.zeros(1, 2, D), torch.zeros(1, 2).bool())
    with pytest.raises(ValueError, match="longer than max_len = 10"): module(torch.zeros(1, 11, 2, D).double(), torch.zeros(1, 11).bool())


@pytest.mark.parametrize("where", ["dropout", "attention_dropout", "adapter_dropout"])
def test_each_dropout_acts_where_it_says_and_in_training_only(where):
    rates = dict.fromkeys(("dropout", "attention_dropout", "adapter_dropout"), 0.) | {where: .5}
    module, batch = m2se(**rates), collate(HISTORIES, 10)
    x, calm = vectors(module, batch), module.items()
    h = module(x, batch.item_pad_mask)
    module.train()
    assert torch.equal(module.items(), calm) == (where != "adapter_dropout")
    assert torch.allclose(module(x, batch.item_pad_mask), h, rtol=0, atol=1e-9) == (where == "adapter_dropout")
    module.eval()
    torch.testing.assert_close(module(x, batch.item_pad_mask), h, **CLOSE)
    torch.testing.assert_close(module.items(), calm, **CLOSE)


def test_first_weights():
    "Matrices and positions from N(0, 0.02), gates at zero, norms at one: MP4SR's start."
    set_seed(0)
    module = M2SE(256, 256)
    for x in (module.items.text.experts.experts.weight, module.items.image.pooling.first.weight, module.encoder.position_emb.weight,
              module.encoder.blocks[1].attention.query_key_value.weight):
        assert x.std().item() == pytest.approx(.02, rel=.05) and abs(x.mean().item()) < .002
    assert not module.items.text.experts.gate.any() and (module.items.text.experts.scale == 1).all()
    assert (module.encoder.norm.weight == 1).all() and not module.encoder.blocks[0].feed_forward[0].bias.any()


# Pieces of like length

def last_and_gradients(module, batch, read_last):
    "Both streams at the last item, and the gradients of all weights from the features on."
    module.zero_grad()
    last = read_last(vectors(module, batch))
    factor = torch.randn(last.shape, generator=torch.Generator().manual_seed(0), dtype=last.dtype)
    (last * factor).sum().backward()
    return last.detach(), {name: x.grad.clone() for name, x in module.named_parameters()}


@pytest.mark.parametrize("piece_cost", [0, 3, 10, 10**6, None])
def test_pieces_equal_one_padded_batch(piece_cost):
    module, batch = m2se(), collate([*HISTORIES, *HISTORIES[::-1], [2, 9, 9]], 10)
    def at_once(x):
        h = module(x, batch.item_pad_mask)
        return torch.stack([h[row, length - 1] for row, length in enumerate(batch.item_seq_len.tolist())])
    expected, expected_gradients = last_and_gradients(module, batch, at_once)
    found, gradients = last_and_gradients(module, batch, lambda x: encode_ends(module, x, batch, piece_cost))
    assert found.shape == (13, 2, D)
    torch.testing.assert_close(found, expected, **CLOSE)
    for name, gradient in expected_gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[name], gradient, **CLOSE, msg=name)


@pytest.mark.parametrize("piece_cost", [0, 4, 10**6])
def test_pieces_come_back_in_order(piece_cost):
    "Each answer is that of its own history, read alone by loops."
    histories = [[row % V + 1] * ((7 * row) % 9 + 1) for row in range(11)]
    module, batch = m2se(), collate(histories, 10)
    with torch.no_grad():
        z = module.items().numpy()
        found = encode_ends(module, torch.from_numpy(z)[batch.item_seq], batch, piece_cost)
    for row, history in enumerate(histories):
        np.testing.assert_allclose(found[row], read_both(numbers(module), z[history])[-1], rtol=0, atol=1e-9)


def test_no_piece_holds_more_rows_or_columns_than_it_needs(monkeypatch):
    module, batch, shapes = m2se(), collate(HISTORIES, 10), []
    original = type(module).forward
    def noting(self, x, *others):
        shapes.append(tuple(x.shape[:2]))
        return original(self, x, *others)
    monkeypatch.setattr(type(module), "forward", noting)
    encode_ends(module, vectors(module, batch), batch, 2)
    assert shapes == [(3, 2), (2, 4), (1, 6)], "lengths 1 2 2 | 3 4 | 6"


def test_windows_are_refused():
    "They ask at many places of a row; only rows with one query can be cut by length."
    module, batch = m2se(), position_batches(make_store(), 100, 10)[0]
    with pytest.raises(ValueError, match="one query per row"): encode_ends(module, vectors(module, batch), batch)
