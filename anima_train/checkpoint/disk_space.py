"""What a run will write, before it does: upper bounds for all files, and the step at which the disk will be full."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from anima_train.adapters.full import Full
from anima_train.config.config import Config
from anima_train.core.device import DTYPES
from anima_train.core.files import BLOCK, DiskRequirement, free_bytes, on_disk, require_space
from anima_train.core.format import format_bytes
from anima_train.data.plan import EpochSchedule
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import file_bytes
from anima_train.optim.groups import LearningRates, optimizer_groups
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.run.intervals import Due
from anima_train.sampling.generate import Request

METADATA = 2048  # bytes of what saved weights say about themselves, at most
MANIFEST = 6 * BLOCK  # bytes of a state's folder and `state.json`, which holds the configuration
NUMBERS = 1024  # bytes of metrics.jsonl for a step, at most, and of each tracker's file
MIN_KEEP_LAST = 2  # as the configuration allows
PICTURE_FACTS = 4096  # bytes of a picture's file beside its pixels


What = Literal["weights", "training state", "previews"]


@dataclass(frozen=True)
class FileSizes:
    """Bytes on disk of what a run writes again and again, at most."""

    weights: int
    state: int
    pictures: int  # all previews of a step
    numbers: int  # of a step


def file_sizes(config: Config, transformer: MiniTrainDIT, files: ModelFiles) -> FileSizes:
    """What a run's files will take.

    Args:
        config: of the run.
        transformer: with what is trained attached, on any device.
        files: of the model.
    """
    rates = config.learning_rates()
    trained = {name: unfilled(each) for name, each in transformer.named_parameters() if each.requires_grad}
    moments = optimizer_state(config.optimizer, trained, rates)
    average = [{name: unfilled(each, torch.float32) for name, each in trained.items()}] if config.ema else []
    num_trackers = config.monitoring.tensorboard + config.monitoring.enable_wandb
    pictures = 0 if config.sampling is None else sum(map(picture_bytes, config.sampling.prompts))
    return FileSizes(
        weights=on_disk(file_bytes(saved_weights(config, transformer, files), {}) + METADATA),
        state=state_bytes(trained, moments, *average),
        pictures=pictures * (1 + num_trackers),
        numbers=NUMBERS * (1 + num_trackers),
    )


def unfilled(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape, and of the same dtype where no other is given, that takes no memory."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")


def saved_weights(config: Config, transformer: MiniTrainDIT, files: ModelFiles) -> dict[str, Tensor]:
    """The names, shapes and dtypes of the weights that users load elsewhere."""
    tensors = config.adapter.tensors(transformer)
    if isinstance(config.adapter, Full) and config.learning_rates().by_component["llm_adapter"] == 0:
        entries = files.llm_adapter_header.entries
        shapes = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in entries.items()}
        tensors |= config.adapter.outside({LLM_ADAPTER_PREFIX + name: tensor for name, tensor in shapes.items()})
    dtype = None if config.save_dtype is None else DTYPES[config.save_dtype]
    return {name: unfilled(tensor, dtype) for name, tensor in tensors.items()}


def optimizer_state(settings: AnyOptimizer, trained: Mapping[str, Tensor], rates: LearningRates) -> dict[str, Tensor]:
    """What the optimizer keeps for these parameters, as `PARAMETER.NAME`: that of a step on the meta device.

    Of parameters of one group, shape and dtype, of which a LoRA has hundreds, one makes the step for all.
    """
    parameters = {name: nn.Parameter(unfilled(tensor)) for name, tensor in trained.items()}
    optimizer = settings.build(optimizer_groups(parameters.items(), rates, settings.weight_decay))
    first: dict[tuple[int, torch.Size, torch.dtype], nn.Parameter] = {}
    first_of: dict[nn.Parameter, nn.Parameter] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            first_of[parameter] = first.setdefault((number, parameter.shape, parameter.dtype), parameter)
    for parameter in first.values():
        parameter.grad = unfilled(parameter)
    optimizer.step()
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[first_of[parameter]].items()
    }


def state_bytes(*files: Mapping[str, Tensor]) -> int:
    """What a training state with these tensors in its files takes of the disk."""
    return sum(on_disk(file_bytes(tensors, {})) for tensors in files) + MANIFEST


def picture_bytes(request: Request) -> int:
    """A picture's file, at most: pixels that cannot be compressed."""
    return on_disk(request.height * (3 * request.width + 1) * 1001 // 1000 + PICTURE_FACTS)


def require_room(path: Path, *files: Mapping[str, Tensor]) -> None:
    """Refuse to begin a training state that the disk has no room for.

    Args:
        path: of the state.
        files: the tensors of each of its files.

    Raises:
        SpaceError: the bytes needed, free and missing; nothing is written.
    """
    require_space(
        [DiskRequirement(path.parent, state_bytes(*files), f"the training state {path.name}")],
        "free some space, then go on with --resume; earlier files are intact",
    )


def saves_states(config: Config) -> bool:
    """Whether training states are saved without being asked for."""
    return bool(
        config.checkpoint_every_n_epochs or config.checkpoint_every_n_steps or config.checkpoint_every_n_minutes
    )


def first_needs(folder: Path, config: Config, sizes: FileSizes) -> list[DiskRequirement]:
    """Without room for these there is no use in beginning a run."""
    needs = [DiskRequirement(folder, sizes.weights, "the first saved weights")]
    if saves_states(config):
        needs.append(DiskRequirement(folder, sizes.state, "one training state"))
    return needs


@dataclass(frozen=True)
class Writing:
    """Bytes that are written after a step, and stay."""

    step: int
    num_bytes: int
    what: What


@dataclass(frozen=True)
class Writings:
    """All that a run will write and keep, in order."""

    folder: Path
    files: list[Writing]
    numbers: int  # bytes of a step
    start: int  # steps that are done
    num_steps: int

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return sum(each.num_bytes for each in self.files) + self.numbers * (self.num_steps - self.start)

    def full_at(self, free: float) -> Writing | None:
        """The first of the files that a disk has no room for, with the numbers of the steps before it."""
        total = 0
        for writing in self.files:
            total += writing.num_bytes
            if total + self.numbers * (writing.step - self.start) > free:
                return writing
        return None

    def described(self) -> str:
        """How much of each kind."""
        parts = []
        for what in get_args(What):
            if sizes := [each.num_bytes for each in self.files if each.what == what]:
                parts.append(f"{len(sizes):,} x {what} ({format_bytes(sum(sizes))})")
        return f"{', '.join(parts)}, numbers ({format_bytes(self.numbers * (self.num_steps - self.start))})"


def writings(
    folder: Path, config: Config, sizes: FileSizes, timetable: EpochSchedule, images_per_epoch: float, start: int = 0,
    num_states: int = 0,
) -> Writings:  # fmt: skip
    """What a run will write and keep, reports left out, and whatever is saved as minutes pass or somebody asks.

    Args:
        folder: of the run.
        config: of the run.
        sizes: of its files.
        timetable: of its steps.
        images_per_epoch: on average.
        start: how many steps are done.
        num_states: how many training states are there.
    """

    def steps_of(due: Due) -> Iterator[int]:
        step = due.following(start, timetable)
        while step is not None:
            yield step
            step = due.following(step, timetable)

    files: list[Writing] = []
    if (sampling := config.sampling) is not None:
        drawn = list(steps_of(Due(sampling.every_n_epochs, sampling.every_n_steps)))
        if sampling.before_first_step and start == 0:
            drawn.append(0)
        files += [Writing(step, sizes.pictures, "previews") for step in drawn]

    saves = {timetable.num_steps, *steps_of(Due(config.save_every_n_epochs, config.save_every_n_steps))}
    if config.save_every_n_examples is not None:
        images_per_step = images_per_epoch * (len(timetable.epoch_starts) - 1) / timetable.epoch_starts[-1]
        saves.update(steps_of(Due(steps=max(1, int(config.save_every_n_examples / images_per_step)))))
    files += [Writing(step, sizes.weights, "weights") for step in saves]

    # The newest states and the best are kept, and one more is there while it is written.
    num_new = max(1, config.keep_last + bool(config.eval_datasets) + 1 - num_states)
    states = steps_of(Due(config.checkpoint_every_n_epochs, config.checkpoint_every_n_steps))
    if config.checkpoint_every_n_minutes is not None:
        states = iter([start + 1] * num_new)  # nobody knows when; the disk needs room for them from the beginning
    files += [Writing(step, sizes.state, "training state") for step in islice(states, num_new)]

    ordered = sorted(files, key=lambda writing: writing.step)
    return Writings(folder, ordered, sizes.numbers, start, timetable.num_steps)


def space_warning(planned: Writings, config: Config) -> str | None:
    """What to change where a disk will not hold all that a run will write; None where it will."""
    free = free_bytes(planned.folder)
    if (last := planned.full_at(free)) is None:
        return None
    kinds = Counter(each.what for each in planned.files)
    changes = ["free some space"]
    if kinds["weights"] > 1:
        changes.append("save weights less often (save_every_n_...)")
    if kinds["training state"] and config.keep_last > MIN_KEEP_LAST:
        changes.append(f"keep_last below {config.keep_last}")
    if kinds["previews"] > 1:
        changes.append("draw previews less often")
    return (
        f"{planned.folder}: the disk will be full at step {last.step:,} of {planned.num_steps:,}, with its "
        f"{last.what}: {planned.described()} need {format_bytes(planned.num_bytes)}, {format_bytes(free)} free, "
        f"{format_bytes(planned.num_bytes - free)} missing; "
        f"{', '.join([*changes, 'or set another output_dir'])}"
    )
