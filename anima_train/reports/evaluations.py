"""The evaluations of a run as plain values: of each set, and what sets of several roles say of each checkpoint."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

from anima_train.evaluation.bounds import Bounds
from anima_train.reports.html import rounded
from anima_train.reports.series import number
from anima_train.sampling.names import SCORE

Values = Mapping[str, object]  # as they were logged
LOGGED_OF_KINDS = ("/loss_of_", "/drift", "/difference_from_base")  # of which a kind, any text, may be the end


MAX_DIGITS = 7  # behind the point


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, over samples or over kinds, whichever is larger; NaN where one is missing."""

    value: float = math.nan
    error: float = math.nan

    @property
    def is_known(self) -> bool:
        """True if it was logged."""
        return math.isfinite(self.value)

    @property
    def text(self) -> str:
        """The number and its error, with two digits of it; "" of a number that is not known."""
        if not (self.is_known and math.isfinite(self.error)):
            return rounded(self.value)
        digits = 1 - math.floor(math.log10(self.error)) if self.error > 0 else 0
        if not 0 <= digits <= MAX_DIGITS:
            return f"{rounded(self.value)} ± {rounded(self.error)}"
        return f"{self.value + 0.0:.{digits}f} ± {self.error:.{digits}f}"

    @classmethod
    def of(cls, values: Values, name: str, part: str = "") -> "Estimate":
        """Return what was logged under a name, of a part such as a kind."""
        errors = [number(values.get(f"{name}_{each}{part}")) for each in ("stderr", "stderr_kinds")]
        error = max((each for each in errors if math.isfinite(each)), default=math.nan)
        return cls(number(values.get(f"{name}{part}")), error)


@dataclass(frozen=True)
class KindEvaluated:
    """The evaluation of the samples of one kind."""

    loss: float
    difference: Estimate
    drift: Estimate


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of one set at one step; NaN where a number is missing."""

    step: int
    loss: float
    difference: float  # from the base
    error: float  # standard error of the difference, over samples or over kinds, whichever is larger
    levels: Mapping[str, float]  # loss by noise level: "q 0.10", a quantile of t's distribution, or "t 0.10"
    drift: Estimate = Estimate()  # mean squared distance of the velocity from the base's
    relative: Estimate = Estimate()  # the same in parts of the mean square of the base's velocity
    cross_term: Estimate = Estimate()  # the rest of the difference
    kinds: Mapping[str, KindEvaluated] = field(default_factory=dict)
    as_trained: float = math.nan  # the loss of a T-LoRA whose ranks fall with noise
    levels_as_trained: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a step, evaluated on sets of several roles beside the base model."""

    step: int
    learning: Estimate  # the loss on validation images that is gone
    learning_at_highest_t: Estimate
    memorization: Estimate
    forgetting: Estimate  # the loss on retention images that has come
    forgetting_relative: Estimate  # in parts of the base's loss
    drift_relative: Estimate  # on retention images
    score: Estimate = Estimate()  # of the previews of this step, above the base's


@dataclass(frozen=True)
class Scores:
    """The scores of a run's previews by its judge: with the prompts and the judge that it had at last."""

    judge: str
    higher_is_better: bool
    pictures: Mapping[int, Sequence[float]]  # by step, those of each of the same pictures
    means: Mapping[int, Estimate]  # by step
    gains: Mapping[int, Estimate]  # the same above the base's pictures, paired; empty where these were not drawn

    def of(self, step: int, name: str) -> float:
        """Return the score of a preview; NaN if it is not known."""
        return score_of(self.pictures.get(step, ()), name)

    @property
    def sign(self) -> int:
        """1 where the highest score is the best, -1 where the lowest is."""
        return 1 if self.higher_is_better else -1


def score_of(scores: Sequence[float], name: str) -> float:
    """Return the score of a preview of this name; NaN if there is none."""
    return scores[int(name)] if name.isdecimal() and int(name) < len(scores) else math.nan


def scores_of(lines: Iterable[tuple[int, Values]]) -> Scores | None:
    """Return the scores that were logged; None of a run without a judge."""
    logged = [(step, values) for step, values in lines if isinstance(values.get("scores"), list)]
    if not logged:
        return None
    judge, pictures = logged[-1][1].get("judge"), logged[-1][1].get("requests")
    found = {
        step: [number(score) for score in scores]
        for step, values in logged
        for scores in [values["scores"]]
        if isinstance(scores, list) and (values.get("judge"), values.get("requests")) == (judge, pictures)
    }
    base = found.get(0, [])
    gains = {
        step: mean_of([score - first for score, first in zip(scores, base, strict=True)])
        for step, scores in found.items()
        if base and len(scores) == len(base)
    }
    means = {step: mean_of(scores) for step, scores in found.items()}
    return Scores(str(judge), bool(logged[-1][1].get("higher_is_better")), found, means, gains)


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of the values of pictures, with its standard error over them."""
    known = [value for value in values if math.isfinite(value)]
    if not known or len(known) < len(values):
        return Estimate()
    error = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(sum(known) / len(known), error)


def evaluations_by_set(lines: Iterable[tuple[int, Values]]) -> dict[str, list[Evaluated]]:
    """Return the evaluations of each set, in their order."""
    found: dict[str, list[Evaluated]] = defaultdict(list)
    for step, values in lines:
        for name in (key.removesuffix("/loss") for key in values if key.endswith("/loss")):
            if not any(each in name for each in LOGGED_OF_KINDS):
                found[name].append(evaluated(step, name, values))
    return dict(found)


def evaluated(step: int, name: str, values: Values) -> Evaluated:
    """Return the evaluation of a set out of what was logged after a step."""
    change, drift = f"{name}/difference_from_base", f"{name}/drift"
    kinds = {
        kind: KindEvaluated(
            number(values.get(f"{name}/loss_of_{kind}")),
            Estimate.of(values, change, f"_of_{kind}"),
            Estimate.of(values, drift, f"_of_{kind}"),
        )
        for key in values
        if key.startswith(f"{change}_of_")
        for kind in [key.removeprefix(f"{change}_of_")]
    }
    difference = Estimate.of(values, change)
    return Evaluated(
        step, number(values[f"{name}/loss"]), difference.value, difference.error, by_level(values, f"{name}/loss"),
        drift=Estimate.of(values, drift), relative=Estimate.of(values, f"{drift}_relative"),
        cross_term=Estimate.of(values, f"{drift}_cross_term"), kinds=kinds,
        as_trained=number(values.get(f"{name}/loss_as_trained")),
        levels_as_trained=by_level(values, f"{name}/loss_as_trained"),
    )  # fmt: skip


def by_level(values: Values, name: str) -> dict[str, float]:
    """Return what was logged under a name at each noise level, as `Evaluated.levels` names them."""
    return {
        f"{short} {key.removeprefix(start)}": number(values[key])
        for short, start in (("q", f"{name}_quantile_"), ("t", f"{name}_sigma_"))
        for key in values
        if key.startswith(start)
    }


def checkpoints_of(lines: Iterable[tuple[int, Values]], scores: Scores | None = None) -> list[Checkpoint]:
    """Return the checkpoints that were evaluated on sets of several roles; none of a run without them."""
    gains = {} if scores is None else scores.gains
    merged: dict[int, dict[str, object]] = defaultdict(dict)
    for step, values in lines:
        merged[step].update({key: value for key, value in values.items() if key.startswith("evaluation/")})
    names = [each for each in Checkpoint.__dataclass_fields__ if each not in ("step", "score")]
    return [
        Checkpoint(
            step,
            **{name: Estimate.of(values, f"evaluation/{name}") for name in names},
            score=gains.get(step, Estimate()),
        )
        for step, values in sorted(merged.items())
        if values
    ]


@dataclass(frozen=True)
class UpdateNorm:
    """The size of what was added to the base weights of a component, after a step; NaN where it was not logged."""

    step: int
    norm: float
    relative: float  # in parts of the base weights' norm
    share_moved: float  # of the weights, if they are trained themselves


def update_norms(lines: Iterable[tuple[int, Values]]) -> dict[str, list[UpdateNorm]]:
    """Return what was logged of each component, in its order."""
    found: dict[str, list[UpdateNorm]] = defaultdict(list)
    for step, values in lines:
        for component in (key.removeprefix("update_norm/") for key in values if key.startswith("update_norm/")):
            names = ("update_norm", "update_norm_relative", "share_moved_in_run")
            found[component].append(UpdateNorm(step, *(number(values.get(f"{name}/{component}")) for name in names)))
    return dict(found)


def cost_of(checkpoints: Iterable[Checkpoint]) -> str:
    """Return the name of the number that tells what was forgotten: the drift, if it was measured."""
    return "drift_relative" if any(each.drift_relative.is_known for each in checkpoints) else "forgetting_relative"


def on_front(checkpoints: Sequence[Checkpoint], gain: str, cost: str, sign: int = 1) -> set[int]:
    """Return the steps of those that none surpasses: that learned as much and forgot less, or more and as little.

    Args:
        checkpoints: to choose from; those that lack a number are left out.
        gain: the name of the number whose highest is the best; with the sign -1 the lowest.
        cost: that of the number whose lowest is.
        sign: see above.
    """
    points = {each.step: (sign * getattr(each, gain).value, getattr(each, cost).value) for each in checkpoints}
    known = {step: point for step, point in points.items() if all(map(math.isfinite, point))}
    return {
        step
        for step, (high, low) in known.items()
        if not any(g >= high and c <= low and (g > high or c < low) for g, c in known.values())
    }


def best_steps(checkpoints: Sequence[Checkpoint], scores: Scores | None = None) -> dict[str, int]:
    """Return the step that has learned most, or has the best previews, by the words for it; the base model is none."""
    gains = {
        "evaluation/learning": {each.step: each.learning.value for each in checkpoints},
        "evaluation/learning_at_highest_t": {each.step: each.learning_at_highest_t.value for each in checkpoints},
    }
    if scores is not None:
        gains[f"{SCORE}/{scores.judge}"] = {step: scores.sign * mean.value for step, mean in scores.means.items()}
    found = {}
    for words, values in gains.items():
        known = {step: value for step, value in values.items() if step and math.isfinite(value)}
        if known:
            found[f"best by {words}"] = max(known, key=lambda step: known[step])
    return found


def kept_step(
    lines: Iterable[tuple[int, Values]], settings: Values, scores: Scores | None = None
) -> dict[str, int]:  # fmt: skip
    """Return the step whose weights the run has kept, by the words for why; empty if it was to keep none.

    Args:
        lines: what was logged.
        settings: of the run, as its file tells them.
        scores: of its previews.
    """
    metric, budget = (settings.get(key) for key in ("keep_best", "forgetting_budget"))
    bounds = Bounds(
        metric if isinstance(metric, str) else None,
        forgetting_budget=float(budget) if isinstance(budget, int | float) else None,
        headline=retention_drifts(settings.get("eval_datasets")),
    )
    history: dict[int, dict[str, float]] = defaultdict(dict)
    for step, values in lines:
        history[step].update({key: number(value) for key, value in values.items()})
    named = metric
    if scores is not None:
        for step, mean in scores.means.items():
            history[step] |= {SCORE: mean.value, "higher_is_better": scores.higher_is_better}
        named = f"{SCORE}/{scores.judge}" if metric == SCORE else metric
    step_kept = bounds.best(sorted(history.items()))
    if step_kept is None:
        return {}
    chosen = "the last" if bounds.keep_best is None else f"best by {named}"
    return {f"kept: {chosen}{'' if bounds.forgetting_budget is None else ' within the budget'}": step_kept}


def retention_drifts(sets: Any) -> tuple[str, ...]:
    """Return the names of the drifts that a budget is for, of the sets in a run's configuration."""
    tables = [each for each in sets if isinstance(each, dict)] if isinstance(sets, list) else []
    return tuple(f"{each.get('name')}/drift_relative" for each in tables if each.get("role") == "retention")
