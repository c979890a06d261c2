"""torchmetrics and ir-measures (whose numbers are those of trec_eval) beside page 41's ranks and metrics."""
import pytest
import torch

import mmseqrec.metrics as metrics

pytestmark = pytest.mark.filterwarnings("default")  # of theirs
N_QUERIES, N_ITEMS = 60, 30
CUTS = (1, 5, 10, N_ITEMS)
OURS = {"Recall": metrics.recall_at_k, "NDCG": metrics.ndcg_at_k, "MRR": metrics.mrr, "Precision": metrics.precision_at_k,
        "MAP": metrics.map_at_k}
each_cut = pytest.mark.parametrize("k", CUTS)


def queries(levels=None):
    "Scores `[T, N]` from 1 up, all different or of a few levels, and the column of each right answer."
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(N_ITEMS, generator=generator) for _ in range(N_QUERIES)]).double()
    if levels: scores = (scores % levels).double()
    return scores + 1, torch.randint(N_ITEMS, (N_QUERIES,), generator=generator)


@pytest.fixture
def of_torchmetrics():
    "Their functions for one query each, over all queries."
    found = pytest.importorskip("torchmetrics.functional.retrieval", reason="torchmetrics is not installed")
    functions = {"Recall": found.retrieval_recall, "Hit": found.retrieval_hit_rate, "NDCG": found.retrieval_normalized_dcg,
                 "MRR": found.retrieval_reciprocal_rank, "Precision": found.retrieval_precision,
                 "MAP": found.retrieval_average_precision}
    def each(name, scores, target, k):
        relevant = torch.nn.functional.one_hot(target, N_ITEMS)
        return torch.stack([functions[name](s, r, top_k=k) for s, r in zip(scores, relevant)]).double()
    return each


@pytest.fixture
def of_ir_measures():
    "Their measures of each query. Equal scores are ordered by name: the last comes first, but for MRR, which is MS MARCO's."
    ir = pytest.importorskip("ir_measures", reason="ir-measures is not installed")
    pytest.importorskip("pytrec_eval", reason="ir-measures lacks pytrec-eval-terrier")
    kinds = {"Recall": ir.R, "Hit": ir.Success, "NDCG": ir.nDCG, "MRR": ir.RR, "Precision": ir.P, "MAP": ir.AP}
    def each(name, scores, target, k, rule):
        target_name = "z" if (rule == "best") == (name != "MRR") else "a"
        names = [[target_name if column == right else f"item-{column}" for column in range(N_ITEMS)] for right in target.tolist()]
        relevant = [ir.Qrel(f"{query:03}", target_name, 1) for query in range(N_QUERIES)]
        ranked = [ir.ScoredDoc(f"{query:03}", item, score) for query, row in enumerate(scores.tolist())
                  for item, score in zip(names[query], row)]
        found = {row.query_id: row.value for row in ir.iter_calc([kinds[name] @ k], relevant, ranked)}
        return torch.tensor([found[f"{query:03}"] for query in range(N_QUERIES)])
    return each


@each_cut
@pytest.mark.parametrize("name", [*OURS, "Hit"])
def test_metrics_without_ties(of_torchmetrics, compare, name, k):
    scores, target = queries()
    ours = OURS.get(name, metrics.recall_at_k)(metrics.rank_of_target(scores, target), k)
    compare("torchmetrics", "metrics", f"{name}@{k}", ours, of_torchmetrics(name, scores, target, k))


@each_cut
@pytest.mark.parametrize("name", [*OURS, "Hit"])
def test_metrics_by_trec_eval(of_ir_measures, compare, name, k):
    "Without ties, and with the two rules for ties that an order by name can follow."
    function = OURS.get(name, metrics.recall_at_k)
    for rule, levels in (("mean", None), ("best", 6), ("worst", 6)):
        scores, target = queries(levels)
        ours = function(metrics.rank_of_target(scores, target, rule), k)
        what = f"{name}@{k}, ties: {rule}" if levels else f"{name}@{k}"
        compare("ir-measures", "metrics", what, ours, of_ir_measures(name, scores, target, k, rule))


def test_scores_below_zero(of_torchmetrics, compare):
    "Theirs takes a score of zero or less to mean that the item is not in the list."
    scores, target = queries()
    ours = metrics.recall_at_k(metrics.rank_of_target(scores - N_ITEMS, target), 10)
    compare("torchmetrics", "metrics", "Recall@10, all scores below zero", ours,
            of_torchmetrics("Recall", scores - N_ITEMS, target, 10), "theirs never counts an item whose score is not above zero", differs=True)
    compare("torchmetrics", "metrics", "Recall@10, scores raised above zero there", ours,
            of_torchmetrics("Recall", scores, target, 10))


def test_ndcg_with_ties(of_torchmetrics, compare):
    "Theirs is the mean over all places that ties leave open, ours the value at their mean place."
    scores, target = queries(levels=6)
    theirs = of_torchmetrics("NDCG", scores, target, N_ITEMS)
    ours = metrics.ndcg_at_k(metrics.rank_of_target(scores, target), N_ITEMS)
    compare("torchmetrics", "metrics", "NDCG of the whole catalogue, ties: mean", ours, theirs,
            "theirs averages the metric over tied places, ours the place", differs=True)
    best, worst = (metrics.rank_of_target(scores, target, rule) for rule in ("best", "worst"))
    means = [metrics.ndcg_at_k(torch.arange(int(a), int(b) + 1), N_ITEMS).mean() for a, b in zip(best, worst)]
    compare("torchmetrics", "metrics", "NDCG of the whole catalogue, averaged over tied places here", torch.stack(means), theirs)
