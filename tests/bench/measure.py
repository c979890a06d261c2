"What is measured: training in turns with a peer, a job in a process of its own, and the start of the package."
import inspect
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .drivers.protocol import process_memory
from .machine import measure_seconds
from .options import BenchOptions
from .trainee import TRAINING_CASES
from .workers import BenchWorker, own_command, peer_name, peer_worker


def _sides(name, options, folder, scratch):
    "Start the processes of a case: ours in 32 bits, ours in bf16, and what is compared with."
    case, sides = TRAINING_CASES[name], {}
    job = {"kind": "training", "case": name, "folder": str(Path(folder).resolve()), "threads": options.threads,
           "config": {**options.sizes, "device": options.device}}
    def own(precision, reference=False):
        command = own_command(**job, precision=precision, reference=reference)
        return BenchWorker(command, options.threads, f"{case.title} ({precision})")
    code = {"recbole": True, "unisrec": options.unisrec_code, "missrec": options.missrec_code}
    try:
        sides["ours"] = own("no")
        sides["bf16"] = own("bf16")
        if case.peer and options.recbole_python and code[case.peer]:
            sides["peer"] = peer_worker(case, options, folder, scratch)
        elif name in ("sasrec", "unisrec", "missrec", "missrec_pretrain"): sides["peer"] = own("no", True)
    except BaseException:
        for worker in sides.values(): worker.close()
        raise
    return sides

def measure_training(
    name: str,  # key of `TRAINING_CASES`
    options: BenchOptions,
    folder: str | Path,  # prefix rows and feature dumps
) -> dict:  # `"sides"`: a dictionary of lists, one entry a round, for `ours`, `bf16` and `peer`
    "Train and evaluate a system and its peer in turns."
    case = TRAINING_CASES[name]
    with TemporaryDirectory() as scratch:
        workers = _sides(name, options, folder, scratch)
        try:
            sides = {side: _warm(worker, side, options) for side, worker in workers.items()}
            for _ in range(options.rounds):
                for side, worker in workers.items(): _round(worker, sides[side], case)
            for side, worker in workers.items(): _count_floor(worker, sides[side])
            peer = peer_name(case, workers["peer"]) if "peer" in workers else None
        finally:
            for worker in workers.values(): worker.close()
    return {"title": case.title, "phase": case.phase, "goal": case.goal, "peer": peer, "sides": sides}

def _warm(worker, side, options):
    "Take first steps, and choose how many steps a round has."
    worker.ask(do="train", steps=2)
    step = worker.ask(do="train", steps=2)["seconds"] / 2
    facts = {"prepared_memory" if key == "memory" else key: value for key, value in worker.facts.items()}
    steps = int(min(max(options.round_seconds / step, 3), facts["steps_per_epoch"]))
    return {**facts, "steps": steps, "operations": None, "rounds": []}

def _round(worker, side, case):
    "Measure one round of one side, and append it."
    start, train = worker.ask(do="start"), worker.ask(do="train", steps=side["steps"])
    step = train["seconds"] / train["steps"]
    found = {"start_seconds": start["seconds"], "step_seconds": step, "memory": max(start["memory"], train["memory"]),
             "targets_per_second": side["n_targets"] / (start["seconds"] + side["steps_per_epoch"] * step)}
    if "rate" in train: found["rate"] = train["rate"]
    if case.phase == "finetune":
        ranked = worker.ask(do="evaluate")
        found |= {"users_per_second": ranked["rows"] / ranked["seconds"], "evaluation_memory": ranked["memory"]}
    side["rounds"].append(found)

def _count_floor(worker, side):
    "Count the operations of a step of ours, last of all because that takes memory; compare with the machine's rate."
    if "recbole" in side: return
    side["operations"] = worker.ask(do="count", steps=min(side["steps"], 8))["operations"]
    for found in side["rounds"]: found["share"] = side["operations"] / found.pop("rate") / found["step_seconds"]

def measure_job(
    job: str,  # key of `JOBS`: `"machine"`, `"interests"`, `"features"`, `"prepare"`, `"growth_users"`, ...
    options: BenchOptions,
    **settings,  # of the job
) -> dict:  # what it found, with `"memory"`
    "Measure something of ours in a fresh process."
    command = own_command(kind=job, threads=options.threads, device=options.device, **settings)
    with BenchWorker(command, options.threads, job) as worker: return worker.ask(do="run")

def measure_startup(
    options: BenchOptions,
) -> dict:  # `"startup"`: what is started -> seconds, one entry a round; `"startup_memory"`: -> bytes at most
    "Time what a user waits for before anything happens."
    run = "runpy.run_module('mmseqrec', run_name='__main__')"
    commands = {"import mmseqrec": ["-c", "import mmseqrec"],
                "import mmseqrec.training": ["-c", "import mmseqrec.training"],
                "mmseqrec --help": ["-c", f"import runpy, sys; sys.argv[1:] = ['--help']; {run}"]}
    watch = ("import atexit, sys\nfrom pathlib import Path\n" + inspect.getsource(process_memory)
             + "atexit.register(lambda: print(process_memory(peak=True), file=sys.stderr))\n")
    def start(rest): return subprocess.run([sys.executable, *rest], capture_output=True, text=True, check=True)
    def memory(rest): return int(start(["-c", watch + rest[1]]).stderr.split()[-1])
    rounds = max(options.rounds, 2)
    return {"startup": {name: [measure_seconds(lambda: start(rest))[0] for _ in range(rounds)][1:]
                        for name, rest in commands.items()},
            "startup_memory": {name: memory(rest) for name, rest in commands.items()}}
