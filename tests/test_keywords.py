"Keywords: vocabulary, similarity, levels, ranking and quality against loops; nothing leaks; any CLIP; what is missing stays missing."
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPConfig, CLIPModel

from mmseqrec.data.items import ItemTable, read_items
from mmseqrec.data.synthetic import VISIBLE, WORDS, make_marketplace
from mmseqrec.features.clip import IMAGE_SETTINGS, quiet_transformers, train_tokenizer
from mmseqrec.features.encoders import (TextEncoder, build_catalogue, catalogue_from_arrays, load_catalogue,
                                        load_image_encoder, load_text_encoder, save_catalogue)
from mmseqrec.features.keywords import (EVERYDAY_WORDS, STOP_WORDS, Keywords, keyword_catalogue, keyword_vocabulary,
                                        load_word_encoder, plot_keywords, split_words, top_words, word_levels,
                                        word_similarity)
from mmseqrec.figures import COLORS
from pages import page_functions

of_page = page_functions("features.keywords")
keyword_quality, plot_keyword_quality, value_words = of_page.keyword_quality, of_page.plot_keyword_quality, of_page.value_words

COLOURS, THINGS = ("red", "blue", "green", "yellow"), ("mug", "kite", "sock", "drum", "jar", "hat")
TEXTS = [[], *([f"A {color} {thing}.", f"This {thing} comes in {color}."] for color in COLOURS for thing in THINGS)]
RULE = dict(min_items=2, max_share=1.0)


# ------------------------------------------------------------------------------------------------------------ a world

@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    "A tiny CLIP with random weights, saved as a plain transformers checkpoint: 24 numbers a vector."
    folder = tmp_path_factory.mktemp("keyword-clip")
    tokenizer = train_tokenizer([sentence for row in TEXTS for sentence in row], vocab_size=600, max_tokens=20)
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = tower | special | dict(vocab_size=len(tokenizer), max_position_embeddings=20)
    with quiet_transformers():
        CLIPModel(CLIPConfig(projection_dim=24, vision_config=tower | dict(image_size=64, patch_size=16),
                             text_config=text)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS))
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder): return load_image_encoder(clip_folder, device="cpu")


@pytest.fixture(scope="session")
def words_of(clip): return load_word_encoder(clip)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    "A tiny sentence encoder with mean pooling: 16 numbers a vector."
    folder = tmp_path_factory.mktemp("keyword-bert")
    words = sorted({word for row in TEXTS for sentence in row for word in split_words(sentence)})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ";", *words]))
    torch.manual_seed(1)
    with quiet_transformers():
        BertTokenizerFast.from_pretrained(folder, model_max_length=32).save_pretrained(folder)
        BertModel(BertConfig(vocab_size=7 + len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=32)).save_pretrained(folder)
    return load_text_encoder(folder, device="cpu")


def painted(row, k): return Image.fromarray(np.random.default_rng([row, k]).integers(0, 255, (64, 64, 3), np.uint8))


@pytest.fixture(scope="session")
def items():
    "24 items with 0 to 3 pictures."
    images = [[], *([painted(row, k) for k in range(row % 4)] for row in range(1, len(TEXTS)))]
    return ItemTable(["[PAD]", *(f"item-{row}" for row in range(1, len(TEXTS)))], TEXTS, images)


@pytest.fixture(scope="session")
def catalogue(items, clip, bert): return build_catalogue(items, bert, clip, progress=False)


def made(catalogue, words_of, bert, texts=TEXTS, training_items=None, **options):
    options = dict(vocabulary=keyword_vocabulary(texts, training_items, **RULE), progress=False) | options
    return keyword_catalogue(catalogue, texts, words_of, bert, training_items, **options)


def random_table(V=7, K=3, D=6, W=11, seed=0):
    "Pictures with holes among them, and words, in 64 bits."
    rng = np.random.default_rng(seed)
    pad = rng.random((V + 1, K)) < .3
    pad[0], pad[3] = True, True
    image_emb = rng.standard_normal((V + 1, K, D)) * ~pad[..., None]
    return torch.tensor(image_emb), torch.tensor(pad), torch.tensor(rng.standard_normal((W, D)))


# --------------------------------------------------------------------------------------------------------- vocabulary

def slow_vocabulary(texts, rows, least, share, length, stop):
    count, n = Counter(), 0
    for row in rows:
        if len(texts[row]): n += 1
        seen = set()
        for sentence in texts[row]:
            word = ""
            for letter in sentence + " ":
                if letter.isalpha() or (letter in "-'" and word): word += letter.lower()
                elif word:
                    seen.add(word)
                    word = ""
        for word in seen: count[word] += 1
    kept = [w for w in count if count[w] >= least and not count[w] > share * n + 1e-9 and len(w) >= length and w not in stop]
    return sorted(sorted(kept), key=lambda w: -count[w])


def test_words():
    assert split_words("Dr. Smith's T-shirt costs 12$: 100% two-tone «größer» L'été—naïve") == [
        "dr", "smith", "t-shirt", "costs", "two-tone", "größer", "l'été", "naïve"]
    assert split_words("children’s rock’n’roll -- 'quoted' x2 --well-") == ["children", "rock'n'roll", "quoted", "x", "well"]
    assert split_words("") == split_words(" 1 2. ") == []


def test_vocabulary_equals_loops():
    rng, letters = np.random.default_rng(0), [f"word{chr(97 + k)}" for k in range(26)] + ["the", "of", "ab", "two-tone"]
    weights = 1 / np.arange(1, 31)
    sentence = lambda: " ".join(rng.choice(letters, rng.integers(1, 6), p=weights / weights.sum())) + "."
    texts = [[], *([sentence() for _ in range(rng.integers(0, 4))] for _ in range(60))]
    for rows in (None, range(1, 40), [5, 3, 3, 9, 0, 50, 51, 52]):
        for least, share, length in ((5, .3, 3), (2, .5, 1), (1, 1.0, 3)):
            expected = slow_vocabulary(texts, range(1, 61) if rows is None else sorted(set(rows) - {0}), least, share, length, STOP_WORDS)
            if not expected: continue
            assert keyword_vocabulary(texts, rows, min_items=least, max_share=share, min_length=length) == expected
    whole = keyword_vocabulary(texts)
    assert len(whole) > 5 and keyword_vocabulary(texts, max_words=3) == whole[:3]
    order = rng.permutation(60) + 1
    assert keyword_vocabulary([[], *(texts[row] for row in order)]) == whole


def test_default_rule_at_its_edges():
    "In 5 of 20 items: in. In 4: out. In 6 of 20 (30 %): in. In 7: out. Twice in one item counts once."
    have = {"five": 5, "four": 4, "six": 6, "seven": 7, "ab": 5, "the": 5}
    texts = [[], *([" ".join(word for word, n in have.items() if row < n), "four four" if row == 0 else "x"] for row in range(20))]
    assert keyword_vocabulary(texts) == ["six", "five"]
    assert keyword_vocabulary([*texts, [], []]) == ["six", "five"], "items without a text do not count"
    assert keyword_vocabulary(texts, training_items=torch.arange(21)) == ["six", "five"]
    assert keyword_vocabulary([["zero"], ["red"]], [0, 1], min_items=1, max_share=1) == ["red"], "row 0 is padding"
    assert keyword_vocabulary(texts, stop_words={"six"}, min_length=2) == ["ab", "five", "the"]


def test_extra_words_and_tagger():
    listed = keyword_vocabulary(TEXTS, **RULE)
    assert keyword_vocabulary(TEXTS, **RULE, extra_words=[" Teddy  Bear", "red", "teddy bear", " "]) == [*listed, "teddy bear"]
    asked = []
    def tagger(words):
        asked.append(words)
        return [(word, "JJ" if word in COLOURS else "NOUN" if word in ("mug", "Mug") else "VBZ") for word in words]
    assert sorted(keyword_vocabulary(TEXTS, **RULE, tagger=tagger)) == sorted([*COLOURS, "mug"])
    assert asked[0] == ["A", "red", "mug"], "a tagger sees capital letters"


def test_vocabulary_errors():
    with pytest.raises(ValueError, match="no keyword is left.*lower min_items"): keyword_vocabulary(TEXTS, min_items=99)
    with pytest.raises(ValueError, match="no keyword is left"): keyword_vocabulary(TEXTS, training_items=[])
    assert keyword_vocabulary(TEXTS, training_items=[], extra_words=["red"]) == ["red"]
    for wrong in ([3, 25], [-1, 3]):
        with pytest.raises(ValueError, match="from 1 to 24"): keyword_vocabulary(TEXTS, training_items=wrong)
    with pytest.raises(ValueError, match="row numbers"): keyword_vocabulary(TEXTS, training_items=np.ones(25, bool))


def test_shipped_lists():
    names = {word for values in WORDS.values() for some in values.values() for name in some for word in split_words(name)}
    assert not names & STOP_WORDS - {"of"}, "a visible word may not be a stop word"
    assert not names & set(EVERYDAY_WORDS) and not STOP_WORDS & set(EVERYDAY_WORDS)
    assert len(set(EVERYDAY_WORDS)) == len(EVERYDAY_WORDS) > 300
    assert all(split_words(word) == [word] for word in [*STOP_WORDS, *EVERYDAY_WORDS])


# --------------------------------------------------------------------------------------------------------- similarity

def slow_cosine(a, b): return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_similarity_equals_loops():
    image_emb, pad, word_emb = random_table()
    pictures, level = image_emb[~pad], torch.linspace(-1, 1, len(word_emb), dtype=torch.float64)
    expected = torch.tensor([[slow_cosine(p, w) for w in word_emb.tolist()] for p in pictures.tolist()], dtype=torch.float64)
    torch.testing.assert_close(word_similarity(pictures, word_emb), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(word_similarity(3 * pictures, word_emb / 7, level), expected - level, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="must be 6"): word_similarity(pictures[:, :5], word_emb)


def test_levels_equal_loops():
    image_emb, pad, word_emb = random_table()
    for rows in (None, [1, 2, 3, 6], [6, 6, 0, 1]):
        used = [image_emb[row, k].tolist() for row in range(1, 8) for k in range(3) if not pad[row, k] and (rows is None or row in rows)]
        expected = [math.log(sum(math.exp(9 * slow_cosine(p, w)) for p in used) / len(used)) / 9 for w in word_emb.tolist()]
        for most in (1, 40, 1 << 24):
            found = word_levels(image_emb, pad, word_emb, 9.0, rows, max_elements=most)
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    ratio = (9 * word_similarity(image_emb[~pad], word_emb, word_levels(image_emb, pad, word_emb, 9.0))).exp()
    np.testing.assert_allclose(ratio.mean(0).numpy(), 1, atol=1e-12)
    assert torch.isfinite(word_levels(image_emb.float(), pad, word_emb.float(), 1000.0)).all()
    with pytest.raises(ValueError, match="no training item has a picture.*standardize=False"):
        word_levels(image_emb, pad, word_emb, 9.0, [3])


@pytest.mark.parametrize("levels", [False, True])
def test_top_words_equal_loops(levels):
    image_emb, pad, word_emb = random_table()
    level = torch.linspace(1, -1, len(word_emb), dtype=torch.float64) if levels else None
    for n in (1, 4, 11, 30):
        top = top_words(image_emb, pad, word_emb, n, word_level=level)
        assert top.shape == (8, 3, min(n, 11)) and top.dtype == torch.int64
        for row in range(8):
            for k in range(3):
                scores = [slow_cosine(image_emb[row, k].tolist(), w) - (level[j].item() if levels else 0)
                          for j, w in enumerate(word_emb.tolist())] if not pad[row, k] else []
                best = sorted(range(len(scores)), key=lambda j: -scores[j])[:n]
                assert top[row, k].tolist() == (best if best else [-1] * min(n, 11))
        for most in (1, 40): assert torch.equal(top, top_words(image_emb, pad, word_emb, n, word_level=level, max_elements=most))
    with pytest.raises(ValueError, match="at least one keyword"): top_words(image_emb, pad, word_emb, 0)
    with pytest.raises(ValueError, match="must be 3"): top_words(image_emb, pad[:, :2], word_emb)


def test_ties_go_to_the_earlier_word():
    "Words of three directions only, so that nearly all similarities are equal, also at the border of the first n."
    rng = np.random.default_rng(3)
    word_emb = torch.eye(3)[rng.integers(0, 3, 50)]
    image_emb = torch.tensor([[3., 2., 1.], [1., 1., 1.], [0., 1., 1.]])[:, None]
    similarity = word_similarity(image_emb[:, 0], word_emb)
    for n in (1, 5, 20, 40, 50):
        expected = [sorted(range(50), key=lambda j: (-row[j], j))[:n] for row in similarity.tolist()]
        assert top_words(image_emb, torch.zeros(3, 1, dtype=torch.bool), word_emb, n)[:, 0].tolist() == expected


def test_no_pictures_at_all():
    image_emb, pad, word_emb = random_table()
    top = top_words(image_emb, torch.ones_like(pad), word_emb, 4)
    assert top.shape == (8, 3, 4) and (top == -1).all()


# ---------------------------------------------------------------------------------------------------------- catalogue

def test_features_are_the_joined_words_by_the_text_encoder(catalogue, words_of, bert):
    "Everything again with loops and single calls of the encoders."
    words = keyword_vocabulary(TEXTS, **RULE)
    image = catalogue.image_emb.double().numpy()
    vectors = [words_of.encode([f"one {word} here"])[0].astype(float) for word in words]
    kappa = words_of.model.logit_scale.exp().item()
    there = [(row, k) for row in range(25) for k in range(image.shape[1]) if not catalogue.image_pad_mask[row, k]]
    level = [math.log(np.mean([math.exp(kappa * slow_cosine(image[place], w)) for place in there])) / kappa for w in vectors]
    for standardize in (True, False):
        got, keywords = made(catalogue, words_of, bert, n_keywords=4, standardize=standardize, joiner=" ", prompt="one {} here")
        assert keywords.words == words and keywords.item_tokens == catalogue.item_tokens
        for place in there:
            scores = [slow_cosine(image[place], w) - standardize * up for w, up in zip(vectors, level)]
            best = [words[j] for j in sorted(range(len(words)), key=lambda j: -scores[j])[:4]]
            assert keywords.of(*place) == best
            np.testing.assert_allclose(got.image_emb[place].numpy(), bert.encode([" ".join(best)])[0], atol=1e-6)
        assert keywords.strings("+")[there[0][0]][there[0][1]] == "+".join(keywords.of(*there[0]))
    assert got.image_emb.shape == (25, 3, 16) and torch.equal(got.text_emb, catalogue.text_emb)


def test_standardize_changes_words_and_is_noted(catalogue, words_of, bert):
    (level, a), (plain, b) = (made(catalogue, words_of, bert, n_keywords=3, standardize=on) for on in (True, False))
    assert not torch.equal(a.top, b.top) and not torch.equal(level.image_emb, plain.image_emb)
    assert level.encoders["keywords"]["standardize"] and not plain.encoders["keywords"]["standardize"]
    assert level.encoders["keywords"] == a.settings and level.encoders["image"] == catalogue.encoders["image"]
    assert a.settings["word_encoder"]["fingerprint"] == words_of.fingerprint
    assert a.settings["vocabulary"] != made(catalogue, words_of, bert, vocabulary=["red", "blue"])[1].settings["vocabulary"]


def test_default_is_fifteen_words_of_the_training_texts(catalogue, words_of, bert):
    texts = [[], *([*row, f"Serial number {chr(96 + k) * 3}"] for k, row in enumerate(TEXTS[1:]))]
    _, keywords = keyword_catalogue(catalogue, texts, words_of, bert, progress=False)
    assert keywords.words == keyword_vocabulary(texts) == sorted(COLOURS) and keywords.settings["n_keywords"] == 15
    assert keywords.top.shape == (25, 3, 4), "all words where there are fewer than asked for"
    assert keywords.strings()[1][0].count("; ") == 3


def test_missing_pictures_stay_missing(catalogue, items, words_of, bert):
    got, keywords = made(catalogue, words_of, bert)
    assert torch.equal(got.image_pad_mask, catalogue.image_pad_mask) and got.image_pad_mask[4].all()
    assert not got.image_emb[got.image_pad_mask].any() and got.image_emb[~got.image_pad_mask].abs().sum(1).all()
    assert keywords.of(4) == [] and keywords.strings()[4] == ["", "", ""] and keywords.of(1, 1) == []
    assert repr(keywords) == f"Keywords({keywords.top.shape[2]} of {len(keywords.words)} words for each of {sum(map(len, items.images))} pictures)"
    nothing = replace(catalogue, image_emb=torch.zeros(25, 1, 24), image_pad_mask=torch.ones(25, 1, dtype=torch.bool))
    assert not made(nothing, words_of, bert, standardize=False)[0].image_emb.any()
    with pytest.raises(ValueError, match="no training item has a picture"): made(nothing, words_of, bert)


def test_holes_among_pictures(words_of, bert):
    "A catalogue from arrays may lack the first picture and have the second."
    rng = np.random.default_rng(0)
    image = rng.standard_normal((24, 2, 24))
    image[4, 0] = image[7] = 0
    got, keywords = made(catalogue_from_arrays([f"i{k}" for k in range(24)], None, image, "float16"), words_of, bert)
    assert keywords.of(5, 0) == [] and len(keywords.of(5, 1)) > 0 and keywords.of(8, 0) == keywords.of(8, 1) == []
    assert got.image_emb.dtype == torch.float16 and torch.equal((got.image_emb == 0).all(2), got.image_pad_mask)


def test_the_result_is_a_catalogue_like_any_other(catalogue, words_of, bert, tmp_path):
    got, _ = made(catalogue, words_of, bert)
    again = load_catalogue(save_catalogue(got, tmp_path))
    assert torch.equal(again.image_emb, got.image_emb) and again.encoders == got.encoders and again.report == got.report
    assert torch.equal(got.align(got.item_tokens[:5]).image_emb, got.image_emb[:5])


def test_long_strings_are_cut_and_reported(catalogue, clip, words_of):
    by_clip, nine = replace(catalogue, text_emb=None), dict(vocabulary=[*COLOURS, *THINGS[:5]])
    joiner = " and a "
    got, keywords = made(by_clip, words_of, words_of, joiner=joiner, **nine)
    lengths = {s: len(words_of.tokenizer(s)["input_ids"]) for row in keywords.strings(joiner) for s in row if s}
    cut = sum(length > 20 for length in lengths.values())
    assert 0 < cut <= len(lengths) and got.report[-1].startswith(f"{cut} of {len(lengths)} keyword strings are cut to the 20 tokens")
    assert made(by_clip, words_of, words_of, n_keywords=2)[0].report == catalogue.report
    for most, cut in ((19, False), (18, True)):  # nine words, eight semicolons, start and end
        shorter = TextEncoder(words_of.model, words_of.tokenizer, "shorter", "clip", max_tokens=most, device="cpu")
        assert any(f" are cut to the {most} tokens" in line for line in made(by_clip, words_of, shorter, **nine)[0].report) == cut


# ------------------------------------------------------------------------------------------------------------ leakage

HELD_OUT = [4, 8, 11, 16, 20, 3]
TRAINING = [row for row in range(1, 25) if row not in HELD_OUT]
PLANTED = [["A zanzibar zanzibar mug.", *row] if k in HELD_OUT else row for k, row in enumerate(TEXTS)]


def with_other_pictures(catalogue, words_of, rows):
    "The same catalogue, but some items' pictures are the word drum itself, so that its level would jump."
    there = ~catalogue.image_pad_mask & torch.isin(torch.arange(25), torch.tensor(rows))[:, None]
    assert there.any()
    drum = torch.from_numpy(words_of.encode(["drum"]))[0]
    return replace(catalogue, image_emb=torch.where(there[..., None], drum, catalogue.image_emb))


@pytest.mark.parametrize("options", [{}, dict(vocabulary=None)])
def test_held_out_items_change_nothing(catalogue, words_of, bert, options):
    "A token in held-out texts is found nowhere; other texts and pictures there leave training items' features alone."
    options = dict(n_keywords=3) | options
    before, keywords = made(catalogue, words_of, bert, TEXTS, TRAINING, **options)
    after, others = made(with_other_pictures(catalogue, words_of, HELD_OUT), words_of, bert, PLANTED, TRAINING, **options)
    assert "zanzibar" not in others.words and others.words == keywords.words
    assert "zanzibar" not in json.dumps([others.strings(), after.report, after.encoders])
    assert torch.equal(after.image_emb[TRAINING], before.image_emb[TRAINING])


@pytest.mark.parametrize("options", [{}, dict(vocabulary=None)])
def test_a_leak_would_be_seen(catalogue, words_of, bert, options):
    "The test above can fail: as soon as the items count as training, token and pictures are found."
    options = dict(n_keywords=3) | options
    before, _ = made(catalogue, words_of, bert, TEXTS, **options)
    after, others = made(catalogue, words_of, bert, PLANTED, **options)
    assert "zanzibar" in others.words and after.encoders != before.encoders
    after, _ = made(with_other_pictures(catalogue, words_of, HELD_OUT), words_of, bert, TEXTS, **options)
    assert not torch.equal(after.image_emb[TRAINING], before.image_emb[TRAINING])


def test_held_out_pictures_are_not_in_the_levels():
    image_emb, pad, word_emb = random_table()
    level = word_levels(image_emb, pad, word_emb, 9.0, [1, 2, 5])
    image_emb[4] += 3
    assert torch.equal(level, word_levels(image_emb, pad, word_emb, 9.0, [1, 2, 5]))
    assert not torch.equal(level, word_levels(image_emb, pad, word_emb, 9.0, [1, 2, 4, 5]))


# --------------------------------------------------------------------------------------------------- cache and errors

class Counting(TextEncoder):
    "A text encoder that counts its texts."
    count = 0

    def encode_batch(self, texts):
        self.count += len(texts)
        return super().encode_batch(texts)


def counting(encoder):
    copy = Counting(encoder.model, encoder.tokenizer, encoder.name, encoder.pooling, encoder.normalize, encoder.max_tokens, "cpu")
    copy.count = 0
    return copy


def test_each_string_is_encoded_once_and_found_again(catalogue, words_of, bert, tmp_path):
    words, sentences = counting(words_of), counting(bert)
    first, keywords = made(catalogue, words, sentences, n_keywords=2, cache_dir=tmp_path)
    distinct = {string for row in keywords.strings() for string in row if string}
    assert words.count == len(keywords.words) and sentences.count == len(distinct) < int((~catalogue.image_pad_mask).sum())
    again, _ = made(catalogue, words, sentences, n_keywords=2, cache_dir=tmp_path)
    assert words.count == len(keywords.words) and sentences.count == len(distinct)
    assert torch.equal(first.image_emb, again.image_emb)
    made(catalogue, words, sentences, n_keywords=3, cache_dir=tmp_path)
    assert words.count == len(keywords.words) and sentences.count > len(distinct)
    assert torch.equal(first.image_emb, made(catalogue, words_of, bert, n_keywords=2)[0].image_emb), "with and without a cache"


def test_encoders_that_do_not_belong_together(catalogue, items, clip, words_of, bert):
    with pytest.raises(ValueError, match="no text tower.*CLIP checkpoint"):
        load_word_encoder(SimpleNamespace(pooling="pooler", name="vit", device="cpu"))
    assert load_word_encoder(clip).pooling == "clip" and load_word_encoder(clip).size == clip.size == 24
    shipped = load_text_encoder("shipped", device="cpu")
    for other in (shipped, bert):
        with pytest.raises(ValueError, match="not of one CLIP.*load_word_encoder"): made(catalogue, other, bert)
    namesake = load_text_encoder(words_of.name, device="cpu")
    namesake.name = "another-clip-of-the-same-size"
    with pytest.raises(ValueError, match="not of one CLIP"): made(catalogue, namesake, bert)
    with pytest.raises(ValueError, match="texts of this catalogue were encoded by .*pass the same text encoder"):
        made(catalogue, words_of, shipped)
    with pytest.raises(ValueError, match="no picture features"): made(build_catalogue(items, bert, None, progress=False), words_of, bert)
    with pytest.raises(ValueError, match="keywords already"): made(made(catalogue, words_of, bert)[0], words_of, bert)


def test_inputs_that_do_not_fit(catalogue, words_of, bert):
    with pytest.raises(ValueError, match="texts has 24 rows, but the catalogue has 25"):
        made(catalogue, words_of, bert, TEXTS[1:], vocabulary=["red"])
    with pytest.raises(ValueError, match="no place {} for the word"): made(catalogue, words_of, bert, prompt="a photo")
    for wrong in ([], ["red", " "]):
        with pytest.raises(ValueError, match="empty"): made(catalogue, words_of, bert, vocabulary=wrong)
    with pytest.raises(ValueError, match="at least one keyword"): made(catalogue, words_of, bert, n_keywords=0)
    assert made(catalogue, words_of, bert, vocabulary=["red", "blue", "red"])[1].words == ["red", "blue"]


# ------------------------------------------------------------------------------------------------------------ quality

def slow_quality(keywords, attributes, n, ranked=None):
    "R-precision, precision and recall with sets, picture by picture."
    rows = {"R-precision": [], "precision": [], "recall": []} | {name: [] for name in VISIBLE}
    for item in attributes.iter_rows(named=True):
        if item["item_id"] not in keywords.item_tokens: continue
        for k, view in enumerate(item["views"]):
            own = keywords.of(keywords.item_tokens.index(item["item_id"]), k)
            if not own: continue
            said, right, hit = ranked[:len(own)] if ranked else own, set(), []
            for name in VISIBLE:
                if item[name] == "none" or (name == "size" and view == "close-up"): continue
                names = {synonym.split()[-1] for synonym in WORDS[name][item[name]]} & set(keywords.words)
                right |= names
                hit.append(bool(names & set(said[:n])))
                rows[name].append(hit[-1])
            R = min(len(right), len(said))
            rows["R-precision"].append(len(right & set(said[:R])) / R)
            rows["precision"].append(len(right & set(said[:n])) / n)
            rows["recall"].append(np.mean(hit))
    return [float(np.mean(row)) if row else 0.0 for row in rows.values()]


@pytest.fixture(scope="module")
def shop():
    market = make_marketplace(n_users=5, n_items=40, seed=13)
    items = read_items(market.items)
    return market, items.align(["[PAD]", *items.item_tokens])


def random_keywords(shop, words, n=15, K=4, seed=0):
    market, items = shop
    rng = np.random.default_rng(seed)
    top = torch.full((len(items), K, n), -1)
    for row, views in enumerate(market.truth.attributes["views"].to_list(), 1):
        for k in range(min(len(views), K)): top[row, k] = torch.from_numpy(rng.permutation(len(words))[:n])
    return Keywords(words, top, items.item_tokens)


def test_quality_equals_loops(shop):
    market, items = shop
    words = keyword_vocabulary(items.texts, min_items=2, max_share=.9)
    assert any("close-up" in views for views in market.truth.attributes["views"].to_list())
    for n_kept, n, K in ((15, 15, 4), (15, 5, 4), (30, 20, 1), (4, 2, 4)):
        keywords = random_keywords(shop, words, n_kept, K)
        found = keyword_quality(keywords, market.truth, n)
        views = market.truth.attributes.with_columns(pl.col("views").list.head(K))
        assert list(found["keywords"]) == ["R-precision", f"precision@{n}", f"recall@{n}", *VISIBLE]
        np.testing.assert_allclose(list(found["keywords"].values()), slow_quality(keywords, views, n), atol=1e-12)
        np.testing.assert_allclose(list(found["frequent words"].values()), slow_quality(keywords, views, n, words), atol=1e-12)
        alphabet = sorted(words)
        other = keyword_quality(keywords, market.truth, n, frequent=["unknown", *alphabet])["frequent words"]
        np.testing.assert_allclose(list(other.values()), slow_quality(keywords, views, n, alphabet), atol=1e-12)
    few = replace(keywords, words=["red", *(word for word in words if word != "red")])
    assert keyword_quality(few, market.truth, 4, frequent=["gift"])["frequent words"]["colour"] == 0


def test_chance_is_the_mean_over_all_draws(shop):
    "With seven words every draw of two can be listed."
    market, _ = shop
    words = ["red", "crimson", "blue", "small", "mug", "birthday", "star"]
    keywords = random_keywords(shop, words, n=2)
    chance = keyword_quality(keywords, market.truth, 2)["chance"]
    places = (keywords.top[:, :, :1] >= 0).long()
    every = []
    for draw in combinations(range(7), 2):
        same = replace(keywords, top=torch.where(places > 0, torch.tensor(draw), -1))
        every.append(list(keyword_quality(same, market.truth, 2)["keywords"].values())[1:])
    np.testing.assert_allclose(list(chance.values())[1:], np.mean(every, 0), atol=1e-12)
    alone = [keyword_quality(random_keywords(shop, words, 7, seed=s), market.truth, 2)["keywords"]["R-precision"] for s in range(40)]
    assert keyword_quality(random_keywords(shop, words, 7), market.truth, 2)["chance"]["R-precision"] == pytest.approx(
        np.mean(alone), abs=.02)


def test_perfect_and_useless_keywords(shop):
    market, items = shop
    words = sorted({word for name in VISIBLE for value in WORDS[name] for word in value_words(name, value)} | {"gift", "day"})
    top = torch.full((len(items), 4, 15), words.index("gift"))
    for row, item in enumerate(market.truth.attributes.iter_rows(named=True), 1):
        own = [w for name in VISIBLE for w in value_words(name, item[name])]
        for k, view in enumerate(item["views"]):
            seen = [w for w in own if not (view == "close-up" and w in value_words("size", item["size"]))]
            top[row, k, :len(seen)] = torch.tensor([words.index(w) for w in seen])
        top[row, len(item["views"]):] = -1
    top[0] = -1
    found = keyword_quality(Keywords(words, top, items.item_tokens), market.truth)["keywords"]
    assert all(found[name] == 1 for name in ("R-precision", "recall@15", *VISIBLE)) and found["precision@15"] < 1
    wrong = torch.where(top >= 0, words.index("gift"), -1)
    assert set(keyword_quality(Keywords(words, wrong, items.item_tokens), market.truth)["keywords"].values()) == {0.0}


def test_quality_errors(shop):
    market, _ = shop
    keywords = random_keywords(shop, ["red", "blue", "mug", "gift"], n=3)
    with pytest.raises(ValueError, match="only 3 keywords were kept"): keyword_quality(keywords, market.truth, 4)
    strangers = replace(keywords, item_tokens=[f"x{token}" for token in keywords.item_tokens])
    with pytest.raises(ValueError, match="truth of the same shop"): keyword_quality(strangers, market.truth, 3)


def test_shipped_clip_names_what_it_sees():
    "More than half of what it names on the page, on a marketplace of yet another seed, and far above both sticks."
    market = make_marketplace(n_users=5, n_items=100, seed=31)
    items = read_items(market.items)
    items = items.align(["[PAD]", *items.item_tokens])
    images = [[], *([market.draw(files[0])] if len(files) and row % 3 == 0 else [] for row, files in enumerate(market.items["images"].to_list()))]
    encoder = load_image_encoder("shipped", device="cpu")
    catalogue, words_of = build_catalogue(replace(items, images=images), None, encoder, progress=False), load_word_encoder(encoder)
    words = keyword_vocabulary(items.texts, min_items=2, extra_words=EVERYDAY_WORDS)
    assert len(words) >= 500
    (level, plain) = (keyword_quality(keyword_catalogue(catalogue, items.texts, words_of, words_of, vocabulary=words, progress=False,
                                                        standardize=on)[1], market.truth) for on in (True, False))
    assert level["keywords"]["R-precision"] > 1.5 * plain["keywords"]["R-precision"]
    for name in ("R-precision", "recall@15"):
        assert all(level["keywords"][name] > 4 * level[stick][name] for stick in ("chance", "frequent words"))
        assert level["keywords"][name] > .2
    assert level["keywords"]["kind"] > .7


def test_plots():
    words, right = [["red", "mug", "gift"], ["sock"]], [{"red", "mug"}, set()]
    figure = plot_keywords([painted(1, k) for k in range(2)], words, right, n_lines=2, title="two")
    drawn = {text.get_text(): text for ax in figure.axes for text in ax.texts}
    assert {name: text.get_color() == COLORS["accent"] for name, text in drawn.items()} == {
        "red": True, "mug": True, "gift": False, "sock": False}
    assert len(plot_keywords([painted(1, k) for k in range(3)], [["a"]] * 3).axes) == 8
    row = {"R-precision": .5, "recall@15": .4} | {name: .1 for name in VISIBLE}
    assert [tick.get_text() for tick in plot_keyword_quality({"a": row, "b": row}).get_yticklabels()] == ["a", "b"]
