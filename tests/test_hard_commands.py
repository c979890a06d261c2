"Files that people really have, beside the tables: histories, settings, features, images, encoders, terminals."
import gc
import gzip
import html.parser
import json
import os
import subprocess
import sys
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmseqrec.app.cli import error_sentence, known_split, main, read_histories
from mmseqrec.artifacts import read_json, read_text, write_json
from mmseqrec.config import RunConfig
from mmseqrec.data.interactions import leave_one_out, make_interactions
from mmseqrec.data.items import read_items
from mmseqrec.data.sources import _find_member, _links, read_amazon
from mmseqrec.experiments import run as experiments
from mmseqrec.experiments.run import _load_array, prepare_data
from mmseqrec.features.clip import IMAGE_SETTINGS, quiet_transformers
from mmseqrec.features.encoders import load_catalogue, load_image_encoder, load_text_encoder
from small_shop import shell

ROOT = Path(__file__).parent.parent
FAST = ("--text-encoder", "shipped", "--image-encoder", "shipped", "--device", "cpu", "--quiet", "--min-item", 1)


def is_one_sentence(text): return len(text.strip().splitlines()) == 1 and "Traceback" not in text

def write_tables(folder, n_items=12, n_users=15, n_events=6, title="Pot number {}", header="user_id,item_id,timestamp"):
    "Two tables; each user takes items in a row."
    folder.mkdir(parents=True, exist_ok=True)
    events = [f"u{u},é{(u + step) % n_items},{100 * u + step}" for u in range(n_users) for step in range(n_events)]
    (folder / "events.csv").write_text("\n".join([header, *events]) + "\n", encoding="utf-8")
    rows = [json.dumps({"item_id": f"é{n}", "title": title.format(n)}) for n in range(n_items)]
    (folder / "items.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return ["--interactions", folder / "events.csv", "--items", folder / "items.jsonl"]

@pytest.fixture(scope="module")
def shop(tmp_path_factory): return write_tables(tmp_path_factory.mktemp("shop"))

@pytest.fixture(scope="module")
def model(tmp_path_factory, shop):
    folder = tmp_path_factory.mktemp("run")
    assert main([str(word) for word in ("run", *shop, "--systems", "popularity", *FAST, "--out", folder)]) == 0
    return folder / "models/popularity-seed0"


# Text, settings, histories

@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfa\nb\n", b"a\r\nb\r\n", b"a\rb\r", b"a\nb\n"])
def test_text_of_every_system_is_the_same(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    assert read_text(tmp_path / "x") == "a\nb\n"

@pytest.mark.parametrize("raw, line", [("é".encode("utf-16"), 1), ("a\r\ncafé".encode("latin-1"), 2),
                                       ("a\rb\rü".encode("latin-1"), 3), ("a\nb".encode("utf-16-le"), 1), (b"a\nb\0", 2)])
def test_other_encodings_are_named_with_line_and_remedy(tmp_path, raw, line):
    for name, read in (("x.txt", read_text), ("x.json", read_json), ("x.txt", read_histories), ("x.jsonl", read_histories)):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name}, line {line}: not UTF-8 text; save it again as UTF-8"): read(tmp_path / name)


@pytest.mark.parametrize("damage", [lambda raw: raw[:40], lambda raw: raw[:2] + b"no archive", lambda raw: raw[:-30]])
def test_a_damaged_archive_of_features_is_not_left_open(tmp_path, damage):
    np.savez(tmp_path / "a.npz", np.ones((3, 2)))
    (tmp_path / "a.npz").write_bytes(damage((tmp_path / "a.npz").read_bytes()))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="a.npz"): _load_array(tmp_path / "a.npz")
        gc.collect()
    assert not seen


@pytest.mark.parametrize("read", [read_histories, read_json], ids=["histories", "JSON"])
def test_a_packed_text_file_is_called_packed(tmp_path, read):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[["a", "b"]]'))
    with pytest.raises(ValueError, match="a.json.gz: compressed with gzip; gunzip it first"): read(tmp_path / "a.json.gz")

def test_half_a_letter_survives_a_json_file(tmp_path):
    assert read_json(write_json(tmp_path / "x.json", ["\ud800é"])) == ["\ud800é"]

def test_settings_with_a_mark_are_read_and_wrong_kinds_refused(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text('{"epochs": 3}', encoding="utf-8-sig")
    assert read_json(path) == {"epochs": 3}
    for values, says in (({"epochs": "3"}, "--config|epochs must be a whole number"), ({"lr": True}, "lr must be a number"),
                         ({"seeds": 3}, "seeds must be a list"), ({"text_columns": "title"}, "--text-columns must be a list"),
                         ({"split": "random"}, "split must be leave-one-out or global-time"), ({"min_user": None}, "--min-user"),
                         ({"umap": 1}, "umap must be true or false")):
        write_json(path, values)
        code, out, err = shell(capsys, "run", "--config", path, "--out", tmp_path / "r")
        assert code == 2 and is_one_sentence(err) and any(say in err for say in says.split("|")), err
    assert RunConfig(lr=1, new_items=0, items=Path("a.csv")).items == "a.csv" and RunConfig(time_column="").time_column is None

@pytest.mark.parametrize("name, text, expected", [
    ("h.txt", "a b\n\n c,d\te", [["a", "b"], [], ["c", "d", "e"]]), ("h.txt", "\n\na\n", [[], [], ["a"]]),
    ("h.txt", "a\r\n\r\n", [["a"], []]), ("h.txt", "\ufeffa\n", [["a"]]), ("h.csv", '"red pan","b,c"\n', [["red pan", "b,c"]]),
    ("h.txt", 'a 5"b\u2028c\n', [["a", '5"b', "c"]]), ("h.jsonl", '["a"]\n\n[1, 2.0, " b "]\n', [["a"], [], ["1", "2", "b"]]),
    ("h.jsonl", '\ufeff["a\u2028b"]\r\n', [["a\u2028b"]]), ("h.json", '\ufeff[["a"], [], [3]]', [["a"], [], ["3"]])])
def test_every_line_of_a_file_of_histories_has_its_place(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text.encode())
    assert read_histories(tmp_path / name) == expected

@pytest.mark.parametrize("name, text, says", [
    ("h.txt", "", "h.txt holds no history"), ("h.json", "[]", "h.json holds no history"), ("h.jsonl", "\n \n", "no history"),
    ("h.jsonl", '["a"]\n["b"', "h.jsonl, line 2: not a JSON list; write"), ("h.json", '[["a"],\n["b",]]', "h.json, line 2"),
    ("h.jsonl", '{"a": 1}', "line 1"), ("h.jsonl", "[true]", "history 1 must"), ("h.json", '[["a"], [null]]', "history 2 must"),
    ("h.jsonl", "[NaN]", "history 1"), ("h.jsonl", "[" * 100_000, "line 1"), ("h.json", '["a"]', "history 1")])
def test_what_is_no_history_is_named(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says): read_histories(tmp_path / name)

def test_a_gap_has_an_empty_answer(model, tmp_path, capsys):
    (tmp_path / "h.txt").write_text("é3 é4\n\né5\n", encoding="utf-8-sig")
    code, out, err = shell(capsys, "recommend", model, "--histories", tmp_path / "h.txt", "--json", tmp_path / "a.json")
    answers = read_json(tmp_path / "a.json")
    assert code == 0 and [answer["history"] for answer in answers] == [["é3", "é4"], [], ["é5"]]
    assert not answers[1]["items"] and not any(answer["unknown"] for answer in answers)


# Terminals

@pytest.mark.parametrize("terminal", ["ascii", "latin-1", "utf-8"])
def test_no_terminal_ends_a_command(model, tmp_path, terminal):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": terminal}
    words = ["recommend", str(model), "--history", "é3", "漢", "--json", str(tmp_path / "a.json"), "--device", "cpu"]
    ran = subprocess.run([sys.executable, "-m", "mmseqrec", *words], env=env, capture_output=True)
    out = ran.stdout.decode(terminal)
    assert ran.returncode == 0 and not ran.stderr and read_json(tmp_path / "a.json")[0]["unknown"] == ["漢"]
    assert (r"\u6f22" in out) == (terminal != "utf-8") and (r"\xe93" in out) == (terminal == "ascii")

def test_the_file_is_there_when_the_terminal_is_not(model, tmp_path, capsys, monkeypatch):
    def broken(*_, **__): raise BrokenPipeError(32, "Broken pipe")
    for command in (["recommend", model, "--history", "é3"], ["evaluate", model]):
        with monkeypatch.context() as patch:
            patch.setattr("builtins.print", broken)
            with pytest.raises(BrokenPipeError): main([*map(str, command), "--device", "cpu", "--quiet", "--json",
                                                       str(tmp_path / command[0])])
        assert (tmp_path / command[0]).exists()


# Order of operations

def test_what_is_held_out_does_not_depend_on_what_is_known():
    user, item = [0] * 5 + [1] * 5 + [2] * 2, list("abxcy") + list("abcax") + list("ab")
    events = make_interactions(pl.Series(user), pl.Series(item), np.arange(12))
    split = known_split(leave_one_out(events), ["[PAD]", "c", "b", "a"])
    kept = [split.interactions.item_tokens[i] for i in split.interactions.item]
    assert kept == list("abc") + list("abca") + list("ab") and split.stage.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]

def test_events_of_unknown_items_are_not_replaced_by_known_ones(model, shop, tmp_path, capsys):
    later = [f"u{u},{'new' if u % 3 else 'é1'},9999" for u in range(15)]
    (tmp_path / "later.csv").write_text(Path(shop[1]).read_text(encoding="utf-8") + "\n".join(later) + "\n", encoding="utf-8")
    words = ["evaluate", model, "--interactions", tmp_path / "later.csv", "--device", "cpu", "--quiet", "--json", tmp_path / "e"]
    code, out, err = shell(capsys, *words)
    record = read_json(tmp_path / "e")
    assert code == 0 and record["n_events"] == 5 and record["n_targets_left_out"] == 10 == record["n_events_left_out"]
    assert "10 of 105 events" in out and "10 of 15 test events cannot be ranked" in out
    (tmp_path / "later.csv").write_text(Path(shop[1]).read_text(encoding="utf-8") + "\n".join(
        f"u{u},new,9999" for u in range(15)), encoding="utf-8")
    code, out, err = shell(capsys, *words)
    assert code == 2 and is_one_sentence(err) and "later.csv: of the 15 test events" in err
    assert shell(capsys, *words, "--stage", "valid")[0] == 0

@pytest.mark.parametrize("words, n_events, says", [
    (["--systems", "popularity", "--min-user", 1], 2, "events.csv: no user has three events|--split global-time"),
    (["--systems", "missrec", "--n-layers", 1], 6, "MISSRec: --n-layers must be even|leave missrec out"),
    (["--systems", "sasrec", "--hidden-size", 66, "--n-heads", 4], 6, "--hidden-size (66) must be a multiple of --n-heads"),
    (["--systems", "mmsrec"], 6, "needs pictures, and there are none|leave mmsrec out"),
    (["--min-user", 9], 6, "lower --min-user=9 or --min-item=1")])
def test_what_cannot_be_is_known_before_anything_is_encoded(tmp_path, capsys, monkeypatch, words, n_events, says):
    monkeypatch.setattr(experiments, "build_catalogue", lambda *_, **__: 1 / 0)
    tables = write_tables(tmp_path / "shop", n_events=n_events)
    code, out, err = shell(capsys, "run", *tables, *FAST, *words, "--out", tmp_path / "run")
    assert code == 2 and is_one_sentence(err) and all(say in err for say in says.split("|")), err

def test_two_events_a_user_can_be_split_by_time(tmp_path, capsys):
    tables = write_tables(tmp_path / "shop", n_events=2)
    words = ["--min-user", 1, "--split", "global-time", "--systems", "popularity"]
    assert shell(capsys, "run", *tables, *FAST, *words, "--out", tmp_path / "run")[0] == 0

def test_a_standard_system_that_cannot_have_its_size_is_left_out(shop, tmp_path, capsys):
    config = RunConfig(interactions=str(shop[1]), items=str(shop[3]), text_encoder="shipped", image_encoder="shipped", n_layers=1,
                       min_item=1, device="cpu")
    data = prepare_data(config, tmp_path, progress=False)
    assert "missrec" not in data.systems and any("n_layers must be even" in note and "left out" in note for note in data.notes)


# Remedies and options

def test_remedies_can_be_typed(tmp_path, capsys):
    assert error_sentence(ValueError("e.csv: Choose with id_column='...', or time_column=None for the order")) == (
        "e.csv: Choose with --item-column='...', or --time-column='' for the order")
    assert error_sentence(ValueError("data/min_user.csv: text_columns=[...], or text_columns=[] for none")) == (
        "data/min_user.csv: --text-columns='...', or --text-columns='' for none")
    tables = write_tables(tmp_path / "shop", header="user_id,item_id,when")
    rows = [json.dumps({"item_id": f"é{n}", "weight": n}) for n in range(12)]
    Path(tables[3]).write_text("\n".join(rows))
    words = ["run", *tables, *FAST, "--systems", "popularity", "--out", tmp_path / "run"]
    code, out, err = shell(capsys, *words)
    assert code == 2 and "--time-column='' for the order" in err
    code, out, err = shell(capsys, *words, "--time-column=")
    assert code == 2 and "--text-columns='' for none" in err
    assert shell(capsys, *words, "--time-column=", "--text-columns=")[0] == 0
    model = tmp_path / "run/models/popularity-seed0"
    assert shell(capsys, "evaluate", model, "--device", "cpu", "--quiet")[0] == 0
    code, out, err = shell(capsys, "evaluate", model, "--device", "cpu", "--quiet", "--time-column", "timestamp")
    assert code == 2 and "no column 'timestamp'" in err

def test_columns_are_obeyed_where_features_are_given(tmp_path):
    tables = write_tables(tmp_path / "shop")
    rows = [json.dumps({"what": f"é{n}", "words": f"Pan {n}", "file": None}) for n in range(12)]
    Path(tables[3]).write_text("\n".join(rows))
    Path(tables[1]).write_text(Path(tables[1]).read_text(encoding="utf-8").replace("item_id", "what"), encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    np.savez(tmp_path / "f.npz", rows=np.eye(12))
    config = RunConfig(interactions=str(tables[1]), items=str(tables[3]), item_column="what", text_columns=("words",),
                       images=str(tmp_path / "pictures"), image_column="file", text_features=str(tmp_path / "f.npz"),
                       systems=("popularity", "content_sasrec"), min_item=1, device="cpu")
    data = prepare_data(config, tmp_path / "run", progress=False)
    assert data.catalogue.text_emb.shape == (13, 1, 12) and data.items.texts[1] == ["Pan 0"]

@pytest.mark.parametrize("name, array", [
    ("o.npy", np.array([[1], [2, 3]], object)), ("s.npy", np.array([["a"]])), ("c.npy", np.ones((2, 2), complex)),
    ("o.npz", {"x": np.array([None])}), ("two.npz", {"x": np.ones(2), "y": np.ones(2)}), ("empty.npy", b""),
    ("text.npy", b"1,2\n3,4\n"), ("cut.npy", None)])
def test_what_is_no_array_of_numbers_is_named(tmp_path, name, array):
    path = tmp_path / name
    if isinstance(array, bytes): path.write_bytes(array)
    elif isinstance(array, dict): np.savez(path, **array)
    else: np.save(path, np.ones((9, 9)) if array is None else array, allow_pickle=True)
    if array is None: path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=rf"{name}: .*np.save") as caught: _load_array(path)
    assert "pickle" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere.npy"): _load_array(tmp_path / "nowhere.npy")

def test_a_damaged_catalogue_is_named(model, tmp_path):
    for name, text, says in (("catalogue.safetensors", "garbage", "damaged"), ("catalogue.json", "[]", "different catalogues")):
        folder = tmp_path / name
        folder.mkdir()
        for path in (model / "catalogue").iterdir(): (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=says): load_catalogue(folder)


# Images and links

def images_of(folder, names, tokens, **options):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    table = read_items(pl.DataFrame({"item_id": tokens, "title": [""] * len(tokens)}), folder, **options)
    return [[path.relative_to(folder).as_posix() for path in row] for row in table.images]

@pytest.mark.parametrize("names, tokens, found", [
    (["010/0108.jpg", "011/0110.jpg", "011/0110_2.jpg"], ["0108", "0110"], [["010/0108.jpg"], ["011/0110.jpg", "011/0110_2.jpg"]]),
    (["a.jfif", "b.JPE"], ["a", "b"], [["a.jfif"], ["b.JPE"]]),
    (["1/2.jpg", "1/10.jpg", "1/1.jpg", "2/1.jpg"], ["1", "2"], [["1/1.jpg", "1/2.jpg", "1/10.jpg"], ["2/1.jpg"]]),
    (["a.jpg", "small/a.jpg", "small/b.jpg"], ["a", "b"], [["a.jpg"], ["small/b.jpg"]]),
    (["large/a.jpg", "small/a.jpg"], ["a"], [["large/a.jpg"]]),
    ([".cache/b.jpg", "__MACOSX/b.jpg", "a.jpg", "._a.jpg"], ["a", "b"], [["a.jpg"], []]), ([], ["a"], [[]]),
    (["failed_links.json"], ["a"], [[]])])
def test_images_are_found_below_the_folder(tmp_path, names, tokens, found):
    assert images_of(tmp_path / "images", names, tokens) == found if names else images_of(tmp_path, names, tokens) == found

@pytest.mark.parametrize("table, disk", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_accents_are_compared_as_letters(tmp_path, table, disk):
    token, name = unicodedata.normalize(table, "café"), unicodedata.normalize(disk, "café")
    assert images_of(tmp_path / "a", [f"{name}_1.png"], [token]) == [[f"{name}_1.png"]]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"{name}.png").touch()
    frame = pl.DataFrame({"item_id": ["x"], "title": [""], "file": [f"{token}.png"]})
    assert read_items(frame, tmp_path / "b", image_column="file").images == [[tmp_path / "b" / f"{name}.png"]]

def test_a_folder_of_which_nothing_fits_is_an_error(tmp_path, shop, capsys):
    with pytest.raises(ValueError, match=r"none of the 2 files in .*images, such as 'y.avif', has the name of an item, such as 'a'; "
                                         r"expected <item_id>.jpg"):
        images_of(tmp_path / "images", ["x/p.jpg", "y.avif"], ["a"])
    words = ["run", *shop, *FAST, "--images", tmp_path / "images", "--out", tmp_path / "r"]
    code, out, err = shell(capsys, *words, "--systems", "popularity")
    assert code == 2 and is_one_sentence(err) and "--image-column='...'" in err

def test_the_terminal_says_that_no_image_was_found(tmp_path, shop, capsys):
    (tmp_path / "images").mkdir()
    words = ["run", *shop, *FAST, "--images", tmp_path / "images", "--out", tmp_path / "r", "--systems"]
    code, out, err = shell(capsys, *words, "content_sasrec", "--epochs", 1, "--hidden-size", 16)
    assert code == 0 and "12 items are without a picture" in out
    code, out, err = shell(capsys, *words, "mmsrec")
    assert code == 2 and "pictures, and there are none" in err

@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_no_image_and_no_archive_leads_out_of_its_folder(tmp_path, capsys, name):
    tables = write_tables(tmp_path / "shop")
    rows = [json.dumps({"item_id": f"é{n}", "title": "Pan", "file": name if n == 3 else None}) for n in range(12)]
    Path(tables[3]).write_text("\n".join(rows))
    (tmp_path / "images").mkdir()
    words = ["run", *tables, *FAST, "--images", tmp_path / "images", "--image-column", "file", "--out", tmp_path / "r"]
    code, out, err = shell(capsys, *words)
    assert code == 2 and is_one_sentence(err) and "items.jsonl, line 4" in err and "leads out of" in err
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive: archive.writestr(name.replace("secret.png", "movies.dat"), "1::A::B")
    assert _find_member(tmp_path / "x.zip", ["movies.dat"]) is None and not list(tmp_path.rglob("movies.dat"))

@pytest.mark.parametrize("value, links", [
    ({"hi_res": [None, "h2"], "large": ["l1", None], "thumb": ["t1", "t2"]}, ["l1", "h2"]), ('["http://a/1.jpg", "http://a/2.jpg"]',
     ["http://a/1.jpg", "http://a/2.jpg"]), ("[{'large': 'https://a/1.jpg'}]", ["https://a/1.jpg"]), ({"large": []}, []),
    ([{"small_image_url": "s"}, {"url": "u"}], ["s", "u"]), ("http://a/[1].jpg", ["http://a/[1].jpg"]), ({}, []), (None, [])])
def test_links_are_read_in_every_layout(value, links): assert _links(value) == links

def test_metadata_of_another_layout_or_without_links(tmp_path):
    (tmp_path / "x.csv").write_text("B000000001,A1,5.0,1500000000\nB000000001,A2,5.0,1500000000\n")
    for about, links, n_notes in (({"images": [{"large": "http://a/1.jpg"}]}, ["http://a/1.jpg"], 0), ({"imUrl": "http://a/2.jpg"},
                                  ["http://a/2.jpg"], 0), ({"imageURL": [], "image": ["http://a/3.jpg"]}, ["http://a/3.jpg"], 0),
                                  ({"pictures": ["http://a/4.jpg"]}, [], 1)):
        record = {"asin": "B000000001", "title": "Pan", "also_buy": [], **about}
        (tmp_path / "m.json").write_text(json.dumps(record) + "\n")
        raw = read_amazon(2018, tmp_path / "x.csv", tmp_path / "m.json")
        assert raw.items["image_urls"].to_list() == [links] and sum("no record has a link" in note for note in raw.notes) == n_notes


# What an encoder cannot take

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=34)

def make_tokenizer(special):
    words = [*dict.fromkeys(special.values()), *"red pan lamp number a".split()]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        ends = [(special[name], words.index(special[name])) for name in ("cls_token", "sep_token")]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

WITH_ENDS = dict(cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>")
ONE_END = dict(unk_token="<end>", eos_token="<end>", bos_token="<end>")

def save(folder, kind, special=WITH_ENDS, vocab_size=9, **sizes):
    "Write a checkpoint with random weights."
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocab_size, pad_token_id=1, **sizes)
    with quiet_transformers():
        torch.manual_seed(0)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
        if special: make_tokenizer(special).save_pretrained(folder)
    return folder

@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "MPNet", "Camembert", "Longformer", "Bert", "Electra"])
def test_texts_are_cut_at_the_places_there_are(tmp_path, kind):
    options = dict(attention_window=8) if kind == "Longformer" else {}
    encoder = load_text_encoder(save(tmp_path, kind, **SIZES, **options), device="cpu")
    assert encoder.max_tokens == (34 if kind in ("Bert", "Electra") else 32)
    rows = encoder.encode(["red pan " * 50, "red pan " * ((encoder.max_tokens - 2) // 2)])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)

def test_a_tokenizer_that_cannot_pad_pads_with_its_end(tmp_path):
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=34)
    encoder = load_text_encoder(save(tmp_path, "GPT2", ONE_END, **sizes), device="cpu")
    rows = encoder.encode(["red", "red pan lamp", "red " * 90])
    np.testing.assert_allclose(rows[0], encoder.encode(["red"])[0], atol=1e-5)

def test_of_an_encoder_and_decoder_the_first_half_is_read(tmp_path):
    sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    special = dict(unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    encoders = [load_text_encoder(save(tmp_path / kind, kind, special, **sizes), device="cpu") for kind in ("T5", "T5Encoder")
                if hasattr(transformers, f"{kind}Config")]
    assert all(encoder.max_tokens == 512 and encoder.encode(["red pan " * 400]).shape == (1, 16) for encoder in encoders)

@pytest.mark.parametrize("kind, special, sizes, says", [
    ("Bert", WITH_ENDS, dict(vocab_size=5), "its tokenizer has 9 tokens, its network 5"),
    ("Bert", None, {}, "tokenizer"), ("ViT", None, dict(image_size=64, patch_size=32), "tokenizer cannot be loaded")])
def test_a_text_encoder_that_does_not_fit_is_one_sentence(tmp_path, kind, special, sizes, says):
    sizes = {name: size for name, size in SIZES.items() if kind == "Bert" or "position" not in name} | sizes
    with pytest.raises(ValueError, match=says) as caught: load_text_encoder(save(tmp_path / "mine", kind, special, **sizes))
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)

def test_images_of_another_size_than_the_network_takes_are_one_sentence(tmp_path):
    save(tmp_path / "mine", "ViT", None, image_size=64, patch_size=32, **{k: v for k, v in SIZES.items() if "pos" not in k})
    settings = IMAGE_SETTINGS | {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    write_json(tmp_path / "mine/preprocessor_config.json", settings)
    with pytest.raises(ValueError, match="mine: the network cannot read a picture"): load_image_encoder(tmp_path / "mine")

def test_damaged_weights_name_the_checkpoint(tmp_path):
    save(tmp_path / "mine", "Bert", **SIZES)
    (tmp_path / "mine/model.safetensors").write_bytes(b"\x99" * 50)
    with pytest.raises(FileNotFoundError, match="mine: no checkpoint with safetensors weights"): load_text_encoder(tmp_path / "mine")

@pytest.mark.parametrize("below", ["", "0_Transformer"])
def test_folders_of_sentence_transformers(tmp_path, below):
    save(tmp_path / below, "Roberta", **SIZES)
    modules = [("Transformer", below), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules]
    write_json(tmp_path / "modules.json", listed)
    write_json(tmp_path / "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    write_json(tmp_path / below / "sentence_bert_config.json", {"max_seq_length": 9})
    encoder = load_text_encoder(tmp_path, device="cpu")
    assert (encoder.pooling, encoder.normalize, encoder.max_tokens) == ("cls", True, 9)
    write_json(tmp_path / "modules.json", [*listed, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}])
    with pytest.raises(ValueError, match="its module Dense is not supported"): load_text_encoder(tmp_path, device="cpu")


# The report

class Page(html.parser.HTMLParser):
    "What a browser would run, and what it would show."
    def __init__(self, text):
        super().__init__()
        self.runs, self.shown = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "iframe", "object"): self.runs.append(tag)
        self.runs += [name for name, value in attrs if name.startswith("on") or (value or "").strip().startswith("javascript:")]

    def handle_data(self, data): self.shown += data

def test_what_a_table_says_is_shown_and_not_run(tmp_path, capsys):
    evil = '"><img src=x onerror=alert({})> <svg/onload=alert(2)> &lt;script&gt;<scr<script>ipt>alert(3)</scr</script>ipt> pan {}'
    tables = write_tables(tmp_path / "shop", title=evil.replace("{}", "{0}"))
    events = Path(tables[1]).read_text(encoding="utf-8").replace("é1,", "<script>é1</script>,")
    Path(tables[1]).write_text(events, encoding="utf-8")
    items = Path(tables[3]).read_text(encoding="utf-8").replace('\\u00e91"', '<script>\\u00e91</script>"')
    Path(tables[3]).write_text(items, encoding="utf-8")
    words = ["run", *tables, *FAST, "--systems", "sasrec", "--epochs", 1, "--hidden-size", 16, "--out", tmp_path / "<script>run"]
    code, out, err = shell(capsys, *words)
    page = Page((tmp_path / "<script>run/report.html").read_text(encoding="utf-8"))
    assert code == 0 and not page.runs and "ipt>alert(3)" in page.shown and "<script>run" in page.shown
