"The configuration: one home for each setting, checks, JSON, options, and a module that needs the standard library only."
import argparse
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from mmseqrec.artifacts import artifact_path, fingerprint, read_json
from mmseqrec.config import (ALL, SETTING_GROUPS, STANDARD, SYSTEM_TITLES, RunConfig, at_least, choose_systems,
                             option_of)

ROOT = Path(__file__).parent.parent
OTHER = dict(  # a value that is not the default, for every setting
    source="movielens-1m", interactions="e.csv", items="i.csv", images="pics", user_column="u", item_column="i",
    time_column="t", text_columns=("a", "b"), image_column="c", min_user=1, min_item=2, split="global-time",
    new_items=.1, new_items_seed=4, domain="toys", n_users=7, n_items=9, arrivals=.2, data_seed=3,
    text_encoder="shipped", image_encoder="shipped", text_features="t.npy", image_features="i.npy", word_drop=.5, n_keywords=4, systems=("popularity", "markov", "missrec_ids"), hidden_size=8,
    n_layers=1, n_heads=1, inner_size=16, dropout=.1, max_len=5, seeds=(0, 1, 2), epochs=2, batch_size=32, lr=.5,
    patience=0, pretrain_epochs=1, pretrain_batch_size=64, metric="recall@20", exclude_seen=True, device="cpu",
    precision="no", umap=True)


def parse(*words):
    "Parse a line with the options of all settings."
    parser = argparse.ArgumentParser(exit_on_error=False)
    for flag, options in map(option_of, fields(RunConfig)): parser.add_argument(flag, **options)
    return vars(parser.parse_args([str(word) for word in words]))


# Names

def test_systems_of_page_60_have_these_names_and_no_others():
    from mmseqrec.experiments.run import SYSTEMS
    assert list(SYSTEMS) == list(SYSTEM_TITLES)
    for name, system in SYSTEMS.items():
        assert (system.name, system.title) == (name, SYSTEM_TITLES[name])
        assert (system.variant_of is None) == (name in ALL) and (name in ALL or system.variant_of in ALL)

def test_lists_of_names():
    assert set(STANDARD) < set(ALL) < set(SYSTEM_TITLES) and len(set(SYSTEM_TITLES.values())) == len(SYSTEM_TITLES)

def test_systems_are_chosen_by_name_with_commas_or_all_at_once():
    assert choose_systems("sasrec") == choose_systems(["sasrec", "markov", "sasrec"]) == ("popularity", "markov", "sasrec")
    assert choose_systems("sasrec,mp4sr") == choose_systems(["sasrec", "mp4sr"]) and choose_systems("all") == ALL
    assert choose_systems(["missrec_ids", "all"]) == ALL and choose_systems([]) == ("popularity", "markov")


# Settings

def test_every_setting_is_in_one_group_with_help():
    names = [setting.name for group in SETTING_GROUPS for setting in fields(group)]
    assert names == [setting.name for setting in fields(RunConfig)] == list(RunConfig().to_dict()) and set(names) == set(OTHER)
    assert len(names) == len(set(names))
    for setting in fields(RunConfig):
        assert setting.metadata["help"] and "(default" not in setting.metadata["help"]
    assert all(group.__doc__ for group in SETTING_GROUPS)

def test_defaults_are_the_main_job():
    assert RunConfig() == RunConfig.from_dict({}) and RunConfig().systems is None and RunConfig().seeds == (0,)

def test_a_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError): RunConfig().lr = 1
    assert RunConfig(seeds=[1, 2]).seeds == (1, 2) and hash(RunConfig(seeds=[1])) == hash(RunConfig(seeds=(1,)))

@pytest.mark.parametrize("name", OTHER)
def test_every_setting_survives_json(name):
    config = RunConfig(**{name: OTHER[name]})
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config != RunConfig() and getattr(again, name) == OTHER[name]

@pytest.mark.parametrize("values, says", [
    ({"epoch": 3}, "unknown setting 'epoch'; there are .*epochs"), ({"systems": ["oracle"]}, "unknown system 'oracle'"),
    ({"seeds": []}, "at least one seed"), ({"metric": "fun"}, "unknown metric 'fun'"), ({"metric": "recall@0"}, "recall@0"),
    ({"source": "movielens-1m", "interactions": "e.csv"}, "either a source .movielens-1m. or tables of your own .e.csv.")])
def test_what_cannot_be_is_refused(values, says):
    with pytest.raises(ValueError, match=says): RunConfig.from_dict(values)

def test_settings_are_checked_again_when_one_is_replaced():
    with pytest.raises(ValueError, match="oracle"): replace(RunConfig(), systems=("oracle",))

@pytest.mark.parametrize("name", ["marketplace", "scientific", "ml1m"])
def test_stored_configurations_can_be_given_back(name):
    stored = read_json(artifact_path("compare", f"{name}.json"))["inputs"]["config"]
    assert json.loads(json.dumps(RunConfig.from_dict(stored).to_dict())).items() >= stored.items()

def test_changes_are_what_is_not_at_its_default():
    assert RunConfig().changes() == {}
    changed = RunConfig(lr=.5, seeds=[1], new_items=0.)
    assert changed.changes() == {"lr": .5, "seeds": (1,), "new_items": 0.} and RunConfig.from_dict(changed.changes()) == changed

def test_defaults_are_those_that_stored_results_were_made_with():
    "Stored results leave out settings at their default. Who changes a default raises the versions of the numbers, and then this."
    added = ("split", "new_items", "new_items_seed", "arrivals")  # since then, with defaults that change nothing
    old = json.dumps({name: value for name, value in RunConfig().to_dict().items() if name not in added})
    assert fingerprint(json.loads(old)) == "e47dbfc3666f8cd7"
    before = json.loads(old) | {"pretrain_epochs": 10}  # the older default, which the grids of pages 61 and 64 now name
    assert fingerprint(before) == "ab439bb94bb42402"


# Options

def test_what_was_not_typed_is_none(): assert set(parse().values()) == {None}

@pytest.mark.parametrize("name", OTHER)
def test_every_option_reads_its_setting(name):
    value, flag = OTHER[name], f"--{name.replace('_', '-')}"
    words = [] if value is True else [len(value)] if name == "seeds" else value if isinstance(value, tuple) else [value]
    typed = {k: v for k, v in parse(flag, *words).items() if v is not None}
    assert list(typed) == [name] and RunConfig(**typed) == RunConfig(**{name: value})

@pytest.mark.parametrize("words, says", [
    (["--epochs", -1], "at least 0"), (["--n-layers", 0], "at least 1"), (["--epochs", "many"], "whole number"),
    (["--lr", "nan"], "number"), (["--seeds", 0], "at least 1"),
    (["--dropout", -1], "at least 0"), (["--domain", "garden"], "garden"), (["--data-seed", "x"], "invalid int")])
def test_wrong_values_are_refused_in_words(words, says):
    with pytest.raises(argparse.ArgumentError, match=says): parse(*words)

def test_numbers_have_a_lower_bound():
    assert at_least(int, 1)("3") == 3 and at_least(float, 0)("0") == 0
    for kind, text in ((int, "1.5"), (int, ""), (float, "-1"), (float, "nan")):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 0"): at_least(kind, 0)(text)

def test_help_states_the_default():
    words = {setting.name: option_of(setting)[1] for setting in fields(RunConfig)}
    assert words["epochs"]["help"].endswith("(default: 40)") and words["seeds"]["help"].endswith("(default: 1)")
    assert words["lr"]["help"].endswith("(default: 0.001)") and " ".join(STANDARD) in words["systems"]["help"]
    assert "default" not in words["items"]["help"] and all("%" not in each["help"] for each in words.values())


# Light

def test_the_standard_library_is_enough():
    "In an interpreter without site packages; the package's own folder is put on the path by hand."
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mmseqrec.config\n"
            "known = {*sys.stdlib_module_names, 'mmseqrec', '__main__'}\n"
            "print(sorted({name.partition('.')[0] for name in sys.modules} - known))")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], env=env, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr
