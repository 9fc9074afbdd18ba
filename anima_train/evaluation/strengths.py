"""A trained adapter at several strengths: what it has learned, and what it has forgotten, at each."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from anima_train.adapters.addition import adapted_layers
from anima_train.evaluation.results import Evaluation, summary
from anima_train.sampling.judges import Judged

BASE = 0.0  # the strength of an adapter that is not there


def strengths_to_try(wished: Sequence[float]) -> list[float]:
    """Return the strengths at which a run measures its adapter: the wished ones and, before them, the base; or none."""
    return sorted({BASE, *wished}) if wished else []


@contextlib.contextmanager
def at_strength(transformer: nn.Module, strength: float) -> Iterator[None]:
    """Have the adapter of a transformer act at a strength while this is open, in the same memory; then as before.

    Updates are linear in the factor that starts at zero, which is scaled. DoRA's are not: its model between base and
    result is none that its parameters make, and a configuration with both is refused.
    """
    if strength == 1:
        yield
        return
    starts = [start for _, layer in adapted_layers(transformer) for start in layer.starts()]
    assert all(start is None for _, start in starts)
    scaled = [parameter.detach() for parameter, _ in starts]
    kept = [values.clone() for values in scaled]
    with torch.no_grad():
        for values in scaled:
            values.mul_(strength)
    try:
        yield
    finally:
        for values, before in zip(scaled, kept, strict=True):
            values.copy_(before)


@dataclass(frozen=True)
class AtStrength:
    """The evaluations of all sets at one strength, and what was drawn there."""

    strength: float
    results: Sequence[Evaluation]
    previews: Sequence[str] = field(default=())  # files in the run's folder
    judged: Judged | None = None  # the scores of these

    def metrics(self, base: Mapping[str, Evaluation]) -> dict[str, float]:
        """Return all numbers as evaluations log them, beside the base model's."""
        values = {name: value for each in self.results for name, value in each.metrics(base.get(each.name)).items()}
        return values | summary(self.results, base)


def strengths_record(step: int, found: Sequence[AtStrength]) -> dict[str, Any]:
    """Return what a run keeps of its strengths: the numbers at each, against those at strength 0.

    Args:
        step: number of steps that the adapter was trained.
        found: at each strength, 0 the first.
    """
    base = {result.name: result for result in found[0].results}
    return {
        "step": step,
        "sets": [
            {"name": each.name, "role": each.role, "highest_level": each.levels[each.highest_level]}
            for each in found[0].results
        ],
        "strengths": [
            {"strength": each.strength, "metrics": each.metrics(base), "previews": list(each.previews)}
            | ({} if each.judged is None else asdict(each.judged))
            for each in found
        ],
    }
