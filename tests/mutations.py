"""Inputs as they get damaged: each mutation of a table, an archive, an image, features, a configuration or a saved model
must end in one clear sentence (file, row, remedy), in one counted warning, or in the numbers that the file now holds.

    python tests/mutations.py --cases 10000            # every kind in turn; prints totals, exit code 1 if anything is bad
    python tests/mutations.py --only KIND --seed 7     # one case again; --cases N for more from there

A *kind* is a function of a `Case`, whose random numbers come from the kind's name and a seed alone. What the mutated files
mean is computed here by plain Python (`csv`, `json`, PIL, NumPy), without the package. `test_mutations.py` runs some hundred
cases, and shows for every kind a fault of the package that it finds.
"""
import argparse
import atexit
import contextlib
import copy
import csv
import datetime
import functools
import gzip
import io
import json
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

for name, value in {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}.items(): os.environ.setdefault(name, value)

import numpy as np
import polars as pl
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmseqrec.app import cli
from mmseqrec.config import RunConfig
from mmseqrec.data import interactions, items, sources
from mmseqrec.data.items import ItemTable
from mmseqrec.experiments import run
from mmseqrec.features import encoders
from mmseqrec.figures import ImageError

GOOD, BAD = ("same", "error", "warning"), ("traceback", "unclear", "refused", "partial", "changed")
MEANING = {"same": "the numbers that the files hold", "error": "one clear sentence", "warning": "one counted warning",
           "traceback": "an exception that is no sentence", "unclear": "a sentence without file, row or plain words",
           "refused": "an error although nothing is wrong", "partial": "files left behind", "changed": "other numbers, silently"}
JARGON = re.compile(r"polars|Traceback|codec can't|Error\(s\)|state_dict|NoneType|object has no|unexpected keyword|positional arg|"
                    r"cannot identify|invalid literal for|could not convert|rust|panick|pickle|errno| at 0x[0-9a-f]{6}|<[a-z]+ [^>]*>|tensor\(|dtype\(", re.I)


# ---------------------------------------------------------------- cases and what becomes of them

@dataclass(frozen=True)
class Refusal:
    "What must be refused. The sentence holds one of `words` (rows, columns), if there are any, beside a file."
    words: tuple = ()


@dataclass(frozen=True)
class Kind:
    name: str  # "group-mutation"
    mutate: object  # changes a case
    plant: str  # fault of the package that this kind finds, a key of `test_mutations.PLANTS`

    @property
    def group(self): return self.name.partition("-")[0]


@dataclass
class Case:
    kind: Kind
    seed: int
    folder: Path  # what is read
    out: Path  # what is written
    expected: list = None  # results (dictionaries) or a `Refusal`, each of them right
    notes: tuple = ()  # regular expressions of warnings, one each, that the first result has
    path: Path = None  # the mutated file, or folder
    named: tuple = ()  # names of files, of which a sentence must hold one
    more: dict = field(default_factory=dict)  # what a group keeps for itself

    def __post_init__(self): self.draw = Random(f"{self.kind.name}/{self.seed}")
    def pick(self, *choices): return self.draw.choice(choices)
    def refuse(self, *words): self.expected = [Refusal(words)]
    def may_refuse(self, *words): self.expected = [GROUPS[self.kind.group].expect(self), Refusal(words)]


@dataclass
class Outcome:
    word: str  # a key of `MEANING`
    text: str  # the sentence, or what is wrong
    case: Case

    def __str__(self):
        again = f"python tests/mutations.py --only {self.case.kind.name} --seed {self.case.seed}"
        return f"{self.word} ({MEANING[self.word]}): {self.text}\n    again: {again}"


@dataclass(frozen=True)
class Group:
    make: object  # case -> None; draws whole files
    read: object  # case -> (result, list of warnings), by the package
    expect: object  # case -> result or `Refusal`, by plain Python
    write: object = lambda case: None  # case -> None; writes the files


KINDS, GROUPS = {}, {}


def kind(*groups, plant):
    def register(mutate):
        for group in groups:
            name = f"{group}-{mutate.__name__}"
            KINDS[name] = Kind(name, mutate, plant)
        return mutate
    return register


def listing(folder): return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def equal(a, b):
    "Compare results number by number."
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray): return a.shape == np.shape(b) and np.array_equal(a, b)
    return type(a) in (int, float) and a == b or a is b or type(a) is type(b) and a == b


def fault_of(sentence, case):
    "What a sentence lacks, in words; empty if nothing."
    if "\n" in sentence or len(sentence) > 1500: return "several lines"
    if found := JARGON.search(sentence): return f"the word {found[0]!r}"
    if not any(name in sentence for name in case.named): return f"none of the names {case.named}"
    wanted = [each.words for each in case.expected if isinstance(each, Refusal)]
    words = [word for some in wanted for word in some]
    if all(wanted) and wanted and not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sentence) for word in words):
        return f"none of {words}"
    return ""


def judge(case, read=None):
    "Read the files of a case; return its `Outcome`."
    read, before = read or GROUPS[case.kind.group].read, listing(case.folder.parent)
    done = lambda word, text: Outcome(word, text, case)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        try: result, notes = read(case)
        except (KeyboardInterrupt, SystemExit): raise
        except BaseException as error: result = error
    left = {path for path, when in listing(case.folder.parent).items() if before.get(path) != when}
    if isinstance(result, BaseException):
        if left: return done("partial", f"{sorted(map(str, left))} after {result!r}")
        sentence = cli.error_sentence(result)
        if told: return done("unclear", f"Python warns: {told[0].message}, before: {sentence}")
        if type(result) not in (ValueError, FileNotFoundError, ImageError): return done("traceback", repr(result)[:500])
        if problem := fault_of(sentence, case): return done("unclear", f"{problem} in: {sentence}")
        is_right = any(isinstance(each, Refusal) for each in case.expected)
        return done("error" if is_right else "refused", sentence)
    if odd := [path for path in left if path.name.startswith(".") or re.search(r"\.(tmp|old|part|partial)$", path.name)]:
        return done("partial", f"{sorted(map(str, odd))}")
    if told: return done("unclear", f"Python warns: {told[0].message}")
    results = [each for each in case.expected if not isinstance(each, Refusal)]
    fits = [number for number, each in enumerate(results) if equal(each, result)]
    if not fits: return done("changed", difference(result, results))
    if found := [note for note in notes if JARGON.search(note)]: return done("unclear", found[0])
    wanted = case.notes if fits[0] == 0 else ()
    if len(wanted) == len(notes) and all(any(re.search(each, note) for note in notes) for each in wanted):
        return done("warning" if notes else "same", "; ".join(notes))
    return done("changed", f"the warnings are {notes}, not {wanted}")


def difference(result, results):
    if not results: return f"read, although it must be refused: {str(result)[:300]}"
    if isinstance(result, dict): return "; ".join(f"{key}: {str(value)[:300]} is not {str(results[0].get(key))[:300]}"
                                                  for key, value in result.items() if not equal(value, results[0].get(key)))[:900]
    return f"{str(result)[:300]} is not {str(results[0])[:300]}"


def make_case(name, seed, root):
    "Draw the files of a case, mutated, and write them below `root`."
    kind = KINDS[name]
    case, group = Case(kind, seed, root / "in", root / "out"), GROUPS[kind.group]
    case.folder.mkdir(parents=True)
    case.out.mkdir()
    group.make(case)
    kind.mutate(case)
    if case.expected is None: case.expected = [group.expect(case)]
    group.write(case)
    if not case.named: case.named = (case.path.name,)
    return case


@contextlib.contextmanager
def a_case(name, seed):
    with tempfile.TemporaryDirectory() as root: yield make_case(name, seed, Path(root))


def outcome(name, seed, read=None):
    "Make a case and judge it. `read(case)` takes the place of the package's own reading."
    with a_case(name, seed) as case: return judge(case, read)


def through_shell(case, call):
    "Give the files of a case to a command; `call(*words)` returns exit code, output and errors. Returns what is wrong, or nothing."
    words = COMMANDS[case.kind.group](case)
    before = listing(case.folder)
    code, _, errors = call(*words)
    sentence = errors.strip().removeprefix(f"mmseqrec {words[0]}: ")
    if code != 2 or not errors.startswith(f"mmseqrec {words[0]}: "): return f"exit code {code}: {errors[-500:]}"
    left = [path.name for path in listing(case.out) if path.name not in ("run.json", "pristine.csv")]
    if left or listing(case.folder) != before: return f"files left behind: {left}"
    return fault_of(sentence, case)


# ---------------------------------------------------------------- tables

FORMS, TEXT, DELIMITED = ("csv", "tsv", "jsonl", "parquet"), ("csv", "tsv", "jsonl"), ("csv", "tsv")
SEPARATOR = {"csv": ",", "tsv": "\t"}
NEEDED = {"interactions": ("user_id", "item_id", "timestamp"), "items": ("item_id", "title")}
WORDS = ("steel", "a red mug", "with, comma", 'say "hi"', "two\nlines", "café", "semi; colon")


class Sheet:
    "A table before it is written: names of columns, rows of cells (text, numbers, `None`), and the kind of file."
    def __init__(self, case):
        draw = case.draw
        self.group, self.form, self.packed = case.kind.group, draw.choice(FORMS), draw.random() < .2
        make_id = draw.choice(("u{}", "{}", "{:03}", "é{}", "b-{}_x"))
        words = WORDS[:2] if draw.random() < .5 else WORDS
        if self.group == "interactions":
            self.head, unit = ["user_id", "item_id", "timestamp", "note"], draw.choice(("s", "ms", "date", "half"))
            order = draw.sample(range(30), 30)
            self.rows = [[make_id.format(k % 6 + 1), make_id.format((7 * k) % 9 + 1), moment(k, unit), draw.choice(words)]
                         for k in order]
        else:
            self.head = ["item_id", "title", "description", "price"]
            self.rows = [[make_id.format(k), f"Thing {k}", draw.choice(words), draw.randrange(100)] for k in range(1, 25)]
        self.name, self.ends, self.blank, self.sep, self.header, self.edits = None, "\n", (), None, True, []

    def column(self, name): return self.head.index(name)
    def cells(self, name): return [row[self.column(name)] for row in self.rows]
    def place(self, row): return f"row {row + 1}" if self.form == "parquet" else f"line {self.lines[row]}"
    def file_name(self): return self.name or f"{self.group}.{self.form}{'.gz' if self.packed else ''}"

    def add_column(self, name, cells, at):
        self.head.insert(at, name)
        for row, cell in zip(self.rows, cells): row.insert(at, cell)

    def content(self):
        "Return the bytes of the file before it is packed; note the line of each row."
        if self.form == "parquet": return as_parquet(self.head, self.rows)
        self.lines, parts, number = [], [], 1
        if self.form != "jsonl" and self.header: parts.append(as_line(self.head, self.sep or SEPARATOR[self.form]))
        for row, cells in enumerate(self.rows):
            parts += [""] * self.blank.count(row)
            self.lines.append(1 + sum(1 + part.count("\n") for part in parts))
            line = as_json(self.head, cells) if self.form == "jsonl" else as_line(cells, self.sep or SEPARATOR[self.form])
            parts.append(line)
        return "".join(f"{part}{self.ends}" for part in parts).encode()

    def write(self, path):
        data = self.content()
        for edit in self.edits: data = edit(data)
        path.write_bytes(gzip.compress(data, 1, mtime=0) if self.packed else data)


def moment(k, unit):
    seconds = 1_600_000_000 + 86_399 * k
    if unit == "date": return str(datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).replace(tzinfo=None))
    return {"s": seconds, "ms": 1000 * seconds, "half": seconds + .5}[unit]


def as_line(cells, sep):
    texts = ("" if cell is None else str(cell) for cell in cells)
    mark = lambda text: '"' + text.replace('"', '""') + '"' if re.search(rf'[{re.escape(sep)}"\n\r]', text) else text
    return sep.join(map(mark, texts))


def as_json(head, cells):
    row = {name: cell for name, cell in zip(head, cells) if cell is not MISSING_KEY}
    return json.dumps(row, ensure_ascii=any("\ud800" in str(cell) for cell in cells))


MISSING_KEY = object()


def typed(cells):
    "Cells as a Parquet file holds them: of one type, and text otherwise."
    cells = [None if cell is MISSING_KEY else cell for cell in cells]
    is_large = any(isinstance(cell, int) and abs(cell) >= 2**63 for cell in cells)
    if len({type(cell) for cell in cells if cell is not None}) <= 1 and not is_large: return cells
    return [None if cell is None else str(cell) for cell in cells]


def as_parquet(head, rows):
    stream, columns = io.BytesIO(), {}
    for name, *cells in zip(head, *rows):
        columns[name] = pl.Series(name, typed(cells), dtype=None if any(cell is not None for cell in typed(cells)) else pl.String)
    pl.DataFrame(columns).write_parquet(stream)
    return stream.getvalue()


def make_table(case):
    case.more["sheet"] = Sheet(case)


def write_table(case):
    sheet = case.more["sheet"]
    if case.path is None: case.path = case.folder / sheet.file_name()
    if "raw" in case.more: case.path.write_bytes(case.more["raw"])
    else: sheet.write(case.path)


def expect_table(case):
    sheet = case.more["sheet"]
    sheet.content()
    rows = [[row[sheet.column(name)] for name in sheet.head] for row in sheet.rows]
    if sheet.form in DELIMITED: rows = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if sheet.form == "parquet": rows = list(zip(*map(typed, zip(*rows))))
    return MEANINGS[sheet.group](sheet.head, rows, sheet.place)


# What tables mean, by plain Python

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.A)
SHORTENED = re.compile(r"-?\d(\.\d+[eE]\+?|[eE]\+)\d+|-?\d{16,}\.0*", re.A)


class Unreadable(Exception):
    "Some rows cannot be read."


def missing(cell): return cell is None or cell is MISSING_KEY or cell != cell or isinstance(cell, str) and not cell.strip()


def plain_ids(cells):
    "Ids as text; numbers and texts that would be one id are refused, like what a spreadsheet has shortened."
    ids, first = [], {}
    for row, cell in enumerate(cells):
        if missing(cell): raise Unreadable(row)
        if isinstance(cell, (list, dict, bool)): raise Unreadable(row)
        if isinstance(cell, float) and (cell % 1 or abs(cell) >= 2**53): raise Unreadable(row)
        text = cell.strip() if isinstance(cell, str) else str(int(cell))
        if SHORTENED.fullmatch(text) or text == str(-2**63) or re.search("[\ud800-\udfff]", text): raise Unreadable(row)
        bare = re.fullmatch(r"0*(\d+)(\.0*)?", text, re.A)
        before, is_text = first.setdefault(bare and bare[1], (row, isinstance(cell, str)))
        if bare and is_text != isinstance(cell, str): raise Unreadable(row, before)
        ids.append(text)
    return ids


def plain_time(cell):
    "Return kind and number of a time; `None` for what is none."
    if missing(cell) or isinstance(cell, (bool, list, dict)): return None
    if not isinstance(cell, str): return ("number", cell) if abs(cell) < float("inf") and cell != -2**63 else None
    text = " ".join(cell.split())
    if NUMBER.fullmatch(text):
        number = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
        if not -2**63 < number < 2**63: number = float(number)
        return ("number", number) if abs(number) < float("inf") and number != -2**63 else None
    text = re.sub(r"(?<!\d)\d(?!\d)", r"0\g<0>", text) if "." not in text else text  # 2020-1-5 is a date
    if not re.fullmatch(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?", text, re.A): return None
    try: when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError: return None
    if when.tzinfo is None: when = when.replace(tzinfo=datetime.timezone.utc)
    return "date", (when - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)) / datetime.timedelta(seconds=1)


def plain_times(cells):
    found = list(map(plain_time, cells))
    kinds = {each[0] for each in found if each}
    odd = [row for row, each in enumerate(found) if each is None]
    if len(kinds) > 1: raise Unreadable(*range(len(cells)))
    if odd: raise Unreadable(odd[0])
    return [each[1] for each in found]


def in_order(tokens):
    tokens = set(tokens)
    is_number = all(re.fullmatch(r"0|[1-9]\d{0,17}", token, re.A) for token in tokens)
    return sorted(tokens, key=int if is_number else None)


def events_meaning(head, rows, place):
    "The histories of a table, or a `Refusal` with the places of what cannot be read."
    users, tokens, times = ([row[head.index(name)] for row in rows] for name in NEEDED["interactions"])
    try: users, tokens, times = plain_ids(users), plain_ids(tokens), plain_times(times)
    except Unreadable as error: return Refusal(tuple(map(place, error.args)))
    if "[PAD]" in tokens: return Refusal((place(tokens.index("[PAD]")),))
    histories = {}
    for row in sorted(range(len(rows)), key=lambda row: times[row]):
        histories.setdefault(users[row], []).append((tokens[row], times[row]))
    return {"users": in_order(users), "items": in_order(tokens), "histories": {user: histories[user] for user in in_order(users)}}


def items_meaning(head, rows, place):
    "Ids and texts of a table of items, or a `Refusal`."
    try: tokens = plain_ids([row[head.index("item_id")] for row in rows])
    except Unreadable as error: return Refusal(tuple(map(place, error.args)))
    if "[PAD]" in tokens: return Refusal((place(tokens.index("[PAD]")),))
    if twice := [row for row, token in enumerate(tokens) if token in tokens[:row]]:
        return Refusal((place(twice[0]), place(tokens.index(tokens[twice[0]]))))
    columns = [head.index(name) for name in ("title", "description") if name in head]
    texts = [[" ".join(re.sub("[\0\ufeff]", "", str(row[column])).split()) for column in columns if not missing(row[column])] for row in rows]
    return {"tokens": tokens, "texts": [list(dict.fromkeys(text for text in some if re.search(r"\w", text))) for some in texts]}


MEANINGS = {"interactions": events_meaning, "items": items_meaning}


def read_table(case):
    if case.kind.group == "items":
        column = case.more.get("image_column")
        table = items.read_items(case.path, column and case.folder / "pictures", image_column=column)
        return {"tokens": table.item_tokens, "texts": table.texts}, []
    events = interactions.read_interactions(case.path)
    times = events.time.tolist()
    spans = zip(events.user_tokens, events.offsets, events.offsets[1:])
    histories = {user: list(zip(events.history(user), times[start:end])) for user, start, end in spans}
    if case.seed % 4 == 0:
        folder = interactions.save_split(interactions.leave_one_out(events), case.out / "split")
        again = interactions.load_split(folder).interactions
        assert again.fingerprint == events.fingerprint
    return {"users": events.user_tokens, "items": events.item_tokens[1:], "histories": histories}, []


for group in NEEDED: GROUPS[group] = Group(make_table, read_table, expect_table, write_table)


def meanings_of_bytes(case, data):
    "What the bytes of a text file may mean: results, or refusals."
    sheet = case.more["sheet"]
    meaning, needed = MEANINGS[sheet.group], NEEDED[sheet.group]
    try: text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(10) + 1
        return [Refusal((f"line {line}", *(needed if line == 1 else ())))]
    if not text.strip() or "\0" in text: return [Refusal()]
    readers = [json_rows] if sheet.form == "jsonl" else [functools.partial(delimited_rows, SEPARATOR[sheet.form], quoting)
                                                         for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE)]
    found = []
    for reader in readers:
        try: head, rows, lines = reader(text)
        except (ValueError, csv.Error): found.append(Refusal())
        else:
            whole = rows and set(needed[:-1] if sheet.group == "items" else needed) <= set(head) and len(set(head)) == len(head)
            found.append(meaning(head, rows, lambda row: f"line {lines[row]}") if whole else Refusal())
    if '"' not in text: return found
    return [Refusal() if isinstance(each, Refusal) else each for each in found]  # which line a stray quote spoils, nobody can say


def delimited_rows(sep, quoting, text):
    text = re.sub("\r(?!\n)", "\x02", text)  # a bare carriage return is a blank
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sep, quoting=quoting, strict=quoting == csv.QUOTE_MINIMAL)
    rows, lines, line = [], [], 1
    for row in reader:
        row = [cell.replace("\x02", "\r") for cell in row]
        if quoting == csv.QUOTE_NONE: row = [unquoted(cell) for cell in row]
        if any(row):
            rows.append(row)
            lines.append(line)
        line = reader.line_num + 1
    head = rows[0] if rows else []
    if any(len(row) > len(head) for row in rows): raise ValueError
    return head, [row + [""] * (len(head) - len(row)) for row in rows[1:]], lines[1:]


def unquoted(cell):
    inside = re.fullmatch(r'"((?:[^"]|"")*)"', cell, re.S)
    return inside[1].replace('""', '"') if inside else cell


def json_rows(text):
    lines = [(number, line) for number, line in enumerate(re.split("\r\n|\r|\n", text), 1) if line.strip()]
    rows = [json.loads(line, parse_constant=lambda name: None) for _, line in lines]
    if not all(isinstance(row, dict) for row in rows): raise ValueError
    head = list(dict.fromkeys(key for row in rows for key in row))
    return head, [[row.get(name) for name in head] for row in rows], [number for number, _ in lines]


# Mutations of tables: the whole file

def in_text(case, *forms):
    sheet = case.more["sheet"]
    sheet.form = case.pick(*(forms or TEXT))
    return sheet


def edit_bytes(case, edit):
    "Change the bytes of a text file; what they mean now is right, and so is an error."
    sheet = case.more["sheet"]
    data = edit(sheet.content())
    sheet.edits.append(lambda _: data)
    case.expected = meanings_of_bytes(case, data)
    if not all(isinstance(each, Refusal) for each in case.expected): case.expected.append(Refusal())


def packed_bytes(case):
    case.more["sheet"].packed = True
    return gzip.compress(case.more["sheet"].content(), mtime=0)


def flip_bit(case, data, start=0):
    at = case.draw.randrange(start, len(data))
    return data[:at] + bytes([data[at] ^ 1 << case.draw.randrange(8)]) + data[at + 1:]


@kind(*NEEDED, plant="lost rows")
def cut_file(case):
    in_text(case)
    edit_bytes(case, lambda data: data[:case.draw.randrange(len(data))])

@kind(*NEEDED, plant="raw errors")
def changed_byte(case):
    in_text(case)
    byte = case.pick(*(bytes([code]) for code in b"\0\xff\xe9\"',\t;:\n\r 0179azE.-+_{}[]"), b"\xef\xbb\xbf", "\u2028".encode())
    def edit(data):
        at = case.draw.randrange(len(data))
        return data[:at] + byte + data[at + case.draw.randrange(2):]
    edit_bytes(case, edit)

@kind(*NEEDED, plant="strict marks")
def byte_order_mark(case):
    in_text(case).edits.append(lambda data: b"\xef\xbb\xbf" + data)

@kind(*NEEDED, plant="any encoding")
def other_encoding(case):
    sheet, encoding = in_text(case), case.pick("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252")
    row = case.draw.randrange(len(sheet.rows))
    sheet.rows[row][1] = f"café {row}"
    data = sheet.content().decode().encode(encoding)
    sheet.edits.append(lambda _: data)
    case.refuse(*([sheet.place(min(row for row, cells in enumerate(sheet.rows) if "é" in str(cells)))] if "u" not in encoding else []))

@kind(*NEEDED, plant="lost rows")
def line_ends(case):
    sheet = in_text(case)
    sheet.ends = case.pick("\r\n", "\r\n", "\r")
    if sheet.ends == "\r": edit_bytes(case, lambda data: data)

@kind(*NEEDED, plant="lost rows")
def no_last_line_end(case): in_text(case).edits.append(lambda data: data.rstrip(b"\n"))

@kind(*NEEDED, plant="lost rows")
def blank_rows(case):
    sheet = in_text(case)
    sheet.blank = [case.draw.randrange(len(sheet.rows)) for _ in range(case.draw.randint(1, 4))]
    sheet.edits.append(lambda data: data + case.pick(b"", b"\n", b"\n\n", b" \n\t\n" if sheet.form == "jsonl" else b"\r\n"))

@kind(*NEEDED, plant="guessed columns")
def other_delimiter(case):
    sheet = in_text(case, *DELIMITED)
    sheet.sep = case.pick(*{";", "|", ",", "\t", ":"} - {SEPARATOR[sheet.form]})
    case.refuse()

@kind(*NEEDED, plant="guessed kind")
def wrong_name(case):
    sheet = case.more["sheet"]
    others = [f"{form}{end}" for form in FORMS for end in ("", ".gz") if (form, end) != (sheet.form, ".gz" * sheet.packed)]
    sheet.name = f"{sheet.group}.{case.pick(*others, 'txt', 'xlsx', 'json', 'zip')}"
    case.refuse()

@kind(*NEEDED, plant="lost rows")
def other_form(case):
    sheet = case.more["sheet"]
    sheet.form, sheet.packed = case.pick(*FORMS), case.pick(True, False)
    sheet.name = f"x.y {sheet.form}.{case.pick(sheet.form, sheet.form.upper())}{'.gz' * sheet.packed}"

@kind(*NEEDED, plant="half archives")
def cut_gzip(case):
    data = packed_bytes(case)
    case.more["raw"] = data[:case.draw.randrange(len(data))]
    case.refuse()

@kind(*NEEDED, plant="half archives")
def changed_gzip(case):
    case.more["raw"] = flip_bit(case, packed_bytes(case))
    case.may_refuse()

@kind(*NEEDED, plant="raw errors")
def cut_parquet(case):
    sheet = case.more["sheet"]
    sheet.form = "parquet"
    def edit(data): return data[:case.draw.randrange(len(data))] if case.draw.random() < .8 else data[case.draw.randint(1, 99):]
    sheet.edits.append(edit)
    case.refuse()

@kind(*NEEDED, plant="any content")
def other_content(case):
    sheet, data = case.more["sheet"], case.pick(
        b"", b"\n", b"  \n\n", b"<!DOCTYPE html><html></html>", b"\x89PNG\r\n\x1a\n" + bytes(50), b"PK\x03\x04" + bytes(30), b"[]", b"null",
        b"{", b"[{\"a\": 1}]", b"version https://git-lfs.github.com/spec/v1\n", b"PAR1", b"PAR1" + bytes(40) + b"PAR1", b"\xd0\xcf\x11\xe0")
    sheet.edits.append(lambda _: data)
    case.refuse()


# Mutations of tables: columns

@kind(*NEEDED, plant="any columns")
def column_dropped(case):
    sheet, name = case.more["sheet"], case.pick(*NEEDED[case.kind.group])
    at = sheet.column(name)
    del sheet.head[at]
    for row in sheet.rows: del row[at]
    if name != "title": case.refuse(name)

@kind(*NEEDED, plant="any columns")
def column_renamed(case):
    sheet, name = case.more["sheet"], case.pick(*NEEDED[case.kind.group])
    if name == "title": name = "item_id"
    new = case.pick(name.upper(), name + "s", "x", f"{name} (old)", name.replace("_", "-") if "_" in name else "when", "")
    sheet.head[sheet.column(name)] = new
    case.refuse(name)

@kind(*NEEDED, plant="any columns")
def column_doubled(case):
    sheet = in_text(case, *DELIMITED)
    name = case.pick(*NEEDED[case.kind.group])
    cells = sheet.cells(name)
    sheet.add_column(name, case.draw.sample(cells, len(cells)), case.draw.randrange(len(sheet.head) + 1))
    case.refuse(name)

@kind(*NEEDED, plant="guessed columns")
def header_missing(case):
    in_text(case, *DELIMITED).header = False
    case.refuse()

@kind(*NEEDED, plant="lost rows")
def columns_moved(case):
    sheet = case.more["sheet"]
    if case.draw.random() < .5: sheet.add_column(case.pick("", "index", "user", "x"), range(len(sheet.rows)), case.draw.randrange(4))
    order = case.draw.sample(range(len(sheet.head)), len(sheet.head))
    sheet.head, sheet.rows = [sheet.head[k] for k in order], [[row[k] for k in order] for row in sheet.rows]


# Mutations of tables: rows

def a_row(case):
    sheet = case.more["sheet"]
    return case.draw.randrange(len(sheet.rows))

@kind(*NEEDED, plant="one of each")
def rows_repeated(case):
    sheet = case.more["sheet"]
    for _ in range(case.draw.randint(1, 3)):
        row = a_row(case)
        sheet.rows.insert(case.draw.randrange(len(sheet.rows) + 1), list(sheet.rows[row]))

@kind(*NEEDED, plant="as they come")
def rows_shuffled(case):
    sheet = case.more["sheet"]
    case.draw.shuffle(sheet.rows)
    if sheet.group == "interactions" and case.draw.random() < .5:  # equal times keep the order of the rows
        same = sheet.rows[0][2]
        for row in sheet.rows[:case.draw.randrange(9)]: row[2] = same

@kind(*NEEDED, plant="lost rows")
def rows_dropped(case):
    sheet = case.more["sheet"]
    kept = case.draw.sample(range(len(sheet.rows)), case.draw.randint(0, len(sheet.rows) - 1))
    sheet.rows = [sheet.rows[row] for row in sorted(kept)]
    if not kept: case.refuse()

@kind(*NEEDED, plant="lost rows")
def row_short(case):
    sheet, row = in_text(case, *DELIMITED), a_row(case)
    n = case.draw.randint(1, len(sheet.head) - 1)
    sheet.rows[row] = sheet.rows[row][:n] + [None] * (len(sheet.head) - n)
    sheet.edits.append(lambda data: data)
    expected, content = expect_table(case), sheet.content
    whole = sheet.rows[row]
    def short():
        sheet.rows[row] = whole[:n]
        return content()
    sheet.content, case.expected = short, [expected]

@kind(*NEEDED, plant="raw errors")
def row_long(case):
    sheet, row = in_text(case, *DELIMITED), a_row(case)
    sheet.rows[row] = [*sheet.rows[row], *["x"] * case.draw.randint(1, 3)]
    sheet.content()
    case.refuse(sheet.place(row))


# Mutations of tables: cells

def set_cells(case, name, *choices, rows=1):
    "Replace some cells of a column; a function of the choices is given the cell."
    sheet = case.more["sheet"]
    for row in case.draw.sample(range(len(sheet.rows)), rows):
        new = case.pick(*choices)
        cell = sheet.rows[row][sheet.column(name)]
        sheet.rows[row][sheet.column(name)] = new(cell) if callable(new) else new
    return sheet

@kind(*NEEDED, plant="any rows")
def cell_missing(case):
    name = case.pick(*NEEDED[case.kind.group], "item_id", case.more["sheet"].head[-1])
    sheet = set_cells(case, name, None, "", "  ", MISSING_KEY, rows=case.draw.randint(1, 3))
    if sheet.form in DELIMITED: sheet.rows = [[None if cell is MISSING_KEY else cell for cell in row] for row in sheet.rows]
    if sheet.form == "jsonl" and any(cell is MISSING_KEY for cell in sheet.rows[0]): case.may_refuse(name, sheet_place(case, 0))

def sheet_place(case, row):
    case.more["sheet"].content()
    return case.more["sheet"].place(row)

@kind("interactions", plant="any rows")
def time_is_text(case):
    set_cells(case, "timestamp", "yesterday", "n/a", "None", "12:30", "01/02/2020", "2020-13-45", "1,600,000,000", "0x10", "1_000", "５", "--5",
              "1e", "true", "1 600", "2020-01-01 25:00:00", rows=case.draw.randint(1, 2))

@kind("interactions", plant="any rows")
def time_is_no_number(case):
    sheet = set_cells(case, "timestamp", *((lambda cell: float("nan")), "inf", "-inf", "NaN", "nan", "Infinity", -2**63, "1e999"))
    if sheet.form == "parquet": sheet.rows = [[None if cell != cell else cell for cell in row] for row in sheet.rows]

@kind("interactions", plant="other times")
def time_is_odd(case):
    set_cells(case, "timestamp", 0, -5, 10**17, 10**25, "1e9", "1e30", "+1600000000", " 1600000000 ", "1600000000.0", "1600000000.25", 2**63,
              -10**12, "0001600000000", "1.6e9", "16e8", ".5", "5.", rows=case.draw.randint(1, 3))
    case.may_refuse()

@kind("interactions", plant="any units")
def time_in_another_unit(case):
    sheet = case.more["sheet"]
    at = sheet.column("timestamp")
    for k, row in enumerate(sheet.rows): row[at] = moment(k, "s")
    rows, factor = case.draw.sample(range(30), case.draw.randint(1, 29)), case.pick(10**3, 10**6, 10**9)
    for row in rows: sheet.rows[row][at] *= factor
    sheet.content()
    case.refuse(*map(sheet.place, rows))

@kind("interactions", plant="other times")
def times_in_another_unit(case):
    sheet, unit = case.more["sheet"], case.pick("s", "ms", "date", "half", "us", "ns", "day", "zone", "T")
    at = sheet.column("timestamp")
    for k, row in enumerate(sheet.rows):
        seconds = moment(k, "s")
        day = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
        row[at] = {"us": seconds * 10**6, "ns": seconds * 10**9, "day": str(day.date()), "zone": day.isoformat().replace("+00:00", "+02:00"),
                   "T": day.isoformat().replace("+00:00", "Z")}.get(unit) or moment(k, unit)

@kind("interactions", plant="any times")
def dates_beside_numbers(case):
    sheet = case.more["sheet"]
    at, dated = sheet.column("timestamp"), case.draw.sample(range(30), case.draw.randint(1, 29))
    for k, row in enumerate(sheet.rows): row[at] = moment(k, "date" if k in dated else case.pick("s", "ms"))

@kind(*NEEDED, plant="bare ids")
def id_with_zeros(case):
    name = case.pick(*(name for name in NEEDED[case.kind.group] if name.endswith("_id")))
    set_cells(case, name, lambda cell: f"0{cell}", lambda cell: f"{cell}.0", lambda cell: f"+{cell}", rows=case.draw.randint(1, 3))

@kind(*NEEDED, plant="any ids")
def id_is_a_number(case):
    sheet = case.more["sheet"]
    at, number, start = sheet.column("item_id"), case.pick(int, float), case.pick(1, 10**6, 2**53 - 30, 10**15)
    rows = range(len(sheet.rows)) if case.draw.random() < .5 else case.draw.sample(range(len(sheet.rows)), 5)
    for row in rows: sheet.rows[row][at] = number(start + row)

@kind(*NEEDED, plant="any ids")
def id_with_spaces(case):
    name = case.pick(*(name for name in NEEDED[case.kind.group] if name.endswith("_id")))
    set_cells(case, name, lambda cell: f" {cell}", lambda cell: f"{cell} ", lambda cell: f"\t{cell}", lambda cell: f"{cell}\u00a0",
              lambda cell: f"\u3000{cell}", rows=case.draw.randint(1, 3))

@kind(*NEEDED, plant="bare ids")
def id_in_unicode(case):
    name = case.pick(*(name for name in NEEDED[case.kind.group] if name.endswith("_id")))
    set_cells(case, name, *(lambda cell, form=form: unicodedata.normalize(form, f"é{cell}ﬁ") for form in ("NFC", "NFD", "NFKC")),
              lambda cell: f"{cell}\u200b", lambda cell: f"😀{cell}", lambda cell: f"\u202e{cell}", "１", rows=case.draw.randint(1, 4))

@kind(*NEEDED, plant="any ids")
def id_lost_digits(case):
    name = case.pick(*(name for name in NEEDED[case.kind.group] if name.endswith("_id")))
    set_cells(case, name, "1.58222E+18", "1.5e18", "1E+05", "1582218195625938945.0")

@kind(*NEEDED, plant="any ids")
def id_of_padding(case): set_cells(case, "item_id", "[PAD]", " [PAD] ")

@kind(*NEEDED, plant="any ids")
def id_is_no_id(case):
    sheet = case.more["sheet"]
    sheet.form = "jsonl"
    name = case.pick(*(name for name in NEEDED[case.kind.group] if name.endswith("_id")))
    set_cells(case, name, ["a"], {"a": 1}, True, 1.5, float("nan"), 1e300, "\ud800x", [], rows=1)
    sheet.edits.append(lambda data: data)

@kind(*NEEDED, plant="any content")
def cell_with_nul(case):
    sheet = set_cells(case, case.pick(*NEEDED[case.kind.group]), lambda cell: f"{cell}\0", lambda cell: f"\0{cell}", "\0")
    if sheet.form in DELIMITED: case.refuse()
    else: case.may_refuse()

@kind(*NEEDED, plant="lost rows")
def stray_quote(case):
    sheet = in_text(case, *DELIMITED)
    row, at = a_row(case), case.draw.randrange(len(sheet.head))
    text = str(sheet.rows[row][at])
    k = case.draw.randrange(len(text) + 1)
    sheet.rows[row][at] = f"{text[:k]}\x01{text[k:]}"
    edit_bytes(case, lambda data: data.replace(b"\x01", b'"'))

@kind("items", plant="lost rows")
def text_of_the_web(case):
    sheet = case.more["sheet"]
    row = a_row(case)
    text, clean = case.pick(("<b>Red</b> mug", "Red mug"), ("Tom &amp; Ann", "Tom & Ann"), ("a\u200bb", "ab"), ("<br>Pot", "Pot"),
                            ("<script>x</script>", ""), ("\ufeffPan", "Pan"), ("a < b", "a < b"), ("...", ""), ("a" * 10**5, "a" * 10**5))
    sheet.rows[row][1] = clean
    expected = expect_table(case)
    sheet.rows[row][1], case.expected = text, [expected]

@kind("items", plant="any path")
def image_path(case):
    sheet = case.more["sheet"]
    row, names = a_row(case), [f"{k}.png" for k in range(len(sheet.rows))]
    names[row] = case.pick("../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "http://x.org/a.png", "a.png|../b.png", "\\\\host\\x.png", "..")
    sheet.add_column("image", names, 1)
    pictures = case.folder / "pictures"
    pictures.mkdir()
    (pictures / "0.png").touch()
    (case.folder / "x.png").touch()
    case.more["image_column"] = "image"
    sheet.content()
    case.refuse(sheet.place(row))

@kind("interactions", "items", plant="raw errors")
def bad_json(case):
    sheet, row = case.more["sheet"], a_row(case)
    sheet.form = "jsonl"
    lines = sheet.content().decode().splitlines()
    line = lines[row]
    lines[row] = case.pick(line[:-1], line + "," + line, line + line, line[:-1] + ",}", line.replace('"', "'"), "[" + line + "]", "7", '"x"',
                           "null", "nonsense", line + "}", line[1:], "[" * 10**5, line.replace(":", "="), "// " + line)
    sheet.edits.append(lambda _: "\n".join(lines).encode())
    case.refuse(f"line {row + 1}")


# ---------------------------------------------------------------- archives

def make_archive(case):
    "MovieLens as a zip archive, or ratings and metadata of Amazon Reviews 2018, packed with gzip."
    draw, more = case.draw, case.more
    more["source"] = draw.choice(("csv", "dat", "amazon"))
    rows = [[u + 1, (u + 2 * k) % 5 + 1, draw.choice(("5", "3.5", "1")), 978_300_000 + 1000 * u + k] for u in range(5) for k in range(5)]
    films = [[k, f"Film {k} (19{50 + k})", draw.choice(("Drama", "Animation|Comedy", "(no genres listed)"))] for k in range(1, 6)]
    more |= {"rows": draw.sample(rows, len(rows)), "films": films, "infos": {}, "first": draw.choice(("ml-20m/", "", "any name/"))}


def members(case):
    "The files of MovieLens, name -> bytes."
    rows, films, kind = case.more["rows"], case.more["films"], case.more["source"]
    if kind == "dat":
        text = lambda some: "\n".join("::".join(map(str, row)) for row in some) + "\n"
        return {"ratings.dat": text(rows).encode(), "movies.dat": text(films).encode("latin-1")}
    text = lambda head, some: "\n".join([head, *(as_line(row, ",") for row in some)]) + "\n"
    return {"ratings.csv": text("userId,movieId,rating,timestamp", rows).encode(), "movies.csv": text("movieId,title,genres", films).encode()}


def zipped(case):
    "The archive as bytes; `case.more[\"infos\"]` names members otherwise: name -> `ZipInfo`, or `None` to leave it out."
    stream, others = io.BytesIO(), case.more["infos"]
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members(case).items():
            info = others.get(name, zipfile.ZipInfo(case.more["first"] + name))
            if info is not None: archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def amazon(case):
    "Ratings and metadata of Amazon Reviews 2018, as bytes."
    asin = lambda item: f"B{item:09}"
    ratings = "".join(f"{asin(item)},A{user:013},{rating},{time}\n" for user, item, rating, time in case.more["rows"])
    records = [json.dumps({"asin": asin(item), "title": title, "category": genres.split("|"), "also_buy": [], "imageURL": ["http://x/1.jpg"]}) for item, title, genres in
               case.more["films"]]
    return {"X.csv.gz": gzip.compress(ratings.encode(), mtime=0), "meta_X.json.gz": gzip.compress("\n".join(records).encode(), mtime=0)}


def write_archive(case):
    if case.path is not None: return
    if case.more["source"] == "amazon":
        for name, data in (amazon(case) | case.more.get("packed", {})).items(): (case.folder / name).write_bytes(data)
        case.path, case.named = case.folder / "X.csv.gz", ("X.csv", "X.csv.gz", "meta_X.json.gz")
    else:
        case.path = case.folder / "ml-20m.zip"
        case.path.write_bytes(case.more.get("zip") or zipped(case))
        case.named = ("ml-20m.zip", "ratings.csv", "ratings.dat", "movies.csv", "movies.dat")


def read_archive(case):
    if case.more["source"] == "amazon": raw = sources.read_amazon(2018, case.path, case.folder / "meta_X.json.gz")
    else: raw = sources.read_movielens(case.path)
    if case.seed % 4 == 0:
        again = sources.RawTables.read(raw.write(case.out))
        assert again.interactions.equals(raw.interactions) and again.items.equals(raw.items)
    films = raw.items.select("item_id", "title", "categories").rows()
    return {"rows": raw.interactions.rows(), "films": films}, [note for note in raw.notes if not note.startswith("there are no pictures")]


def expect_archive(case):
    is_amazon, rows = case.more["source"] == "amazon", []
    for user, item, rating, time in case.more["rows"]:
        ids = [f"A{user:013}", f"B{item:09}"] if is_amazon else [str(user), str(item)]
        rows.append((*ids, float(rating) if rating else None, time))
    order = {row[1]: None for row in rows}
    films = [(f"B{item:09}" if is_amazon else str(item), title, ", ".join(genres.split("|"))) for item, title, genres in case.more["films"]]
    if not is_amazon: films = [(item, title, None if genres == "(no genres listed)" else genres) for item, title, genres in films]
    return {"rows": rows, "films": [film for film in films if film[0] in order] if is_amazon else films}


GROUPS["archives"] = Group(make_archive, read_archive, expect_archive, write_archive)


def movielens(case): case.more["source"] = case.pick("csv", "dat")

def a_member(case): return case.pick(*members(case))

@kind("archives", plant="raw archives")
def cut_archive(case):
    if case.more["source"] == "amazon":
        name, data = case.draw.choice(list(amazon(case).items()))
        case.more["packed"] = {name: data[:case.draw.randrange(len(data))]}
    else: case.more["zip"] = zipped(case)[:-case.draw.randint(1, len(zipped(case)) - 1)]
    case.refuse()

@kind("archives", plant="raw archives")
def changed_bit(case):
    if case.more["source"] == "amazon":
        name, data = case.draw.choice(list(amazon(case).items()))
        case.more["packed"] = {name: flip_bit(case, data)}
    else: case.more["zip"] = flip_bit(case, zipped(case))
    case.may_refuse()

@kind("archives", plant="unpacked")
def member_outside(case):
    movielens(case)
    name = a_member(case)
    case.more["infos"] = {name: zipfile.ZipInfo(case.pick("../", "../../", "/", "a/../../", "a/b/", "C:\\", "..\\", f"{case.folder.parent}/") + name)}
    case.refuse()

@kind("archives", plant="raw archives")
def member_missing(case):
    movielens(case)
    case.more["infos"] = {a_member(case): None}
    case.refuse()

@kind("archives", plant="raw archives")
def member_of_another_kind(case):
    "A folder, or a symbolic link, in the place of the file."
    movielens(case)
    name = a_member(case)
    info = zipfile.ZipInfo(case.more["first"] + name + "/" * (is_folder := case.pick(True, False)))
    if not is_folder: info.external_attr = 0o120777 << 16  # its content is read, it is never followed
    case.more["infos"] = {name: info}
    if is_folder: case.refuse()

@kind("archives", plant="any size")
def member_of_gigabytes(case):
    movielens(case)
    data = bytearray(zipped(case))
    at = data.index(b"PK\1\2")
    if case.draw.random() < .5: at = data.index(b"PK\1\2", at + 1)
    data[at + 24:at + 28] = struct.pack("<I", case.draw.randint(4_000_000_001, 2**32 - 2))
    case.more["zip"] = bytes(data)
    case.refuse()

@kind("archives", plant="raw archives")
def member_packed_otherwise(case):
    "Encrypted, or by a method that is not known."
    movielens(case)
    data = bytearray(zipped(case))
    at = data.index(b"PK\1\2")
    if case.draw.random() < .5: data[at + 8] |= 1
    else: data[at + 10] = case.pick(1, 9, 99)
    case.more["zip"] = bytes(data)
    case.refuse()

@kind("archives", plant="raw archives")
def no_archive(case):
    movielens(case)
    case.more["zip"] = case.pick(b"x", b"<html>", b"PK\5\6" + bytes(18), gzip.compress(b"x"), bytes(3000), b"Rar!\x1a\x07\0" + bytes(99))
    case.refuse()

@kind("archives", plant="any cells")
def rating_missing(case):
    if case.more["source"] == "dat": case.more["source"] = "csv"
    rows = case.draw.sample(range(25), case.draw.randint(1, 5))
    for row in rows: case.more["rows"][row][2] = case.pick("", "x", "nan", "5,") if case.more["source"] == "csv" else case.pick("", "x")
    case.expected = [expect_archive(Case(case.kind, case.seed, case.folder, case.out, more=case.more | {
        "rows": [[*row[:2], "" if k in rows else row[2], row[3]] for k, row in enumerate(case.more["rows"])]}))]
    case.notes = (rf"without a rating.*: {len(rows)}$",)

@kind("archives", plant="any cells")
def event_damaged(case):
    row, column = case.draw.randrange(25), case.pick(0, 1, 3)
    if case.more["source"] == "amazon": column = 3
    case.more["rows"][row][column] = case.pick("x", "") if column == 3 else ""
    case.refuse(f"line {row + 1 + (case.more['source'] == 'csv')}")

@kind("archives", plant="any cells")
def event_repeated(case):
    row = case.draw.randrange(25)
    n, expected = case.draw.randint(1, 3), expect_archive(case)
    for _ in range(n): case.more["rows"].append(list(case.more["rows"][row]))
    if case.more["source"] != "amazon": return
    case.expected, case.notes = [expected], (rf"were dropped: {n}$",)

@kind("archives", plant="any cells")
def film_not_described(case):
    film = case.more["films"].pop(case.draw.randrange(5))
    if case.draw.random() < .3: case.more["films"].append([9, "Other (1999)", "Drama"])
    case.notes = (r"not described: 1 of 5$",)

@kind("archives", plant="any cells")
def film_twice(case):
    movielens(case)
    case.more["films"].append(list(case.more["films"][case.draw.randrange(5)]))
    case.refuse()


# ---------------------------------------------------------------- images

LOSSLESS = ("png", "bmp", "webp", "gif")


def make_images(case):
    "One image for each of three items."
    rng = np.random.default_rng(case.draw.randrange(2**32))
    case.more["pixels"], case.more["files"] = {}, {}
    for name, suffix in zip("abc", case.draw.sample(("png", "jpg", "bmp", "webp", "gif"), 3)):
        pixels = rng.integers(0, 255, (case.draw.randint(8, 20), case.draw.randint(8, 20), 3), np.uint8)
        if suffix == "gif": pixels[:] = pixels[..., :1] // 8 * 8
        set_image(case, f"{name}.{suffix}", Image.fromarray(pixels))
    case.path = case.folder / "pictures"


def set_image(case, name, image, **options):
    "Save an image under a name; what it shows is what PIL decodes."
    form = options.pop("format", None) or {"jpg": "jpeg"}.get(name[2:], name[2:])
    stream = io.BytesIO()
    image.save(stream, form, **{"lossless": True, "exact": True} | options if form == "webp" else options)
    case.more["files"][name] = stream.getvalue()
    case.more["pixels"][name] = np.asarray(Image.open(stream).convert("RGB"))


def write_images(case):
    case.path.mkdir()
    for name, data in case.more["files"].items(): (case.path / name).write_bytes(data)


def expect_images(case): return dict(case.more["pixels"])


def read_images(case):
    table = items.read_items(pl.DataFrame({"item_id": list("abc"), "title": list("abc")}), case.path)
    report = items.check_images(table, decode=case.seed % 2 == 0, workers=1)
    files = [path for row in report.table.images for path in row]
    shown, unread = encoders._take_in(items.open_image, files)
    broken = [(path.name, problem) for _, path, problem in report.broken] + [(files[row].name, reason) for row, reason in unread.items()]
    return {files[row].name: np.asarray(image) for row, image in shown.items()}, [f"{name}: {problem}" for name, problem in broken]


GROUPS["images"] = Group(make_images, read_images, expect_images, write_images)


def an_image(case, *suffixes):
    "Choose an image; of other suffixes than it may have, make the first so."
    fitting = [name for name in case.more["files"] if not suffixes or name[2:] in suffixes]
    if fitting: return case.draw.choice(fitting)
    old = next(iter(case.more["files"]))
    pixels = case.more["pixels"].pop(old)
    del case.more["files"][old]
    name = f"{old[0]}.{case.draw.choice(suffixes)}"
    set_image(case, name, Image.fromarray(pixels))
    return name


def left_out(case, name, why=""):
    "The image is left out with a warning, and the others stay."
    del case.more["pixels"][name]
    case.expected, case.notes = [expect_images(case)], (rf"^{re.escape(name)}: .*{why}",)

@kind("images", plant="half images")
def cut_image(case):
    name = an_image(case)
    data, whole = case.more["files"][name], expect_images(case)
    case.more["files"][name] = data[:case.draw.randrange(len(data))]
    left_out(case, name)
    case.expected.append(whole)  # behind the last pixel nothing is missed

@kind("images", plant="half images")
def changed_png(case):
    name, whole = an_image(case, "png"), expect_images(case)
    case.more["files"][name] = flip_bit(case, case.more["files"][name])
    whole = expect_images(case)
    left_out(case, name)
    case.expected.append(whole)

@kind("images", plant="raw images")
def other_image_format(case):
    name = an_image(case)
    form = case.pick("png", "bmp", "webp", "tiff", "ppm", "ico", "tga")
    stream, pixels = io.BytesIO(), case.more["pixels"][name]
    Image.fromarray(pixels).save(stream, form, **{"lossless": True} if form == "webp" else {})
    case.more["files"][name] = stream.getvalue()
    if form in ("tiff", "ppm", "ico", "tga"): left_out(case, name, "not a picture")

@kind("images", plant="black background")
def transparent_image(case):
    name = an_image(case, "png", "webp", "gif")
    image = Image.fromarray(case.more["pixels"][name])
    clear = np.random.default_rng(case.seed).random(case.more["pixels"][name].shape[:2]) < .5
    if name.endswith("gif") or name.endswith("png") and case.draw.random() < .3:
        grey = np.asarray(image)[..., 0] // 2 + 1
        flat = Image.fromarray(np.where(clear, 0, grey).astype(np.uint8)).convert("P")
        set_image(case, name, flat, transparency=0)
        shown = np.repeat(grey[..., None], 3, 2)
    elif name.endswith("png") and case.draw.random() < .5:
        grey = image.convert("L")
        grey.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
        set_image(case, name, grey)
        shown = np.repeat(np.asarray(grey)[..., :1], 3, 2)
    else:
        image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
        shown = case.more["pixels"][name]
        set_image(case, name, image)
    case.more["pixels"][name] = np.where(clear[..., None], 255, shown).astype(np.uint8)

@kind("images", plant="black background")
def sixteen_bits(case):
    name = an_image(case, "png")
    deep = np.random.default_rng(case.seed).integers(0, 65536, (9, 11)).astype(np.uint16)
    set_image(case, name, Image.fromarray(deep))
    case.more["pixels"][name] = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2)

@kind("images", plant="as stored")
def turned_image(case):
    name, turn = an_image(case, "png", "jpg", "webp"), case.draw.randint(1, 8)
    note = Image.Exif()
    note[0x0112] = turn
    set_image(case, name, Image.fromarray(case.more["pixels"][name]), exif=note.tobytes())
    x = case.more["pixels"][name]
    case.more["pixels"][name] = {1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1], 5: x.swapaxes(0, 1), 6: np.rot90(x, -1),
                                 7: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90(x)}[turn]

@kind("images", plant="lost images")
def other_colours(case):
    name, mode = an_image(case, "png", "jpg"), case.pick("L", "1", "P", "CMYK")
    if name.endswith("png") and mode == "CMYK" or name.endswith("jpg") and mode in "1P": mode = "L"
    set_image(case, name, Image.fromarray(case.more["pixels"][name]).convert(mode))

@kind("images", plant="raw images")
def no_image(case):
    name = an_image(case)
    case.more["files"][name] = case.pick(b"", b"text, no picture", b"<!DOCTYPE html><html>", b"\0" * 500, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a",
                                         b"BM", b"RIFF\0\0\0\0WEBP", b"%PDF-1.4", b"<svg xmlns='http://www.w3.org/2000/svg'/>", case.draw.randbytes(99))
    left_out(case, name)

@kind("images", plant="any image")
def image_of_gigabytes(case):
    name, side = an_image(case, "png", "bmp", "gif"), case.pick(7100, 20_000, 65_000)
    data = bytearray(case.more["files"][name])
    if name.endswith("png"):
        data[16:24] = struct.pack(">2I", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    elif name.endswith("bmp"): data[18:26] = struct.pack("<2i", side, side)
    else: data[6:10] = struct.pack("<2H", side, side)
    case.more["files"][name] = bytes(data)
    left_out(case, name, "too large")

@kind("images", plant="any image")
def tiny_image(case):
    name = an_image(case, "png", "bmp", "gif")
    set_image(case, name, Image.new("RGB", case.pick((1, 1), (1, 9), (9, 1))))
    left_out(case, name, "placeholder")

@kind("images", plant="lost images")
def bytes_behind_the_image(case):
    name = an_image(case)
    case.more["files"][name] += case.pick(b"\0", b"\n\n", b"<html>", bytes(2000), b"PK\3\4")

@kind("images", plant="lost images")
def other_files(case):
    case.more["files"] |= {case.pick("readme.txt", "d.png", ".a.png", "list.json", "Thumbs.db", "a.png.part", "ab.png"): b"x"}


# ---------------------------------------------------------------- features

def make_features(case):
    "A table of items, and an array with a row for each of its lines; the catalogue has some of the items in another order."
    rng = np.random.default_rng(case.draw.randrange(2**32))
    tokens = [f"i{k}" for k in range(12)]
    (case.folder / "items.csv").write_text("item_id,title\n" + "".join(f"{token},Thing\n" for token in tokens))
    known = ["[PAD]", *case.draw.sample(tokens, 9), "i99"]
    case.more |= {"tokens": tokens, "table": ItemTable(known, [[] for _ in known], [[] for _ in known]), "name": case.pick("text", "image"),
                  "rows": rng.standard_normal((12, 5)).astype(np.float32)}
    case.more["array"] = case.more["rows"]
    case.path = case.folder / case.pick("f.npy", "features.npz", "f")


def array_bytes(case, **options):
    stream, array = io.BytesIO(), case.more["array"]
    if case.path.suffix == ".npz": (np.savez_compressed if case.seed % 2 else np.savez)(stream, **{"x": array} | case.more.get("others", {}))
    else: np.save(stream, array, **options)
    return stream.getvalue()


def write_features(case): case.path.write_bytes(case.more["data"] if "data" in case.more else array_bytes(case))


def expect_features(case):
    rows, table = case.more["rows"], case.more["table"]
    lines = {token: line for line, token in enumerate(case.more["tokens"])}
    return {"table": np.stack([rows[lines[token]] if token in lines else np.zeros(rows.shape[1], np.float32) for token in table.item_tokens])}


def read_features(case):
    config = RunConfig(**{f"{case.more['name']}_features": str(case.path)})
    catalogue = run._given_features(config, case.more["table"], case.folder / "items.csv")
    if case.seed % 4 == 0: catalogue = encoders.load_catalogue(catalogue.save(case.out / "catalogue"))
    table, empty = getattr(catalogue, f"{case.more['name']}_emb").numpy(), getattr(catalogue, f"{case.more['name']}_pad_mask").numpy()
    assert np.array_equal(empty, (table == 0).all(2)), "what is missing is zero"
    return {"table": table[:, 0]}, [note for note in catalogue.report if "(i99)" not in note]


GROUPS["features"] = Group(make_features, read_features, expect_features, write_features)


@kind("features", plant="any shape")
def other_rows(case):
    rows = case.more["rows"]
    case.more["array"] = case.pick(rows[:-1], rows[:3], np.r_[rows, rows[:1]], rows[:0], rows.T, rows[:9], rows[1:])
    case.refuse()

@kind("features", plant="any shape")
def other_axes(case):
    rows = case.more["rows"]
    case.more["array"] = case.pick(rows[:, 0], rows[:, None], rows[0, 0], rows[..., None], rows.ravel(), rows[:, :0], np.float32(3))
    case.refuse()

@kind("features", plant="any numbers")
def no_finite_number(case):
    known = case.more["table"].item_tokens[1:-1]
    token = case.draw.choice(known)
    array = case.more["array"] = case.more["rows"].astype(case.pick(np.float16, np.float32, np.float64))
    array[case.more["tokens"].index(token), case.draw.randrange(5)] = case.pick(np.nan, np.inf, -np.inf)
    case.refuse(token)

@kind("features", plant="any numbers")
def numbers_too_large(case):
    token = case.draw.choice(case.more["table"].item_tokens[1:-1])
    case.more["array"] = case.more["rows"].astype(np.float64)
    case.more["array"][case.more["tokens"].index(token), case.draw.randrange(5)] = case.pick(1e39, -1e300)
    case.refuse(token)

@kind("features", plant="swapped rows")
def other_numbers(case):
    kinds = (np.float16, np.float64, ">f4", ">f8", np.int8, np.int64, np.uint8, bool, np.longdouble)
    array = case.more["array"] = np.asarray(case.more["rows"] * 9).astype(case.pick(*kinds))
    if case.draw.random() < .3: array = case.more["array"] = np.asfortranarray(array)
    case.more["rows"] = array.astype(np.float32)
    empty = [token for token in case.more["table"].item_tokens[1:] if token == "i99" or
             not case.more["rows"][case.more["tokens"].index(token)].any()]
    if len(empty) > 1: case.notes = (rf"^{len(empty)} items are without",)

@kind("features", plant="any array")
def no_numbers(case):
    rows, path = case.more["rows"], case.path
    case.more["array"] = case.pick(rows.astype(complex), rows.astype(str), rows.astype("S"), rows.astype(object), rows.astype("M8[s]"),
                                   np.array([{"a": 1}] * 12), np.array([None] * 60).reshape(12, 5), rows.view([("a", "f4")]))
    case.refuse()

@kind("features", plant="any array")
def cut_array(case):
    data = array_bytes(case)
    case.more["data"] = data[:case.draw.randrange(len(data))]
    case.refuse()

@kind("features", plant="any array")
def no_array(case):
    case.more["data"] = case.pick(b"", b"1,2\n3,4\n", b"\x93NUMPY", b"\x93NUMPY\x01\0v\0" + b"{" * 118, b"\x80\x04K\x01.", zipped_bytes(),
                                  zipped_bytes(a="x"), array_bytes(case).replace(b"(12, 5)", b"(1e9, 5)"), b"\x93NUMPY\x09\0", gzip.compress(b"x"),
                                  array_bytes(case).replace(b"'<f4'", b"'|O8'"), array_bytes(case).replace(b"(12, 5), }", b"(10**9,) "))
    if case.more["data"] == array_bytes(case): case.more["data"] = b"?"  # packed
    case.refuse()

def zipped_bytes(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in members.items(): archive.writestr(name, text)
    return stream.getvalue()

@kind("features", plant="any array")
def several_arrays(case):
    case.path = case.folder / "features.npz"
    case.more["others"] = {name: case.more["rows"] for name in case.pick("y", "yz")}
    case.refuse()

@kind("features", plant="swapped rows")
def rows_of_zeros(case):
    tokens = case.draw.sample(case.more["table"].item_tokens[1:-1], case.draw.randint(1, 4))
    for token in tokens: case.more["rows"][case.more["tokens"].index(token)] = 0
    case.notes = (rf"^{len(tokens) + 1} items are without",)

@kind("features", plant="swapped rows")
def items_moved(case):
    "The array follows the lines of the table of items."
    order = case.draw.sample(range(12), 12)
    tokens = case.more["tokens"] = [case.more["tokens"][k] for k in order]
    (case.folder / "items.csv").write_text("item_id,title\n" + "".join(f"{token},Thing\n" for token in tokens))


# ---------------------------------------------------------------- configurations

SETTINGS = {"epochs": (1, 5), "n_users": (100, 900), "lr": (.1, .01, 1), "dropout": (0, .5), "seeds": ([0], [0, 1]), "systems": (["sasrec"], None),
            "metric": ("mrr", "recall@5"), "umap": (True, False), "new_items": (.1, None), "interactions": (None, "e.csv"), "max_len": (5, 50),
            "text_columns": (["title"], None), "split": ("global-time",), "device": ("cpu",), "domain": ("toys",), "time_column": ("", "when"),
            "patience": (0, 3), "n_heads": (1, 2), "hidden_size": (32, 64), "arrivals": (0, .2), "word_drop": (0, .3)}
NUMBERS = ("epochs", "n_users", "lr", "dropout", "new_items", "max_len", "patience", "arrivals", "hidden_size", "word_drop")


def make_config(case):
    names = case.draw.sample(sorted(SETTINGS), case.draw.randint(3, 12))
    case.more["values"], case.path = {name: case.draw.choice(SETTINGS[name]) for name in names}, case.folder / case.pick("run.json", "my settings.json")
    case.more["edits"] = []


def config_bytes(case): return json.dumps(case.more["values"], indent=case.seed % 3 or None, ensure_ascii=False).encode()


def write_config(case):
    data = config_bytes(case)
    for edit in case.more["edits"]: data = edit(data)
    case.path.write_bytes(data)


def expect_config(case):
    values = dict(case.more["values"])
    for name in ("seeds", "systems", "text_columns"):
        if values.get(name) is not None: values[name] = tuple(values[name])
    if values.get("systems"): values["systems"] = tuple(dict.fromkeys(("popularity", "markov", *values["systems"])))
    if values.get("time_column") == "": values["time_column"] = None
    return RunConfig().to_dict() | values


def read_config(case):
    args = copy.copy(no_arguments())
    args.config = str(case.path)
    return cli.resolve_config(args).to_dict(), []


@functools.cache
def no_arguments(): return cli.make_parser().parse_args(["run"])


GROUPS["configurations"] = Group(make_config, read_config, expect_config, write_config)


def refuse_setting(case, name): case.refuse(name, "--" + name.replace("_", "-"))


def set_value(case, name, value):
    case.more["values"] = dict(case.draw.sample(list((case.more["values"] | {name: value}).items()), len(case.more["values"] | {name: value})))

@kind("configurations", plant="any setting")
def unknown_setting(case):
    name = case.pick("epoch", "Epochs", "n-users", "", "learning_rate", "systems ", "__class__", "é")
    set_value(case, name, case.pick(1, None, "x"))
    case.refuse(repr(name))

@kind("configurations", plant="any setting")
def wrong_type(case):
    name = case.pick(*SETTINGS)
    value = {"umap": (1, "true", None, []), "metric": (1, None, ["mrr"]), "split": (1, None), "device": (0, None, True), "domain": (3, None),
             "seeds": (1, "0", None, {"a": 1}), "systems": (1, True, {"a": 1}), "text_columns": ("title", 1, True), "interactions": (3, ["e.csv"], True),
             "time_column": (3, ["a"], True), "new_items": ("x", [.1], True)}.get(name, ("5", None, [5], True, {"a": 5}, ""))
    set_value(case, name, case.draw.choice(value))
    refuse_setting(case, name)

@kind("configurations", plant="any setting")
def wrong_element(case):
    name, values = case.pick(("seeds", (["a"], [1.5], [None], [True], [[0]], [0, float("nan")])), ("systems", ([1], [None], [["sasrec"]], ["nope"])),
                             ("text_columns", ([1], [None], [["title"]])))
    set_value(case, name, case.draw.choice(values))
    case.refuse(name, "--text-columns", "system '1'", "system 'nope'", "system 'None'", "unknown system")

@kind("configurations", plant="any setting")
def no_finite_setting(case):
    name = case.pick(*NUMBERS)
    set_value(case, name, case.pick(float("nan"), float("inf"), -float("inf")))
    if case.draw.random() < .5: case.more["edits"].append(lambda data: data.replace(b"Infinity", b"1e999"))
    refuse_setting(case, name)

@kind("configurations", plant="any setting")
def negative_setting(case):
    name = case.pick(*NUMBERS)
    set_value(case, name, case.pick(-1, -10**30, -5) if name not in ("lr", "dropout", "new_items", "arrivals", "word_drop") else case.pick(-1, -.5, -1e-9))
    if name in ("n_users", "max_len", "hidden_size") and case.draw.random() < .5: set_value(case, name, 0)
    refuse_setting(case, name)

@kind("configurations", plant="other settings")
def other_setting(case):
    for _ in range(case.draw.randint(1, 4)):
        name = case.pick(*SETTINGS)
        set_value(case, name, case.draw.choice(SETTINGS[name]))

@kind("configurations", plant="raw json")
def cut_settings(case):
    data = config_bytes(case)
    case.more["edits"].append(lambda _: data[:case.draw.randrange(len(data))])
    case.refuse()

@kind("configurations", plant="raw json")
def damaged_settings(case):
    edit = case.pick(lambda data: data[:-1] + b",}", lambda data: data.replace(b'"', b"'"), lambda data: b"// settings\n" + data,
                     lambda data: data + data, lambda data: b"[" + data + b"]", lambda data: b"", lambda data: b"7", lambda data: b"null",
                     lambda data: b"[" * 10**5, lambda data: data.replace(b":", b"="), lambda data: data + b"\0", lambda data: b"\xff" + data,
                     lambda data: data.decode().encode("utf-16"), lambda data: b'{"a": ' * 10**5, lambda data: b"{'epochs': 3}", lambda data: b'"x"')
    case.more["edits"].append(edit)
    case.refuse()

@kind("configurations", plant="raw json")
def other_text_of_settings(case):
    case.more["edits"].append(case.pick(lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n"), lambda data: data + b"\n\n",
                                        lambda data: b"\n \t" + data, lambda data: data.decode().encode("ascii", "backslashreplace")))

@kind("configurations", plant="raw json")
def setting_twice(case):
    name = case.draw.choice([name for name in case.more["values"]])
    case.more["edits"].append(lambda data: data[:1] + json.dumps({name: None}).encode()[1:-1] + b", " + data[1:])
    refuse_setting(case, name)


# ---------------------------------------------------------------- saved models

HISTORIES = [["item-1", "item-2"], ["item-7", "item-3", "item-9"]]


@functools.cache
def saved_models():
    "Some small recommenders, saved once; name -> folder."
    from small_world import build
    root = Path(tempfile.mkdtemp(prefix="mutations-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for name in ("sasrec", "content_both", "missrec", "gru4rec", "markov"): build(name).save_pretrained(root / name)
    return root


@functools.cache
def whole_model(name): return described(cli.load_recommender(saved_models() / name, "cpu"))


def described(model):
    weights = {name: x.numpy() for name, x in model.state_dict().items()}
    answers = [(answer.items, answer.scores, answer.unknown) for answer in model.recommend(HISTORIES, 5)]
    return {"kind": type(model).__name__, "weights": weights, "answers": answers, "tokens": list(model.catalogue.item_tokens)}


def make_model(case):
    case.more["model"] = case.pick("sasrec", "content_both", "missrec", "gru4rec", "markov")
    case.path = case.folder / "model"
    shutil.copytree(saved_models() / case.more["model"], case.path)
    case.named = tuple(path.name for path in listing(case.path))


def expect_model(case): return whole_model(case.more["model"])


def read_model(case):
    model = cli.load_recommender(case.path, "cpu")
    return described(model), []


GROUPS["models"] = Group(make_model, read_model, expect_model)


def a_file(case, *ends):
    path = case.draw.choice([path for path in sorted(listing(case.path)) if path.name.endswith(ends or ("",))])
    case.named = (path.name, *["catalogue"] * (path.parent.name == "catalogue"))
    return path

def edit_json(case, path, change):
    values = json.loads(path.read_text())
    changed = change(values)
    path.write_text(json.dumps(values if changed is None else changed))

def edit_tensors(path, change):
    with safe_open(path, "np") as file: about = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, about)

@kind("models", plant="raw models")
def cut_model_file(case):
    path = a_file(case)
    data = path.read_bytes()
    path.write_bytes(data[:case.draw.randrange(len(data.rstrip()))])
    case.refuse()

@kind("models", plant="swallowed")
def model_file_missing(case):
    a_file(case).unlink()
    case.refuse()

@kind("models", plant="raw models")
def model_file_replaced(case):
    path = a_file(case)
    stream = io.BytesIO()
    torch.save({"weights": torch.ones(3)}, stream)
    evil = f"cos\nmkdir\n(S'{case.out / 'evil'}'\ntR.".encode()  # a pickle that makes a folder when it is loaded
    path.write_bytes(case.pick(stream.getvalue(), evil, b"", b"text", b"[]", b"null", b"<html>", b'{"a": 1}', bytes(200), b"\xff" * 50, b"[" * 10**5,
                               (10**15).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}"))
    case.refuse()

@kind("models", plant="any weights")
def weight_removed(case):
    path = a_file(case, "model.safetensors")
    edit_tensors(path, lambda x: x.pop(case.draw.choice(sorted(x))))
    case.refuse()

@kind("models", plant="any weights")
def weight_renamed(case):
    path = a_file(case, "model.safetensors")
    def rename(x):
        name = case.draw.choice(sorted(x))
        x[case.pick(name + "_", name.upper(), "module." + name, "x")] = x.pop(name)
    edit_tensors(path, rename)
    case.refuse()

@kind("models", plant="any weights")
def weight_added(case):
    edit_tensors(a_file(case, "model.safetensors"), lambda x: x.update({case.pick("x", "layers.9.weight"): np.ones(3, np.float32)}))
    case.refuse()

@kind("models", plant="any weights")
def weight_of_another_shape(case):
    path = a_file(case, "model.safetensors")
    def reshape(x):
        name = case.draw.choice([name for name in sorted(x) if x[name].size > 1])
        w = x[name]
        x[name] = case.pick(w[:-1], w[None], np.concatenate([w, w]), w.ravel()[:1], w[..., :-1])
    edit_tensors(path, reshape)
    case.refuse()

@kind("models", plant="any weights")
def weight_that_is_no_number(case):
    path = a_file(case, "model.safetensors")
    def damage(x):
        name = case.draw.choice([name for name in sorted(x) if x[name].dtype == np.float32 and x[name].size])
        x[name] = x[name].copy()
        x[name].flat[case.draw.randrange(x[name].size)] = case.pick(np.nan, np.inf, -np.inf)
    if any(x.dtype == np.float32 for x in load_file(path).values()):
        edit_tensors(path, damage)
        case.refuse()

@kind("models", plant="any weights")
def weights_of_another_format(case):
    path = a_file(case, "model.safetensors")
    def convert(x):
        for name in x:
            if x[name].dtype == np.float32: x[name] = x[name].astype(case.pick(np.float16, np.float64, np.int64))
    edit_tensors(path, convert)
    model = cli.load_recommender(saved_models() / case.more["model"], "cpu")
    model.load_state_dict({name: torch.from_numpy(x) for name, x in load_file(path).items()})
    case.expected = [described(model), Refusal()]

@kind("models", plant="any model")
def weights_of_another_model(case):
    other = case.pick(*{"sasrec", "content_both", "missrec", "gru4rec", "markov"} - {case.more["model"]})
    shutil.copy(saved_models() / other / "model.safetensors", case.path)
    case.named = ("model.safetensors",)
    case.refuse()

@kind("models", plant="any config")
def argument_removed(case):
    path = a_file(case, "config.json")
    edit_json(case, path, lambda values: values.pop(case.draw.choice(sorted(values))) and None)
    case.may_refuse()

@kind("models", plant="any config")
def argument_renamed(case):
    path = a_file(case, "config.json")
    def rename(values):
        name = case.draw.choice(sorted(values))
        values[case.pick(name + "_", name.upper(), "", "x")] = values.pop(name)
    edit_json(case, path, rename)
    case.may_refuse()

@kind("models", plant="any config")
def argument_changed(case):
    path = a_file(case, "config.json")
    def change(values):
        name = case.draw.choice(sorted(values))
        old = values[name]
        values[name] = case.pick(None, "x", [], {}, -1, 0, 1, 3, 10**6, 1.5, True, *([old + 1, 2 * old, old / 2] if isinstance(old, int) else []))
        if type(values[name]) is type(old) and values[name] == old: values[name] = "another"
    edit_json(case, path, change)
    case.may_refuse()

@kind("models", plant="any config")
def another_recommender(case):
    path = a_file(case, "config.json")
    def change(values): values["recommender"] = case.pick("Recommender", "Popularity", "nn.Module", "os", "", None, 3, ["SASRec"], "Catalogue", "fit", "__doc__")
    edit_json(case, path, change)
    case.refuse()

@kind("models", plant="any catalogue")
def items_renamed(case):
    "The list of items has other items than the features have rows."
    path = a_file(case, "catalogue.json")
    case.named = ("catalogue", "catalogue.json", "catalogue.safetensors")
    def change(values):
        tokens = values["item_tokens"]
        at = case.draw.randrange(1, len(tokens))
        values["item_tokens"] = case.pick(tokens[:-1], [*tokens, "new"], tokens[1:], [], None, "abc", 7, {}, [*tokens[:at], tokens[at - 1], *tokens[at + 1:]],
                                          [*tokens[:at], 7, *tokens[at + 1:]], [*tokens[:at], None, *tokens[at + 1:]])
    edit_json(case, path, change)
    case.refuse()

@kind("models", plant="any catalogue")
def catalogue_key_changed(case):
    path = a_file(case, "catalogue.json")
    case.named = ("catalogue", "catalogue.json", "catalogue.safetensors")
    def change(values):
        name = case.draw.choice(sorted(values))
        value = values.pop(name)
        if case.draw.random() < .6: values[name if case.draw.random() < .5 else name + "_"] = case.pick(None, 1, "x", {}, {"a": value})
    edit_json(case, path, change)
    case.may_refuse()

@kind("models", plant="any catalogue")
def features_changed(case):
    path = a_file(case, "catalogue.safetensors")
    case.named = ("catalogue", "catalogue.json", "catalogue.safetensors")
    def change(x):
        name = case.draw.choice(sorted(x))
        w = x.pop(name)
        if (way := case.draw.randrange(5)) == 0: return
        if way == 1: x[name + "_"] = w
        elif way == 2: x[name] = w[:-1]
        elif way == 3: x[name] = case.pick(w[..., None], w.ravel(), np.concatenate([w, w], -1))
        elif w.dtype == bool: x[name] = w.astype(np.int64)
        else:
            x[name] = np.where(w == w.max(), np.float32(np.nan), w)
            case.may_refuse()  # a model that reads no features does not meet it
    case.refuse()
    edit_tensors(path, change)

@kind("models", plant="swallowed")
def catalogue_of_another_model(case):
    from small_world import make_catalogue
    name = case.pick("catalogue.json", "catalogue.safetensors")
    make_catalogue(seed=case.seed % 1000 + 1, n_items=case.pick(12, 9)).save(case.folder / "other")
    shutil.move(case.folder / "other" / name, case.path / "catalogue" / name)
    shutil.rmtree(case.folder / "other")
    case.named = ("catalogue",)
    case.refuse()


# ---------------------------------------------------------------- through the command line

def pristine_events(case):
    path = case.out / "pristine.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u{u},i{k},{k}\n" for u in range(5) for k in range(12)))
    return path

RUN = ("run", "--systems", "popularity", "--quiet", "--min-item", 1, "--min-user", 1)
COMMANDS = {
    "interactions": lambda case: (*RUN, "--interactions", case.path, "--items", case.path, "--out", case.out),
    "items": lambda case: (*RUN, "--interactions", pristine_events(case), "--items", case.path, "--out", case.out),
    "features": lambda case: (*RUN, "--interactions", pristine_events(case), "--items", case.folder / "items.csv",
                              f"--{case.more['name']}-features", case.path, "--out", case.out),
    "configurations": lambda case: ("run", "--config", case.path, "--out", case.out),
    "models": lambda case: ("recommend", case.path, "--history", "item-1", "item-2", "--json", case.out / "answer.json"),
}


# ---------------------------------------------------------------- totals

def totals_table(totals):
    words = [*GOOD, *BAD]
    rows = [["group", "cases", *words]]
    for group in (*(group for group in GROUPS if group in totals), "all"):
        counts = sum((totals[one] for one in totals if group in ("all", one)), Counter())
        rows.append([group, counts.total(), *(counts[word] for word in words)])
    widths = [max(len(str(row[k])) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join([str(row[0]).ljust(widths[0]), *(str(cell).rjust(width) for cell, width in zip(row[1:], widths[1:]))])
                     for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", type=int, help="how many (default: 1000, or 1 with --only)")
    parser.add_argument("--only", metavar="KIND", help="one kind, such as models-cut_model_file, or the kinds of a group")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    parser.add_argument("--show", action="store_true", help="print every outcome")
    args = parser.parse_args()
    names = [name for name in KINDS if args.only in (None, name, KINDS[name].group)]
    if not names: parser.error(f"no kind {args.only!r}; there are {', '.join(KINDS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # with the totals until now
    totals, bad = {}, []
    try:
        for number in range(args.cases or (1000 if args.only is None else len(names))):
            found = outcome(names[number % len(names)], args.seed + number // len(names))
            totals.setdefault(found.case.kind.group, Counter())[found.word] += 1
            if found.word in BAD: bad.append(found)
            if args.show: print(f"{found.case.kind.name} {found.case.seed}: {found.word}: {found.text}")
    finally:
        for kind, n in Counter(each.case.kind.name for each in bad).items():
            print(f"{kind}: {n} bad, such as\n  {next(each for each in bad if each.case.kind.name == kind)}")
        print(totals_table(totals), flush=True)
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main())
