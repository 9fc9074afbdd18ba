"""Learning and forgetting on the page of a run: curves, the front of its checkpoints, and pictures beside each."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup
from PIL import Image

from anima_train.reports.charts import NUM_COLOURS, Dot, Line, chart, plane
from anima_train.reports.evaluations import Checkpoint, Estimate, Evaluated, Scores, cost_of, on_front
from anima_train.reports.html import small_jpeg
from anima_train.reports.run import Preview
from anima_train.reports.series import MAX_POINTS, evenly_to_last

MAX_CHECKPOINTS = 24  # in the plane and below it
MAX_PICTURES = 4  # beside each
THUMBNAIL_SIDE = 192  # pixels, the longer one
GAINS = {"learning": "learning, mean over t", "learning_at_highest_t": "learning at the highest t"}
COSTS = {
    "drift_relative": "drift from the base, relative",
    "forgetting_relative": "forgetting, relative to the base's loss",
}


@dataclass(frozen=True)
class Card:
    """A checkpoint with what is shown beside it."""

    checkpoint: Checkpoint
    fronts: Sequence[str]  # by what it is on the front
    best: Sequence[str]  # by what it is the best
    previews: Sequence[Preview]  # the last until its step, one for each prompt


@dataclass(frozen=True)
class Tradeoff:
    """The section of a page about what was learned and forgotten; what was not measured is ""."""

    losses: Markup  # learning and forgetting over steps
    cost: Markup  # the relative drift, or the relative change of the loss, over steps
    cost_name: str
    memorization: Markup
    planes: Sequence[Markup]
    cards: Sequence[Card]
    best: Sequence[tuple[str, int]]  # (words for it, step)
    num_checkpoints: int
    judge: str  # that has scored the previews; ""


def tradeoff(
    checkpoints: Sequence[Checkpoint],
    best: Mapping[str, int],
    rows: Sequence[Sequence[Preview]],
    scores: Scores | None = None,
) -> Tradeoff | None:
    """Return the section; None for a run without sets of several roles.

    Args:
        checkpoints: all that were evaluated.
        best: steps by what they are the best of them by.
        rows: the previews, those of one prompt in a row.
        scores: of these, by a judge.
    """
    if not checkpoints:
        return None
    cost, gains = cost_of(checkpoints), dict(GAINS)
    fronts = {gain: on_front(checkpoints, gain, cost) for gain in GAINS}
    if scores is not None:
        gains["score"] = f"{scores.judge}, above the base"
        fronts["score"] = on_front(checkpoints, "score", cost, scores.sign)
    shown = chosen(checkpoints, set.union(*fronts.values(), best.values()))
    curves = {"learning": "learning", "learning_at_highest_t": "learning at the highest t", "forgetting": "forgetting"}
    return Tradeoff(
        estimates_chart("learning and forgetting", checkpoints, curves),
        estimates_chart(COSTS[cost], checkpoints, {cost: COSTS[cost]}),
        COSTS[cost],
        estimates_chart("memorization", checkpoints, {"memorization": "memorization"}),
        [each for gain in gains if (each := front_plane(shown, gain, gains[gain], cost, fronts[gain]))],
        [
            Card(
                each,
                [gains[gain] for gain, steps in fronts.items() if each.step in steps],
                [words for words, step in best.items() if step == each.step],
                nearest_previews(rows, each.step),
            )
            for each in shown
        ],
        list(best.items()),
        len(checkpoints),
        "" if scores is None else scores.judge,
    )


def chosen(checkpoints: Sequence[Checkpoint], steps: set[int]) -> list[Checkpoint]:
    """Return at most `MAX_CHECKPOINTS`: those of these steps first, and of the others evenly, the last included."""
    wanted = evenly_to_last([each for each in checkpoints if each.step in steps], MAX_CHECKPOINTS - 1)
    others = [each for each in checkpoints if each not in wanted]
    return sorted([*wanted, *evenly_to_last(others, MAX_CHECKPOINTS - len(wanted))], key=lambda each: each.step)


def nearest_previews(rows: Sequence[Sequence[Preview]], step: int) -> list[Preview]:
    """Return of each row the last preview until a step, small; of more than `MAX_PICTURES` rows only the first."""
    found = [max((each for each in row if each.step <= step), key=lambda each: each.step, default=None) for row in rows]
    return [thumbnail(each) for each in found if each is not None][:MAX_PICTURES]


def thumbnail(preview: Preview) -> Preview:
    """Return a smaller picture."""
    with Image.open(io.BytesIO(base64.b64decode(preview.jpeg)), formats=["JPEG"]) as image:
        return replace(preview, jpeg=small_jpeg(image, THUMBNAIL_SIDE))


# Charts


def band_line(name: str, points: Sequence[tuple[int, Estimate]]) -> Line:
    """Return numbers over steps, with a standard error to either side as the band."""
    bands = [(step, each.value - each.error, each.value + each.error) for step, each in points]
    return Line(name, [(step, each.value) for step, each in points], bands)


def estimates_chart(label: str, checkpoints: Sequence[Checkpoint], names: Mapping[str, str]) -> Markup:
    """Return the curves of these numbers, by the words for them, with their errors; "" if none of them was logged."""
    shown = evenly_to_last(checkpoints, MAX_POINTS)
    lines = [
        band_line(words, [(each.step, getattr(each, name)) for each in shown])
        for name, words in names.items()
        if any(getattr(each, name).is_known for each in shown)
    ]
    return chart(label, lines, from_zero=True) if lines else Markup("")


def front_plane(checkpoints: Sequence[Checkpoint], gain: str, label: str, cost: str, front: set[int]) -> Markup:
    """Return the checkpoints in the plane of what was learned and what was forgotten; "" if one is not known."""
    dots = []
    for each in checkpoints:
        y, x = getattr(each, gain), getattr(each, cost)
        if x.is_known and y.is_known:
            words = f"step {each.step:,}: {label} {y.text}; {COSTS[cost]} {x.text}"
            dots.append(Dot(each.step, x.value, y.value, x.error, y.error, each.step in front, words))
    return plane(f"{label} against {COSTS[cost]}", COSTS[cost], label, dots)


def parts_chart(name: str, points: Sequence[Evaluated]) -> Markup:
    """Return the chart of the difference from the base beside its parts, drift and cross term."""
    shown = evenly_to_last(points, MAX_POINTS)
    parts: Mapping[str, Callable[[Evaluated], Estimate]] = {
        "difference": lambda each: Estimate(each.difference, each.error),
        "drift": lambda each: each.drift,
        "cross term": lambda each: each.cross_term,
    }
    lines = [band_line(words, [(each.step, part(each)) for each in shown]) for words, part in parts.items()]
    return chart(f"difference, drift and cross term on {name}", lines, from_zero=True)


def kinds_chart(name: str, points: Sequence[Evaluated]) -> Markup:
    """Return the chart of each kind's difference from the base: of those that differ most at the end."""
    shown = evenly_to_last(points, MAX_POINTS)
    last = {kind: each.difference for kind, each in shown[-1].kinds.items()}
    kinds = sorted(last, key=lambda kind: (not last[kind].is_known, -abs(last[kind].value), kind))[:NUM_COLOURS]
    lines = [
        band_line(kind, [(each.step, each.kinds[kind].difference) for each in shown if kind in each.kinds])
        for kind in sorted(kinds)
    ]
    return chart(f"difference from base by kind on {name}", lines, from_zero=True)
