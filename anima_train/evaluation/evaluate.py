"""The evaluation: the loss of a set at fixed noise levels with fixed noise.

Two evaluations of the same weights are equal, and two checkpoints are compared on the same noise.
"""

import contextlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn

from anima_train.config.sections import Role
from anima_train.core.random import stream
from anima_train.data.loader import Batch, CachedData, read_ahead
from anima_train.data.plan import BatchSizes, batch_size_for
from anima_train.distributed.signals import Abandoned, SignalHandler
from anima_train.evaluation.base_velocities import BaseVelocity, place_name
from anima_train.evaluation.results import Drift, Evaluation
from anima_train.model.dit import MiniTrainDIT
from anima_train.objective.flow import velocity_target
from anima_train.objective.losses import Loss
from anima_train.objective.step import predict
from anima_train.objective.timesteps import Points, Timesteps
from anima_train.run.folder import DAMAGED
from anima_train.run.manifest import dataset_digest

Masking = Callable[[], AbstractContextManager[None]]
NOISE_SEED = 0  # not the run's: runs with different seeds are measured on the same noise


@dataclass(frozen=True)
class EvalSet:
    """A dataset that the loss is measured on."""

    name: str
    data: CachedData
    batch_sizes: BatchSizes
    role: Role
    points: Points
    measures_drift: bool = False

    @property
    def identity(self) -> dict[str, object]:
        """The pictures and the noise: two evaluations with the same ones can be compared."""
        return {"dataset_sha256": dataset_digest(self.data.samples), **asdict(self.points)}

    def evaluation(self, losses: Tensor, drift: Drift | None = None, masked: Tensor | None = None) -> Evaluation:
        """Return the losses of this set, (samples, noise levels), as an evaluation."""
        kinds = tuple(sample.options.kind for sample in self.data.samples)
        return Evaluation(self.name, self.role, self.points.names, kinds, losses, drift, masked)

    @property
    def places(self) -> list[str]:
        """The name of every sample at every point."""
        return [place_name(*each) for each in itertools.product(range(len(self.data.samples)), range(len(self.points)))]

    def gathered(self, found: Sequence[tuple[int, int, list[float]]], has_masked: bool) -> Evaluation:
        """Return the evaluation of (sample, point, what `measure` returns for it), of all samples and points."""
        num_values = max((len(row) for _, _, row in found), default=1)
        table = torch.full((num_values, len(self.data.samples), len(self.points)), torch.nan, dtype=torch.float64)
        for index, column, row in found:
            table[:, index, column] = torch.tensor(row, dtype=torch.float64)
        losses, *others = table.unflatten(2, (-1, self.points.repeats)).mean(dim=3)
        masked = others.pop() if has_masked and others else None
        return self.evaluation(losses, Drift(*others) if others else None, masked)

    def batches(self) -> list[tuple[int, ...]]:
        """Return batches of sample indices, bucket by bucket; every sample once."""
        buckets: dict[tuple, list[int]] = defaultdict(list)
        for index, sample in enumerate(self.data.samples):
            buckets[sample.resolution, sample.size].append(index)
        return [
            tuple(indices[start : start + width])
            for (resolution, _), indices in sorted(buckets.items())
            for width in [batch_size_for(self.batch_sizes, resolution)]
            for start in range(0, len(indices), width)
        ]


@torch.no_grad()
def evaluate(
    transformer: nn.Module,
    eval_set: EvalSet,
    loss: Loss,
    timesteps: Timesteps,
    accelerator: Accelerator,
    num_workers: int,
    stopping: SignalHandler,
    idle_pass: Callable[[], object] | None = None,
    base: BaseVelocity | None = None,
    masking: Masking | None = None,
) -> Evaluation:
    """Measure the losses of one set, of which each process takes its share of the batches.

    Nothing is left to chance: no dropout, all captions and tags in their order, nothing mirrored.

    Args:
        transformer: that is measured.
        eval_set: the set.
        loss: of a sample.
        timesteps: the distribution of t.
        accelerator: device and processes.
        num_workers: threads that make batches.
        stopping: the signals.
        idle_pass: what a process does in a round that has no batch for it: all have to take part in the passes of a
            divided model; None: nothing.
        base: the base model's velocity, where drift is measured.
        masking: `masked_ranks`, of a T-LoRA, whose loss as it is trained is measured, too.

    Raises:
        Abandoned: on all processes, as one of them is to stop.
    """
    was_training = transformer.training
    transformer.eval()
    points = eval_set.points
    batches = eval_set.batches()
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    make = partial(make_batch, eval_set.data, points, timesteps)
    found: list[tuple[int, int, list[float]]] = []
    num_passes = 1 + (masking is not None) + (0 if base is None else base.num_passes)
    made = read_ahead(itertools.product(mine, range(len(points))), make, num_threads=num_workers)
    num_rounds = math.ceil(len(batches) / accelerator.num_processes) * len(points)
    try:
        for _ in range(num_rounds):  # as many on every process, as all are asked in each
            if stopping.is_requested(accelerator):
                raise Abandoned
            point = next(made, None)
            if point is None and idle_pass is not None:
                for _ in range(num_passes):
                    idle_pass()
            if point is not None:
                indices, column, batch = point
                places = [place_name(index, column) for index in indices]
                values = measure(transformer, batch.to(accelerator.device), loss, places, base, masking)
                rows = values.T.tolist()
                found.extend((index, column, row) for index, row in zip(indices, rows, strict=True))
    finally:
        made.close()
        transformer.train(was_training)
    return eval_set.gathered(gather_object(found), masking is not None)


def measure(
    transformer: nn.Module, batch: Batch, loss: Loss, places: Sequence[str], base: BaseVelocity | None,
    masking: Masking | None,
) -> Float[Tensor, "V B"]:  # fmt: skip
    """Return the loss of each sample of a batch, float32.

    Below it come, with `base`, the parts of `Drift`; with `masking` the loss with the mask is the last.
    """
    velocity, target = predict(transformer, batch), velocity_target(batch.latents, batch.noise)
    rows = [loss(velocity, target, batch.mask)]
    if base is not None:
        before = base(batch, places, velocity)
        moved = velocity - before
        parts = (moved.square(), 2 * moved * (before - target), before.square())
        rows += [part.flatten(1).mean(dim=1) for part in parts]
    if masking is not None:
        with masking():
            rows.append(loss(predict(transformer, batch), target, batch.mask))
    return torch.stack(rows)


@contextlib.contextmanager
def masked_ranks(transformer: MiniTrainDIT) -> Iterator[None]:
    """Have the ranks of a T-LoRA fall with noise in evaluation, too, while this is open."""
    transformer.rank_mask = "always"
    try:
        yield
    finally:
        transformer.rank_mask = "training"


def masking_of(transformer: MiniTrainDIT) -> Masking | None:
    """Return the way to measure a T-LoRA as it is trained; None: nothing is masked."""
    return None if transformer.rank_mask == "none" else partial(masked_ranks, transformer)


def make_batch(
    data: CachedData, points: Points, timesteps: Timesteps, point: tuple[tuple[int, ...], int]
) -> tuple[tuple[int, ...], int, Batch]:
    """Return indices of samples and the number of a point, as they came, with the batch at it."""
    indices, column = point
    chosen = [data.samples[index] for index in indices]
    views = [sample.views()[0] for sample in chosen]
    level, repeat = divmod(column, points.repeats)
    t = [points.t(level, timesteps, sample.size.num_tokens) for sample in chosen]
    captions = [sample.evaluation_caption() for sample in chosen]
    address = (level, repeat) if repeat else (level,)  # the first noise does not depend on how many there are
    noise = [stream(NOISE_SEED, "evaluation", sample.id, *address) for sample in chosen]
    return indices, column, data.batch(views, captions, t, noise)


def base_text(results: Iterable[Evaluation], evals: Iterable[EvalSet]) -> str:
    """Return the base model's evaluations as JSON."""
    found = {
        result.name: {**eval_set.identity, "losses": result.losses.tolist()}
        for result, eval_set in zip(results, evals, strict=True)
    }
    return json.dumps(found)


def read_base(path: Path, evals: Iterable[EvalSet]) -> dict[str, Evaluation]:
    """Return the base model's evaluations of those sets that did not change since; none of a file that is damaged."""
    found = {}
    with contextlib.suppress(OSError, *DAMAGED):
        entries = json.loads(path.read_text(encoding="utf-8"))
        for eval_set in evals:
            entry, identity = entries.get(eval_set.name), json.loads(json.dumps(eval_set.identity))
            if entry and identity.items() <= entry.items():
                losses = torch.tensor(entry["losses"], dtype=torch.float64)
                if losses.dim() == 2 and len(losses) == len(eval_set.data.samples):
                    found[eval_set.name] = eval_set.evaluation(losses)
    return found
