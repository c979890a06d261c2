"A shop small enough for seconds: two tables, drawn pictures, a CLIP with random weights; everything that `prepare_data` reads."
import json

import numpy as np
from PIL import Image

from killed_runs import make_clip
from mmseqrec.app.cli import main
from mmseqrec.config import RunConfig

SIZES, COLOURS, THINGS = ("small", "big", "huge"), ("red", "blue", "green", "grey"), ("mug", "kite", "umbrella", "chair", "lamp")
N_ITEMS, N_USERS = 30, 40


def shell(capsys, *words):
    "Run a command line in this process; return exit code, standard output, standard error."
    capsys.readouterr()
    try: code = main([str(word) for word in words])
    except SystemExit as error: code = error.code
    return code, *capsys.readouterr()


def describe(row): return f"A {SIZES[row % 3]} {COLOURS[row % 4]} {THINGS[row % 5]}."


def write_shop(folder, held_out=(), describe=describe, seed=0, pictures=True):
    """Write 40 users with eight events each; the last event of each takes an item of `held_out` in turn, if there are such.
    Returns the settings that name the files; min_item is 1, so that nothing is lost."""
    (folder / "pictures").mkdir(parents=True)
    names = [*(f"it{row}" for row in range(N_ITEMS)), *held_out]
    rows = []
    for user in range(N_USERS):
        items = [f"it{(3 * user + step * (1 + user % 3)) % N_ITEMS}" for step in range(8)]
        if held_out: items[-1] = held_out[user % len(held_out)]
        rows += [f"u{user},{item},{100 * user + step}" for step, item in enumerate(items)]
    (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    table = [{"item_id": name, "title": describe(row)} for row, name in enumerate(names)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, table)) + "\n")
    for row, name in enumerate(names):
        noise = np.random.default_rng([seed if row >= N_ITEMS else 0, row]).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{name}.png")
    images = {"images": str(folder / "pictures")} if pictures else {}
    return dict(interactions=str(folder / "events.csv"), items=str(folder / "items.jsonl"), min_item=1, **images)


def quick_config(files, clip, **settings):
    "A configuration of a fraction of a second a system."
    quick = dict(text_encoder=str(clip), image_encoder=str(clip), hidden_size=16, max_len=10, epochs=3, pretrain_epochs=2,
                 batch_size=64, pretrain_batch_size=16, patience=5, lr=.01, device="cpu", n_keywords=4)
    return RunConfig(**files | quick | settings)
