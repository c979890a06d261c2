"Items: tables of every kind, sentences, picture names that are attacks, broken pictures, alignment."
import gzip
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from mmseqrec.data.interactions import make_interactions, read_interactions
from mmseqrec.data.items import (ItemTable, align_items, check_images, clean_text, image_problem,
                                 plot_missing_modalities, plot_modality_counts, read_items, require_modality,
                                 safe_image_path, split_sentences)

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")


def picture(size=(32, 24), mode="RGB"):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


# ---------------------------------------------------------------- text

@pytest.mark.parametrize("text, sentences", [
    ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    ("Costs 2.50 or 1,000.00 dollars. 3 left.", ["Costs 2.50 or 1,000.00 dollars.", "3 left."]),
    ("Dr. Who met Mrs. Smith vs. Prof. Moriarty.", ["Dr. Who met Mrs. Smith vs. Prof. Moriarty."]),
    ("By J. R. R. Tolkien. Good.", ["By J. R. R. Tolkien.", "Good."]),
    ("Made in the U.S. by hand, e.g. Boston.", ["Made in the U.S. by hand, e.g. Boston."]),
    ("Holds 12 oz. Black. Weighs 5 lb. 3 oz. net", ["Holds 12 oz.", "Black.", "Weighs 5 lb. 3 oz. net"]),
    ("No. 5 is new. See fig. 3.", ["No. 5 is new.", "See fig. 3."]),
    ('He said "Stop." Then left.', ['He said "Stop."', "Then left."]),
    ("Is it? (Yes.) No!", ["Is it?", "(Yes.)", "No!"]),
    ("first line\n\nsecond line\nstill second", ["first line", "second line still second"]),
    ("• light • strong", ["light", "strong"]),
    ("大きい鍋。軽い！安い", ["大きい鍋。", "軽い！", "安い"]),
    ("Été chaud. Âge d'or. Über alles", ["Été chaud.", "Âge d'or.", "Über alles"]),
    ("version 2.0.1 of www.example.org is here", ["version 2.0.1 of www.example.org is here"]),
    ("Wait... What? and so on", ["Wait...", "What? and so on"]),
    ("", []), (" \n ", []), ("...", []), ("- -- !!", []), ("👍", []), ("x", ["x"])])
def test_split_sentences(text, sentences):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize("text, clean", [
    ("a &amp; b", "a & b"), ("a &amp;amp; b", "a & b"), ("<b>a</b>", "a"), ("1 < 2 > 0", "1 < 2 > 0"),
    ("size <new>", "size <new>"), ("a<br>b<BR/>c", "a\n\nb\n\nc"), ("&lt;p&gt;a&lt;/p&gt;", "a"),
    ("<script>alert('x')</script>a", "a"), ("<!-- note -->a", "a"), ('<a href="x">link</a>', "link"),
    ("a\x00\x07b\ufeff\u200b", "ab"), ("&bogus; &#233; &#x110000;", "&bogus; é"), ("<b", "<b"), ("a & b", "a & b")])
def test_clean_text(text, clean):
    assert clean_text(text) == clean


def test_long_and_hostile_text_is_quick():
    for text in ("<" * 50_000, "a. " * 50_000, "<b" * 50_000, "." * 50_000, "<script" * 20_000, "&" * 50_000,
                 "\n" * 50_000, "(" * 50_000, "<!--" * 10_000, " " * 20_000 + "x", "a" * 100_000):
        split_sentences(clean_text(text))


# ---------------------------------------------------------------- tables

ROWS = [{"item_id": "7", "title": "Iron pan. Heavy", "description": None, "images": "7_b.png|7_a.png"},
        {"item_id": "12", "title": "", "description": "Glass. Lid", "images": None},
        {"item_id": "x", "title": None, "description": None, "images": ""}]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl", "csv.gz", "jsonl.gz", "polars", "pandas"])
def test_every_kind_of_table_gives_the_same_items(tmp_path, kind):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "7_a.png")
    frame = pl.DataFrame(ROWS)
    path = tmp_path / f"items.{kind}"
    if kind == "polars": path = frame
    elif kind == "pandas": path = pytest.importorskip("pandas").DataFrame(ROWS)
    elif kind.startswith("csv"):
        path.write_bytes((gzip.compress if "gz" in kind else bytes)(frame.write_csv().encode()))
    elif kind == "tsv": frame.write_csv(path, separator="\t")
    elif kind == "parquet": frame.write_parquet(path)
    else: path.write_bytes((gzip.compress if "gz" in kind else bytes)("\n".join(map(json.dumps, ROWS)).encode()))
    items = read_items(path, tmp_path / "images", image_column="images")
    assert items.item_tokens == ["7", "12", "x"]
    assert items.texts == [["Iron pan.", "Heavy"], ["Glass.", "Lid"], []]
    assert [[p.name for p in row] for row in items.images] == [["7_b.png", "7_a.png"], [], []]
    report = check_images(items)
    assert [(token, path.name, why) for token, path, why in report.broken] == [("7", "7_b.png", "no such file")]
    assert [[p.name for p in row] for row in report.table.images] == [["7_a.png"], [], []]


def test_lists_numbers_and_repeated_sentences():
    frame = pl.DataFrame({"item_id": [3, 4], "title": ["A pan. New", None], "features": [["A pan.", None, "Blue"], []],
                          "price": [1.5, 2.5]})
    items = read_items(frame)
    assert items.item_tokens == ["3", "4"] and items.texts == [["A pan.", "New", "Blue"], []]
    assert read_items(frame, text_columns=["price", "title"]).texts == [["1.5", "A pan.", "New"], ["2.5"]]
    assert read_items(frame, text_columns="title").texts == [["A pan.", "New"], []]
    assert read_items(frame, text_columns=[]).texts == [[], []]


def test_id_types():
    assert read_items(pl.DataFrame({"item_id": [1., 2.], "title": ["a", "b"]})).item_tokens == ["1", "2"]
    assert read_items(pl.DataFrame({"item_id": [" a ", "b"], "title": ["a", "b"]})).item_tokens == ["a", "b"]


@pytest.mark.parametrize("text, options, message", [
    ("item_id,title\n1,a\n\n2,b\n1,c\n", {}, "x.csv, line 2 and x.csv, line 5 both describe item '1'"),
    ("item_id,title\n1,a\n,b\n", {}, "line 3: the id in column 'item_id' is empty"),
    ("item_id,title\n[PAD],a\n", {}, "line 2: .*which stands for padding"),
    ("id,title\n1,a\n", {}, "no column 'item_id'; there are 'id', 'title'.*id_column="),
    ("item_id,title\n1,a\n", {"text_columns": ["title", "words"]}, "no column 'words'.*text_columns="),
    ("item_id,title\n1,a\n", {"image_column": "image"}, "no column 'image'.*image_column="),
    ("item_id,title\n1,a\n", {"image_column": "title"}, "needs an image_folder"),
    ("item_id,stuff\n1,a\n", {}, "no column with a usual name for text"),
    ("item_id,title\n", {}, "no rows"), ("", {}, "empty"),
    ("item_id,title,title\n1,a,b\n", {}, "'title' occurs twice"),
    ("item_id,title\n1,a,b\n", {}, "line 2: 3 fields"),
    ('item_id,title\n1,"a\n', {}, "line 2")])
def test_nasty_tables(tmp_path, text, options, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message): read_items(tmp_path / "x.csv", **options)


def test_missing_files_and_wrong_folders(tmp_path):
    frame = pl.DataFrame({"item_id": ["a"], "title": ["t"], "image": ["a.png"]})
    with pytest.raises(FileNotFoundError, match="does not exist"): read_items(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="picture folder"): read_items(frame, tmp_path / "none")
    with pytest.raises(ValueError, match="none of the 1 pictures.*'a.png'"):
        read_items(frame, tmp_path, image_column="image")
    assert read_items(frame, tmp_path).images == [[]]


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "..", "/x.png", "//host/x.png", "C:\\x.png", "C:x.png",
                                  "..\\x.png", "a\\..\\x.png", "\\\\host\\x.png", "http://a/x.png", "file:///x.png",
                                  "s3://b/x.png", "x\0.png", "\\x.png"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="leads out|web address"): safe_image_path(tmp_path, name)
    frame = pl.DataFrame({"item_id": ["a", "b"], "title": ["", ""], "image": [None, f"ok.png|{name}"]})
    with pytest.raises(ValueError, match="row 1"): read_items(frame, tmp_path, image_column="image")


def test_ordinary_names_are_allowed(tmp_path):
    for name in ("a.png", "sub/a.png", "a..b.png", "ü 1.png", "...png"):
        assert safe_image_path(tmp_path, name) == tmp_path / name


def test_pictures_are_found_by_item(tmp_path):
    for name in ["a.png", "a_0.jpg", "a-1.PNG", "a_10.webp", "a_2.jpeg", "b-0001.png", "b-0001_0.png", "b_3.png",
                 ".a.png", "a_x.png", "a.txt", "c_1_2.png"]:
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    items = read_items(pl.DataFrame({"item_id": ["a", "b", "b-0001", "c"], "title": [""] * 4}), tmp_path)
    names = [[path.name for path in row] for row in items.images]
    assert names == [["a.png", "a_0.jpg", "a-1.PNG", "a_2.jpeg", "a_10.webp"], ["b_3.png"],
                     ["b-0001.png", "b-0001_0.png"], []]


def bomb(width, height):
    "Make a small PNG file that claims to be large."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def saved(kind, mode="RGB", size=(64, 48), **options):
    buffer = io.BytesIO()
    picture(size, mode).save(buffer, kind, **options)
    return buffer.getvalue()


BROKEN = {
    "zero bytes": ("a.png", b"", "empty file"),
    "error page": ("a.jpg", b"<html>404</html>", "not a picture"),
    "text": ("a.webp", b"hello", "not a picture"),
    "cut png": ("a.png", saved("PNG")[:3000], "damaged"),
    "cut png header": ("a.png", saved("PNG")[:20], "damaged|not a picture"),
    "png with a wrong checksum": ("a.png", saved("PNG")[:3000] + b"\xff" + saved("PNG")[3001:], "damaged"),
    "cut jpeg": ("a.jpg", saved("JPEG")[:1500], "damaged"),
    "cut progressive jpeg": ("a.jpg", saved("JPEG", progressive=True)[:1500], "damaged"),
    "cut webp": ("a.webp", saved("WEBP")[:500], "damaged|not a picture"),
    "cut gif": ("a.gif", saved("GIF", "P")[:1000], "damaged"),
    "cut bmp": ("a.bmp", saved("BMP")[:1000], "damaged"),
    "bomb": ("a.png", bomb(60_000, 60_000), "too large"),
    "smaller bomb": ("a.png", bomb(10_000, 10_000), "too large: 10000 x 10000"),
    "placeholder": ("a.gif", saved("GIF", "P", size=(1, 1)), "placeholder of 1 x 1"),
    "postscript": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not a picture"),
    "tiff": ("a.png", saved("TIFF"), "not a picture"),
}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_dropped_and_named(tmp_path, name, decode):
    file, content, problem = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    picture().save(tmp_path / "a_1.png")
    report = check_images(read_items(pl.DataFrame({"item_id": ["a"], "title": ["t"]}), tmp_path), decode=decode)
    assert [path.name for path in report.table.images[0]] == ["a_1.png"] and report.n_checked == 2
    import re
    [(token, path, why)] = report.broken
    assert token == "a" and path.name == file and re.search(problem, why), why
    assert file in repr(report)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("kind, mode", [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("PNG", "1"),
                                        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"),
                                        ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB")])
def test_whole_pictures_pass(tmp_path, kind, mode, decode):
    (tmp_path / "a.bin").write_bytes(saved(kind, mode))
    assert image_problem(tmp_path / "a.bin", decode) is None
    if kind == "JPEG":
        (tmp_path / "a.bin").write_bytes(saved(kind, mode) + b"\0" * 5000)
        assert image_problem(tmp_path / "a.bin", decode) is None


def test_odd_files(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert image_problem(tmp_path / "folder.png") == "not a file"
    assert image_problem(tmp_path / "none.png") == "no such file"
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert image_problem(tmp_path / "link.png") == "no such file"


# ---------------------------------------------------------------- alignment

def table():
    images = [[Path("a.png")], [], [Path("c.png")], []]
    return ItemTable(["a", "b", "c", "d"], [["x."], ["y."], [], []], images, "items.csv")


def test_alignment_with_a_catalogue():
    aligned = table().align(["[PAD]", "c", "z", "a"])
    assert aligned.texts == [[], [], [], ["x."]] and aligned.images == [[], [Path("c.png")], [], [Path("a.png")]]
    assert aligned.unknown == ["z"] and aligned.n_unused == 2
    summary = aligned.summary()
    assert (summary["n_items"], summary["n_unknown"], summary["neither"], summary["image_only"]) == (3, 1, 1, 1)
    assert aligned.missing_text_mask.tolist() == [True, True, True, False]
    again = align_items(aligned, aligned.item_tokens)
    assert again.texts == aligned.texts and again.images == aligned.images
    with pytest.raises(ValueError, match="describes none of the 2 items.*'q'"): table().align(["[PAD]", "q", "r"])
    with pytest.raises(ValueError, match="PAD"): table().align(["a"])
    with pytest.raises(ValueError, match="one length"): ItemTable(["a"], [], [])


@pytest.mark.parametrize("require, kept", [("any", "abc"), ("text", "ab"), ("image", "ac"), ("both", "a")])
def test_items_can_be_required_to_have_a_modality(require, kept):
    events = make_interactions(pl.Series(["u"] * 5), pl.Series(list("abcdz")), np.arange(5))
    assert require_modality(events, table(), require).item_tokens == ["[PAD]", *kept]
    with pytest.raises(ValueError, match="require must be"): require_modality(events, table(), "all")


def test_figures_are_drawn():
    import matplotlib.pyplot as plt
    plot_missing_modalities(table()).figure.canvas.draw()
    plot_modality_counts(table()).canvas.draw()
    long = ItemTable([str(k) for k in range(200)], [["s"] * k for k in range(200)], [[]] * 200)
    plot_modality_counts(long).canvas.draw()
    plt.close("all")


# ---------------------------------------------------------------- real data, where it lies beside the repository

@needs_shared
def test_movielens_items():
    events = read_interactions(SHARED / "ml1m" / "interactions.csv")
    items = read_items(SHARED / "ml1m" / "items.csv", SHARED / "ml1m" / "images")
    assert len(items) == 3253
    report = check_images(items)
    assert report.n_checked == 3253 and report.broken == []
    aligned = items.align(events.item_tokens)
    assert aligned.unknown == [] and aligned.n_unused == 3253 - 3196
    assert aligned.summary()["both"] == 3196


@needs_shared
def test_scientific_items():
    events = read_interactions(SHARED / "scientific" / "interactions.csv")
    aligned = read_items(SHARED / "scientific" / "items.csv").align(events.item_tokens)
    assert aligned.unknown == [] and aligned.summary()["text_only"] == 1585
