"""Everything that takes a GPU, in one run of at most ten minutes: `sh tests/gpu.sh [FILE]`, from a clone.

Four steps, each with a time limit: the tests of `test_gpu.py`, the pages of the systems, the benchmark, and systems
trained in bf16 and in 32 bits. A step that fails or takes too long is noted, and the others go on. The file is written
after each step; a result that is copied to `mmseqrec/artifacts/bench/gpu.json` is shown by page 82.
"""
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # the clone's own mmseqrec, and what the tests share

from mmseqrec.artifacts import read_json, write_json

TOTAL = 560  # seconds of all steps together
LIMITS = {"tests": 100, "pages": 120, "bench": 180, "quality": 420}  # of a step; the last has what is left
TESTS = ("tests/test_gpu.py", "tests/test_interests.py::test_gpu_equals_cpu")
CASES = ("machine", *(f"training/{name}" for name in (
    "sasrec", "content_sasrec", "unisrec", "mp4sr", "mmsrec", "missrec", "bert4rec", "gru4rec")))
SYSTEMS = ("sasrec", "content_sasrec", "mp4sr_content_scratch", "missrec_scratch")
PRECISIONS = ("no", "bf16")  # 32 bits first
NO_GPU = ("gpu: PyTorch sees no NVIDIA GPU here; call sh tests/gpu.sh on a machine that has one, or see that it works "
          "by sh tests/gpu.sh try.json --device cpu --tiny")
QUIET = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
         "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "300"}
RUNNING = set()  # processes that `limited` has started


# Processes and steps

def limited(seconds, args, cwd=ROOT, env=None):
    "Run a program; at its limit it ends with all it started. Returns (exit code, or `None` at the limit; what it said)."
    with TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(list(map(str, args)), cwd=cwd, env=env or {**os.environ, **QUIET}, stdout=said,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        RUNNING.add(process)
        try: code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired: code = None
        finally:
            end(process)
            process.wait()
            RUNNING.discard(process)
        said.seek(0)
        return code, said.read()

def end(process):
    "End a process with all it started, if it is still there."
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)

def interrupted(number, frame):
    "End all processes, and then this one: they do not hear a Ctrl-C themselves."
    for process in list(RUNNING): end(process)
    sys.exit(128 + number)

def problem_of(code, said, seconds):
    "Say in a sentence why a program did not end well; `None` if it did."
    if code is None: return f"stopped at its limit of {max(seconds, 0):.0f} seconds"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:300] if lines else 'it said nothing'}" if code else None

def take_step(work, seconds):
    "Do a step; returns what it found, and a note of its time and of what went wrong."
    start, found, problem = time.monotonic(), None, "no time was left"
    if seconds >= 1:
        try: found, problem = work(seconds)
        except Exception as error: problem = f"{type(error).__name__}: {error}"
    return found, {"seconds": round(time.monotonic() - start, 1), "limit": round(seconds), "problem": problem}

def take_steps(steps, record, path, total=TOTAL, tell=print):
    "Do all steps (name -> work), and write the record after each."
    ends_at = time.monotonic() + total
    write_json(path, record)
    for name, work in steps.items():
        seconds = min(LIMITS[name], ends_at - time.monotonic())
        tell(f"{name}: at most {seconds:.0f} seconds")
        record[name], record["steps"][name] = take_step(work, seconds)
        write_json(path, record)
        tell(f"{name}: {record['steps'][name]['problem'] or 'done'}")
    return record


# 1. The tests

def count_tests(said):
    "Count the outcomes of pytest's lines, also of a run that was stopped, with the reason of each failure."
    outcomes = dict(re.findall(r"^(\S+::\S+(?: \S+)*?) (PASSED|FAILED|ERROR|SKIPPED)\b", said, re.M))
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (\S+::.*?) - (.*)$", said, re.M))
    kinds = list(outcomes.values())
    failures = {name: reasons.get(name, "") for name, kind in outcomes.items() if kind in ("FAILED", "ERROR")}
    return {"passed": kinds.count("PASSED"), "failed": len(failures), "skipped": kinds.count("SKIPPED"),
            "failures": failures}

def run_tests(seconds, device, options=()):
    "Run the tests that take a GPU; what warns there does not fail."
    env = {**os.environ, **QUIET, "MMSEQREC_GPU_TESTS_ON": device}
    code, said = limited(seconds, [sys.executable, "-m", "pytest", "-v", "-ra", "-o", "addopts=", "-W", "default",
                                   "-p", "no:cacheprovider", *options, *TESTS], env=env)
    found = count_tests(said)
    if code == 1 and found["failed"]: return found, f"{found['failed']} tests failed"
    return found, problem_of(code, said, seconds)


# 2. The pages

def run_page(page, folder, ends_at):
    "Execute a page in a folder of its own; the repository's page stays as it is."
    from pages import page_process
    (folder := folder / page.stem).mkdir()
    start = time.monotonic()
    _, process = page_process(page, folder)
    problem = problem_of(*limited(ends_at - start, **process), ends_at - start)
    return {"page": page.stem, "seconds": round(time.monotonic() - start, 1), "problem": problem}

def run_pages(seconds, pages):
    "Execute pages side by side, one core each."
    ends_at = time.monotonic() + seconds
    with TemporaryDirectory() as folder, ThreadPoolExecutor(side_by_side()) as pool:
        found = list(pool.map(lambda page: run_page(page, Path(folder), ends_at), pages))
    failed = [each["page"] for each in found if each["problem"]]
    return found, f"did not end well: {', '.join(failed)}" if failed else None

def side_by_side(): return max(2, (os.cpu_count() or 1) // 2)


# 3. The benchmark

def run_bench(seconds, device, options):
    "Measure speed; the cases that are finished at the limit are kept."
    with TemporaryDirectory() as folder:
        output = Path(folder) / "bench.json"
        command = [sys.executable, HERE / "bench", "--device", device, "--output", output, *options]
        code, said = limited(seconds, command)
        return (read_json(output) if output.exists() else None), problem_of(code, said, seconds)


# 4. bf16 beside 32 bits

def kitchen(device, tiny):
    "Some systems in the kitchen of page 61; or, to try it, one system in one of seconds."
    from mmseqrec.experiments.compare import COMPARISONS, tiny_config
    config = replace(COMPARISONS["marketplace"], systems=SYSTEMS, device=device)
    return replace(tiny_config(config, SYSTEMS[:1]), seeds=(0, 1)) if tiny else config

def train_part(precision, seed, folder, config):
    "Train the systems with one precision and one seed; what is finished is written at once."
    from mmseqrec.experiments.compare import run_grid
    from mmseqrec.experiments.run import prepare_data
    config = replace(config, precision=precision, seeds=(int(seed),))
    data, runs = prepare_data(config, folder / "prepared", progress=False), []
    for name in config.systems:
        row, = run_grid(config, data, folder, [(name, int(seed))], {}, progress=False)["runs"]
        runs.append({**row, "precision": precision, "epochs": len(row["valid"])})
        write_json(folder / "runs.json", runs)

def compare_precisions(runs):
    "Compare bf16 with 32 bits, seed by seed: NDCG@10 with its interval, and the seconds of an epoch."
    from mmseqrec.experiments.compare import paired_over_seeds
    found, named = {}, [{**run, "system": f"{run['system']}/{run['precision']}"} for run in runs]
    for name in dict.fromkeys(run["system"] for run in runs):
        sides = [f"{name}/{precision}" for precision in PRECISIONS]
        try: found[name] = paired_over_seeds(named, *reversed(sides))
        except ValueError: continue  # fewer than two seeds have both
        for precision, side in zip(PRECISIONS, sides):
            own = [run for run in named if run["system"] == side]
            found[name][precision] = {
                "ndcg@10": sum(run["ndcg@10"] for run in own) / len(own),
                "seconds": sum(run["seconds"] for run in own) / len(own),
                "epoch_seconds": sum(run["seconds"] for run in own) / sum(run["epochs"] for run in own)}
    return found

def run_quality(seconds, device, tiny):
    "Train systems in both precisions, one process for each precision and seed, side by side."
    config, ends_at = kitchen(device, tiny), time.monotonic() + seconds
    jobs = [(precision, seed) for seed in config.seeds for precision in PRECISIONS]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(side_by_side()) as pool:
        places = [Path(folder) / "{}-{}".format(*job) for job in jobs]
        def part(job, place):
            place.mkdir()
            options = ["--device", device, *(["--tiny"] if tiny else [])]
            left = ends_at - time.monotonic()
            return problem_of(*limited(left, [sys.executable, __file__, *options, "--part", *job, place]), left)
        problems = [p for p in pool.map(part, jobs, places) if p]
        files = [place / "runs.json" for place in places if (place / "runs.json").exists()]
        runs = sum(map(read_json, files), [])
    found = {"config": config.changes(), "side_by_side": min(side_by_side(), len(jobs)), "runs": runs,
             "differences": compare_precisions(runs)}
    return found, "; ".join(dict.fromkeys(problems)) or None


# The whole

def plan(device, tiny):
    "List the steps: name -> function of the seconds it may take."
    pages = sorted((ROOT / "nbs").glob("52_*" if tiny else "5[0-5]_*"))
    some = ["-k", "sasrec or full_softmax"] if tiny else []
    bench = ["--quick", "--threads", 1, "--only", "features/text", "interests/paper"] if tiny else [
        "--rounds", 2, "--round-seconds", 1, "--threads", min(os.cpu_count() or 1, 8), "--only", *CASES]
    return {"tests": partial(run_tests, device=device, options=some), "pages": partial(run_pages, pages=pages),
            "bench": partial(run_bench, device=device, options=bench),
            "quality": partial(run_quality, device=device, tiny=tiny)}

def describe(device):
    "Say with what the steps ran: the benchmark's description of the machine, and its driver and CUDA."
    import torch
    from bench.machine import describe_machine
    from bench.options import BenchOptions
    made = {**describe_machine(BenchOptions(device=device)), "cuda": torch.version.cuda, "driver": None}
    if made["gpu"]:
        made["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try: code, said = limited(20, ask)
        except OSError: code, said = None, ""
        if code == 0: made["driver"] = said.strip().splitlines()[0]
    return made

def summary(record):
    "Lay out a record as tables: title -> headings and rows; tables without rows are left out."
    from bench.tables import bench_tables
    tests, steps = record.get("tests"), record["steps"]
    tables = {"Steps": (["step", "seconds", "problem"], [[name, step["seconds"], step["problem"] or ""]
                                                         for name, step in steps.items()])}
    kinds = ("passed", "failed", "skipped")
    tables["Tests"] = ([*kinds], [[tests[kind] for kind in kinds]] if tests else [])
    tables["Failures"] = (["test", "reason"], [[*pair] for pair in (tests or {}).get("failures", {}).items()])
    tables["Pages"] = (["page", "seconds", "problem"], [[p["page"], p["seconds"], p["problem"] or ""]
                                                        for p in record.get("pages") or ()])
    tables |= bench_tables(record["bench"]) if record.get("bench") else {}
    differences = (record.get("quality") or {}).get("differences", {})
    tables["NDCG@10 in bf16 minus in 32 bits; seconds of an epoch"] = (
        ["system", "32 bits", "bf16", "difference", "seeds", "32 bits, s", "bf16, s"],
        [[name, f"{d['no']['ndcg@10']:.4f}", f"{d['bf16']['ndcg@10']:.4f}",
          "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**d), d["n"],
          f"{d['no']['epoch_seconds']:.2f}", f"{d['bf16']['epoch_seconds']:.2f}"] for name, d in differences.items()])
    return {title: table for title, table in tables.items() if table[1]}

def make_parser():
    "Build the parser of the options."
    from mmseqrec.app.cli import Parser
    parser = Parser("sh tests/gpu.sh", description=__doc__.partition("\n")[0])
    parser.add_argument("file", metavar="FILE", nargs="?", default="gpu.json", help="result (default: gpu.json)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --tiny, to try it")
    parser.add_argument("--tiny", action="store_true", help="one page, small sizes: to see that it works")
    parser.add_argument("--part", nargs=3, metavar=("PRECISION", "SEED", "FOLDER"), help="(a process of the last step)")
    return parser

def main(argv=None):
    "Take all steps; exit code 0, 1 if one had a problem, 2 without a GPU."
    import torch
    from mmseqrec.app.cli import text_table
    args = (parser := make_parser()).parse_args(argv)
    if args.device == "cpu" and not args.tiny: parser.error("--device cpu is only to try it: add --tiny")
    if args.device == "cuda" and not torch.cuda.is_available(): return print(NO_GPU, file=sys.stderr) or 2
    if args.part:
        precision, seed, folder = args.part
        return train_part(precision, seed, Path(folder), kitchen(args.device, args.tiny)) or 0
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, interrupted)
    record = {"provenance": {**describe(args.device), "tiny": args.tiny}, "steps": {}}
    take_steps(plan(args.device, args.tiny), record, args.file, tell=partial(print, file=sys.stderr, flush=True))
    for title, table in summary(record).items(): print(f"\n{title}\n{text_table(*table)}")
    return int(any(step["problem"] for step in record["steps"].values()))

if __name__ == "__main__":
    try: sys.exit(main())
    except ModuleNotFoundError as error:
        print(f'gpu: {error}; install the package with its tools: pip install -e ".[dev]"', file=sys.stderr)
        sys.exit(2)
