"""How large the house is: `python tests/house.py` prints it, `test_structure.py` holds it to the design's limits.

*Body lines* are lines of function bodies without signatures, docstrings, comments and blank lines. The body of an
*exported cell* is its lines without directives, blank lines and the continuation of signatures.
"""
import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(tree): return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]

def docstring(node):
    "Return the first statement of a function if it is a docstring."
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return first if is_text else None

def body_lines(path):
    "Count the lines of a module's function bodies."
    text = path.read_text(encoding="utf-8")
    inside, outside = set(), set()
    for node in functions(ast.parse(text)):
        inside |= set(range(node.body[0].lineno, node.end_lineno + 1))
        outside |= set(range(node.lineno, node.body[0].lineno))
        if (text_node := docstring(node)): outside |= set(range(text_node.lineno, text_node.end_lineno + 1))
    lines = text.splitlines()
    return sum(1 for n in inside - outside if lines[n - 1].strip() and not lines[n - 1].strip().startswith("#"))

def modules(): return sorted(p for p in (ROOT / "mmseqrec").rglob("*.py") if p.name != "_modidx.py")

def cell_lines(source):
    "Count the lines of an exported cell's body."
    lines = [line for line in source.splitlines() if not line.startswith(("#|", "%", "!"))]
    signatures = set()
    for node in functions(ast.parse("\n".join(lines))): signatures |= set(range(node.lineno + 1, node.body[0].lineno))
    return sum(1 for n, line in enumerate(lines, 1) if line.strip() and n not in signatures)

def exported_cells():
    "Yield the page, the id and the body lines of each exported cell."
    for page in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"^#\|\s*export[si]?\b", source, re.M):
                yield page.stem, cell["id"], cell_lines(source)

def public_names():
    import mmseqrec
    return sorted(name for names in mmseqrec.PUBLIC.values() for name in names.split())

LATER = ("features/sentences.py", "models/classical.py", "experiments/cold_start.py",  # modules of pages that came after the limit of 5,000 lines was set
         "experiments/cross_domain.py", "experiments/published.py", "experiments/gallery.py", "viz/attention.py", "viz/explorers.py")

def figures():
    "Return the figures of the house by name."
    cells = [n for _, _, n in exported_cells()]
    later = sum(body_lines(ROOT / "mmseqrec" / module) for module in LATER)
    return {"body lines": sum(map(body_lines, modules())) - later, "body lines of later pages": later,
            "exported cells": len(cells), "median cell": statistics.median(cells), "longest cell": max(cells), "public names": len(public_names())}


if __name__ == "__main__":
    for path in modules(): print(f"{body_lines(path):6d}  {path.relative_to(ROOT)}")
    for page in sorted({page for page, _, _ in exported_cells()}):
        sizes = [n for other, _, n in exported_cells() if other == page]
        print(f"{statistics.median(sizes):6g}  median, {max(sizes)} longest of {len(sizes)} cells: {page}")
    for name, figure in figures().items(): print(f"{figure:6g}  {name}")
