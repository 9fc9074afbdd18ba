"""The results of an evaluation: losses beside those of the base model, and how sure their difference is."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from anima_train.config.sections import Role

CHANCE = 3.0  # standard errors; a difference of no more may be chance


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its standard errors."""

    mean: float
    error: float | None  # over samples; None: there is only one
    kind_error: float | None  # over kinds, whose samples may be alike; None: there are fewer than two

    @property
    def largest_error(self) -> float | None:
        """The larger one of its standard errors; None if there is none."""
        return max((each for each in (self.error, self.kind_error) if each is not None), default=None)

    @property
    def standard_errors(self) -> float | None:
        """The number of standard errors, the larger one, that the mean is away from zero; None if it is no number."""
        error = self.largest_error
        if error == 0:
            return None if self.mean else 0.0
        return None if error is None else self.mean / error

    @property
    def is_beyond_chance(self) -> bool:
        """True if it is hardly zero for all samples, and all kinds, like these."""
        error = self.largest_error
        return error is not None and abs(self.mean) > CHANCE * error

    def metrics(self, name: str, part: str = "") -> dict[str, float]:
        """Return the numbers to log under a name; that of a part comes last, as it may be any text."""
        values = {
            "": self.mean, "_stderr": self.error, "_stderr_kinds": self.kind_error, "_in_stderr": self.standard_errors,
        }  # fmt: skip
        return {f"{name}{which}{part}": value for which, value in values.items() if value is not None}


def paired_difference(values: Float[Tensor, " S"], kinds: Sequence[str]) -> Difference:
    """Return the mean of differences, one for each sample, with its standard errors.

    Samples of one kind (an artist, a character) may all differ alike. The error over kinds takes each kind as one
    observation, however many samples it has: the cluster-robust error of a mean, with K / (K - 1) for K kinds.

    Args:
        values: differences.
        kinds: of the samples; "" is of no kind: such a sample is one by itself.
    """
    number, mean = len(values), values.mean()
    error = float(values.std()) / math.sqrt(number) if number > 1 else None
    sums: dict[tuple[str, int], float] = defaultdict(float)
    for index, (value, kind) in enumerate(zip(values, kinds, strict=True)):
        sums[kind, 0 if kind else index] += float(value - mean)
    num_kinds = len(sums)
    kind_error = None
    if any(kinds) and num_kinds > 1:
        kind_error = math.sqrt(sum(each**2 for each in sums.values()) * num_kinds / (num_kinds - 1)) / number
    return Difference(float(mean), error, kind_error)


def combined(parts: Sequence[tuple[float, Difference]]) -> Difference:
    """Return the sum of differences of sets that have no sample in common, each multiplied by a factor."""

    def error_of(errors: Sequence[float | None]) -> float | None:
        known = [abs(factor) * error for (factor, _), error in zip(parts, errors, strict=True) if error is not None]
        return math.hypot(*known) if len(known) == len(parts) else None

    kind_errors = [part.error if part.kind_error is None else part.kind_error for _, part in parts]
    has_kinds = any(part.kind_error is not None for _, part in parts)
    return Difference(
        sum(factor * part.mean for factor, part in parts),
        error_of([part.error for _, part in parts]),
        error_of(kind_errors) if has_kinds else None,
    )


def rows_by_kind(kinds: Sequence[str]) -> Iterator[tuple[str, list[bool]]]:
    """Yield each kind, and which samples are of it."""
    for kind in sorted(set(kinds) - {""}):
        yield kind, [each == kind for each in kinds]


@dataclass(frozen=True)
class Drift:
    """The distance of the velocity v from the base model's, v0, on the same noise: means over latents, (S, L) each.

    The mean squared error is above the base's by `squared + cross`. Where the base predicts the mean of what fits its
    input, as on pictures like those it was made from, `cross` is near zero, and what is forgotten is `squared` alone.
    """

    squared: Float[Tensor, "S L"]  # |v - v0|^2
    cross: Float[Tensor, "S L"]  # 2 (v - v0) (v0 - target)
    base: Float[Tensor, "S L"]  # |v0|^2

    def relative(self, kinds: Sequence[str]) -> Difference:
        """Return the drift in parts of the base's mean square, which is taken as exact."""
        return combined([(float(1 / self.base.mean()), paired_difference(self.squared.mean(dim=1), kinds))])

    def metrics(self, name: str, kinds: Sequence[str]) -> dict[str, float]:
        """Return the numbers to log under a name."""
        values = paired_difference(self.squared.mean(dim=1), kinds).metrics(name)
        values |= self.relative(kinds).metrics(f"{name}_relative")
        values |= paired_difference(self.cross.mean(dim=1), kinds).metrics(f"{name}_cross_term")
        for kind, rows in rows_by_kind(kinds):
            part = self.squared[rows].mean(dim=1)
            values |= paired_difference(part, [""] * len(part)).metrics(name, f"_of_{kind}")
        return values


@dataclass(frozen=True)
class Evaluation:
    """The losses of one set: a row per sample, a column per noise level, each the mean over its noises."""

    name: str
    role: Role
    levels: tuple[str, ...]  # names of the noise levels
    kinds: tuple[str, ...]  # of the samples; "": of none
    losses: Float[Tensor, "S L"]
    drift: Drift | None = None  # where it is measured
    masked: Float[Tensor, "S L"] | None = None  # the losses of a T-LoRA as it is trained, its ranks falling with noise

    @property
    def loss(self) -> float:
        """The mean of all."""
        return float(self.losses.mean())

    def difference(self, base: "Evaluation") -> Difference:
        """Return how much the loss is above the base model's, on the same samples and noise."""
        return paired_difference((self.losses - base.losses).mean(dim=1), self.kinds)

    @property
    def highest_level(self) -> int:
        """The place of the noise level with the most noise."""
        return max(range(len(self.levels)), key=lambda place: float(self.levels[place].rpartition("_")[2]))

    def differences_by_level(self, base: "Evaluation") -> list[Difference]:
        """Return the same at each noise level."""
        return [paired_difference(each, self.kinds) for each in (self.losses - base.losses).T]

    def by_level(self, name: str, losses: Float[Tensor, "S L"]) -> dict[str, float]:
        """Return the mean at each noise level, to log under a name."""
        means = zip(self.levels, losses.mean(dim=0).tolist(), strict=True)
        return {f"{self.name}/{name}_{level}": mean for level, mean in means}

    def metrics(self, base: "Evaluation | None") -> dict[str, float]:
        """Return the numbers to log: the mean, at each noise level, and of each kind, beside the base model's."""
        values = {f"{self.name}/loss": self.loss}
        values |= self.by_level("loss", self.losses)
        for kind, rows in rows_by_kind(self.kinds):
            values[f"{self.name}/loss_of_{kind}"] = float(self.losses[rows].mean())
        if self.masked is not None:
            values[f"{self.name}/loss_as_trained"] = float(self.masked.mean())
            values |= self.by_level("loss_as_trained", self.masked)
        if self.drift is not None:
            values |= self.drift.metrics(f"{self.name}/drift", self.kinds)
        if base is not None:
            name = f"{self.name}/difference_from_base"
            values |= self.difference(base).metrics(name)
            for level, change in zip(self.levels, self.differences_by_level(base), strict=True):
                values |= change.metrics(name, f"_{level}")
            for kind, rows in rows_by_kind(self.kinds):
                part = (self.losses - base.losses)[rows].mean(dim=1)
                values |= paired_difference(part, [""] * len(part)).metrics(name, f"_of_{kind}")
        return values


def mean_of(differences: Sequence[Difference], factor: float = 1.0) -> Difference:
    """Return the mean of several sets' differences, each set weighing the same, multiplied by a factor."""
    return combined([(factor / len(differences), each) for each in differences])


def summary(results: Sequence[Evaluation], base: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return what sets of several roles say together: the means over the sets of a role. Nothing where all have one.

    "learning": by how much the loss on validation pictures fell below the base model's, and "learning_at_highest_t"
    by how much at the level with the most noise; "forgetting": by how much that on retention pictures rose, and
    "forgetting_relative" in parts of the base's; "drift_relative": that of the retention sets; "memorization": by how
    much more the loss fell on training pictures than on validation ones.
    """
    found: dict[Role, list[Evaluation]] = defaultdict(list)
    for result in results:
        if result.name in base:
            found[result.role].append(result)
    if len(found) < 2:
        return {}
    change = {role: mean_of([each.difference(base[each.name]) for each in sets]) for role, sets in found.items()}
    values: dict[str, float] = {}
    if "validation" in change:
        values |= combined([(-1, change["validation"])]).metrics("evaluation/learning")
        highest = [each.differences_by_level(base[each.name])[each.highest_level] for each in found["validation"]]
        values |= mean_of(highest, -1).metrics("evaluation/learning_at_highest_t")
        if "train" in change:
            parts = [(1.0, change["validation"]), (-1.0, change["train"])]
            values |= combined(parts).metrics("evaluation/memorization")
    if "retention" in change:
        values |= change["retention"].metrics("evaluation/forgetting")
        base_loss = sum(base[each.name].loss for each in found["retention"]) / len(found["retention"])
        if base_loss > 0:
            values |= combined([(1 / base_loss, change["retention"])]).metrics("evaluation/forgetting_relative")
    drifts = [each.drift.relative(each.kinds) for each in found["retention"] if each.drift is not None]
    if drifts:
        values |= mean_of(drifts).metrics("evaluation/drift_relative")
    return values


def score(results: Sequence[Evaluation]) -> float:
    """Return the number that the best training state has the lowest of: the mean loss of what was not trained on.

    That of the validation sets; without any, of all sets.
    """
    chosen = [result for result in results if result.role == "validation"] or results
    return sum(result.loss for result in chosen) / len(chosen)


def described(result: Evaluation, base: Evaluation | None) -> str:
    """Return an evaluation in words."""
    text = f"{result.name}/loss {result.loss:.5f}"
    if base is not None and result.losses.equal(base.losses):
        return text
    if base is not None:
        change = result.difference(base)
        error = change.largest_error
        text += f", {change.mean:+.5f}" + ("" if error is None else f" +- {error:.5f}") + " from the base"
        if error is not None and not change.is_beyond_chance:
            text += " (may be chance)"
    if result.drift is not None:
        text += f", drift {result.drift.relative(result.kinds).mean:.2%} of the base's velocity"
    return text
