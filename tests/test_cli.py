"The command line: answers at once, one sentence for a mistake, runs that continue, commands that agree with the library."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

from mmseqrec.app import cli
from mmseqrec.artifacts import read_json
from mmseqrec.app.cli import (default_folder, error_sentence, load_recommender, main, make_parser, read_histories,
                          resolve_config, run_of, text_table)
from mmseqrec.config import ALL, STANDARD, RunConfig
from mmseqrec.experiments.run import SYSTEMS
from mmseqrec.features.clip import IMAGE_SETTINGS, quiet_transformers
from small_shop import shell

ROOT = Path(__file__).parent.parent
QUICK = "--epochs 2 --device cpu --quiet --systems sasrec content_sasrec".split()


def process(*words, **options):
    "Start `python -m mmseqrec` in a process of its own."
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "mmseqrec", *map(str, words)], env=env, capture_output=True, text=True,
                          **options)

def is_one_sentence(text): return len(text.strip().splitlines()) == 1 and "Traceback" not in text


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    "A tiny BERT and a tiny ViT with random weights."
    text, image = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("vit")
    words = "a red blue green pan mug box big small".split()
    (text / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    with quiet_transformers():
        BertTokenizerFast.from_pretrained(text, model_max_length=16).save_pretrained(text)
        BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                             max_position_embeddings=16)).save_pretrained(text)
        ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=64,
                           patch_size=32)).save_pretrained(image)
    (image / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS))
    return ["--text-encoder", str(text), "--image-encoder", str(image)]

@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    "Somebody's two tables with column names of their own, and a folder of pictures."
    folder, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    items, events = [], []
    for n in range(20):
        name = f"{('red', 'blue')[n % 2]} {('pan', 'mug', 'box')[n % 3]}"
        items.append({"what": f"it{n}", "title": f"A {name}", "size": "big" if n % 5 else None})
        if n % 4: Image.new("RGB", (32, 32), name.split()[0]).save(folder / "pictures" / f"it{n}.png")
    for user in range(50):
        start = rng.integers(20)
        events += [f"u{user},it{(start + step) % 20},{100 * user + step}" for step in range(8)]
    (folder / "visits.csv").write_text("who,what,when\n" + "\n".join(events) + "\n")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    return ["--interactions", str(folder / "visits.csv"), "--items", str(folder / "items.jsonl"),
            "--images", str(folder / "pictures"), "--user-column", "who", "--item-column", "what", "--time-column", "when",
            "--text-columns", "title", "size"]

@pytest.fixture(scope="module")
def done(tmp_path_factory, encoders, tables):
    "The folder of a finished run, and what the command printed."
    folder = tmp_path_factory.mktemp("runs") / "shop"
    ran = process("run", *tables, *encoders, *QUICK, "--out", folder)
    assert ran.returncode == 0, ran.stderr
    return folder, ran


# Fast, and one sentence

def test_help_imports_nothing_slow():
    code = ("import sys; from mmseqrec.app.cli import make_parser; make_parser().format_help()\n"
            "print(sorted({'torch', 'transformers', 'polars', 'matplotlib', 'numpy', 'tqdm'} & set(sys.modules)))")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == "[]"

def test_help_is_fast():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert process("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import argparse, json, pathlib, pkgutil"])
    assert min(seconds) < max(.3, 3 * (time.perf_counter() - bare))

def test_every_command_explains_itself(capsys):
    assert shell(capsys)[0] == 0
    for command in ("run", "evaluate", "recommend", "embed"):
        code, out, err = shell(capsys, command, "--help")
        assert code == 0 and "--device" in out and err == ""
    import mmseqrec
    assert shell(capsys, "--version")[1].strip() == mmseqrec.__version__

def test_defaults_in_the_help_are_those_of_the_configuration():
    "Each `(default: X)` of `run` agrees with the field of the same name; what `systems=None` means is a list in words."
    run = make_parser()._subparsers._group_actions[0].choices["run"]
    config, checked = RunConfig().to_dict() | {"systems": f"{' '.join(STANDARD)}, as far as the data permit"}, set()
    assert RunConfig().systems is None
    for action in run._actions:
        stated = (action.help or "").partition("(default: ")[2].rstrip(")")
        value = config.get(action.dest)
        if not stated or value is None: continue
        expected = str(len(value)) if action.dest == "seeds" else str(value)
        assert stated == expected, action.dest
        checked.add(action.dest)
    assert len(checked) >= 24 and {"systems", "pretrain_epochs", "pretrain_batch_size", "n_keywords"} <= checked

def test_the_help_names_systems_and_ablations(capsys):
    text = " ".join(shell(capsys, "run", "--help")[1].split())
    for name in ALL: assert name in text
    assert "mp4sr_no_mixup" in text and SYSTEMS["mp4sr_no_mixup"].variant_of == "mp4sr"

def test_every_setting_has_an_option_and_the_other_way_round():
    options = {a.dest for a in make_parser()._subparsers._group_actions[0].choices["run"]._actions}
    assert options - {"help", "config", "out", "quiet", "debug"} == set(RunConfig().to_dict())

@pytest.mark.parametrize("line, says", [
    ("run --epochs -1", "at least 0"), ("run --hidden-size 0", "at least 1"), ("run --pretrain-epochs 0", "at least 1"), ("run --n-keywords 0", "at least 1"),
    ("run --pretrain-batch-size x", "whole number"), ("run --systems mp4sr_no_sense", "mp4sr_no_mixup"), ("run --epochs many", "whole number"), ("run --lr nan", "number"),
    ("run --systems oracle", "oracle"), ("run --device toaster", "toaster"), ("run --domain garden", "garden"),
    ("run --config nowhere.json", "nowhere.json"), ("run --metric fun", "fun"), ("run --unknown 3", "unknown"),
    ("run --interactions nowhere.csv --items nowhere.csv", "nowhere.csv"), ("run --interactions nowhere.csv", "--items"),
    ("walk", "walk"), ("evaluate", "MODEL"), ("evaluate nowhere", "nowhere"), ("recommend nowhere --history a", "nowhere"),
    ("recommend nowhere", "--history"), ("embed nowhere --histories nothing.txt", "nothing.txt"),
    ("recommend nowhere --history a --histories b", "not allowed"), ("recommend nowhere -k 0 --history a", "at least 1"),
])
def test_bad_input_is_one_sentence(line, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = shell(capsys, *line.split())
    assert code == 2 and is_one_sentence(err) and says in err, err
    assert err.startswith("mmseqrec")

def test_bad_configuration_files(capsys, tmp_path):
    for text, says in (("{", "line 1"), ("[1]", "object"), ('{"epoch": 3}', "epoch"), ('{"systems": ["x"]}', "x")):
        (tmp_path / "c.json").write_text(text)
        code, out, err = shell(capsys, "run", "--config", tmp_path / "c.json", "--out", tmp_path / "r")
        assert code == 2 and is_one_sentence(err) and says in err
    (tmp_path / "file").write_text("")
    assert "is a file" in shell(capsys, "run", "--out", tmp_path / "file")[2]

def test_debug_shows_where(capsys):
    with pytest.raises(FileNotFoundError): main(["evaluate", "nowhere", "--debug"])

def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "run", lambda *a: [][1])
    with pytest.raises(IndexError): main(["run"])
    monkeypatch.setitem(cli.COMMANDS, "run", lambda *a: {}["key"])
    with pytest.raises(KeyError): main(["run"])

def test_an_interrupt_says_how_to_continue(monkeypatch, capsys):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "run", stop)
    code, out, err = shell(capsys, "run")
    assert code == 130 and "same command continues" in err and "Traceback" not in err

def test_sentences_of_errors():
    assert error_sentence(KeyError("no such thing")) == "no such thing"
    assert error_sentence(PermissionError(13, "Permission denied", "a.csv")) == "a.csv: Permission denied"
    assert error_sentence(ValueError("two\nlines")) == "two lines" and error_sentence(ValueError()) == "ValueError"


# Configuration

def resolve(*words): return resolve_config(make_parser().parse_args(["run", *map(str, words)]))

def test_without_options_the_defaults_hold(): assert resolve() == RunConfig()

def test_options_of_pretraining_and_keywords():
    config = resolve("--pretrain-epochs", 3, "--pretrain-batch-size", 7, "--n-keywords", 5)
    assert config == RunConfig(pretrain_epochs=3, pretrain_batch_size=7, n_keywords=5)

def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RunConfig(epochs=7, lr=.5, seeds=(3, 4), systems=("markov", "sasrec")).to_dict()))
    config = resolve("--config", path, "--epochs", 2)
    assert (config.epochs, config.lr, config.seeds) == (2, .5, (3, 4))
    assert config.systems == ("popularity", "markov", "sasrec")
    assert resolve("--config", path, "--seeds", 2).seeds == (0, 1)
    path.write_text(json.dumps(RunConfig().to_dict()))
    assert resolve("--config", path) == RunConfig(), "standard systems stay standard on the way through a file"

def test_systems_may_be_named_in_several_ways():
    assert resolve("--systems", "all").systems == ALL and set(ALL) < set(SYSTEMS)
    assert resolve("--systems", "mp4sr_no_mixup").systems == ("popularity", "markov", "mp4sr_no_mixup")
    assert resolve("--systems", "sasrec,content_sasrec") == resolve("--systems", "sasrec", "content_sasrec")
    assert resolve("--systems", "sasrec", "markov").systems == ("popularity", "markov", "sasrec")

def test_a_run_is_named_after_its_data(tmp_path):
    assert default_folder(RunConfig()) == Path("runs/marketplace")
    assert default_folder(RunConfig(domain="toys")) == Path("runs/toys")
    assert default_folder(RunConfig(interactions="x/visits.csv.gz", items="i")) == Path("runs/visits")
    assert default_folder(RunConfig(interactions="data/ml1m/interactions.csv", items="i")) == Path("runs/ml1m")


# A run

def test_a_run_prints_table_report_and_time(done):
    folder, ran = done
    assert ran.stderr == ""
    for text in ("Popularity", "First-order Markov", "SASRec over content", "NDCG@10", str(folder / "report.html"),
                 "Everything took", "One seed: not a ranking"): assert text in ran.stdout
    assert {"run.json", "report.html", "titles.json", "table.json", "models"} <= {p.name for p in folder.iterdir()}
    table = {row["system"]: row for row in read_json(folder / "table.json")}
    assert set(table) == {"popularity", "markov", "sasrec", "content_sasrec"} and "difference" in table["sasrec"]
    for name, row in table.items():
        ranks = load_file(folder / f"models/{name}-seed0/ranks.safetensors")["ranks"]
        assert row["recall@50"]["value"] == pytest.approx((ranks <= 50).double().mean().item()) and "ndcg@50" in row
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp") or ".tmp." in p.name]
    assert "mmseqrec run" in (folder / "report.html").read_text()
    assert read_json(folder / "titles.json")["it1"] == "A blue mug"

def test_the_same_command_finishes_at_once(done, encoders, tables, capsys):
    folder, _ = done
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "models").rglob("*") if p.is_file()}
    assert resolve("--config", folder / "run.json").to_dict() == resolve(*tables, *encoders, *QUICK).to_dict()
    code, out, err = shell(capsys, "run", "--config", folder / "run.json", "--out", folder, "--quiet")
    assert code == 0 and "Since the last run" not in out
    assert {p: p.stat().st_mtime_ns for p in (folder / "models").rglob("*") if p.is_file()} == stamps

def test_other_settings_are_said(done, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.json").write_text((done[0] / "run.json").read_text())
    monkeypatch.setattr("mmseqrec.experiments.run.run_all", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["run", "--config", str(tmp_path / "run.json"), "--epochs", "9", "--out", str(tmp_path)])
    assert "epochs was 2, is 9." in capsys.readouterr().out

@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_run_continues(tmp_path, encoders, tables, done, capsys):
    "Ctrl-C in the middle; the same command gives the numbers of an undisturbed run."
    words = [sys.executable, "-m", "mmseqrec", "run", *tables, *encoders, *QUICK, "--out", str(tmp_path / "r")]
    running = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list((tmp_path / "r").glob("models/*/result.json")) and time.time() < deadline: time.sleep(.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode in (0, 130) and "Traceback" not in err
    assert shell(capsys, *words[3:])[0] == 0
    for path in (done[0] / "models").glob("*/ranks.safetensors"):
        again = load_file(tmp_path / "r/models" / path.parent.name / "ranks.safetensors")
        for name, x in load_file(path).items(): torch.testing.assert_close(again[name], x, rtol=0, atol=0)

def test_standard_systems_that_the_encoders_do_not_permit_are_named(done, tmp_path, encoders, tables, capsys):
    "The picture encoder of these tests knows no words: a run without `--systems` says so, one that asks for MP4SR ends."
    shutil.copytree(done[0], tmp_path / "r")
    words = ["run", *tables, *encoders, "--epochs", "2", "--device", "cpu", "--quiet", "--out", tmp_path / "r"]
    code, out, err = shell(capsys, *words)
    assert code == 0 and out.count("it was left out.") == 2 and "SASRec over content" in out and err == ""
    assert out.count("MP4SR") == 2 and "MP4SR, not pre-trained describes" in (tmp_path / "r/report.html").read_text()
    assert read_json(tmp_path / "r/run.json")["systems"] is None
    code, out, err = shell(capsys, *words, "--systems", "mp4sr")
    assert code == 2 and is_one_sentence(err) and "such as a CLIP" in err and "leave mp4sr out" in err

def test_only_the_first_process_speaks(done, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (before := done[0] / "report.html").touch()
    stamp = before.stat().st_mtime_ns
    code, out, err = shell(capsys, "run", "--config", done[0] / "run.json", "--out", done[0])
    assert (code, out, err) == (0, "", "") and before.stat().st_mtime_ns == stamp


# What was saved

@pytest.fixture(scope="module")
def model(done): return done[0] / "models/content_sasrec-seed0"

def test_evaluate_gives_the_numbers_of_the_run(model, capsys, tmp_path):
    code, out, err = shell(capsys, "evaluate", model, "--device", "cpu", "--quiet", "--json", tmp_path / "e.json")
    record = read_json(tmp_path / "e.json")
    ranks = load_file(model / "ranks.safetensors")["ranks"]
    assert code == 0 and record["n_events"] == len(ranks) and record["n_events_left_out"] == 0 and "NDCG@10" in out
    recall = record["metrics"]["recall@10"]
    assert recall["value"] == pytest.approx((ranks <= 10).double().mean().item())
    assert recall["low"] <= recall["value"] <= recall["high"]

def test_evaluate_other_events(model, capsys, tmp_path):
    rows = [f"{u},{i},{t}" for u in "ab" for t, i in enumerate(("it1", "new", "it2", "it3", "it4"))] + ["c,new,1"]
    (tmp_path / "e.csv").write_text("who,what,when\n" + "\n".join(rows) + "\n")
    words = ["evaluate", model, "--interactions", tmp_path / "e.csv", "--device", "cpu", "--quiet",
             "--json", tmp_path / "e.json"]
    code, out, err = shell(capsys, *words)
    assert code == 0 and "3 of 11 events" in out and read_json(tmp_path / "e.json")["n_events"] == 2
    assert shell(capsys, *words, "--stage", "valid")[0] == 0
    (tmp_path / "e.csv").write_text("who,what,when\na,new,1\na,new,2\na,new,3\n")
    code, out, err = shell(capsys, *words)
    assert code == 2 and is_one_sentence(err) and "it" in err
    code, out, err = shell(capsys, *words, "--user-column", "customer")
    assert code == 2 and is_one_sentence(err) and "customer" in err

def test_recommend_agrees_with_the_library(model, capsys, tmp_path):
    (tmp_path / "h.jsonl").write_text('["it1", "it2"]\n["it5", "nothing"]\n["nothing"]\n')
    words = ["recommend", model, "--device", "cpu", "-k", 3, "--json", tmp_path / "a.json"]
    code, out, err = shell(capsys, *words, "--histories", tmp_path / "h.jsonl")
    answers = read_json(tmp_path / "a.json")
    expected = load_recommender(model, "cpu").recommend([["it1", "it2"], ["it5"]], k=3)
    assert code == 0 and [a["items"] for a in answers] == [*(e.items for e in expected), []]
    assert "unknown items, left out: nothing" in out and out.count("A ") >= 6
    assert answers[1]["unknown"] == ["nothing"]
    shell(capsys, *words, "--history", "it1", "it2", "--exclude-seen")
    assert not {"it1", "it2"} & set(read_json(tmp_path / "a.json")[0]["items"])

def test_embed_writes_what_the_model_computes(model, capsys, tmp_path):
    code, out, err = shell(capsys, "embed", model, "--history", "it1", "it2", "--out", tmp_path, "--device", "cpu")
    recommender = load_recommender(model, "cpu")
    with torch.inference_mode(): items = recommender.encode_items()
    vectors, tokens = load_file(tmp_path / "items.safetensors")["vectors"], read_json(tmp_path / "items.json")
    assert code == 0 and tokens == recommender.catalogue.item_tokens[1:]
    torch.testing.assert_close(vectors, items.vectors)
    sequence = load_file(tmp_path / "sequences.safetensors")["vectors"]
    scores = recommender.score(sequence, items)[0].sort(descending=True).values  # equal items share a score
    torch.testing.assert_close(scores[:5], torch.tensor(recommender.recommend([["it1", "it2"]], k=5)[0].scores))
    code, out, err = shell(capsys, "embed", model, "--history", "nothing", "--out", tmp_path / "n", "--device", "cpu")
    assert code == 2 and is_one_sentence(err)

def test_every_system_can_be_loaded(done):
    for folder in sorted((done[0] / "models").iterdir()):
        model = load_recommender(folder, "cpu")
        assert model.recommend([["it1"]], k=2)[0].items and run_of(folder)[0] == done[0].resolve()

def test_folders_that_cannot_be_loaded(done, model, tmp_path, capsys):
    code, out, err = shell(capsys, "recommend", done[0], "--history", "it1")
    assert code == 2 and "perhaps you mean" in err and "sasrec-seed0" in err
    for name, content, says in (("config.json", '{"recommender": "Oracle"}', "Oracle"),
                                ("config.json", "{", "not valid JSON"),
                                ("model.safetensors", "garbage", "damaged")):
        broken = tmp_path / name / says.replace(" ", "")
        broken.mkdir(parents=True)
        for path in model.glob("*.*"): (broken / path.name).write_bytes(path.read_bytes())
        (broken / name).write_text(content)
        code, out, err = shell(capsys, "recommend", broken, "--history", "it1", "--device", "cpu")
        assert code == 2 and is_one_sentence(err) and says in err, err


# Small parts

def test_histories_are_read_from_three_kinds_of_files(tmp_path):
    for name, text in (("h.txt", "a b\n\n c, d ,e\n"), ("h.jsonl", '["a", "b"]\n["c", "d", "e"]\n'),
                       ("h.json", '[["a", "b"], ["c", "d", "e"]]')):
        (tmp_path / name).write_text(text)
        assert read_histories(tmp_path / name) == [["a", "b"], *[[]] * (name == "h.txt"), ["c", "d", "e"]]
    for name, text, says in (("x.jsonl", '["a"]\n{', "line 2"), ("y.json", '{"a": 1}', "line 1"),
                             ("z.jsonl", "[1.5]", "history 1"), ("v.json", "3", "list")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=says): read_histories(tmp_path / name)

def test_tables_are_aligned():
    lines = text_table(("name", "x"), [("a", "1.5"), ("longer", "10")]).splitlines()
    assert lines == ["name      x", "------  ---", "a       1.5", "longer   10"]
