#!/usr/bin/env python3
"""Turn notebooks into Markdown: their text, their code and the text the code printed.

`.ci/readme.py` makes README.md from nbs/index.ipynb (run it after editing the index); `.ci/readme.py FOLDER` writes
every page to FOLDER/NAME.html.md, the address that the docstrings of the modules give.
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = r"\]\((?:\d\d_)?([\w.]+)\.ipynb(?=[)#])"  # a link from a page to another


IMAGES = "nbs/images"  # of the README; a notebook holds its own


def pictures(page):
    "Return the images that the cells of a notebook drew, PNG files by name."
    cells = json.loads(Path(page).read_text(encoding="utf-8"))["cells"]
    return {f"{cell['id']}.png": base64.b64decode(output["data"]["image/png"])
            for cell in cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})}


def notebook_to_markdown(page, links, images=None):
    """Return the Markdown of a notebook without its hidden cells; `links` replaces the target of links between pages.

    `images` is the folder of `pictures`; without it, what was drawn is left out."""
    parts = []
    for cell in json.loads(Path(page).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(LINK, links, source))
        elif not re.match(r"#\|\s*(hide|default_exp)\b", source):
            if not re.search(r"^#\|\s*echo: false", source, re.M): parts.append(f"```python\n{source}\n```")
            alt = re.search(r'^#\|\s*fig-alt: "(.*)"', source, re.M)
            for output in cell["outputs"]:
                data = output.get("data", {})
                text = "".join(output.get("text") or data.get("text/plain", ""))
                if "text/markdown" in data: parts.append(re.sub(LINK, links, "".join(data["text/markdown"])))
                elif "image/png" in data: parts.append(images and f"![{alt[1]}]({images}/{cell['id']}.png)" or "")
                elif text: parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def readme_from_index(page):
    "Return the text of README.md."
    return notebook_to_markdown(page, lambda link: "](nbs/" + link[0][2:], IMAGES)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        (ROOT / "README.md").write_text(readme_from_index(ROOT / "nbs/index.ipynb"), encoding="utf-8")
        (ROOT / IMAGES).mkdir(exist_ok=True)
        for name, data in pictures(ROOT / "nbs/index.ipynb").items(): (ROOT / IMAGES / name).write_bytes(data)
    for folder in map(Path, sys.argv[1:]):
        for page in (ROOT / "nbs").glob("*.ipynb"):
            name = re.sub(r"^\d\d_", "", page.stem)
            text = notebook_to_markdown(page, r"](\1.html.md")
            (folder / f"{name}.html.md").write_text(text, encoding="utf-8")
