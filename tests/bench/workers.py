"Processes that are measured: ours, and the peers' in their own Python."
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent

class BenchWorker:
    "A process that is measured; raises `RuntimeError` with its last words if it ends too early."
    def __init__(
        self,
        command: Sequence[str],  # program and arguments
        threads: int = 1,  # that it may use
        title: str = "the process",  # what error messages call it
        folder: str | None = None,  # where it runs
    ):
        names = "OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS POLARS_MAX_THREADS RAYON_NUM_THREADS".split()
        env = {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "agg",
               "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self.title, self._scratch = title, TemporaryDirectory()
        self._errors = open(Path(self._scratch.name) / "errors", "w+", errors="replace")
        self._process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
                                         stderr=self._errors, text=True, cwd=folder)
        try: self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(
        self,
        **job,  # `do`: the command; and its arguments
    ) -> dict:  # `seconds`, `memory`, and what the command says
        "Have a command carried out."
        try: print(json.dumps(job), file=self._process.stdin, flush=True)
        except BrokenPipeError: pass
        return self._answer()

    def close(self) -> None:
        "End the process."
        if self._process.poll() is None: self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try: stream.close()
            except BrokenPipeError: pass
        self._scratch.cleanup()

    def __enter__(self): return self
    def __exit__(self, *error): self.close()

    def _answer(self):
        if (line := self._process.stdout.readline()): return json.loads(line)
        self._errors.seek(0)
        words = [line.strip() for line in self._errors.read().splitlines() if line.strip()] or ["nothing"]
        raise RuntimeError(f"{self.title} ended before it answered; its last words: {words[-1]}")

def own_command(**job):
    "The command that measures something of ours in a fresh process."
    return [sys.executable, str(HERE), "--worker", json.dumps(job)]

def peer_folder(folder, scratch, pretrain):
    "Lay out prefix rows and dumps where the peers look for them; return the name of the data set."
    found, = Path(folder).glob("*.train.inter")
    name = found.name.partition(".")[0]
    target = Path(scratch) / ("Pre" if pretrain else name)
    target.mkdir()
    for path in Path(folder).resolve().glob(f"{name}.*"):
        if not pretrain or "feat" in path.suffix: (target / path.name).symlink_to(path)
    if pretrain:
        head, *rows = found.read_text().splitlines()
        parts = [row.split("\t") for row in rows]
        marked = ["\t".join([u, " ".join(f"0-{i}" for i in seq.split()), f"0-{item}"]) for u, seq, item in parts]
        (target / "Pre.train.inter").write_text("\n".join([head, *marked]) + "\n")
        (target / "Pre.pt_datasets").write_text(name)
    return target.name

def peer_worker(case, options, folder, scratch):
    "Start the process that measures a peer."
    pretrain = case.phase == "pretrain"
    driver = HERE / "drivers" / f"peer_{case.peer}.py"
    code = {"unisrec": options.unisrec_code, "missrec": options.missrec_code}.get(case.peer)
    job = {"folder": str(scratch), "name": peer_folder(folder, scratch, pretrain), "threads": options.threads,
           "cuda": options.device != "cpu", "code": code and str(Path(code).resolve()), "config": options.sizes,
           "feature_size": options.feature_size(folder), **case.peer_settings}
    return BenchWorker([options.recbole_python, str(driver), json.dumps(job)], options.threads,
                       f"{case.title} of the released code", str(scratch))

def peer_name(case, worker):
    "Say what a case was compared with."
    if "recbole" not in worker.facts:
        return f"reference mode, not the released code (on another machine that reached {case.quoted})"
    title = {"unisrec": "UniSRec, released code", "missrec": "MISSRec, released code"}.get(case.peer, "")
    return f"{title}{' on ' if title else ''}RecBole {worker.facts['recbole']}"
