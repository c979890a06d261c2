"""`mmseqrec run`, killed at random: `python tests/killed_commands.py [--kills 20] [--seed 0]`.

An undisturbed run comes first. Then the same command is started in a new folder, killed with SIGKILL and started again,
until it ends or was killed five times and is left in peace; then in another new folder, until there were so many kills.
The first kill of a run comes while a folder is being filled under its temporary name, the others at moments drawn uniformly
over the time that the undisturbed run took.
Each finished folder must hold what the undisturbed one holds: all files and no others, all numbers to the digit, report
and tables but for times; and nothing may be left in the system's temporary folder.

Everything is imported once; each life is a forked process that leads a process group of its own, so that it costs no start-up."""
import argparse
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

for name, value in {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}.items():
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).parent.parent))

import mmseqrec.app.report
import mmseqrec.experiments.run
from killed_runs import make_clip
from mmseqrec.app.cli import main as command

SIZES = ("--n-users", 80, "--n-items", 50, "--systems", "sasrec", "mp4sr", "--hidden-size", 16, "--inner-size", 32, "--n-keywords", 4,
         "--epochs", 6, "--pretrain-epochs", 4, "--batch-size", 64, "--max-len", 10, "--device", "cpu", "--quiet")
MOST = 5  # kills of a run
TIMES = ("seconds", "evaluation_seconds", "provenance", "time")


def start(place):
    "Start the command; its run goes to `place/run`, temporary files to `place/tmp`, what it prints to `place/log.txt`."
    (place / "tmp").mkdir(parents=True, exist_ok=True)
    if child := os.fork():
        os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)
        os.chdir(place)
        os.environ["TMPDIR"], tempfile.tempdir = str(place / "tmp"), None
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place / "torch")  # torch makes this folder, and keeps it
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2): os.dup2(log, stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        clip = place.parent / "clip"
        code = command(list(map(str, ("run", *SIZES, "--text-encoder", clip, "--image-encoder", clip, "--out", "run"))))
        for stream in (sys.stdout, sys.stderr): stream.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def is_writing(run): return any(path.is_dir() and path.suffix == ".tmp" for path in run.glob(".*"))


def live(place, seconds=None, in_writing=False):
    "Run the command; kill it after some seconds, or when it writes; return True if it ended by itself."
    child, end = start(place), time.monotonic() + (math.inf if seconds is None else seconds)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(.002)
        if time.monotonic() < end and not (in_writing and is_writing(place / "run")): continue
        os.killpg(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
        if os.WIFSIGNALED(ended[1]): return False
        break
    if ended[1]: raise SystemExit(f"the command ended with {ended[1]}:\n{(place / 'log.txt').read_text()[-3000:]}")
    return True


def reached(run):
    "Say how far a killed run had come, in this life or another, by what it has written."
    steps = {"titles.json": "the report", "models": "training", "features": "encoding", "data": "reading the data", "run.json": "writing the data"}
    return next((step for name, step in steps.items() if (run / name).exists()), "starting")


# Comparison

def without_times(value):
    "Drop what may differ from one run to another: times, and versions that stand beside them."
    if isinstance(value, dict): return {key: without_times(x) for key, x in value.items() if key not in TIMES}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def page_without_times(text):
    "Drop the times of a report: of stages, of trainings, of the day, and the bars that draw them."
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ|\b(\d+ min )?\d+(\.\d)? s\b", "T", text)
    return re.sub(r'class="bar" style="width:[\d.]+%"', "", text)


def content(path):
    "Return what a file holds, to be compared: JSON and report without times, bytes of all others."
    if path.suffix == ".json": return without_times(json.loads(path.read_text(encoding="utf-8")))
    return page_without_times(path.read_text(encoding="utf-8")) if path.suffix == ".html" else path.read_bytes()


def files(folder): return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def compare(place, other):
    "Return which files of `place/run` differ from those of `other/run`, and what was left behind."
    here, there = files(place / "run"), files(other / "run")
    differ = [f"{name}: missing" for name in sorted(there - here)]
    for name in sorted(here & there):
        path = place / "run" / name
        if path.is_file() and content(path) != content(other / "run" / name): differ.append(f"{name}: differs")
    unfinished = {name for name in here if name.endswith((".tmp", ".old", ".part", ".partial", ".journal"))}
    return differ, sorted((here - there) | unfinished) + [f"tmp/{name}" for name in sorted(files(place / "tmp"))]


# Command

def kill_often(n_kills, seed, folder):
    "Make the undisturbed run and the killed ones below `folder`; return kills, runs, differences and left-overs."
    rng, kills, rounds, found = random.Random(seed), 0, 0, ([], [])
    calm = folder / "undisturbed"
    (folder / "clip").mkdir()
    if not (child := os.fork()):  # the network is made elsewhere: nothing that runs here may start threads
        make_clip(folder / "clip")
        os._exit(0)
    os.waitpid(child, 0)
    begin = time.monotonic()
    live(calm)
    duration = time.monotonic() - begin
    print(f"undisturbed: {duration:.0f} s, {len(files(calm / 'run'))} files and folders", flush=True)
    found[1].extend(compare(calm, calm)[1])
    while kills < n_kills:
        rounds, before = rounds + 1, kills
        place = folder / f"run {rounds}"
        has_ended = live(place, in_writing=True)
        while not has_ended:
            kills += 1
            print(f"kill {kills}, run {rounds}: {reached(place / 'run')}", flush=True)
            has_ended = live(place, rng.uniform(0, duration) if kills < n_kills and kills - before < MOST else None)
        for kind, names, told in zip(("difference", "left behind"), found, compare(place, calm)):
            names.extend(told)
            for name in told: print(f"run {rounds}, {kind}: {name}", flush=True)
    return kills, rounds, *found


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Kill `mmseqrec run` at random moments; compare its results with an undisturbed run.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked, begin = parser.parse_args(arguments), time.monotonic()
    with tempfile.TemporaryDirectory() as folder: kills, runs, differ, left = kill_often(asked.kills, asked.seed, Path(folder))
    print(f"{kills} kills in {runs} runs, {len(differ)} differences, {len(left)} left-overs, {time.monotonic() - begin:.0f} s")
    return int(bool(differ or left))


if __name__ == "__main__": sys.exit(main())
