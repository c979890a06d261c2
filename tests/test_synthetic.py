"""The marketplace: the same to the digit, apart from the caption corpus, honest about what it leaves out."""
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from mmseqrec.data import synthetic
from mmseqrec.data.synthetic import (BRANDS, HIDDEN, KINDS, PATTERNS, VIEWS, VISIBLE, WORDS, Behaviour,
                                     attribute_values, dataset_statistics, draw_item, gini, in_caption_corpus,
                                     make_caption_corpus, make_marketplace, perfect_features, real_statistics, say)
from pages import page_functions

simple_features = page_functions("data.synthetic").simple_features

SHARED = Path(__file__).parents[2] / "shared" / "data"
DOMAINS = tuple(KINDS)


@pytest.fixture(scope="module")
def market():
    return make_marketplace(n_users=300, n_items=200, seed=4)


def codes_of(market, domain):
    table = market.truth.attributes.filter(pl.col("domain") == domain)
    return np.stack([[attribute_values(domain, a).index(v) for v in table[a]] for a in VISIBLE], axis=1)


def text_of(market):
    parts = market.items.select(pl.concat_str("title", "description", "details", separator=" ", ignore_nulls=True))
    return parts.to_series().to_list()


def mentions(text, attribute, value):
    return any(re.search(rf"(?<![\w-]){re.escape(w)}(?![\w-])", text, re.IGNORECASE) for w in WORDS[attribute][value])


def test_same_seed_same_digits(market):
    again = make_marketplace(n_users=300, n_items=200, seed=4)
    for table in ("interactions", "items"): assert getattr(market, table).equals(getattr(again, table))
    for table in ("attributes", "events", "users", "interests"):
        assert getattr(market.truth, table).equals(getattr(again.truth, table))
    name = market.items["images"].drop_nulls().explode().drop_nulls()[5]
    assert market.draw(name).tobytes() == again.draw(name).tobytes()


def test_one_domain_alone_is_the_same_shop(market):
    alone, part = make_marketplace("toys", n_users=300, n_items=200, seed=4), market.domain("toys")
    assert alone.interactions.equals(part.interactions) and alone.items.equals(part.items)
    assert alone.truth.events.equals(part.truth.events) and alone.truth.users.equals(part.truth.users)
    assert part.domains == ["toys"]


def test_other_seed_other_shop(market):
    other = make_marketplace(n_users=300, n_items=200, seed=5)
    assert not market.interactions.equals(other.interactions) and not market.items.equals(other.items)
    assert not market.truth.interests.equals(other.truth.interests)


def test_counts_and_clocks(market):
    assert market.interactions.columns == ["user_id", "item_id", "timestamp"]
    assert market.interactions.schema["timestamp"] == pl.Int64 and market.interactions["user_id"].n_unique() == 900
    lengths = market.interactions.group_by("user_id").len()["len"]
    assert lengths.min() >= 5 and lengths.max() <= 50
    assert len(market.items) == 600 and market.items["item_id"].n_unique() == 600
    assert len(market.truth.events) == len(market.interactions)
    ordered = market.interactions.group_by("user_id").agg((pl.col("timestamp").diff().drop_nulls() > 0).all())
    assert ordered["timestamp"].all()
    domain = lambda column: pl.col(column).str.split("-").list.first()
    assert market.interactions.select((domain("user_id") == domain("item_id")).all()).item()
    assert set(market.interactions["item_id"]) <= set(market.items["item_id"])


def test_truth_explains_the_events(market):
    both = pl.concat([market.interactions, market.truth.events], how="horizontal").join(market.truth.users, on="user_id")
    assert both.select(pl.col("interests").list.contains(pl.col("interest")).all()).item()
    assert set(both["reason"]) == {"interest", "follow", "repeat", "explore"}
    companions = dict(zip(market.truth.attributes["item_id"], market.truth.attributes["companions"].to_list()))
    rows = both.with_columns(previous=pl.col("item_id").shift(1).over("user_id")).filter(pl.col("reason") == "follow")
    assert all(item in companions[before] for item, before in zip(rows["item_id"], rows["previous"]))
    repeats = both.with_columns(first=pl.col("timestamp").min().over("user_id", "item_id"))
    assert repeats.filter(pl.col("reason") == "repeat").select((pl.col("timestamp") > pl.col("first")).all()).item()
    one = both.group_by("user_id", "session").agg(pl.col("interest").n_unique())
    assert one["interest"].max() == 1


def test_blocks_of_customers(monkeypatch):
    monkeypatch.setattr(synthetic, "_BLOCK", 70)
    shop = make_marketplace("kitchen", n_users=200, n_items=60)
    assert shop.interactions["user_id"].n_unique() == 200 and len(shop.truth.users) == 200
    assert shop.interactions.group_by("user_id").len()["len"].min() >= 5


def test_behaviour_is_obeyed():
    lonely = make_marketplace("toys", n_users=200, n_items=50, behaviour=Behaviour(follow=0, repeat=0, explore=0))
    assert set(lonely.truth.events["reason"]) == {"interest"}
    short = make_marketplace("toys", n_users=200, n_items=50, behaviour=Behaviour(mean_events=30, max_events=12))
    assert short.interactions.group_by("user_id").len()["len"].max() == 12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_marketplaces_never_show_a_look_of_the_corpus(seed):
    shops = make_marketplace(n_users=5, n_items=300, seed=seed)
    for domain in DOMAINS: assert not in_caption_corpus(domain, codes_of(shops, domain)).any()


def test_corpus_shows_only_its_own_looks(monkeypatch, market):
    looks, pictures, draw = [], set(), draw_item
    def spy(look, *arguments):
        looks.append(look); picture = draw(look, *arguments); pictures.add(hashlib.sha256(picture.tobytes()).digest())
        return picture
    monkeypatch.setattr(synthetic, "draw_item", spy)
    make_caption_corpus(300, seed=0)
    for look in looks:
        codes = [[attribute_values(look["domain"], a).index(look[a]) for a in VISIBLE]]
        assert in_caption_corpus(look["domain"], codes).all()
    corpus, corpus_looks = set(pictures), {tuple(look[a] for a in ("domain", *VISIBLE)) for look in looks}
    looks.clear(); pictures.clear()
    for files in market.items["images"].to_list()[:150]:
        for name in files: market.draw(name)
    assert not corpus & pictures
    assert not corpus_looks & set(market.truth.attributes.select("domain", *VISIBLE).iter_rows())


def test_a_quarter_of_the_looks_is_reserved():
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, len(attribute_values("toys", a)), 20_000) for a in VISIBLE], axis=1)
    assert abs(in_caption_corpus("toys", codes).mean() - 0.25) < 0.02


def test_captions_name_everything_visible(monkeypatch):
    seen, draw = [], draw_item
    spy = lambda look, view, *rest: seen.append((look, view)) or draw(look, view, *rest)
    monkeypatch.setattr(synthetic, "draw_item", spy)
    images, captions = make_caption_corpus(200, seed=3, image_size=32)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert len(seen) == 200 and len(set(captions)) > 190
    monkeypatch.undo()
    rng = np.random.default_rng(1)
    for look, view in seen:
        text = synthetic.caption(look, view, rng)
        for a in VISIBLE:
            if look[a] == "none": continue
            assert mentions(text, a, look[a]) == (not (a == "size" and view == "close-up")), (text, a, look, view)
        assert not re.search(r"[{}]|  |,,| ,|, *$|\b[Aa] [aeiou]", text), text
    again, same = make_caption_corpus(200, seed=3, image_size=32)
    assert (again == images).all() and same == captions
    assert make_caption_corpus(5, seed=4)[1] != make_caption_corpus(5, seed=5)[1]


def test_what_is_left_out_is_absent_and_what_is_named_is_there(market):
    texts, table = text_of(market), market.truth.attributes
    for text, row in zip(texts, table.iter_rows(named=True)):
        other = {"colour": row["accent"], "accent": row["colour"]}
        for a in VISIBLE:
            if row[a] == "none": assert a not in row["named"]
            elif a in row["named"]: assert mentions(text, a, row[a]), (a, row[a], text)
            else:
                assert not mentions(text, a, row[a]), (a, row[a], text)
                if a not in other:  # nor is another value of it named by accident
                    assert not any(mentions(text, a, v) for v in WORDS[a] if v in attribute_values(row["domain"], a)), text
        for a in HIDDEN: assert row[a] in text


def test_words_for_the_omitted_exist_elsewhere(market):
    texts, table = text_of(market), market.truth.attributes
    for a in VISIBLE:
        omitted = {row[a] for row in table.iter_rows(named=True) if a not in row["named"] and row[a] != "none"}
        for value in omitted: assert any(mentions(text, a, value) for text in texts), (a, value)


def test_omit_is_a_probability():
    shop = lambda omit: make_marketplace("toys", n_users=5, n_items=300, omit=omit)
    none, some, every = (shop(omit).truth.attributes["named"].list.len().mean() for omit in (1.0, 0.5, 0.0))
    assert none == 3 and every > 9.7 and abs(some - 3 - 3.4) < 0.3


def test_listings_have_two_to_eight_sentences(market):
    for title, description, details in market.items.select("title", "description", "details").iter_rows():
        n = 1 + sum(len(re.findall(r"\.(?: |$)", part)) for part in (description or "", details))
        assert 2 <= n <= 8 and title and details
        assert not re.search(r"\b[Aa] [aeiou]|[{}]|  ", f"{title} {description} {details}")


def test_no_word_serves_two_values():
    for attribute, values in WORDS.items():
        words = [w for many in values.values() for w in many]
        assert len(words) == len(set(words)), attribute
    fixed = " ".join(synthetic._FILLERS + sum(synthetic._SENTENCES.values(), ()) + tuple(synthetic._NOUNS.values())
                     + sum(BRANDS.values(), ()) + synthetic.OCCASIONS + synthetic.CARES)
    for a in set(VISIBLE) - {"accent"}:
        for value in WORDS[a]: assert not mentions(fixed, a, value), (a, value)


def test_some_pictures_and_descriptions_are_missing(market):
    pictures = market.items["images"].list.len()
    assert 0.02 < (pictures == 0).mean() < 0.09 and pictures.max() == 4
    assert 0.05 < market.items["description"].is_null().mean() < 0.16
    whole = make_marketplace("toys", n_users=5, n_items=40, missing_image=0, missing_description=0, max_images=1)
    assert set(whole.items["images"].list.len()) == {1} and whole.items["description"].null_count() == 0


def test_every_kind_view_and_pattern_can_be_drawn():
    rng = np.random.default_rng(0)
    for domain, kinds in KINDS.items():
        for kind in kinds:
            for view, pattern in zip(VIEWS, rng.permutation(PATTERNS)):
                look = {a: str(rng.choice(attribute_values(domain, a))) for a in VISIBLE}
                look |= {"domain": domain, "kind": kind, "pattern": str(pattern)}
                picture = draw_item(look, view, int(rng.integers(1 << 20)), 48)
                assert picture.size == (48, 48) and picture.mode == "RGB" and np.asarray(picture).std() > 8


@pytest.mark.parametrize("attribute", VISIBLE)
def test_every_visible_attribute_changes_the_picture(attribute):
    base = dict(domain="kitchen", kind="mug", colour="red", accent="white", pattern="striped", material="wood",
                size="medium", motif="star")
    pictures = {draw_item(base | {attribute: v}).tobytes() for v in attribute_values("kitchen", attribute)}
    assert len(pictures) == len(attribute_values("kitchen", attribute))


def test_write_and_read_back(tmp_path):
    shop = make_marketplace("wardrobe", n_users=10, n_items=15, seed=2)
    paths = shop.write(tmp_path / "shop", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shop"]
    assert pl.read_csv(paths["interactions"]).equals(shop.interactions)
    rows = [json.loads(line) for line in paths["items"].read_text().splitlines()]
    public = {"item_id", "domain", "title", "description", "details", "images"}
    assert len(rows) == 15 and all(set(r) == public for r in rows)
    files = {name for r in rows for name in r["images"]}
    assert files == {p.name for p in paths["images"].iterdir()}
    for name in files:
        with Image.open(paths["images"] / name) as picture:
            assert picture.size == (96, 96) and picture.convert("RGB").tobytes() == shop.draw(name).tobytes()
    with pytest.raises(FileExistsError, match="overwrite=True"): shop.write(tmp_path / "shop", progress=False)


def test_truth_is_not_written(tmp_path):
    shop = make_marketplace("toys", n_users=10, n_items=15, omit=1.0)
    paths = shop.write(tmp_path / "shop", progress=False)
    written = paths["interactions"].read_text() + paths["items"].read_text()
    for word in ("interest", "session", "reason", "made_for", "companion", "named", "views", "weights"):
        assert word not in written
    row = shop.truth.attributes.row(0, named=True)
    line = paths["items"].read_text().splitlines()[0]
    assert not any(mentions(line, a, row[a]) for a in VISIBLE if row[a] != "none")


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    shop = make_marketplace("toys", n_users=10, n_items=15)
    calls, draw = [], synthetic._draw_file
    def fails(*arguments):
        calls.append(1)
        if len(calls) == 8: raise KeyboardInterrupt
        return draw(*arguments)
    monkeypatch.setattr(synthetic, "_draw_file", fails)
    with pytest.raises(KeyboardInterrupt): shop.write(tmp_path / "shop", progress=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    paths = shop.write(tmp_path / "shop", progress=False); before = paths["items"].read_bytes()
    other = make_marketplace("toys", n_users=10, n_items=15, seed=9)
    calls.clear(); monkeypatch.setattr(synthetic, "_draw_file", fails)
    with pytest.raises(KeyboardInterrupt): other.write(tmp_path / "shop", overwrite=True, progress=False)
    assert paths["items"].read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["shop"]
    monkeypatch.undo()
    other.write(tmp_path / "shop", overwrite=True, progress=False)
    assert paths["items"].read_bytes() != before and [p.name for p in tmp_path.iterdir()] == ["shop"]


def test_errors_say_what_to_do(market):
    with pytest.raises(ValueError, match="choose from kitchen, wardrobe, toys"): make_marketplace("garden")
    with pytest.raises(ValueError, match="n_items >= 8"): make_marketplace("toys", n_items=3)
    with pytest.raises(ValueError, match="unknown attribute"): attribute_values("toys", "smell")
    with pytest.raises(ValueError, match="no domain"): market.domain("toys").domain("kitchen")
    for name in ("toys-9999_0.png", "toys-0001_7.png", "readme.txt"):
        with pytest.raises(KeyError, match="images column"): market.draw(name)


def test_statistics_by_hand():
    rows = [("a", "x", 1), ("a", "y", 2), ("a", "z", 3), ("b", "x", 1), ("b", "y", 2), ("b", "x", 3), ("b", "y", 4),
            ("c", "y", 5), ("c", "x", 5), ("c", "y", 9)]
    events = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    found = dataset_statistics(events, ["w", "x", "y", "z"], {"text": np.eye(4)})
    # training counts: w 0, x 4, y 3, z 0; held-out: z, y, y
    assert found["popularity Gini"] == round(gini([0, 4, 3, 0]), 4) and found["repeat rate"] == 0.3
    # ranks by popularity: z 3.5 (tie with w), y 2, y 2 of four
    assert found["popularity AUC"] == round((0.5 / 3 + 2 / 3 + 2 / 3) / 3, 4)
    assert found["Markov Recall@10"] == 1.0 and found["events a user, median"] == 4 - 1


def test_markov_and_content_agree_with_loops(market):
    shop = market.domain("kitchen"); ids = shop.items["item_id"].to_list()
    rng = np.random.default_rng(0); table = rng.normal(size=(len(ids), 6)) + 3
    found = dataset_statistics(shop.interactions, ids, {"text": table})
    number = {t: i for i, t in enumerate(ids)}
    groups = shop.interactions.group_by("user_id", maintain_order=True).agg("item_id")["item_id"]
    histories = [[number[i] for i in h] for h in groups]
    popularity, transitions = np.zeros(len(ids)), np.zeros((len(ids), len(ids)))
    for h in histories:
        for i in h[:-1]: popularity[i] += 1
        for i, j in zip(h[:-2], h[1:-1]): transitions[i, j] += 1
    centred = table - table.mean(0); centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    rank = lambda s, t: 1 + (s > s[t]).sum() + ((s == s[t]).sum() - 1) / 2
    markov = np.mean([rank(transitions[h[-2]] + popularity / (popularity.max() + 1), h[-1]) <= 10 for h in histories])
    auc = np.mean([(len(ids) - rank(centred @ centred[h[-6:-1]].sum(0), h[-1])) / (len(ids) - 1) for h in histories])
    assert found["Markov Recall@10"] == pytest.approx(markov, abs=1e-4) and found["text AUC"] == pytest.approx(auc, abs=2e-4)


def test_features_rows_are_items(market):
    shop = market.domain("toys"); simple, perfect = simple_features(shop), perfect_features(shop)
    for table in (*simple.values(), *perfect.values()): assert len(table) == 200 and np.isfinite(table).all()
    bare = (shop.items["images"].list.len() == 0).to_numpy()
    assert (perfect["image"][bare] == 0).all() and (perfect["image"][~bare].sum(1) == 7).all()
    assert (perfect["text"].sum(1) == shop.truth.attributes["named"].list.len().to_numpy()).all()


def test_defaults_stay_near_the_real_sets():
    shop = make_marketplace("kitchen"); ids = shop.items["item_id"].to_list()
    found = dataset_statistics(shop.interactions, ids, perfect_features(shop)); real = real_statistics()
    assert found["users"] == 2000 and found["items"] == 1200 and 12 <= found["events an item"] <= 17 and 6 <= found["events a user, median"] <= 9
    assert 0.38 < found["popularity Gini"] < 0.61 and 0.61 < found["popularity AUC"] < 0.78 and found["repeat rate"] < 0.04
    same_size = make_marketplace("kitchen", n_users=2928, n_items=1585)
    markov = dataset_statistics(same_size.interactions, same_size.items["item_id"].to_list())["Markov Recall@10"]
    assert abs(markov - real["scientific"]["Markov Recall@10"]) < 0.03


def test_what_the_shipped_encoders_read_is_what_was_stored():
    "The AUCs of page 10's table: the kitchen's, measured anew."
    from mmseqrec.artifacts import artifact_path, read_json
    from mmseqrec.features.encoders import load_image_encoder, load_text_encoder
    from mmseqrec.features.sentences import measure_image_encoder, measure_text_encoder
    stored = read_json(artifact_path("marketplace", "encoder_auc.json"))
    text = measure_text_encoder(load_text_encoder("shipped", device="cpu"), ["kitchen"])
    image = measure_image_encoder(load_image_encoder("shipped", device="cpu"), ["kitchen"])
    assert text["kitchen"] == pytest.approx(stored["text"]["kitchen"], abs=.002) and stored["text"]["kitchen"] >= .70
    assert image["kitchen"] == pytest.approx(stored["image"]["kitchen"], abs=.002) and stored["image"]["kitchen"] >= .60
    assert all(set(stored[kind]) == {"kitchen", "wardrobe", "toys"} for kind in ("text", "image"))


def test_real_statistics_hold_aggregates_only():
    stored = real_statistics()
    assert set(stored) == {"scientific", "ml1m", "bench"}
    assert all(isinstance(v, float) for found in stored.values() for v in found.values())


@pytest.mark.skipif(not SHARED.exists(), reason="the data sets for measuring are not here")
def test_stored_statistics_are_what_the_function_finds():
    columns = {"user_id": pl.String, "item_id": pl.String}; folder = SHARED / "scientific"
    events = pl.read_csv(folder / "interactions.csv", schema_overrides=columns)
    ids = pl.read_csv(folder / "items.csv", schema_overrides=columns)["item_id"].to_list()
    features = {name: np.load(folder / f"{name}_clip512.npy") for name in ("text", "image")}
    assert dataset_statistics(events, ids, features) == pytest.approx(real_statistics()["scientific"], abs=2e-3)


def test_say_repairs_the_article():
    assert say("kind", "umbrella") == "This is an umbrella." and say("colour", "red", 1, 1) == "The main colour is crimson."
