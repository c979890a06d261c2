"Answers in tokens, embeddings that follow their items, folders and hub repositories that load again."
import json
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import hub_mixin

from mmseqrec.blocks.towers import IDEmbedding, take_positions
from mmseqrec.core import set_seed
from mmseqrec.data.sequences import collate
from mmseqrec.models.baselines import ContentSASRec, Popularity, SASRec
from mmseqrec.recommender import Items, Recommendation, Recommender, released_quirks, top_items, transfer_weights
from small_world import SIZES, TEXT_SIZE, V, build, make_catalogue, make_store, same, weights


# Pieces

def test_items_are_cut_with_everything_that_belongs_to_them():
    vectors, ids, absent = torch.randn(5, 2, 3), torch.arange(1, 6), torch.rand(5, 2) < .5
    part = Items(vectors, ids, absent)[1:4]
    assert len(part) == 3 and torch.equal(part.vectors, vectors[1:4]) and torch.equal(part.ids, ids[1:4])
    assert torch.equal(part.missing_stream_mask, absent[1:4])
    assert Items(vectors, ids)[:2].missing_stream_mask is None


def test_take_positions_equals_loops():
    batch = collate([[1, 2, 3], [4], [5, 6]], 10)
    hidden = torch.randn(3, 3, 4)
    last = torch.stack([hidden[row, length - 1] for row, length in enumerate(batch.item_seq_len.tolist())])
    assert torch.equal(take_positions(hidden, batch), last)
    asked = [(2, 1), (0, 0), (0, 2), (0, 0)]
    found = take_positions(hidden, batch, torch.tensor([row * 3 + column for row, column in asked]))
    assert torch.equal(found, torch.stack([hidden[row, column] for row, column in asked]))


def shop(tokens): return SimpleNamespace(item_tokens=["[PAD]", *tokens])


def test_id_embedding_follows_tokens():
    set_seed(0)
    names = [f"t{i}" for i in range(1, 500)]
    item_emb = IDEmbedding(499, 64, std=.05)
    item_emb.set_catalogue(shop(names))
    old = item_emb.weight.detach().clone()
    new_names = [*reversed(names[99:]), *(f"new{i}" for i in range(400))]
    item_emb.set_catalogue(shop(new_names))
    for row, token in enumerate(new_names[:400], 1): assert torch.equal(item_emb.weight[row], old[int(token[1:])]), token
    assert not item_emb.weight[401:].any()  # nothing has trained the vectors of new items
    item_emb.prepare_for(torch.arange(1, 801))
    for row, token in enumerate(new_names[:400], 1): assert torch.equal(item_emb.weight[row], old[int(token[1:])]), token
    fresh = item_emb.weight[401:].detach()
    assert fresh.std().item() == pytest.approx(.05, rel=.03) and abs(fresh.mean().item()) < .002
    assert not item_emb.weight[0].any() and item_emb.padding_idx == 0 and item_emb.weight.requires_grad
    assert len(item_emb.weight) == item_emb.num_embeddings == 801 and item_emb.n_items == 800
    item_emb.double().set_catalogue(shop(names))
    assert item_emb.weight.dtype == torch.float64


def test_id_embedding_is_kept_where_nothing_changes():
    item_emb = IDEmbedding(2, 2)
    old = item_emb.weight
    item_emb.set_catalogue(shop("xy"))  # rows that belong to nobody yet
    assert item_emb.weight is old
    item_emb.set_catalogue(shop(list("xy")))
    assert item_emb.weight is old
    item_emb.set_catalogue(shop("yx"))  # same size, other order
    assert torch.equal(item_emb.weight[1:], old[1:].flip(0))
    unowned = IDEmbedding(2, 2)
    before = unowned.weight.detach().clone()
    unowned.set_catalogue(shop("xyz"))
    assert unowned.n_items == 3 and not any(torch.equal(a, b) for a in unowned.weight[1:] for b in before[1:])
    zero = IDEmbedding(2, 1, std=0.)
    zero.set_catalogue(shop("xyz"))
    assert not zero.weight.any() and zero.weight.requires_grad


# Weights that move from one model to another

def pretrained(name="content_mp4sr", **options):
    "A model whose weights differ from those of a fresh one, statistics included."
    model = build(name, seed=7, **options)
    model.start_epoch(make_store(), 0)
    return model


def test_everything_but_item_vectors_is_transferred():
    source, target = pretrained(), build("mp4sr")
    before, given = weights(target), weights(source)
    assert transfer_weights(source, target) is target
    after = weights(target)
    assert set(after) - set(given) == {"item_emb.weight"} and torch.equal(after["item_emb.weight"], before["item_emb.weight"])
    for name in set(after) - {"item_emb.weight"}:
        assert torch.equal(after[name], given[name]), name
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert "m2se.items.text.centring.center" in changed and "m2se.items.fitted" in changed and "m2se.encoder.position_emb.weight" in changed
    assert {name.partition(".")[0] for name in set(given) - set(after)} == {"heads"}, "heads stay behind"
    assert target.heads is None and all(x.requires_grad for x in target.parameters())


def test_a_transfer_leaves_the_source_and_shares_nothing_with_it():
    source, target = pretrained(), build("mp4sr")
    before = weights(source)
    transfer_weights(source, target)
    with torch.no_grad():
        for x in target.parameters(): x += 1
    assert same(weights(source), before)


def test_with_item_vectors_of_zero_a_transferred_model_scores_like_its_source():
    source, target = pretrained().double(), build("mp4sr").double()
    transfer_weights(source, target)
    with torch.no_grad():
        target.item_emb.weight.zero_()
        batch = collate([[1, 2, 3], [7], [4, 5, 6]], 10)
        found, expected = (model.score(model.encode_sequence(batch), model.encode_items()) for model in (target, source))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_statistics_that_were_transferred_are_not_taken_again():
    source, target = pretrained(), build("mp4sr")
    transfer_weights(source, target).start_epoch(make_store(seed=3), 0)
    for name in ("text", "image"):
        assert torch.equal(*(model.get_buffer(f"m2se.items.{name}.centring.center") for model in (source, target)))


@pytest.mark.parametrize("source, target, options", [
    ("content_mp4sr", "content_mp4sr", {}), ("content_mp4sr", "content_msm4sr", {}), ("content_msm4sr", "content_msm4sr", {}),
    ("mp4sr", "content_msm4sr", {}), ("mp4sr", "content_mp4sr", dict(projections=False)), ("sasrec", "sasrec", {}),
    ("content_both", "content_both", {})])
def test_other_transfers(source, target, options):
    source, target = pretrained(source), build(target, **options)
    mine = weights(target)
    transfer_weights(source, target)
    for name, x in target.state_dict().items():
        assert torch.equal(x, mine[name] if name.startswith("item_emb.") else source.state_dict()[name]), name


def test_what_is_left_out_is_chosen_by_the_beginning_of_its_name():
    source, target = pretrained(), build("content_mp4sr")
    before = weights(target)
    transfer_weights(source, target, except_for=("heads.image.", "m2se.encoder.blocks.1"))
    for name, x in target.state_dict().items():
        stays = name.startswith(("heads.image.", "m2se.encoder.blocks.1"))
        assert torch.equal(x, before[name] if stays else source.state_dict()[name]), name
    first, second = pretrained("mp4sr"), build("mp4sr")
    transfer_weights(first, second, except_for=())
    assert same(weights(first), weights(second)), "item vectors, too, where nothing is left out"


def test_precision_and_catalogue_of_the_target_stay():
    source, target = pretrained(), build("mp4sr", make_catalogue(19, seed=5, name="other")).double()
    features = target.m2se.items.text.features.clone()
    transfer_weights(source, target)
    assert {x.dtype for x in target.parameters()} == {torch.float64} and target.catalogue.n_items == 19
    assert torch.equal(target.m2se.items.text.features, features) and target.item_emb.num_embeddings == 20
    assert torch.equal(target.m2se.encoder.norm.weight, source.m2se.encoder.norm.weight.double())


@pytest.mark.parametrize("source, options, message", [
    ("content_mp4sr", dict(hidden_size=8), r"of the target has shape \(.*16.*\), the source has \(.*8.*\); build both with the same sizes"),
    ("content_mp4sr", dict(n_layers=1), r"m2se.encoder.blocks.1.* of the target has shape \(.*\), the source has none"),
    ("content_mp4sr", dict(max_len=9), r"position_emb.weight of the target has shape \(10, 16\), the source has \(9, 16\)"),
    ("content_both", {}, r"m2se.* the source has none; .*or name what to leave out in except_for"),
    ("content_msm4sr", {}, r"heads.text.weight of the target has shape \(16, 16\), the source has none")])
def test_weights_that_do_not_fit_are_refused_before_anything_is_copied(source, options, message):
    source, target = pretrained(source, **options), build("content_mp4sr")
    before, given = weights(target), weights(source)
    with pytest.raises(ValueError, match=message): transfer_weights(source, target)
    assert same(weights(target), before) and same(weights(source), given)


# The best items

class Fixed(Recommender):
    "Scores given by a table, so that rankings can be checked by hand."
    def __init__(self, n_items=6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("table", torch.randn(n_items + 1, n_items + 1, generator=generator))

    def encode_items(self, ids=None):
        ids = torch.arange(1, len(self.table)) if ids is None else ids
        return Items(torch.eye(len(self.table))[ids][:, None], ids)

    def encode_sequence(self, batch, positions=None):
        return take_positions(self.table[batch.item_seq], batch, positions)[:, None]


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("max_elements", [1, 13, 1 << 24])
def test_top_items_equal_sorted_lists(max_elements, exclude_seen):
    model, rng = Fixed(40), np.random.default_rng(0)
    model.catalogue = SimpleNamespace(n_items=40)
    histories = [rng.integers(1, 41, rng.integers(1, 12)).tolist() for _ in range(15)]
    ids, best = top_items(model, histories, 7, exclude_seen, max_elements)
    for history, row_ids, row_best in zip(histories, ids.tolist(), best.tolist()):
        order = sorted(range(1, 41), key=lambda i: -model.table[history[-1], i].item())
        if exclude_seen: order = [i for i in order if i not in history]
        assert row_ids == order[:7]
        np.testing.assert_allclose(row_best, [model.table[history[-1], i].item() for i in order[:7]])


# Answers

@pytest.fixture()
def model():
    return Fixed(6).set_catalogue(make_catalogue(6, whole=True))


def names(rows): return [f"item-{row}" for row in rows]


def test_unknown_items_and_empty_histories(model):
    answers = model.recommend([names([2, 5]), [], ["?"], ["item-3", "?", "!", "?"], ("item-4",)], k=3)
    assert [a.unknown for a in answers] == [[], [], ["?"], ["?", "!", "?"], []]
    assert answers[1] == Recommendation([], [], []) and answers[2] == Recommendation([], [], ["?"])
    for answer, last in ((answers[0], 5), (answers[3], 3), (answers[4], 4)):
        assert answer.items == names((model.table[last, 1:].argsort(descending=True) + 1).tolist()[:3])
    assert model.recommend([]) == [] and model.recommend([[], ["?"]])[1].unknown == ["?"]
    assert model.recommend(iter([names([2, 5])]), k=3) == answers[:1]


def test_padding_is_not_an_item(model):
    answer, = model.recommend([["[PAD]", "item-1"]], k=10)
    assert answer.unknown == ["[PAD]"] and "[PAD]" not in answer.items


def test_numbers_may_stand_for_their_names():
    catalogue = make_catalogue(3, whole=True)
    catalogue.item_tokens[1:] = ["10", "20", "30"]
    assert Fixed(3).set_catalogue(catalogue).recommend([[10, 20]], k=1)[0].unknown == []


def test_more_than_there_is(model):
    assert len(model.recommend([names([1])], k=100)[0].items) == 6
    answer, = model.recommend([names([1, 2, 2, 6])], k=100, exclude_seen=True)
    assert sorted(answer.items) == names([3, 4, 5]) and len(answer.scores) == 3
    answer, = model.recommend([names([1, 2, 3, 4, 5, 6])], exclude_seen=True)
    assert answer.items == [] and answer.scores == []


@pytest.mark.parametrize("histories", ["item-1", ["item-1", "item-2"], [["item-1"], "item-2"]])
def test_a_string_is_not_a_history(model, histories):
    "The easiest mistake: one history instead of a list of histories."
    with pytest.raises(ValueError, match="list of lists"): model.recommend(histories)


def test_bad_questions(model):
    with pytest.raises(ValueError, match="k must be at least 1, got 0"): model.recommend([["item-1"]], k=0)
    with pytest.raises(ValueError, match="call set_catalogue first"): SASRec(**SIZES).recommend([["item-1"]])


def test_scores_that_are_no_numbers_are_not_ranked(model):
    model.table[2] = torch.nan
    with pytest.raises(ValueError, match="NaN"): model.recommend([names([2])])


def test_mode_is_restored_after_an_error(model):
    "`recommend` in training that fails leaves the model in training."
    model.train()
    model.table = model.table[:, :4]
    with pytest.raises((RuntimeError, ValueError)): model.recommend([names([2])])
    assert model.training


# Saving

def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    model, folder = build("content_both"), tmp_path / "saved"
    model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    import mmseqrec.recommender
    def full(*_, **__): raise OSError("no space left on device")
    monkeypatch.setattr(mmseqrec.recommender, "save_file", full)
    with pytest.raises(OSError, match="saved cannot be written: the disk is full"): model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_sizes_follow_the_catalogue(tmp_path):
    model = SASRec(**SIZES).set_catalogue(make_catalogue(7, whole=True))
    model.set_catalogue(make_catalogue(9, whole=True)).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["n_items"] == 9 and config["hidden_size"] == 16 and config["recommender"] == "SASRec"
    assert SASRec.from_pretrained(tmp_path / "saved").item_emb.num_embeddings == 10


def test_two_models_do_not_share_their_sizes(tmp_path):
    for n in (7, 9): SASRec(**SIZES).set_catalogue(make_catalogue(n, whole=True)).save_pretrained(tmp_path / str(n))
    for n in (7, 9): assert json.loads((tmp_path / str(n) / "config.json").read_text())["n_items"] == n


def test_a_class_that_is_not_known_is_named(tmp_path):
    build("sasrec").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for name in ("Hidden", "fit", "core"):
        (tmp_path / "m/config.json").write_text(json.dumps(config | {"recommender": name}))
        with pytest.raises(ValueError, match=f"names the recommender '{name}'.*import the module that defines it"):
            Recommender.from_pretrained(tmp_path / "m")


def test_quirks_are_checked():
    assert released_quirks("a", ("a", "b")) == released_quirks(["a"], ("a", "b")) == {"a"}
    with pytest.raises(ValueError, match=r"released names \['c'\], but this system has \['a', 'b'\]"): released_quirks(["a", "c"], ("a", "b"))


def test_missing_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="config.json"): SASRec.from_pretrained(tmp_path / "empty")
    build("sasrec").save_pretrained(tmp_path / "lame")
    (tmp_path / "lame/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): SASRec.from_pretrained(tmp_path / "lame")


# The hub

@pytest.fixture()
def hub(tmp_path, monkeypatch):
    "A hub of one repository, `shop/model`, that records what it is asked."
    model, asked = build("content_both"), []
    model.save_pretrained(tmp_path / "hub")
    def one(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        return str(tmp_path / "hub" / filename)
    def snapshot(repo_id, **options):
        asked.append((repo_id, None, options))
        return str(tmp_path / "hub")
    monkeypatch.setattr(hub_mixin, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return model, asked


def test_a_repository_loads_like_a_folder(hub):
    model, asked = hub
    again = ContentSASRec.from_pretrained("shop/model", revision="v1", token=False)
    question = [["item-1", "item-2"]]
    assert again.recommend(question) == model.recommend(question)
    repo_id, _, options = asked[-1]
    assert repo_id == "shop/model" and options["revision"] == "v1" and options["token"] is False
    assert set(options["allow_patterns"]) == {"*.safetensors", "*.json"}, "nothing that could be a pickle is fetched"


def test_push_to_hub_uploads_what_save_writes(monkeypatch, tmp_path):
    model, seen = build("content_text"), {}
    class Api:
        def __init__(self, **_): pass
        def create_repo(self, repo_id, **_): return type("Url", (), {"repo_id": repo_id})
        def upload_folder(self, folder_path, **_):
            seen.update({path.name: path.read_bytes() for path in folder_path.rglob("*") if path.is_file()})
            return "url"
    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    assert model.push_to_hub("shop/model") == "url"
    model.save_pretrained(tmp_path / "saved")
    assert seen == {path.name: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()}


def test_sizes_can_be_overruled_only_by_what_fits(tmp_path):
    build("content_text").save_pretrained(tmp_path / "saved")
    again = ContentSASRec.from_pretrained(tmp_path / "saved", dropout=.5)
    assert again.encoder.dropout.p == .5 and again.max_len == 10
    with pytest.raises(ValueError, match=r"model.safetensors: the weight .* has the shape .*, this model needs"): ContentSASRec.from_pretrained(tmp_path / "saved", hidden_size=32)


def test_one_name_alone_may_stay_behind():
    first, second = build("content_both"), build("content_both", seed=1)
    before = weights(second)
    transfer_weights(first, second, except_for="encoder.")
    after, given = weights(second), weights(first)
    for name in after: assert torch.equal(after[name], (before if name.startswith("encoder.") else given)[name]), name
