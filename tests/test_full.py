"A full disk and memory that runs out: one sentence that names the file or the setting, nothing half-written, and the run goes on."
import errno
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from killed_runs import make_clip
from mmseqrec import artifacts, core, training
from mmseqrec.app import cli
from mmseqrec.artifacts import atomic_folder, atomic_path, clear_leftovers, download, reserve, told_if_full, write_json
from mmseqrec.core import told_if_short
from mmseqrec.experiments import run as experiments
from mmseqrec.features import encoders
from mmseqrec.recommender import export_vectors
from small_shop import shell, write_shop
from small_world import build

resource = pytest.importorskip("resource", reason="limits of files are POSIX")
ROOT = Path(__file__).parent.parent
SETTINGS = ("--systems", "sasrec", "mp4sr", "--hidden-size", 16, "--max-len", 10, "--epochs", 2, "--pretrain-epochs", 2,
            "--batch-size", 64, "--pretrain-batch-size", 16, "--device", "cpu", "--n-keywords", 4, "--quiet")


def is_one_sentence(text): return len(text.strip().splitlines()) == 1 and "Traceback" not in text

def unfinished(folder): return [path.name for path in folder.rglob("*") if re.search(r"\.(tmp|old)$", path.name)]

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "Options that name two tables, pictures and a tiny CLIP."
    folder = tmp_path_factory.mktemp("shop")
    (folder / "clip").mkdir()
    make_clip(folder / "clip")
    files = write_shop(folder / "shop")
    named = [word for name in ("interactions", "items", "images") for word in (f"--{name}", files[name])]
    return [*named, "--min-item", 1, "--text-encoder", folder / "clip", "--image-encoder", folder / "clip", *SETTINGS]

@pytest.fixture(scope="module")
def done(shop, tmp_path_factory):
    "The table of a run that nothing disturbed."
    folder = tmp_path_factory.mktemp("done")
    assert cli.main([str(word) for word in ("run", *shop, "--out", folder)]) == 0
    return metrics(folder)

@pytest.fixture
def table_only(monkeypatch):
    "Let runs write their table without figures."
    monkeypatch.setattr(cli, "_write_report", lambda run, folder, command: write_json(folder / "table.json", experiments.result_table(run)))

def metrics(folder):
    rows = artifacts.read_json(folder / "table.json")
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows]

def refused(folder, code, err):
    "The command ended with one sentence that names a file of its folder and the remedy; return the file's name."
    found = re.fullmatch(r"mmseqrec run: (.+) cannot be written: the disk is full, or a quota or limit is reached; free some space and "
                         r"start the same again \(what is finished is kept\), or choose another folder \(--out\)\n", err)
    assert code == 2 and is_one_sentence(err) and found, err
    assert Path(found[1]).is_relative_to(folder) and ".tmp" not in found[1], found[1]
    assert not unfinished(folder.parent), unfinished(folder.parent)
    return Path(found[1]).relative_to(folder)

@contextmanager
def at_most(n_bytes):
    "Let no file of this process grow beyond some bytes."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# A full disk

def test_each_file_of_a_run_may_be_the_one_that_does_not_fit(shop, done, tmp_path, capsys):
    "The run goes on each time there is more room, and ends with the undisturbed numbers."
    folder, names = tmp_path / "run", []
    for limit in (600, 1500, 60_000, 700_000):
        with at_most(limit): code, out, err = shell(capsys, "run", *shop, "--out", folder)
        names.append(str(refused(folder, code, err)).partition(".")[0])
    assert names == ["run", "models/popularity-seed0", "models/sasrec-seed0-finetune", "report"]
    assert (folder / "models/mp4sr-seed0/result.json").exists()
    assert shell(capsys, "run", *shop, "--out", folder)[0] == 0 and metrics(folder) == done and not unfinished(folder)

def test_the_marketplace_on_a_full_disk(tmp_path, capsys):
    words = ("run", "--n-users", 60, "--n-items", 30, "--systems", "popularity", "--device", "cpu", "--quiet", "--out", tmp_path / "run")
    with at_most(1500): code, out, err = shell(capsys, *words)
    assert str(refused(tmp_path / "run", code, err)) == "data" and not (tmp_path / "run/data").exists()

@contextmanager
def small_disk(folder, size):
    "Mount a disk of `size` bytes at a folder."
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                                                   capture_output=True).returncode == 0
    if not mounted: pytest.skip("a disk cannot be mounted here")
    try: yield folder
    finally: subprocess.run(["umount", "--lazy", folder], check=True)

@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_run_on_a_small_disk_goes_on_when_there_is_room(shop, done, tmp_path, capsys, table_only):
    "A real full disk; mapped tables included, of which the system would kill the process."
    with small_disk(tmp_path / "disk", 400_000) as disk:
        names = []
        for full in (396_000, 250_000):
            (disk / "ballast").write_bytes(b"x" * full)
            code, out, err = shell(capsys, "run", *shop, "--out", disk / "run")
            names.append(str(refused(disk / "run", code, err)).partition("-")[0])
        assert names == ["features/text", "models/sasrec"]
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert shell(capsys, "run", *shop, "--out", disk / "run")[0] == 0 and metrics(disk / "run") == done

@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room")
def test_mapped_tables_ask_for_their_room_first(tmp_path):
    with at_most(500):
        with pytest.raises(OSError), open(tmp_path / "a", "wb") as file: reserve(file, 2000)
        with pytest.raises(OSError, match="text.safetensors cannot be written: the disk is full"):
            encoders._map_new_table(tmp_path / "text.safetensors", (100, 16), "float32")
        with pytest.raises(OSError, match="items.safetensors cannot be written: the disk is full"):
            export_vectors(build("sasrec"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC])
def test_a_file_system_that_reserves_nothing_is_written_to(number, tmp_path, monkeypatch):
    def refuse(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with open(tmp_path / "a", "wb") as file:
        if number != errno.ENOSPC: return reserve(file, 2000)
        with pytest.raises(OSError, match="No space"): reserve(file, 2000)

@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    OSError(errno.EFBIG, os.strerror(errno.EFBIG)), OSError(errno.ENOSPC, "There is not enough space on the disk"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_each_library_says_it_in_its_own_way(error, tmp_path):
    for write in (atomic_path, atomic_folder, told_if_full):
        with pytest.raises(OSError, match="a.bin cannot be written: the disk is full"), write(tmp_path / "a.bin"): raise error
    with pytest.raises(OSError, match="/model cannot be written"), atomic_folder(tmp_path / "model") as folder:
        with atomic_path(folder / "weights"): raise error
    assert not list(tmp_path.iterdir())

def test_other_errors_stay_as_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "Permission denied", "a"), ValueError("too large"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "a.bin"): raise error
        assert caught.value is error

def test_a_download_that_finds_no_room_keeps_what_arrived(tmp_path, monkeypatch):
    def full(*_): raise ConnectionError("https://x: [Errno 28] No space left on device; call again to continue at 3 bytes")
    monkeypatch.setattr(artifacts, "_fetch", full)
    with pytest.raises(OSError, match="a.bin.part cannot be written: the disk is full"): download("https://x", tmp_path / "a.bin")

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_table_that_cannot_be_printed(shop, tmp_path):
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-m", "mmseqrec", "run", *map(str, shop), "--out", tmp_path / "run"], stdout=full,
                             stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 2 and is_one_sentence(ran.stderr), ran.stderr
    assert ran.stderr.startswith("mmseqrec run: standard output cannot be written: the disk is full")


# What killed processes left

def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid

def test_only_what_killed_processes_left_is_cleared(tmp_path):
    pid, living = ended_process(), os.getppid()
    for name in (f".data.{pid}.tmp/images/a.png", f"models/.sasrec-seed0.{pid}.old/config.json", f"models/.a.safetensors.{pid}.tmp",
                 f".run.json.{pid}.tmp", f".data.{living}.tmp/b.csv", f".b.json.{living}.tmp", ".hidden.json", "a.1.tmp",
                 f"elsewhere/.a.json.{pid}.tmp", ".x.tmp"):
        write_json(tmp_path / name, name)
    clear_leftovers(tmp_path, ("models", "none"))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([f".data.{living}.tmp/b.csv", f".b.json.{living}.tmp", ".hidden.json", "a.1.tmp",
                           f"elsewhere/.a.json.{pid}.tmp", ".x.tmp", "models/sasrec-seed0/config.json"])  # it has its name back
    clear_leftovers(tmp_path / "nowhere")

def test_an_old_folder_goes_where_a_new_one_took_its_name(tmp_path):
    pid = ended_process()
    for name in ("model/config.json", f".model.{pid}.old/config.json"): write_json(tmp_path / name, name)
    clear_leftovers(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == ["model/config.json"]

def test_a_run_begins_by_clearing(shop, tmp_path, capsys, table_only):
    pid = ended_process()
    for name in (f".data.{pid}.tmp/a.csv", f"models/x/.ranks.{pid}.tmp", f"features/.lsa.{pid}.old/lsa.json"): write_json(tmp_path / name, 1)
    assert shell(capsys, "run", *shop, "--systems", "popularity", "--out", tmp_path)[0] == 0
    assert not unfinished(tmp_path)


@pytest.mark.slow
def test_a_command_that_is_killed_ends_as_if_nothing_had_been():
    ran = subprocess.run([sys.executable, Path(__file__).with_name("killed_commands.py"), "--kills", "3"], capture_output=True, text=True)
    assert ran.returncode == 0 and re.search(r"3 kills in \d runs, 0 differences, 0 left-overs", ran.stdout), ran.stdout + ran.stderr[-2000:]


# Memory

CUDA = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.77 GiB")

def take_too_much(*_, **__): torch.empty(1 << 50)  # what the CPU's allocator says

def raises(error):
    def act(*_, **__): raise error
    return act

PLACES = {  # where memory runs out -> (what is replaced, what the sentence says)
    "pre-training": (training, "_train_step", "the pre-training of MP4SR; lower --pretrain-batch-size or --max-len"),
    "training": (training, "_train_step", "the training of SASRec over IDs; lower --batch-size or --max-len"),
    "ranking": (experiments, "evaluate", "the ranking by Popularity; lower --max-len or --hidden-size"),
    "reading": (experiments, "read_interactions", "mmseqrec run; give it fewer events, items or histories, or --device cpu"),
}

@pytest.mark.parametrize("act", [take_too_much, raises(CUDA), raises(MemoryError()),
                                 raises(MemoryError("Unable to allocate 8.00 TiB for an array"))])
@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_is_one_sentence(place, act, shop, tmp_path, capsys, monkeypatch):
    owner, name, says = PLACES[place]
    monkeypatch.setattr(owner, name, act)
    systems = ("--systems", "mp4sr" if place == "pre-training" else "sasrec")
    code, out, err = shell(capsys, "run", *shop, *systems, "--out", tmp_path / "run")
    assert code == 2 and err == f"mmseqrec run: memory ran out in {says}, or give the run more memory\n", err
    assert not unfinished(tmp_path) and not (tmp_path / "run/report.html").exists()

def test_after_memory_ran_out_a_smaller_batch_finishes(shop, tmp_path, capsys, monkeypatch, table_only):
    step, steps = training._train_step, []
    def short(accelerator, model, optimizer, phase, limit, history, share):
        steps.append(share[0].n_targets)
        if phase == "finetune" and share[0].n_targets > 40: take_too_much()
        step(accelerator, model, optimizer, phase, limit, history, share)
    monkeypatch.setattr(training, "_train_step", short)
    code, out, err = shell(capsys, "run", *shop, "--out", tmp_path)
    assert code == 2 and "training of SASRec over IDs; lower --batch-size" in err
    assert shell(capsys, "run", *shop, "--batch-size", 16, "--out", tmp_path)[0] == 0 and steps[0] > 40 and max(steps[-9:]) <= 40

def test_other_errors_of_pytorch_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="size of tensor"), told_if_short("x", "y"): torch.ones(2) + torch.ones(3)
    with pytest.raises(MemoryError, match="memory ran out in inner; a, or"), told_if_short("outer", "b"), told_if_short("inner", "a"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert core._NO_MEMORY.search("MPS backend out of memory (MPS allocated: 18.00 GB)")
