"The rules of the house, checked on every notebook and module there is."
import ast
import builtins
import configparser
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import house
import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
NUMBERED = [p for p in PAGES if p.stem != "index"]
LESSONS = [p for p in NUMBERED if not p.stem.startswith("9")]
BY_HAND = ("__init__.py", "__main__.py")  # nbdev cannot export to `__main__`
MODULES = sorted(p for p in (ROOT / "mmseqrec").rglob("*.py") if p.name not in (*BY_HAND, "_modidx.py"))
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
each_numbered = pytest.mark.parametrize("page", NUMBERED, ids=lambda p: p.stem)
each_lesson = pytest.mark.parametrize("page", LESSONS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: module_name(p))


# Reading notebooks and modules

@functools.cache
def cells(page): return json.loads(page.read_text(encoding="utf-8"))["cells"]

def source(cell): return "".join(cell["source"])

def code_cells(page): return [c for c in cells(page) if c["cell_type"] == "code"]

def directives(cell): return [line for line in source(cell).splitlines() if line.startswith("#|")]

def is_exported(cell): return any(re.match(r"#\|\s*export[si]?\b", line) for line in directives(cell))

def module_name(path): return path.relative_to(ROOT / "mmseqrec").with_suffix("").as_posix().replace("/", ".")

def numbers(): return {p.stem.partition("_")[2]: p.stem[:2] for p in NUMBERED}

@functools.cache
def tree(path): return ast.parse(path.read_text(encoding="utf-8"))

def public_names(path):
    "Names of a module's `__all__`."
    node = next(n for n in tree(path).body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    return ast.literal_eval(node.value)

@functools.cache
def homes(): return {name: module_name(path) for path in MODULES for name in public_names(path)}

def cell_tree(cell):
    "Parse a cell; shell and magic lines become `pass`."
    return ast.parse("\n".join("pass" if re.match(r"\s*[!%]", line) else line for line in source(cell).splitlines()))

def imported(node):
    "Modules of mmseqrec that the imports and the `mmseqrec.name` expressions below `node` need."
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            yield from (a.name[9:] for a in n.names if a.name.startswith("mmseqrec."))
        elif isinstance(n, ast.ImportFrom) and n.module == "mmseqrec":
            yield from (homes().get(a.name, a.name) for a in n.names)
        elif isinstance(n, ast.ImportFrom) and (n.module or "").startswith("mmseqrec."):
            below = [f"{n.module[9:]}.{a.name}" for a in n.names]
            yield from (name if name in numbers() else n.module[9:] for name in below)
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "mmseqrec":
            if n.attr in homes(): yield homes()[n.attr]


# Layers

@each_numbered
def test_imports_come_from_lower_numbers(page):
    number = page.stem[:2]
    for cell in code_cells(page):
        for module in imported(cell_tree(cell)):
            assert module in numbers(), f"cell {cell['id']} imports mmseqrec.{module}, which no notebook makes"
            other = numbers()[module]
            assert other < number, f"cell {cell['id']} imports mmseqrec.{module} of page {other}"
            if number[0] == other[0] == "5" and (is_exported(cell) or other != "50"):  # examples show measuring sticks
                assert (other, number) == ("52", "53"), f"cell {cell['id']}: systems do not import each other"

def test_imported_sees_every_form():
    code = "import mmseqrec.core\nfrom mmseqrec import artifacts, check_shape\nimport mmseqrec\nmmseqrec.set_seed(0)"
    assert sorted(imported(ast.parse(code))) == ["artifacts", "core", "core", "core"]

@each_module
def test_modules_import_neither_nbdev_nor_what_is_not_required(path):
    packages = {"pillow": "PIL", "umap-learn": "umap", "scikit-learn": "sklearn"}
    allowed = {packages.get(name, name) for name in (re.split("[<>=]", r)[0] for r in SETTINGS["requirements"].split())}
    allowed |= {"mmseqrec", "tokenizers", "IPython"} | set(sys.stdlib_module_names)
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.names[0].name != "*", f"line {node.lineno}: no star imports"
            names = [] if node.level else [node.module]  # nbdev makes imports within the package relative
        for name in names: assert name.partition(".")[0] in allowed, f"line {node.lineno} imports {name}"


# One name for notebook, module and page

@each_numbered
def test_notebook_module_and_page_share_a_name(page):
    assert re.fullmatch(r"\d\d_[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*", page.stem)
    named = [source(c).split()[-1] for c in code_cells(page) if "default_exp" in source(c).partition("\n")[0]]
    if any(map(is_exported, code_cells(page))): assert named == [page.stem[3:]]
    else: assert not named, "nothing is exported, so no module should be named"

def test_modules_and_notebooks_match():
    exporting = {p.stem[3:] for p in NUMBERED if any(map(is_exported, code_cells(p)))}
    assert {module_name(p) for p in MODULES} == exporting
    assert len({p.stem[:2] for p in NUMBERED}) == len(NUMBERED), "two notebooks have one number"


# Generated files equal their source

@pytest.fixture
def copy(tmp_path):
    "The notebooks and what nbdev reads, in a temporary folder."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".*"))
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mmseqrec").mkdir()
    for name in BY_HAND: shutil.copy(ROOT / "mmseqrec" / name, tmp_path / "mmseqrec")
    return tmp_path

def nbdev(command, folder):
    env = {**os.environ, "PYTHONPATH": str(folder)}
    ran = subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

def test_export_changes_nothing(copy):
    nbdev("nbdev-export", copy)
    read = lambda root: {p.relative_to(root).as_posix(): p.read_text() for p in (root / "mmseqrec").rglob("*.py")}
    made, kept = read(copy), read(ROOT)
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []

def test_clean_changes_nothing(copy):
    nbdev("nbdev-clean", copy)
    assert [p.name for p in PAGES if (copy / "nbs" / p.name).read_bytes() != p.read_bytes()] == []

def script_of(name):
    "Import a script of the folder .ci."
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f".ci/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script

def test_readme_is_made_from_the_index():
    script = script_of("readme")
    assert (ROOT / "README.md").read_text() == script.readme_from_index(ROOT / "nbs/index.ipynb"), "run .ci/readme.py"
    kept = {path.name: path.read_bytes() for path in (ROOT / script.IMAGES).iterdir()}
    assert kept == script.pictures(ROOT / "nbs/index.ipynb"), "run .ci/readme.py"


# A page

@each_page
def test_page_is_executed_without_errors(page):
    outputs = [(c["id"], o) for c in code_cells(page) for o in c["outputs"]]
    assert outputs or len(code_cells(page)) == 1, "the page is not executed"
    for id, output in outputs:
        assert output["output_type"] != "error", f"cell {id} stores an error"
        assert output.get("name") != "stderr", f"cell {id} stores a warning: {output['text']}"

@each_page
def test_page_is_small(page): assert page.stat().st_size <= 600 * 1024

@each_page
def test_cell_ids_are_unique_slugs(page):
    ids = [c["id"] for c in cells(page)]
    assert len(set(ids)) == len(ids)
    for id in ids:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id) and len(id) <= 64, f"{id}: an id is a slug"
        assert not re.fullmatch(r"(?=.*\d)[0-9a-f]{8}", id), f"{id} looks random; an id says what the cell does"

@each_page
def test_one_directive_a_cell(page):
    for cell in code_cells(page):
        told = [line for line in directives(cell) if not re.match(r"#\|\s*echo:", line)]  # of the index's picture and table
        if cell["id"] != "colab-install": assert len(told) <= 1, cell["id"]

@each_page
def test_lines_are_at_most_100_wide(page):
    for cell in code_cells(page):
        wide = [line for line in source(cell).splitlines() if len(line) > 100 and cell["id"] != "colab-install"]
        assert not wide, f"cell {cell['id']}: {wide[0]}"

@each_page
def test_page_is_prose(page):
    prose = len(cells(page)) - len(code_cells(page))
    assert prose >= 0.6 * len(code_cells(page)), f"{prose} markdown cells for {len(code_cells(page))} code cells"

@each_page
def test_page_begins_with_title_subtitle_and_badge(page):
    "The badge has a cell of its own: the site takes the title's cell away."
    repository = SETTINGS["repository"].removeprefix("https://github.com/")
    url = f"https://colab.research.google.com/github/{repository}/blob/{SETTINGS['ref']}/nbs/{page.name}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
    assert re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*\n?", source(cells(page)[0]))
    assert source(cells(page)[1]) == badge

def test_the_index_repeats_the_subtitle_of_every_page():
    text = "\n".join(source(c) for c in cells(ROOT / "nbs/index.ipynb") if c["cell_type"] == "markdown")
    for page in NUMBERED:
        subtitle = source(cells(page)[0]).partition("\n\n> ")[2].strip()
        assert f"| [{page.stem}]({page.name}) | {subtitle} |" in text, page.stem

@each_page
def test_install_cell_agrees_with_settings(page):
    package = f"mmseqrec @ git+{SETTINGS['repository']}@{SETTINGS['ref']}"
    installs = [source(c) for c in code_cells(page) if "pip install" in source(c)]
    assert installs == [f'#| hide\n#| eval: false\n! [ -e /content ] && pip install -Uqq "{package}"']

@each_lesson
def test_lesson_ends_with_exercises_and_summary(page):
    headings = [line for c in cells(page) if c["cell_type"] == "markdown" for line in source(c).splitlines()
                if line.startswith("## ")]
    assert headings[-2:] == ["## Exercises", "## Summary"]

@each_page
def test_cells_with_imports_stand_alone(page):
    "Building the site runs exported cells and cells with an import, and no others."
    known = set(dir(builtins))
    for cell in code_cells(page):
        nodes = list(ast.walk(cell_tree(cell)))
        imports = [a for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
        if "#| eval: false" in directives(cell) or not (imports or is_exported(cell)): continue
        known |= {(a.asname or a.name).partition(".")[0] for a in imports}
        known |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
        known |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        known |= {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        unknown = {n.id for n in nodes if isinstance(n, ast.Name)} - known
        assert is_exported(cell) or not unknown, f"cell {cell['id']} imports, and uses {unknown}: import in a cell of its own"

def decimals(text): return re.findall(r"(?<![\w.])\d*\.\d+(?![\w.])", text)

@each_page
def test_numbers_in_prose_come_from_a_cell(page):
    "A decimal number of the text stands, rounded as there, in the page's code or output; formulas and code are exempt."
    shown = []
    for cell in code_cells(page):
        data = [output.get("data", {}) for output in cell["outputs"]]
        parts = [source(cell), *("".join(output.get("text", "")) for output in cell["outputs"])]
        parts += ["".join(some.get(kind, "")) for some in data for kind in ("text/plain", "text/html")]
        shown += [float(x.replace("_", "")) for part in parts for x in re.findall(r"\d[\d_]*\.?\d*|\.\d+", part)]
    for cell in cells(page):
        if cell["cell_type"] != "markdown": continue
        plain = r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv[: ]\S+|sections? [\d.]+( and [\d.]+)?"
        for number in decimals(re.sub(plain, "", source(cell), flags=re.S)):
            digits = len(number.partition(".")[2])
            assert any(abs(round(x, digits) - float(number)) < 1e-9 for x in shown), f"cell {cell['id']}: {number}"

@each_page
def test_links_between_pages_lead_somewhere(page):
    text = "\n".join(source(c) for c in cells(page) if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"link to {target}"


# The package

def test_version_and_addresses_have_one_home():
    import mmseqrec
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert SETTINGS["version"] == mmseqrec.__version__ == str(citation["version"])
    assert SETTINGS["repository"] == citation["repository-code"]
    assert f'Repository = "{SETTINGS["repository"]}"\n' in (ROOT / "pyproject.toml").read_text()

def test_requirements_are_lower_bounds():
    for requirement in SETTINGS["requirements"].split(): assert re.fullmatch(r"[\w.-]+>=[\d.]+", requirement)

def test_import_is_light():
    code = ("import sys, mmseqrec; dir(mmseqrec)\n"
            "print(sorted({'torch', 'transformers', 'polars', 'matplotlib', 'numpy'} & set(sys.modules)))")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == "[]"

def test_what_is_slow_to_import_waits_for_its_use():
    slow = ["transformers.modeling_utils", "transformers.models.auto", "transformers.models.clip", "seaborn", "umap"]
    code = f"import sys, mmseqrec.training, mmseqrec.app.report\nprint([name for name in {slow} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr

def test_public_names_are_few_and_found():
    import mmseqrec
    names = house.public_names()
    assert len(set(names)) == len(names) <= 150, "a name has one home"
    assert set(names) <= set(dir(mmseqrec))
    for module, some in mmseqrec.PUBLIC.items():
        for name in some.split():
            assert name in public_names(ROOT / "mmseqrec" / (module.replace(".", "/") + ".py")), f"{module} has no {name}"
            assert getattr(mmseqrec, name) is getattr(importlib.import_module(f"mmseqrec.{module}"), name)
            hidden = [path for path in (f"{name}.py", name) if (ROOT / "mmseqrec" / path).exists()]
            assert not hidden, f"{name} hides a module"
    with pytest.raises(AttributeError, match="no_such_name"): mmseqrec.no_such_name


# The house: its size, and one class a system

def test_the_house_is_as_small_as_the_design_says():
    found = house.figures()
    assert found["body lines"] <= 5750 and found["public names"] <= 150, found
    assert found["body lines"] + found["body lines of later pages"] <= 7000, found  # with every page of the design
    assert found["median cell"] <= 12 and found["longest cell"] <= 40, found

def systems():
    from mmseqrec.recommender import Recommender
    for path in (ROOT / "mmseqrec/models").glob("*.py"): importlib.import_module(f"mmseqrec.models.{path.stem}")
    found, todo = [], Recommender.__subclasses__()
    while todo:
        found.append(todo.pop())
        todo.extend(found[-1].__subclasses__())
    return [kind for kind in found if kind.__module__.startswith("mmseqrec.")]

def test_a_system_is_one_class():
    "Its own class and `Recommender`; a preset may have its system as well."
    from mmseqrec.recommender import Recommender
    assert len(systems()) >= 11
    for kind in systems():
        ours = [base for base in kind.__mro__ if base.__module__.startswith("mmseqrec.")]
        assert ours[-1] is Recommender and len(ours) <= 3, ours
        if len(ours) == 3: assert "__init__" not in vars(kind), f"{kind.__name__} is no preset of {ours[1].__name__}"
    assert [base for base in Recommender.__mro__ if base.__module__.startswith("mmseqrec.")] == [Recommender]

@each_module
def test_no_function_is_attached_to_a_class(path):
    classes = {node.name for node in tree(path).body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree(path)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]:
            name = getattr(getattr(target, "value", None), "id", "")
            assert not (isinstance(target, ast.Attribute) and name in classes | set(homes())), f"line {node.lineno}: {ast.unparse(node)}"

@each_module
def test_a_function_is_not_defined_to_be_attached(path):
    "A function with a parameter `self` is a method, and stands in its class."
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef): assert "self" not in [a.arg for a in node.args.args], f"line {node.lineno}: {node.name}"

def parameters(function):
    "The parameters that need a comment."
    spec = function.args
    plain = ("self", "cls", "seed", "epoch", "title", "xlabel", "ylabel")  # need no comment, nor do the package's types
    return [a for a in [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
            if a is not None and a.arg not in plain and getattr(a.annotation, "id", None) not in homes()]

@each_module
def test_public_symbols_are_documented(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lambda node: "#" in lines[node.end_lineno - 1][node.end_col_offset:]
    functions, missing = [], []
    for node in tree(path).body:
        if getattr(node, "name", None) not in public_names(path): continue
        if not ast.get_docstring(node): missing.append(node.name)
        if isinstance(node, ast.FunctionDef): functions.append((node.name, node))
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            functions += [(node.name, m) for m in methods if m.name == "__init__"]
            missing += [f"{node.name}.{m.name}" for m in methods if m.name[0] != "_" and not ast.get_docstring(m)
                        and not (m.returns and (m.decorator_list or comment(m.returns)))]  # or a typed property
    missing += [f"{name}({a.arg})" for name, function in functions for a in parameters(function) if not comment(a)]
    assert not missing, f"without docstring, or parameter without comment: {', '.join(missing)}"

@each_module
def test_a_mask_says_what_it_ignores(path):
    for node in ast.walk(tree(path)):
        bound = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) and isinstance(
            node.ctx, ast.Store) else node.attr if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) else ""
        assert bound != "mask", f"line {node.lineno}: a bare `mask` is not a name"

@each_module
def test_nothing_unsafe_is_loaded(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name for a in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "joblib", "dill", "shelve"}, f"line {node.lineno}: pickle"
        if isinstance(node, ast.Attribute): assert ast.unparse(node) not in ("torch.load", "torch.save"), node.lineno
        if isinstance(node, ast.Attribute): assert node.attr != "extractall", f"line {node.lineno}: archives"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            assert not getattr(node.value, "value", True), f"line {node.lineno}: {node.arg}"

@each_module
def test_images_are_opened_in_one_place(path):
    "What an encoder sees, a report and a figure show."
    if module_name(path) == "figures": return
    opens = [node.lineno for node in ast.walk(tree(path)) if ast.unparse(node) in ("Image.open", "PIL.Image.open")]
    assert not opens, f"line {opens[0]}: open images with `mmseqrec.figures.open_image`"


# Files

def test_artifacts_are_small():
    total = sum(p.stat().st_size for p in (ROOT / "mmseqrec/artifacts").rglob("*") if p.is_file())
    assert total <= 15e6

def test_tracked_files_name_no_machine():
    if not (ROOT / ".git").exists(): pytest.skip("not a clone")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    private = re.compile("/" + r"work/|/" + r"opt/|/" + r"root/|bash_" + r"jobs|index" + r"-url|pypi\.[a-z]+/simple|npm" + r"js\.org")
    for name in tracked:
        path = ROOT / name
        if not path.is_file() or path.suffix in (".safetensors", ".png", ".npz"): continue
        found = private.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert not found, f"{name} contains {found[0]}"

def test_quarto_reads_one_file():
    assert os.readlink(ROOT / "nbs/_quarto.yml") == "../_quarto.yml"
    assert {"nbdev.yml", "sidebar.yml"} == set(yaml.safe_load((ROOT / "_quarto.yml").read_text())["metadata-files"])

def test_sidebar_lists_every_page_in_order():
    parts = yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [page for part in parts for page in (part["contents"] if isinstance(part, dict) else [part])]
    assert listed == ["index.ipynb", *(p.name for p in NUMBERED)]

def test_wheel_ships_types_and_artifacts(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "mmseqrec", source / "mmseqrec", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    wheel, = tmp_path.glob(f"mmseqrec-{SETTINGS['version']}-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(source).as_posix() for p in (source / "mmseqrec").rglob("*") if p.is_file()}
    assert expected <= names and "mmseqrec/py.typed" in names
    assert not [n for n in names if n.startswith(("nbs", "tests"))]
