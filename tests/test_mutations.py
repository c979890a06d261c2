"Damaged inputs of every kind end in one sentence, one counted warning, or the numbers they hold; every kind finds a fault."
import contextlib
import functools
import gzip
import json
import re
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from safetensors.torch import load_file

import mutations
from mmseqrec import artifacts, config, figures, recommender
from mmseqrec.app import cli
from mmseqrec.data import interactions, items, sources
from mmseqrec.experiments import run
from mmseqrec.features import encoders
from mutations import BAD, GOOD, GROUPS, KINDS, Refusal, a_case, outcome, saved_models, through_shell, totals_table
from small_shop import shell

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # NumPy leaves damaged .npz files open
EACH = settings(max_examples=4, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("group", GROUPS)
def test_every_mutation_ends_well(group):
    totals = Counter()
    for name in (name for name in KINDS if KINDS[name].group == group):
        @EACH
        @given(st.integers(0, 10**6))
        def each(seed):
            found = outcome(name, seed)
            totals[found.word] += 1
            assert found.word in GOOD, str(found)
        each()
    print(totals_table({group: totals}))
    assert totals.total() >= 40 and totals["same"] and totals["error" if group != "images" else "warning"]
    assert not any(totals[word] for word in BAD)


def test_there_are_several_hundred_cases(): assert 4 * len(KINDS) > 400


# ---------------------------------------------------------------- a fault for every kind

def wrapped(patch, module, name, change):
    "Let `change(result, *arguments)` have the last word on what a function returns."
    real = getattr(module, name)
    patch.setattr(module, name, lambda *words, **options: change(real(*words, **options), *words))


def each_table(patch, change):
    for module in (interactions, items):
        wrapped(patch, module, "read_table", lambda table, *_: replace(table, frame=change(table.frame)))


def each_id(patch, clean):
    for module in (interactions, items): patch.setattr(module, "_clean_ids", clean)


def lost_rows(patch): each_table(patch, lambda frame: frame.head(max(1, frame.height - 1)))

def one_of_each(patch): each_table(patch, lambda frame: frame.unique(maintain_order=True))

def as_they_come(patch):
    each_table(patch, lambda frame: frame.sort(frame.columns))
    real = interactions.make_interactions
    patch.setattr(interactions, "make_interactions", lambda users, tokens, times, *source: real(users, tokens, range(len(users)), *source))

def other_times(patch):
    real = interactions.make_interactions
    patch.setattr(interactions, "make_interactions", lambda users, tokens, times, *source: real(users, tokens, times + 1, *source))

def raw_errors(patch):
    def explain(content, separator, name, error): raise error
    def rows(content, name):
        for number, line in enumerate(interactions._binary(content), 1): yield number, json.loads(line)
    def parquet(content, wanted, name):
        frame = pl.read_parquet(content)
        return interactions._make_table({column.name: column for column in frame}, name, str)
    for name, fault in (("_explain_bad_text", explain), ("_json_rows", rows), ("_read_parquet", parquet)):
        patch.setattr(interactions, name, fault)

def strict_marks(patch):
    plain = lambda content, **_: open(content, encoding="utf-8", newline="") if isinstance(content, Path) else iter(content.decode().splitlines(True))
    patch.setattr(interactions, "_text_lines", lambda content, **words: contextlib.nullcontext(plain(content)))

def any_encoding(patch):
    def opened(source):
        data = Path(source).read_bytes()
        data = gzip.decompress(data) if source.name.endswith(".gz") else data
        suffix = Path(source.name.removesuffix(".gz")).suffix
        return source.name, suffix, data if suffix == ".parquet" else data.decode("utf-8", "replace").encode()
    patch.setattr(interactions, "_open_source", opened)

def any_columns(patch):
    for module in (interactions, items): patch.setattr(module, "_check_columns", lambda *_: None)

def guessed_columns(patch):
    def read(content, separator, wanted, name):
        with interactions._binary(content) as file: data = file.read().removeprefix(b"\xef\xbb\xbf")
        head = data.partition(b"\n")[0].decode()
        frame = pl.read_csv(data, separator=max(";|,\t:", key=head.count), has_header="item_id" in head, infer_schema=False, truncate_ragged_lines=True)
        if "item_id" not in frame.columns: frame.columns = [*(wanted or {}).values(), "item_id", "title", "note", "more"][:frame.width]
        return interactions.Table(frame.select(list((wanted or {}).values()) or pl.all()), name, str)
    patch.setattr(interactions, "_read_delimited", read)

def guessed_kind(patch):
    def opened(source):
        data = Path(source).read_bytes()
        if data[:2] == b"\x1f\x8b": data = gzip.decompress(data)
        start = next((kind for mark, kind in ((b"PAR1", ".parquet"), (b"{", ".jsonl")) if data.startswith(mark)), "")
        return source.name, start or (".tsv" if b"\t" in data.partition(b"\n")[0] else ".csv"), data
    patch.setattr(interactions, "_open_source", opened)

def any_times(patch): wrapped(patch, interactions, "parse_times", lambda times, *_: times.fill_null(0))

def any_model(patch):
    any_config(patch)
    any_weights(patch)

def any_content(patch): patch.setattr(interactions, "_check_content", lambda *_: None)

def half_archives(patch):
    patch.setattr(interactions, "_unpack", lambda path: zlib.decompressobj(31).decompress(path.read_bytes()))

def any_rows(patch): patch.setattr(interactions, "_refuse_rows", lambda *_, **__: None)

def any_units(patch): patch.setattr(interactions, "_refuse_mixed_times", lambda *_: None)

def bare_ids(patch):
    real = interactions._clean_ids
    bare = lambda token: unicodedata.normalize("NFKC", token).lstrip("0+").removesuffix(".0").strip("\u200b\u202e😀") or "0"
    each_id(patch, lambda table, column: real(table, column).cast(pl.String).map_elements(bare, pl.String))

def any_ids(patch): each_id(patch, lambda table, column: table.frame[column].cast(pl.String))

def any_path(patch): patch.setattr(items, "safe_image_path", lambda folder, name, *_: folder / name)

def raw_archives(patch):
    def member(path, names):
        with zipfile.ZipFile(path) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith(names))
            return next(name for name in names if info.filename.endswith(name)), archive.read(info)
    def lines(path):
        with gzip.open(path) as file: yield from enumerate(file, 1)
    patch.setattr(sources, "_find_member", member)
    patch.setattr(sources, "_numbered_lines", lines)
    patch.setattr(interactions, "_unpack", lambda path: gzip.decompress(path.read_bytes()))

def unpacked(patch):
    def member(path, names):
        with zipfile.ZipFile(path) as archive: archive.extractall(path.parent)
        return sources._find_in_folder(path.parent, names) or (names[0], b"")
    patch.setattr(sources, "_find_member", member)

def any_size(patch): patch.setattr(sources, "_MAX_MEMBER", 10**12)

def any_cells(patch):
    patch.setattr(sources, "_refuse", lambda *_: None)
    patch.setattr(sources, "_check_described", lambda *_: [])
    patch.setattr(sources, "_drop_repeated", lambda frame: (frame, 0))
    wrapped(patch, sources, "_event_table", lambda found, *_: (found[0].filter(pl.int_range(pl.len()) > 0), []))

def half_images(patch):
    patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    patch.setattr(items, "image_problem", lambda *_: None)

def raw_images(patch):
    def opened(source, max_pixels=0): return Image.open(source)
    for module in (items, figures): patch.setattr(module, "_image_file", opened)

def lost_images(patch):
    wrapped(patch, items, "check_images", lambda report, *_: replace(report, table=replace(report.table, images=report.table.images[:-1] + [[]])))

def any_image(patch):
    patch.setattr(items, "image_problem", lambda *_: None)
    patch.setattr(items, "open_image", lambda path: Image.new("RGB", (1, 1)))

def black_background(patch): patch.setattr(figures, "_to_rgb", lambda image: image.convert("RGB"))

def as_stored(patch): patch.setattr(figures.ImageOps, "exif_transpose", lambda image: image)

def any_array(patch): patch.setattr(run, "_load_array", lambda path: np.load(path, allow_pickle=False))

def any_shape(patch): wrapped(patch, run, "_load_array", lambda rows, *_: np.resize(rows, (12, 5)) if rows.size else np.ones((12, 5)))

def any_numbers(patch): wrapped(patch, run, "_load_array", lambda rows, *_: np.clip(np.nan_to_num(rows), -1e3, 1e3))

def swapped_rows(patch): wrapped(patch, run, "_load_array", lambda rows, *_: rows[::-1])

def any_setting(patch):
    patch.setattr(config, "_checked", lambda setting, value: value)
    known = {setting.name for setting in config.fields(config.RunConfig)}
    patch.setattr(config.RunConfig, "from_dict", classmethod(lambda cls, values: cls(**{name: values[name] for name in values if name in known})))

def other_settings(patch):
    real = config.RunConfig.from_dict
    patch.setattr(config.RunConfig, "from_dict", lambda values: real({name: values[name] for name in sorted(values) if name != min(values)}))

def raw_json(patch):
    for module in (artifacts, recommender, encoders): patch.setattr(module, "read_json", lambda path: json.loads(Path(path).read_text()))

def raw_models(patch):
    raw_json(patch)
    patch.setattr(recommender, "_read_weights", lambda folder, *_: load_file(folder / "model.safetensors"))
    patch.setattr(encoders, "SafetensorError", ZeroDivisionError)

def swallowed(patch):
    real = cli.load_recommender
    def load(folder, device):
        try: return real(folder, device)
        except (ValueError, OSError): return real(saved_models() / "sasrec", device)
    patch.setattr(cli, "load_recommender", load)

def any_weights(patch):
    def take(model, weights, folder):
        own = model.state_dict()
        model.load_state_dict({name: x for name, x in weights.items() if name in own and x.shape == own[name].shape and name != min(own)}, strict=False)
    patch.setattr(recommender, "_take_weights", take)

def any_config(patch): patch.setattr(recommender, "_read_weights", lambda folder, *_: load_file(folder / "model.safetensors"))

def any_catalogue(patch): patch.setattr(encoders, "_check_saved", lambda about, *_: about.pop("shapes", None))


PLANTS = {name.replace("_", " "): plant for name, plant in list(globals().items())
          if callable(plant) and getattr(plant, "__code__", None) and plant.__code__.co_varnames[:1] == ("patch",)}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_finds_a_fault(name, monkeypatch):
    "With the fault that is planted for it, one of thirty cases is bad; without it, the same case is not."
    for seed in range(30):
        with monkeypatch.context() as patch:
            PLANTS[KINDS[name].plant](patch)
            found = outcome(name, seed)
        if found.word in BAD: break
    assert found.word in BAD, f"{KINDS[name].plant!r} is not found by {name}"
    assert outcome(name, seed).word in GOOD


def test_every_fault_is_planted(): assert {kind.plant for kind in KINDS.values()} <= set(PLANTS)


# What a reader may do wrong, whatever it reads

def crashes(case): raise KeyError("user_id")

def leaves_a_file(case):
    (case.out / ".split.77.tmp").mkdir()
    (case.out / ".split.77.tmp" / "events").write_bytes(b"half")
    raise ValueError(f"{case.named[0]}, line 3: damaged; fetch it again")

def says_nothing(case): raise ValueError("line 1: wrong")

def says_too_much(case): raise ValueError(f"{case.named[0]}: polars.ComputeError")

def swallows(case): return {}, []

def warns_of_nothing(case): return GROUPS[case.kind.group].expect(case), ["something: 1"]


@pytest.mark.parametrize("reader, word", [(crashes, "traceback"), (leaves_a_file, "partial"), (says_nothing, "unclear"),
                                          (says_too_much, "unclear"), (swallows, "changed"), (warns_of_nothing, "changed")])
@pytest.mark.parametrize("name", ["interactions-columns_moved", "items-blank_rows", "archives-no_archive", "images-turned_image",
                                  "features-items_moved", "configurations-other_setting", "models-weight_added"])
def test_bad_readers_are_called_what_they_are(name, reader, word): assert outcome(name, 1, reader).word == word


def test_an_error_without_need_and_a_wrong_row_are_bad():
    named = lambda case: ValueError(f"{case.named[0]}, line 999: no; correct the row")
    def refuses(case): raise named(case)
    assert outcome("interactions-columns_moved", 1, refuses).word == "refused"
    assert outcome("interactions-row_long", 1, refuses).word == "unclear"


def test_a_case_is_the_same_again():
    for name in KINDS:
        texts = []
        for _ in range(2):
            with a_case(name, 5) as case:
                texts.append({str(path.relative_to(case.folder)): path.read_bytes() for path in case.folder.rglob("*") if path.is_file()})
        if KINDS[name].group not in ("features", "models") and "parquet" not in str(texts): assert texts[0] == texts[1], name
        assert texts[0].keys() == texts[1].keys()


# Through the command line

@pytest.mark.parametrize("name", ["interactions-cut_gzip", "interactions-column_renamed", "interactions-time_in_another_unit", "interactions-row_long",
                                  "items-id_of_padding", "items-bad_json", "features-no_finite_number", "features-cut_array",
                                  "configurations-wrong_type", "models-cut_model_file", "models-weight_of_another_shape"])
def test_the_command_line_says_the_same(name, capsys):
    for seed in range(99):
        with a_case(name, seed) as case:
            if not all(isinstance(each, Refusal) for each in case.expected): continue
            assert not through_shell(case, functools.partial(shell, capsys))
            return


@pytest.mark.parametrize("is_faulty", [False, True])
def test_the_program_counts_and_tells_how_to_repeat(is_faulty, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "mutations.py --only features-items_moved --cases 6 --seed 3".split())
    monkeypatch.setattr(mutations.signal, "signal", lambda *_: None)
    if is_faulty: swapped_rows(monkeypatch)
    assert mutations.main() == is_faulty
    found = re.findall(r"^(?:features|all) +(\d+)  +(\d+) .* (\d+)$", (out := capsys.readouterr().out), re.M)
    assert found == 2 * [("6", "0", "6") if is_faulty else ("6", "6", "0")], out
    assert ("again: python tests/mutations.py --only features-items_moved --seed 3\n" in out) == is_faulty
