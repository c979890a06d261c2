"The docs site: the pages that are made beside the notebooks, and the faults that a built site is searched for (no Quarto needed)."
import re
import shutil

import pytest

import mmseqrec
from test_structure import PAGES, ROOT, script_of

site = script_of("site")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Write the pages beside a copy of the notebooks."
    folder = tmp_path_factory.mktemp("site") / "nbs"
    folder.mkdir()
    for page in PAGES: shutil.copy(page, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "PAGES", folder)
        patch.setattr(site, "API", folder / "api")
        site.write_pages()
    return folder


def test_every_module_and_public_name_has_its_place(made):
    glance = (made / "api/index.qmd").read_text()
    for module, names in mmseqrec.PUBLIC.items():
        page = (made / f"api/{module}.qmd").read_text()
        for name in names.split():
            assert f"`{name}`" in glance
            if hasattr(getattr(mmseqrec, name), "__doc__") and callable(getattr(mmseqrec, name)): assert f"{{#{name.lower()}}}" in page

def test_an_entry_says_shapes_defaults_and_what_is_returned(made):
    text = (made / "api/blocks.losses.qmd").read_text()
    entry = text[text.index("## info_nce"):text.index("## same_target_mask")]
    assert "info_nce(logits, is_positive, false_negative_mask=None, legacy_false_negatives=False)" in entry
    assert "| `logits` | `Tensor` |  | `[B, N]`, similarities over temperature |" in entry
    assert "| `false_negative_mask` | `Tensor | None` | `None` |" in entry
    assert "Returns `Tensor`: a single number" in entry
    assert "*args, **kwargs" not in "".join(path.read_text() for path in (made / "api").iterdir())

def test_methods_stand_under_their_class(made):
    text = (made / "api/recommender.qmd").read_text()
    assert "### save_pretrained {#recommender.save_pretrained}" in text and "self" not in re.findall(r"save_pretrained\(([^)]*)\)", text)[0]

def test_gathered_pages(made):
    released, results = (made / "released.qmd").read_text(), (made / "results.qmd").read_text()
    for page in PAGES:
        has = any("".join(cell["source"]).startswith("## Paper and released code") for cell in site.cells_of(page))
        assert has == (f"]({page.name})\n" in released), page.name
    rows = {line.split("|")[1].strip(): line for line in results.splitlines() if line.startswith("| `")}
    assert "[61](61_experiments.compare.ipynb)" in rows["`compare/marketplace.json`"]
    assert all("](" in line for line in rows.values()), [name for name, line in rows.items() if "](" not in line]
    assert (made / "changes.qmd").read_text().count("\n## ") >= 1


PAGE = """<html><body><a href="https://colab.research.google.com/github/x">Open in Colab</a><main><h2 id="one">One</h2>{}</main></body></html>"""

def built(folder, text):
    "Make a site in which only the page of the core has content of its own."
    for page in PAGES:
        name = re.sub(r"^\d\d_", "", page.stem)
        (folder / f"{name}.html").write_text(PAGE.format(text if name == "core" else "<p>Words.</p>"))
    return folder

def test_a_good_site_has_no_fault(tmp_path):
    good = """<p>Shown here:</p><pre>def f(): pass</pre><p><a href="core.html#one">there</a> <a href="https://arxiv.org/abs/1">paper</a></p>"""
    assert site.faults(built(tmp_path, good)) == []

@pytest.mark.parametrize("text, word", {
    '<a href="gone.html">x</a>': "gone.html leads nowhere", '<a href="metrics.html#gone">x</a>': "metrics.html#gone leads nowhere",
    '<a href="https://mmseqrec.github.io/mmseqrec/core.html#gone">x</a>': "leads nowhere",
    '<img src="https://elsewhere.org/a.png">': "loads https://elsewhere.org/a.png", '<script src="//cdn.org/a.js"></script>': "loads //cdn.org/a.js",
    "<p>It gives:</p><h2>Next</h2>": "nothing after", "<p>It gives:</p>": "nothing after",
    "<pre>def f(): pass</pre><pre>def f(): pass</pre>": "def f(): pass stands twice",
    "<pre>f(*args, **kwargs)</pre>": "says nothing"}.items())
def test_each_fault_is_found(tmp_path, text, word):
    (found,) = site.faults(built(tmp_path, text))
    assert found.startswith("core.html: ") and word in found

def test_missing_pages_and_badges_are_found(tmp_path):
    folder = built(tmp_path, "<p>Words.</p>")
    (folder / "metrics.html").unlink()
    (folder / "core.html").write_text("<html><main><p>Words.</p></main></html>")
    assert site.faults(folder) == ["metrics.html: this page is missing", "core.html: no link to Colab"]

def test_what_widgets_would_need_is_taken_out():
    head = '<head><script src="https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js" crossorigin="anonymous"></script>\n' \
           "<script type=\"application/javascript\">define('jquery', [],function() {return window.jQuery;})</script><title>x</title></head>"
    assert site.without_other_hosts(head) == "<head><title>x</title></head>"

def test_no_page_is_executed_for_the_site():
    skipped = re.search(r'^skip_procs = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1].split(",")
    assert {"exec_show_docs", "add_show_docs", "rm_export"} <= set(skipped)  # each exported cell shows once, as code
