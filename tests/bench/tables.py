"Read a result: tables and a verdict in words. Ratios are taken round by round; median, least and greatest are told."
import statistics

from mmseqrec.app.cli import text_table
from mmseqrec.artifacts import artifact_path, read_json

SIDES = ("ours", "bf16", "peer")


def stored_benches() -> dict[str, dict]:  # name of the file -> what `run_bench` returned
    "Read the benchmarks that ship with the package; that of a GPU is a part of what `tests/gpu.py` writes."
    files = {path.stem: read_json(path) for path in sorted(artifact_path("bench").glob("*.json"))}
    benches = {name: record.get("bench") if "steps" in record else record for name, record in files.items()}
    return {name: record for name, record in benches.items() if record}

def trained_cases(
    record: dict,  # what `run_bench` returned
) -> list[dict]:  # what `measure_training` returned
    "List the training cases of a benchmark."
    return [case for case in record["cases"].values() if "sides" in case]

def paired_ratio(
    case: dict,  # what `measure_training` returned
    key: str = "targets_per_second",  # entry of a round
    one: str = "ours",  # which side
    other: str = "peer",  # and which other
) -> tuple[float, float, float] | None:  # median, least, greatest; `None` where a side or the entry is missing
    "Divide one side by the other, round by round."
    rounds = [case["sides"].get(side, {}).get("rounds", []) for side in (one, other)]
    ratios = [a[key] / b[key] for a, b in zip(*rounds) if key in a and b.get(key)]
    return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


# Tables

def _middle(case, side, key):
    "Return the median of an entry over the rounds of a side, or `None`."
    values = [r[key] for r in case["sides"].get(side, {}).get("rounds", []) if key in r]
    return statistics.median(values) if values else None

def _number(value, form="{:,.0f}"): return "" if value is None else form.format(value)

def _speed_cells(case, key):
    "Say how fast each side is, and how much faster ours is than the peer."
    ratio = paired_ratio(case, key)
    faster = "{:.1f} [{:.1f}, {:.1f}]".format(*ratio) if ratio else ""
    return [*(_number(_middle(case, side, key)) for side in SIDES), faster]

def _memory_cells(case, key):
    "Say how much memory ours and theirs took, and which part ours is."
    ours, theirs = (_middle(case, side, key) for side in ("ours", "peer"))
    part = paired_ratio(case, key)
    return [_number(ours and ours / 1e6), _number(theirs and theirs / 1e6), _number(part and part[0], "{:.2f}")]

def _training_row(case):
    "Describe the training of a case and its peer."
    steps = [str(case["sides"].get(side, {}).get("steps_per_epoch", "")) for side in ("ours", "peer")]
    return [case["title"], *_speed_cells(case, "targets_per_second"), _number(case["goal"], "{:g}"),
            _number(_middle(case, "ours", "share"), "{:.0%}"), *steps, case["peer"] or ""]

def _curve_rows(record):
    "List the points of all curves, and the start-up times."
    rows = []
    for name, case in record["cases"].items():
        for point in case.get("points", []):
            above = (point["memory"] - point["held"]) / 1e6 if "held" in point else None
            rate = point.get("targets_per_second", point["n"] / point["seconds"])
            rows.append([name, f"{point['n']:,}" + (f" x {point['rows']:,}" if "rows" in point else ""),
                         f"{point['seconds']:.2f}", _number(rate), _number(point["memory"] / 1e6), _number(above)])
        for what, times in case.get("startup", {}).items():
            memory = case.get("startup_memory", {}).get(what)
            rows.append([what, "", f"{statistics.median(times):.2f}", "", _number(memory and memory / 1e6), ""])
    return rows

def bench_tables(
    record: dict,  # what `run_bench` returned
) -> dict[str, tuple[list[str], list[list[str]]]]:  # title -> headings and rows; tables without rows are left out
    "Lay out a benchmark as tables."
    cases, sides = trained_cases(record), ["32 bits", "bf16", "peer", "ratio"]
    ranked = [case for case in cases if _middle(case, "ours", "users_per_second")]
    tables = {
        "Training, targets a second": (
            ["system", *sides, "asked", "share of floor", "steps", "peer's", "peer is"], [*map(_training_row, cases)]),
        "Full ranking, users a second; asked: 5 times the peer's": (
            ["system", *sides], [[case["title"], *_speed_cells(case, "users_per_second")] for case in ranked]),
        "Growth of memory, MB; asked: a third of the peer's at most": (
            ["system", "training", "peer", "part", "ranking", "peer", "part"],
            [[case["title"], *_memory_cells(case, "memory"), *_memory_cells(case, "evaluation_memory")]
             for case in cases]),
        "What else takes time, and what grows": (
            ["case", "n", "seconds", "a second", "memory, MB", "above what is held, MB"], _curve_rows(record))}
    return {title: table for title, table in tables.items() if table[1]}


# Words

def bench_verdict(
    record: dict,  # what `run_bench` returned
) -> list[str]:  # sentences, none where nothing was compared
    "Say what was asked for and is reached, what is missed, and how far training is from the floor."
    cases, said = trained_cases(record), []
    def ratios(key, *sides): return {case["title"]: r[0] for case in cases if (r := paired_ratio(case, key, *sides))}
    faster, ranked, held = map(ratios, ("targets_per_second", "users_per_second", "memory"))
    for case in cases:
        if not case["goal"] or case["title"] not in faster: continue
        ratio, goal = faster[case["title"]], case["goal"]
        said.append(f"{case['title']}: {ratio:.1f} times the peer in training, {goal:g} were asked for: "
                    f"{'reached' if ratio >= goal else 'MISSED'}.")
    if ranked:
        missed = ", ".join(title for title, ratio in ranked.items() if ratio < 5) or "none"
        said.append(f"Ranking: {min(ranked.values()):.1f} to {max(ranked.values()):.1f} times the peers, 5 were asked "
                    f"for; missed by {missed}.")
    if held:
        missed = ", ".join(title for title, part in held.items() if part > 1 / 3) or "none"
        said.append(f"Memory in training: {min(held.values()):.2f} to {max(held.values()):.2f} of the peers', a third "
                    f"was asked for; missed by {missed}.")
    shares = [share for case in cases if (share := _middle(case, "ours", "share"))]
    if shares: said.append(f"Products of matrices alone would take {min(shares):.0%} to {max(shares):.0%} of the time "
                           "of a step in 32 bits; the rest is what is left to gain.")
    slower = [title for title, ratio in ratios("targets_per_second", "bf16", "ours").items() if ratio < 1]
    if slower: said.append(f"In bf16 slower than in 32 bits: {', '.join(slower)}.")
    return said

def bench_text(
    record: dict,  # what `run_bench` returned
) -> str:
    "Print a benchmark as plain text."
    made = record["provenance"]
    lines = [f"{made['gpu'] or made['cpu']}, {made['threads']} threads, PyTorch {made['versions']['torch']}, "
             f"{made['time']}"]
    for shape, rates in record["cases"].get("machine", {}).get("rates", {}).items():
        lines.append(f"products of the shape '{shape}': {rates['no'] / 1e9:,.0f} GFLOP/s in 32 bits, "
                     f"{rates['bf16'] / 1e9:,.0f} in bf16")
    for title, (columns, rows) in bench_tables(record).items(): lines += ["", title, text_table(columns, rows)]
    return "\n".join([*lines, "", *bench_verdict(record)])
