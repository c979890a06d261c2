"Tables and images as people have them: missing values, ids, times, quotes and repeats in all their clothes; one way to open."
import datetime
import decimal
import io
import json
import struct
import zlib

import numpy as np
import polars as pl
import pytest
from PIL import Image

from mmseqrec.app.report import first_pictures, thumbnail
from mmseqrec.data.interactions import bare_id, make_interactions, parse_times, read_interactions
from mmseqrec.data.items import ItemTable, check_images, image_problem, read_items
from mmseqrec.data.sources import RawTables, read_amazon, read_atomic, read_movielens
from mmseqrec.experiments.run import _copy_notes, prepare_data
from mmseqrec.figures import ImageError, open_image, plot_images
from mmseqrec.viz.embeddings import plot_picture_map
from small_shop import quick_config, write_shop

NAN = float("nan")
HEAD = "user_id,item_id,timestamp\n"


def refused(read, *words):
    "Check that `read()` ends in one sentence that holds all the words, in this order."
    with pytest.raises(ValueError, match=".*".join(words)) as caught: read()
    assert "\n" not in str(caught.value)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def frame(**columns):
    return pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]} | columns)


def pandas_frame(**columns):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]} | columns)


# ---------------------------------------------------------------- one way to open an image

def png(width, height, depth, colour, rows, key=None):
    "Write a PNG file of any depth; `key` is its transparent colour."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + (chunk(b"tRNS", key) if key else b"") + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
            + chunk(b"IEND", b""))


def palette_image(kind, **options):
    "A red image whose left half is transparent, by the first entry of its palette."
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 4, 8))
    stream = io.BytesIO()
    image.save(stream, kind, transparency=options.get("key", 0))
    return stream.getvalue()


KEYED = {"gif": palette_image("GIF"), "palette index": palette_image("PNG"),
         "palette bytes": palette_image("PNG", key=b"\x00\xff"),
         "grey key": png(2, 1, 8, 0, [b"\x07\x4c"], struct.pack(">H", 7)),
         "rgb key": png(2, 1, 8, 2, [b"\x07\x08\x09\xff\x00\x00"], struct.pack(">3H", 7, 8, 9)),
         "16-bit grey key": png(2, 1, 16, 0, [struct.pack(">2H", 40000, 19600)], struct.pack(">H", 40000)),
         "16-bit rgb key": png(2, 1, 16, 2, [struct.pack(">6H", 40000, 0, 0, 65535, 0, 0)], struct.pack(">3H", 40000, 0, 0)),
         "16-bit grey and alpha": png(2, 1, 16, 4, [struct.pack(">4H", 40000, 0, 19600, 65535)])}


@pytest.mark.parametrize("name", KEYED)
def test_transparent_parts_are_white_wherever_an_image_is_shown(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(KEYED[name])
    left, right = (open_image(path).getpixel((x, 0)) for x in (0, open_image(path).width - 1))
    assert left == (255, 255, 255) and right in ((255, 0, 0), (76, 76, 76)), (left, right)
    assert image_problem(path, decode=True, min_side=1) is None
    shown = Image.open(io.BytesIO(thumbnail(path))).convert("RGB")
    assert min(shown.getpixel((0, 0))) > 240
    assert np.array_equal(plot_images([path]).axes[0].images[0].get_array(), np.asarray(open_image(path)))
    assert first_pictures(ItemTable(["[PAD]", "a"], [[], []], [[], [path]])) == [None, path]


def test_figures_turn_images_as_the_camera_says(tmp_path):
    image = Image.new("RGB", (8, 4), "blue")
    note = image.getexif()
    note[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=note)
    assert plot_images([tmp_path / "a.jpg"]).axes[0].images[0].get_array().shape == (8, 4, 3)
    assert plot_images([Image.open(tmp_path / "a.jpg")]).axes[0].images[0].get_array().shape == (8, 4, 3)
    image.save(tmp_path / "b.jpg", exif=b"Exif\0\0no note at all")
    assert open_image(tmp_path / "b.jpg").size == (8, 4), "a damaged note does not cost the image"
    plot_picture_map(np.zeros((1, 2)), [tmp_path / "a.jpg"])


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_sixteen_bits_in_the_mode_of_any_pillow(mode):
    values = np.array([[40000, 255], [65535, 0]], {"I": np.int32, "I;16": np.uint16, "I;16B": ">u2"}[mode])
    image = Image.fromarray(values)
    assert image.mode == mode
    assert np.asarray(open_image(image))[..., 0].tolist() == [[156, 0], [255, 0]]


def test_what_cannot_be_opened_is_one_sentence_without_pillow(tmp_path):
    files = {"a.png": (b"<html>", "not a picture"), "b.png": (png(60_000, 60_000, 8, 2, []), "too large"),
             "c.png": (png(9_000, 9_000, 8, 2, []), "too large: 9000 x 9000 pixels"), "e.png": (KEYED["gif"][:60], "damaged")}
    for name, (content, word) in files.items():
        (tmp_path / name).write_bytes(content)
        refused(lambda: open_image(tmp_path / name), name, word)
        assert thumbnail(tmp_path / name) is None and word in image_problem(tmp_path / name)
    for source in (np.zeros((2, 2, 5), np.uint8), np.zeros((2, 2), np.int64), np.zeros((2, 2, 3))):
        with pytest.raises(ImageError, match="image in memory: not an array of bytes"): open_image(source)
    with pytest.raises(FileNotFoundError): open_image(tmp_path / "none.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "d.png")
    refused(lambda: open_image(tmp_path / "d.png", max_pixels=399), "d.png: too large: 20 x 20")


# ---------------------------------------------------------------- missing values

class Cell:
    "A cell as Arrow hands it out."
    def __init__(self, value): self.value = value
    def as_py(self): return self.value


def arrays(*values): return np.array(values, dtype=object)


MISSING = {"None": None, "NaN": NAN, "NaN of NumPy": np.float32("nan"), "NaT of NumPy": np.datetime64("NaT"),
           "decimal NaN": decimal.Decimal("NaN"), "NaT as integer": -2**63, "empty list": [], "empty array": arrays(),
           "empty tuple": (), "list of nothing": [None, NAN], "nested nothing": [[], [None]], "empty text": "", "blank": "  ",
           "Arrow null": Cell(None), "Arrow list": Cell([])}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("others", ["text", "lists", "arrays"])
def test_a_missing_text_is_no_text(name, others):
    full = {"text": "Light", "lists": ["Light", None], "arrays": arrays("Light", NAN)}[others]
    cells = [full, MISSING[name]]
    tables = [pl.DataFrame({"item_id": ["1", "2"], "title": ["Pan", "Pot"], "features": pl.Series(cells, dtype=pl.Object)})]
    pandas = pytest.importorskip("pandas")
    tables.append(pandas.DataFrame({"item_id": ["1", "2"], "title": ["Pan", "Pot"],
                                    "features": pandas.Series([None, None], dtype=object)}))
    for row, cell in enumerate(cells): tables[1].at[row, "features"] = cell
    for table in tables: assert read_items(table).texts == [["Pan", "Light"], ["Pot"]]


def test_missing_values_of_pandas_alone():
    pandas = pytest.importorskip("pandas")
    for cell in (pandas.NA, pandas.NaT, [pandas.NA]):
        table = pandas.DataFrame({"item_id": ["1"], "title": pandas.Series([cell], dtype=object)})
        assert read_items(table).texts == [[]]
    assert read_items(pandas.DataFrame({"item_id": ["1"], "title": [NAN]})).texts == [[]]


@pytest.mark.parametrize("name", [name for name in MISSING if "list" not in name and name not in ("nested nothing", "empty array",
                                                                                                  "empty tuple")])
def test_a_missing_id_or_time_is_an_error_with_its_row(name):
    for column in ("user_id", "item_id", "timestamp"):
        cells = pl.Series([{"timestamp": 5}.get(column, "a"), MISSING[name]], dtype=pl.Object)
        refused(lambda: read_interactions(frame(**{column: cells})), "row 1", f"in column '{column}' is empty")
    refused(lambda: read_items(pl.DataFrame({"item_id": pl.Series(["a", MISSING[name]], dtype=pl.Object), "title": ["t", "t"]})),
            "row 1", "is empty")


@pytest.mark.parametrize("column, value", [("user_id", -2**63), ("user_id", -2.**63), ("timestamp", -2**63), ("timestamp", -2.**63)])
def test_nat_that_became_a_number(tmp_path, column, value):
    table = frame(**{column: pl.Series([type(value)(3), value])})
    with pytest.raises(ValueError, match="row 1|2\\*\\*53"): read_interactions(table)
    table.write_csv(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="x.csv, line 3"): read_interactions(tmp_path / "x.csv")


def test_nan_in_json(tmp_path):
    rows = [{"item_id": "1", "title": "Pan", "description": NAN}, {"item_id": "2", "title": NAN, "features": ["Light", NAN]}]
    assert read_items(write(tmp_path / "i.jsonl", "\n".join(map(json.dumps, rows)))).texts == [["Pan"], ["Light"]]
    good = {"user_id": "a", "item_id": "x", "timestamp": 1}
    for column in good:
        rows = [good, {}, good | {column: NAN}]
        path = write(tmp_path / "e.jsonl", "\n".join(json.dumps(row) if row else "" for row in rows))
        refused(lambda: read_interactions(path), "e.jsonl, line 3", f"'{column}' is empty")


@pytest.mark.parametrize("cells, expected", [
    ([NAN, NAN], [[], []]), (["a.png", NAN], [["a.png"], []]), ([["a.png", None, NAN], None], [["a.png"], []]),
    ([arrays("a.png"), arrays()], [["a.png"], []]), (["a.png|", " | "], [["a.png"], []]), ([["a.png", ""], []], [["a.png"], []])])
def test_missing_images(tmp_path, cells, expected):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"item_id": ["1", "2"], "title": ["t", "t"], "image": pandas.Series(cells)})
    found = read_items(table, tmp_path, image_column="image").images
    assert [[path.name for path in row] for row in found] == expected


def test_a_table_of_arrow():
    class Table:
        column_names, columns = ["user_id", "item_id", "timestamp"], [[], [], []]
        def __arrow_c_stream__(self, schema=None): return frame().__arrow_c_stream__(schema)
    assert read_interactions(Table()).user_tokens == ["a", "b"]


# ---------------------------------------------------------------- times

DAYS = [datetime.datetime(1, 1, 1), datetime.datetime(1969, 12, 31), datetime.datetime(2020, 1, 1), datetime.datetime(9999, 12, 31)]
SECONDS = [-62135596800, -86400, 1577836800, 253402214400]


def test_years_from_1_to_9999_in_every_type():
    pandas = pytest.importorskip("pandas")
    for unit in ("s", "ms", "us"):
        times = pandas.Series(np.array(DAYS, f"M8[{unit}]"))
        table = pandas.DataFrame({"user_id": 1, "item_id": [1, 2, 3, 4], "timestamp": times})
        assert read_interactions(table).time.tolist() == SECONDS
    for times in (pl.Series(DAYS), pl.Series([str(day) for day in DAYS]), pl.Series(SECONDS), pl.Series(DAYS, dtype=pl.Object)):
        table = pl.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": times})
        assert read_interactions(table).time.tolist() == SECONDS
    assert parse_times(pl.Series([2**64 - 1, 5], dtype=pl.UInt64)).to_list() == [None, 5]


@pytest.mark.parametrize("large, name", [(10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")])
@pytest.mark.parametrize("sign", [1, -1])
def test_two_units_are_refused_with_both_lines(tmp_path, large, name, sign):
    rows = [f"u,i{k},{sign * (1_600_000_000 + k) * (large if k == 3 else 1)}\n" for k in range(6)]
    refused(lambda: read_interactions(write(tmp_path / "x.csv", HEAD + "\n" + "".join(rows))),
            "x.csv, line 6", "x.csv, line 3", f"1 times are {name} and the others seconds")


def test_one_unit_is_never_refused():
    rng = np.random.default_rng(0)
    for times in (rng.integers(0, 10**13, 2000), rng.integers(-10**12, 10**12, 2000), rng.lognormal(20, 6, 2000).astype(int),
                  np.arange(5), np.linspace(1e8, 1.7e9, 50).astype(int), np.linspace(1e11, 1.7e12, 50).astype(int)):
        table = pl.DataFrame({"user_id": [1] * len(times), "item_id": [1] * len(times), "timestamp": times})
        assert read_interactions(table).n_events == len(times)


@pytest.mark.parametrize("times, lines", [(["2020-01-01", "1600000000"], (3, 2)), (["1600000000", "1600000001", "2020-01-01"], (4, 2)),
                                          (["2020-01-01", "2020-01-02", "17"], (4, 2))])
def test_dates_beside_numbers_name_both_lines(tmp_path, times, lines):
    path = write(tmp_path / "x.csv", HEAD + "".join(f"u,i{k},{time}\n" for k, time in enumerate(times)))
    refused(lambda: read_interactions(path), "write dates or numbers")
    with pytest.raises(ValueError) as caught: read_interactions(path)
    for line in lines: assert f"x.csv, line {line}" in str(caught.value)


def test_public_data_follow_the_same_rule(tmp_path):
    path = write(tmp_path / "ratings_X.csv", "U1,B000000001,5.0,1400000000\nU1,B000000002,5.0,1400000001000\n")
    refused(lambda: read_amazon(2014, path), "ratings_X.csv, line 2", "ratings_X.csv, line 1", "1 times are milliseconds")
    write(tmp_path / "d.inter", "user_id:token\titem_id:token\ttimestamp:float\na\tx\t1400000000\na\ty\t1400000001000\n")
    refused(lambda: read_atomic(tmp_path), "d.inter, line 3", "d.inter, line 2", "milliseconds")
    (tmp_path / "ml").mkdir()
    write(tmp_path / "ml/ratings.csv", "userId,movieId,rating,timestamp\n1,1,5,1400000000\n1,1,5,2020-01-01\n")
    write(tmp_path / "ml/movies.csv", "movieId,title,genres\n1,Toy Story (1995),Comedy\n")
    refused(lambda: read_movielens(tmp_path / "ml"), "ratings.csv, line", "ratings.csv, line", "write dates or numbers")


def test_damaged_tables_of_a_source_are_named(tmp_path):
    path = write(tmp_path / "ratings_X.csv", "U1,B000000001,5.0,1400000000\n")
    read_amazon(2014, path).write(tmp_path / "kept")
    (tmp_path / "kept/items.parquet").write_bytes(b"PAR1 and no more")
    refused(lambda: RawTables.read(tmp_path / "kept"), "kept: damaged tables")


# ---------------------------------------------------------------- ids

LONG = 1582218195625938945


@pytest.mark.parametrize("ids", [pl.Series([float(LONG), 2.]), pl.Series([2.**53, 2.]), pl.Series([2.**24, 2.], dtype=pl.Float32),
                                 pl.Series([float(LONG), "b"], dtype=pl.Object), pl.Series([f"{float(LONG)}", "b"]),
                                 pl.Series(["1.58222E+18", "b"]), pl.Series(["1.58222e18", "b"]), pl.Series([f"{LONG}.0", "b"])])
def test_ids_that_lost_digits(tmp_path, ids):
    for column in ("user_id", "item_id"):
        refused(lambda: read_interactions(frame(**{column: ids})), "row 0", "lost digits", "as text")
    refused(lambda: read_items(pl.DataFrame({"item_id": ids, "title": ["a", "b"]})), "row 0", "lost digits")


def test_ids_of_any_length_stay(tmp_path):
    ids = [LONG, LONG + 1, 12345678901234567890123, 12345678901234567890124]
    rows = "".join(json.dumps({"user_id": i, "item_id": "x", "timestamp": 1}) + "\n" for i in ids)
    assert set(read_interactions(write(tmp_path / "x.jsonl", rows)).user_tokens) == set(map(str, ids))
    refused(lambda: read_interactions(write(tmp_path / "y.jsonl", rows.replace(str(LONG + 1), f"{LONG + 1}.0"))),
            "y.jsonl, line 2", "lost digits")
    assert read_interactions(frame(user_id=pl.Series([2**64 - 1, 2**64 - 2], dtype=pl.UInt64))).n_users == 2
    assert read_interactions(frame(user_id=pl.Series([b"\xfe", b"\xff"]))).n_users == 2, "bytes that are no text stay two"
    assert read_interactions(pandas_frame(user_id=[1., 2.])).user_tokens == ["1", "2"]


@pytest.mark.parametrize("first, second", [(1, "1"), ("1", 1), (7, "007"), (1., "1"), (7, "7.0")])
def test_a_number_beside_its_text_is_refused_with_both_places(tmp_path, first, second):
    cells = pl.Series([first, second], dtype=pl.Object)
    refused(lambda: read_interactions(frame(user_id=cells)), "row 1", "row 0", "read ids as text")
    refused(lambda: read_items(pl.DataFrame({"item_id": cells, "title": ["a", "b"]})), "row 1", "row 0")
    refused(lambda: read_interactions(pandas_frame(item_id=[first, second])), "row 1", "row 0")
    rows = [{"user_id": "u", "item_id": each, "timestamp": 1} for each in (first, second)]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    refused(lambda: read_interactions(path), "x.jsonl, line 2", "x.jsonl, line 1", "read ids as text")


def test_numbers_beside_other_texts_are_ids():
    assert read_interactions(frame(user_id=pl.Series([7, "b"], dtype=pl.Object))).user_tokens == ["7", "b"]
    assert read_interactions(frame(user_id=pl.Series(["7", "007"]))).user_tokens == ["007", "7"]
    assert read_interactions(frame(user_id=pl.Series(["5E12", "1e3"]))).user_tokens == ["1e3", "5E12"], "names of parts"
    refused(lambda: read_interactions(frame(user_id=pl.Series([1.5, "b"], dtype=pl.Object))), "row 0", "ids must be text")


def test_half_characters(tmp_path):
    rows = "".join('{"user_id": "\\%s", "item_id": "x", "timestamp": 1}\n' % half for half in ("ud83d", "ude00"))
    refused(lambda: read_interactions(write(tmp_path / "x.jsonl", rows)), "x.jsonl, line 1", "half a character")
    refused(lambda: read_interactions(pandas_frame(user_id=["\ud83d", "\ude00"])), "row 0", "half a character")
    whole = write(tmp_path / "y.jsonl", '{"user_id": "\\ud83d\\ude00", "item_id": "x", "timestamp": 1}\n')
    assert read_interactions(whole).user_tokens == ["\U0001f600"]
    text = write(tmp_path / "i.jsonl", '{"item_id": "1", "title": "A \\ud83d pan"}\n')
    assert read_items(text).texts == [["A pan"]]


@pytest.mark.parametrize("token, bare", [("007", "7"), ("7.0", "7"), ("0", "0"), ("000", "0"), ("7", "7"), ("7.5", None), ("v1.0", None),
                                         ("", None), ("-7", None)])
def test_bare_ids(token, bare): assert bare_id(token) == bare


@pytest.mark.parametrize("events, items", [(["007", "x"], ["7", "x"]), (["7", "x"], ["007", "x"]), (["7.0", "8.0"], ["7", "8"])])
def test_zeros_lost_on_one_side(events, items):
    table = ItemTable(items, [["a"], ["b"]], [[], []], "items.csv")
    refused(lambda: table.align(["[PAD]", *events]), "items.csv: describes", "the events have", "as text .dtype=str")


def test_zeros_that_were_not_lost():
    table = ItemTable(["7", "8"], [["a"], ["b"]], [[], []], "items.csv")
    assert table.align(["[PAD]", "007", "7"]).unknown == ["007"], "7 was taken itself"
    assert table.align(["[PAD]", "9", "7"]).unknown == ["9"]


# ---------------------------------------------------------------- quotes

TSV = "item_id\ttitle\n"
CSV = "item_id,title\n"
QUOTES = {  # file -> its text, and the items
    "few.tsv": (TSV + '1\t"Blue pot\n2\tThe chair"\n3\tSofa\n', [('1', '"Blue pot'), ('2', 'The chair"'), ('3', 'Sofa')]),
    "inch.tsv": (TSV + '1\t5" pan\n2\t"6" pan\n3\tlid 7"\n', [('1', '5" pan'), ('2', '"6" pan'), ('3', 'lid 7"')]),
    "quoted.tsv": ('"item_id"\t"title"\n"1"\t"A ""red"" pan"\n"2"\t5" lid\n', [('1', 'A "red" pan'), ('2', '5" lid')]),
    "lines.tsv": (TSV + '1\t"Blue\npot"\n2\tSofa\n', [('1', 'Blue pot'), ('2', 'Sofa')]),
    "inch.csv": (CSV + '1,5" pan\n2,6" pan\n3,lid 7"\n4,Sofa\n', [('1', '5" pan'), ('2', '6" pan'), ('3', 'lid 7"'), ('4', 'Sofa')]),
    "quoted.csv": ('"item_id","title"\n"1","A ""red"" pan"\n"2",5" lid\n', [('1', 'A "red" pan'), ('2', '5" lid')]),
    "bom.csv": ('\ufeff"item_id","title"\r\n"1","Pan, red"\r\n"2",""\r\n', [('1', 'Pan, red'), ('2', None)]),
    "lines.csv": (CSV + '1,"Blue\npot, small"\n2,"Sofa, big"\n', [('1', 'Blue pot, small'), ('2', 'Sofa, big')])}


@pytest.mark.parametrize("name", QUOTES)
def test_a_quote_that_is_a_character_swallows_nothing(tmp_path, name):
    text, expected = QUOTES[name]
    items = read_items(write(tmp_path / name, text))
    assert [(token, " ".join(texts) or None) for token, texts in zip(items.item_tokens, items.texts)] == expected


@pytest.mark.parametrize("name, text, line", [
    ("x.csv", CSV + '1,"Blue pot\n2,The chair"\n3,Sofa\n', 2),  # one row or two?
    ("x.csv", CSV + '0,Lid\n1,"5\\" pan"\n2,"6\\" pan"\n', 3),  # quotes escaped by a backslash
    ("x.csv", CSV + '1,"Red, white"\n2,5" pan\n', 3), ("x.csv", CSV + '1, "Red, white"\n', 2),
    ("x.tsv", "item_id\ttitle\tnote\n" + '1\t"Blue pot\ty\n2\tThe chair"\tz\n3\tSofa\n', 2),
    ("x.tsv", TSV + '1\t"Blue\npot"\n2\t5" lid\n', 4)])
def test_a_riddle_of_quotes_is_refused_with_its_line(tmp_path, name, text, line):
    refused(lambda: read_items(write(tmp_path / name, text)), f"{name}, line {line}: ", "quote")


def test_random_texts_survive_a_csv_writer(tmp_path):
    "What a standard writer quotes is read as it was, or refused; never are rows lost."
    rng, alphabet, kept = np.random.default_rng(0), list('ab ",\t\n\''), 0
    for number in range(300):
        texts = ["x" + "".join(rng.choice(alphabet, rng.integers(0, 8))) + "x" for _ in range(4)]
        table = pl.DataFrame({"user_id": texts, "item_id": ["i"] * 4, "timestamp": ["1"] * 4})
        path = tmp_path / ("x.csv", "x.tsv")[number % 2]
        table.write_csv(path, separator=",\t"[number % 2])
        try: assert set(read_interactions(path).user_tokens) == {text.strip() for text in texts}
        except ValueError as error: assert f"{path.name}, line" in str(error)
        else: kept += 1
    assert kept > 290


# ---------------------------------------------------------------- repeats

def histories(*rows):
    events = [(user, item, row) for user, items in enumerate(rows) for row, item in enumerate(items)]
    users, items, order = zip(*events)
    return make_interactions(pl.Series(users), pl.Series(items), np.array(order))


def test_copies_get_a_sentence():
    once = [[f"i{(user * 7 + k) % 20}" for k in range(6)] for user in range(20)]
    assert _copy_notes(histories(*once)) == []
    doubled = [[item for item in row for _ in range(2)] for row in once]
    appended = [row + row for row in once]
    for rows in (doubled, appended):
        [note] = _copy_notes(histories(*rows))
        assert "copying" in note and "every event stands twice" in note and "100%" in note
    sticky = [[row[0]] * 3 + [row[1]] * 3 + row[2:4] for row in once]
    [note] = _copy_notes(histories(*sticky))
    assert "copying" in note and "57% of the neighbouring events of a user are one item" in note
    assert _copy_notes(histories(["a"], ["b"])) == []


def test_copies_are_told_in_the_notes_of_a_run(tmp_path):
    files = write_shop(tmp_path, pictures=False)
    head, *rows = (tmp_path / "events.csv").read_text().splitlines()
    write(tmp_path / "events.csv", "\n".join([head, *rows, *rows]) + "\n")
    config = quick_config(files, "shipped", systems=("popularity",), text_encoder="lsa")
    notes = prepare_data(config, tmp_path / "run", progress=False).notes
    assert sum("copying" in note for note in notes) == 1


def test_checked_images_of_a_folder_of_kinds(tmp_path):
    for number, content in enumerate(KEYED.values()): (tmp_path / f"i{number}.png").write_bytes(content)
    table = pl.DataFrame({"item_id": [f"i{number}" for number in range(len(KEYED))], "title": "t"})
    report = check_images(read_items(table, tmp_path), min_side=1)
    assert report.broken == [] and report.n_checked == len(KEYED)
