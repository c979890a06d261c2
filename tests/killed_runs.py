"""Runs that are killed with SIGKILL and continued: `python killed_runs.py FOLDER` writes `FOLDER/results.json`.

Everything is imported once; each life of a run is a forked process of its own, so that a life costs no start-up."""
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel  # also what an optimiser imports when it is first made

import mmseqrec.artifacts
import mmseqrec.training
from mmseqrec.data.interactions import TEST
from mmseqrec.data.items import ItemTable
from mmseqrec.evaluation import evaluate
from mmseqrec.features import encoders
from mmseqrec.features.clip import IMAGE_SETTINGS, quiet_transformers, train_tokenizer
from mmseqrec.training import fit
from small_world import build, make_store

SETTINGS = dict(epochs=40, batch_size=16, lr=.03, patience=2, metric="ndcg@5", seed=7, device="cpu", progress=False)


def die(): os.kill(os.getpid(), signal.SIGKILL)


def at(n, owner, name, action):
    "Replace `owner.name`: the n-th call (from 1) runs `action(original, *args)` instead."
    original, calls = getattr(owner, name), [0]
    def replaced(*args, **kwargs):
        calls[0] += 1
        return action(original, *args, **kwargs) if calls[0] == n else original(*args, **kwargs)
    setattr(owner, name, replaced)


# Training

def train(folder):
    "One life of a training run; returns everything that must not depend on how often it was killed."
    model, store = build("content_both", seed=3, dropout=.3), make_store(40, seed=9)
    history = fit(model, store, checkpoint=folder / "run.safetensors", checkpoint_every=3, **SETTINGS)
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()): digest.update(name.encode() + x.numpy().tobytes())
    epochs = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history.epochs]
    return {"epochs": epochs, "best_epoch": history.best_epoch, "best_value": history.best_value,
            "finished": history.finished, "weights": digest.hexdigest(), "ranks": evaluate(model, store, TEST).ranks.tolist()}


def die_in_step(n): return lambda: at(n, mmseqrec.training, "_train_step", lambda *_: die())


def die_half_written(n):
    def half(original, tensors, path, header):
        original(tensors, path, header)
        Path(path).write_bytes(Path(path).read_bytes()[:-1000])
        die()
    return lambda: at(n, mmseqrec.training, "save_file", half)


def die_before_rename(n): return lambda: at(n, mmseqrec.artifacts.os, "replace", lambda *_: die())


def die_after_rename(n):
    def after(original, *args):
        original(*args)
        die()
    return lambda: at(n, mmseqrec.artifacts.os, "replace", after)


def die_validating(n): return lambda: at(n, mmseqrec.training, "evaluate", lambda *_, **__: die())


TRAININGS = {  # the deaths of each run, in order
    "middle of an epoch": [die_in_step(11)],
    "several steps": [die_in_step(1), die_in_step(5), die_in_step(2), die_in_step(13)],
    "half written": [die_half_written(1), die_half_written(5)],
    "before and after the rename": [die_before_rename(4), die_after_rename(2)],
    "while validating": [die_validating(2), die_validating(2)],
    "everything": [die_in_step(8), die_half_written(3), die_validating(1), die_after_rename(2), die_before_rename(2)],
}


# Encoding

SENTENCES = [f"a {size} {color} {thing}" for size in ("small", "big", "huge") for color in ("red", "blue", "green", "grey")
             for thing in ("mug", "kite", "umbrella", "chair", "lamp")]


def make_clip(folder):
    "A tiny CLIP with random weights."
    tokenizer, tower = train_tokenizer(SENTENCES, vocab_size=300), dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                                        num_attention_heads=2)
    torch.manual_seed(0)
    text = tower | dict(vocab_size=len(tokenizer), max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id,
                        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with quiet_transformers():
        CLIPModel(CLIPConfig(projection_dim=8, vision_config=tower | dict(image_size=64, patch_size=32),
                             text_config=text)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS))


def make_pictures(folder):
    from PIL import Image
    folder.mkdir()
    for place in range(len(SENTENCES)):
        Image.effect_noise((20, 20), 10 + place).convert("RGB").save(folder / f"{place}.png")


def encode(folder, clip, pictures):
    "One life of a catalogue; returns a digest of all its numbers."
    items = ItemTable([f"item-{i}" for i in range(30)], [SENTENCES[2 * i:2 * i + 2] for i in range(30)],
                      [[pictures / f"{2 * i}.png", pictures / f"{2 * i + 1}.png"][:i % 3] for i in range(30)])
    catalogue = encoders.build_catalogue(items, encoders.load_text_encoder(clip, device="cpu"),
                                         encoders.load_image_encoder(clip, device="cpu"), folder / "cache", chunk_size=8, progress=False)
    digest = hashlib.sha256()
    for name in ("text_emb", "text_pad_mask", "image_emb", "image_pad_mask"):
        digest.update(name.encode() + getattr(catalogue, name).numpy().tobytes())
    return {"numbers": digest.hexdigest(), "report": catalogue.report}


def die_encoding(kind, n):
    owner = {"text": encoders.TextEncoder, "image": encoders.ImageEncoder}[kind]
    return lambda: at(n, owner, "encode_batch", lambda *_: die())


ENCODINGS = {
    "encoding": [die_encoding("text", 2), die_encoding("image", 2), die_encoding("image", 3)],
    "writing tables": [die_before_rename(1), die_after_rename(1), die_before_rename(2), die_after_rename(2), die_before_rename(3)],
}


# Lives

def live(work, prepare=None, seconds=None):
    "Run `work` in a process of its own; returns its result, or the signal that ended it."
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(reader)
            if prepare: prepare()
            with open(writer, "w") as file: json.dump({"result": work()}, file)
        except BaseException:
            with open(writer, "w") as file: json.dump({"error": traceback.format_exc()}, file)
        os._exit(0)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with open(reader) as file: text = file.read()
    _, status = os.waitpid(child, 0)
    return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else json.loads(text)


def story(work, deaths):
    "A run that dies each of `deaths` and then lives on."
    return [live(work, death) for death in deaths] + [live(work)]


def main(folder):
    torch.set_num_threads(1)
    results = {"training": {}, "encoding": {}}
    for name, deaths in {"undisturbed": [], **TRAININGS}.items():
        place = folder / f"training {name}"
        place.mkdir()
        results["training"][name] = story(lambda: train(place), deaths)
    place, rng, lives = folder / "training at random", random.Random(0), []
    place.mkdir()
    while not lives or "result" not in lives[-1]:
        lives.append(live(lambda: train(place), seconds=rng.uniform(.1, .3) if len(lives) < 4 else None))
        if "error" in lives[-1]: break
    results["training"]["at random"] = lives
    live(lambda: make_clip(folder / "clip"))
    make_pictures(folder / "pictures")
    for name, deaths in {"undisturbed": [], **ENCODINGS}.items():
        place = folder / f"encoding {name}"
        place.mkdir()
        results["encoding"][name] = story(lambda: encode(place, folder / "clip", folder / "pictures"), deaths)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__": main(Path(sys.argv[1]))
