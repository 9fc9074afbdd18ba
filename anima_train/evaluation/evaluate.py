"""The evaluation: the loss of a held-out set at fixed quantiles of t with fixed noise.

Two evaluations of the same weights are equal, and two checkpoints are compared on the same noise.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from anima_train.core.random import stream
from anima_train.data.loader import Batch, CachedData, read_ahead
from anima_train.data.plan import BatchSizes, batch_size_for
from anima_train.distributed.signals import Abandoned, SignalHandler
from anima_train.objective.losses import Loss
from anima_train.objective.step import compute_loss
from anima_train.objective.timesteps import Timesteps
from anima_train.run.manifest import dataset_digest

QUANTILES = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))  # of the distribution of t before its shift
NOISE_SEED = 0  # not the run's: runs with different seeds are measured on the same noise


@dataclass(frozen=True)
class EvalSet:
    """A dataset that the loss is measured on."""

    name: str
    data: CachedData
    batch_sizes: BatchSizes

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


@dataclass(frozen=True)
class Evaluation:
    """The losses of one set: a row per sample, a column per quantile."""

    name: str
    losses: Tensor

    def metrics(self, base: "Evaluation | None") -> dict[str, float]:
        """Return the numbers to log: the mean, the mean at each quantile, and the difference from the base model.

        The difference is paired (same samples, same noise); its standard error is over samples.
        """
        values = {f"{self.name}/loss": float(self.losses.mean())}
        for quantile, loss in zip(QUANTILES, self.losses.mean(dim=0), strict=True):
            values[f"{self.name}/loss_quantile_{quantile:.2f}"] = float(loss)
        if base is not None:
            differences = (self.losses - base.losses).mean(dim=1)
            values[f"{self.name}/difference_from_base"] = float(differences.mean())
            if len(differences) > 1:
                error = float(differences.std()) / math.sqrt(len(differences))
                values[f"{self.name}/difference_from_base_stderr"] = error
        return values


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
) -> Evaluation:
    """Measure the losses of one set, of which each process takes its share of the batches.

    Nothing is left to chance: dropout is off, captions and their tags are never dropped or shuffled, nothing is
    mirrored.

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

    Raises:
        Abandoned: on all processes, as one of them is to stop.
    """
    was_training = transformer.training
    transformer.eval()
    samples = eval_set.data.samples
    batches = eval_set.batches()
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    make = partial(make_batch, eval_set.data, timesteps)
    found: list[tuple[int, int, float]] = []
    made = read_ahead(itertools.product(mine, range(len(QUANTILES))), make, num_threads=num_workers)
    num_rounds = math.ceil(len(batches) / accelerator.num_processes) * len(QUANTILES)
    try:
        for _ in range(num_rounds):  # as many on every process, as all are asked in each
            if stopping.is_requested(accelerator):
                raise Abandoned
            point = next(made, None)
            if point is None and idle_pass is not None:
                idle_pass()
            if point is not None:
                indices, column, batch = point
                values = compute_loss(transformer, batch.to(accelerator.device), loss)
                found.extend((index, column, float(value)) for index, value in zip(indices, values.cpu(), strict=True))
    finally:
        made.close()
        transformer.train(was_training)
    losses = torch.full((len(samples), len(QUANTILES)), torch.nan, dtype=torch.float64)
    everyone: Sequence[tuple[int, int, float]] = gather_object(found)
    for index, column, value in everyone:
        losses[index, column] = value
    return Evaluation(eval_set.name, losses)


def make_batch(
    data: CachedData, timesteps: Timesteps, point: tuple[tuple[int, ...], int]
) -> tuple[tuple[int, ...], int, Batch]:
    """Return indices of samples and the column of a quantile, as they came, with the batch at it."""
    indices, column = point
    chosen = [data.samples[index] for index in indices]
    views = [sample.views()[0] for sample in chosen]
    t = [timesteps.at(QUANTILES[column], sample.size.num_tokens) for sample in chosen]
    captions = [sample.evaluation_caption() for sample in chosen]
    noise = [stream(NOISE_SEED, "evaluation", sample.id, column) for sample in chosen]
    return indices, column, data.batch(views, captions, t, noise)


def base_text(results: Iterable[Evaluation], evals: Iterable[EvalSet]) -> str:
    """Return the base model's evaluations as JSON."""
    found = {
        result.name: {"dataset_sha256": dataset_digest(eval_set.data.samples), "losses": result.losses.tolist()}
        for result, eval_set in zip(results, evals, strict=True)
    }
    return json.dumps(found)


def read_base(path: Path, evals: Iterable[EvalSet]) -> dict[str, Evaluation]:
    """Return the base model's evaluations of those sets that did not change since."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {
        eval_set.name: Evaluation(eval_set.name, torch.tensor(entry["losses"], dtype=torch.float64))
        for eval_set in evals
        if (entry := found.get(eval_set.name)) and entry["dataset_sha256"] == dataset_digest(eval_set.data.samples)
    }
