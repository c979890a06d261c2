"Every page runs from a fresh interpreter, offline and on one thread, warns of nothing and shows what it stores."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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

def alt_faults(cells):
    "Return what is wrong with the alt texts of a page: cell id -> fault. One image, one text that tells what it shows."
    faults, seen = {}, set()
    for cell in cells:
        n_images = sum(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {}))
        alts = [line[3:] for line in "".join(cell["source"]).splitlines() if re.match(r"#\| fig-alt: ", line)]
        alts = [alt for line in alts for alt in (lambda x: [x] if isinstance(x, str) else x)(yaml.safe_load(line)["fig-alt"])]
        if len(alts) != n_images: faults[cell["id"]] = f"{n_images} images, {len(alts)} alt texts"
        elif any(len(alt.split()) < 4 or alt in seen for alt in alts): faults[cell["id"]] = f"{alts} does not tell this image from others"
        seen |= set(alts)
    return faults

@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_figure_has_alt_text(page):
    "The first line of a cell that draws is its alt text, for readers who do not see the figure."
    faults = alt_faults(json.loads(page.read_text(encoding="utf-8"))["cells"])
    assert not faults, f'begin each of these cells with a line such as #| fig-alt: "Two bars, the left one higher": {faults}'

def test_a_missing_alt_text_is_found():
    image = {"data": {"image/png": "", "text/plain": ""}}
    def faults(source, n=1): return alt_faults([{"id": "a", "source": [source], "outputs": [image] * n}])
    assert faults("plot()") and faults('#| fig-alt: "A plot"\nplot()') and faults('#| fig-alt: "One bar beside another"', 2)
    assert not faults('#| fig-alt: "One bar beside another"\nplot()') and not faults("print()", 0)
    assert not faults('#| fig-alt: ["One bar beside another", "The same on paper"]', 2)

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
