"The report: one file that loads nothing, shows text from outside as text, and is the same for the same run."
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
import torch
from jinja2 import UndefinedError
from markupsafe import Markup, escape
from PIL import Image

from mmseqrec.config import RunConfig
from mmseqrec.data.interactions import interaction_statistics, leave_one_out, make_interactions
from mmseqrec.data.items import ItemTable
from mmseqrec.data.sequences import TEST, SequenceStore
from mmseqrec.evaluation import Evaluation, compare_evaluations
from mmseqrec.experiments.run import Result, Run, RunData, difference
from mmseqrec.features.encoders import catalogue_from_arrays
from mmseqrec.features.keywords import STOP_WORDS, Keywords
from mmseqrec.models.missrec import MISSRec
from mmseqrec.app.report import (SystemSummary, best_baseline, choose_examples, choose_pictured, data_uri, embed_figure, example,
                                 examples_section, first_pictures, format_number, format_seconds, interests_section, keyword_card,
                                 keyword_settings, keywords_section, map_section, map_vectors, map_words, one_seed_note,
                                 plot_loss, plot_pretraining_terms, plot_validation, pretraining_section,
                                 render_part, report_html, report_sections, system_summaries, systems_section, thumbnail,
                                 training_section, what_ran_section, write_report)
from mmseqrec.training import History

EVIL = '<script>alert("x")</script> & <b>cheap</b>'
WORDS = ["red", "blue", "thing", "<i>soft</i>", "round", "a thing", "mid-sized"]
TERMS = ("loss", "nip_text", "nip_image", "cmcl_text", "cmcl_image")


def make_run(folder, n_users=60, n_items=40, seeds=(0,), features="both", systems=("popularity", "markov", "sasrec"),
             keywords=False, **config):
    """A run whose ranks are drawn at random; a third of the items lack a picture, one has a dangerous title.
    `mp4sr` was pre-trained for two epochs; keywords are drawn at random, too."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(n_users), rng.integers(4, 15, n_users))
    interactions = make_interactions(pl.Series([f"u<{u}>" for u in user]),
                                     pl.Series([f"i{i}" for i in rng.integers(0, n_items, len(user))]),
                                     np.arange(len(user)), source="made up")
    split = leave_one_out(interactions)
    store, V = SequenceStore.from_split(split), interactions.n_items
    tokens, images = interactions.item_tokens, [[]]
    for row in range(1, V + 1):
        path = folder / f"{row}.png"
        if row % 3: Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(path)
        images.append([path] if row % 3 else [])
    texts = [[], [EVIL], *([f"A {('red', 'blue')[row % 2]} thing {tokens[row]}."] for row in range(2, V)), []]
    arrays = {"text_emb": rng.standard_normal((V, 6)), "image_emb": rng.standard_normal((V, 4))}
    kept = {name: x for name, x in arrays.items() if features == "both" or name.startswith(features)}
    top = np.array([rng.permutation(len(WORDS))[None, :5] if files else np.full((1, 5), -1) for files in images])
    made = {"n_keywords": 5, "standardize": True, "word_encoder": {"name": f"clip {EVIL}"}}
    data = RunData(f"made up {EVIL}", interactions, split, store, ItemTable(tokens, texts, images),
                   catalogue_from_arrays(tokens[1:], **kept), interaction_statistics(interactions),
                   keywords=Keywords(WORDS, torch.from_numpy(top), tokens, made) if keywords else None,
                   notes=[f"A note {EVIL}"], seconds={"raw": 1.})
    events, results = store.rows(TEST), []
    for place, system in enumerate(systems):
        learned = system not in ("popularity", "markov")
        for seed in seeds if learned else seeds[:1]:
            ranks = rng.integers(1, V + 1 - 8 * place, len(events)).astype(float)
            top = np.argsort(rng.random((len(events), V)), 1)[:, :10] + 1
            epochs = [{"epoch": e, **({"loss": 3. - e} if learned else {}), "ndcg@10": .1 + .01 * e, "seconds": .5}
                      for e in range(3 if learned else 1)]
            history = History(epochs=epochs, best_value=epochs[-1]["ndcg@10"], best_epoch=len(epochs) - 1, finished=True)
            evaluation = Evaluation(ranks, store.items[events].astype(np.int64), store.user[events],
                                    store.history_length(events), top, V)
            before = History([{"epoch": e, **{name: 5. - e + n for n, name in enumerate(TERMS)}, "ndcg@10": .2 - .05 * e,
                               "seconds": .25} for e in range(2)], best_epoch=0, best_value=.2, finished=True)
            results.append(Result(system, seed, evaluation, history, {}, 1.5, .1, 1234 * learned, folder,
                                  before if system == "mp4sr" else None))
    config = RunConfig(systems=systems, seeds=seeds, device="cpu", **config)
    return Run(config, data, results, folder, {"raw": 1., "training": 75.}, {"time": "2030-01-01T00:00:00Z", "python": "3"})


@pytest.fixture(scope="module")
def run(tmp_path_factory): return make_run(tmp_path_factory.mktemp("run"))

@pytest.fixture(scope="module")
def page(run): return report_html(run, f"mmseqrec run --items '{EVIL}'", n_examples=2)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "A run with everything: keywords, and MP4SR with and without pre-training."
    return make_run(tmp_path_factory.mktemp("full"), systems=("popularity", "markov", "mp4sr_scratch", "mp4sr"), keywords=True,
                    pretrain_epochs=9, pretrain_batch_size=2048)

@pytest.fixture(scope="module")
def full_page(full): return report_html(full, n_examples=1)


def section_html(section, run, *args, systems=None):
    "The HTML of a section: what its function returns, written by the macro of its name."
    return render_part(section.__name__, section(run, systems or system_summaries(run), *args))

def text_of(page):
    "What a reader sees: no tags, no repeated white space."
    return str(Markup(page).striptags())

def facts_of(run):
    "The list of facts: name -> text."
    page = section_html(what_ran_section, run)
    return {name: text_of(text) for name, text in re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page, re.S)}

def rows_of(page): return re.findall("<tr>.*?</tr>", page, re.S)[1:]

def headline_of(run, systems):
    return text_of(render_part("headline", systems_section(run, systems), what_ran_section(run, systems)))


class Checker(html.parser.HTMLParser):
    "Collects tags, attributes and visible text; every tag that is opened must be closed in order."
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses, self.text, self.handlers, self.ids = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"): self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "poster"): self.addresses.append(value)
            if name.startswith("on"): self.handlers.append(name)
            if name == "id": self.ids.append(value)
            if tag == "img" and name == "alt": assert value

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text.append(data)

def check(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker

@pytest.fixture(scope="module")
def checked(page): return check(page)


# Self-contained and safe

def test_the_page_loads_nothing(page, checked):
    assert not {"script", "link", "iframe", "object", "embed"} & set(checked.tags) and not checked.handlers
    assert all(re.match(r"data:image/(png|jpeg);base64,|#", address) for address in checked.addresses)
    assert "@import" not in page and "url(" not in page

def test_links_of_the_page_lead_to_its_sections(checked):
    links = [address[1:] for address in checked.addresses if address.startswith("#")]
    assert links == checked.ids and len(set(links)) == 9

def test_text_from_outside_is_text(page, checked):
    assert "<script" not in page and "<b>cheap" not in page
    text = "".join(checked.text)
    assert text.count(EVIL) >= 5  # source (twice), note, command (twice); the title where its card has no picture
    assert "u<" in text

def test_the_same_run_gives_the_same_bytes(run, page, tmp_path):
    before = dict(plt.rcParams)
    path = write_report(run, tmp_path / "r" / "report.html", f"mmseqrec run --items '{EVIL}'", n_examples=2)
    assert path.read_text(encoding="utf-8") == page and [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert plt.get_fignums() == [] and {k: v for k, v in plt.rcParams.items() if v != before[k]} == {}

def test_a_failed_report_leaves_the_old_one(run, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("mmseqrec.app.report.report_sections", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_report(run, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1

def test_a_figure_with_few_colours_is_smaller_and_as_wide():
    def draw(**options):
        fig, ax = plt.subplots()
        ax.imshow(np.random.default_rng(0).random((40, 40, 3)))
        return embed_figure(fig, **options)
    full, small = draw(), draw(n_colors=16)
    assert len(small["src"]) < .8 * len(full["src"]) and small["width"] == full["width"]

def test_the_page_is_small(page): assert len(page) < 5e6


# What it says

def test_one_seed_is_not_a_ranking(run, page, tmp_path):
    assert "One seed: not a ranking." in page and "seeds ±" not in page
    several = make_run(tmp_path, seeds=(0, 1), systems=("popularity", "sasrec"))
    text = render_part("main_table", systems_section(several, system_summaries(several)))
    assert one_seed_note(several) == "" and text.count("seeds ±") == 2 and "seeds ±0.000" not in text

def test_every_system_and_metric_stands_in_the_table(page):
    for name in ("Popularity", "First-order Markov", "SASRec over IDs", *(f"{m}@{k}" for m in ("Recall", "NDCG", "MRR")
                                                                          for k in (10, 20, 50))): assert f">{name}<" in page

def test_numbers_are_those_of_the_evaluation(run):
    systems = system_summaries(run)
    for system, result in zip(systems, run.results):
        summary = system.summary("ndcg@10")
        assert summary["value"] == pytest.approx(result.evaluation.metrics()["ndcg@10"])
        assert (summary["low"], summary["high"]) == result.evaluation.interval("ndcg@10") and summary["spread"] is None
    assert difference(systems[2].results, systems[1].results) == compare_evaluations(run.results[2].evaluation, run.results[1].evaluation)

def test_every_user_counts_once(run):
    evaluation = dataclasses.replace(run.results[0].evaluation, user=np.minimum(run.results[0].evaluation.user, 3))
    system = SystemSummary([dataclasses.replace(run.results[0], evaluation=evaluation)])
    values = evaluation.values("ndcg@10")
    expected = np.mean([values[evaluation.user == u].mean() for u in range(4)])
    assert system.summary("ndcg@10")["value"] == pytest.approx(expected) == evaluation.metrics()["ndcg@10"]

def test_seeds_are_averaged_by_user(tmp_path):
    run = make_run(tmp_path, seeds=(0, 1, 2), systems=("markov", "sasrec"))
    system = system_summaries(run)[1]
    values = [r.evaluation.values("recall@10") for r in system.results]
    np.testing.assert_allclose(system.values("recall@10"), (values[0] + values[1] + values[2]) / 3)
    assert system.summary("recall@10")["spread"] == pytest.approx(np.std([v.mean() for v in values], ddof=1))

def test_the_headline_names_the_best_baseline(run, tmp_path):
    systems = system_summaries(run)
    simple = {s.key: s.values("ndcg@10").mean() for s in systems[:2]}
    assert best_baseline(systems).key == max(simple, key=simple.get)
    classical = system_summaries(make_run(tmp_path, systems=("popularity", "itemknn", "sasrec")))
    simple = {s.key: s.values("ndcg@10").mean() for s in classical if s.key != "sasrec"}
    assert best_baseline(classical).key == max(simple, key=simple.get)
    assert "SASRec over IDs" in headline_of(run, systems)
    assert "No other system is ahead" in headline_of(run, systems[:2])
    alone = make_run(tmp_path, systems=("sasrec",))
    assert best_baseline(system_summaries(alone)) is None
    assert "<td>–</td>" in section_html(systems_section, alone)

def test_curves_of_a_run_without_training(tmp_path):
    run = make_run(tmp_path, systems=("popularity", "markov"))
    systems = system_summaries(run)
    assert not plot_loss(systems).lines and len(plot_validation(systems).lines) == 2
    assert training_section(run, systems) is None
    plt.close("all")

@pytest.mark.parametrize("features", ["text", "image", "none"])
def test_a_modality_may_be_missing(features, tmp_path):
    run = make_run(tmp_path, features=features)
    sections = report_sections(run, system_summaries(run), n_examples=1)
    assert (sections["Map of the items"][1] is not None) == (features != "none")
    plt.close("all")

def test_recall_at_10_as_the_metric_is_drawn_once(tmp_path):
    run = make_run(tmp_path, metric="recall@10", systems=("popularity",))
    assert section_html(systems_section, run).count("<figure>") == 1
    plt.close("all")


# Examples

def test_examples_hold_history_target_and_lists(run):
    systems = system_summaries(run)
    row = choose_examples(systems, 1)[0]
    text, target = render_part("example", example(run, systems, row)), int(run.results[0].evaluation.pos_item[row])
    assert text.count('class="strip') == 1 + len(systems)
    hits = sum(target in r.evaluation.top_items[row] for r in run.results)
    assert text.count("card framed") == 1 + hits
    history = run.data.store.history_length(run.data.store.rows(TEST))[row]
    assert len(re.findall('class="card( framed)?"', text)) == min(history, 9) + 1 + 10 * len(systems)
    assert f"{history} items" in text

def test_examples_are_half_hits(run):
    systems = system_summaries(run)
    best = np.min([r.evaluation.ranks for r in run.results], axis=0)
    rows = choose_examples(systems, 6)
    assert len(set(rows)) == 6 and (best[rows] <= 10).tolist() == [True] * 3 + [False] * 3
    assert len(set(choose_examples(systems, 1000))) == len(best)

def test_an_item_without_picture_shows_its_title(run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    assert thumbnail(broken) is None and thumbnail(tmp_path / "absent.png") is None
    images = [[broken] * bool(row) for row in range(len(run.data.items.item_tokens))]
    items = dataclasses.replace(run.data.items, images=images)
    without = dataclasses.replace(run, data=dataclasses.replace(run.data, items=items))
    text = render_part("example", example(without, system_summaries(run), 0))
    assert "<img" not in text and "<span>A " in text


# Pre-training

def headings(page): return re.findall("<h2>(.*?)</h2>", page)

def test_sections_of_a_run_with_everything(page, full_page):
    new = {"Pre-training", "Pictures and their keywords"}
    assert not new & set(headings(page)) and "Pre-training" not in page and "Keywords" not in page
    assert new < set(headings(full_page)) and len(headings(full_page)) == 11
    checked = check(full_page)
    assert [address[1:] for address in checked.addresses if address.startswith("#")] == checked.ids
    assert "<script" not in full_page and "<i>soft" not in full_page and "<b>cheap" not in full_page
    assert headings(full_page).index("Pre-training") < headings(full_page).index("Training")

def test_facts_name_pretraining_and_keywords(run, full):
    facts, said = facts_of(full), text_of(render_part("keywords_sentence", keyword_settings(full)))
    assert facts["Pre-training"].startswith("MP4SR: at most 9 epochs of 2,048 histories a step")
    assert "5 words a picture, out of 7 " in said and EVIL in said and facts["Keywords"] == said
    shipped = dataclasses.replace(full.data.keywords, settings={"word_encoder": {"name": "shipped"}})
    shipped = dataclasses.replace(full, data=dataclasses.replace(full.data, keywords=shipped))
    said = text_of(render_part("keywords_sentence", keyword_settings(shipped)))
    assert "the small CLIP shipped with mmseqrec" in said and "level" not in said
    assert keyword_settings(run) is None and not {"Keywords", "Pre-training"} & set(facts_of(run))

def test_the_table_says_who_was_pretrained(full):
    rows = rows_of(render_part("main_table", systems_section(full, system_summaries(full))))
    said = ["pre-trained, then fine-tuned" in row for row in rows]
    assert said == [False, False, False, True] and ["pre-training 0.5 s" in row for row in rows] == said
    assert ">1.5 s<" in rows[3] and "MP4SR, not pre-trained" in rows[2]

def test_twins_are_compared_user_by_user(run, full):
    systems = system_summaries(full)
    twins = pretraining_section(full, systems)["twins"]
    assert [[row["title"] for row in pair["rows"]] for pair in twins] == [["MP4SR", "MP4SR, not pre-trained"]]
    page = section_html(pretraining_section, full)
    rows = rows_of(page)
    assert len(rows) == 3 and "MP4SR<" in rows[0] and "MP4SR, not pre-trained<" in rows[1]
    for cell, metric in zip(re.findall("<td>(.*?)</td>", rows[2]), ("ndcg@10", "recall@10")):
        d = difference(systems[3].results, systems[2].results, metric)
        assert [format_number(d[k], "+") for k in ("difference", "low", "high")] == re.findall("[+\u2212]\\d\\.\\d{3}", cell)
    alone = systems[:2] + systems[3:]
    assert pretraining_section(full, alone)["twins"] == [] and pretraining_section(run, system_summaries(run)) is None
    assert "Equal in all" in page and "Equal in all" not in section_html(pretraining_section, full, systems=alone)
    plt.close("all")

def test_curves_of_pretraining(full, tmp_path):
    systems = system_summaries(full)
    lines = {line.get_label(): line.get_xydata().tolist() for line in plot_pretraining_terms(systems[3]).lines}
    assert lines == {name: [[1, 5 + n], [2, 4 + n]] for n, name in
                     enumerate(("sum", "NIP text", "NIP image", "CMCL text", "CMCL image"))}
    line, dot = plot_validation(systems[2:], phase="pre-training").lines
    np.testing.assert_allclose(line.get_xydata(), [[1, .2], [2, .15]])
    assert dot.get_xydata().tolist() == [[1, .2]] and line.get_color() == systems[3].color
    assert len(plot_validation(systems).lines) == 2 + 2 * 2  # the curves of fine-tuning are those of before
    several = system_summaries(make_run(tmp_path, seeds=(0, 1), systems=("markov", "mp4sr")))
    assert len(plot_validation(several[1:], phase="pre-training").lines) == 4
    plt.close("all")

def test_terms_of_other_systems_keep_their_names(full):
    terms = ("loss", "sequence_item", "sequence_sequence", "diversity")
    epochs = [{"epoch": e, **{name: 3. - e + n for n, name in enumerate(terms)}, "ndcg@10": .1, "seconds": 1.} for e in range(5)]
    result = dataclasses.replace(full.results[-1], system="missrec", pretraining=History(epochs, best_epoch=0, best_value=.1))
    lines = plot_pretraining_terms(SystemSummary([result])).lines
    assert [line.get_label() for line in lines] == ["sum", "sequence to item", "sequence to sequence", "diversity"]
    assert len({line.get_color() for line in lines}) == 4
    plt.close("all")

def test_a_pretraining_without_an_epoch_is_none(full):
    result = dataclasses.replace(full.results[-1], pretraining=History())
    run = dataclasses.replace(full, results=[*full.results[:-1], result])
    systems = system_summaries(run)
    assert not systems[-1].is_pretrained and pretraining_section(run, systems) is None
    plt.close("all")


# Interests

def with_missrec(run, folder, **sizes):
    "The run with a MISSRec of untrained weights in place of its last system."
    MISSRec(**sizes, hidden_size=8, inner_size=8, n_heads=2).set_catalogue(run.data.catalogue).save_pretrained(folder)
    results = [dataclasses.replace(result, system="missrec", folder=folder) for result in run.results[-1:]]
    return dataclasses.replace(run, results=[*run.results[:-1], *results])

def test_interests_are_shown_where_missrec_found_some(run, tmp_path):
    shown = with_missrec(run, tmp_path / "model", text_size=6, image_size=4)
    text = render_part("interests_section", interests_section(shown))
    model = MISSRec.from_pretrained(str(tmp_path / "model"))
    there = int((~run.data.catalogue.missing_text_mask[1:]).sum() + (~run.data.catalogue.missing_image_mask[1:]).sum())
    assert f"of the {model.items.interests.n_interests:,} interests that MISSRec found for {there:,} texts" in text and "<img" in text
    assert report_sections(shown, system_summaries(shown), n_examples=1)["Interests"][1] is not None
    assert interests_section(run) is None
    plt.close("all")

def test_interests_of_one_modality_are_not_shown(tmp_path):
    assert interests_section(with_missrec(make_run(tmp_path, features="text"), tmp_path / "model", text_size=6)) is None

def test_first_pictures_can_be_read(run, tmp_path):
    (broken := tmp_path / "broken.png").write_bytes(b"nothing")
    good = next(files[0] for files in run.data.items.images if files)
    items = dataclasses.replace(run.data.items, images=[[], [broken], [broken, good], *run.data.items.images[3:]])
    assert first_pictures(items)[:3] == [None, None, good]


# Pictures and their keywords

def test_a_card_shows_the_words_in_order_and_marks_those_of_the_own_text(full):
    row = next(row for row in range(2, 40) if row % 3)
    own = set(" ".join(full.data.items.texts[row]).lower().replace(".", "").split())
    words = full.data.keywords.of(row)
    cards = {r: render_part("keyword_card", keyword_card(full, r)) for r in range(2, 40) if r % 3}
    cells = re.findall("<li>(.*?)</li>", cards[row])
    is_own = [set(word.split()) <= own for word in words]
    assert cells == [f"<b>{word}</b>" if marked else escape(word) for word, marked in zip(words, is_own)]
    every = [re.findall("<b>(.*?)</b>", card) for card in cards.values()]
    assert {word for words in every for word in words} == {"red", "blue", "thing", "a thing"}
    assert not any({"red", "blue"} <= set(words) for words in every)

def test_pictured_items_are_spread_over_popularity(full):
    counts, rows = full.data.split.item_counts(), choose_pictured(full, 5)
    assert rows == choose_pictured(full, 5) and len(set(rows)) == 5 and all(row % 3 for row in rows)
    known = sorted((row for row in range(1, len(counts)) if row % 3), key=lambda row: (-counts[row], row))
    size = -(-len(known) // 5)
    assert rows[0] == known[0] and rows == sorted(rows, key=lambda row: (-counts[row], row))
    assert all(abs(known.index(row) - place * len(known) / 5) < size for place, row in enumerate(rows))
    assert len(choose_pictured(full, 1000)) == len(known)
    page = render_part("keywords_section", keywords_section(full, 5))
    said = text_of(render_part("keywords_sentence", keyword_settings(full)))
    assert page.count("<article") == 5 and said in text_of(page)

def test_pictures_that_cannot_be_read_are_not_chosen(full, tmp_path):
    best = choose_pictured(full, 1)[0]
    (broken := tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    def having(images):
        items = dataclasses.replace(full.data.items, images=images)
        return dataclasses.replace(full, data=dataclasses.replace(full.data, items=items))
    images = [[broken] if row == best else files for row, files in enumerate(full.data.items.images)]
    assert choose_pictured(having(images), 1)[0] != best
    nothing = having([[broken] * bool(files) for files in full.data.items.images])
    assert choose_pictured(nothing) == [] and keywords_section(nothing)["examples"] == []
    assert "<article" not in render_part("keywords_section", keywords_section(nothing))


# Parts

def test_map_vectors_are_normalised_and_zero_where_missing(run):
    x = map_vectors(run.data.catalogue)
    np.testing.assert_allclose(np.linalg.norm(x[:, :6], axis=1), 1)
    part = catalogue_from_arrays(["a", "b", "c"], text_emb=np.array([[1., 2], [0, 0], [5, 1]]), image_emb=np.eye(3))
    assert (map_vectors(part)[1, :2] == 0).all()

def test_words_name_groups_that_lie_together():
    texts = [[f"A {kind} number {n}"] for kind in ("pan", "mug", "box") for n in range(20)]
    vectors = np.repeat(np.eye(3), 20, axis=0) - 1 / 3
    assert map_words(texts, vectors, 3) == [kind for kind in ("pan", "mug", "box") for _ in range(20)]
    assert set(map_words([[] for _ in range(5)], np.eye(5))) == {"other"}
    plain = [[f"There {'without' if n < 9 else 'within'} it"] for n in range(18)]
    assert {"there", "without", "within", "it"} <= STOP_WORDS
    assert set(map_words(plain, np.repeat(np.eye(2), 9, axis=0) - .5)) == {"other"}, "words without meaning name no place"
    films = [[f"{chr(97 + n) * 4}", f"A {('comedy', 'drama', 'horror')[n % 3]}."] for n in range(24)]
    assert set(map_words(films, np.eye(3)[np.arange(24) % 3])) == {"comedy", "drama", "horror"}

def test_a_picture_survives_as_text(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    assert data_uri(thumbnail(tmp_path / "a.png")).startswith("data:image/")
    assert thumbnail(tmp_path / "a.png") == thumbnail(tmp_path / "a.png")

def test_figures_are_closed_and_described():
    figure, ax = plt.subplots()
    text = render_part("figure", embed_figure(ax), 'Left "good" & <right>')
    assert 'alt="Left &#34;good&#34; &amp; &lt;right&gt;"' in text and not plt.fignum_exists(figure.number)

def test_numbers_and_times_are_written_for_people():
    assert format_number(-.0214, "+") == "\u22120.021" and format_number(.5, "+") == "+0.500"
    assert [format_seconds(s) for s in (.04, 9.94, 10, 59.4, 3601)] == ["0.0 s", "9.9 s", "10 s", "59 s", "60 min 1 s"]


# The template

def test_every_value_is_escaped_where_it_is_shown():
    card = render_part("card", {"title": "<&>\"'", "src": None, "framed": False})
    assert card.count("&lt;&amp;&gt;&#34;&#39;") == 2 and text_of(card) == "<&>\"'"

def test_what_the_data_lack_is_an_error():
    with pytest.raises(UndefinedError, match="framed"): render_part("card", {"title": "", "src": None})
    with pytest.raises(AttributeError, match="no_such_macro"): render_part("no_such_macro", {})

def test_the_data_of_sections_are_plain(full):
    sections = report_sections(full, system_summaries(full), n_examples=1)
    assert json.loads(json.dumps(sections)).keys() == sections.keys()
    assert {name: render_part(macro, data) for name, (macro, data) in json.loads(json.dumps(sections)).items() if data} == {
        name: render_part(macro, data) for name, (macro, data) in sections.items() if data}
    plt.close("all")


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium has no narrower window
@pytest.mark.parametrize("which", ["page", "full_page"])
def test_a_browser_draws_it(which, tmp_path, width, request):
    "The page is drawn, is not wider than the window, and its pictures are decoded."
    page = request.getfixturevalue(which)
    probe = ("<script>addEventListener('load',()=>{const d=document.documentElement;const broken=[...document.images]"
             ".filter(i=>!i.naturalWidth).length;document.title=[d.scrollWidth-d.clientWidth,broken,document.images.length]})"
             "</script></body>")
    (tmp_path / "page.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking " \
            "--disable-component-update --disable-sync --hide-scrollbars --dump-dom"
    ran = subprocess.run([CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
                          (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(-?\d+),(\d+),(\d+)</title>", ran.stdout)
    assert found, ran.stderr[-2000:]
    wider, broken, images = map(int, found.groups())
    assert wider <= 0 and broken == 0 and images > 20
