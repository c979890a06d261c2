"Explorers: scenes against direct calls, driven by the widget's own events; twins and a real JupyterLab driven in a browser."
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_world
from mmseqrec.artifacts import artifact_path
from mmseqrec.blocks.augment import draw_swaps
from mmseqrec.data.items import ItemTable
from mmseqrec.data.sequences import collate
from mmseqrec.features.keywords import split_words
from mmseqrec.metrics import mrr, ndcg_at_k, rank_of_target, recall_at_k
from mmseqrec.models.missrec import interest_attention
from mmseqrec.recommender import encode_catalogue
from mmseqrec.viz import explorers
from mmseqrec.viz.embeddings import pca_2d
from mmseqrec.viz.explorers import KINDS, all_scenes, explore, grown_catalogue, offers, thumbnail, write_twin
from pages import page_functions

EVIL = "<script>alert(1)</script>"
TOKENS = [f"item-{row}" for row in range(1, small_world.V + 1)]
TITLES = [f"A {'red' if row % 2 else 'blue'} mug {row} {EVIL}" for row in range(1, small_world.V + 1)]
ITEMS = ItemTable(TOKENS, [[title] for title in TITLES], [[] for _ in TOKENS])
HISTORIES = {f"user {u}": [TOKENS[(3 * u + step) % small_world.V] for step in range(5)] for u in range(4)}
WORDS = {"few": ("red", "blue", "mug", "car", "dog")}


class Reader:
    "A text encoder without a network."
    name, size, fingerprint = "reader", small_world.TEXT_SIZE, "none"

    def encode(self, texts):
        return np.stack([np.random.default_rng(len(text)).standard_normal(self.size).astype(np.float32) for text in texts])


def draw(rows): return [Image.new("RGB", (60, 40), (20 * row % 255, 90, 200)) if row % 4 else None for row in rows]


def row_of(token): return TOKENS.index(token) + 1


OPTIONS = {"new_item": dict(text_encoder=Reader(), titles=["a red mug", EVIL]), "keyword": dict(vocabularies=WORDS, n_pictures=2),
           "user": dict(n_users=2, added=[7]), "metric": dict(n_users=3)}
LIVE = {"new_item": dict(text_encoder=Reader()), "keyword": dict(vocabularies=WORDS)}


def open_one(kind, system="content_missrec", **options):
    return explore(small_world.build(system), kind, HISTORIES, ITEMS, draw, **{**LIVE.get(kind, {}), **options})


# Scenes

def choose(explorer, **choice):
    "Do what the front end does: set the trait; return the scene that is sent back."
    explorer.choice = choice
    assert not explorer.scene.get("error"), explorer.scene["error"]
    return explorer.scene


def view(scene, kind, number=0): return [view for view in scene["views"] if view["view"] == kind][number]


@pytest.mark.parametrize("system", ["content_missrec", "sasrec", "popularity", "bert4rec"])
def test_user(system):
    explorer = open_one("user", system)
    rows = [row_of(token) for token in HISTORIES["user 1"]]
    model = explorer.shop.model
    for events, added in (([0, 1, 2, 3, 4], []), ([0, 3], []), ([4], [2, 9]), ([], [5])):
        scene = choose(explorer, user="user 1", events=events, added=added)
        history = [rows[place] for place in events] + added
        found = view(scene, "bars")["bars"]
        answer, = model.recommend([[TOKENS[row - 1] for row in history]], k=8)
        assert [each["rows"] for each in found] == [[row_of(token)] for token in answer.items]
        assert [each["text"] for each in found] == [f"{score:.2f}" for score in answer.scores]
        assert scene["items"][str(found[0]["rows"][0])]["title"] == TITLES[found[0]["rows"][0] - 1]
        whole, = model.recommend([HISTORIES["user 1"]], k=50)
        for rank, each in enumerate(found):
            was = whole.items.index(TOKENS[each["rows"][0] - 1])
            assert each.get("note") == (None if was == rank else f"was {was + 1}")
    scene = choose(explorer, user="user 1", events=[], added=[])
    assert scene["views"] == [] and "nothing to recommend from" in scene["status"]
    n_attention = {"content_missrec": 2, "sasrec": 1, "popularity": 0, "bert4rec": 1}[system]
    assert len(choose(explorer, user="user 0")["views"]) == 1 + n_attention


def test_user_attention_is_that_of_the_model():
    explorer = open_one("user")
    rows = [row_of(token) for token in HISTORIES["user 2"]]
    batch = collate([rows], 10)
    with torch.no_grad():
        items = explorer.shop.model.attention(batch)[-1][0].mean(0)[-1]
        interests, ids = interest_attention(explorer.shop.model, batch)
    scene = choose(explorer, user="user 2")
    assert [each["text"] for each in view(scene, "bars", 1)["bars"]] == [f"{x:.2f}" for x in items.tolist()]
    top = interests[-1][0].mean(0)[-1].sort(descending=True)
    assert [each["label"] for each in view(scene, "bars", 2)["bars"]][0] == f"interest {ids[0, top.indices[0]]}"
    of_item = explorer.shop.model.items.interests.of_item
    for each in view(scene, "bars", 2)["bars"]:
        assert all(int(each["label"].split()[1]) in of_item[row] for row in each["rows"])


@pytest.mark.parametrize("system", ["content_missrec", "content_mp4sr", "bert4rec", "stacked"])
def test_attention(system):
    model = small_world.build("content_missrec", fusion="stack") if system == "stacked" else small_world.build(system)
    explorer = explore(model, "attention", HISTORIES, ITEMS, draw)
    rows = [row_of(token) for token in HISTORIES["user 3"]]
    to = {"to": "items"} if "missrec" in system or system == "stacked" else {}
    scene = choose(explorer, user="user 3", layer=1, head=2, **to)
    grid = view(scene, "grid")
    assert grid["rows"] == rows and grid["columns"] == [[row] for row in rows]
    with torch.no_grad(): weights = model.attention(collate([rows], 10))[0][0, 1]
    if system == "stacked": weights = (weights[:5] + weights[5:])[:, :5] / 2 + (weights[:5] + weights[5:])[:, 5:] / 2
    np.testing.assert_allclose(grid["values"], weights[-5:, :5], atol=6e-4)
    if system == "content_missrec":
        scene = choose(explorer, user="user 3", to="interests")
        with torch.no_grad(): weights, ids = interest_attention(model, collate([rows], 10))
        there = ids[0] > 0
        np.testing.assert_allclose(view(scene, "grid")["values"], weights[-1][0].mean(0)[:, there], atol=6e-4)


def test_metric():
    explorer = open_one("metric", "content_both", n_users=3)
    model, some = explorer.shop.model, list(HISTORIES.values())[:3]
    with torch.no_grad():
        items = encode_catalogue(model)
        scores = torch.cat([model.score(model.encode_sequence(collate([[row_of(t) for t in h[:-1]]], 10)), items) for h in some])
    target = torch.tensor([row_of(h[-1]) - 1 for h in some])
    for rounding, ties, k in (("none", "mean", 10), (1, "best", 3), (1, "worst", 3), (0, "mean", 1)):
        scene = choose(explorer, k=k, ties=ties, rounding=rounding)
        rounded = scores if rounding == "none" else scores.round(decimals=rounding)
        ranks = rank_of_target(rounded, target, ties)
        assert view(scene, "strip")["ranks"] == ranks.tolist()
        means = [recall_at_k(ranks, k).mean(), ndcg_at_k(ranks, k).mean(), mrr(ranks).mean()]
        assert [each["text"] for each in view(scene, "bars")["bars"]] == [f"{x:.3f}" for x in means]


def test_mixup():
    explorer = open_one("mixup")
    for ratio, number in ((0, 1), (50, 2), (100, 3)):
        streams = view(choose(explorer, user="user 1", ratio=ratio, draw=number), "streams")
        torch.manual_seed(number)
        assert streams["swapped"] == draw_swaps(torch.zeros(1, 5, dtype=torch.bool), ratio / 100)[0].tolist()
        assert sum(streams["swapped"]) == {0: 0, 100: 5}.get(ratio, sum(streams["swapped"]))
        assert streams["rows"] == [row_of(token) for token in HISTORIES["user 1"]]
    before = torch.get_rng_state()
    choose(explorer, draw=4)
    assert torch.equal(torch.get_rng_state(), before), "an explorer leaves the random state alone"


def test_map():
    rng = np.random.default_rng(0)
    table, groups = rng.standard_normal((13, 5)), ["", *"abcabcabcabc"]
    explorer = open_one("map", spaces={"mine": table, "other": table[:, ::-1].copy()}, groups=groups)
    scene = choose(explorer, space="mine", method="pca")
    points = view(scene, "points")
    unit = table[1:] / np.linalg.norm(table[1:], axis=1, keepdims=True)
    flat = pca_2d(unit.astype(np.float32))[0]
    flat = (flat - flat.min(0)) / np.ptp(flat, axis=0)
    np.testing.assert_allclose(np.stack([points["x"], points["y"]], 1), flat, atol=1e-3)
    likeness = unit @ unit.T - 9 * np.eye(12)
    assert points["near"] == (-likeness).argsort(1)[:, :5].tolist() and points["rows"] == list(range(1, 13))
    assert [points["group_names"][number] for number in points["groups"]] == groups[1:]
    assert set(dict(explorers.map_spaces(open_one("map").shop))) == {"item vectors", "text features", "image features"}


def test_keyword():
    explorer = open_one("keyword")
    shop = explorer.shop
    assert all(row % 4 for row in shop.pictured) and len(shop.pictured) == 9
    scene = choose(explorer, picture=2, n=3, level="no")
    from mmseqrec.features.encoders import load_image_encoder
    from mmseqrec.features.keywords import load_word_encoder
    encoder = load_image_encoder()
    image, words = encoder.encode(draw([2])), load_word_encoder(encoder).encode(WORDS["few"])
    cosine = (image @ words.T)[0] / np.linalg.norm(image) / np.linalg.norm(words, axis=1)
    found = view(scene, "bars")["bars"]
    assert [each["label"] for each in found] == [WORDS["few"][w] for w in (-cosine).argsort()[:3]]
    assert [each["text"] for each in found] == [f"{x:.3f}" for x in np.sort(cosine)[::-1][:3]]
    own = split_words(TITLES[1])
    assert all(("note" in each) == (each["label"] in own) for each in found)
    assert choose(explorer, picture=2, level="yes")["views"] != scene["views"]


@pytest.mark.parametrize("system", ["content_missrec", "content_mp4sr", "missrec"])
def test_new_item(system):
    explorer = open_one("new_item", system)
    model = explorer.shop.model
    before = small_world.weights(model)
    scene = choose(explorer, title="A title", picture=2)
    assert small_world.same(small_world.weights(model), before) and model.catalogue.n_items == small_world.V
    other = small_world.build(system)
    grown = grown_catalogue(model.catalogue, Reader().encode(["A title"])[0], 2)
    assert grown.n_items == small_world.V + 1 and torch.equal(grown.mean_image()[-1], grown.mean_image()[2])
    assert torch.equal(grown.text_emb[:-1], model.catalogue.text_emb) and not grown.missing_text_mask[-1]
    other.set_catalogue(grown)
    answers = other.recommend(HISTORIES.values(), k=small_world.V + 1)
    ranks = np.array([answer.items.index("a new item") + 1 for answer in answers])
    found = view(scene, "bars")["bars"]
    assert [each["text"] for each in found] == [f"rank {rank}" for rank in np.sort(ranks)]
    assert [each["label"] for each in found] == [list(HISTORIES)[n] for n in ranks.argsort(kind="stable")]
    assert f"{(ranks <= 10).mean():.1%} of 4 users" in scene["status"]
    own = choose(explorer, title=TITLES[0], picture=0)
    assert own["views"] != scene["views"]


def test_new_item_of_a_system_that_knows_ids_only():
    assert "vector is zero" in choose(open_one("new_item", "sasrec"), title="anything")["status"]


def test_it_works_on_a_bare_model():
    for system in ("popularity", "sasrec", "content_both"):
        model = small_world.build(system).train()
        explorer = explore(model)
        assert not model.training and explorer.scene["items"]["1"] == {"title": "item-1", "image": None}
        assert choose(explorer, added=[3])["controls"][2]["options"][2] == [3, "item-3"]


def test_a_saved_model_is_explored(tmp_path):
    small_world.build("content_missrec").save_pretrained(tmp_path / "model")
    from mmseqrec.recommender import Recommender
    loaded = explore(Recommender.from_pretrained(tmp_path / "model"), "user", HISTORIES, ITEMS, draw)
    assert loaded.scene == open_one("user").scene


# What cannot be

BAD = [("user", dict(user="nobody"), "user must be one of ['user 0', 'user 1'"), ("user", dict(events=[9]), "events must list"),
       ("user", dict(events=3), "events must list"), ("user", dict(added=[99]), "added must list catalogue rows from 1 to 12"),
       ("user", dict(users="user 1"), "no control 'users' here: use user, events, added"), ("metric", dict(k=0), "k must be 1 to 50"),
       ("metric", dict(k=True), "k must be"), ("metric", dict(k="3"), "k must be"), ("metric", dict(ties="random"), "ties must be one of"),
       ("mixup", dict(ratio=35), "ratio must be 0 to 100 in steps of 10"), ("mixup", dict(user=[]), "user must be"),
       ("keyword", dict(picture=4), "picture must be one of"), ("keyword", dict(n=21), "n must be 1 to 20"),
       ("map", dict(space="moon"), "space must be one of ['item vectors'"), ("new_item", dict(title=3), "title must be a text"),
       ("new_item", dict(picture=-1), "picture must be one of [0"), ("attention", dict(head=7), "head must be one of"),
       ("attention", dict(layer=0), "layer must be one of")]

@pytest.mark.parametrize("kind, choice, sentence", BAD, ids=[f"{kind}-{'-'.join(choice)}-{n}" for n, (kind, choice, _) in enumerate(BAD)])
def test_a_bad_choice_gives_one_sentence(kind, choice, sentence):
    explorer = open_one(kind)
    with pytest.raises(ValueError, match=re.escape(sentence)) as found: explorer.scene_of(choice)
    views = explorer.scene["views"]
    explorer.choice = choice
    assert explorer.scene["error"] == str(found.value) and "\n" not in str(found.value) and explorer.scene["views"] == views
    explorer.choice = {}
    assert "error" not in explorer.scene


def test_what_cannot_be_explored_gives_one_sentence():
    model = small_world.build("sasrec")
    for options, sentence in ((dict(kind="users"), "kind must be one of user, keyword, mixup, map, metric, new_item, attention"),
                              (dict(histories={"me": ["nothing"]}), "no history names an item of the catalogue"),
                              (dict(kind="keyword"), "no item has an image"), (dict(kind="user", ks=3), "user has no option 'ks'"),
                              (dict(kind="metric", histories={"me": TOKENS[:1]}), "no history has two events")):
        with pytest.raises(ValueError, match=re.escape(sentence)): explore(model, **options)
    with pytest.raises(ValueError, match="Popularity has no attention weights"): open_one("attention", "popularity")
    with pytest.raises(ValueError, match="were encoded by another"): open_one("new_item", text_encoder=None)
    with pytest.raises(ValueError, match="map needs six items"): open_one("map", n_points=4)
    from mmseqrec.models.baselines import SASRec
    with pytest.raises(ValueError, match="call set_catalogue"): explore(SASRec())
    for kind, option in (("user", "added"), ("new_item", "titles")):
        with pytest.raises(ValueError, match=re.escape(f"pass {option}=[...]")): all_scenes(open_one(kind))


def test_thumbnails(tmp_path):
    assert thumbnail(None) is None and thumbnail(tmp_path / "none.png") is None
    (tmp_path / "broken.png").write_text("no image")
    assert thumbnail(tmp_path / "broken.png") is None
    assert thumbnail(Image.new("RGB", (200, 100))).startswith("data:image/webp;base64,")


# Twins

def table_of(path): return page_functions("viz.explorers").stored_scenes(path)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    "Twins of the tiny model."
    folder = tmp_path_factory.mktemp("twins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorers, "_METHODS", explorers._METHODS[:1])  # UMAP takes long
        return {kind: write_twin(open_one(kind, **OPTIONS.get(kind, {})), folder / f"{kind}.html") for kind in KINDS}


def test_twins_hold_every_choice_they_offer(twins, monkeypatch):
    monkeypatch.setattr(explorers, "_METHODS", explorers._METHODS[:1])
    for kind, path in twins.items():
        table = table_of(path)
        known = {json.dumps(choice, sort_keys=True) for choice, _ in table}
        assert len(known) == len(table) > 1 and "{}" in known
        for _, scene in table:
            full = {control["name"]: control["value"] for control in scene["controls"]}
            for control in scene["controls"]:
                rest = {name: value for name, value in full.items() if name not in control["resets"]}
                assert all(json.dumps(rest | {control["name"]: value}, sort_keys=True) in known for value in offers(control))
        explorer = open_one(kind, **OPTIONS.get(kind, {}))
        for choice, scene in table[::max(1, len(table) // 5)]:
            fresh = json.loads(json.dumps(explorer.scene_of(choice)))
            fresh.pop("items")
            assert fresh == scene


def test_twins_have_nothing_that_runs_from_data(twins):
    for path in twins.values():
        page = path.read_text(encoding="utf-8")
        assert EVIL not in page and page.count("<script") == page.count("</script") == 3 and 'lang="en"' in page


def alike(a, b):
    "Compare scenes; the last digit that is written, and which end of a map's axis is left, differ between versions of libraries."
    if isinstance(a, dict): return a.keys() == b.keys() and all(
        alike(a[key], b[key]) or key in ("x", "y") and alike([1 - x for x in a[key]], b[key]) for key in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) or isinstance(b, float): return abs(a - b) <= 2e-3
    return a == b


@pytest.fixture(scope="module")
def gallery(): return page_functions("viz.explorers").open_gallery()


@pytest.mark.xdist_group("gallery")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.drawn] * (kind == "keyword")) for kind in KINDS])
def test_stored_twins_are_not_stale(kind, gallery):
    "A sample of choices, computed afresh from the stored models, gives what the file holds."
    path = artifact_path("explorers", f"{kind}.html")
    assert path.stat().st_size <= 700_000
    explorer = page_functions("viz.explorers").gallery_explorer(gallery, kind)
    shown = path.read_text(encoding="utf-8")
    for end in ("js", "css"): assert artifact_path("explorers", f"explorer.{end}").read_text(encoding="utf-8") in shown
    table = [(choice, scene) for choice, scene in table_of(path) if choice.get("method") != "umap"]
    for number in np.random.default_rng(0).choice(len(table), 3, replace=False):
        choice, scene = table[number]
        fresh = json.loads(json.dumps(explorer.scene_of(choice)))
        fresh.pop("items")
        assert alike(fresh, scene), choice


# In a browser

@pytest.fixture(scope="module")
def browser():
    "Debian's Chromium without a window."
    playwright, program = pytest.importorskip("playwright.sync_api", reason="playwright is not installed"), shutil.which("chromium")
    if program is None: pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    "Open a file; complain at the end about errors, dialogues, and requests that leave it."
    page, wrong = browser.new_page(viewport={"width": 1280, "height": 800}), []
    page.set_default_timeout(60_000)  # of a machine that does other things, too
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append("a dialogue"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
    def go(path):
        page.goto(f"file://{path}")
        page.wait_for_selector(".mmx .status")
        return page
    yield go
    assert not wrong, wrong
    page.close()


def status(page): return page.locator(".mmx .status").inner_text()


def changes(page, act):
    "Do something, and wait until another scene is shown; return its sentence."
    before = page.locator(".mmx").inner_text()
    act()
    page.wait_for_function("text => document.querySelector('.mmx').innerText !== text", arg=before)
    return status(page)


def by_mouse(page, kind):
    "Click something of an explorer."
    if kind == "user": return changes(page, lambda: page.get_by_role("checkbox").first.click())
    if kind == "map":
        before = page.locator(".about .title").first.inner_text()
        page.locator(".map circle[data-row]").last.click(force=True)
        assert page.locator(".about .title").first.inner_text() != before
        return None
    if kind == "mixup": return changes(page, lambda: page.get_by_role("slider").first.click(position={"x": 210, "y": 15}))
    name = {"keyword": "usual level", "metric": "rounded", "new_item": "title", "attention": "attention to"}[kind]
    return changes(page, lambda: page.get_by_role("combobox", name=name).select_option(index=3 if kind == "metric" else 1))


def by_keys(page, kind):
    "Reach a control by the tabulator alone, and press a key."
    page.evaluate("document.activeElement.blur()")
    wanted = {"user": "checkbox", "keyword": "range", "metric": "range", "mixup": "range"}.get(kind, "")
    tag = {"map": "svg"}.get(kind, "select-one")
    for _ in range(40):
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement.type || document.activeElement.tagName")
        if at == (wanted or tag): break
    else: raise AssertionError("no such control is reached")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "focus is seen"
    if kind == "map":
        before = page.locator(".about .title").first.inner_text()
        for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown"): page.keyboard.press(key)
        page.keyboard.press("ArrowRight")
        seen = {page.locator(".about .title").first.inner_text()}
        page.keyboard.press("ArrowUp")
        assert len(seen | {before, page.locator(".about .title").first.inner_text()}) > 1
        return
    key = {"checkbox": "Space", "range": "ArrowRight"}.get(at) or page.evaluate(
        "document.activeElement.selectedIndex ? 'ArrowUp' : 'ArrowDown'")
    before = page.locator(".mmx").inner_text()
    page.keyboard.press(key)
    page.wait_for_function("text => document.querySelector('.mmx').innerText !== text", arg=before)
    assert page.evaluate("document.activeElement.type") == at, "the focus stays"


def check_page(page, kind):
    assert page.title() and page.evaluate("document.documentElement.lang") == "en"
    for node in page.locator(".mmx select, .mmx input").all():
        assert node.evaluate("node => node.labels.length"), "every control has a label"
    by_mouse(page, kind)
    by_keys(page, kind)
    inks = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ink = page.evaluate("['color', 'backgroundColor'].map(name => getComputedStyle(document.querySelector('.mmx'))[name])")
        inks[scheme] = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in ink]
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"sideways at {width}"
    assert inks["light"][0] + 300 < inks["light"][1] and inks["dark"][0] > inks["dark"][1] + 300


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("kind", KINDS)
def test_a_title_is_shown_and_never_run(kind, twins, visit):
    page = visit(twins[kind])
    if kind != "metric": assert EVIL in page.locator(".mmx").inner_text(), "a title is shown, whatever it is"
    assert page.evaluate("document.scripts.length") == 3


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("kind", KINDS)
def test_stored_twins_in_a_browser(kind, visit):
    check_page(visit(artifact_path("explorers", f"{kind}.html")), kind)


@pytest.mark.xdist_group("browser")
def test_a_twin_shows_the_scene_of_the_choice(twins, visit):
    page = visit(twins["user"])
    explorer = open_one("user", **OPTIONS["user"])
    page.get_by_role("checkbox").nth(1).click()
    page.get_by_label("add an event").select_option(index=1)
    scene = explorer.scene_of({"user": "user 0", "events": [0, 2, 3, 4], "added": [7]})
    page.wait_for_function("text => document.querySelector('.mmx .status').innerText === text", arg=scene["status"])
    rows = page.locator(".view-bars").first.locator("li .label").all_inner_texts()
    assert rows == [TITLES[each["rows"][0] - 1] for each in view(scene, "bars")["bars"]]
    page.get_by_role("combobox", name="user").select_option("user 1")  # another user starts again
    page.wait_for_function("text => document.querySelector('.mmx .status').innerText === text",
                           arg=explorer.scene_of({"user": "user 1"})["status"])
    assert page.get_by_role("checkbox", checked=True).count() == 5


# In JupyterLab

NOTEBOOK = """import sys
sys.path.insert(0, {tests!r})
import small_world
from mmseqrec.viz.explorers import explore
explorer = explore(small_world.build("content_missrec"))
explorer"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with a notebook that holds one explorer."
    pytest.importorskip("jupyterlab")
    cell = {"cell_type": "code", "id": "explore", "execution_count": None, "metadata": {}, "outputs": [],
            "source": NOTEBOOK.format(tests=str(Path(__file__).parent))}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/try.ipynb").write_text(json.dumps(
        {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    found = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": found, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "run"),
           "IPYTHONDIR": str(tmp_path / "ipython")}
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=",
               "--ServerApp.password=", "--LabApp.news_url=None", f"--ServerApp.root_dir={tmp_path / 'work'}"]
    with open(tmp_path / "log", "w") as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api").close(); break
            except OSError: time.sleep(.5)
        else: raise AssertionError((tmp_path / "log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
@pytest.mark.xdist_group("browser")
def test_an_explorer_in_a_real_jupyterlab(lab, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}/lab/tree/try.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=90_000)
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".mmx .status", timeout=90_000)
    page.set_default_timeout(30_000)
    first = changes(page, lambda: page.get_by_role("checkbox").first.click())
    n = page.get_by_role("checkbox").count()
    assert first.startswith(f"{n - 1} events.")
    second = changes(page, lambda: (page.get_by_label("add an event").fill("item-7"), page.get_by_role("button", name="Add", exact=True).click()))
    assert second.startswith(f"{n} events.")
    page.close()
