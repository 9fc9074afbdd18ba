"""Numbers that are wrong: updates that are not finite are skipped, and a spike of the gradient norm is a warning."""

import contextlib
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from anima_train.core.errors import NumericError
from anima_train.core.format import Listing, count, listed
from anima_train.data.plan import Step
from anima_train.data.samples import Sample
from anima_train.run.folder import DAMAGED, kept_lines

MAX_SKIPPED = 10  # updates in a row; the run ends with the last of them
MAX_NAMED = 8  # images in one warning

WINDOW = 100  # steps that a gradient norm is compared with; also how long nothing more is said after a warning
SPIKE_FACTOR = 10.0  # above the largest of them
ENOUGH = 32  # steps to compare with: with fewer a norm is judged only by this
START_FACTOR = 1000.0


@dataclass
class SkippedUpdates:
    """The number of updates in a row that were skipped because the loss or the gradient was not finite."""

    in_a_row: int = 0

    def after(self, loss: float, grad_norm: float) -> str | None:
        """Count a step; return why its update must be skipped, or None if it must not."""
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
        """True if too many updates in a row were skipped."""
        return self.in_a_row >= MAX_SKIPPED

    def check(self, is_saved: bool = True) -> None:
        """Raise NumericError if too many updates in a row were skipped.

        Args:
            is_saved: True if the state before them is.
        """
        if self.is_over:
            saved = "the state before them is saved, and earlier files are kept"
            if not is_saved:
                saved = "no state is saved, as with gradient_release they may be half made; earlier files are kept"
            raise NumericError(
                f"{count(self.in_a_row, 'update')} in a row skipped, because the loss or the gradient was not finite; "
                f"{saved}. Lower the learning rate; if this comes with the first steps at any rate, check the model's "
                "files"
            )


class UpdateGuard:
    """Decides on the device which updates are skipped, long before `SkippedUpdates` hears of it on the host.

    After `MAX_SKIPPED` in a row it skips all: when the host ends the run, nothing has changed since the first of them.

    Args:
        device: that trains.
        in_a_row: updates that were skipped last.
    """

    def __init__(self, device: torch.device, in_a_row: int) -> None:
        self.in_a_row = torch.full((), in_a_row, device=device)

    def must_skip(self, loss: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return True if the update of a step is to be skipped whatever its gradient is."""
        return ~loss.isfinite() | (self.in_a_row >= MAX_SKIPPED)

    def skips(self, loss: Float[Tensor, ""], grad_norm: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return True if the update of a step is to be skipped; to be called for each, in order."""
        is_wrong = ~grad_norm.isfinite() | self.must_skip(loss)
        self.in_a_row = torch.where(is_wrong, self.in_a_row + 1, 0)
        return is_wrong


def step_names(step: Step, samples: Sequence[Sample]) -> list[str]:
    """Return the names of all images of a step, of every process, each once."""
    draws = (draw for micro_batch in step.micro_batches for draw in micro_batch.refs)
    return list(dict.fromkeys(samples[draw.sample].id for draw in draws))


def naming(warning: str, names: Sequence[str]) -> Listing:
    """Return the warning with the names of the images it is about; its text names the first of many."""
    return Listing(f"{warning}; images: {', '.join(listed(names, MAX_NAMED))}", names, num_shown=0)


@dataclass
class SpikeDetector:
    """Warns when the gradient norm before clipping leaves, upwards, the range it has had.

    A spike is a norm over `SPIKE_FACTOR` times the largest of the last `WINDOW`; with fewer than `ENOUGH` of them, over
    `START_FACTOR` times, because a learning rate that is far too high shows at once. Not the median: t and the images
    change the norm more than the model does, and ordinary runs have steps over ten times the median. After a warning
    there is none for `WINDOW` steps. Norms that are not finite are passed over: `SkippedUpdates` tells of them.

    The state follows from the steps alone: fed with the same steps again, a detector warns of the same.
    """

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    quiet_until: int = 0  # step

    def after(self, step: int, grad_norm: float) -> str | None:
        """Return a warning if this step is a spike and none was warned of lately; to be called for each, in order."""
        if not 0 < grad_norm < math.inf:
            return None
        num_known, largest = len(self.norms), max(self.norms, default=grad_norm)
        self.norms.append(grad_norm)
        factor = SPIKE_FACTOR if num_known >= ENOUGH else START_FACTOR
        if grad_norm <= factor * largest or step < self.quiet_until:
            return None
        self.quiet_until = step + WINDOW
        return (
            f"the gradient norm is {grad_norm:.3g}, that of the {count(num_known, 'step')} before at most "
            f"{largest:.3g}; if it stays so, lower the learning rate"
        )


def replay(metrics: Path, num_steps: int) -> tuple[SkippedUpdates, SpikeDetector]:
    """Return the count and the detector as they were after the first steps of a run, read off its metrics.jsonl.

    Lines that are missing or damaged, which the run's start tells of, are passed over.
    """
    skipped, spikes = SkippedUpdates(), SpikeDetector()
    for line in kept_lines(metrics, num_steps, ()) if metrics.exists() else ():
        with contextlib.suppress(*DAMAGED):
            values = json.loads(line)
            step, loss, grad_norm = int(values["step"]), float(values["loss"]), float(values["grad_norm"])
            skipped.after(loss, grad_norm)
            spikes.after(step, grad_norm)
    return skipped, spikes
