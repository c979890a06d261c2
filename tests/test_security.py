"What comes from outside is read and shown, never run: no pickle, no remote code, no path out of a folder, no script in a report."
import ast
import html
import json
import os
import re
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_items import bomb
from test_report import CHROMIUM

from killed_runs import make_clip
from mmseqrec.app.cli import main
from mmseqrec.config import SYSTEM_TITLES
from mmseqrec.data.items import check_images, read_items
from mmseqrec.data import sources
from mmseqrec.data.sources import _find_member
from mmseqrec.features.encoders import load_text_encoder
from small_shop import N_USERS

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for path in (ROOT / "mmseqrec").rglob("*.py") if path.name != "_modidx.py")


# No pickle, no foreign code, no archive on the disk

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "subprocess", "pty"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "np.load", "pd.read_pickle", "os.system", "os.popen",
                   "eval", "exec", "compile", "__import__", "shutil.unpack_archive"}
FORBIDDEN_METHODS = {"extractall", "load_module", "run_path"}

def dotted(node): return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""

def unsafe(tree):
    "List what could run what a file holds, or write where an archive says: `(line, what)`."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
            found += [(node.lineno, name) for name in names & FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call): continue
        name, words = dotted(node.func), {word.arg: getattr(word.value, "value", "?") for word in node.keywords}
        if name in FORBIDDEN_CALLS and not (name == "np.load" and words.get("allow_pickle") is False): found.append((node.lineno, name))
        if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS: found.append((node.lineno, node.func.attr))
        if isinstance(node.func, ast.Attribute) and node.func.attr == "extract" and not ast.unparse(node.func).endswith(".str.extract"):
            found.append((node.lineno, "extract"))
        found += [(node.lineno, word) for word in ("allow_pickle", "trust_remote_code") if words.get(word, False) is not False]
    return found

@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "mmseqrec")))
def test_the_package_runs_nothing_that_it_reads(path): assert not unsafe(ast.parse(path.read_text(encoding="utf-8")))

@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import joblib", "torch.load(path)", "torch.load(path, weights_only=True)", "np.load(path)",
    "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "AutoModel.from_pretrained(a, trust_remote_code=True)",
    "load(a, trust_remote_code=asked)", "archive.extractall(folder)", "archive.extract(name, folder)", "zipfile.ZipFile(p).extract(n)",
    "shutil.unpack_archive(path)", "eval(text)", "exec(text)", "os.system(text)", "import subprocess", "torch.hub.load(a, b)"])
def test_what_is_unsafe_would_be_seen(line): assert unsafe(ast.parse(line))

@pytest.mark.parametrize("line", ["title.str.extract(pattern)", "np.load(p, allow_pickle=False)", "model.eval()", "ast.literal_eval(text)",
                                  "AutoModel.from_pretrained(a, trust_remote_code=False)", "pl.col('a').str.extract('b')"])
def test_what_is_safe_may_stay(line): assert not unsafe(ast.parse(line))

def test_every_checkpoint_is_loaded_without_its_code():
    "Each call of `from_pretrained` of transformers that may meet a stranger's folder says so; the others read what we wrote."
    text = (ROOT / "mmseqrec/features/encoders.py").read_text(encoding="utf-8")
    assert "_SAFE = dict(use_safetensors=True, trust_remote_code=False)" in text
    for call in re.findall(r"transformers\.\w+\.from_pretrained\(.*", text): assert "**options" in call, call

def test_code_in_a_checkpoint_is_not_run(tmp_path):
    "A checkpoint that names code of its own in its folder."
    make_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises((ValueError, OSError)): load_text_encoder(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()

def test_members_of_an_archive_are_read_and_not_written(tmp_path, monkeypatch):
    "Members that lead out of the archive's folder are no tables, and nothing is written; one that would grow large is not read."
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../ratings.csv", "/ratings.csv", "a/../../ratings.csv", "..\\ratings.csv"): archive.writestr(name, "evil")
    assert _find_member(path, ["ratings.csv"]) is None
    with zipfile.ZipFile(path, "a") as archive: archive.writestr("ml/ratings.csv", "good")
    assert _find_member(path, ["ratings.csv"]) == ("ratings.csv", b"good")
    assert [file.name for file in tmp_path.iterdir()] == ["evil.zip"]
    monkeypatch.setattr(sources, "_MAX_MEMBER", 1 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("ratings.csv", b"0" * (1 << 21))
    assert path.stat().st_size < 1 << 13
    with pytest.raises(ValueError, match="evil.zip: ratings.csv would unpack to 2,097,152 bytes; not read"):
        _find_member(path, ["ratings.csv"])


# Images: no path out of the folder, no bomb

def one_item(folder, name):
    (folder / "images").mkdir(exist_ok=True)
    (folder / "items.csv").write_text(f'item_id,title,image\na,pan,"{name}"\n')
    return read_items(folder / "items.csv", folder / "images", image_column="image")

def secret(folder):
    (folder / "secret").mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / "secret/a.png")
    return folder / "secret/a.png"

@pytest.mark.parametrize("name", ["../secret/a.png", "../../etc/passwd.png", "sub/../../secret/a.png", "{folder}/secret/a.png", "..\\secret\\a.png"])
def test_names_of_images_stay_in_their_folder(name, tmp_path):
    secret(tmp_path)
    with pytest.raises(ValueError, match="items.csv, line 2: image name: .* leads out of the image folder; name a file below"):
        one_item(tmp_path, name.format(folder=tmp_path))

@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_links_out_of_the_folder_are_refused(tmp_path):
    file = secret(tmp_path)
    (tmp_path / "images").mkdir()
    says = r"line 2: picture 'a.png' is a link that leads out of .*images; put a copy of the file there"
    (tmp_path / "images/a.png").symlink_to(file)
    for image_column in ("image", None):  # named, and found by the item's name
        (tmp_path / "items.csv").write_text("item_id,title,image\na,pan,a.png\n")
        with pytest.raises(ValueError, match=says): read_items(tmp_path / "items.csv", tmp_path / "images", image_column=image_column)
    (tmp_path / "images/sub").symlink_to(file.parent)
    with pytest.raises(ValueError, match=says): one_item(tmp_path, "sub/a.png")

@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_links_within_the_folder_and_to_the_folder_are_fine(tmp_path):
    secret(tmp_path)
    (tmp_path / "images").symlink_to("secret")
    (tmp_path / "secret/b.png").symlink_to("a.png")
    for name in ("a.png", "b.png"): assert check_images(one_item(tmp_path, name)).table.images == [[tmp_path / "images" / name]]

def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def text_bomb(n_bytes):
    "Make a small PNG file whose comment grows to some bytes."
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * n_bytes, 9))
    return head + comment + chunk(b"IDAT", zlib.compress((b"\0" + b"\0" * 12) * 4)) + chunk(b"IEND", b"")

@pytest.mark.parametrize("data", [bomb(60_000, 60_000), bomb(10_000, 10_000), text_bomb(1 << 30)], ids=["huge", "large", "comment"])
def test_bombs_are_refused_and_take_no_memory(data, tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = check_images(one_item(tmp_path, "a.png"), decode=True)
    assert [name for name, _, _ in report.broken] == ["a"] and report.table.images == [[]]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB on Linux


# The report

HACK = "h()"  # counts, see `COUNTER`
PAYLOADS = (f"<script>{HACK}</script>", f'"><img src=x onerror={HACK}>', f"'><svg onload={HACK}>", f"&lt;img src=x onerror={HACK}&gt;",
            f"<scr<script>ipt>{HACK}</scr</script>ipt>", f"</code></pre></style></title><img src=x onerror={HACK}>",
            f"<iframe srcdoc='<img src=x onerror=parent.{HACK}>'>", "{{ 7 * 7 }}{% raw %}", f"javascript:{HACK}")

def evil(number, kind): return f"{kind}{number} {PAYLOADS[number % len(PAYLOADS)]}"

def evil_shop(folder):
    "Tables, pictures and names of files and columns that want to run; return options."
    names = {key: f"{key} <img src=x onerror={HACK}>" for key in ("user", "item", "title", "picture")}
    pictures = folder / f"pictures <img src=x onerror={HACK}>"
    pictures.mkdir(parents=True)
    items, rng = [evil(n, "item") for n in range(30)], np.random.default_rng(0)
    rows, table = [], []
    for number, item in enumerate(items):
        file = f"{number} \"><img src=x onerror={HACK}>.png"
        if number % 3: Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(pictures / file)
        elif number: (pictures / file).write_bytes(b"no picture")  # the report names a broken one
        table.append({names["item"]: item, names["title"]: evil(number + 1, "A red pan, number "), names["picture"]: file if number else None})
    for user in range(N_USERS):
        rows += [{names["user"]: evil(user, "user"), names["item"]: items[(3 * user + step * (1 + user % 3)) % 30], "time": 100 * user + step}
                 for step in range(8)]
    events = folder / f"events <img src=x onerror={HACK}>.jsonl"
    for path, lines in ((events, rows), (folder / "items.jsonl", table)): path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return ["--interactions", events, "--items", folder / "items.jsonl", "--images", pictures, "--user-column", names["user"],
            "--item-column", names["item"], "--time-column", "time", "--text-columns", names["title"], "--image-column", names["picture"]]

@pytest.fixture(scope="module")
def evil_page(tmp_path_factory):
    "The report of a run in which all names are scripts."
    folder = tmp_path_factory.mktemp("evil")
    (folder / "clip").mkdir()
    make_clip(folder / "clip")
    out = folder / f"run <img src=x onerror={HACK}>"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEM_TITLES, "sasrec", f"SASRec {PAYLOADS[1]}")
        words = ["run", *evil_shop(folder / "shop"), "--systems", "sasrec", "--epochs", 2, "--hidden-size", 16, "--device", "cpu", "--quiet",
                 "--min-item", 1, "--new-items", .1, "--text-encoder", folder / "clip", "--image-encoder", folder / "clip", "--out", out]
        assert main([str(word) for word in words]) == 0
    return (out / "report.html").read_text(encoding="utf-8")

COUNTER = "<head><script>window.hacks=0;function h(){hacks++}</script>"
PROBE = ("<script>addEventListener('load',()=>setTimeout(()=>{const shown=document.body.innerText,"
         "hacks=window.hacks,others=document.querySelectorAll('iframe,svg,[onerror],[onload]').length,"
         "pre=document.createElement('pre');pre.textContent=JSON.stringify({hacks,others,shown});"
         "document.documentElement.replaceChildren(pre)},300))</script></body>")

def in_browser(page, folder):
    "Open a page; return how many payloads ran, how many elements of theirs there are, and the text that is shown."
    (folder / "page.html").write_text(page.replace("<head>", COUNTER).replace("</body>", PROBE), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking " \
            "--disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
    ran = subprocess.run([CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()],
                         capture_output=True, text=True, timeout=120)
    found = re.search("<pre>(.*)</pre>", ran.stdout, re.S)
    assert found, ran.stderr[-2000:]
    return json.loads(html.unescape(found[1]))

def test_the_page_has_no_element_of_a_name(evil_page):
    assert "<script" not in evil_page and "<iframe" not in evil_page and "<svg" not in evil_page
    assert not re.search(r"<[^>]*\son\w+\s*=", re.sub(r'"[^"]*"', '""', evil_page)), "an attribute that runs"

@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
def test_a_browser_shows_what_wants_to_run_and_runs_none(evil_page, tmp_path):
    seen = in_browser(evil_page, tmp_path)
    assert seen["hacks"] == seen["others"] == 0
    for name in ("user", "SASRec", "events", "picture", "title"):  # a user, a system, a file, an image's file, a column
        assert re.search(rf"{name}\d*\W.{{0,12}}(<img src=x onerror|<s|<i|javascript|{{{{ 7)", seen["shown"]), name
    assert "49" not in re.findall(r"item\d+ (\d+)", seen["shown"]), "a template was filled"

@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
@pytest.mark.parametrize("payload", PAYLOADS[:3])
def test_the_browser_would_see_a_payload_that_runs(payload, tmp_path):
    assert in_browser(f"<html><head></head><body><p title=''>{payload}</p></body></html>", tmp_path)["hacks"] == 1
