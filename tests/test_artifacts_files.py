"Files that are whole or absent, whatever the disk, the network or a kill does."
import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mmseqrec.artifacts as artifacts
from mmseqrec.artifacts import (artifact_path, atomic_folder, atomic_path, compute_or_load, download, file_sha256,
                                fingerprint, provenance, read_json, write_json)

PAYLOAD = bytes(range(256)) * 400
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


# Atomic writes

def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]

def test_write_into_a_new_folder(tmp_path):
    with atomic_path(tmp_path / "b/c/a.txt") as temporary: temporary.write_text("new")
    assert (tmp_path / "b/c/a.txt").read_text() == "new"

@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
@pytest.mark.parametrize("kind", ["atomic_path", "atomic_folder"])
def test_killed_write_keeps_the_old_file(tmp_path, kind):
    target = tmp_path / "result"
    file = target if kind == "atomic_path" else target / "part"
    inner = "t" if kind == "atomic_path" else "t / 'part'"
    with getattr(artifacts, kind)(target) as t: (t if kind == "atomic_path" else t / "part").write_text("old")
    code = (f"import sys, time\nfrom mmseqrec.artifacts import {kind}\nwith {kind}(sys.argv[1]) as t:\n"
            f"    ({inner}).write_text('half')\n    print('written', flush=True)\n    time.sleep(60)")
    env = {**os.environ, "PYTHONPATH": str(Path(artifacts.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code, target], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert file.read_text() == "old"
    with getattr(artifacts, kind)(target) as t: (t if kind == "atomic_path" else t / "part").write_text("new")
    assert file.read_text() == "new"

def test_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_folder(target) as folder: (folder / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["second"] and [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "third").write_text("half")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["second"] and [p.name for p in tmp_path.iterdir()] == ["model"]

def test_folder_survives_a_failed_swap(tmp_path, monkeypatch):
    target, replace = tmp_path / "model", os.replace
    with atomic_folder(target) as folder: (folder / "weights").write_text("old")
    def fail(source, destination):
        if str(source).endswith(".tmp"): raise OSError("disk full")
        replace(source, destination)
    with pytest.raises(OSError), atomic_folder(target) as folder:
        (folder / "weights").write_text("new")
        monkeypatch.setattr(os, "replace", fail)
    kept = [p.read_text() for p in tmp_path.rglob("weights")]
    assert "old" in kept, "the old folder is gone although the new one did not arrive"


# JSON

def test_json_round_trip(tmp_path):
    value = {"a": np.float32(.5), "b": np.arange(3), "c": [None, True, "ü"], "d": Path("x")}
    assert read_json(write_json(tmp_path / "a.json", value)) == {"a": .5, "b": [0, 1, 2], "c": [None, True, "ü"], "d": "x"}

def test_damaged_json_names_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"a\.json, line 2"): read_json(tmp_path / "a.json")


# Fingerprints

def test_equal_parts_have_equal_fingerprints():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint((1, 2)) == fingerprint([1, 2]), "JSON turns tuples into lists"
    assert fingerprint(np.arange(6).reshape(2, 3)[:, ::2]) == fingerprint(np.array([[0, 2], [3, 5]]))
    assert re.fullmatch("[0-9a-f]{16}", fingerprint())

def test_different_parts_have_different_fingerprints():
    parts = [(), (None,), ("",), (b"",), (0,), (0.,), (False,), ("0",), ([],), ({},), ([[]],), ("ab", "c"), ("a", "bc"),
             (["a"], "b"), (["a", "b"],), ({"a": 1},), ([["a", 1]],), ({1: "a"},), ({"1": "a"},), (1e-300,), (float("nan"),),
             (np.zeros(2),), (np.zeros(2, np.float32),), (np.zeros((2, 1)),), (np.zeros(0),), ([0., 0.],)]
    marks = [fingerprint(*p) for p in parts]
    same = [(parts[i], parts[j]) for i in range(len(parts)) for j in range(i) if marks[i] == marks[j]]
    assert same == []

def test_fingerprint_of_an_object_is_refused():
    with pytest.raises(TypeError, match="set"): fingerprint({1, 2})
    with pytest.raises(TypeError, match="object"): fingerprint(np.array([object()]))

def test_checksum(tmp_path):
    (tmp_path / "a").write_bytes(PAYLOAD)
    assert file_sha256(tmp_path / "a") == SHA256


# Downloads

class Handler(http.server.BaseHTTPRequestHandler):
    "Serves PAYLOAD; the address says how badly."
    def do_GET(self):
        self.server.requests.append(self.headers.get("Range"))
        start = int((re.search(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        if self.path == "/missing": return self.send_error(404)
        if self.path == "/no-range": start = 0
        elif start >= len(PAYLOAD): return self.send_error(416)
        body = PAYLOAD[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:1000] if self.path == "/cut" and not start else body)

    def log_message(self, *args): pass

@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()

def test_download_once(server, tmp_path):
    for _ in range(2): path = download(f"{server.url}/whole", tmp_path / "new/a.bin", SHA256, progress=False)
    assert path.read_bytes() == PAYLOAD and server.requests == [None]

def test_cut_download_continues(server, tmp_path):
    with pytest.raises(ConnectionError, match="call again to continue"):
        download(f"{server.url}/cut", tmp_path / "a.bin", SHA256, progress=False)
    assert not (tmp_path / "a.bin").exists() and (tmp_path / "a.bin.part").stat().st_size == 1000
    path = download(f"{server.url}/cut", tmp_path / "a.bin", SHA256, progress=False)
    assert path.read_bytes() == PAYLOAD and server.requests == [None, "bytes=1000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]

def test_server_that_ignores_range(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(PAYLOAD[:1000])
    assert download(f"{server.url}/no-range", tmp_path / "a.bin", SHA256, progress=False).read_bytes() == PAYLOAD

def test_part_that_is_already_whole(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(PAYLOAD)
    assert download(f"{server.url}/whole", tmp_path / "a.bin", SHA256, progress=False).read_bytes() == PAYLOAD
    assert server.requests == [f"bytes={len(PAYLOAD)}-"]

@pytest.mark.parametrize("part", [b"", b"x" * 1000, b"x" * (len(PAYLOAD) + 1)], ids=["none", "damaged", "too-long"])
def test_wrong_checksum_keeps_nothing(server, tmp_path, part):
    if part: (tmp_path / "a.bin.part").write_bytes(part)
    with pytest.raises(ValueError, match="checksum"):
        download(f"{server.url}/whole", tmp_path / "a.bin", SHA256 if part else "0" * 64, progress=False)
    assert list(tmp_path.iterdir()) == []

def test_file_with_another_checksum_is_fetched_again(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"older version")
    assert download(f"{server.url}/whole", tmp_path / "a.bin", SHA256, progress=False).read_bytes() == PAYLOAD

def test_missing_file_and_refused_connection(server, tmp_path):
    with pytest.raises(ConnectionError, match="404"): download(f"{server.url}/missing", tmp_path / "a", progress=False)
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="call again"): download(f"{server.url}/whole", tmp_path / "a", progress=False)
    assert list(tmp_path.iterdir()) == []


# Stored results

def test_compute_or_load_computes_once_per_input(tmp_path):
    calls = []
    run = lambda inputs: compute_or_load(tmp_path / "r.json", lambda: calls.append(1) or {"n": len(calls)}, inputs)
    assert run({"seed": 0, "size": (1, 2)}) == run({"size": [1, 2], "seed": 0}) and len(calls) == 1
    assert run({"seed": 1})["result"] == {"n": 2}, "other inputs make the stored result stale"
    assert run({"seed": 1})["provenance"]["versions"]["torch"]

def test_failed_compute_stores_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError): compute_or_load(tmp_path / "r.json", lambda: {"n": 1 / 0}, {})
    assert list(tmp_path.iterdir()) == []

def test_provenance_keeps_what_it_is_given():
    assert provenance(seconds=2)["seconds"] == 2

def test_missing_artifact_has_a_remedy():
    with pytest.raises(FileNotFoundError, match="reinstall"): artifact_path("no", "such.file")
