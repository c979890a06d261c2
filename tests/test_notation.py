"Page 03: its tables name what is there, and the formulas of all pages use its letters."
import ast
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {page.name[:2]: page for page in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))}

# Letters with which a page means something of its own, in one section and in words beside the formula.
LOCAL = {"10": "xyω", "41": "XxtyΓ", "44": "Xφ", "50": "Ugnrε", "54": "ε", "56": "XF", "61": "t", "62": "t", "82": "m"}
WHY = {"10": "coordinates and angle of a drawing", "41": "a hypergeometric number, Student's t, relevance, logarithms of n!",
       "44": "the data of a map and its directions", "50": "the gates of a GRU; Markov's small weight",
       "54": "the small number in a norm", "56": "the table of users and items, and the norm of a table", "61": "Student's t", "62": "Student's t", "82": "sizes of a matrix"}
WAITING = {}  # page -> letters whose text is being changed elsewhere


@cache
def text(number, kinds=("markdown", "code")):
    "The sources of a page's cells."
    cells = json.loads(PAGES[number].read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] in kinds)

@cache
def page():
    "What the code cells of page 03 define."
    names = {}
    for cell in json.loads(PAGES["03"].read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("#| hide"): exec(source, names)
    return names

@cache
def names_in_package():
    "Functions, classes, parameters, fields and attributes of the package."
    found = set()
    for path in (ROOT / "mmseqrec").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.add(node.name)
            elif isinstance(node, ast.arg): found.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store): found.add(node.attr)
    return found


# The tables

TABLES = {"axes": 5, "MORE_INDEX": 5, "MARKS": 3, "SYMBOLS": 5, "IN_PAPERS": 6, "MASKS": 4, "GLOSSARY": 3}

@pytest.mark.parametrize("table", TABLES)
def test_rows_are_whole_and_their_pages_are_there(table):
    for row in page()[table]: assert len(row) == TABLES[table] and row[-1] in PAGES, row

@pytest.mark.parametrize("table, column", [("axes", 3), ("MORE_INDEX", 3), ("SYMBOLS", 3), ("MASKS", 0)])
def test_names_in_code_are_in_the_package(table, column):
    names = [name for row in page()[table] for name in re.findall("`([^`]*)`", row[column])]
    assert len(names) >= 7 and set(names) <= names_in_package(), set(names) - names_in_package()

def test_axes_are_those_of_page_00_and_each_has_its_small_letter():
    from mmseqrec.core import AXES
    assert list(page()["INDEX"]) == list(AXES) and [row[0] for row in page()["axes"]] == [f"${axis}$" for axis in AXES]
    assert max(Counter(page()["INDEX"].values()).values()) == 1

def test_no_symbol_has_two_rows():
    symbols = [symbol for row in page()["SYMBOLS"] for symbol in row[0].split(", ")]
    assert [symbol for symbol, times in Counter(symbols).items() if times > 1] == []

def test_what_the_papers_call_it_is_in_the_tables():
    p = page()
    known = {s for row in p["axes"] + p["MARKS"] + p["SYMBOLS"] for s in row[0].split(", ")}
    for row in p["IN_PAPERS"]: assert set(row[0].split(", ")) <= known and any(row[1:5]), row

def test_glossary_is_in_order_and_its_pages_use_the_terms():
    terms = [row[0] for row in page()["GLOSSARY"]]
    assert 40 <= len(terms) == len(set(terms)) and terms == sorted(terms, key=str.lower)
    for term, line, number in page()["GLOSSARY"]:
        said = re.sub("[_-]", " ", text(number).lower())
        missing = [word for word in re.findall(r"\w+", term.lower()) if word not in said]
        assert not missing and line, f"{term}: page {number} does not say {missing}"

def test_a_page_is_linked_by_its_number_and_one_without_a_module_is_not():
    assert page()["link"]("30") == "[30](30_blocks.layers.ipynb)" and page()["link"]("71") == "71"
    assert all(PAGES[number].name == name for number, name in page()["PAGES"].items())


# The bibliography

def test_a_bibliography_is_read():
    read = page()["read_bib"]('% no entry\n\n@misc{a1,\n  author = {Li, Ann and others},\n  title = {A {B} c},\n  year = {1999}\n}\n')
    assert read == [{"key": "a1", "author": "Li, Ann and others", "title": "A {B} c", "year": "1999"}]
    entry = {**read[0], "notebooks": "30, 71", "doi": "10.1/x"}
    assert page()["reference"](entry) == ("* Ann Li and others (1999). [A {B} c](https://doi.org/10.1/x). arXiv. "
                                          "Page [30](30_blocks.layers.ipynb), 71.")

def plain(number):
    "A page's text without the brackets around years and links, and with single blanks."
    return re.sub(r"\s+", " ", re.sub(r"[\[\]()]", " ", text(number)))

def test_entries_are_whole_and_named_on_their_pages():
    papers = page()["papers"]
    source = (ROOT / "mmseqrec/artifacts/references.bib").read_text(encoding="utf-8")
    assert len(papers) == len(re.findall("^@", source, re.M)) == len({paper["key"] for paper in papers}) >= 30
    for paper in papers:
        assert {"author", "title", "year", "notebooks", "named"} <= set(paper), paper["key"]
        assert re.fullmatch(r"(19|20)\d\d", paper["year"]) and paper["key"].find(paper["year"]) > 0
        assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.get("eprint", "0000.00000"))
        assert paper.get("doi", "10.1/x").startswith("10.")
        signs = [*paper["named"].split("; "), *[paper[kind] for kind in ("eprint", "doi") if kind in paper]]
        for number in paper["notebooks"].split(", "):
            assert any(sign in plain(number) for sign in signs), f"page {number} does not name {paper['key']}"

def test_what_pages_cite_is_in_the_bibliography():
    where = {}
    for paper in page()["papers"]:
        signs = [*paper["named"].split("; "), *[paper[kind] for kind in ("eprint", "doi") if kind in paper]]
        for sign in signs: where.setdefault(sign, set()).update(paper["notebooks"].split(", "))
    cited = re.compile(r"((?:van den )?[A-ZÄÖ]\w+(?: et al\.| and [A-Z]\w+) (?:19|20)\d\d)\b")
    for number in sorted(set(PAGES) - {"03"}):
        links = re.findall(r"arxiv\.org/abs/([\d.]+\d)|doi\.org/(10\.[^)\s]+)", text(number))
        for sign in [*cited.findall(plain(number)), *["".join(link) for link in links]]:
            assert number in where.get(sign, ()), f"page {number} cites {sign}: add it to references.bib, or the page to its entry"


# Formulas

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ",
         "kappa": "κ", "lambda": "λ", "mu": "μ", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ",
         "varphi": "φ", "omega": "ω", "Gamma": "Γ", "Delta": "Δ", "ell": "ℓ"}
SCRIPT = {"L": "ℒ", "M": "ℳ", "D": "𝒟", "S": "𝒮", "N": "𝒩", "B": "ℬ", "I": "ℐ", "R": "ℛ", "U": "𝒰"}

def letters(formula):
    "List the letters of a formula, each with where it stands (line, below, above) and whether it has an index."
    formula = re.sub(r"\\(text|mathrm|operatorname\*?|texttt|mathbb)\{[^{}]*\}", " ", formula.strip("$"))
    formula = re.sub(r"\\mathcal\s*\{?(\w)\}?", lambda m: SCRIPT[m[1]], formula)
    formula = re.sub(r"\\([A-Za-z]+)", lambda m: GREEK.get(m[1], " "), formula)
    formula = re.sub(r"(?<![A-Za-z_])e\^", "", formula)  # the exponential
    found, place, stack, i = [], "line", [], 0
    while i < len(formula):
        sign = formula[i]
        if sign in "_^":
            lower = place if place != "line" else {"_": "below", "^": "above"}[sign]
            if formula[i + 1:i + 2] == "{": stack.append(place); place = lower; i += 1
            else:
                i += 1
                while formula[i:i + 1] == " ": i += 1
                if formula[i:i + 1].isalpha(): found.append((formula[i], lower, False))
        elif sign == "{": stack.append(place)
        elif sign == "}": place = stack.pop()
        elif sign.isalpha(): found.append((sign, place, formula[i + 1:i + 2] == "_"))
        i += 1
    return found

def test_letters_are_found():
    assert letters(r"$$\sum_b e^{\hat h_b \cdot x_{l'}/\tau}$$") == [("b", "below", False), ("h", "line", True), ("b", "below", False),
                                                                  ("x", "line", True), ("l", "below", False), ("τ", "line", False)]
    assert letters(r"$\mathcal{L}^{(v)}_{\mathrm{NIP}} + f^t$") == [("ℒ", "line", False), ("v", "above", False), ("f", "line", False),
                                                                 ("t", "above", False)]

def formulas(number):
    "The formulas of a page's text cells."
    prose = re.sub(r"```.*?```|`[^`]*`", "", text(number, ("markdown",)), flags=re.S)
    return re.findall(r"\$\$.+?\$\$|\$[^$\n]+?\$", prose, re.S)

@cache
def agreed():
    "Letters of the tables: symbols and sizes, which may have an index; and letters that count."
    p = page()
    own = {letter for row in p["SYMBOLS"] for letter, place, _ in letters(row[0]) if place == "line"} | set(p["INDEX"])
    counts = {letter for row in p["axes"] + p["MORE_INDEX"] for letter, *_ in letters(row[0]) + letters(row[1])}
    return own, counts

@pytest.mark.parametrize("number", PAGES)
def test_formulas_use_the_letters_of_page_03(number):
    own, counts = agreed()
    local = set(LOCAL.get(number, "") + WAITING.get(number, ""))
    for formula in formulas(number):
        for letter, place, has_index in letters(formula):
            known = own if place == "line" and has_index else own | counts
            assert letter in known | local, f"{letter} ({place}) in {formula} has no row on page 03"

@pytest.mark.parametrize("number", [number for number in PAGES if "v" not in WAITING.get(number, "")])
def test_v_is_never_an_item(number):
    "Below a letter, v names the matrix of values, the adapter, the sizes and the counts of images; and page 22 counts images."
    for formula in formulas(number):
        for before in re.findall(r"(\\?\w+\*?\}?)_\{?v\b", formula):
            assert before in ("W", "A", "D", "K", "b") or number == "22", f"v below {before} in {formula}"
        assert not re.search(r"(?<![\w^])v_\{?[ijlbu]\b", formula), f"v with an index in {formula}"

def test_exceptions_are_few_and_used():
    assert set(LOCAL) == set(WHY) and sum(map(len, LOCAL.values())) <= 25
    own, counts = agreed()
    for exceptions in (LOCAL, WAITING):
        for number, some in exceptions.items():
            used = {letter for formula in formulas(number) for letter, *_ in letters(formula)}
            assert set(some) <= used, f"page {number} does not use {set(some) - used}"
