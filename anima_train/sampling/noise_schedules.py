"""The noise levels (sigmas) that a sampler visits, as ComfyUI places them for a flow.

A flow of shift s has sigma(t) = s t / (1 + (s - 1) t). ComfyUI keeps a table of it at t = 1/1000, 2/1000, ..., 1. Every
schedule gives `steps + 1` falling numbers, the first of them 1 (all noise) and the last 0.
"""

from bisect import bisect_right
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from anima_train.core.settings import Settings, expand_name
from anima_train.objective.timesteps import shifted
from anima_train.sampling.elsewhere import SCHEDULES, named_elsewhere

TABLE_SIZE = 1000
BETA = 0.6  # both parameters of the beta schedule's distribution


class Schedule(Settings):
    """A spacing of the noise levels."""

    def sigmas(self, steps: int, shift: float) -> list[float]:
        """Return the noise levels of `steps` (1 to 1000) steps in a flow of this shift (at least 0.1)."""
        raise NotImplementedError


class Simple(Schedule):
    """Every so many entries of the table, from its end."""

    type: Literal["simple"] = "simple"

    def sigmas(self, steps: int, shift: float) -> list[float]:
        table, stride = sigma_table(shift), TABLE_SIZE / steps
        return [*(table[-1 - int(step * stride)] for step in range(steps)), 0.0]


class Normal(Schedule):
    """Even in t, down to the smallest t, and from there to 0."""

    type: Literal["normal"] = "normal"

    def sigmas(self, steps: int, shift: float) -> list[float]:
        last = smallest_t(shift)
        return [*(shifted(1 - (1 - last) * step / max(1, steps - 1), shift) for step in range(steps)), 0.0]


class SgmUniform(Schedule):
    """Even in t, down to one step above the smallest t, and from there to 0."""

    type: Literal["sgm_uniform"] = "sgm_uniform"

    def sigmas(self, steps: int, shift: float) -> list[float]:
        last = smallest_t(shift)
        return [*(shifted(1 - (1 - last) * step / steps, shift) for step in range(steps)), 0.0]


class Beta(Schedule):
    """The table at evenly spaced quantiles of a Beta(0.6, 0.6) distribution: closer at both ends.

    Lee et al. 2024, "Beta Sampling is All You Need", arXiv:2407.12173. Quantiles that fall on one entry are one step,
    so from 139 steps on there are fewer than asked for.
    """

    type: Literal["beta"] = "beta"

    def sigmas(self, steps: int, shift: float) -> list[float]:
        table, edges = sigma_table(shift), beta_edges()
        entries = [bisect_right(edges, 1 - step / steps) for step in range(steps)]
        kept = [entries[0], *(entry for last, entry in pairwise(entries) if entry != last)]
        return [*(table[entry] for entry in kept), 0.0]


def sigma_table(shift: float) -> list[float]:
    """Return ComfyUI's 1000 noise levels, rising to 1."""
    return [shifted(entry / TABLE_SIZE, shift) for entry in range(1, TABLE_SIZE + 1)]


def smallest_t(shift: float) -> float:
    """Return the t at which ComfyUI's schedules that are even in t end.

    It is the smallest *sigma*: ComfyUI takes t for the sigma there, so the shift acts on it twice.
    """
    return shifted(1 / TABLE_SIZE, shift)


def beta_edges() -> list[float]:
    """Return the probability that a Beta(0.6, 0.6) variable, times 999, is below k + 1/2, for each k from 0 to 998.

    The number of them below a probability is its quantile, times 999, rounded: an entry of the table.
    """
    count = TABLE_SIZE - 1
    half = beta_integral(0.5)
    lower = [beta_integral((entry + 0.5) / count) / half / 2 for entry in range(count // 2)]
    return [*lower, 0.5, *(1 - edge for edge in reversed(lower))]  # the distribution is symmetric


def beta_integral(x: float) -> float:
    """Return the integral of `u^(a-1) (1-u)^(a-1)` from 0 to x in [0, 1/2], by the power series of `(1-u)^(a-1)`."""
    total, coefficient = 0.0, 1.0
    for power in range(60):  # x^60 is less than a double resolves
        total += coefficient / (BETA + power)
        coefficient *= x * (power + 1 - BETA) / (power + 1)
    return x**BETA * total


AnySchedule = Annotated[Simple | Normal | SgmUniform | Beta, Field(discriminator="type")]
ScheduleSetting = Annotated[
    AnySchedule,
    BeforeValidator(expand_name, json_schema_input_type=str | AnySchedule),
    BeforeValidator(named_elsewhere(SCHEDULES), json_schema_input_type=str | AnySchedule),
]
