#!/usr/bin/env python3
"""Build the docs site in `_docs`: `.ci/site.py` (needs nbdev and Quarto), and say what is wrong with it.

Beside the pages of the book, which are the notebooks, the site has pages that are made here from what is in the
repository: a page for each module of the package, one that lists all public names, one with what every page says of
paper and released code, one that says where each stored result comes from, and the changelog. `.ci/site.py --check`
only looks at `_docs`.
"""
import ast
import html.parser
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PAGES, API, SITE = ROOT / "nbs", ROOT / "nbs/api", ROOT / "_docs"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# ---- pages of the API ----

def page_of(module):
    "Return the path of the notebook that a module is made from."
    return next(PAGES.glob(f"[0-9][0-9]_{module}.ipynb"))

@cache
def cells_of(page): return json.loads(page.read_text(encoding="utf-8"))["cells"]

def title_of(page):
    "Return the title and the subtitle of a notebook."
    title, _, subtitle = "".join(cells_of(page)[0]["source"]).partition("\n")
    return title.lstrip("# "), subtitle.strip().lstrip("> ")

def comment_of(lines, number):
    "Return the comment at the end of a line of code, counted from 1."
    found = re.search(r"\s#\s?(?!\|)(.*)$", lines[number - 1])
    return found[1].strip() if found else ""

def escaped(text):
    "Escape what Markdown tables and HTML would read, outside of code."
    parts = text.split("`")
    return "`".join(part if n % 2 else part.replace("|", "\\|").replace("<", "&lt;") for n, part in enumerate(parts))

def coded(text): return f"`{text}`" if text else ""

def table(rows, head):
    "Lay rows out as a Markdown table without columns that are empty."
    columns = [n for n, name in enumerate(head) if n == 0 or any(row[n] for row in rows)]
    lines = [[head[n] for n in columns], ["---"] * len(columns), *([row[n] for n in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""

def arguments(node):
    "List the arguments of a function, with the stars and the default of each, `self` left out."
    args, plain = node.args, [*node.args.posonlyargs, *node.args.args]
    defaults = dict(zip(reversed(plain), reversed(args.defaults)))
    defaults |= {arg: value for arg, value in zip(args.kwonlyargs, args.kw_defaults) if value is not None}
    named = [*plain, *([args.vararg] if args.vararg else []), *args.kwonlyargs, *([args.kwarg] if args.kwarg else [])]
    stars = {args.vararg: "*", args.kwarg: "**"}
    return [(arg, stars.get(arg, ""), ast.unparse(defaults[arg]) if arg in defaults else "")
            for arg in named if arg.arg not in ("self", "cls")]

def parameters(node, lines):
    "List name, type, default and comment of a function's parameters."
    return [(coded(stars + arg.arg), coded(ast.unparse(arg.annotation)) if arg.annotation else "", coded(default),
             escaped(comment_of(lines, arg.end_lineno))) for arg, stars, default in arguments(node)]

def returned(node, lines):
    "Say what a function returns: its annotation, and the comment behind it."
    if node.returns is None: return ""
    return ast.unparse(node.returns), comment_of(lines, node.returns.end_lineno)

def call_of(name, node, width=96):
    "Write the call of a function: names of parameters with their defaults, one a line where the line would be long."
    parts = [stars + arg.arg + f"={default}" * bool(default) for arg, stars, default in arguments(node)]
    if node.args.kwonlyargs and not node.args.vararg:
        parts.insert(len(parts) - len(node.args.kwonlyargs) - bool(node.args.kwarg), "*")
    call = f"{name}({', '.join(parts)})"
    return call if len(call) <= width else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")"

def function_text(node, lines, level, owner=""):
    "Write the entry of a function or method."
    name = owner + node.name if node.name != "__init__" else owner.rstrip(".")
    text = [f"```python\n{call_of(name, node)}\n```", ast.get_docstring(node) or "",
            table(parameters(node, lines), ("parameter", "type", "default", "what it is"))]
    if (found := returned(node, lines)): text.append(f"Returns `{found[0]}`" + (f": {escaped(found[1])}" if found[1] else "."))
    head = [f"{'#' * level} {node.name} {{#{(owner + node.name).lower()}}}"] if node.name != "__init__" else []
    return "\n\n".join(part for part in head + text if part)

def is_shown(node, lines):
    "Whether a method is told of: those with a docstring or a comment, not private ones."
    if node.name == "__init__": return True
    told = ast.get_docstring(node) or returned(node, lines) and returned(node, lines)[1]
    return bool(told) and not node.name.startswith("_")

def class_text(node, lines):
    "Write the entry of a class: docstring, fields or constructor, methods."
    fields = [(coded(part.target.id), coded(ast.unparse(part.annotation)), coded(ast.unparse(part.value)) if part.value else "",
               escaped(comment_of(lines, part.end_lineno))) for part in node.body if isinstance(part, ast.AnnAssign)]
    bases = ", ".join(coded(ast.unparse(base)) for base in node.bases)
    methods = [part for part in node.body if isinstance(part, FUNCTIONS) and is_shown(part, lines)]
    text = [f"## {node.name} {{#{node.name.lower()}}}", ast.get_docstring(node) or "", f"Derives from {bases}." if bases else "",
            table(fields, ("field", "type", "default", "what it is"))]
    text += [function_text(part, lines, 3, f"{node.name}.") for part in methods]
    return "\n\n".join(part for part in text if part)

def module_text(module):
    "Write the page of a module."
    source = (ROOT / "mmseqrec" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    exported = next(ast.literal_eval(node.value) for node in tree.body
                    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    page = page_of(module)
    text = [f"---\ntitle: mmseqrec.{module}\n---", f"{title_of(page)[1]} What each of these is for, with examples: "
            f"[{title_of(page)[0]}](../{page.name}). [All modules](index.qmd)."]
    for node in tree.body:
        if getattr(node, "name", "") not in exported: continue
        if isinstance(node, ast.ClassDef): text.append(class_text(node, lines))
        else: text.append(function_text(node, lines, 2))
    return "\n\n".join(text) + "\n"

def modules():
    "List the modules of the package in the order of their pages."
    pages = [re.sub(r"^\d\d_", "", page.stem) for page in sorted(PAGES.glob("[0-9][0-9]_*.ipynb"))]
    return [name for name in pages if (ROOT / "mmseqrec" / (name.replace(".", "/") + ".py")).exists()]

def first_lines(module):
    "Map each function and class of a module to the first line of its docstring."
    tree = ast.parse((ROOT / "mmseqrec" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in tree.body if hasattr(node, "name")}

def glance_text():
    "Write the page that lists all public names."
    from mmseqrec import PUBLIC
    text = ["---\ntitle: API at a glance\ntoc-depth: 2\n---",
            "What `import mmseqrec as mm` offers, by module: `mm.fit`, for example. All other names of a module are reached "
            "through it, as in `mmseqrec.blocks.losses.info_nce`, and stand on the module's page."]
    for module in modules():
        about, names = first_lines(module), PUBLIC.get(module, "").split()
        rows = [(f"[`{name}`]({module}.qmd#{name.lower()})" if name in about else coded(name), escaped(about.get(name, "")))
                for name in names]
        text += [f"## [{module}]({module}.qmd)", title_of(page_of(module))[1], table(rows, ("name", "what it does"))]
    return "\n\n".join(part for part in text if part) + "\n"


# ---- pages that gather what is spread over the book ----

def section(page, heading):
    "Return the text cells of a notebook from a heading to the next one of the same level, images left out."
    found = []
    for cell in cells_of(page):
        source = "".join(cell["source"])
        if cell["cell_type"] != "markdown": continue
        if source.startswith("## "): found = [source.partition("\n")[2]] if source.startswith(f"## {heading}") else found and [*found, None]
        elif found and found[-1] is not None: found.append(source)
    texts = [part.strip() for part in found if part]
    return "\n\n".join(text[:-1] + " (shown there)." if text.endswith(":") else text for text in texts)

def released_text():
    "Write the page of paper against released code."
    text = ["---\ntitle: Paper and released code\n---",
            "Where a paper and the code that its authors released disagree, this book follows the paper unless its page says "
            "otherwise, and each difference has a name that brings the released behaviour back: `released=(\"…\",)`. Here "
            "stands what every page says of it, in the order of the book."]
    for page in sorted(PAGES.glob("[0-9][0-9]_*.ipynb")):
        if (found := section(page, "Paper and released code")):
            text.append(f"## [{title_of(page)[0]}]({page.name})\n\n{found}")
    return "\n\n".join(text) + "\n"

def results_text():
    "Write the page that says where each stored result comes from."
    rows = []
    for path in sorted((ROOT / "mmseqrec/artifacts").rglob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        made = stored.get("provenance") if isinstance(stored, dict) else None
        if not made: continue
        name = path.relative_to(ROOT / "mmseqrec/artifacts").as_posix()
        where = [page for page in sorted(PAGES.glob("[0-9][0-9]_*.ipynb")) if names_file(page, path)]
        runs = stored.get("result", {}).get("runs", []) if isinstance(stored.get("result"), dict) else []
        rows.append((coded(name), ", ".join(f"[{page.stem[:2]}]({page.name})" for page in where), str(len(runs) or ""),
                     made["time"][:10], made.get("versions", {}).get("torch", ""),
                     str(stored.get("note") or (stored.get("result") or {}).get("note", "") if isinstance(stored.get("result"), dict) else "")))
    return "\n\n".join([
        "---\ntitle: Results and how they were made\n---",
        "Trainings that take longer than a page may run are done once, and their numbers are stored with the package. Each page "
        "that shows such numbers names the call that makes them anew and its cost, and trains one small cell of the same grid "
        "live; a test compares that cell with what is stored, so that a change of the code that would change the numbers is "
        "noticed. Every stored file names its configuration, the versions and the day:",
        table(rows, ("file in `mmseqrec/artifacts`", "pages", "trainings", "made", "torch", "note")),
        "Where systems are compared, each was trained with at least three seeds, and the spread over seeds and an interval over "
        "users are shown. What was tuned was tuned on validation events only. Negative results stay."]) + "\n"

def names_file(page, path):
    "Whether a code cell of a page reads a stored file, by its name or by a pattern such as `classical-{name}.json`."
    code = "\n".join("".join(cell["source"]) for cell in cells_of(page) if cell["cell_type"] == "code")
    folder, (first, _, last) = path.parent.name, path.stem.partition("-")
    if folder == "artifacts": return f'"{path.name}"' in code
    told = any(f'"{name}{end}"' in code for name in (path.stem, f"{first}-{{name}}", f"{{name}}-{last}") for end in ("", ".json"))
    return f'artifact_path("{folder}"' in code and told or folder == "gallery" and 'artifact_path("gallery")' in code

def write_pages():
    "Write the pages that are made here beside the notebooks."
    API.mkdir(exist_ok=True)
    for module in modules(): (API / f"{module}.qmd").write_text(module_text(module), encoding="utf-8")
    (API / "index.qmd").write_text(glance_text(), encoding="utf-8")
    (PAGES / "released.qmd").write_text(released_text(), encoding="utf-8")
    (PAGES / "results.qmd").write_text(results_text(), encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")[2]
    (PAGES / "changes.qmd").write_text(f"---\ntitle: Changes\n---\n{changes}", encoding="utf-8")


# ---- the site as it came out ----

class Page(html.parser.HTMLParser):
    "What a page of the site links to, loads, and says."
    SKIPPED = ("script", "style", "annotation")

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.ids, self.blocks, self.skipped, self.inside = [], [], set(), [], 0, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source", "video") and attrs.get("src"): self.loaded.append(attrs["src"])
        if tag == "link" and "stylesheet" in attrs.get("rel", ""): self.loaded.append(attrs["href"])
        if tag == "main": self.inside = True
        if tag in self.SKIPPED: self.skipped += 1
        if tag in ("p", "li", "pre", "h1", "h2", "h3", "h4", "table", "img", "div", "section", "figure"): self.blocks.append([tag, ""])

    def handle_endtag(self, tag):
        if tag in self.SKIPPED: self.skipped -= 1
        if tag == "main": self.inside = False
        if tag in ("p", "li", "section"): self.blocks.append(["after", ""])

    def handle_data(self, data):
        if self.blocks and self.inside and not self.skipped: self.blocks[-1][1] += data


def dangling(page):
    "Return the ends of paragraphs that promise something with a colon, before a heading or the end of a section."
    blocks = [(tag, text.strip()) for tag, text in page.blocks if text.strip() or tag in ("h2", "h3", "img", "table", "pre")]
    return [text[-60:] for (tag, text), (after, _) in zip(blocks, [*blocks[1:], ("h2", "")])
            if text.endswith(":") and tag in ("p", "li", "after") and after in ("h1", "h2", "h3", "h4")]

def without_other_hosts(text):
    "Take out what Quarto adds for JavaScript widgets, which no page has: scripts from another host."
    text = re.sub(r'<script src="https://cdn[^>]*></script>\s*', "", text)
    return re.sub(r"<script type=\"application/javascript\">define\('jquery'.*?</script>\s*", "", text)

def faults(folder=SITE, address="https://mmseqrec.github.io/mmseqrec/"):
    "List what is wrong with the site: links, requests to other hosts, badges, doubled signatures, dangling colons."
    pages = {path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    books = {re.sub(r"^\d\d_", "", page.stem) + ".html" for page in PAGES.glob("*.ipynb")}
    found = [f"{name}: this page is missing" for name in sorted(books - set(pages))]
    for name, page in pages.items():
        if name.startswith(("site_libs/", "explorers/")): continue
        found += [f"{name}: {link} leads nowhere" for link in page.links if leads_nowhere(name, link, pages, folder, address)]
        found += [f"{name}: loads {src}" for src in page.loaded if re.match(r"(https?:)?//", src)]
        found += [f"{name}: nothing after “{end}”" for end in dangling(page)]
        if name in books and not any("colab.research.google.com" in link for link in page.links): found.append(f"{name}: no link to Colab")
        code = [text.strip() for tag, text in page.blocks if tag == "pre" and re.match(r"\s*(def|class|@)", text)]
        if name in books: found += [f"{name}: {text.splitlines()[0]} stands twice" for text in sorted(set(code)) if code.count(text) > 1]
        found += [f"{name}: a signature that says nothing, (*args, **kwargs)" for tag, text in page.blocks if "(*args, **kwargs)" in text][:1]
    return found

def leads_nowhere(name, link, pages, folder, address):
    "Whether a link of the site points to a page, file or anchor that is not there; other sites are not asked."
    link = link.removeprefix(address)
    if re.match(r"[a-z]+:", link): return False
    path, _, anchor = link.partition("#")
    target = (folder / name).parent / path if path and not path.startswith("/") else folder / (path.lstrip("/") or name)
    if target.is_dir(): target /= "index.html"
    if not target.exists(): return True
    known = pages.get(target.resolve().relative_to(folder.resolve()).as_posix())
    return bool(anchor) and known is not None and anchor not in known.ids


def main():
    if "--check" not in sys.argv:
        write_pages()
        subprocess.run(["nbdev-docs"], cwd=ROOT, check=True)
        for path in SITE.rglob("*.html"): path.write_text(without_other_hosts(path.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.copytree(ROOT / "mmseqrec/artifacts/explorers", SITE / "explorers", ignore=shutil.ignore_patterns("*.jinja"))
    found = faults()
    print(*found, f"{len(found)} faults", sep="\n")
    return bool(found)


if __name__ == "__main__": sys.exit(main())
