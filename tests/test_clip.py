"The small CLIP: losses by hand, reproducible training, files that plain transformers loads, and what it can do."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, CLIPModel

from mmseqrec.artifacts import artifact_path, read_json
from mmseqrec.data.synthetic import make_caption_corpus
from mmseqrec.features.clip import (HELD_OUT, RECIPE, TINY, attribute_accuracy, caption_words, clip_loss, embed_images,
                                    embed_texts, load_clip, load_shipped_clip, make_clip, measure_clip,
                                    quiet_transformers, retrieval_recall, save_clip, text_features, train_clip,
                                    train_shipped_clip, train_tokenizer, word_loss)
from pages import page_functions

of_page = page_functions("features.clip")
plot_similarity, plot_training, plot_word_scores = of_page.plot_similarity, of_page.plot_training, of_page.plot_word_scores


@pytest.fixture(scope="session")
def tiny(): return make_caption_corpus(**TINY)


@pytest.fixture(scope="session")
def tokenizer(tiny): return train_tokenizer(tiny[1])


# ------------------------------------------------------------------------------------------------------------ losses

def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_clip_loss_by_hand():
    image, text = unit(6, 4), unit(6, 4, seed=1)
    z = 9.0 * image @ text.T
    rows = sum(-math.log(math.exp(z[i, i]) / sum(math.exp(z[i, j]) for j in range(6))) for i in range(6))
    columns = sum(-math.log(math.exp(z[i, i]) / sum(math.exp(z[j, i]) for j in range(6))) for i in range(6))
    assert float(clip_loss(image, text, 9.0)) == pytest.approx((rows + columns) / 12, rel=1e-5)
    assert float(clip_loss(image, text, 0.0)) == pytest.approx(math.log(6))
    assert torch.isfinite(clip_loss(image, image, 100.0))


def test_word_loss_by_hand():
    image, words = unit(3, 4), unit(5, 4, seed=1)
    named = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
    z = 5.0 * image @ words.T
    by_word = -sum(z.log_softmax(0)[:, w][named[:, w]].mean() for w in range(5)) / 5
    torch.testing.assert_close(word_loss(image, words, named, 5.0), by_word)
    texts = unit(3, 4, seed=2)
    torch.testing.assert_close((word_loss(image, texts, torch.eye(3).bool(), 5.0) + word_loss(texts, image, torch.eye(3).bool(), 5.0)) / 2,
                               clip_loss(image, texts, 5.0))


def test_telling_words():
    captions = ["a red mug with a star"] * 2 + ["a blue mug with a two-tone rim"] + ["a mug with a lid"] * 7
    assert caption_words(captions, most=.2)[:3] == [["red", "star"], ["red", "star"], ["blue", "two-tone", "rim"]]


# ------------------------------------------------------------------------------------------------ tokenizer and model

def test_tokenizer_reads_like_clip(tokenizer, tiny):
    ids = tokenizer("A  Striped mug").input_ids
    assert ids == tokenizer("a striped MUG").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id != 2
    assert len(tokenizer(tiny[1]).input_ids[0]) < 64
    assert tokenizer.decode(tokenizer("größer 42!").input_ids, skip_special_tokens=True).replace(" ", "") == "größer42!"
    long = tokenizer(["mug " * 200], truncation=True).input_ids[0]
    assert len(long) == 64 and long[-1] == tokenizer.eos_token_id


def test_initial_weights_are_a_function_of_the_seed(tokenizer):
    torch.manual_seed(1)
    first = make_clip(tokenizer, seed=3).state_dict()
    torch.manual_seed(2)
    second, other = make_clip(tokenizer, seed=3).state_dict(), make_clip(tokenizer, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["text_projection.weight"], other["text_projection.weight"])
    norms = {name: weight for name, weight in first.items() if "norm" in name}
    assert norms and all((weight == float(name.endswith("weight"))).all() for name, weight in norms.items())


def test_padding_does_not_change_a_text(tokenizer):
    model = make_clip(tokenizer).eval()
    with torch.inference_mode():
        alone = text_features(model, tokenizer(["a mug"], return_tensors="pt"))
        beside = text_features(model, tokenizer(["a mug", "a very long text about a mug and a plate"], padding=True, return_tensors="pt"))
    torch.testing.assert_close(alone[0], beside[0], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- training

def test_training_repeats_to_the_digit_and_stops_where_asked(tiny, tokenizer):
    images, captions = tiny[0][:80], tiny[1][:80]
    runs = [train_clip(images, captions, tokenizer=tokenizer, steps=steps, stop_after=stop, batch_size=32, progress=False)
            for steps, stop in ((40, 3), (40, 3), (40, 5), (4, None))]
    assert runs[0].curve == runs[1].curve == runs[2].curve[:3] and [len(run.curve) for run in runs] == [3, 3, 5, 4]
    weights = [run.model.state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert train_clip(images, captions, tokenizer=tokenizer, seed=1, stop_after=1, batch_size=32, progress=False).curve != runs[0].curve[:1]
    with pytest.raises(ValueError, match=r"caption 1 .* has no telling word"):
        train_clip(images[:10], [f"thing {n}" if n != 1 else "..." for n in range(10)], tokenizer=tokenizer, stop_after=1,
                   progress=False)


def test_eight_steps_meet_the_stored_ones(tiny):
    stored = read_json(artifact_path("clip", "training.json"))
    assert stored["recipe"] == RECIPE and stored["held_out"] == HELD_OUT
    run = train_clip(*tiny, tokenizer=load_shipped_clip()[1], stop_after=8, progress=False)
    np.testing.assert_allclose(run.curve, stored["tiny_curve"], rtol=.02)


@pytest.mark.slow
def test_the_full_run_meets_the_stored_one(tmp_path):
    stored = read_json(artifact_path("clip", "training.json"))
    run = train_shipped_clip(tmp_path, load_shipped_clip()[1], progress=False)
    np.testing.assert_allclose(run.curve[:20], stored["curve"][:20], rtol=.02)
    measured = read_json(tmp_path / "training.json")["measured"]
    assert measured.keys() == stored["measured"].keys()
    for name, value in stored["measured"].items():
        # Another number of threads rounds otherwise, and 2800 steps make other weights of it. The recalls rest on all
        # 1,024 pairs as a whole; an attribute hangs on a few words (three sizes), each of which may move by itself.
        if "R@" in name: assert measured[name] == pytest.approx(value, abs=.02), name
        else: assert measured[name] > value - .08, (name, measured[name], value)


# ----------------------------------------------------------------------------------------------------- shipped files

def test_shipped_files_are_a_plain_checkpoint():
    folder = artifact_path("clip")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4.5e6
    with quiet_transformers():
        model, tokenizer = AutoModel.from_pretrained(folder, use_safetensors=True), AutoTokenizer.from_pretrained(folder)
    ours, our_tokenizer = load_shipped_clip()
    assert isinstance(model, CLIPModel) and tokenizer("a red mug").input_ids == our_tokenizer("a red mug").input_ids
    assert all(torch.equal(weight.float(), ours.state_dict()[name]) for name, weight in model.state_dict().items())
    with safe_open(folder / "model.safetensors", "pt") as file:
        header = file.metadata()
        assert file.get_tensor("text_projection.weight").dtype == torch.float16
    assert json.loads(header["notes"]) == RECIPE and len(header["code"]) == 16 and "torch" in json.loads(header["origin"])["versions"]
    assert json.loads((folder / "preprocessor_config.json").read_text())["crop_size"] == {"height": 64, "width": 64}


def test_saved_and_loaded(tiny, tmp_path):
    run = train_clip(tiny[0][:40], tiny[1][:40], stop_after=1, batch_size=16, progress=False)
    model, tokenizer = load_clip(save_clip(run, tmp_path / "clip", anything=1))
    torch.testing.assert_close(embed_texts(model, tokenizer, ["a red mug"]), embed_texts(run.model, run.tokenizer, ["a red mug"]),
                               atol=2e-3, rtol=0)


def test_shipped_clip_sees_what_it_should():
    model, tokenizer = load_shipped_clip()
    stored = read_json(artifact_path("clip", "training.json"))["measured"]
    images, captions = make_caption_corpus(n=256, seed=77, image_size=96)
    measured = measure_clip(model, tokenizer, images, captions)
    assert measured.keys() == stored.keys()
    for name, value in stored.items(): assert measured[name] > value - .1, (name, measured[name], value)
    rows = embed_texts(model, tokenizer, captions)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(256))
    assert attribute_accuracy(model, tokenizer, embed_images(model, list(images)), captions)["kind"] == measured["kind"]


@pytest.mark.slow
def test_stored_measurement_is_repeated():
    model, tokenizer = load_shipped_clip()
    measured = measure_clip(model, tokenizer, *make_caption_corpus(**HELD_OUT))
    for name, value in read_json(artifact_path("clip", "training.json"))["measured"].items():
        assert measured[name] == pytest.approx(value, abs=.003), name


def test_recall_counts_ties_against():
    similarity = np.array([[.9, .1, .2], [.5, .5, .1], [.3, .2, .1]])
    assert [retrieval_recall(similarity, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_plots():
    image = Image.new("RGB", (8, 8))
    assert len(plot_similarity([image] * 3, ["a", "b", "c"], np.eye(3)).axes) >= 4
    assert len(plot_word_scores([image] * 2, ["a", "b", "c"], np.random.rand(2, 3), top=2).axes) == 4
    assert plot_training(np.random.rand(100, 2)).get_xlabel() == "steps"
