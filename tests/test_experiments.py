"Experiments: which systems the data permit, what a result keeps, what it depends on, and runs that are interrupted anywhere."
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

import mmseqrec.experiments.run as experiments
import mmseqrec.training as training
from killed_runs import make_clip
from mmseqrec.config import ALL, STANDARD, RunConfig
from mmseqrec.core import derive_seed, set_seed
from mmseqrec.data.sequences import TRAIN
from mmseqrec.experiments.run import (SYSTEMS, RunData, difference, load_result, prepare_data,
                                  result_fingerprint, result_table, run_all, run_system, save_result)
from mmseqrec.features.clip import IMAGE_SETTINGS, quiet_transformers
from mmseqrec.features.sentences import fit_lsa
from mmseqrec.models.mp4sr import MP4SR
from mmseqrec.training import fit
from small_shop import COLOURS, THINGS, quick_config, write_shop
from small_world import make_catalogue, make_store, same, weights, without_seconds

READERS = tuple(name for name, system in SYSTEMS.items() if system.reads_keywords)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder)
    return folder

@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    "A tiny picture encoder that knows no words."
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    with quiet_transformers():
        ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=64,
                           patch_size=32)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS))
    return folder

@pytest.fixture(scope="module")
def shop(tmp_path_factory): return write_shop(tmp_path_factory.mktemp("shop"))

@pytest.fixture(scope="module")
def config(shop, clip): return quick_config(shop, clip)

@pytest.fixture(scope="module")
def prepared(config, tmp_path_factory): return prepare_data(config, tmp_path_factory.mktemp("run"), progress=False)

@pytest.fixture(scope="module")
def data():
    "Events and features without any file: what `run_system` looks at."
    store, catalogue = make_store(40), make_catalogue()
    return RunData("", None, None, store, None, catalogue, {}, keyword_catalogue=make_catalogue(seed=1))

@pytest.fixture(scope="module")
def quick(): return quick_config({}, "shipped")


# Which systems run

def test_with_texts_pictures_and_a_clip_all_standard_systems_run(prepared, config):
    assert config.systems is None and prepared.systems == STANDARD and set(STANDARD) <= set(ALL)
    assert not any("left out" in note for note in prepared.notes)
    assert prepared.catalogue_of("sasrec") is prepared.catalogue_of("content_sasrec") is prepared.catalogue
    for name in READERS: assert prepared.catalogue_of(name) is prepared.keyword_catalogue

def test_keywords_are_words_of_the_texts(prepared):
    keywords, V = prepared.keywords, prepared.interactions.n_items
    assert set(keywords.words) == set(COLOURS + THINGS) and keywords.item_tokens == prepared.interactions.item_tokens
    assert keywords.top.shape == (V + 1, 1, 4) and all(len(set(keywords.of(row))) == 4 for row in range(1, V + 1))
    assert prepared.keyword_catalogue.image_emb.shape[-1] == prepared.catalogue.text_emb.shape[-1]
    assert torch.equal(prepared.keyword_catalogue.text_emb, prepared.catalogue.text_emb)

def not_permitted(files, clip, tmp_path, says, **settings):
    "Standard systems are left out with a sentence; asked for, they are one clear error."
    data = prepare_data(quick_config(files, clip, **settings), tmp_path / "a", progress=False)
    assert data.systems == tuple(name for name in STANDARD if name not in READERS)
    assert data.keywords is None and data.keyword_catalogue is None
    sentences = [note for note in data.notes if "left out" in note]
    assert len(sentences) == sum(name in READERS for name in STANDARD)
    for name, sentence in zip(("mp4sr_scratch", "mp4sr"), sentences):
        assert sentence.startswith(SYSTEMS[name].title) and says in sentence and sentence.endswith(".")
    for asked in (("mp4sr",), ("popularity", "mp4sr_no_mixup")):
        with pytest.raises(ValueError, match=says) as caught:
            prepare_data(quick_config(files, clip, systems=asked, **settings), tmp_path / "a", progress=False)
        assert f"leave {asked[-1]} out" in str(caught.value) and "\n" not in str(caught.value)
    plain = quick_config(files, clip, systems=("popularity", "content_sasrec"), **settings)
    alone = prepare_data(plain, tmp_path / "a", progress=False)
    assert alone.systems == plain.systems and not any("left out" in note for note in alone.notes)

def test_without_pictures(clip, tmp_path):
    not_permitted(write_shop(tmp_path / "shop", pictures=False), clip, tmp_path, "needs pictures, and there are none")

def test_without_texts(clip, tmp_path):
    not_permitted(write_shop(tmp_path / "shop", describe=lambda row: ""), clip, tmp_path, "needs texts, and there are none",
                  text_columns=("title",))

def test_without_a_word_that_items_share(clip, tmp_path):
    files = write_shop(tmp_path / "shop", describe=lambda row: f"A{chr(97 + row) * 3} b{chr(97 + row) * 3}.")
    data = prepare_data(quick_config(files, clip), tmp_path / "a", progress=False)
    assert data.systems == tuple(name for name in STANDARD if name not in READERS) and data.keywords is None
    sentence, = [note for note in data.notes if "left out" in note]
    assert "no keyword is left" in sentence
    with pytest.raises(ValueError, match="no keyword is left"):
        prepare_data(quick_config(files, clip, systems=("mp4sr",)), tmp_path / "a", progress=False)

def test_with_a_picture_encoder_that_knows_no_words(shop, clip, vit, tmp_path):
    not_permitted(shop, clip, tmp_path, "such as a CLIP", image_encoder=str(vit))

def test_who_reads_no_keywords_makes_none(config, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "keyword_catalogue", lambda *_, **__: 1 / 0)
    data = prepare_data(replace(config, systems=("sasrec",)), tmp_path, progress=False)
    assert data.keywords is None and data.systems == ("sasrec",)

def test_the_number_of_keywords_is_the_one_asked_for(config, tmp_path):
    data = prepare_data(replace(config, n_keywords=2, systems=("mp4sr",)), tmp_path, progress=False)
    assert data.keywords.top.shape[2] == data.keywords.settings["n_keywords"] == 2


# Where data come from

def write_features(shop, folder, size=6, lack=()):
    "One row for each line of the shop's items; rows in `lack` are zeros."
    n = len(Path(shop["items"]).read_text().splitlines())
    rows = np.random.default_rng(0).normal(size=(n, size)).astype(np.float16)
    rows[list(lack)] = 0
    np.save(folder / "features.npy", rows)
    return rows, str(folder / "features.npy")

def test_given_features_are_taken_by_line(shop, clip, tmp_path):
    rows, path = write_features(shop, tmp_path, lack=(1,))
    data = prepare_data(quick_config(shop, clip, text_features=path), tmp_path / "a", progress=False)
    lines = [json.loads(line)["item_id"] for line in Path(shop["items"]).read_text().splitlines()]
    for row, token in enumerate(data.catalogue.item_tokens[1:], 1):
        np.testing.assert_array_equal(data.catalogue.text_emb[row, 0], rows[lines.index(token)].astype(np.float32))
        assert data.catalogue.missing_text_mask[row] == (token == lines[1])
    assert data.catalogue.image_emb is None and "nothing was encoded" in data.notes[0]
    assert data.systems == tuple(name for name in STANDARD if name not in READERS)
    with pytest.raises(ValueError, match="pictures, and there are none; leave mp4sr out"):
        prepare_data(quick_config(shop, clip, text_features=path, systems=("mp4sr",)), tmp_path / "a", progress=False)
    both = quick_config(shop, clip, text_features=path, image_features=path, systems=("mp4sr",))
    with pytest.raises(ValueError, match="only features were given; leave mp4sr out"):
        prepare_data(both, tmp_path / "a", progress=False)

def test_features_of_another_table_are_refused(shop, clip, tmp_path):
    rows, path = write_features(shop, tmp_path)
    np.save(path, rows[:-1])
    with pytest.raises(ValueError, match=rf"features.npy has the shape \[{len(rows) - 1}, 6\].*one row for each of the {len(rows)} lines"):
        prepare_data(quick_config(shop, clip, image_features=path), tmp_path / "a", progress=False)

def test_a_source_and_own_tables_are_one_too_many():
    with pytest.raises(ValueError, match="either a source .movielens-1m. or tables of your own .e.csv."):
        RunConfig(source="movielens-1m", interactions="e.csv")

@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    "Six users on a ring of five items, in the form of the released code, with texts and pictures as numbers."
    folder, head = tmp_path_factory.mktemp("bench") / "Ring", "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    folder.mkdir()
    files = dict(train="", valid="", test="")
    for user in range(6):
        walk = [str((user + step) % 5) for step in range(6)]
        for end in range(1, 6):
            part = "test" if end == 5 else "valid" if end == 4 else "train"
            files[part] += f"{user}\t{' '.join(walk[:end])}\t{walk[end]}\n"
    for part, rows in files.items(): (folder / f"Ring.{part}.inter").write_text(head + rows)
    (folder / "Ring.item2index").write_text("".join(f"thing-{i}\t{i}\n" for i in range(5)))
    for number, seed in ((1, 0), (2, 1), (3, 2)):
        np.random.default_rng(seed).normal(size=(5, 4)).astype(np.float32).tofile(folder / f"Ring.feat{number}CLS")
    return folder

def test_a_published_split_is_taken_as_it_is(bench, tmp_path):
    config = quick_config({"source": f"benchmark:{bench}"}, "shipped", systems=("popularity", "sasrec", "missrec"))
    run = run_all(config, tmp_path, progress=False)
    data = run.data
    assert (data.statistics["n_users"], data.statistics["n_items"], data.statistics["n_events"]) == (6, 5, 36)
    assert "as published" in data.notes[0] and len(run.results) == 3
    for table, number in ((data.catalogue.text_emb, 1), (data.catalogue.dropped_text_emb, 2), (data.catalogue.image_emb, 3)):
        dump = np.fromfile(bench / f"Ring.feat{number}CLS", np.float32).reshape(5, 4)
        for row, token in enumerate(data.catalogue.item_tokens[1:], 1):
            np.testing.assert_array_equal(table[row, 0], dump[int(token)])
    assert prepare_data(replace(config, systems=None), tmp_path, progress=False).systems == tuple(
        name for name in STANDARD if name not in READERS)

TEXTS = ("a red steel mug", "a blue steel mug", "a red glass bowl", "a blue glass bowl", "   ")

def write_texts(bench, folder):
    "Copy a published split without its features; the last item's text is blank."
    folder.mkdir()
    for path in bench.iterdir():
        if "feat" not in path.suffix: (folder / path.name).write_bytes(path.read_bytes())
    rows = "".join(f"thing-{k}\t{text}\n" for k, text in enumerate(TEXTS))
    (folder / "Ring.text").write_text("item_id:token\ttext:token_seq\n" + rows)
    return f"benchmark:{folder}"

def test_published_texts_are_encoded_where_there_are_no_features(bench, tmp_path):
    source = write_texts(bench, tmp_path / "texts")
    config = quick_config({"source": source}, "shipped", systems=("unisrec", "sasrec"), text_encoder="lsa")
    data = prepare_data(config, tmp_path / "a", progress=False)
    assert data.notes[0] == "The split was taken as published."
    assert any("TF-IDF" in note for note in data.notes) and not any("Pictures" in note for note in data.notes)
    tokens = data.catalogue.item_tokens
    expected = fit_lsa([TEXTS[int(token)] for token in tokens[1:] if TEXTS[int(token)].strip()])
    for row, token in enumerate(tokens[1:], 1):
        blank = not TEXTS[int(token)].strip()
        assert data.catalogue.missing_text_mask[row] == blank
        if not blank: np.testing.assert_allclose(data.catalogue.text_emb[row, 0], expected.encode([TEXTS[int(token)]])[0], atol=1e-5)
    assert data.catalogue.dropped_text_emb.shape == data.catalogue.text_emb.shape and data.catalogue.image_emb is None
    assert run_system("unisrec", 0, data, config, tmp_path / "a", progress=False).evaluation.n_items == 5

def test_published_texts_are_not_encoded_for_systems_without_content_nor_beside_features(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_load_encoders", None)
    source = write_texts(bench, tmp_path / "texts")
    ids = quick_config({"source": source}, "shipped", systems=("sasrec",))
    assert prepare_data(ids, tmp_path / "a", progress=False).catalogue.text_emb is None
    for path in bench.glob("*CLS"): (tmp_path / "texts" / path.name).write_bytes(path.read_bytes())
    data = prepare_data(replace(ids, systems=("unisrec",)), tmp_path / "b", progress=False)
    np.testing.assert_array_equal(data.catalogue.text_emb[1, 0], np.fromfile(bench / "Ring.feat1CLS", np.float32)[:4])

def test_without_texts_with_missing_words_nothing_is_dropped_but_items(shop, clip, tmp_path):
    _, path = write_features(shop, tmp_path)
    data = prepare_data(quick_config(shop, clip, text_features=path, systems=("unisrec",)), tmp_path / "a", progress=False)
    assert any("pre-training only drops items" in note for note in data.notes)
    result = run_system("unisrec", 0, data, quick_config(shop, clip), tmp_path / "b", progress=False)
    assert result.pretraining.epochs


# Systems as recipes

def test_ablations_can_be_named_and_are_not_among_all():
    assert not [name for name in ALL if SYSTEMS[name].variant_of] and set(ALL) < set(SYSTEMS)
    assert RunConfig(systems=["mp4sr_no_mixup"]).systems == ("mp4sr_no_mixup",)
    with pytest.raises(ValueError, match="mp4sr_without"): RunConfig(systems=["mp4sr_without"])
    assert RunConfig.from_dict(json.loads(json.dumps(RunConfig().to_dict()))) == RunConfig()

@pytest.mark.parametrize("name, found", [
    ("mp4sr", {}), ("mp4sr_no_mixup", dict(mixup=False)), ("mp4sr_legacy_losses", dict(released={"false_negatives", "cmcl_rows"})),
    ("mp4sr_no_projections", dict(heads=None))])
def test_an_ablation_changes_what_is_pretrained_and_nothing_else(name, found, data, quick):
    model, tuned = SYSTEMS[name].pretrain(data.keyword_catalogue, quick), SYSTEMS[name].build(data.keyword_catalogue, quick)
    assert model.item_emb is None and tuned.item_emb is not None and tuned.heads is None
    assert model.disturbance["mixup"] == found.get("mixup", True) and model.released == found.get("released", set())
    assert (model.heads is None) == ("heads" in found)
    assert (tuned.max_len, tuned.m2se.state_dict().keys()) == (quick.max_len, model.m2se.state_dict().keys())

def test_missrec_with_density_peaks_differs_in_its_clustering_only(data, quick):
    plain, dpc = (SYSTEMS[name].build(data.catalogue, quick) for name in ("missrec_scratch", "missrec_dpc_scratch"))
    assert tuple(model.items.interests.method for model in (plain, dpc)) == ("kmeans", "dpc_knn") and SYSTEMS["missrec_dpc_scratch"].pretrain is None
    assert plain.state_dict().keys() == dpc.state_dict().keys() and str(plain) == str(dpc)

@pytest.mark.parametrize("name", ["mp4sr_fixed_pooling", "mp4sr_unmasked_pooling"])
def test_pooling_is_the_same_before_and_after(name, data, quick):
    both = [make(data.keyword_catalogue, quick) for make in (SYSTEMS[name].pretrain, SYSTEMS[name].build)]
    plain = SYSTEMS["mp4sr"].build(data.keyword_catalogue, quick)
    describe = lambda model: str(model.m2se) + str([(n, p.requires_grad) for n, p in model.m2se.named_parameters()]) + str(
        [vars(part).get("masked") for part in model.m2se.modules()])
    assert describe(both[0]) == describe(both[1]) != describe(plain)


# One result

def facts(result):
    "Everything of a result that must not depend on when it was computed."
    model = MP4SR.from_pretrained(str(result.folder)) if result.system in READERS else None
    return {"ranks": result.evaluation.ranks.tolist(), "top": result.evaluation.top_items.tolist(), "valid": result.valid,
            "history": without_seconds(result.history), "best": (result.history.best_epoch, result.history.best_value),
            "pretraining": result.pretraining and without_seconds(result.pretraining),
            "weights": model and {k: v.tolist() for k, v in weights(model).items()}}

@pytest.fixture(scope="module")
def calm(data, quick, tmp_path_factory):
    "An undisturbed MP4SR, pre-trained."
    return run_system("mp4sr", 0, data, quick, tmp_path_factory.mktemp("calm"), progress=False)

def test_a_result_survives_its_file(calm, data, quick):
    mark = result_fingerprint("mp4sr", 0, data, quick)
    again = load_result(calm.folder, mark)
    assert facts(again) == facts(calm) and asdict(again.pretraining) == asdict(calm.pretraining)
    assert len(calm.pretraining.epochs) == 2 and len(calm.history.epochs) == 3
    assert {"loss", "nip_text", "cmcl_image", "ndcg@10"} <= calm.pretraining.epochs[0].keys()
    assert calm.seconds == pytest.approx(sum(e["seconds"] for h in (calm.pretraining, calm.history) for e in h.epochs))
    assert load_result(calm.folder, "other") is None

def test_a_result_without_pretraining_survives_too(calm, tmp_path):
    result = replace(calm, pretraining=None, folder=tmp_path)
    save_result(result, "x")
    assert load_result(tmp_path, "x").pretraining is None and load_result(tmp_path, "x").valid == calm.valid

def test_a_stored_result_is_read_not_computed(calm, data, quick, monkeypatch):
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: 1 / 0)
    assert facts(run_system("mp4sr", 0, data, quick, calm.folder.parent.parent, progress=False)) == facts(calm)

def test_fine_tuning_starts_from_the_best_pretrained_weights(data, quick, tmp_path):
    "Without an epoch of fine-tuning, what is saved is what pre-training left, made here by hand."
    untuned = replace(quick, epochs=0)
    result = run_system("mp4sr", 0, data, untuned, tmp_path, progress=False)
    set_seed(derive_seed(0, "weights"))
    source = SYSTEMS["mp4sr"].pretrain(data.keyword_catalogue, untuned).set_catalogue(data.keyword_catalogue)
    history = fit(source, data.store, "pretrain", epochs=2, batch_size=16, lr=.01, patience=5, seed=0, device="cpu",
                  progress=False)
    assert without_seconds(history) == without_seconds(result.pretraining)
    found = MP4SR.from_pretrained(str(result.folder))
    assert same(weights(found.m2se), weights(source.m2se)) and result.history.epochs == []

def test_the_same_system_from_scratch_has_no_pretraining(data, quick, calm, tmp_path):
    result = run_system("mp4sr_scratch", 0, data, quick, tmp_path, progress=False)
    assert result.pretraining is None and result.n_parameters == calm.n_parameters
    assert facts(result)["ranks"] != facts(calm)["ranks"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mp4sr_scratch-seed0"]


# Interrupted anywhere

class Stop(Exception): pass

def stop(*_, **__): raise Stop

def in_step(phase, n):
    "Die after n optimiser steps of a phase."
    def prepare(patch):
        left, original = [n], training._train_step
        def limited(*args):
            left[0] -= args[3] == phase
            if left[0] < 0: raise Stop
            return original(*args)
        patch.setattr(training, "_train_step", limited)
    return prepare

DEATHS = {  # an epoch has seven steps of pre-training, or two of fine-tuning
    "first epoch of pre-training": [in_step("pretrain", 3)], "second epoch of pre-training": [in_step("pretrain", 10)],
    "between the phases": [lambda patch: patch.setattr(experiments, "transfer_weights", stop)],
    "fine-tuning": [in_step("finetune", 3)],
    "both phases": [in_step("pretrain", 9), in_step("pretrain", 2), in_step("finetune", 1), in_step("finetune", 5)],
    "while ranking": [lambda patch: patch.setattr(experiments, "evaluate", stop)],
    "before the result is written": [lambda patch: patch.setattr(experiments, "save_result", stop)]}

@pytest.mark.parametrize("name", DEATHS)
def test_interrupted_anywhere_the_numbers_are_the_same(name, calm, data, quick, tmp_path):
    for death in DEATHS[name]:
        with pytest.MonkeyPatch.context() as patch:
            death(patch)
            with pytest.raises(Stop): run_system("mp4sr", 0, data, quick, tmp_path, progress=False)
        torch.manual_seed(99)  # the next life starts with random numbers of its own
    assert facts(run_system("mp4sr", 0, data, quick, tmp_path, progress=False)) == facts(calm)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mp4sr-seed0"], "checkpoints are removed"

def test_pretraining_that_was_finished_is_not_repeated(data, quick, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "transfer_weights", stop)
        with pytest.raises(Stop): run_system("mp4sr", 0, data, quick, tmp_path, progress=False)
    phases, original = [], training._train_step
    monkeypatch.setattr(training, "_train_step", lambda *args: phases.append(args[3]) or original(*args))
    run_system("mp4sr", 0, data, quick, tmp_path, progress=False)
    assert set(phases) == {"finetune"}


# What a result depends on

@pytest.mark.parametrize("setting", [dict(pretrain_epochs=7), dict(pretrain_batch_size=8)])
def test_settings_of_pretraining_matter_to_who_is_pretrained(setting, data, quick):
    for name, system in SYSTEMS.items():
        marks = [result_fingerprint(name, 0, data, each) for each in (quick, replace(quick, **setting))]
        assert (marks[0] != marks[1]) == (system.pretrain is not None), name
    assert {name for name, system in SYSTEMS.items() if not system.pretrain and system.needs not in ("", "content")} == {
        name for name in SYSTEMS if name.endswith("_scratch")} - {"missrec_scratch", "missrec_ids_scratch", "missrec_dpc_scratch"}

@pytest.mark.parametrize("setting", [dict(epochs=7), dict(lr=.5), dict(hidden_size=8), dict(patience=1)])
def test_settings_of_training_matter_to_all(setting, data, quick):
    for name in SYSTEMS:
        assert result_fingerprint(name, 0, data, quick) != result_fingerprint(name, 0, data, replace(quick, **setting))

def test_a_new_version_of_a_system_makes_its_results_old_and_no_others(data, quick, monkeypatch):
    before = {name: result_fingerprint(name, 0, data, quick) for name in SYSTEMS}
    monkeypatch.setitem(SYSTEMS, "sasrec", replace(SYSTEMS["sasrec"], result_version=99))
    assert {name for name in SYSTEMS if result_fingerprint(name, 0, data, quick) != before[name]} == {"sasrec"}

def test_keywords_matter_to_who_reads_them(data, quick):
    other = replace(data, keyword_catalogue=make_catalogue(seed=2))
    for name in SYSTEMS:
        changed = result_fingerprint(name, 0, data, quick) != result_fingerprint(name, 0, other, quick)
        assert changed == (name in READERS), name

def test_names_seeds_and_what_is_only_shown(data, quick):
    marks = {result_fingerprint(name, seed, data, quick) for name in SYSTEMS for seed in (0, 1)}
    assert len(marks) == 2 * len(SYSTEMS)
    shown = replace(quick, umap=True, systems=("mp4sr",), seeds=(0, 1))
    assert result_fingerprint("mp4sr", 0, data, shown) == result_fingerprint("mp4sr", 0, data, quick)


# The whole run

def test_a_run_of_all_standard_systems(config, tmp_path):
    config = replace(config, epochs=1, pretrain_epochs=1, seeds=(0, 1))
    run = run_all(config, tmp_path, progress=False)
    counted = [(r.system, r.seed) for r in run.results]
    assert counted == [(name, seed) for name in STANDARD for seed in ((0, 1) if SYSTEMS[name].has_seed else (0,))]
    assert run.config.systems == STANDARD and RunConfig.from_dict(json.loads((tmp_path / "run.json").read_text())) == config
    assert {name: bool(r.pretraining) for name, r in zip(map(lambda r: r.system, run.results), run.results)} == {
        name: SYSTEMS[name].pretrain is not None for name in STANDARD}
    rows = {row["system"]: row for row in result_table(run, ("recall@10",))}
    assert list(rows) == list(STANDARD) and rows["mp4sr"]["title"] != rows["mp4sr_scratch"]["title"]
    of = lambda name: [r for r in run.results if r.system == name]
    by_hand = np.mean([of("mp4sr")[s].evaluation.values("recall@10") - of("mp4sr_scratch")[s].evaluation.values("recall@10")
                       for s in (0, 1)])
    assert difference(of("mp4sr"), of("mp4sr_scratch"), "recall@10")["difference"] == pytest.approx(by_hand)
    training_items = np.unique(run.data.store.items[run.data.store.stage == TRAIN])
    assert len(training_items) == run.data.interactions.n_items, "in this shop every item is trained on"
