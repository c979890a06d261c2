"""Parity with code that nobody here wrote: same weights, same scores, losses and gradients.

`MMSEQREC_PEERS=FOLDER python -m pytest tests/parity` runs it, where FOLDER holds checkouts named UniSRec, MISSRec, MP4SR and
MMSRec; RecBole 1.2.1, torchmetrics, and ir-measures with pytrec-eval-terrier are installed packages. What is not there is skipped, and says so.
`MMSEQREC_PARITY_OUT=FILE` writes the differences, for page 59.
"""
import math
import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mmseqrec.artifacts import provenance, write_json

LIMIT = 1e-6  # in 64 bits, relative to the largest number compared if that is above 1
ROWS = []


@pytest.fixture(autouse=True)
def doubles():
    "All of it in 64 bits, and the same numbers whatever ran before."
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def peer():
    "Give the folder of a checked-out peer, or skip."
    def find(name):
        folder = Path(os.environ.get("MMSEQREC_PEERS", "")) / name
        if not os.environ.get("MMSEQREC_PEERS") or not folder.is_dir():
            pytest.skip(f"no checkout of {name}: set MMSEQREC_PEERS to the folder that holds it")
        return folder
    return find


@pytest.fixture
def compare(request):
    """Compare ours with theirs, and keep the row: `compare(peer, system, what, ours, theirs, note="")`.

    `differs=True` is for a difference that stays by choice: then it must be larger than the limit, and the note says why.
    """
    def check(peer, system, what, ours, theirs, note="", differs=False):
        ours, theirs = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
        assert ours.shape == theirs.shape, (what, tuple(ours.shape), tuple(theirs.shape))
        off = float((ours - theirs).abs().max()) / max(1., float(theirs.abs().max()))
        row = {"peer": peer, "system": system, "what": what, "numbers": theirs.numel(), "difference": off, "by_choice": differs, "note": note}
        request.node.user_properties.append(("parity", row))
        assert math.isfinite(off), f"{peer}, {system}, {what}: {off}"
        assert (off > LIMIT) == differs, f"{peer}, {system}, {what}: {off:.2e}"
        if differs: assert note, "say why it differs"
    return check


def pytest_runtest_logreport(report):
    "Gather the rows, also those of workers."
    if report.when == "call": ROWS.extend(row for name, row in report.user_properties if name == "parity")


def _version(name):
    "Name the commit of a checkout, or the version of a package; `None` if it is not there."
    folder = Path(os.environ.get("MMSEQREC_PEERS", "")) / name
    if os.environ.get("MMSEQREC_PEERS") and (folder / ".git").exists():
        return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None


def pytest_sessionfinish(session):
    "Write the rows, if a file was asked for."
    out = os.environ.get("MMSEQREC_PARITY_OUT")
    if not out or not ROWS or hasattr(session.config, "workerinput"): return
    rows = sorted(ROWS, key=lambda r: (r["peer"], r["system"], r["what"]))
    peers = {name: _version(name) for name in sorted({row["peer"] for row in rows})}
    write_json(out, {"rows": rows, "peers": peers, "limit": LIMIT, "provenance": provenance()})
