"Interactions: every kind of file, nasty inputs, filters and splits against slow loops, and what must not leak."
import datetime
import gzip
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mmseqrec.data.interactions import (TEST, TRAIN, VALID, Interactions, Split, check_disjoint, combine_domains,
                                        drop_duplicates, encode_tokens, future_leakage, global_time_split,
                                        hold_out_items, interaction_statistics, k_core, leave_one_out, load_split,
                                        make_interactions, parse_times, plot_history_lengths, plot_long_tail,
                                        read_interactions, read_table, save_split, select_events)
from pages import page_functions

of_page = page_functions("data.interactions")
plot_future_leakage, plot_split_timeline = of_page.plot_future_leakage, of_page.plot_split_timeline

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
FRAME = pl.DataFrame({"user_id": ["b", "a", "a", "c", "a", "b", "c"],
                      "item_id": ["pot", "lid", "pan", "wok", "lid", "pan", "pan"],
                      "timestamp": [50, 20, 20, 90, 70, 30, 10]})


def triples(events):
    return [(events.user_tokens[u], events.item_tokens[i], t)
            for u, i, t in zip(events.user, events.item, events.time.tolist())]


def random_events(seed=0, n=400, n_users=25, n_items=30, n_times=60):
    rng = np.random.default_rng(seed)
    return make_interactions(pl.Series(rng.integers(0, n_users, n)), pl.Series(rng.zipf(1.5, n) % n_items),
                             rng.integers(0, n_times, n), "random")


# ---------------------------------------------------------------- reading

def write(path, frame):
    plain = Path(str(path).removesuffix(".gz"))
    if plain.suffix == ".csv": frame.write_csv(plain)
    elif plain.suffix == ".tsv": frame.write_csv(plain, separator="\t")
    elif plain.suffix == ".jsonl": frame.write_ndjson(plain)
    else: frame.write_parquet(plain)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz",
                                    ".parquet.gz", ".CSV"])
@pytest.mark.parametrize("integer_ids", [False, True])
def test_every_kind_of_file_gives_the_same_events(tmp_path, suffix, integer_ids):
    frame = FRAME.with_columns(user_id=pl.Series([2, 1, 1, 10, 1, 2, 10])) if integer_ids else FRAME
    expected = read_interactions(frame)
    path = tmp_path / f"events{suffix}"
    if suffix == ".CSV": frame.write_csv(path)
    else: write(path, frame)
    events = read_interactions(path)
    assert triples(events) == triples(expected)
    assert events.user_tokens == (["1", "2", "10"] if integer_ids else ["a", "b", "c"])
    assert events.source == path.name and events.user.dtype == events.item.dtype == np.int32
    assert events.time.dtype == np.int64


def test_sorted_by_user_time_row_and_ties_keep_the_file_order(tmp_path):
    rows = [("u", f"i{k}", 5) for k in range(50)]
    (tmp_path / "ties.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    assert read_interactions(tmp_path / "ties.csv").history("u") == [i for _, i, _ in rows]
    events = read_interactions(FRAME)
    slow = sorted(((u, t, row, i) for row, (u, i, t) in enumerate(FRAME.rows())))
    assert triples(events) == [(u, i, t) for u, t, _, i in slow]


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_order_agrees_with_lexsort_for_extreme_times(dtype):
    rng = np.random.default_rng(3)
    time = rng.choice(np.array([-2**62, -5, 0, 5, 2**62]), 300).astype(dtype)
    user = rng.integers(0, 9, 300)
    events = make_interactions(pl.Series(user), pl.Series(np.arange(300)), time)
    order = np.lexsort((time, user))
    assert (events.item - 1 == order).all() and (events.time == time[order]).all()


def test_pandas_frames_of_several_kinds():
    pandas = pytest.importorskip("pandas")
    plain = pandas.DataFrame(FRAME.to_dict(as_series=False))
    assert triples(read_interactions(plain)) == triples(read_interactions(FRAME))
    floats = plain.assign(user_id=[2., 1., 1., 10., 1., 2., 10.])
    assert read_interactions(floats).user_tokens == ["1", "2", "10"]
    stamps = pandas.to_datetime(plain["timestamp"], unit="s")
    for column in (stamps, stamps.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"), stamps.astype(str)):
        assert triples(read_interactions(plain.assign(timestamp=column))) == triples(read_interactions(FRAME))
    for hole in (None, float("nan"), pandas.NA):
        broken = plain.assign(item_id=["pot", hole] + ["x"] * 5)
        with pytest.raises(ValueError, match=r"DataFrame, row 1 \(counted from 0\): the id in column 'item_id' is em"):
            read_interactions(broken)
    nullable = plain.assign(user_id=pandas.array([2, 1, None, 1, 1, 1, 1], dtype="Int64"))
    with pytest.raises(ValueError, match="row 2"): read_interactions(nullable)


def test_polars_types(tmp_path):
    typed = FRAME.with_columns(pl.col("user_id").cast(pl.Categorical), pl.from_epoch("timestamp"))
    assert triples(read_interactions(typed)) == triples(read_interactions(FRAME))
    assert triples(read_interactions(typed.lazy())) == triples(read_interactions(FRAME))
    typed.with_columns(pl.col("user_id").cast(pl.String)).write_parquet(tmp_path / "typed.parquet")
    assert triples(read_interactions(tmp_path / "typed.parquet")) == triples(read_interactions(FRAME))


def test_columns_by_keyword_and_order_of_rows_as_time(tmp_path):
    (tmp_path / "x.csv").write_text("note,who,what\n,b,x\n,a,y\n,b,w\n")
    events = read_interactions(tmp_path / "x.csv", "who", "what", time_column=None)
    assert triples(events) == [("a", "y", 1), ("b", "x", 0), ("b", "w", 2)]


def test_byte_order_mark_windows_line_ends_blank_lines_quotes_and_spaces(tmp_path):
    text = '\ufeffuser_id,item_id,timestamp\r\n"a, b", pan ,1\r\n\r\n"a, b","say ""hi""",2\r\n\r\n'
    (tmp_path / "x.csv").write_bytes(text.encode())
    assert triples(read_interactions(tmp_path / "x.csv")) == [("a, b", "pan", 1), ("a, b", 'say "hi"', 2)]
    (tmp_path / "x.tsv").write_text('user_id\titem_id\ttimestamp\na\t5" tape\t1\na\tb\t2\n')
    assert read_interactions(tmp_path / "x.tsv").history("a") == ['5" tape', "b"]


def test_odd_paths(tmp_path):
    path = tmp_path / "a[1]*{x}.csv"
    FRAME.write_csv(path)
    for name in (path, str(path)): assert triples(read_interactions(name)) == triples(read_interactions(FRAME))


def test_shuffling_rows_without_ties_changes_nothing():
    frame = FRAME.with_columns(timestamp=pl.Series([50, 20, 21, 90, 70, 30, 10]))
    shuffled = frame[[3, 1, 6, 0, 5, 2, 4]]
    assert read_interactions(frame).fingerprint == read_interactions(shuffled).fingerprint
    assert read_interactions(frame).fingerprint != read_interactions(FRAME).fingerprint


def test_encode_tokens_agrees_with_a_dictionary():
    rng = np.random.default_rng(0)
    for values in (rng.integers(-50, 50, 500), rng.integers(0, 50, 500).astype(str), rng.choice(list("zyxA é"), 100)):
        codes, tokens = encode_tokens(pl.Series(values))
        assert [tokens[c] for c in codes] == [str(v) for v in values] and len(set(tokens)) == len(tokens)
        key = int if all(t.lstrip("-").isdigit() for t in tokens) else str
        assert tokens == sorted(tokens, key=key)
    assert encode_tokens(pl.Series(["007", "7"]))[1] == ["007", "7"]


@pytest.mark.parametrize("values, expected", [
    (["1", "2.5"], [1., 2.5]), (["1.0", "2.0"], [1, 2]), (["1e3", " 7 "], [1000, 7]), (["-5", "3"], [-5, 3]),
    (["2020-01-01", "2020-01-02"], [1577836800, 1577923200]), (["2020-01-01 00:00:01"], [1577836801]),
    (["2020-01-01T00:00:00.25"], [1577836800.25]),
    (["2020-01-01T01:00:00+01:00", "2020-01-01T00:00:00Z"], [1577836800] * 2),
    (["2020-01-01 00:00:00 UTC"], [1577836800]), (["2020-01-01T00:00"], [1577836800]),
    (["1", "soon"], [1, None]), (["nan", "1"], [None, 1]), (["inf", "1"], [None, 1]), (["2020-02-31"], [None]),
    (["", "5"], [None, 5]), (["99999999999999999999"], [1e20])])
def test_parse_times(values, expected):
    assert parse_times(pl.Series(values)).to_list() == expected


@pytest.mark.parametrize("series, expected", [
    (pl.Series([1.5, float("nan")]), [1.5, None]), (pl.Series([datetime.date(1970, 1, 2)]), [86400]),
    (pl.Series([datetime.datetime(1970, 1, 1, 0, 0, 1, 500000)]), [1.5]), (pl.Series([3, 4], dtype=pl.UInt8), [3, 4])])
def test_parse_typed_times(series, expected):
    assert parse_times(series).to_list() == expected


HEAD = b"user_id,item_id,timestamp\n"
NASTY = {  # name -> (file name, content, what the message must say)
    "zero bytes": ("x.csv", b"", "x.csv: the file is empty"),
    "only white space": ("x.csv", b"\n  \n", "x.csv: the file is empty"),
    "header only": ("x.csv", HEAD, "x.csv: a header but no rows"),
    "blank rows only": ("x.csv", HEAD + b"\n\n\n", "x.csv: a header but no rows"),
    "empty gz": ("x.csv.gz", gzip.compress(b""), "x.csv.gz: the file is empty"),
    "missing column": ("x.csv", b"user_id,item,timestamp\na,b,1\n",
                       "no column 'item_id'; there are 'user_id', 'item', 'timestamp'.*item_column="),
    "missing time": ("x.csv", b"user_id,item_id\na,b\n", "no column 'timestamp'.*time_column=None"),
    "semicolons": ("x.csv", b"user_id;item_id;timestamp\na;b;1\n", "separated by ';'"),
    "tabs in csv": ("x.csv", b"user_id\titem_id\ttimestamp\na\tb\t1\n", r"separated by '\\t'"),
    "double header": ("x.csv", b"user_id,item_id,timestamp,user_id\na,b,1,c\n",
                      "line 1: column 'user_id' occurs twice"),
    "empty user": ("x.csv", HEAD + b"a,b,1\n,b,2\n,b,3\n",
                   "x.csv, line 3: the id in column 'user_id' is empty .rows like this: 2"),
    "quoted empty id": ("x.csv", HEAD + b'a,"",1\n', "line 2: the id in column 'item_id' is empty"),
    "spaces as id": ("x.csv", HEAD + b"a,b,1\n\n\na,   ,1\n", "line 5: the id in column 'item_id' is empty"),
    "after a line break in quotes": ("x.csv", HEAD + b'a,"b\nc\nd",1\n,b,1\n', "line 5: the id"),
    "padding token": ("x.csv", HEAD + b"a,[PAD],1\n", "stands for padding"),
    "no time": ("x.csv", HEAD + b"a,b,1\na,b,\n", "line 3: the time in column 'timestamp' is empty"),
    "short row": ("x.csv", HEAD + b"a,b,1\na,b\n", "line 3: the time in column 'timestamp' is empty"),
    "nan": ("x.csv", HEAD + b"a,b,nan\n", "line 2: the time in column 'timestamp' is 'nan'"),
    "infinite": ("x.csv", HEAD + b"a,b,1\na,b,-inf\n", "line 3: the time.*'-inf'"),
    "words for time": ("x.csv", HEAD + b"a,b,1\na,b,yesterday\n",
                       "line 3: the time.*'yesterday', neither a number nor an ISO date"),
    "number among dates": ("x.csv", HEAD + b"a,b,2020-01-01\na,b,2020-01-02\na,b,17\n", "line 4: the time.*'17'"),
    "american date": ("x.csv", HEAD + b"a,b,12/31/2020\n", "line 2: the time"),
    "long row": ("x.csv", HEAD + b"a,b,1\na,b,1,9\n", "line 3: 4 fields, but the header has 3"),
    "open quote": ("x.csv", HEAD + b'a,"b,1\na,b,1\n', "line 2: .*double quote"),
    "latin-1": ("x.csv", HEAD + b"a,b,1\ncaf\xe9,b,1\n", "line 3: not UTF-8"),
    "utf-16": ("x.csv", "user_id,item_id,timestamp\na,b,1\n".encode("utf-16"), "UTF-16"),
    "binary": ("x.csv", b"\x01\x02\x00\x03" * 40, "binary"),
    "old mac": ("x.csv", b"user_id,item_id,timestamp\ra,b,1\r", "carriage return"),
    "parquet named csv": ("x.csv", b"PAR1....PAR1", "not CSV but a Parquet file"),
    "gzip named csv": ("x.csv", gzip.compress(HEAD), "compressed with gzip: add .gz"),
    "zip named csv": ("x.csv", b"PK\x03\x04....", "zip archive or an Excel"),
    "web page": ("x.csv", b"<!DOCTYPE html><html>404</html>", "web page"),
    "web page as parquet": ("x.parquet", b"<html>404</html>", "web page"),
    "lfs pointer": ("x.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    "json named csv": ("x.csv", b'{"user_id": 1}\n', "not CSV but JSON"),
    "csv named jsonl": ("x.jsonl", HEAD + b"a,b,1\n", "not JSON lines"),
    "json array": ("x.jsonl", b'[{"user_id": 1}]', "one JSON array"),
    "broken json": ("x.jsonl", b'{"user_id":"a","item_id":"b","timestamp":1}\n\n{"user_id":"a","item\n',
                    "line 3: not valid JSON"),
    "json nan": ("x.jsonl", b'{"user_id":"a","item_id":"b","timestamp":NaN}\n', "line 1: the time.*is empty"),
    "json hole": ("x.jsonl", b'{"user_id":"a","item_id":"b","timestamp":1}\n\n{"user_id":"a","timestamp":1}\n',
                  "line 3: the id in column 'item_id' is empty"),
    "json null": ("x.jsonl", b'{"user_id":null,"item_id":"b","timestamp":1}\n',
                  "line 1: the id in column 'user_id' is empty"),
    "json number": ("x.jsonl", b'{"user_id":"a","item_id":"b","timestamp":1}\n5\n', "line 2: not a JSON object"),
    "json other keys": ("x.jsonl", b'{"u":"a","item_id":"b","timestamp":1}\n', "no column 'user_id'; there are 'u'"),
    "csv named gz": ("x.csv.gz", HEAD, "not compressed with gzip"),
    "gz damaged inside": ("x.csv.gz", gzip.compress(HEAD)[:10] + b"\xff" * 40, "compressed file is damaged"),
    "cut gz": ("x.csv.gz", gzip.compress(HEAD + b"a,b,1\n" * 99)[:-12], "compressed file is damaged"),
    "cut parquet": ("x.parquet", b"PAR1 and no more", "damaged Parquet"),
    "csv named parquet": ("x.parquet", HEAD + b"a,b,1\n", "not Parquet"),
    "unknown suffix": ("x.xlsx", b"PK", "unknown kind of file '.xlsx'; use one of .csv"),
    "no suffix": ("events", HEAD, "unknown kind of file ''"),
    "pickle": ("x.pkl", b"\x80\x04N.", "unknown kind of file"),
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_files_get_one_sentence(tmp_path, name):
    file, content, message = NASTY[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught: read_interactions(tmp_path / file)
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_a_stray_quote_is_a_character_or_an_error(tmp_path):
    "Older versions of polars read it, newer ones do not."
    (tmp_path / "x.csv").write_bytes(HEAD + b'a,b,1\na,b"x,1\na,c,2\n')
    try: assert read_interactions(tmp_path / "x.csv").history("a") == ["b", 'b"x', "c"]
    except ValueError as error: assert "x.csv, line 3: a stray double quote" in str(error)


def test_json_with_holes_elsewhere_and_mixed_types(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"user_id": 1, "item_id": "b", "timestamp": 5}\n'
                                      '{"timestamp": "2", "item_id": 7, "user_id": 1, "more": [1]}\n')
    assert triples(read_interactions(tmp_path / "x.jsonl")) == [("1", "7", 2), ("1", "b", 5)]


def test_random_damage_is_read_or_refused_in_one_sentence(tmp_path):
    rng, frame = np.random.default_rng(0), pl.concat([FRAME] * 3)
    alphabet = b'",\n\r\t\0 {}[]:;\\ax1.-\xff\xc3<'
    for number in range(400):
        suffix = (".csv", ".tsv", ".jsonl")[number % 3]
        raw = bytearray(write(tmp_path / f"x{suffix}", frame).read_bytes())
        for place in rng.integers(0, len(raw) - 1, 3): raw[place] = alphabet[rng.integers(len(alphabet))]
        if number % 5 == 0: del raw[rng.integers(len(raw)):]
        (tmp_path / f"x{suffix}").write_bytes(raw)
        try: events = read_interactions(tmp_path / f"x{suffix}")
        except ValueError as error: assert f"x{suffix}" in str(error) and "\n" not in str(error)
        else: assert 0 < events.n_events <= 22


def test_nasty_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"): read_interactions(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="is a folder"): read_interactions(tmp_path)


@pytest.mark.parametrize("column, values, message", [
    ("user_id", [1.5, 2.], "row 0.*ids must be text or whole numbers"), ("user_id", [["a"], ["b"]], "holds lists"),
    ("user_id", [None, "a"], "row 0.*is empty"), ("item_id", ["a", ""], "row 1.*is empty"),
    ("user_id", [float("nan"), 2.], "row 0.*is empty"), ("user_id", [float("inf"), 2.], "row 0"),
    ("timestamp", [[1], [2]], "not times"), ("timestamp", [True, False], "not times"),
    ("timestamp", [None, 5], "row 0.*is empty"), ("timestamp", [1., float("nan")], "row 1.*nan"),
    ("timestamp", [1., float("inf")], "row 1.*inf")])
def test_nasty_frames(column, values, message):
    frame = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]})
    with pytest.raises(ValueError, match=message): read_interactions(frame.with_columns(pl.Series(column, values)))
    with pytest.raises(ValueError, match="no rows"): read_interactions(frame.clear())


def test_names_that_look_like_nothing_are_names():
    frame = pl.DataFrame({"user_id": ["null", "None", "nan", "0"], "item_id": ["NA"] * 4, "timestamp": [1, 2, 3, 4]})
    assert read_interactions(frame).user_tokens == ["0", "None", "nan", "null"]


def test_read_table_keeps_lists_of_json_items(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1, "b": ["x", 2]}\n\n{"b": "y", "c": {"d": 1}}\n{"b": null}\n')
    table = read_table(tmp_path / "x.jsonl")
    assert table.frame.to_dict(as_series=False) == {"a": ["1", None, None], "b": [["x", "2"], ["y"], None],
                                                    "c": [None, '{"d": 1}', None]}
    assert table.locate(1) == "x.jsonl, line 3"


def test_interactions_refuse_what_is_not_sorted():
    arrays = lambda user, time: (np.array(user, np.int32), np.array([1, 1], np.int32), np.array(time))
    with pytest.raises(ValueError, match="sorted"): Interactions(*arrays([1, 0], [0, 0]), ["a", "b"], ["[PAD]", "x"])
    with pytest.raises(ValueError, match="sorted"): Interactions(*arrays([0, 0], [1, 0]), ["a"], ["[PAD]", "x"])
    with pytest.raises(ValueError, match="PAD"): Interactions(*arrays([0, 0], [0, 1]), ["a"], ["x"])
    with pytest.raises(ValueError, match="one length"):
        Interactions(np.zeros(2, np.int32), np.ones(1, np.int32), np.zeros(2), ["a"], ["[PAD]", "x"])


# ---------------------------------------------------------------- filters

@pytest.mark.parametrize("keep", ["last", "first"])
def test_drop_duplicates_agrees_with_a_loop(keep):
    events = random_events()
    rows = triples(events)
    chosen = {}
    for row, (user, item, _) in enumerate(rows):
        if keep == "last" or (user, item) not in chosen: chosen[user, item] = row
    assert triples(drop_duplicates(events, keep)) == [rows[row] for row in sorted(chosen.values())]
    with pytest.raises(ValueError, match="keep"): drop_duplicates(events, "both")


@pytest.mark.parametrize("min_user, min_item", [(5, 5), (0, 5), (5, 0), (1, 1), (12, 3), (20, 30)])
def test_k_core_agrees_with_a_loop(min_user, min_item):
    events = random_events(1)
    rows = triples(events)
    while True:
        users, items = Counter(u for u, _, _ in rows), Counter(i for _, i, _ in rows)
        kept = [(u, i, t) for u, i, t in rows if users[u] >= min_user and items[i] >= min_item]
        if len(kept) == len(rows): break
        rows = kept
    if not rows:
        with pytest.raises(ValueError, match="no event is left"): k_core(events, min_user, min_item)
        return
    core = k_core(events, min_user, min_item)
    assert triples(core) == rows
    assert core.lengths.min() >= max(min_user, 1) and core.item_counts[1:].min() >= max(min_item, 1)
    assert core.item.min() == 1 and core.item_counts[0] == 0


def test_select_events_keeps_the_catalogue_on_request():
    events = random_events()
    keep = events.item == events.item[0]
    assert select_events(events, keep).n_items == 1
    kept = select_events(events, keep, keep_catalogue=True)
    assert kept.item_tokens == events.item_tokens and set(kept.item) == {events.item[0]}
    with pytest.raises(ValueError, match="no event"): select_events(events, keep & ~keep)


def test_statistics_agree_with_loops():
    events = random_events(2)
    rows, found = triples(events), interaction_statistics(events)
    seen, repeats, tied, neighbours = set(), 0, 0, 0
    for before, (user, item, time) in zip([(None,) * 3, *rows], rows):
        repeats += (user, item) in seen
        seen.add((user, item))
        if before[0] == user:
            neighbours += 1
            tied += before[2] == time
    counts = list(Counter(i for _, i, _ in rows).values())
    pairs = sum(abs(a - b) for a in counts for b in counts)
    lengths = Counter(u for u, _, _ in rows).values()
    np.testing.assert_allclose(found["repeat_rate"], repeats / len(rows))
    np.testing.assert_allclose(found["tied_share"], tied / neighbours)
    np.testing.assert_allclose(found["popularity_gini"], pairs / (2 * len(counts) * sum(counts)))
    assert (found["max_length"], found["median_length"]) == (max(lengths), np.median(list(lengths)))
    assert found["density"] == len(rows) / (found["n_users"] * found["n_items"])
    json.dumps(found)


# ---------------------------------------------------------------- splits

def test_leave_one_out_agrees_with_a_loop():
    events = random_events(4, n=80)
    stage = []
    for user in range(events.n_users):
        n = int((events.user == user).sum())
        stage += [TRAIN] * n if n < 3 else [TRAIN] * (n - 2) + [VALID, TEST]
    split = leave_one_out(events)
    assert split.stage.tolist() == stage and split.stage.dtype == np.int8
    counts = Counter(events.item[np.array(stage) == TRAIN].tolist())
    assert split.item_counts().tolist() == [counts[k] for k in range(events.n_items + 1)]
    assert (split.unseen_item_mask == (split.item_counts() == 0)).all() and split.unseen_item_mask[0]


def test_time_split_and_its_errors():
    events = random_events()
    split = global_time_split(events, 30, 45)
    assert (events.time[split.stage == TRAIN] < 30).all() and (events.time[split.stage == TEST] >= 45).all()
    assert ((events.time[split.stage == VALID] >= 30) & (events.time[split.stage == VALID] < 45)).all()
    assert (future_leakage(split) == 0).all()
    for cuts, message in (((-1, 5), "no training event"), ((29.5, 29.9), "no validation event"),
                          ((30, 99), "no test event"), ((30, 30), "must be before"), ((45, 30), "must be before")):
        with pytest.raises(ValueError, match=message): global_time_split(events, *cuts)
    days = make_interactions(pl.Series(["a"] * 3), pl.Series(["x", "y", "z"]), np.array([0, 86400, 172800]))
    for cuts in (("1970-01-02", "1970-01-03"), (datetime.date(1970, 1, 2), datetime.datetime(1970, 1, 3))):
        assert global_time_split(days, *cuts).stage.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="neither a number"): global_time_split(days, "soon", "later")
    milli = make_interactions(pl.Series(["a"] * 3), pl.Series(["x", "y", "z"]), np.array([1, 2, 3]) * 10**12)
    with pytest.raises(ValueError, match="not seconds"): global_time_split(milli, "2001-01-01", "2030-01-01")


def test_future_leakage_agrees_with_a_loop():
    split = leave_one_out(random_events(5))
    times, stage = split.interactions.time, split.stage
    train = times[stage == TRAIN]
    np.testing.assert_allclose(future_leakage(split), [np.mean(train > at) for at in times[stage == TEST]])


@pytest.mark.parametrize("split", [leave_one_out, partial(global_time_split, valid_from=30, test_from=45)])
@pytest.mark.parametrize("share", [.05, .3, .7])
def test_cold_items_are_nowhere_in_training(split, share):
    events = random_events(6, n=900, n_users=60)
    cold = hold_out_items(events, share, seed=1, split=split)
    kept = cold.interactions
    assert len(cold.cold_items) == round(share * events.n_items) and kept.item_tokens == events.item_tokens
    assert not np.isin(kept.item[cold.stage != TEST], cold.cold_items).any()
    assert not np.isin(cold.training().item, cold.cold_items).any()
    for stage in (TRAIN, VALID): assert (cold.item_counts(stage)[cold.cold_items] == 0).all()
    assert (cold.stage == split(kept).stage).all() and np.isin(kept.item, cold.cold_items).any()
    again = hold_out_items(events, share, seed=1, split=split)
    assert again.interactions.fingerprint == kept.fingerprint and (again.cold_items == cold.cold_items).all()
    assert (hold_out_items(events, share, seed=2, split=split).cold_items != cold.cold_items).any()


def test_no_cold_item_is_in_any_history_of_leave_one_out():
    split = hold_out_items(random_events(7, n=900, n_users=60), .3)
    events = split.interactions
    for user in range(events.n_users):
        rows = slice(events.offsets[user], events.offsets[user + 1])
        assert not np.isin(events.item[rows][:-1], split.cold_items).any()
        if events.lengths[user] < 3: assert not np.isin(events.item[rows], split.cold_items).any()


def test_a_planted_token_in_held_out_rows_is_found_nowhere_in_training():
    rows = [(f"u{u}", f"i{(u * 7 + t) % 20}", t) for u in range(30) for t in range(6)]
    planted = [(u, "PLANTED", t) if t == 5 or (t == 2 and u == "u3") else (u, i, t) for u, i, t in rows]
    frame = pl.DataFrame(planted, schema=["user_id", "item_id", "timestamp"], orient="row")
    events = read_interactions(frame)
    code = events.item_tokens.index("PLANTED")
    assert leave_one_out(events).item_counts()[code] == 1
    for split in (hold_out_items(events, items=["PLANTED"]), global_time_split(
            read_interactions(frame.filter(~((pl.col("user_id") == "u3") & (pl.col("timestamp") == 2)))), 4, 5)):
        assert split.item_counts(TRAIN)[code] == 0 and split.unseen_item_mask[code]
        training = split.training()
        assert training.item_counts[code] == 0
        assert all("PLANTED" not in training.history(user) for user in training.user_tokens)
        assert split.item_counts(TEST)[code] == 30


def test_hold_out_items_refuses_nonsense():
    events = random_events()
    for share in (0, 1, -1, 2): pytest.raises(ValueError, hold_out_items, events, share)
    with pytest.raises(ValueError, match="no item 'pan'"): hold_out_items(events, items=["pan"])
    with pytest.raises(ValueError, match="no item"): hold_out_items(events, items=["[PAD]"])
    with pytest.raises(ValueError, match="entries"): Split(events, np.zeros(3, np.int8))


def test_domains_stay_apart():
    one = read_interactions(FRAME)
    two = read_interactions(FRAME.with_columns(item_id=pl.lit("toy-") + pl.col("item_id")))
    both = combine_domains({"one": one, "two": two})
    assert triples(both) == ([(f"one/{u}", i, t) for u, i, t in triples(one)]
                             + [(f"two/{u}", i, t) for u, i, t in triples(two)])
    assert check_disjoint(one, two) == 3
    with pytest.raises(ValueError, match="in the sources, such as 'toy-lid'"): check_disjoint(both, two)
    with pytest.raises(ValueError, match="'lid' occurs in two domains"): combine_domains({"a": one, "b": one})


def test_figures_are_drawn():
    import matplotlib.pyplot as plt
    events = random_events()
    split = leave_one_out(events)
    for ax in (plot_history_lengths(events), plot_long_tail(events), plot_split_timeline(split),
               plot_future_leakage({"loo": split, "time": global_time_split(events, 30, 45)})):
        ax.figure.canvas.draw()
        assert ax.get_title() or ax.get_ylabel()
    one = make_interactions(pl.Series(["a"]), pl.Series(["x"]), np.array([3]))
    for plot in (plot_history_lengths, plot_long_tail): plot(one).figure.canvas.draw()
    plt.close("all")


# ---------------------------------------------------------------- real data, where it lies beside the repository

@needs_shared
@pytest.mark.parametrize("name, users, items, count, shortest, longest, median", [
    ("ml1m/interactions.csv", 857, 3196, 132682, 20, 1226, 89),
    ("ml1m/interactions_all_users_order.csv.gz", 6040, 3253, 993306, None, None, None),
    ("scientific/interactions.csv", 2928, 1585, 19712, 5, 36, 6)])
def test_real_data_has_the_published_counts(name, users, items, count, shortest, longest, median):
    events = read_interactions(SHARED / name)
    found = interaction_statistics(events)
    assert (found["n_users"], found["n_items"], found["n_events"]) == (users, items, count)
    if shortest:
        assert (found["min_length"], found["max_length"], found["median_length"]) == (shortest, longest, median)
        split = leave_one_out(events)
        assert (split.stage == TEST).sum() == (split.stage == VALID).sum() == users
    if name == "ml1m/interactions.csv":
        assert .4 < found["tied_share"] < .6 and found["repeat_rate"] == 0
        assert triples(drop_duplicates(events)) == triples(events)
    core = k_core(events, 5, 5)
    assert core.lengths.min() >= 5 and core.item_counts[1:].min() >= 5


# ---------------------------------------------------------------- keeping

def test_a_saved_split_is_the_split(tmp_path):
    events = random_events()
    for split in (leave_one_out(events), hold_out_items(events, .2), leave_one_out(make_interactions(
            pl.Series(["ä", "b", "ä"]), pl.Series(["x\n", "y", "y"]), np.array([.5, 1, 2.25]), "half"))):
        again = load_split(save_split(split, tmp_path / "split"))
        for name in ("user", "item", "time"):
            own, found = getattr(split.interactions, name), getattr(again.interactions, name)
            assert own.dtype == found.dtype and np.array_equal(own, found)
        assert again.interactions.fingerprint == split.interactions.fingerprint
        assert again.interactions.source == split.interactions.source
        assert np.array_equal(again.stage, split.stage) and np.array_equal(again.cold_items, split.cold_items)
        assert again.stage.dtype == split.stage.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["split"]


def test_a_damaged_split_says_so(tmp_path):
    folder = save_split(leave_one_out(random_events()), tmp_path / "split")
    with pytest.raises(FileNotFoundError, match="no saved split"): load_split(tmp_path / "nowhere")
    ids = json.loads((folder / "ids.json").read_text())
    (folder / "ids.json").write_text(json.dumps({**ids, "item_tokens": ids["item_tokens"][:3]}))
    with pytest.raises(ValueError, match="ids.json does not have"): load_split(folder)
    (folder / "events.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="events.safetensors is damaged"): load_split(folder)


def test_a_split_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    split = leave_one_out(random_events())
    save_split(split, tmp_path / "split")
    def full(*args): raise OSError("no space left on device")
    monkeypatch.setattr("mmseqrec.data.interactions.write_json", full)
    with pytest.raises(OSError): save_split(leave_one_out(random_events(1)), tmp_path / "split")
    monkeypatch.undo()
    assert load_split(tmp_path / "split").interactions.fingerprint == split.interactions.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["split"]
