"""The bounds of a run: which of its evaluations is the best, and when it ends before its last step.

All of it follows from what evaluations and previews have logged, so that a run that is resumed decides as one that was
not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from anima_train.core.format import count
from anima_train.sampling.names import SCORE

if TYPE_CHECKING:  # pages are made without torch
    from anima_train.config.sections import EarlyStopping

HIGHER = ("evaluation/learning", "evaluation/learning_at_highest_t")  # numbers of which the highest is the best
History = Sequence[tuple[int, Mapping[str, float]]]  # what was logged after each step, in their order


@dataclass(frozen=True)
class Bounds:
    """The number that a run keeps the best of, and the bounds that it may not pass."""

    keep_best: str | None = None  # the number that the best evaluation has the best of
    early_stopping: "EarlyStopping | None" = None
    forgetting_budget: float | None = None
    stops_at_budget: bool = True
    headline: tuple[str, ...] = ()  # the numbers whose mean the budget is for

    @property
    def are_any(self) -> bool:
        """True if there is anything to decide."""
        return any(each is not None for each in (self.keep_best, self.early_stopping, self.forgetting_budget))

    def is_within(self, values: Mapping[str, float]) -> bool:
        """Return True if an evaluation is within the budget, if there is one."""
        # Neither what is not finite nor what was not measured is within a budget.
        found = self.measured(values)
        return self.forgetting_budget is None or (found is not None and found <= self.forgetting_budget)

    def measured(self, values: Mapping[str, float]) -> float | None:
        """Return the number that the budget is for; None where an evaluation lacks it."""
        found = [values[name] for name in self.headline if name in values]
        return sum(found) / len(found) if found else None

    def best(self, history: History) -> int | None:
        """Return the step of the best evaluation within the budget, the first of equals.

        Without a number to choose by it is the last one within the budget.
        """
        within = [(step, values) for step, values in history if step and self.is_within(values)]
        if self.keep_best is None:
            return within[-1][0] if within and self.forgetting_budget is not None else None
        steps = [step for step, values in within if math.isfinite(values.get(self.keep_best, math.nan))]
        known = dict(within)
        return min(steps, key=lambda step: cost(self.keep_best, known[step]), default=None)

    def ending(self, history: History) -> str | None:
        """Return why the run ends after the last of these evaluations; None if it goes on."""
        measured = [(step, values) for step, values in history if self.measured(values) is not None]
        step, values = measured[-1] if measured else (0, {})  # a step that was only drawn decides nothing
        if step and self.stops_at_budget and not self.is_within(values):
            found = self.measured(values)
            return f"forgetting_budget: {found:.4g} is above {self.forgetting_budget:g}"
        rule = self.early_stopping
        if rule is None:
            return None
        lowest, since = math.inf, 0
        for each in (values for _, values in history if rule.metric in values):  # it may be measured less often
            now = cost(rule.metric, each)
            is_better = now < lowest - rule.min_change
            lowest, since = (now, 0) if is_better else (lowest, since + 1)
        if since < rule.patience:
            return None
        drawings = ("drawing of the previews", "drawings of the previews")
        looks = count(since, *drawings if rule.metric == SCORE else ("evaluation",))
        return f"early_stopping: {rule.metric} did not get better in {looks}"


def cost(metric: str | None, values: Mapping[str, float]) -> float:
    """Return a number of an evaluation, the lower the better; infinite where it is missing or not finite."""
    value = values.get(metric or "", math.nan)
    if not math.isfinite(value):
        return math.inf
    return -value if metric in HIGHER or (metric == SCORE and values["higher_is_better"]) else value


def history_of(evaluations: Iterable[Mapping[str, Any]], previews: Iterable[Mapping[str, Any]] = ()) -> History:
    """Return what was logged after each step.

    Args:
        evaluations: the lines of a run's evaluations.
        previews: those of its previews' scores; one that is damaged, or cannot be compared with the last, is left out.
    """
    found: dict[int, dict[str, float]] = {}
    for line in evaluations:
        found.setdefault(int(line["step"]), {}).update(line)
    scored = [line for line in previews if is_score(line)]
    for line in scored:
        if all(line[key] == scored[-1][key] for key in ("judge", "requests")):
            numbers = {SCORE: fmean(line["scores"]), "higher_is_better": line["higher_is_better"]}
            found.setdefault(int(line["step"]), {}).update(numbers)
    return sorted(found.items())


def is_score(line: Mapping[str, Any]) -> bool:
    """Return True if a line holds the scores of previews, as they are logged."""
    scores = line.get("scores")
    is_whole = isinstance(scores, list) and scores and all(isinstance(each, int | float) for each in scores)
    return bool(is_whole) and {"judge", "requests", "higher_is_better"} <= line.keys()
