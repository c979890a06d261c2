"Functions that a page defines for itself: figures and measurements that nothing else uses are not in the package."
import ast
import json
import re
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

PAGES = Path(__file__).parent.parent / "nbs"


def _definitions(source):
    "Return the imports of a cell, or all of a cell that holds nothing but functions and constants; else nothing."
    body = ast.parse(source).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    constants = [node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()]
    return body if functions and len(functions) + len(constants) == len(body) else imports


@lru_cache(maxsize=None)
def page_functions(module):
    "Run what a page imports and the functions that it defines without exporting them; `module` names the page."
    page = next(PAGES.glob(f"*_{module}.ipynb"))
    names = dict(vars(import_module(f"mmseqrec.{module}")))
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.match(r"#\|\s*(export|hide|eval|default_exp)", source): continue
        exec(compile(ast.Module(_definitions(source), []), f"{page.name}#{cell['id']}", "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if not name.startswith("__")})
