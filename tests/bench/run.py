"All cases by name, the loop over them, and the command."
import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mmseqrec.app.cli import INPUT_ERRORS, Parser, at_least, error_sentence
from mmseqrec.artifacts import provenance, read_json, write_json
from mmseqrec.core import get_device

from .data import peer_config, synthetic_store, write_prefixes
from .drivers.protocol import serve_commands
from .jobs import JOBS
from .machine import describe_machine
from .measure import measure_job, measure_startup, measure_training
from .options import BenchOptions
from .tables import bench_text
from .trainee import TRAINING_CASES, Trainee


def bench_cases(
    options: BenchOptions,
    folder: str | Path,  # prefix rows and feature dumps
) -> dict[str, Callable]:  # name -> function without arguments that measures the case
    "List what is measured."
    size = ("quick", "normal", "full").index(options.size)
    def curve(job, key, *ranges, **settings):
        return lambda: {"points": [measure_job(job, options, **settings, **{key: n}) for n in ranges[size]]}
    def plane(job, rows, *ranges):
        return lambda: {"points": [measure_job(job, options, n=n, rows=r) for r in rows for n in ranges[size]]}
    items = ([1000, 10_000], [10_000, 100_000, 1_000_000], [10_000, 100_000, 1_000_000])
    cases = {"machine": lambda: measure_job("machine", options)}
    cases |= {f"training/{name}": (lambda name=name: measure_training(name, options, folder))
              for name in TRAINING_CASES}
    cases |= {
        "interests/kmeans": curve("interests", "n_tokens", [1000, 4000], [1000, 10_000, 100_000, 1_000_000],
                                  [1000, 10_000, 100_000, 1_000_000], method="kmeans"),
        "interests/dpc_knn": curve("interests", "n_tokens", [500, 2000],
                                   *2 * ([1000, 3000, 10_000, 20_000, 50_000],), method="dpc_knn"),
        "interests/paper": lambda: {"points": [measure_job("paper_interests", options, **(
            dict(n_tokens=900, n_clusters=18, width=30) if size == 0 else {}))]},
        "features/text": curve("features", "n", [128], [2000], [10_000], modality="text"),
        "features/image": curve("features", "n", [128], [1000], [5000], modality="image"),
        "prepare/csv": curve("prepare", "n_events", [10_000], *2 * ([100_000, 1_000_000, 10_000_000],), suffix="csv"),
        "prepare/parquet": curve("prepare", "n_events", [10_000], *2 * ([100_000, 1_000_000, 10_000_000],),
                                 suffix="parquet"),
        "startup": lambda: measure_startup(options),
        "growth/users": curve("growth_users", "n", [300, 1000], [1000, 10_000, 100_000],
                              [1000, 10_000, 100_000, 1_000_000]),
        "growth/length": curve("growth_length", "n", [6, 12], [10, 20, 40, 80], [10, 20, 40, 80]),
        "growth/items_loss": plane("growth_items_loss", (256, 1024), *items),
        "growth/items_evaluation": plane("growth_items_evaluation", (256, 1024), *items)}
    if options.only is None: return cases
    chosen = {o: [o] if o in cases else [name for name in cases if name.startswith(o)] for o in options.only}
    lost = [o for o, names in chosen.items() if not names]
    if lost: raise ValueError(f"there is no case {lost[0]!r}; there are {', '.join(cases)}")
    return {name: cases[name] for names in chosen.values() for name in names}

def run_bench(
    options: BenchOptions,
    output: str | Path,  # JSON file; continued if it has the same settings
    tell: Callable = lambda sentence: None,  # called with a sentence before each case
) -> dict:  # `{"settings", "provenance", "cases", "problems"}`
    "Measure all cases that are not in the file yet. Raises `ValueError` for a file with other settings."
    output, settings = Path(output), options.settings()
    record = {"settings": settings, "provenance": describe_machine(options), "cases": {}}
    if output.exists():
        record = read_json(output)
        if record.get("settings") != settings:
            raise ValueError(f"{output} holds a benchmark with other settings; name another file with --output, or "
                             "delete it")
    with TemporaryDirectory() as scratch:
        folder = options.bench
        if folder is None:
            folder = write_prefixes(synthetic_store(options.n_users, options.n_items), Path(scratch) / "bench")
        problems = {}
        for name, run in bench_cases(options, folder).items():
            if name in record["cases"]: continue
            tell(name)
            start = time.perf_counter()
            try: found = run()
            except (RuntimeError, subprocess.SubprocessError) as error:
                problems[name] = error_sentence(error)
                tell(f"{name}: {problems[name]}")
                continue
            record["cases"][name] = {**found, "measured_in": round(time.perf_counter() - start, 1),
                                     "time": provenance()["time"]}
            write_json(output, record)
    return {**record, "problems": problems}

def bench_parser() -> Parser:
    "Build the parser of the benchmark's options."
    parser = Parser("python tests/bench", description="Measure speed and memory of everything in this package, "
                    "in turns with the released code where it is at hand. Call it again to continue.")
    parser.add_argument("--bench", metavar="FOLDER", help="prefix rows and feature dumps in the format of UniSRec and "
                        "MISSRec (default: made up, of the same size)")
    parser.add_argument("--recbole-python", metavar="PYTHON", help="interpreter that has RecBole 1.2.1 (with pandas "
                        "below 3), to be measured beside ours")
    parser.add_argument("--unisrec-code", metavar="FOLDER", help="checkout of UniSRec's released code; needs "
                        "--recbole-python")
    parser.add_argument("--missrec-code", metavar="FOLDER", help="checkout of MISSRec's released code; needs "
                        "--recbole-python. Without released code: a reference mode, labelled as such")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="names of cases or their beginnings, such as "
                        "training/sasrec or growth, measured in this order")
    parser.add_argument("--rounds", metavar="N", type=at_least(int, 1), help="turns of each side (default: 5)")
    parser.add_argument("--round-seconds", metavar="S", type=at_least(float, .01),
                        help="about how long each side trains in a turn (default: 8)")
    parser.add_argument("--threads", metavar="N", type=at_least(int, 1), help="threads of each process (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where everything is measured (default: cpu)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick",
                      help="one short round, small curves: a few minutes, to see that it works")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="a million users, too")
    parser.add_argument("--output", metavar="FILE", default="bench.json", help="result (default: bench.json)")
    parser.add_argument("--table", action="store_true", help="only show what the file holds")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser

def bench_main(
    argv: Sequence[str] | None = None,  # arguments; those of the process by default
) -> int:  # exit code: 0, 1 if a case failed, 2 for wrong input, 130 if interrupted
    "Run the benchmark from the command line."
    args = vars(bench_parser().parse_args(argv))
    if args["worker"]: return _serve_own(json.loads(args["worker"])) or 0
    output, table, _ = args.pop("output"), args.pop("table"), args.pop("worker")
    given = {name: value for name, value in args.items() if value is not None}
    if given.get("size") == "quick": given = {"rounds": 1, "round_seconds": 1.0, **given}
    if "only" in given: given["only"] = tuple(given["only"])
    try:
        if table: print(bench_text(read_json(output)))
        else:
            get_device(given.get("device", "cpu"))
            found = run_bench(BenchOptions(**given), output, lambda sentence: print(sentence, file=sys.stderr))
            print(bench_text(found))
            return int(bool(found["problems"]))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
        return 130
    except INPUT_ERRORS as error:
        print(f"bench: {error_sentence(error)}", file=sys.stderr)
        return 2
    return 0

def _serve_own(job):
    "Be the process that `own_command` starts."
    torch.set_num_threads(job.pop("threads"))
    if job["kind"] != "training":
        jobs = {"run": lambda: JOBS[job.pop("kind")](**job)}
        return serve_commands(lambda: None, lambda: ({}, jobs))
    def prepare():
        config = peer_config(job["folder"], **job["config"])
        trainee = Trainee(TRAINING_CASES[job["case"]], job["folder"], config, job["precision"], job["reference"])
        names = ("start", "train", "count", "evaluate")
        return trainee.facts, {name: getattr(trainee, name) for name in names}
    serve_commands(lambda: None, prepare)
