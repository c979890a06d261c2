"The small sentence encoder and LSA: losses by hand, reproducible training, plain checkpoints, and what they read."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

from mmseqrec.artifacts import artifact_path, read_json
from mmseqrec.data.items import ItemTable
from mmseqrec.data.synthetic import KINDS, VISIBLE, attribute_values, in_caption_corpus, make_marketplace
from mmseqrec.features.encoders import build_catalogue, load_text_encoder
from mmseqrec.features.sentences import (RECIPE, TINY, fit_lsa, listing_loss, listing_sentences, listing_vectors, load_lsa,
                                         make_listing_corpus, make_sentence_model, mean_text_features,
                                         measure_text_encoder, save_lsa, save_sentences, train_sentences,
                                         train_shipped_sentences)


@pytest.fixture(scope="session")
def corpus(): return make_listing_corpus(**TINY)


@pytest.fixture(scope="session")
def tokenizer(): return AutoTokenizer.from_pretrained(artifact_path("sentences"))


@pytest.fixture(scope="session")
def shipped(): return load_text_encoder(artifact_path("sentences"), device="cpu")


# ------------------------------------------------------------------------------------------------------------ corpus

def test_the_corpus_repeats_and_has_two_listings_of_sentences(corpus):
    assert corpus == make_listing_corpus(**TINY) != make_listing_corpus(TINY["n"], seed=12)
    assert len(corpus) == TINY["n"] and all(len(item) == 2 and all(item) for item in corpus)
    assert any(first != second for first, second in corpus)


def test_no_marketplace_sells_what_the_corpus_describes(monkeypatch):
    looks = []
    from mmseqrec.features import sentences
    monkeypatch.setattr(sentences, "_describe", lambda look, omit, rng: looks.append(look) or ["x"])
    make_listing_corpus(60, seed=3)
    for look in looks:
        values = [attribute_values(look["domain"], name) for name in VISIBLE]
        codes = [[some.index(look[name]) for name, some in zip(VISIBLE, values)]]
        assert in_caption_corpus(look["domain"], np.array(codes))[0] and look["colour"] != look["accent"]
    for domain in KINDS:  # and what is sold is not reserved
        table = make_marketplace(domain, 5, 40).truth.attributes
        values = [attribute_values(domain, name) for name in VISIBLE]
        codes = [[some.index(row[name]) for name, some in zip(VISIBLE, values)] for row in table.iter_rows(named=True)]
        assert not in_caption_corpus(domain, np.array(codes)).any()


# ---------------------------------------------------------------------------------------------------- model and loss

def test_initial_weights_are_a_function_of_the_seed(tokenizer):
    torch.manual_seed(1)
    first = make_sentence_model(tokenizer, seed=3).state_dict()
    torch.manual_seed(2)
    second, other = make_sentence_model(tokenizer, seed=3).state_dict(), make_sentence_model(tokenizer, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embeddings.word_embeddings.weight"], other["embeddings.word_embeddings.weight"])


def test_listing_vectors_are_means_of_sentences_alone(tokenizer):
    model = make_sentence_model(tokenizer).eval()
    listings = [["A red mug.", "By Pavo."], ["A red mug."], ["By Pavo.", "By Pavo.", "A very long sentence about a mug and a plate."]]
    with torch.inference_mode():
        found = listing_vectors(model, tokenizer, listings)
        for row, listing in zip(found, listings):
            alone = [model(**tokenizer([s], return_tensors="pt")).last_hidden_state[0].mean(0) for s in listing]
            torch.testing.assert_close(row, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-4)


def test_listing_loss_by_hand(tokenizer, corpus):
    model = make_sentence_model(tokenizer).eval()
    with torch.inference_mode():
        loss = float(listing_loss(model, tokenizer, corpus[:4], temperature=.5))
        a, b = (F.normalize(listing_vectors(model, tokenizer, [item[k] for item in corpus[:4]]), dim=1) for k in (0, 1))
    z = (a @ b.T / .5).double()
    rows = sum(-math.log(math.exp(z[i, i]) / sum(math.exp(z[i, j]) for j in range(4))) for i in range(4))
    columns = sum(-math.log(math.exp(z[i, i]) / sum(math.exp(z[j, i]) for j in range(4))) for i in range(4))
    assert loss == pytest.approx((rows + columns) / 8, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- training

def test_training_repeats_to_the_digit_and_stops_where_asked(corpus, tokenizer):
    runs = [train_sentences(corpus[:40], tokenizer=tokenizer, steps=steps, stop_after=stop, batch_size=16, progress=False)
            for steps, stop in ((40, 3), (40, 3), (4, None))]
    assert runs[0].curve == runs[1].curve and [len(run.curve) for run in runs] == [3, 3, 4]
    weights = [run.model.state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(weight.requires_grad for weight in runs[0].model.parameters()) and not runs[0].model.training
    assert train_sentences(corpus[:40], tokenizer=tokenizer, seed=1, stop_after=1, batch_size=16, progress=False).curve != runs[0].curve[:1]


def test_eight_steps_meet_the_stored_ones(corpus, tokenizer):
    stored = read_json(artifact_path("sentences", "training.json"))
    assert stored["recipe"] == RECIPE and len(stored["curve"]) == RECIPE["steps"]
    run = train_sentences(corpus, tokenizer=tokenizer, stop_after=8, progress=False)
    np.testing.assert_allclose(run.curve, stored["tiny_curve"], rtol=.02)


@pytest.mark.slow
def test_the_full_run_meets_the_stored_one(tmp_path, tokenizer):
    stored = read_json(artifact_path("sentences", "training.json"))
    run = train_shipped_sentences(tmp_path / "new", tokenizer, progress=False)
    np.testing.assert_allclose(run.curve[:20], stored["curve"][:20], rtol=.02)
    measured = read_json(tmp_path / "new" / "training.json")["measured"]
    for domain, value in stored["measured"].items(): assert measured[domain] == pytest.approx(value, abs=.01), domain


# ------------------------------------------------------------------------------------------------ what is on the disk

def test_shipped_files_are_a_plain_checkpoint(tokenizer):
    folder = artifact_path("sentences")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2e6
    model = AutoModel.from_pretrained(folder, use_safetensors=True)
    assert type(model).__name__ == "BertModel" and model.config.vocab_size == len(tokenizer)
    with safe_open(folder / "model.safetensors", "pt") as file: assert {"code", "notes", "origin"} <= set(file.metadata())
    assert read_json(folder / "1_Pooling" / "config.json")["pooling_mode_mean_tokens"] is True


def test_a_saved_encoder_encodes_as_the_trained_one(tmp_path, corpus, tokenizer):
    run = train_sentences(corpus, tokenizer=tokenizer, stop_after=2, progress=False)
    save_sentences(run, tmp_path / "mine", seed=0)
    encoder = load_text_encoder(tmp_path / "mine", device="cpu")
    assert encoder.pooling == "mean" and not encoder.normalize
    with torch.inference_mode(): expected = listing_vectors(run.model, tokenizer, corpus[0]).numpy()
    found = mean_text_features(encoder, corpus[0])
    np.testing.assert_allclose(found, expected, atol=5e-3)  # weights are stored in 16 bits


def test_the_shipped_encoder_reads_each_shop_better_than_counting(shipped):
    stored = read_json(artifact_path("sentences", "training.json"))["measured"]
    assert set(stored) == set(KINDS) and stored["kitchen"] >= .70
    assert measure_text_encoder(shipped, ["kitchen"])["kitchen"] == pytest.approx(stored["kitchen"], abs=.002)
    shop = make_marketplace("kitchen")
    lsa = fit_lsa([" ".join(listing) for listing in listing_sentences(shop.items)])
    assert .64 < measure_text_encoder(lsa, ["kitchen"])["kitchen"] < stored["kitchen"] - .03


# --------------------------------------------------------------------------------------------------------------- LSA

DOCUMENTS = ["Red mug of clay", "blue mug of clay", "red scarf of wool", "green scarf of wool", "green hat, wool hat"]


def test_lsa_by_hand():
    lsa = fit_lsa(DOCUMENTS, size=3)
    texts = [text.lower().replace(",", "").split() for text in DOCUMENTS]
    df = {word: sum(word in text for text in texts) for text in texts for word in text}
    words = sorted(word for word, n in df.items() if n > 1)
    assert lsa.words == words
    idf = [math.log((1 + len(texts)) / (1 + df[word])) + 1 for word in words]
    table = np.array([[text.count(word) * weight for word, weight in zip(words, idf)] for text in texts])
    u, s, vt = np.linalg.svd(table / np.linalg.norm(table, axis=1, keepdims=True))
    np.testing.assert_allclose(lsa.encode(DOCUMENTS), np.abs(table @ vt[:3].T) * np.sign(lsa.encode(DOCUMENTS)), atol=1e-4)
    assert not lsa.encode(["unknown words only"]).any()


def test_lsa_is_kept_without_pickle_and_reads_the_same(tmp_path):
    lsa = fit_lsa(DOCUMENTS, size=3)
    again = load_lsa(save_lsa(lsa, tmp_path / "lsa"))
    assert sorted(path.name for path in (tmp_path / "lsa").iterdir()) == ["lsa.json", "lsa.safetensors"]
    assert again.fingerprint == lsa.fingerprint and again.name == "lsa"
    np.testing.assert_array_equal(again.encode(DOCUMENTS), lsa.encode(DOCUMENTS))
    assert fit_lsa(DOCUMENTS[:4], size=3).fingerprint != lsa.fingerprint
    with pytest.raises(FileNotFoundError): load_lsa(tmp_path / "nothing")


def test_lsa_encodes_a_catalogue_and_new_items(tmp_path):
    lsa = fit_lsa(DOCUMENTS, size=2)
    items = ItemTable(["[PAD]", "a", "b", "new"], [[], ["Red mug", "of clay"], [], ["wool scarf"]], [[], [], [], []])
    catalogue = build_catalogue(items, lsa, None, tmp_path, progress=False)
    assert catalogue.text_emb.shape == (4, 2, 2) and catalogue.missing_text_mask.tolist() == [True, False, True, False]
    np.testing.assert_allclose(2 * catalogue.mean_text()[1], lsa.encode(["Red mug of clay"])[0], atol=1e-5)


def test_lsa_refuses_texts_that_share_nothing():
    for documents in ([], ["one"], ["one", "two"], ["", " "]):
        with pytest.raises(ValueError, match="fewer than two words in common"): fit_lsa(documents)
