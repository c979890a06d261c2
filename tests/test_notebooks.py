"Every page runs from a fresh interpreter, offline and on one thread, warns of nothing and shows what it stores."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pages import page_process

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))


def outputs(page):
    "Return cell id -> kinds of output, in order."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return {c["id"]: [o.get("name") or o["output_type"] for o in c["outputs"]] for c in cells if c.get("outputs")}

def numbers(page):
    "Return the decimal numbers that a page's code cells print, in order."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for c in cells for o in c.get("outputs", [])]
    return [float(number) for text in texts for number in re.findall(r"\d+\.\d+", text)]

@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_runs(page, tmp_path):
    copy, process = page_process(page, tmp_path)
    ran = subprocess.run(**process, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr, ran.stderr
    shown = outputs(copy)
    assert not [id for id, kinds in shown.items() if "stderr" in kinds], "a cell warns"
    assert sorted(shown) == sorted(outputs(page)), "the page is not stored as it runs: run all cells and save"
    if page.stem == "index":  # its seed makes the numbers of README.md repeat, to rounding on another processor
        assert numbers(page) and numbers(copy) == pytest.approx(numbers(page), abs=.01)

@pytest.mark.slow
def test_pages_are_ready_for_the_site(tmp_path):
    "A broken directive or symbol fails here; rendering itself needs Quarto."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".*"))
    for name in ("pyproject.toml", "_quarto.yml"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mmseqrec").symlink_to(ROOT / "mmseqrec")
    code = "from nbdev.serve import proc_nbs; proc_nbs('nbs', n_workers=0)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True)
    assert ran.returncode == 0 and "Unable to resolve" not in ran.stdout + ran.stderr, ran.stderr
    assert {p.name for p in (tmp_path / "_proc").glob("*.ipynb")} == {p.name for p in PAGES}
    for page in (tmp_path / "_proc").glob("*.ipynb"): assert "error" not in sum(outputs(page).values(), [])
