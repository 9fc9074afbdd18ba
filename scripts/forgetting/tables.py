"""The figures of the experiment, as tables in Markdown."""

import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

LEARNING, FORGETTING = "learning", "forgetting"
LEVELS = (0.7, 0.85, 0.95)  # of the plain run's best gain
DRAWN = 0.5  # share of pictures with the new shape
APART = ("plain", "early")  # not compared
PREDICTORS = {
    "drift on drawn pictures (captions only)": "drawn/drift", "drift on the same pictures": "known/drift",
    "drift on training pictures": "trained/drift", "gain on held-out pictures": LEARNING, "steps": "step",
}  # fmt: skip
RATIOS = {  # a change of the loss, and the drift that is to tell it
    "old pictures, drift on them": (FORGETTING, "known/drift"),
    "old pictures, drift on drawn ones": (FORGETTING, "drawn/drift"),
    "drawn pictures, drift on them": ("drawn/difference_from_base", "drawn/drift"),
}
Run = dict[str, Any]
Runs = dict[str, dict[int, Run]]  # by method and seed


def mean_error(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean of numbers, one for each seed, with its standard error and their number."""
    if not values:
        return "not reached"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (1)"
    return f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f} ({len(values)})"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def against_steps(plain: dict[int, Run]) -> str:
    """Return forgetting against steps, and the samples that are needed to see it, paired and unpaired."""
    rows = []
    for step in [point["step"] for point in next(iter(plain.values()))["evaluations"]][1:]:
        at = [(run, point) for run in plain.values() for point in run["evaluations"] if point["step"] == step]
        paired, unpaired = [], []
        for run, point in at:
            losses = run["base_losses"]["known"]
            spread = point["known/difference_from_base_stderr"] * math.sqrt(len(losses))
            paired.append((3 * spread / point[FORGETTING]) ** 2)
            unpaired.append(2 * (3 * np.std(losses) / point[FORGETTING]) ** 2)
        rows.append([
            str(step), mean_error([-point[LEARNING] for _, point in at], 4),
            mean_error([point[FORGETTING] for _, point in at], 4),
            mean_error([point["known/difference_from_base_stderr"] for _, point in at], 4),
            mean_error([point["known/difference_from_base_stderr_kinds"] for _, point in at], 4),
            f"{math.ceil(np.median(paired))}", f"{math.ceil(np.median(unpaired))}",
        ])  # fmt: skip
    headings = ["step", "held-out", "known", "its s.e. over samples", "over kinds", "n paired", "n unpaired"]
    return table(headings, rows)


def by_kind(plain: dict[int, Run]) -> str:
    """Return the forgetting of each kind at the end."""
    last = [run["evaluations"][-1] for run in plain.values()]
    mark = "known/difference_from_base_of_"
    kinds = [key.removeprefix(mark) for key in last[0] if key.startswith(mark)]
    return table(kinds, [[mean_error([point[mark + kind] for point in last], 3) for kind in kinds]])


def points_of(run: Run) -> list[Run]:
    """Return the evaluations of a run, each with what the judge saw in its pictures, if it looked."""
    looks = {int(step): seen for step, seen in run.get("pictures", {}).items()}
    return [point | looks.get(point["step"], {}) for point in run["evaluations"]]


def at_level(run: Run, gain: str, level: float, cost: str) -> float | None:
    """Return the cost where a gain first reaches a level, on the straight line between two points; None: it never does.

    Args:
        run: what was logged.
        gain: name of a number that grows.
        level: of it.
        cost: name of a number that is wanted there.
    """
    points = [point for point in points_of(run) if gain in point]
    for before, after in pairwise(points):
        if before[gain] < level <= after[gain]:
            part = (level - before[gain]) / (after[gain] - before[gain])
            return before[cost] + part * (after[cost] - before[cost])
    return None


def ratios(runs: Runs, method: str, gain: str, levels: dict[int, float], cost: str = FORGETTING) -> list[float]:
    """Return, for each seed of a method, its cost at equal gain over that of the plain run with this seed."""
    found = []
    for seed, run in sorted(runs[method].items()):
        if seed in levels:
            mine = at_level(run, gain, levels[seed], cost)
            plain = at_level(runs["plain"][seed], gain, levels[seed], cost)
            if mine is not None and plain:
                found.append(mine / plain)
    return found


def compared(runs: Runs, seconds: dict[str, list[float]]) -> str:
    """Return each method's forgetting over the plain run's at equal learning, by loss and by pictures, and its cost.

    Args:
        runs: by method and seed.
        seconds: of a step, by method, one number for each turn; may be empty.
    """
    plain = runs["plain"]
    best = {seed: max(point[LEARNING] for point in run["evaluations"]) for seed, run in plain.items()}
    at = {level: {seed: level * value for seed, value in best.items()} for level in LEVELS}
    columns = {f"{level:.0%} of the gain": (LEARNING, at[level], FORGETTING) for level in LEVELS}
    if any("pictures" in run for run in plain.values()):
        columns[f"new pattern in {DRAWN:.0%} of pictures"] = ("new right", dict.fromkeys(plain, DRAWN), FORGETTING)
    columns["steps to 85 %"] = (LEARNING, at[0.85], "step")
    rows, weaker = [], {seed: run | {"evaluations": at_strengths(run)} for seed, run in plain.items()}
    runs = {**runs, "plain, at lower strength": {seed: run for seed, run in weaker.items() if run["evaluations"]}}
    for method in [method for method in runs if method not in APART]:
        found = (ratios(runs, method, *column) for column in columns.values())
        # The least of its rounds: what else the machine does only adds to the time.
        time = [f"{min(seconds[method]) / min(seconds['plain']):.2f}" if method in seconds else ""] if seconds else []
        rows.append([method, *map(mean_error, found), *time])
    return table(["method", *columns, *(["time of a step"] if seconds else [])], rows)


SHOWN = {
    LEARNING: "gain on held-out pictures", "at most noise": "the same at most noise", FORGETTING: "forgetting",
    "drawn/drift": "drift, captions only", "known/drift_cross_term": "cross term", "new right": "new drawn",
    "old right": "old right", "old as new": "old drawn as new",
}  # fmt: skip


def at_end(runs: Runs) -> str:
    """Return what each method has learned and forgotten after its last step, and the plain LoRA at its strengths."""
    ends = {
        method: [points_of(run)[-1] for run in found.values()] for method, found in runs.items() if method != "early"
    }
    for run in runs["plain"].values():
        for point in at_strengths(run):
            ends.setdefault(f"plain at strength {point['strength']:g}", []).append(point)
    shown = {key: name for key, name in SHOWN.items() if key in ends["plain"][0]}
    rows = [
        [method, *(mean_error([point[key] for point in points if key in point], 3) for key in shown)]
        for method, points in ends.items()
    ]
    return table(["method", *shown.values()], rows)


def at_strengths(run: Run) -> list[Run]:
    """Return the evaluations of a LoRA at its strengths, 0 the first, with what the judge saw at each."""
    looks = {float(strength): seen for strength, seen in run.get("pictures_at_strength", {}).items()}
    step = {"step": run["evaluations"][-1]["step"]}  # of the training, whatever the strength
    return [
        with_gains(each["metrics"]) | looks.get(each["strength"], {}) | step | {"strength": each["strength"]}
        for each in run.get("strengths", [])
    ]


def with_gains(point: Run) -> Run:
    """Return numbers of an evaluation with those that the tables use."""
    gains = {"at most noise": -point["held/difference_from_base_quantile_0.80"]}
    return (
        point | gains | {LEARNING: -point["held/difference_from_base"], FORGETTING: point["known/difference_from_base"]}
    )


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return the ranks of numbers; equal ones have the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def rank_correlation(points: Sequence[Run], key: str) -> float:
    """Return the rank correlation (Spearman's) of a number with forgetting; NaN where it is always the same."""
    values, changes = ranks([point[key] for point in points]), ranks([point[FORGETTING] for point in points])
    return math.nan if np.ptp(values) == 0 else float(np.corrcoef(values, changes)[0, 1])


def predictors(runs: Runs) -> str:
    """Return the rank correlation of each number with forgetting, over all checkpoints, 95 % by bootstrap over runs."""
    traces = [points_of(run)[1:] for method, found in runs.items() if method != "early" for run in found.values()]
    picks = np.random.default_rng(0).integers(len(traces), size=(200, len(traces)))
    rows = []
    for name, key in PREDICTORS.items():
        found = rank_correlation([*chain.from_iterable(traces)], key)
        drawn = [rank_correlation([*chain.from_iterable(traces[i] for i in pick)], key) for pick in picks]
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        last = rank_correlation([points[-1] for points in traces], key)
        rows.append([name, f"{found:+.2f} [{low:.2f}, {high:.2f}]", f"{last:+.2f}"])
    return table(["number", f"all {sum(map(len, traces))} checkpoints", f"the last of {len(traces)} runs"], rows)


def difference_over_drift(runs: Runs) -> str:
    """Return the change of a loss over a drift, for each method, over all checkpoints."""
    rows = []
    for method, found in runs.items():
        points = [point for run in found.values() for point in points_of(run)[1:]]
        cells = [
            np.quantile([point[up] / point[down] for point in points], (0, 0.5, 1)) for up, down in RATIOS.values()
        ]
        rows.append([method, *(f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in cells)])
    return table(["method", *RATIOS], rows)


def everything(runs: Runs, seconds: dict[str, list[float]]) -> str:
    """Return all tables, of runs and of the seconds of their steps; the plain method has to be among the runs."""
    runs = {method: {seed: with_points(run) for seed, run in found.items()} for method, found in runs.items()}
    parts = {
        "Forgetting against steps, of plain runs": against_steps(runs["plain"]),
        "The first steps": against_steps(runs["early"]) if "early" in runs else "",
        "Forgetting of each kind in the end": by_kind(runs["plain"]),
        "Forgetting over the plain run's, at equal learning": compared(runs, seconds),
        "In the end": at_end(runs),
        "Rank correlation with forgetting": predictors(runs),
        "Difference over drift, median and range": difference_over_drift(runs),
    }
    return "\n\n".join(f"## {title}\n\n{text}".rstrip() for title, text in parts.items() if text)


def with_points(run: Run) -> Run:
    """Return a run whose evaluations have the numbers that the tables use."""
    return run | {"evaluations": [with_gains(point) for point in run["evaluations"]]}
