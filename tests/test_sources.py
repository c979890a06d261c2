"Sources: every format with its traps, releases that are mixed, downloads that go wrong, pictures that are none."
import gzip
import hashlib
import http.server
import json
import os
import re
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from test_artifacts_files import Handler

import mmseqrec.data.sources as sources
from mmseqrec.artifacts import read_json
from mmseqrec.data.interactions import TEST, TRAIN, VALID, k_core, leave_one_out, make_interactions, read_interactions
from mmseqrec.data.items import check_images, read_items
from mmseqrec.data.sources import (SOURCES, Benchmark, ImageDownloads, RawTables, Source, download_images, fetch_file,
                                   fetch_source, read_amazon, read_atomic, read_benchmark, read_item_lists, read_movielens,
                                   source_files)

SHARED = Path(__file__).parent.parent.parent / "shared/data"


def asin(k): return f"B{k:09}"

def user(k): return f"A{k:012}"


# ---------------------------------------------------------------- a loopback publisher

class Files(Handler):
    "Serves `server.files`; `server.cut` breaks off once, `server.busy` answers 503 so many times."
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append((self.path, self.headers.get("Range")))
        if self.server.busy.get(name, 0) > 0:
            self.server.busy[name] -= 1
            self.send_response(503)
            self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path.partition("?")[0] not in self.server.files and name not in self.server.files: return self.send_error(404)
        body = self.server.files.get(self.path, self.server.files.get(name))
        start = int((re.search(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        if start >= len(body) and start: return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        size = self.server.cut.pop(name, None)
        self.wfile.write(body[start:] if size is None else body[start:size])

@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        server.files, server.cut, server.busy, server.requests = {}, {}, {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()

@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    "Record pauses instead of taking them."
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept

def picture(path=None, kind="PNG"):
    import io
    stream = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


# ---------------------------------------------------------------- Amazon

EVENTS = [(user(1), asin(1), "5.0", 1400457600), (user(1), asin(2), "3.0", 1400544000),
          (user(2), asin(1), "4.0", 1300000000), (user(2), asin(3), "1.0", 1300000000)]
ITEMS = {asin(1): ("Caf&eacute; set &amp; tray", ["Dishes", "Cups"]), asin(2): ("Pan", ["Dishes"]), asin(3): ("Pot", [])}

def record(release, token, title, categories, link="http://example.org/1.jpg"):
    if release == "2014": return {"asin": token, "title": title, "categories": [categories], "imUrl": link,
                                  "related": {"also_bought": [asin(8), asin(9)]}, "salesRank": {"Home": 3}}
    if release == "2018": return {"asin": token, "title": title, "category": categories, "also_buy": [asin(9)],
                                  "imageURLHighRes": [link], "imageURL": ["http://example.org/small.jpg"]}
    return {"parent_asin": token, "title": title, "categories": categories, "main_category": "Home",
            "images": [{"thumb": "t", "large": link, "hi_res": None, "variant": "MAIN"}]}

def write_amazon(folder, release, events=EVENTS, items=ITEMS, records=None):
    "Write the two files of a category as the release has them; return their paths."
    order = {"2014": (0, 1, 2, 3), "2018": (1, 0, 2, 3), "2023": (0, 1, 2, 3)}[release]
    factor = 1000 if release == "2023" else 1
    rows = [[str(e[k] * factor if k == 3 and isinstance(e[3], int) else e[k]) for k in order] for e in events]
    header = "user_id,parent_asin,rating,timestamp\n" if release == "2023" else ""
    ratings = folder / {"2014": "ratings_X.csv", "2018": "X.csv", "2023": "X.csv.gz"}[release]
    text = header + "".join(",".join(row) + "\n" for row in rows)
    if release == "2023": ratings.write_bytes(gzip.compress(text.encode()))
    else: ratings.write_text(text)
    records = records or [record(release, token, *rest) for token, rest in items.items()]
    metadata = folder / ("meta_X.jsonl.gz" if release == "2023" else "meta_X.json.gz")
    metadata.write_bytes(gzip.compress("".join((repr if release == "2014" else json.dumps)(r) + "\n" for r in records).encode()))
    return ratings, metadata

@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_every_release_gives_the_same_tables(tmp_path, release):
    raw = read_amazon(int(release), *write_amazon(tmp_path, release))
    assert raw.interactions.rows() == [(u, i, float(r), t) for u, i, r, t in EVENTS]
    assert raw.interactions["timestamp"].dtype == pl.Int64
    assert raw.source == f"Amazon Reviews {release}, X" and f"Amazon Reviews {release}" in repr(raw)
    assert raw.items.select("item_id", "title", "categories").rows() == [
        (asin(1), "Café set & tray", "Dishes, Cups"), (asin(2), "Pan", "Dishes"), (asin(3), "Pot", None)]
    assert raw.items["image_urls"].to_list() == [["http://example.org/1.jpg"]] * 3
    events = raw.events()
    assert events.source == raw.source and events.history(user(2)) == [asin(1), asin(3)], "ties keep the order of the file"
    table = raw.item_table().align(events.item_tokens)
    assert table.source == raw.source and table.texts[1] == ["Café set & tray", "Dishes, Cups"]
    assert "Cite" in raw.terms and raw.terms in repr(raw)

def test_without_metadata(tmp_path):
    raw = read_amazon(2018, write_amazon(tmp_path, "2018")[0])
    assert raw.items.height == 0 and raw.items.columns == list(sources._ITEM_SCHEMA)
    with pytest.raises(ValueError, match="Amazon Reviews 2018, X: no item is described"): raw.item_table()
    with pytest.raises(ValueError, match="needs metadata"):
        read_amazon(2018, tmp_path / "X.csv", with_metadata_only=True)

@pytest.mark.parametrize("real, claimed", [("2014", "2018"), ("2018", "2014"), ("2014", "2023"), ("2018", "2023"),
                                           ("2023", "2014"), ("2023", "2018")])
def test_ratings_of_another_release_are_refused(tmp_path, real, claimed):
    ratings, _ = write_amazon(tmp_path, real)
    with pytest.raises(ValueError, match=f"{ratings.name}.*Amazon Reviews {claimed}"): read_amazon(claimed, ratings)

def test_a_swap_of_columns_names_the_other_release(tmp_path):
    with pytest.raises(ValueError, match="the file is of Amazon Reviews 2014"):
        read_amazon("2018", write_amazon(tmp_path, "2014")[0])
    swapped = [(i, u, r, t) for u, i, r, t in EVENTS]
    with pytest.raises(ValueError, match="two columns are exchanged"):
        read_amazon("2023", write_amazon(tmp_path, "2023", swapped)[0])

@pytest.mark.parametrize("real", ["2014", "2018", "2023"])
@pytest.mark.parametrize("claimed", ["2014", "2018", "2023"])
def test_metadata_of_another_release_are_refused(tmp_path, real, claimed):
    ratings, _ = write_amazon(tmp_path, claimed)
    (tmp_path / "other").mkdir()
    _, metadata = write_amazon(tmp_path / "other", real)
    if real == claimed: assert read_amazon(claimed, ratings, metadata).items.height == 3
    else:
        with pytest.raises(ValueError, match=f"{metadata.name}, line 1: metadata of Amazon Reviews {real}, not {claimed}"):
            read_amazon(claimed, ratings, metadata)

def test_files_that_do_not_belong_together(tmp_path):
    events = [(f"u{k}", f"i{k}", "5", 1400000000) for k in range(20)]
    ratings, metadata = write_amazon(tmp_path, "2018", [(i, u, r, t) for u, i, r, t in events],
                                     {f"i{k}": (f"thing {k}", []) for k in range(20)})
    with pytest.raises(ValueError, match="describes only 0 of the 20 items.*'u0'.*'i0'.*one release and category"):
        read_amazon(2018, ratings, metadata)

def test_events_younger_than_the_release(tmp_path):
    young = [(user(1), asin(1), "5.0", 1420070400)]  # the first second of 2015
    with pytest.raises(ValueError, match="year 2015.*2014 ends in 2014"):
        read_amazon(2014, write_amazon(tmp_path, "2014", young)[0])
    old = [(user(1), asin(1), "5.0", 1420070399)]
    assert read_amazon(2014, write_amazon(tmp_path, "2014", old)[0]).interactions.height == 1

def test_unknown_release():
    with pytest.raises(ValueError, match="no release '2015'.*2014, 2018, 2023"): read_amazon(2015, "x.csv")

@pytest.mark.parametrize("content, sentence", [
    ("", "empty"), ("<!doctype html><html>", "web page"), (f"{user(1)},{asin(1)},5.0\n", "line 1: 3 fields"),
    (f"{user(1)},{asin(1)},5.0,1,7\n", "line 1: 5 fields"), (f"{user(1)},,5.0,1\n", "line 1.*item_id is empty"),
    (f"{user(1)},{asin(1)},5.0,1\n\n ,{asin(1)},5.0,2\n", "line 3.*user_id is empty"),
    (f"{user(1)},{asin(1)},5.0,1\n{user(1)},{asin(2)},5.0,\n", "line 2.*the time that is missing"),
    (f"{user(1)},{asin(1)},5.0,1\n{user(1)},{asin(2)},5.0,NaN\n", "line 2.*the time 'NaN'"),
    (f"{user(1)},{asin(1)},5.0,1\n{user(1)},{asin(2)},5.0,1,2\n", "line 2: 5 fields"),
    (f"{user(1)},{asin(1)},5.0,1400000000\n{user(1)},{asin(2)},5.0,1400000000000\n", "1 times are milliseconds"),
    ("user,item,rating,time\n", "line 1.*without a header")])
def test_damaged_ratings(tmp_path, content, sentence):
    (tmp_path / "ratings_X.csv").write_text(content)
    with pytest.raises(ValueError, match=r"ratings_X\.csv.*" + sentence): read_amazon(2014, tmp_path / "ratings_X.csv")

def test_damaged_packed_and_missing_ratings(tmp_path):
    ratings, _ = write_amazon(tmp_path, "2023")
    ratings.write_bytes(ratings.read_bytes()[:-9])
    with pytest.raises(ValueError, match="compressed file is damaged"): read_amazon(2023, ratings)
    ratings.write_bytes(gzip.compress(b"user_id,asin,rating,timestamp\na,b,5,1\n"))
    with pytest.raises(ValueError, match="no column 'parent_asin'"): read_amazon(2023, ratings)
    ratings.write_bytes(gzip.compress(b"user_id,parent_asin,rating,timestamp\n"))
    with pytest.raises(ValueError, match="no rows"): read_amazon(2023, ratings)
    with pytest.raises(FileNotFoundError): read_amazon(2014, tmp_path / "ratings_Y.csv")
    with pytest.raises(FileNotFoundError): read_amazon(2023, write_amazon(tmp_path, "2023")[0], tmp_path / "meta_Y.jsonl.gz")

def test_more_columns_in_2023_are_passed_over(tmp_path):
    (tmp_path / "X.csv").write_text("user_id,parent_asin,rating,timestamp,history\na,b,5,1400000000123,c d\n")
    assert read_amazon(2023, tmp_path / "X.csv").interactions.rows() == [("a", "b", 5., 1400000000.123)]

def test_ratings_that_are_missing_stay(tmp_path):
    events = [(user(1), asin(1), "", 1400457600), (user(1), asin(2), "nan", 1400457601), (user(1), asin(3), "2", 1400457602)]
    raw = read_amazon(2018, write_amazon(tmp_path, "2018", events)[0])
    assert raw.interactions["rating"].to_list() == [None, None, 2.] and "events without a rating, which stay: 2" in raw.notes

def test_repeated_rows_are_dropped_and_counted(tmp_path):
    events = [EVENTS[0], EVENTS[1], EVENTS[0], (user(1), asin(1), "4.0", 1400457600), EVENTS[0]]
    raw = read_amazon(2018, write_amazon(tmp_path, "2018", events)[0])
    assert raw.interactions.rows() == [(u, i, float(r), t) for u, i, r, t in (events[0], events[1], events[3])]
    assert "which were dropped: 2" in raw.notes[0]
    assert read_amazon(2018, tmp_path / "X.csv", keep_repeated_rows=True).interactions.height == 5

def test_repeated_rows_are_compared_exactly(monkeypatch):
    "Rows whose hashes collide are no copies."
    frame = pl.DataFrame({"user_id": ["a", "b", "a"], "item_id": ["x", "y", "x"]})
    monkeypatch.setattr(pl.DataFrame, "hash_rows", lambda self: pl.Series([0] * self.height, dtype=pl.UInt64))
    kept, n = sources._drop_repeated(frame)
    assert kept.rows() == [("a", "x"), ("b", "y")] and n == 1

def test_repeated_rows_against_a_loop():
    rng = np.random.default_rng(0)
    rows = [tuple(map(str, row)) for row in rng.integers(0, 4, (300, 4))]
    kept, n = sources._drop_repeated(pl.DataFrame(rows, schema=["a", "b", "c", "d"], orient="row"))
    assert kept.rows() == list(dict.fromkeys(rows)) and n == 300 - kept.height

def test_items_without_metadata_are_counted_or_dropped(tmp_path):
    files = write_amazon(tmp_path, "2018", items={asin(1): ("Pan", []), asin(7): ("never rated", [])})
    raw = read_amazon(2018, *files)
    assert raw.items["item_id"].to_list() == [asin(1)] and raw.interactions.height == 4
    assert "rated items that are not described: 2 of 3" in raw.notes
    strict = read_amazon(2018, *files, with_metadata_only=True)
    assert strict.interactions["item_id"].to_list() == [asin(1), asin(1)]

def test_an_item_described_twice_keeps_its_first_description(tmp_path):
    records = [record("2018", asin(1), "first", []), record("2018", asin(1), "second", [])]
    raw = read_amazon(2018, *write_amazon(tmp_path, "2018", records=records))
    assert raw.items["title"].to_list() == ["first"] and any("the first stays: 1" in note for note in raw.notes)

def test_oddities_of_2018(tmp_path):
    odd = [{"asin": asin(1), "title": "var aPageStart = (new Date()).getTime();", "category": ["A", "B</span>", "C"],
            "brand": "by\n    \n    Avery", "description": ["<p>One.</p><p>Two.</p>", "", "Three &gt; two"], "imageURL": ["s"],
            "feature": ["Strong", "Light"], "imageURLHighRes": []},
           {"asin": asin(2), "title": None, "category": [], "brand": "", "description": [], "image": "only.jpg",
            "price": float("nan"), "also_buy": []},
           {"asin": asin(3), "title": ["Pot", "iron"], "brand": "Byron", "description": "plain"}]
    raw = read_amazon(2018, *write_amazon(tmp_path, "2018", records=odd))
    assert raw.items.rows() == [
        (asin(1), None, ["One.\n\n\n\nTwo.", "Three > two"], ["Strong", "Light"], "A", "Avery", ["s"]),
        (asin(2), None, [], [], None, None, ["only.jpg"]), (asin(3), "Pot iron", ["plain"], [], None, "Byron", [])]
    assert any("scripts of the web page" in note for note in raw.notes)
    assert raw.item_table().texts[0] == ["One.", "Two.", "Three > two", "Strong", "Light", "A", "Avery"]

def test_long_fields_are_emptied_on_request(tmp_path):
    records = [{"asin": asin(k), "title": "x" * (1998 + k), "also_buy": [],
                "description": ["y" * 1000, "z" * (998 + (k > 1))]} for k in (1, 2, 3)]
    files = write_amazon(tmp_path, "2018", records=records)
    assert [len(title) for title in read_amazon(2018, *files).items["title"]] == [1999, 2000, 2001]
    raw = read_amazon(2018, *files, max_field_chars=2000)
    assert [title and len(title) for title in raw.items["title"]] == [1999, None, None]
    assert raw.items["description"].list.len().to_list() == [2, 0, 0], "the parts of a list count together"
    assert any(note.startswith("fields of 2,000 characters or more") and note.endswith(": 4") for note in raw.notes)

def test_pictures_of_2023(tmp_path):
    images = [{"hi_res": "h1", "large": "l1", "thumb": "t1"}, {"hi_res": "h2", "large": None, "thumb": "t2"},
              {"thumb": "t3"}, {"hi_res": None, "large": None}, "plain", None]
    records = [{**record("2023", asin(1), "Pan", []), "images": images, "store": "Avery", "features": ["Strong"]}]
    raw = read_amazon(2023, *write_amazon(tmp_path, "2023", records=records))
    assert raw.items["image_urls"].to_list() == [["l1", "h2", "t3", "plain"]] and raw.items["brand"][0] == "Avery"

@pytest.mark.parametrize("line, sentence", [
    ("{'asin': 'B000000001', 'title': ", "not a Python literal"), ("['asin', 'B000000001']", "JSON|not a record|not JSON"),
    ("{'asin': 'B000000001', 'x': __import__('os').system('true')}", "not a Python literal"),
    ("{'asin': 'B000000001', 'x': " + "[" * 5000 + "}", "not a Python literal"),
    ("{'asin': 'B000000001', 'x': open('/etc/passwd').read()}", "not a Python literal")])
def test_bad_lines_of_2014_are_named_and_never_run(tmp_path, line, sentence):
    ratings, metadata = write_amazon(tmp_path, "2014")
    good = gzip.decompress(metadata.read_bytes()).decode()
    metadata.write_bytes(gzip.compress((good + line + "\n").encode()))
    with pytest.raises(ValueError, match=r"meta_X\.json\.gz, line 4: "): read_amazon(2014, ratings, metadata)
    metadata.write_bytes(gzip.compress((line + "\n").encode()))
    with pytest.raises(ValueError, match=f"meta_X.json.gz.*({sentence})"): read_amazon(2014, ratings, metadata)

def test_metadata_of_2014_that_are_hard_to_read(tmp_path):
    line = ('{\'asin\': \'B000000001\', \'title\': "Ann\'s \\"big\\" pan", \'description\': \'with {braces} and '
            "\\'related\\': {no}', 'price': 3.5, 'related': {'also_viewed': ['B1', 'B2'], 'bought_together': []}}\n")
    ratings, metadata = write_amazon(tmp_path, "2014")
    metadata.write_text(line)  # not packed, whatever the name says
    raw = read_amazon(2014, ratings, metadata)
    assert raw.items.row(0)[:3] == (asin(1), "Ann's \"big\" pan", ["with {braces} and 'related': {no}"])

@pytest.mark.parametrize("content, sentence", [
    (b"", "empty"), (b"<html>", "web page"), (b'{"asin": "B1", "title": \n', r"line 1: not (valid JSON|a Python literal)"),
    (b'{"title": "x"}\n', "no field 'asin'"), (b'{"asin": "B000000001", "title": "\xff"}\n', "line 1: not"),
    (b'[1]\n', "not JSON lines|JSON"), (b'{"asin": "B000000001", "a": ' + b"[" * 200000 + b'}\n', "line 1: not")])
def test_damaged_metadata(tmp_path, content, sentence):
    ratings, metadata = write_amazon(tmp_path, "2018")
    metadata.write_bytes(content)
    with pytest.raises(ValueError, match=r"meta_X\.json\.gz.*" + sentence): read_amazon(2018, ratings, metadata)

def test_a_cut_packed_file_is_damaged_anywhere(tmp_path):
    ratings, metadata = write_amazon(tmp_path, "2018")
    whole = metadata.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 12):
        metadata.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="compressed file is damaged"): read_amazon(2018, ratings, metadata)

def test_bytes_that_are_wrong_inside_packed_files(tmp_path):
    ratings, metadata = write_amazon(tmp_path, "2023")
    for path in (ratings, metadata):
        whole = path.read_bytes()
        path.write_bytes(whole[:14] + bytes(byte ^ 255 for byte in whole[14:-8]) + whole[-8:])
        with pytest.raises(ValueError, match=f"{path.name}.*compressed file is damaged"): read_amazon(2023, ratings, metadata)
        path.write_bytes(whole)

@pytest.mark.parametrize("release, kind", [("2014", "a Python literal"), ("2018", "valid JSON"), ("2023", "valid JSON")])
def test_a_damaged_first_line_is_called_what_it_should_be(tmp_path, release, kind):
    ratings, metadata = write_amazon(tmp_path, release)
    metadata.write_bytes(b'{"asin": "B000000001", "title": "Pan"\n')
    with pytest.raises(ValueError, match=f"line 1: not {kind}"): read_amazon(release, ratings, metadata)

def test_unsold_items_are_not_parsed(tmp_path):
    ratings, metadata = write_amazon(tmp_path, "2018")
    good = gzip.decompress(metadata.read_bytes())
    metadata.write_bytes(good + b'{"asin": "B000000099", "title": broken\n')
    assert read_amazon(2018, ratings, metadata).items.height == 3

def test_a_million_ratings_take_seconds(tmp_path):
    n, rng = 1_000_000, np.random.default_rng(0)
    frame = pl.DataFrame({"item": pl.Series(rng.integers(0, 50_000, n)), "user": rng.integers(0, 200_000, n),
                          "time": rng.integers(1_000_000_000, 1_400_000_000, n)})
    frame.select(item="B" + pl.col("item").cast(pl.String).str.zfill(9),
                 user="A" + pl.col("user").cast(pl.String).str.zfill(12), rating=pl.lit("5.0"),
                 time="time").write_csv(tmp_path / "X.csv", include_header=False)
    start = time.process_time()
    assert read_amazon(2018, tmp_path / "X.csv").interactions.height > .99 * n
    assert time.process_time() - start < 15


# ---------------------------------------------------------------- MovieLens

MOVIES = "1::Toy Story (1995)::Animation|Comedy\n2::Misérables, Les (1995)::Drama\n3::No year::(no genres listed)\n"
RATINGS = "1::1::5::978824268\n1::2::3::978302109\n2::3::4::1000000000\n2::1::4::999999999\n"

def write_movielens(folder, kind):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "dat":
        (folder / "movies.dat").write_bytes(MOVIES.encode("latin-1"))
        (folder / "ratings.dat").write_text(RATINGS)
    else:
        (folder / "movies.csv").write_text('movieId,title,genres\n1,Toy Story (1995),Animation|Comedy\n'
            '2,"Misérables, Les (1995)",Drama\n3,No year,(no genres listed)\n', encoding="utf-8")
        (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + RATINGS.replace("::", ","))
        (folder / "links.csv").write_text("movieId,imdbId,tmdbId\n1,0114709,862\n2,0113828,\n")
    return folder

@pytest.mark.parametrize("kind", ["dat", "csv"])
@pytest.mark.parametrize("packed", [False, True])
def test_movielens(tmp_path, kind, packed):
    name = {"dat": "ml-1m", "csv": "ml-20m"}[kind]
    path = write_movielens(tmp_path / name, kind)
    if packed:
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for file in path.iterdir(): archive.write(file, f"{name}/{file.name}")
        path = tmp_path / f"{name}.zip"
    raw = read_movielens(path)
    assert raw.source == {"dat": "MovieLens 1M", "csv": "MovieLens 20M"}[kind]
    assert raw.events().history("2") == ["1", "3"], "times are numbers: 999999999 comes before 1000000000"
    assert raw.items.select("item_id", "title", "categories", "year").rows() == [
        ("1", "Toy Story (1995)", "Animation, Comedy", 1995), ("2", "Les Misérables (1995)", "Drama", 1995),
        ("3", "No year", None, None)]
    if kind == "csv": assert raw.items.select("imdb_id", "tmdb_id").rows() == [("0114709", "862"), ("0113828", None), (None, None)]
    assert any("no pictures and no abstracts" in note for note in raw.notes) and "GroupLens" in raw.terms
    assert raw.item_table().texts[0] == ["Toy Story (1995)", "Animation, Comedy"]

@pytest.mark.parametrize("title, natural", [
    ("Matrix, The (1999)", "The Matrix (1999)"), ("Matrix, The", "The Matrix"), ("Avventura, L' (1960)", "L'Avventura (1960)"),
    ("American in Paris, An (1951)", "An American in Paris (1951)"), ("Theodore, They (1999)", "Theodore, They (1999)"),
    ("Postman, The (Postino, Il) (1994)", "The Postman (Il Postino) (1994)"), (" A, B, The (1990) ", "The A, B (1990)"),
    ("I, Robot (2004)", "I, Robot (2004)"), ("", "")])
def test_natural_titles(title, natural):
    assert sources._natural_title(title) == natural

def test_archives_are_never_unpacked(tmp_path):
    outside = tmp_path / "outside"
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for name in ("../movies.dat", "../../ratings.dat", "/ratings.dat", f"{outside}/movies.dat", "a/b/ratings.dat"):
            archive.writestr(name, "1::Evil (1999)::Drama\n")
        archive.writestr("ml-1m/ratings.dat", RATINGS)
        archive.writestr("ml-1m/movies.dat", MOVIES.encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    raw = read_movielens(tmp_path / "ml-1m.zip")
    assert raw.interactions.height == 4 and "Evil" not in str(raw.items.rows())
    assert sorted(tmp_path.rglob("*")) == before and not outside.exists()

def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_MEMBER", 1000)
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1::5::1\n" * 1000)
    with pytest.raises(ValueError, match="would unpack to 11,000 bytes"): read_movielens(tmp_path / "ml-1m.zip")

def test_damaged_archives(tmp_path):
    path = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(path, "w") as archive: archive.writestr("ml-1m/ratings.dat", RATINGS)
    whole = path.read_bytes()
    for data in (b"", b"<html>", whole[:40], whole.replace(b"978824268", b"978824269")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"ml-1m\.zip: not a whole zip archive.*fetch it again"): read_movielens(path)
    with zipfile.ZipFile(path, "w") as archive: archive.writestr("ml-1m/README", "hello")
    with pytest.raises(FileNotFoundError, match="neither ratings.dat nor ratings.csv"): read_movielens(path)
    with pytest.raises(FileNotFoundError, match="does not exist"): read_movielens(tmp_path / "none.zip")

@pytest.mark.parametrize("name, content, sentence", [
    ("ratings.dat", "1::1::5\n", "UserID::MovieID"), ("ratings.dat", "1,1,5,978824268\n", "UserID::MovieID"),
    ("ratings.dat", "1:x:1::5::97\n", "UserID::MovieID"), ("ratings.dat", "1::1::5::97\n\n2::1::5::\n", "line 3.*that is missing"),
    ("ratings.dat", "", "."), ("movies.dat", "1::Toy Story\n", "movies.dat, line 1"), ("movies.dat", "", "movies.dat, line 1"),
    ("movies.dat", "77::Other::Drama\n", "do not belong together")])
def test_damaged_movielens(tmp_path, name, content, sentence):
    write_movielens(tmp_path / "ml-1m", "dat")
    (tmp_path / "ml-1m" / name).write_text(content)
    with pytest.raises(ValueError, match=sentence): read_movielens(tmp_path / "ml-1m")

def test_films_with_strange_characters_and_twice(tmp_path):
    folder = write_movielens(tmp_path / "ml-1m", "dat")
    (folder / "movies.dat").write_bytes("1::Wait\x85 (1995)::Drama\r\n2::Caf\xe9 (1996)::Drama\r\n\n".encode("latin-1"))
    assert read_movielens(folder).items["title"].to_list() == ["Wait\x85 (1995)", "Caf\xe9 (1996)"]
    (folder / "movies.dat").write_text("1::A (1995)::Drama\n1::B (1995)::Drama\n")
    with pytest.raises(ValueError, match=r"movies\.dat: film '1' occurs more than once"): read_movielens(folder)

def test_a_wrong_header_and_a_folder_of_several(tmp_path):
    write_movielens(tmp_path / "ml-20m", "csv")
    (tmp_path / "ml-20m/ratings.csv").write_text("user,movieId,rating,timestamp\n1,1,5,1\n")
    with pytest.raises(ValueError, match=r"ratings\.csv, line 1: no column 'userId'"): read_movielens(tmp_path / "ml-20m")
    write_movielens(tmp_path / "ml-25m", "csv")
    with pytest.raises(ValueError, match="several folders hold ratings.csv"): read_movielens(tmp_path)
    assert read_movielens(tmp_path / "ml-25m").source == "MovieLens 25M"
    (tmp_path / "ml-25m").rename(tmp_path / "mine")
    assert read_movielens(tmp_path / "mine").source == "MovieLens (mine)"


# ---------------------------------------------------------------- RecBole's atomic files

def write_atomic(folder, inter, item=None, name="d"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.inter").write_text(inter)
    if item is not None: (folder / f"{name}.item").write_text(item)
    return folder

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t9\t5\t978300760.0\n1\t10\t3\t978300750.5\n2\t9\t\t978300761\n"

def test_atomic_files(tmp_path):
    item = ("item_id:token\tmovie_title:token_seq\tclass:token_seq\tprice:float\tvector:float_seq\tsize:token\n"
            '9\t12" pan "deluxe"\tIron Pans\t2.5\t1 2.5 -3e1\tL\n10\t"Quoted ""lid"""\t\tnan\t\t\n')
    raw = read_atomic(write_atomic(tmp_path, INTER, item))
    assert raw.source == "d (RecBole atomic files)" and raw.events().history("1") == ["10", "9"]
    assert raw.interactions["rating"].to_list() == [5., 3., None]
    assert raw.items.rows() == [("9", '12" pan "deluxe"', "Iron Pans", 2.5, [1., 2.5, -30.], "L"),
                                ("10", 'Quoted "lid"', None, None, None, None)]
    assert raw.items.columns == ["item_id", "title", "categories", "price", "vector", "size"]
    assert raw.item_table().texts[0] == ['12" pan "deluxe"', "Iron Pans"]

def test_a_lone_quote_does_not_swallow_lines(tmp_path):
    item = 'item_id:token\ttitle:token_seq\n9\t"open\n10\tclose"\n11\tthird\n'
    assert read_atomic(write_atomic(tmp_path, INTER, item)).items["title"].to_list() == ['"open', 'close"', "third"]

def test_atomic_files_without_times_or_items(tmp_path):
    raw = read_atomic(write_atomic(tmp_path, "item_id:token\tuser_id:token\nb\tu\na\tu\n"))
    assert raw.events().history("u") == ["b", "a"] and raw.interactions["timestamp"].to_list() == [0, 1]
    assert len(raw.notes) == 2
    with pytest.raises(ValueError, match="no item is described"): raw.item_table()

@pytest.mark.parametrize("inter, sentence", [
    ("", "empty"), ("user_id\titem_id\n1\t2\n", "line 1: 'user_id' is not field:type"),
    ("user_id:token,item_id:token\n1,2\n", "not field:type"), ("user_id:token\titem_id:text\n1\t2\n", "'item_id:text'"),
    ("user_id:token\titem:token\n1\t2\n", "no field item_id:token"), ("user_id:token\titem_id:token\n1\t\n", "line 2.*item_id is empty"),
    ("user_id:token\titem_id:token\n", "no rows"), ("user_id:token\titem_id:token\tuser_id:token\n1\t2\t3\n", "not field:type"),
    ("user_id:token\titem_id:token\ttimestamp:float\n1\t2\tx\n", "line 2.*the time 'x'"),
    ("user_id:token\titem_id:float\n1\t2\n", "no field item_id:token")])
def test_damaged_atomic_files(tmp_path, inter, sentence):
    with pytest.raises(ValueError, match=r"d\.inter.*" + sentence): read_atomic(write_atomic(tmp_path, inter))

@pytest.mark.parametrize("item, sentence", [
    ("item_id:token\tprice:float\n9\tcheap\n", "line 2: 'cheap'.*not float"), ("title:token\nx\n", "no field item_id"),
    ("item_id:token\ttitle:token\n9\ta\n8\tb\n9\tc\n", "line 2: item '9' is described more than once"),
    ("item_id:token\tv:float_seq\n9\t1 2\n10\t1 x\n", "line 3: '1 x'.*not float_seq")])
def test_damaged_items(tmp_path, item, sentence):
    with pytest.raises(ValueError, match=r"d\.item.*" + sentence): read_atomic(write_atomic(tmp_path, INTER, item))

def test_which_atomic_files(tmp_path):
    with pytest.raises(FileNotFoundError): read_atomic(tmp_path / "none")
    with pytest.raises(ValueError, match="no file that ends in .inter"): read_atomic(tmp_path)
    for name in "ab": write_atomic(tmp_path, INTER, name=name)
    with pytest.raises(ValueError, match="a, b.*choose with name"): read_atomic(tmp_path)
    assert read_atomic(tmp_path, "b").interactions.height == 3
    with pytest.raises(FileNotFoundError, match=r"c\.inter"): read_atomic(tmp_path, "c")
    (tmp_path / "a.train.inter").write_text("x")
    with pytest.raises(ValueError, match="use read_benchmark"): read_atomic(tmp_path)


# ---------------------------------------------------------------- benchmarks

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"

def write_benchmark(folder, histories, max_len=50, name="Syn", longest_first=True, prefix="", features=(4, 3)):
    "Write prefix rows in the way of UniSRec's script, by loops; return what the reader must find."
    folder.mkdir(exist_ok=True)
    files = {"train": [], "valid": [], "test": []}
    for user_id, history in histories.items():
        tokens = [f"{prefix}{i}" for i in history]
        rows = [(tokens[max(0, end - max_len):end], tokens[end]) for end in range(1, len(tokens) - 2)]
        for listed, target in (rows[::-1] if longest_first else rows): files["train"].append((user_id, listed, target))
        for end, stage in ((len(tokens) - 2, "valid"), (len(tokens) - 1, "test")):
            files[stage].append((user_id, tokens[max(0, end - max_len):end], tokens[end]))
    for stage, rows in files.items():
        lines = [HEADER, *(f"{u}\t{' '.join(listed)}\t{target}" for u, listed, target in rows)]
        (folder / f"{name}.{stage}.inter").write_text("\n".join(lines) + "\n")
    return files

def write_features(folder, n, name="Syn", sizes=(4, 4, 3)):
    rng = np.random.default_rng(0)
    (folder / f"{name}.item2index").write_text("".join(f"asin{k}\t{k}\n" for k in range(n)))
    tables = []
    for suffix, size in zip(("feat1CLS", "feat2CLS", "feat3CLS"), sizes):
        tables.append(rng.normal(size=(n, size)).astype("<f4"))
        tables[-1][1] *= suffix != "feat3CLS"
        tables[-1].tofile(folder / f"{name}.{suffix}")
    return tables

def random_histories(n_users=40, n_items=30, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return {str(u): rng.integers(0, n_items, rng.integers(3, longest)).tolist() for u in range(n_users)}

@pytest.mark.parametrize("max_len", [50, 5, 2, 1])
@pytest.mark.parametrize("longest_first", [True, False])
def test_rows_become_the_histories_they_were_made_from(tmp_path, max_len, longest_first):
    histories = random_histories()
    write_benchmark(tmp_path, histories, max_len, longest_first=longest_first)
    benchmark = read_benchmark(tmp_path)
    events = benchmark.split.interactions
    for user_id, history in histories.items():
        assert list(map(int, events.history(user_id))) == history
    assert (benchmark.split.stage == leave_one_out(events).stage).all()
    assert (np.diff(events.time)[np.diff(events.user) == 0] == 1).all()

def test_shuffled_rows_are_put_in_order(tmp_path):
    histories = random_histories()
    write_benchmark(tmp_path, histories)
    path = tmp_path / "Syn.train.inter"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *np.random.default_rng(1).permutation(lines)]) + "\n")
    events = read_benchmark(tmp_path).split.interactions
    assert all(list(map(int, events.history(u))) == history for u, history in histories.items())

@pytest.mark.parametrize("stage", ["train", "valid", "test"])
def test_a_row_that_contradicts_the_others_is_named(tmp_path, stage):
    write_benchmark(tmp_path, random_histories(5))
    path = tmp_path / f"Syn.{stage}.inter"
    lines = path.read_text().splitlines()
    number = next(k for k, line in enumerate(lines) if line.split("\t")[1].count(" ") > 1)
    u, listed, target = lines[number].split("\t")
    lines[number] = "\t".join([u, listed.rpartition(" ")[0] + " 77", target])
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"Syn\.\w+\.inter, line \d+: the history of user '{u}' does not continue") as caught:
        read_benchmark(tmp_path)
    assert f"Syn.{stage}.inter, line {number + 1}" in str(caught.value)

def test_files_of_two_data_sets_are_refused(tmp_path):
    write_benchmark(tmp_path / "a", random_histories(seed=0))
    write_benchmark(tmp_path / "b", random_histories(seed=1))
    os.replace(tmp_path / "b/Syn.test.inter", tmp_path / "a/Syn.test.inter")
    with pytest.raises(ValueError, match="two data sets"): read_benchmark(tmp_path / "a")

def test_a_missing_row_is_noticed(tmp_path):
    write_benchmark(tmp_path, {"0": [1, 2, 3, 4, 5, 6]})
    path = tmp_path / "Syn.train.inter"
    header, first, middle, last = path.read_text().splitlines()
    path.write_text("\n".join([header, first, last]) + "\n")
    with pytest.raises(ValueError, match="does not continue"): read_benchmark(tmp_path)

def test_only_rows_of_full_length_may_lose_their_first_item(tmp_path):
    for stage, rows in (("train", "0\t2 3\t4\n0\t1 2\t3"), ("valid", "0\t2 3 4\t5"), ("test", "0\t2 3 4 5\t6")):
        (tmp_path / f"Syn.{stage}.inter").write_text(f"{HEADER}\n{rows}\n")
    with pytest.raises(ValueError, match="does not continue"): read_benchmark(tmp_path)

def test_two_questions_of_one_user_are_refused(tmp_path):
    write_benchmark(tmp_path, {"0": [1, 2, 3, 4]})
    with open(tmp_path / "Syn.test.inter", "a") as file: file.write("0\t1 2 3\t9\n")
    with pytest.raises(ValueError, match="user '0' has several validation or test rows"): read_benchmark(tmp_path)

def test_training_rows_alone(tmp_path):
    write_benchmark(tmp_path, {"0": [1, 2, 3, 4, 5], "1": [5, 4, 3]})
    for stage in ("valid", "test"): (tmp_path / f"Syn.{stage}.inter").unlink()
    split = read_benchmark(tmp_path).split
    assert split.interactions.user_tokens == ["0"] and split.interactions.history("0") == ["1", "2", "3"]
    assert (split.stage == TRAIN).all()

def test_users_without_a_training_row(tmp_path):
    write_benchmark(tmp_path, {"0": [1, 2, 3, 4], "1": [7, 8, 9]})
    split = read_benchmark(tmp_path).split
    assert split.interactions.history("1") == ["7", "8", "9"]
    assert split.stage[split.interactions.user == 1].tolist() == [TRAIN, VALID, TEST]

def test_features_follow_the_catalogue(tmp_path):
    write_benchmark(tmp_path, {"0": [5, 1, 3], "1": [3, 10, 5, 1]})
    text, dropped, image = write_features(tmp_path, 12)
    benchmark = read_benchmark(tmp_path)
    tokens = benchmark.split.interactions.item_tokens
    assert tokens == ["[PAD]", "1", "3", "5", "10"] and benchmark.item_names == ["[PAD]", "asin1", "asin3", "asin5", "asin10"]
    for kind, table in (("text", text), ("dropped_text", dropped), ("image", image)):
        features = benchmark.features(kind)
        assert features.dtype == np.float32 and not features[0].any()
        for row, token in enumerate(tokens[1:], 1): np.testing.assert_array_equal(features[row], table[int(token)])
    assert benchmark.missing_feature_mask("image").tolist() == [True, True, False, False, False]
    assert benchmark.missing_feature_mask("text").tolist() == [True] + [False] * 4
    assert isinstance(benchmark.dumps["text"][0], np.memmap) and benchmark.dumps["image"][0].shape == (12, 3)
    assert "8 of 12 listed items occur in no row" in benchmark.notes and isinstance(benchmark, Benchmark)
    with pytest.raises(ValueError, match="no 'video' features; there are text, dropped_text, image"): benchmark.features("video")

def test_a_training_file_without_rows_is_refused(tmp_path):
    write_benchmark(tmp_path, {"0": [0, 1, 2]})
    with pytest.raises(ValueError, match=r"Syn\.train\.inter: no rows"): read_benchmark(tmp_path)

def test_the_list_of_items_may_be_in_any_order(tmp_path):
    write_benchmark(tmp_path, {"0": [3, 1, 2, 0]})
    write_features(tmp_path, 4)
    lines = (tmp_path / "Syn.item2index").read_text().splitlines()
    (tmp_path / "Syn.item2index").write_text("\n".join(lines[::-1]) + "\n")
    assert read_benchmark(tmp_path).item_names == ["[PAD]", "asin0", "asin1", "asin2", "asin3"]

def test_item_lists_become_the_histories_they_hold(tmp_path):
    histories = random_histories(seed=3)
    lines = [f"{user_id} {' '.join(map(str, history))}" for user_id, history in histories.items()]
    (tmp_path / "Lists.txt").write_bytes(("\r\n".join(lines) + " \r\n\r\n").encode("utf-8-sig"))
    for benchmark in (read_item_lists(tmp_path / "Lists.txt"), read_benchmark(tmp_path / "Lists.txt")):
        events, stage = benchmark.split.interactions, benchmark.split.stage
        assert benchmark.name == "Lists" and events.n_users == len(histories) and not benchmark.dumps
        for user_id, history in histories.items():
            assert list(map(int, events.history(user_id))) == history
            own = stage[events.user == events.user_tokens.index(user_id)]
            assert own.tolist() == [TRAIN] * (len(history) - 2) + [VALID, TEST]
    with pytest.raises(ValueError, match="no 'text' features; there are none"): benchmark.features("text")

def test_texts_beside_item_lists_are_read(tmp_path):
    (tmp_path / "Lists.txt").write_text("1 3 1 2\n")
    (tmp_path / "Lists.text").write_text("item_id:token\ttext:token_seq\n1\ta red mug\n9\tunknown\n")
    assert read_item_lists(tmp_path / "Lists.txt").texts.rows() == [("1", "a red mug")]

@pytest.mark.parametrize("text, problem", [
    ("1 7 8\n\n2\n", "Lists.txt, line 3: is no user with items"), ("1 7 8\n2 7,8\n", "line 2: is no user"),
    ('{"1": [7, 8]}\n', "line 1: is no user"), ("user_id:token\titem_id:token\n1\t7\n", "line 1: is no user"),
    ("1 7\n2 8\n1 9\n", "line 3: user '1' stands on a line before"), ("\n\n", "no rows|a header but no rows")])
def test_other_files_are_no_item_lists(tmp_path, text, problem):
    (tmp_path / "Lists.txt").write_text(text)
    with pytest.raises(ValueError, match=problem): read_item_lists(tmp_path / "Lists.txt")

def test_item_lists_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="Lists.txt does not exist"): read_item_lists(tmp_path / "Lists.txt")

def test_features_fit_the_catalogue_of_the_encoders(tmp_path):
    from mmseqrec.features.encoders import catalogue_from_arrays
    write_benchmark(tmp_path, {"0": [0, 1, 2], "1": [2, 1, 0, 3]})
    text, _, image = write_features(tmp_path, 4)
    benchmark = read_benchmark(tmp_path)
    catalogue = catalogue_from_arrays(benchmark.split.interactions.item_tokens, benchmark.features("text"),
                                      benchmark.features("image"))
    assert catalogue.missing_image_mask.tolist() == benchmark.missing_feature_mask("image").tolist()
    np.testing.assert_array_equal(catalogue.text_emb[1:, 0].numpy(), text)

def test_rows_that_hold_original_ids(tmp_path):
    write_benchmark(tmp_path, {"0": [3, 1, 2, 1]}, prefix="asin")
    text, *_ = write_features(tmp_path, 4)
    benchmark = read_benchmark(tmp_path)
    assert benchmark.item_names == ["[PAD]", "asin1", "asin2", "asin3"]
    np.testing.assert_array_equal(benchmark.features("text")[1:], text[1:])

def test_sentences_of_a_benchmark(tmp_path):
    write_benchmark(tmp_path, {"0": [3, 1, 2, 1]})
    write_features(tmp_path, 4)
    (tmp_path / "Syn.text").write_text('item_id:token\ttext:token_seq\nasin2\t5" pan.\nasin0\tunsold\nasin1\t\n')
    texts = read_benchmark(tmp_path).texts
    assert texts.rows() == [("2", '5" pan.'), ("1", None)]
    assert read_items(texts).item_tokens == ["2", "1"]
    (tmp_path / "Syn.text").write_text("item_id:token\tsentence:token_seq\nasin2\tpan\n")
    with pytest.raises(ValueError, match=r"Syn\.text, line 1: no fields item_id:token and text:token_seq"):
        read_benchmark(tmp_path)

def test_a_corpus_of_several_domains(tmp_path):
    write_benchmark(tmp_path, {"0-0": [0, 1, 2, 3]}, name="FH", prefix="0-")
    train = (tmp_path / "FH.train.inter").read_text()
    write_benchmark(tmp_path, {"1-0": [1, 0, 1, 2]}, name="FH", prefix="1-")
    rest = (tmp_path / "FH.train.inter").read_text().partition("\n")[2]
    (tmp_path / "FH.train.inter").write_text(train + rest)
    for stage in ("valid", "test"): (tmp_path / f"FH.{stage}.inter").unlink()
    (tmp_path / "FH.pt_datasets").write_text("Food,Home\n")
    food, home = write_features(tmp_path, 4, "Food"), write_features(tmp_path, 3, "Home")
    benchmark = read_benchmark(tmp_path, "FH")
    assert benchmark.split.interactions.item_tokens == ["[PAD]", "0-0", "0-1", "1-0", "1-1"]
    expected = np.stack([food[0][0], food[0][1], home[0][0], home[0][1]])
    np.testing.assert_array_equal(benchmark.features("text")[1:], expected)
    assert benchmark.item_names[3] == "asin0"
    for name in ("Food", "Home"): (tmp_path / f"{name}.item2index").unlink()
    with pytest.raises(ValueError, match="give feature_size"): read_benchmark(tmp_path, "FH")
    with pytest.raises(ValueError, match="Food.feat1CLS: 64 bytes are not some rows of 5"): read_benchmark(tmp_path, "FH", feature_size=5)
    again = read_benchmark(tmp_path, "FH", feature_size=4, dumps={"text": "feat1CLS"})
    np.testing.assert_array_equal(again.features("text"), benchmark.features("text"))

@pytest.mark.parametrize("change, sentence", [
    (lambda f: (f / "Syn.feat3CLS").write_bytes((f / "Syn.feat3CLS").read_bytes()[:-4]), r"feat3CLS: 44 bytes are not 4 rows"),
    (lambda f: (f / "Syn.feat1CLS").write_bytes(b""), r"feat1CLS: 0 bytes"),
    (lambda f: (f / "Syn.item2index").write_text("a\t0\nb\t1\nc\t2\n"), "item '3' is not in the list|feat1CLS"),
    (lambda f: (f / "Syn.item2index").write_text("a\t0\nb\t2\n"), r"indices must be 0 to 1"),
    (lambda f: (f / "Syn.item2index").write_text("a 0\n"), r"Syn\.item2index, line 1"),
    (lambda f: (f / "Syn.item2index").write_text("a\t0\nb\tx\n"), r"Syn\.item2index, line 2"),
    (lambda f: (f / "Syn.item2index").unlink(), "give feature_size"),
    (lambda f: (f / "Syn.valid.inter").write_text("user_id:token\titem_id:token\n0\t1\n"), r"Syn\.valid\.inter, line 1: a benchmark has"),
    (lambda f: (f / "Syn.valid.inter").write_text(HEADER + "\n0\t\t1\n"), r"Syn\.valid\.inter, line 2: item_id_list is empty"),
    (lambda f: (f / "Syn.train.inter").write_text(""), "empty")])
def test_damaged_benchmarks(tmp_path, change, sentence):
    write_benchmark(tmp_path, {"0": [0, 1, 2, 3]})
    write_features(tmp_path, 4)
    change(tmp_path)
    with pytest.raises(ValueError, match=sentence): read_benchmark(tmp_path)

def test_the_size_of_features_can_be_demanded(tmp_path):
    write_benchmark(tmp_path, {"0": [0, 1, 2, 3]})
    write_features(tmp_path, 4, sizes=(4, 4, 4))
    assert read_benchmark(tmp_path, feature_size=4).features("text").shape == (5, 4)
    with pytest.raises(ValueError, match="64 bytes are not 4 rows of 8"): read_benchmark(tmp_path, feature_size=8)

def test_which_benchmark(tmp_path):
    with pytest.raises(ValueError, match="no file that ends in .train.inter"): read_benchmark(tmp_path)
    with pytest.raises(FileNotFoundError): read_benchmark(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"X\.train\.inter"): read_benchmark(tmp_path, "X")
    for name in "ab": write_benchmark(tmp_path, {"0": [0, 1, 2, 3]}, name=name)
    with pytest.raises(ValueError, match="choose with name"): read_benchmark(tmp_path)
    assert read_benchmark(tmp_path, "a").name == "a"

@pytest.mark.skipif(not (SHARED / "bench").exists(), reason="../shared/data/bench is not here")
def test_the_benchmark_that_was_measured():
    benchmark = read_benchmark(SHARED / "bench")
    events, split = benchmark.split.interactions, benchmark.split
    assert (events.n_users, events.n_items, events.n_events) == (5000, 2964, 45071)
    assert (split.stage == TRAIN).sum() - events.n_users == 30071, "a training row for all but the first item of a user"
    assert (split.stage == leave_one_out(events).stage).all()
    assert {kind: dumps[0].shape for kind, dumps in benchmark.dumps.items()} == dict.fromkeys(
        ("text", "dropped_text", "image"), (3000, 512))
    assert "36 of 3,000 listed items occur in no row" in benchmark.notes
    raw = np.fromfile(SHARED / "bench/Syn.feat3CLS", np.float32).reshape(3000, 512)
    rows = [int(token) for token in events.item_tokens[1:]]
    np.testing.assert_array_equal(benchmark.features("image")[1:], raw[rows])
    line = (SHARED / "bench/Syn.test.inter").read_text().splitlines()[1].split("\t")
    assert events.history(line[0]) == [*line[1].split(), line[2]]


# ---------------------------------------------------------------- names and files

def test_every_source_is_complete():
    for key, source in SOURCES.items():
        assert isinstance(source, Source) and source.title and source.contents and "Cite" in source.terms
        assert len(set(source.categories)) == len(source.categories)
        for category in source.categories or ("",):
            for file, urls in source_files(f"{key}:{category}" if category else key).items():
                assert all(re.fullmatch(r"https?://[\w.-]+/[\w./-]+", url) and url.endswith("/" + file) for url in urls)
        assert source.md5 is None or source.md5 == "file" or re.fullmatch("[0-9a-f]{32}", source.md5)
    assert {len(SOURCES[f"amazon-{year}"].categories) for year in (2014, 2018, 2023)} == {24, 29, 34}
    assert source_files("amazon-2014:Beauty")["ratings_Beauty.csv"][-1] == \
        "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Beauty.csv"
    assert list(source_files("movielens-1m").values()) == [("https://files.grouplens.org/datasets/movielens/ml-1m.zip",)]

@pytest.mark.parametrize("name, sentence", [
    ("amazon-2019:Beauty", "no source 'amazon-2019'; did you mean amazon-2018"), ("", "no source ''"),
    ("amazon-2018", "has no category ''.*amazon-2018:<category>.*Video_Games"),
    ("amazon-2018:Beauty", "Amazon Reviews 2018 has no category 'Beauty'; did you mean .*All_Beauty"),
    ("movielens-1m:Drama", "MovieLens 1M has no categories: write 'movielens-1m'"), ("movielens", "did you mean movielens-")])
def test_unknown_names_get_help(name, sentence):
    with pytest.raises(ValueError, match=sentence): source_files(name)


# ---------------------------------------------------------------- downloads

PAYLOAD = bytes(range(256)) * 40
MD5 = hashlib.md5(PAYLOAD).hexdigest()

def test_the_first_download_is_recorded(server, tmp_path):
    server.files["a.bin"] = PAYLOAD
    for _ in range(2): path = fetch_file(f"{server.url}/a.bin", tmp_path / "raw/a.bin", progress=False)
    assert path.read_bytes() == PAYLOAD and len(server.requests) == 1
    assert (tmp_path / "raw/a.bin.sha256").read_text() == f"{hashlib.sha256(PAYLOAD).hexdigest()}  a.bin\n"

def test_a_cut_download_continues(server, tmp_path):
    server.files["a.bin"], server.cut["a.bin"] = PAYLOAD, 1000
    with pytest.raises(ConnectionError, match="call again to continue"):
        fetch_file(f"{server.url}/a.bin", tmp_path / "a.bin", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.part"]
    assert fetch_file(f"{server.url}/a.bin", tmp_path / "a.bin", MD5, progress=False).read_bytes() == PAYLOAD
    assert [r for _, r in server.requests] == [None, "bytes=1000-"]

@pytest.mark.parametrize("damage", [PAYLOAD[:-1], PAYLOAD[:50], b"", b"x" * len(PAYLOAD)], ids=["cut", "short", "empty", "other"])
def test_a_file_damaged_on_the_disk_is_fetched_again(server, tmp_path, damage):
    server.files["a.bin"] = PAYLOAD
    path = fetch_file(f"{server.url}/a.bin", tmp_path / "a.bin", progress=False)
    path.write_bytes(damage)
    assert fetch_file(f"{server.url}/a.bin", path, progress=False).read_bytes() == PAYLOAD

def test_a_file_that_the_publisher_changed_is_refused(server, tmp_path):
    server.files["a.bin"] = PAYLOAD
    path = fetch_file(f"{server.url}/a.bin", tmp_path / "a.bin", progress=False)
    path.unlink()
    server.files["a.bin"] = PAYLOAD + b"new"
    with pytest.raises(ValueError, match="checksum is .* new version"): fetch_file(f"{server.url}/a.bin", path, progress=False)
    assert not path.exists()

def test_the_published_checksum_counts(server, tmp_path):
    server.files["a.bin"] = PAYLOAD
    with pytest.raises(ValueError, match=f"MD5 checksum is {MD5}, the publisher's is {'0' * 32}"):
        fetch_file(f"{server.url}/a.bin", tmp_path / "a.bin", "0" * 32, progress=False)
    assert list(tmp_path.iterdir()) == []

def test_a_web_page_is_no_file(server, tmp_path):
    server.files["a.csv"] = b"\n<!DOCTYPE html><html>please log in</html>"
    with pytest.raises(ValueError, match="web page arrived"): fetch_file(f"{server.url}/a.csv", tmp_path / "a.csv", progress=False)
    assert list(tmp_path.iterdir()) == []

def test_mirrors(server, tmp_path):
    server.files["/second/a.bin"] = PAYLOAD
    urls = [f"{server.url}/first/a.bin", f"{server.url}/second/a.bin"]
    assert fetch_file(urls, tmp_path / "a.bin", MD5, progress=False).read_bytes() == PAYLOAD
    with pytest.raises(ConnectionError, match="first/b.bin.*404.*third/b.bin.*404"):
        fetch_file([f"{server.url}/first/b.bin", f"{server.url}/third/b.bin"], tmp_path / "b.bin", progress=False)

def test_a_mirror_does_not_continue_what_another_began(server, tmp_path):
    server.files |= {"/first/a.bin": PAYLOAD, "/second/a.bin": PAYLOAD}
    server.cut["a.bin"] = 1000
    urls = [f"{server.url}/first/a.bin", f"{server.url}/second/a.bin"]
    with pytest.raises(ConnectionError, match="call again"): fetch_file(urls, tmp_path / "a.bin", progress=False)
    assert [path for path, _ in server.requests] == ["/first/a.bin"]
    fetch_file(urls, tmp_path / "a.bin", MD5, progress=False)

def test_a_damaged_record_is_an_error(server, tmp_path):
    (tmp_path / "a.bin.sha256").write_text("")
    with pytest.raises(ValueError, match="not a SHA-256 checksum; delete it"):
        fetch_file(f"{server.url}/a.bin", tmp_path / "a.bin", progress=False)


# ---------------------------------------------------------------- one call

def publish(server, tmp_path, release="2018", category="Prime_Pantry", **options):
    (tmp_path / "made").mkdir(exist_ok=True)
    ratings, metadata = write_amazon(tmp_path / "made", release, **options)
    for file, path in zip(source_files(f"amazon-{release}:{category}"), (ratings, metadata)):
        server.files[file] = path.read_bytes()

@pytest.mark.parametrize("release, category", [("2014", "Beauty"), ("2018", "Prime_Pantry"), ("2023", "All_Beauty")])
def test_fetch_amazon(server, tmp_path, release, category, capsys):
    publish(server, tmp_path, release, category)
    raw = fetch_source(f"amazon-{release}:{category}", tmp_path / "data", mirror=server.url + "/", progress=False)
    assert raw.source == f"Amazon Reviews {release}, {category}" and any("no published checksum" in note for note in raw.notes)
    assert capsys.readouterr().out == ""
    assert read_interactions(tmp_path / "data/interactions.parquet").n_events == 4
    assert len(read_items(tmp_path / "data/items.parquet")) == 3
    record = read_json(tmp_path / "data/source.json")
    assert record["name"] == f"amazon-{release}:{category}" and all(len(d) == 64 for d in record["files"].values())
    assert not re.search("/" + "root|/" + "home", (tmp_path / "data/source.json").read_text()) and record["terms"] == raw.terms
    n, stamp = len(server.requests), (tmp_path / "data/items.parquet").stat().st_mtime_ns
    again = fetch_source(f"amazon-{release}:{category}", tmp_path / "data", mirror=server.url, progress=False)
    assert again.interactions.equals(raw.interactions) and again.items.equals(raw.items) and again.notes == raw.notes
    assert len(server.requests) == n and (tmp_path / "data/items.parquet").stat().st_mtime_ns == stamp

def test_terms_are_printed_at_the_first_download(server, tmp_path, capsys):
    publish(server, tmp_path)
    for _ in range(2): fetch_source("amazon-2018:Prime_Pantry", tmp_path / "data", mirror=server.url)
    assert capsys.readouterr().out.count("not to be passed on") == 1

def test_other_options_read_anew(server, tmp_path):
    publish(server, tmp_path, items={asin(1): ("Pan", [])})
    fetch = lambda **options: fetch_source("amazon-2018:Prime_Pantry", tmp_path / "data", mirror=server.url, progress=False,
                                           **options)
    assert fetch().interactions.height == 4
    assert fetch(with_metadata_only=True).interactions.height == 2
    assert fetch(max_field_chars=2).items["title"].to_list() == [None]
    assert fetch().interactions.height == 4 and len(server.requests) == 2

def test_fetch_continues_after_a_cut_and_after_a_kill(server, tmp_path):
    publish(server, tmp_path)
    server.cut["meta_Prime_Pantry.json.gz"] = 30
    fetch = lambda: fetch_source("amazon-2018:Prime_Pantry", tmp_path / "data", mirror=server.url, progress=False)
    with pytest.raises(ConnectionError): fetch()
    assert not (tmp_path / "data/source.json").exists()
    assert fetch().interactions.height == 4
    assert [r for _, r in server.requests] == [None, None, "bytes=30-"]
    (tmp_path / "data/source.json").unlink()  # killed between the tables and the record
    (tmp_path / "data/items.parquet").write_bytes(b"")
    assert fetch().items.height == 3 and len(server.requests) == 3

def test_a_newer_file_is_read_anew(server, tmp_path):
    publish(server, tmp_path)
    fetch = lambda: fetch_source("amazon-2018:Prime_Pantry", tmp_path / "data", mirror=server.url, progress=False)
    assert fetch().interactions.height == 4
    publish(server, tmp_path, events=EVENTS[:3])
    for path in (tmp_path / "data/raw").glob("Prime_Pantry.csv*"): path.unlink()
    assert fetch().interactions.height == 3

def test_a_damaged_file_of_a_publisher_is_named(server, tmp_path):
    publish(server, tmp_path)
    server.files["meta_Prime_Pantry.json.gz"] = server.files["meta_Prime_Pantry.json.gz"][:-10]
    with pytest.raises(ValueError, match="meta_Prime_Pantry.json.gz.*compressed file is damaged"):
        fetch_source("amazon-2018:Prime_Pantry", tmp_path / "data", mirror=server.url, progress=False)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["raw"]

def movielens_zip(tmp_path, name="ml-1m"):
    folder = write_movielens(tmp_path / name, "dat")
    with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
        for file in sorted(folder.iterdir()): archive.write(file, f"{name}/{file.name}")
    return (tmp_path / f"{name}.zip").read_bytes()

def test_fetch_movielens_checks_the_pinned_checksum(server, tmp_path, monkeypatch):
    data = server.files["ml-1m.zip"] = movielens_zip(tmp_path)
    fetch = lambda: fetch_source("movielens-1m", tmp_path / "data", mirror=server.url, progress=False)
    with pytest.raises(ValueError, match="the publisher's is c4d9eecfca2ab87c1945afe126590906"): fetch()
    monkeypatch.setitem(SOURCES, "movielens-1m", replace(SOURCES["movielens-1m"], md5=hashlib.md5(data).hexdigest()))
    raw = fetch()
    assert raw.source == "MovieLens 1M" and not any("no published checksum" in note for note in raw.notes)

@pytest.mark.parametrize("beside", ["right", "wrong", None])
def test_fetch_movielens_reads_the_checksum_beside_the_file(server, tmp_path, beside):
    data = server.files["ml-latest-small.zip"] = movielens_zip(tmp_path, "ml-latest-small")
    if beside: server.files["ml-latest-small.zip.md5"] = (
        f"MD5 (ml-latest-small.zip) = {hashlib.md5(data if beside == 'right' else b'').hexdigest()}\n".encode())
    fetch = lambda: fetch_source("movielens-latest-small", tmp_path / "data", mirror=server.url, progress=False)
    if beside == "wrong":
        with pytest.raises(ValueError, match="MD5 checksum"): fetch()
    else: assert any("no published checksum" in note for note in fetch().notes) == (beside is None)

@pytest.mark.parametrize("option", [{"images_per_item": 1}, {"with_metadata_only": True}, {"max_field_chars": 9}])
def test_options_that_a_source_does_not_have_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match="MovieLens 1M has neither links to pictures nor long texts"):
        fetch_source("movielens-1m", tmp_path / "data", **option)
    assert list(tmp_path.iterdir()) == []

def test_raw_tables_round_trip(tmp_path):
    raw = read_amazon(2018, *write_amazon(tmp_path, "2018"))
    assert isinstance(raw, RawTables)
    back = RawTables.read(raw.write(tmp_path / "out", extra=1))
    assert back.interactions.equals(raw.interactions) and back.items.equals(raw.items)
    assert (back.source, back.notes, back.terms) == (raw.source, raw.notes, raw.terms)
    assert read_json(tmp_path / "out/source.json")["extra"] == 1


def test_a_write_that_fails_leaves_no_record_of_old_tables(tmp_path, monkeypatch):
    raw = read_amazon(2018, *write_amazon(tmp_path, "2018"))
    raw.write(tmp_path / "out")
    def fail(self, path): raise OSError("disk full")
    monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    with pytest.raises(OSError): raw.write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["interactions.parquet", "items.parquet"]


# ---------------------------------------------------------------- pictures

def fetch_pictures(server, folder, links, **options):
    links = {item: [url if "://" in url else f"{server.url}/{url}" for url in urls] for item, urls in links.items()}
    return download_images(links, folder, **{"pause": 0, "progress": False, **options})

def test_pictures_are_fetched_once(server, tmp_path):
    server.files |= {"1": picture(), "2": picture(kind="JPEG"), "3": picture(kind="WEBP")}
    links = {"pan": ["1", "2", "3"], "pot": ["2"], "lid": []}
    report = fetch_pictures(server, tmp_path, links, per_item=2)
    assert isinstance(report, ImageDownloads)
    assert (report.n_fetched, report.n_present, report.n_without_link, report.problems) == (3, 0, 1, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failed_links.json", "pan.png", "pan_1.jpg", "pot.jpg"]
    n = len(server.requests)
    report = fetch_pictures(server, tmp_path, links, per_item=3)
    assert (report.n_fetched, report.n_present) == (1, 3) and len(server.requests) == n + 1
    table = check_images(read_items(pl.DataFrame({"item_id": ["pan", "pot", "lid"], "title": ["a", "b", "c"]}), tmp_path)).table
    assert [[path.name for path in row] for row in table.images] == [["pan.png", "pan_1.jpg", "pan_2.webp"], ["pot.jpg"], []]

def test_a_table_of_links(server, tmp_path):
    server.files["1"] = picture()
    items = pl.DataFrame({"item_id": ["pan", "pot"], "image_urls": [[f"{server.url}/1"], None]},
                         schema_overrides={"image_urls": pl.List(pl.String)})
    report = download_images(items, tmp_path, pause=0, progress=False)
    assert (report.n_fetched, report.n_without_link) == (1, 1)

@pytest.mark.parametrize("body, sentence", [
    (b"", "not a picture"), (b"<html>404</html>", "not a picture"), (picture()[:60], "damaged|not a picture"),
    (picture() + b"x" * 20_000, "more than 10,000 bytes")])
def test_what_is_no_picture_is_not_kept(server, tmp_path, body, sentence):
    server.files["1"] = body
    report = fetch_pictures(server, tmp_path, {"pan": ["1"]}, max_bytes=10_000)
    assert report.n_fetched == 0 and re.search(sentence, report.problems[0][2])
    assert [path.name for path in tmp_path.iterdir()] == ["failed_links.json"]

def test_links_that_failed_for_good_are_not_asked_again(server, tmp_path):
    assert "404" in fetch_pictures(server, tmp_path, {"pan": ["gone"]}).problems[0][2]
    server.files["gone"] = picture()
    assert fetch_pictures(server, tmp_path, {"pan": ["gone"]}).problems[0][2] == "the server answered 404"
    assert len(server.requests) == 1
    report = fetch_pictures(server, tmp_path, {"pan": ["gone"]}, retry=True)
    assert report.n_fetched == 1 and report.problems == [] and read_json(tmp_path / "failed_links.json") == {}

def test_a_busy_server_is_given_time(server, tmp_path, no_waiting):
    server.files["1"], server.busy["1"] = picture(), 2
    assert fetch_pictures(server, tmp_path, {"pan": ["1"]}).n_fetched == 1
    assert no_waiting.count(7.) == 2, "as long as the server asked for"
    server.busy["1"] = 99
    report = fetch_pictures(server, tmp_path / "other", {"pan": ["1"]})
    assert "503; call again" in report.problems[0][2] and read_json(tmp_path / "other/failed_links.json") == {}

def test_a_cut_picture_is_asked_for_again(server, tmp_path):
    server.files["1"], server.cut["1"] = picture(), 100
    assert fetch_pictures(server, tmp_path, {"pan": ["1"]}).n_fetched == 1

def test_a_dead_network_ends_the_run(server, tmp_path):
    server.shutdown()
    server.server_close()
    report = fetch_pictures(server, tmp_path, {f"p{k}": [str(k)] for k in range(60)}, workers=1)
    assert report.n_fetched == 0 and len(report.problems) == 60
    assert sum("not tried" in problem for *_, problem in report.problems) == 40
    assert read_json(tmp_path / "failed_links.json") == {}

@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a.png", "data:image/png;base64,AAAA", "/etc/passwd",
                                 "javascript:alert(1)"])
def test_only_web_addresses_are_followed(server, tmp_path, url):
    report = download_images({"pan": [url]}, tmp_path, pause=0, progress=False)
    assert report.problems == [("pan", url, "not a web address (http or https)")]

def test_an_address_that_is_none(server, tmp_path):
    report = download_images({"pan": [f"{server.url}/a b\n"], "pot": ["http://[bad/"], "lid": [f"{server.url}/é"]}, tmp_path,
                             pause=0, progress=False)
    assert report.n_fetched == 0 and len(report.problems) == 3

@pytest.mark.parametrize("item", ["../up", "a/b", "a\\b", "C:x", "..", ".hidden", "a\0b", "", "x" * 300, "a?b"])
def test_ids_that_are_no_file_names_are_refused(server, tmp_path, item):
    server.files["1"] = picture()
    report = fetch_pictures(server, tmp_path / "images", {item: ["1"]})
    assert report.problems[0][2] == "the id cannot be the name of a file"
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "failed_links.json"]

def test_names_of_second_pictures_do_not_collide(server, tmp_path):
    server.files |= {"1": picture(), "2": picture(kind="JPEG")}
    links = {"a": ["1", "2"], "a_1": ["1"], "b": ["1", "2"], "b_1": [], "b-1": ["1"]}
    report = fetch_pictures(server, tmp_path, links, per_item=2)
    assert (tmp_path / "a-1.jpg").exists() and (tmp_path / "a_1.png").exists()
    assert [problem[::2] for problem in report.problems] == [("b", "another item has the name of this file")]
    rows = read_items(pl.DataFrame({"item_id": list(links), "title": list(links)}), tmp_path).images
    assert [[path.name for path in row] for row in rows] == [["a.png", "a-1.jpg"], ["a_1.png"], ["b.png"], [], ["b-1.png"]]

def test_an_interrupted_run_keeps_what_it_has(server, tmp_path, monkeypatch):
    server.files |= {str(k): picture() for k in range(8)}
    fetch, calls = sources._fetch_picture, []
    def stop(*args):
        calls.append(args)
        if len(calls) == 4: raise KeyboardInterrupt
        fetch(*args)
    monkeypatch.setattr(sources, "_fetch_picture", stop)
    links = {f"p{k}": [str(k)] for k in range(8)}
    with pytest.raises(KeyboardInterrupt): fetch_pictures(server, tmp_path, links, workers=1)
    n = len(list(tmp_path.glob("*.png")))
    assert 3 <= n < 8 and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(sources, "_fetch_picture", fetch)
    report = fetch_pictures(server, tmp_path, links)
    assert (report.n_fetched, report.n_present) == (8 - n, n)

def test_a_long_report_is_short():
    report = ImageDownloads(1, 2, 3, [(f"p{k}", "http://x", "gone") for k in range(30)])
    assert "and 20 more" in repr(report) and len(repr(report).splitlines()) == 12

def test_pictures_of_a_source(server, tmp_path):
    server.files |= {"1.jpg": picture()}
    records = [record("2018", asin(k), "Pan", [], f"{server.url}/{k}.jpg") for k in (1, 2)]
    publish(server, tmp_path, records=records)
    raw = fetch_source("amazon-2018:Prime_Pantry", tmp_path / "data", mirror=server.url, images_per_item=1, progress=False)
    assert raw.notes[-1] == "1 pictures fetched, 0 were there, 1 links failed, 0 items have no link"
    table = raw.item_table(tmp_path / "data/images")
    assert [len(row) for row in table.images] == [1, 0]
    assert "pictures" not in str(RawTables.read(tmp_path / "data").notes), "a count of today is not kept"


# ---------------------------------------------------------------- from one end to the other

def test_the_usual_way(tmp_path):
    rng = np.random.default_rng(0)
    events = [(user(u), asin(i), "5.0", 1_300_000_000 + 86_400 * t) for t, (u, i) in
              enumerate(zip(rng.integers(0, 10, 200).tolist(), rng.integers(0, 8, 200).tolist()))]
    raw = read_amazon(2018, *write_amazon(tmp_path, "2018", events, {asin(k): (f"thing {k}", []) for k in range(7)}))
    core = k_core(raw.events(), 5, 5)
    expected = make_interactions(pl.Series([e[0] for e in events]), pl.Series([e[1] for e in events]),
                                 np.array([e[3] for e in events]))
    assert core.fingerprint == k_core(expected, 5, 5).fingerprint
    assert raw.item_table().align(core.item_tokens).unknown == [asin(7)]
