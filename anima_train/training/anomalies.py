"""Numbers that are wrong: updates that are not finite are skipped, and a rise of the loss or the gradient is told."""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anima_train.core.errors import NumericError
from anima_train.core.format import count, listed
from anima_train.data.plan import Step
from anima_train.data.samples import Sample
from anima_train.run.folder import step_of

MAX_SKIPPED = 10  # updates in a row; the run ends with the last of them
MAX_NAMED = 8  # images in one warning

WINDOW = 100  # steps that a step is compared with; also how long nothing more is said after a spike
RECENT = 16  # steps whose mean loss is looked at
LOSS_FACTOR = 2.5  # above the highest mean loss in the window
NORM_FACTOR = 10.0  # above the largest gradient norm in the window
ENOUGH = 32  # steps to compare with: with fewer, the loss is not judged, and a norm only by this
START_FACTOR = 1000.0


@dataclass
class SkippedUpdates:
    """Counts the updates in a row that were skipped because the loss or the gradient was not finite."""

    in_a_row: int = 0

    def after(self, loss: float, grad_norm: float) -> str | None:
        """Why the update of this step must be skipped; None if it must not."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        what = f"the gradient is not finite (its norm is {grad_norm}"
        if not math.isfinite(loss):
            what = f"the loss is not finite (it is {loss}"
        return f"{what}): update skipped, {self.in_a_row} in a row ({MAX_SKIPPED} end the run)"

    @property
    def is_over(self) -> bool:
        """Whether too many updates in a row were skipped."""
        return self.in_a_row >= MAX_SKIPPED

    def check(self) -> None:
        """End a run that gets nowhere.

        Raises:
            NumericError: too many updates in a row were skipped.
        """
        if self.is_over:
            raise NumericError(
                f"{count(self.in_a_row, 'update')} in a row skipped, because the loss or the gradient was not finite; "
                "the state before them is saved, and earlier files are kept. Lower the learning rate; if this comes "
                "with the first steps at any rate, check the model's files"
            )


def step_names(step: Step, samples: Sequence[Sample]) -> list[str]:
    """The names of all images of a step, of every process, each once."""
    refs = (ref for micro_batch in step.micro_batches for ref in micro_batch.refs)
    return list(dict.fromkeys(samples[ref.sample].id for ref in refs))


def naming(warning: str, names: Sequence[str]) -> str:
    """The warning with the images it is about; of many, the first."""
    return f"{warning}; images: {', '.join(listed(names, MAX_NAMED))}"


def spike_memory() -> deque[float]:
    """Room for the window."""
    return deque(maxlen=WINDOW)


@dataclass
class SpikeDetector:
    """Tells when the loss or the gradient leaves, upwards, the range it has had.

    The loss of a step depends on its t and its images more than on the model: it varies tenfold, and often has several
    centres, so that medians and deviations mislead. What is new is therefore compared with the highest of the window,
    whatever the distribution:

    - the geometric mean of the last `RECENT` losses, with the highest such mean before them, by `LOSS_FACTOR`;
    - the gradient norm before clipping, with the largest before it, by `NORM_FACTOR`; in the first `ENOUGH` steps by
      `START_FACTOR`, because a learning rate that is far too high shows at once.

    One warning an episode: nothing more is said until `WINDOW` steps have passed without a spike.

    Limits: a rise by less than the factor is not seen, nor one that takes longer than the window, nor a few high losses
    with ordinary gradients, nor a loss that was too high from the first step on. Steps that are not finite are passed
    over, as they are told anyway.

    The state follows from the steps alone: fed with the same steps again, a detector says the same.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # logarithms
    means: deque[float] = field(default_factory=spike_memory)  # of `RECENT` of them
    norms: deque[float] = field(default_factory=spike_memory)  # logarithms
    quiet_until: int = 0  # step

    def after(self, step: int, loss: float, grad_norm: float) -> str | None:
        """A warning if a spike begins with this step; to be called for each step, in order."""
        if not (0 < loss < math.inf and 0 < grad_norm < math.inf):
            return None
        found = (self.norm_spike(math.log(grad_norm)), self.loss_spike(math.log(loss)))  # both are kept
        spikes = [spike for spike in found if spike is not None]
        if not spikes:
            return None
        is_new = step >= self.quiet_until
        self.quiet_until = step + WINDOW
        return f"{'; '.join(spikes)}; if it stays so, lower the learning rate" if is_new else None

    def norm_spike(self, norm: float) -> str | None:
        """Compare a logarithm of the gradient norm with those before, and keep it."""
        before = max(self.norms, default=norm)
        factor = NORM_FACTOR if len(self.norms) >= ENOUGH else START_FACTOR
        known = count(len(self.norms), "step")
        self.norms.append(norm)
        if norm - before <= math.log(factor):
            return None
        return f"the gradient norm is {math.exp(norm):.3g}, that of the {known} before at most {math.exp(before):.3g}"

    def loss_spike(self, loss: float) -> str | None:
        """Keep a logarithm of the loss, and compare the mean with those before."""
        self.losses.append(loss)
        if len(self.losses) < RECENT:
            return None
        mean = statistics.fmean(self.losses)
        before = list(self.means)[: -(RECENT - 1)]  # those without any of these losses
        self.means.append(mean)
        if len(before) < ENOUGH or mean - max(before) <= math.log(LOSS_FACTOR):
            return None
        return (
            f"the loss of the last {RECENT} steps is {math.exp(mean):.3g} on average, before at most "
            f"{math.exp(max(before)):.3g}"
        )


def replay(metrics: Path, num_steps: int) -> tuple[SkippedUpdates, SpikeDetector]:
    """What has counted and compared the first steps of a run, to go on after them; read off its metrics.jsonl."""
    skipped, spikes = SkippedUpdates(), SpikeDetector()
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if num_steps else []
    for line in lines:
        if 0 < step_of(line) <= num_steps:  # not one that a kill has cut off
            values = json.loads(line)
            skipped.after(values["loss"], values["grad_norm"])
            spikes.after(values["step"], values["loss"], values["grad_norm"])
    return skipped, spikes
