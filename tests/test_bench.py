"The benchmark counts, compares, continues and complains as it says; nothing here depends on how fast anything is."
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import gpu
from bench import drivers, measure, run
from bench.data import peer_config, synthetic_store, write_prefixes
from bench.drivers.protocol import MemoryMeter, process_memory
from bench.jobs import JOBS
from bench.machine import count_operations, describe_machine, matrix_rate, measure_seconds
from bench.measure import measure_job, measure_startup, measure_training
from bench.options import BenchOptions
from bench.reference import reference_loss
from bench.run import bench_cases, bench_main, bench_parser, run_bench
from bench.tables import bench_tables, bench_text, bench_verdict, paired_ratio, stored_benches, trained_cases
from bench.trainee import TRAINING_CASES, Trainee, spread_batches
from bench.workers import BenchWorker, peer_folder, peer_name, peer_worker
from mmseqrec.artifacts import read_json
from mmseqrec.data.sequences import TEST, TRAIN, VALID, prefix_batches
from mmseqrec.data.sources import read_benchmark

ROOT = Path(__file__).parent.parent
PAGE = json.loads((ROOT / "nbs/82_bench.ipynb").read_text(encoding="utf-8"))

TINY = dict(hidden_size=16, inner_size=16, n_layers=2, n_heads=2, dropout=.5, max_len=12, batch_size=64, lr=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_prefixes(synthetic_store(60, 40, max_length=12), tmp_path_factory.mktemp("bench") / "Syn", 8))

def tiny_options(folder=None, **changes):
    return BenchOptions(**{**dict(bench=folder, rounds=2, round_seconds=.01, threads=1, size="quick", sizes=TINY),
                           **changes})

def trainee(folder, name, **options):
    return Trainee(TRAINING_CASES[name], folder, peer_config(folder, **TINY), **options)


# Clock, meter, floor

def test_memory_that_was_given_back_is_seen():
    meter = MemoryMeter()
    meter.reset()
    block = np.ones(8_000_000)
    del block
    assert meter.growth() > 50e6
    assert process_memory(peak=True) >= process_memory() > 0

def test_seconds_come_with_the_result():
    seconds, result = measure_seconds(lambda: 7)
    assert seconds >= 0 and result == 7

def test_rate_of_a_product():
    assert matrix_rate((8, 8, 8), seconds=0) > 0 and matrix_rate((8, 8, 8), "bf16", seconds=0) > 0

def test_operations_of_a_linear_layer():
    layer, rows = torch.nn.Linear(5, 7), torch.randn(3, 5)
    assert count_operations(lambda: layer(rows)) == 2 * 3 * 5 * 7
    assert count_operations(lambda: layer(rows).sum().backward()) == 2 * 2 * 3 * 5 * 7  # rows need no gradient

def test_operations_of_attention_are_not_hidden_in_a_fused_kernel():
    q = torch.randn(2, 3, 6, 4)
    run = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert count_operations(run) == 2 * (2 * 3) * (2 * 6 * 6 * 4)


# Data

def test_synthetic_histories():
    store = synthetic_store(500, 100, 9.0, 30)
    lengths = np.diff(store.offsets)
    assert lengths.min() >= 4 and lengths.max() <= 30 and 8 < lengths.mean() < 10
    assert len(store.rows(TEST)) == len(store.rows(VALID)) == 500
    assert np.array_equal(store.items, synthetic_store(500, 100, 9.0, 30).items)

def test_written_prefixes_are_read_back(folder):
    made, read = synthetic_store(60, 40, max_length=12), read_benchmark(folder)
    assert read.split.interactions.n_events == len(made.items) and (read.split.stage == made.stage).all()
    assert read.features("text").shape[1] == 8 and read.features("dropped_text").any()
    names = [int(read.split.interactions.item_tokens[item]) + 1 for item in read.split.interactions.item]
    assert np.array_equal(names, made.items)
    assert tiny_options(folder).feature_size(folder) == 8

def test_peer_sizes(folder):
    config = peer_config(folder)
    assert (config.hidden_size, config.inner_size, config.n_layers, config.n_heads) == (300, 256, 2, 2)
    assert (config.dropout, config.lr, config.max_len, config.batch_size) == (.5, 1e-3, 50, 256)
    assert peer_config(folder, n_heads=4).n_heads == 4


# Training

def test_spread_batches_stand_for_all():
    sizes = np.random.default_rng(0).permutation(120)
    for start in range(5):
        places = spread_batches(sizes, 12, start)
        assert len(set(places)) == 12 and abs(sizes[places].mean() - sizes.mean()) <= 5
    assert sorted(spread_batches(sizes, 500)) == list(range(120))

@pytest.mark.parametrize("name", TRAINING_CASES)
def test_every_case_trains(folder, name):
    case = trainee(folder, name)
    before = [p.detach().clone() for p in case.model.parameters()]
    found = case.train(2)
    assert found["steps"] == 2 and found["seconds"] > 0 and found["rate"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, case.model.parameters()))
    assert case.count(1)["operations"] > 0
    assert case.facts["n_targets"] > 0
    if case.case.phase == "finetune":
        assert case.facts["n_targets"] == len(case.store.rows(TRAIN))
        assert case.evaluate()["rows"] == 60

@pytest.mark.parametrize("name", ("sasrec", "unisrec", "missrec"))
def test_reference_mode_is_the_same_loss(folder, name):
    case = trainee(folder, name, reference=True)
    model, batch = case.model.eval(), prefix_batches(case.store, TRAIN, 32, 12)[0]
    slow, fast = reference_loss(model, batch), model.finetune_loss(batch)
    torch.testing.assert_close(slow["loss"], fast["loss"], rtol=1e-4, atol=1e-5)
    assert case.train(1)["steps"] == 1

def test_reference_mode_pretrains_with_the_same_loss(folder):
    case = trainee(folder, "missrec_pretrain", reference=True)
    model, batch = case.model.eval(), prefix_batches(case.store, TRAIN, 16, 12)[0]
    model.disturbance.update(item_drop=0., word_drop_share=0.)
    torch.testing.assert_close(reference_loss(model, batch, "pretrain")["loss"], model(batch, "pretrain")["loss"], rtol=1e-4, atol=1e-5)
    model.disturbance["item_drop"] = .5
    assert reference_loss(model, batch, "pretrain")["loss"].isfinite()

def test_reference_mode_computes_more(folder):
    slow, fast = (trainee(folder, "unisrec", reference=reference).count(2)["operations"] for reference in (True, False))
    assert slow > fast

def test_bf16_runs(folder): assert trainee(folder, "sasrec", precision="bf16").train(1)["steps"] == 1


# Processes

def test_a_process_answers():
    code = (f"import sys; sys.path.insert(0, {drivers.__path__[0]!r})\n"  # as a peer's driver finds it
            "from protocol import serve_commands\n"
            "commands = {'double': lambda x: print('noise') or {'y': 2 * x}}\n"
            "serve_commands(lambda: print('more noise'), lambda: ({'fact': 1}, commands))")
    command = [sys.executable, "-c", code]
    with BenchWorker(command) as worker:
        assert worker.facts["fact"] == 1 and worker.facts["memory"] >= 0
        answer = worker.ask(do="double", x=4)
        assert answer["y"] == 8 and answer["seconds"] >= 0 and answer["memory"] >= 0

def test_a_process_that_dies_says_why():
    with pytest.raises(RuntimeError, match="the kettle ended before it answered; its last words: .*boiled dry"):
        BenchWorker([sys.executable, "-c", "raise ValueError('boiled dry')"], title="the kettle")

def test_a_peers_driver_is_a_file_that_says_what_it_lacks(folder, tmp_path):
    options = tiny_options(folder, recbole_python=sys.executable, missrec_code=str(tmp_path))
    with pytest.raises(RuntimeError, match="MISSRec, inductive of the released code ended .*No module named 'config'"):
        peer_worker(TRAINING_CASES["missrec"], options, folder, tmp_path)

def test_peers_find_their_files(folder, tmp_path):
    assert peer_folder(folder, tmp_path, pretrain=False) == "Syn"
    assert (tmp_path / "Syn/Syn.feat1CLS").samefile(Path(folder, "Syn.feat1CLS"))
    assert peer_folder(folder, tmp_path, pretrain=True) == "Pre" and (tmp_path / "Pre/Pre.pt_datasets").read_text() == "Syn"
    rows = Path(folder, "Syn.train.inter").read_text().splitlines()[1:], (tmp_path / "Pre/Pre.train.inter").read_text().splitlines()[1:]
    for plain, marked in zip(*rows): assert marked.replace("0-", "") == plain and marked.count("0-") == len(plain.split()) - 1

def test_pairs_with_the_reference_mode(folder):
    found = measure_training("sasrec", tiny_options(folder), folder)
    assert found["peer"].startswith("reference mode, not the released code (on another machine") and set(found["sides"]) == {"ours", "bf16", "peer"}
    for side in found["sides"].values():
        assert len(side["rounds"]) == 2
        for each in side["rounds"]: assert each["targets_per_second"] > 0 and each["memory"] > 0 and each["share"] > 0
    ours, peer = found["sides"]["ours"], found["sides"]["peer"]
    assert ours["n_targets"] == peer["n_targets"] and abs(ours["steps_per_epoch"] - peer["steps_per_epoch"]) <= 1
    middle, low, high = paired_ratio(found)
    assert low <= middle <= high

def test_without_a_peer_there_is_no_ratio(folder):
    assert paired_ratio({"sides": {"ours": {"rounds": [{"targets_per_second": 1.0}]}}}) is None

@pytest.mark.parametrize("job, settings", [
    ("machine", {}), ("interests", {"method": "kmeans", "n_tokens": 300}),
    ("interests", {"method": "dpc_knn", "n_tokens": 300}),
    ("paper_interests", {"n_tokens": 300, "n_clusters": 9, "width": 5}), ("features", {"modality": "text", "n": 8}),
    ("features", {"modality": "image", "n": 4}), ("prepare", {"suffix": "csv", "n_events": 5000}),
    ("growth_users", {"n": 50}), ("growth_length", {"n": 8}), ("growth_items_evaluation", {"n": 200, "rows": 20})])
def test_jobs(job, settings):
    found = JOBS[job](device="cpu", **settings)
    assert found.get("seconds", 1) > 0
    if "rates" in found: assert all(rate > 0 for rates in found["rates"].values() for rate in rates.values())
    if "n" in found: assert found["n"] == next(v for k, v in settings.items() if k.startswith("n"))

def test_a_job_in_its_own_process():
    found = measure_job("growth_items_loss", tiny_options(), n=20_000, rows=32)
    assert found["memory"] > found["held"] == 2 * 20_000 * 64 * 4 and found["all_scores"] == 4 * 32 * 20_000

def test_startup():
    measured = measure_startup(tiny_options())
    found = measured["startup"]
    assert list(measured["startup_memory"]) == list(found) and min(measured["startup_memory"].values()) > 1e6
    assert list(found) == ["import mmseqrec", "import mmseqrec.training", "mmseqrec --help"]
    assert all(len(times) == 1 and times[0] > 0 for times in found.values())

def test_startup_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(measure.sys, "executable", "/bin/false")
    with pytest.raises(subprocess.CalledProcessError): measure_startup(tiny_options())


# The whole

def test_a_stopped_benchmark_continues(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_job", lambda job, options, **settings: {"seconds": 1.0, **settings})
    told, options = [], tiny_options(folder, only=("interests/kmeans",))
    first = run_bench(options, tmp_path / "b.json", told.append)
    both = run_bench(replace(options, only=("interests/",)), tmp_path / "b.json", told.append)
    assert told == ["interests/kmeans", "interests/dpc_knn", "interests/paper"] and not both["problems"]
    assert both["cases"]["interests/kmeans"] == first["cases"]["interests/kmeans"]
    assert read_json(tmp_path / "b.json")["cases"] == both["cases"]
    with pytest.raises(ValueError, match="other settings; name another file"):
        run_bench(replace(options, rounds=3), tmp_path / "b.json")

def test_a_case_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def fail(): raise RuntimeError("no luck")
    monkeypatch.setattr(run, "bench_cases", lambda *args: {"bad": fail, "good": lambda: {"points": []}})
    found = run_bench(tiny_options(n_users=20, n_items=10), tmp_path / "b.json")
    assert found["problems"] == {"bad": "no luck"} and list(read_json(tmp_path / "b.json")["cases"]) == ["good"]

def test_names_of_cases(folder):
    names = list(bench_cases(tiny_options(folder), folder))
    assert {f"training/{name}" for name in TRAINING_CASES} < set(names) and "machine" in names
    assert set(bench_cases(tiny_options(folder, only=("growth",)), folder)) == {n for n in names if n[:6] == "growth"}
    assert list(bench_cases(tiny_options(folder, only=("training/missrec",)), folder)) == ["training/missrec"]
    with pytest.raises(ValueError, match="no case 'nonsense'; there are machine"):
        bench_cases(tiny_options(folder, only=("nonsense",)), folder)

def test_the_result_names_the_machine_and_no_folder(folder):
    made = describe_machine(tiny_options())
    assert made["cpu"] and made["threads"] == 1 and made["versions"]["torch"] and made["gpu"] is None
    assert folder not in json.dumps(tiny_options(folder).settings())


# Reading

@pytest.fixture
def record():
    def side(*speeds): return {"steps_per_epoch": 3, "n_targets": 9, "rounds": [
        {"targets_per_second": s, "users_per_second": 2 * s, "memory": 1e7, "evaluation_memory": 2e7, "share": .1}
        for s in speeds]}
    case = {"title": "A", "phase": "finetune", "goal": 3, "peer": "B", "sides": {
        "ours": side(40., 60., 50.), "bf16": side(80., 90., 70.), "peer": side(10., 20., 10.)}}
    point = {"n": 10, "seconds": 2., "memory": 3e6}
    flat = {**point, "rows": 4, "held": 1e6, "all_scores": 160}
    return {"provenance": describe_machine(tiny_options()), "settings": {}, "cases": {
        "training/a": case, "interests/kmeans": {"points": [point]}, "growth/users": {"points": [point]},
        "growth/length": {"points": [{**point, "targets_per_second": 5.}]},
        "growth/items_loss": {"points": [flat]}, "growth/items_evaluation": {"points": [flat]},
        "startup": {"startup": {"import": [.5]}},
        "machine": {"rates": {"square": {"no": 2e9, "bf16": 4e9}}}}}

def test_tables(record):
    tables = bench_tables(record)
    columns, (row,) = tables["Training, targets a second"]
    assert dict(zip(columns, row)) == {"system": "A", "32 bits": "50", "bf16": "80", "peer": "10", "ratio":
                                       "4.0 [3.0, 5.0]", "asked": "3", "share of floor": "10%", "steps": "3",
                                       "peer's": "3", "peer is": "B"}
    ranking = tables["Full ranking, users a second; asked: 5 times the peer's"][1]
    assert ranking == [["A", "100", "160", "20", "4.0 [3.0, 5.0]"]]
    memory = tables["Growth of memory, MB; asked: a third of the peer's at most"][1]
    assert memory == [["A", "10", "10", "1.00", "20", "20", "1.00"]]
    rows = tables["What else takes time, and what grows"][1]
    assert ["growth/items_loss", "10 x 4", "2.00", "5", "3", "2"] in rows and rows[-1][:3] == ["import", "", "0.50"]
    text = bench_text(record)
    assert "2 GFLOP/s in 32 bits, 4 in bf16" in text and "4.0 [3.0, 5.0]" in text

def test_verdict(record):
    assert bench_verdict(record) == [
        "A: 4.0 times the peer in training, 3 were asked for: reached.",
        "Ranking: 4.0 to 4.0 times the peers, 5 were asked for; missed by A.",
        "Memory in training: 1.00 to 1.00 of the peers', a third was asked for; missed by A.",
        "Products of matrices alone would take 10% to 10% of the time of a step in 32 bits; the rest is what is left to gain."]
    case = record["cases"]["training/a"]
    case["goal"] = 5
    for side in ("bf16", "peer"):
        for each in case["sides"][side]["rounds"]: each["targets_per_second"] /= 2
    for each in case["sides"]["bf16"]["rounds"]: each["targets_per_second"] /= 2
    said = bench_verdict(record)
    assert said[0].startswith("A: 8.0 times") and said[0].endswith("reached.") and said[-1] == "In bf16 slower than in 32 bits: A."
    case["goal"] = 9
    assert bench_verdict(record)[0].endswith("MISSED.") and bench_verdict({"cases": {}}) == []
    assert bench_text(record).endswith("In bf16 slower than in 32 bits: A.")

def test_without_released_code_its_figure_is_quoted():
    class Own: facts = {}
    assert "reached 205)" in peer_name(TRAINING_CASES["sasrec"], Own)
    assert {name for name, case in TRAINING_CASES.items() if case.quoted} == {"sasrec", "unisrec", "missrec", "missrec_pretrain"}

def test_the_stored_benchmark_is_whole_and_reaches_what_was_asked():
    record = stored_benches()["cpu"]
    options = BenchOptions(**{k: v for k, v in record["settings"].items() if k in ("rounds", "round_seconds", "threads", "device", "size")})
    assert set(record["cases"]) == set(bench_cases(options, "nowhere"))
    for case in trained_cases(record):
        ours, peer = (case["sides"].get(side) for side in ("ours", "peer"))
        if not peer: continue
        assert ours["n_targets"] == peer["n_targets"] and ours["steps_per_epoch"] == peer["steps_per_epoch"]
        assert "reference" not in case["peer"], "compared with released code"
    said = " ".join(bench_verdict(record))
    assert "MISSED" not in said and said.count("missed by none") == 2 and said.count(": reached.") == 4

def page_names():
    "Execute the cells of page 82 that define how a result is drawn."
    names, wanted = {}, ("imports", "ratio", "middle", "plot-throughput", "plot-share", "growth-lines", "plot-growth",
                         "gpu-tables")
    cells = {cell["id"]: "".join(cell["source"]) for cell in PAGE["cells"]}
    for id in wanted: exec(cells[id], names)
    return names

def test_plots(record):
    page, cases = page_names(), trained_cases(record)
    for key in ("targets_per_second", "users_per_second"):
        ax = page["plot_throughput"](cases, key, "", "")
        assert len(ax.patches) == 3 and [t.get_text() for t in ax.texts] == ["4.0 x"]
    assert len(page["plot_floor_share"](cases).patches) == 2
    users, length, tokens, items = page["plot_growth"](record).axes
    assert len(users.lines) == len(length.lines) == len(tokens.lines) == 1 and len(items.lines) == 3
    assert page["plot_growth"]({"cases": {}}).axes
    matplotlib.pyplot.close("all")

def test_the_page_says_what_the_command_says():
    shown = {cell["id"]: "".join("".join(o.get("text", "")) for o in cell.get("outputs", [])) for cell in PAGE["cells"]}
    said = "".join(text for id, text in shown.items() if id.startswith("verdict-"))
    assert said.splitlines() == bench_verdict(stored_benches()["cpu"])

def test_what_ships_can_be_read():
    for record in stored_benches().values(): assert record["provenance"]["cpu"] in bench_text(record)


# The command

@pytest.mark.parametrize("arguments, sentence", [
    (["--bench", "no-such-folder"], "there is no folder no-such-folder"),
    (["--recbole-python", "no-such-python"], "there is no interpreter no-such-python"),
    (["--missrec-code", "."], "give --recbole-python, too"),
    (["--unisrec-code", "no-such-code"], "there is no folder no-such-code; correct --unisrec-code"),
    (["--only", "nonsense"], "there is no case 'nonsense'"),
    (["--table", "--output", "no-such-file.json"], "no-such-file.json")])
def test_mistakes_are_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench_main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and sentence in error and error.count("\n") == 1

def test_a_folder_without_data_is_a_mistake(capsys, tmp_path):
    assert bench_main(["--bench", str(tmp_path), "--output", str(tmp_path / "b.json")]) == 2
    assert "holds no .train.inter file" in capsys.readouterr().err

def test_the_command_runs_and_shows_its_table(tmp_path, capsys):
    output = str(tmp_path / "b.json")
    arguments = ["--quick", "--threads", "1", "--only", "features/text", "--output", output]
    assert bench_main(arguments) == 0
    shown = capsys.readouterr()
    assert "features/text" in shown.out and "features/text" in shown.err
    assert bench_main(["--table", "--output", output]) == 0 and capsys.readouterr().out == shown.out

def test_the_command_is_a_folder_of_the_clone(tmp_path):
    command = [sys.executable, ROOT / "tests/bench", "--table", "--output", ROOT / "mmseqrec/artifacts/bench/cpu.json"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert ran.stdout == bench_text(stored_benches()["cpu"]) + "\n" and not ran.stderr

def test_help_names_every_option(capsys):
    text = bench_parser().format_help()
    options = "bench recbole-python unisrec-code missrec-code only rounds threads device quick full output table"
    for option in options.split(): assert f"--{option}" in text
    assert "--worker" not in text

def test_a_failed_case_is_told(tmp_path, capsys, monkeypatch):
    def fail(): raise RuntimeError("no luck")
    monkeypatch.setattr(run, "bench_cases", lambda *args: {"bad": fail})
    assert bench_main(["--output", str(tmp_path / "b.json")]) == 1
    assert "bad: no luck" in capsys.readouterr().err


# What takes a GPU

def test_without_a_gpu_there_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "gpu.json")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "no NVIDIA GPU" in said.err and "--device cpu --tiny" in said.err
    with pytest.raises(SystemExit, match="2"): gpu.main(["--device", "cpu"])
    assert "add --tiny" in capsys.readouterr().err and not list(tmp_path.iterdir())

def test_the_command_is_a_shell_script(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(["sh", ROOT / "tests/gpu.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr, ran.stdout) == (2, gpu.NO_GPU + "\n", "") and not list(tmp_path.iterdir())

def test_a_program_ends_at_its_limit_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    start = time.monotonic()
    code, said = gpu.limited(1, ["sh", "-c", f"echo begun; (sleep 3; touch {mark}) & wait"])
    assert code is None and said == "begun\n" and time.monotonic() - start < 3 and not gpu.RUNNING
    time.sleep(2.5)
    assert not mark.exists(), "what the program had started goes on"
    assert gpu.problem_of(code, said, 1) == "stopped at its limit of 1 seconds"
    failed = gpu.limited(9, ["sh", "-c", "echo no luck; exit 3"])
    assert failed == (3, "no luck\n") and gpu.problem_of(*failed, 9) == "exit code 3: no luck"
    assert gpu.problem_of(*gpu.limited(9, ["true"]), 9) is None

def test_a_step_that_fails_is_noted_and_the_others_go_on(tmp_path):
    path, seen = tmp_path / "gpu.json", []
    def fail(seconds): raise RuntimeError("no luck")
    def good(seconds):
        seen.append(read_json(path)["steps"]["tests"]["problem"])
        return [seconds], None
    def slow(seconds): return {"some": 1}, gpu.problem_of(*gpu.limited(1, ["sleep", "9"]), 1)
    steps, told = {"tests": fail, "pages": good, "bench": slow, "quality": good}, []
    record = gpu.take_steps(steps, {"steps": {}}, path, tell=told.append)
    assert seen == ["RuntimeError: no luck"] * 2 and record == read_json(path), "written after each step"
    assert [record[name] for name in steps] == [None, [120], {"some": 1}, [pytest.approx(420, abs=1)]]
    problems = [step["problem"] for step in record["steps"].values()]
    assert problems == ["RuntimeError: no luck", None, "stopped at its limit of 1 seconds", None]
    assert told[0] == "tests: at most 100 seconds" and told[-1] == "quality: done"
    late = gpu.take_steps({"tests": good}, {"steps": {}}, path, total=.5, tell=told.append)
    assert late["steps"]["tests"]["problem"] == "no time was left" and late["tests"] is None

def test_the_steps_take_ten_minutes_at_most():
    assert gpu.TOTAL <= 570 and list(gpu.plan("cuda", False)) == list(gpu.LIMITS)
    assert sum(gpu.LIMITS.values()) - gpu.LIMITS["quality"] <= gpu.TOTAL - 150, "bf16 has its time"
    pages = gpu.plan("cuda", False)["pages"].keywords["pages"]
    assert [page.stem[:2] for page in pages] == ["50", "51", "52", "53", "54", "55"]
    assert set(gpu.CASES) <= set(bench_cases(tiny_options(), "nowhere"))
    assert list(bench_cases(tiny_options(only=gpu.CASES), "nowhere")) == list(gpu.CASES), "the most wanted first"

def test_outcomes_are_counted_also_of_a_run_that_was_stopped():
    said = ("tests/test_a.py::test_one PASSED   [ 20%]\ntests/test_a.py::test_two[no-a b] FAILED [ 40%]\n"
            "tests/test_a.py::test_two[x] SKIPPED (no GPU) [ 60%]\ntests/test_a.py::test_three ")
    reason = "\nFAILED tests/test_a.py::test_two[no-a b] - assert 1 == 2\n"
    found = gpu.count_tests(said)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": {"tests/test_a.py::test_two[no-a b]": ""}}
    assert list(gpu.count_tests(said + reason)["failures"].values()) == ["assert 1 == 2"]

def test_the_gpu_tests_run_and_those_without_a_gpu_are_skipped(monkeypatch):
    monkeypatch.setitem(gpu.QUIET, "CUDA_VISIBLE_DEVICES", "")
    found, problem = gpu.run_tests(100, "cpu", ["-k", "ranks_equal_the_cpus and sasrec or gpu_equals_cpu"])
    assert (found["passed"], found["failed"], found["skipped"], problem) == (1, 0, 2, None)

def small_page(folder, name, code):
    cells = [{"cell_type": "code", "id": "only", "metadata": {}, "source": code, "outputs": [], "execution_count": None}]
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python",
                                "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}))
    return path

def test_pages_are_executed_elsewhere_and_a_broken_one_is_named(tmp_path):
    pages = [small_page(tmp_path, "50_good", "import mmseqrec\n1 + 1"), small_page(tmp_path, "51_bad", "1 / 0")]
    before = [page.read_text() for page in pages]
    found, problem = gpu.run_pages(60, pages)
    assert problem == "did not end well: 51_bad" and [page.read_text() for page in pages] == before
    assert [each["page"] for each in found] == ["50_good", "51_bad"] and found[0]["problem"] is None
    assert found[1]["problem"].startswith("exit code 1") and all(each["seconds"] > 0 for each in found)

def gpu_record(record):
    "What a run on a GPU writes, of a benchmark's record and three seeds."
    runs = [{"system": "sasrec", "seed": seed, "precision": precision, "ndcg@10": .2 + .01 * seed + more, "seconds": s,
             "epochs": 4} for seed, d in enumerate((.001, .002, .003)) for precision, more, s in (("no", 0., 8.), ("bf16", d, 4.))]
    runs.append({**runs[0], "system": "missrec_scratch"})  # was stopped: one seed, one precision
    step = {"seconds": 5., "limit": 9, "problem": None}
    return {"provenance": {}, "steps": {"tests": step, "bench": {**step, "problem": "no luck"}}, "bench": record,
            "tests": {"passed": 3, "failed": 1, "skipped": 0, "failures": {"test_x": "why"}},
            "pages": [{"page": "50", "seconds": 3., "problem": None}],
            "quality": {"runs": runs, "differences": gpu.compare_precisions(runs)}}

def test_precisions_are_compared_seed_by_seed(record):
    found = gpu_record(record)["quality"]["differences"]
    assert list(found) == ["sasrec"] and found["sasrec"]["n"] == found["sasrec"]["wins"] == 3
    assert found["sasrec"]["difference"] == pytest.approx(.002) and found["sasrec"]["low"] < .002 < found["sasrec"]["high"]
    assert found["sasrec"]["no"] == pytest.approx({"ndcg@10": .21, "seconds": 8., "epoch_seconds": 2.})
    assert found["sasrec"]["bf16"]["epoch_seconds"] == 1.

def test_a_run_on_a_gpu_is_summed_up(record):
    tables = gpu.summary(gpu_record(record))
    assert tables["Steps"][1] == [["tests", 5., ""], ["bench", 5., "no luck"]] and tables["Tests"][1] == [[3, 1, 0]]
    assert tables["Failures"][1] == [["test_x", "why"]] and tables["Pages"][1] == [["50", 3., ""]]
    row, = tables["NDCG@10 in bf16 minus in 32 bits; seconds of an epoch"][1]
    assert row[:3] == ["sasrec", "0.2100", "0.2120"] and row[3].startswith("+0.0020 [-0.0005,") and row[-2:] == ["2.00", "1.00"]
    assert "Training, targets a second" in tables and list(gpu.summary({"steps": {}})) == []

def test_the_page_shows_a_run_on_a_gpu(record):
    gpu_tables = page_names()["gpu_tables"]
    tables = gpu_tables(gpu_record(record))
    assert tables["Tests"].rows() == [(3, 1, 0)] and tables["Pages"].rows() == [("50", 3., True)]
    assert tables["Training, targets a second"].rows() == [("A", 50, 80, 1.5, 1.4, 2.)]
    (row,) = tables["NDCG@10, bf16 minus 32 bits"].rows()
    assert row[:4] == ("sasrec", "0.2100", 3, "+0.0020") and gpu_tables({"steps": {}}) == {}

def test_a_part_trains_and_keeps_what_is_finished(tmp_path, monkeypatch):
    from mmseqrec.experiments import compare, run as experiments
    monkeypatch.setattr(experiments, "prepare_data", lambda config, folder, progress: config.precision)
    def grid(config, data, folder, jobs, questions, progress):
        if jobs[0][0] == "mmsrec": raise RuntimeError("no luck")
        return {"runs": [{"system": jobs[0][0], "seed": jobs[0][1], "valid": [.1, .2], "data": data, "seeds": config.seeds}]}
    monkeypatch.setattr(compare, "run_grid", grid)
    config = replace(gpu.kitchen("cpu", True), systems=("sasrec", "mmsrec"))
    with pytest.raises(RuntimeError): gpu.train_part("bf16", "1", tmp_path, config)
    assert read_json(tmp_path / "runs.json") == [{"system": "sasrec", "seed": 1, "valid": [.1, .2], "data": "bf16",
                                                  "seeds": [1], "precision": "bf16", "epochs": 2}]

def test_the_stored_run_is_of_a_gpu():
    path = ROOT / "mmseqrec/artifacts/bench/gpu.json"
    if not path.exists(): pytest.skip("no GPU has been lent yet")
    stored = read_json(path)
    assert stored["provenance"]["gpu"] and not stored["provenance"]["tiny"] and not stored["tests"]["failed"]
