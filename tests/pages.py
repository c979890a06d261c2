"Functions that a page defines for itself (what nothing else uses is not in the package), and how a page is run."
import ast
import json
import os
import re
import shutil
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "nbs"


def _definitions(source):
    "Return the imports of a cell, or all of a cell that holds nothing but functions and constants; else nothing."
    body = ast.parse(source).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    constants = [node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()]
    return body if functions and len(functions) + len(constants) == len(body) else imports


@lru_cache(maxsize=None)
def page_functions(module):
    "Run what a page imports and the functions that it defines without exporting them; its module, if it has one, names the page."
    page = next(PAGES.glob(f"*_{module}.ipynb"))
    has_module = (ROOT / "mmseqrec" / (module.replace(".", "/") + ".py")).exists()
    names = dict(vars(import_module(f"mmseqrec.{module}"))) if has_module else {}
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.match(r"#\|\s*(export|hide|eval|default_exp)", source): continue
        exec(compile(ast.Module(_definitions(source), []), f"{page.name}#{cell['id']}", "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if not name.startswith("__")})


def page_process(page, folder):
    "Copy a page to an empty folder; return the copy, and how to start the process that executes it there and saves it."
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    copy = Path(shutil.copy(page, folder / "nbs"))
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("MPLBACKEND", None)  # figures are shown inline
    code = "import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], n_workers=0, save=True)"
    return copy, dict(args=[sys.executable, "-c", code, str(copy)], cwd=folder, env=env)
