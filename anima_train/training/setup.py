"""A run before its first step: its plan, its model in training, its previews, and whether the memory holds it."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from anima_train.adapters.full import Full
from anima_train.adapters.initial import InitialLora
from anima_train.adapters.update_norms import UpdateNorms
from anima_train.caching.text_encoding import encodes_online
from anima_train.checkpoint.training_state import trained_parameters
from anima_train.config.memory_advice import memory_suggestions
from anima_train.config.plan_notes import plan_notes, plan_warnings
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.distributed.collectives import broadcast_from_main, patient_barrier
from anima_train.distributed.consistency import check_same_plan
from anima_train.evaluation.previews import Previews
from anima_train.model.attention import folds_exactly
from anima_train.model.attention_choice import AttentionChoice, AttentionShape, choose_attention
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.loading import ModelSpec
from anima_train.optim.ema import WeightAverage
from anima_train.optim.groups import group_rows, optimizer_groups
from anima_train.optim.lr_schedules import lr_factor
from anima_train.optim.moved import MovedShare
from anima_train.optim.release import GradientRelease
from anima_train.optim.schedule_free import averages_in_place
from anima_train.training.anomalies import SkippedUpdates, SpikeDetector
from anima_train.training.base_passes import BasePasses
from anima_train.training.build import (
    begins_with_lora,
    block_runner,
    build_optimizer,
    initial_lora,
    load_trained,
    plan_run,
    swap_text,
)  # fmt: skip
from anima_train.training.context import RunContext
from anima_train.training.divided import divide
from anima_train.training.memory import MicroBatchShape, memory_errors
from anima_train.training.memory_check import largest_shapes
from anima_train.training.prepare import Prepared
from anima_train.training.summary import groups_text, plan_text, selection_text

if TYPE_CHECKING:
    from anima_train.model.sharding import Shards  # takes long to import

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """A transformer in training, and how far it is."""

    transformer: MiniTrainDIT
    model: nn.Module  # the same, as the device and the processes need it
    optimizer: Optimizer
    ema: WeightAverage | None
    lr_factor: Callable[[int], float]  # on every group's base rate, of a step, 0 the first
    shards: "Shards | None" = None  # what this process holds of a divided transformer
    step: int = 0  # optimizer steps that are done
    samples_seen: int = 0  # in them
    release: GradientRelease | None = None  # where the update is a part of the backward pass
    base_passes: BasePasses | None = None  # where samples keep the base
    norms: UpdateNorms | None = None  # of what is added to the base weights; where there are evaluations or previews
    skipped: SkippedUpdates = field(default_factory=SkippedUpdates)
    spikes: SpikeDetector = field(default_factory=SpikeDetector)

    def __post_init__(self) -> None:
        # Of the weights before the first step, also where a run is resumed.
        self.moved = MovedShare(self.optimizer, self.transformer.block_swap)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that get updates, in the optimizer's order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def update_norms(self) -> dict[str, float]:
        """Return the norms of what was added to the base weights; empty where they are not measured."""
        return {} if self.norms is None else self.norms.metrics()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the weights are those to look at and to save: with [ema], their average.

        A schedule-free optimizer has an average of its own.
        """
        return averages_in_place(self.optimizer) if self.ema is None else self.ema.in_place()

    def set_rates(self, step: int) -> None:
        """Give the optimizer the learning rates of a step, and its number."""
        factor = self.lr_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            group["step_index"] = step


def build_plan(run: RunContext, data: Prepared) -> tuple[Plan, EpochSchedule]:
    """Plan the run's batches, the same ones on all processes, and tell about them.

    Raises:
        DataError: the processes are about to train on different things.
    """
    plan, schedule = plan_run(run.config, data.train.samples, run.accelerator.num_processes)
    run.resume_point.check_length("epochs", schedule.num_steps)
    check_same_plan(data.train, plan, schedule.num_steps, run.accelerator)
    for line in plan_text(plan, schedule, run.config.epochs, run.config.ema, data.train.preservation):
        logger.info("%s", line)
    evals = {each.name: each.data.samples for each in data.evals}
    for warning in plan_warnings(run.config, plan.samples, schedule.num_steps):
        logger.warning("%s", warning)
    for note in plan_notes(run.config, data.spec, plan, schedule, evals):
        logger.info("note: %s", note)
    return plan, schedule


def watch_memory(
    run: RunContext, data: Prepared, plan: Plan, schedule: EpochSchedule
) -> tuple[list[MicroBatchShape], bool]:
    """Report memory that runs out from here on with what to change.

    Returns:
        The largest micro-batches to come, and True if captions are encoded on the device during training.
    """
    config = run.config
    shapes = largest_shapes(plan, len(schedule.epoch_starts) - 1, data.evals)
    is_online = encodes_online(config.model.cache_text_embeddings, data.train.samples)
    encodes_here = is_online and data.spec.text_device.type != "cpu"

    def suggestions(tried: MicroBatchShape | None) -> list[str]:
        shape, now = tried or shapes[0], run.memory.config or config
        return memory_suggestions(now, shape.resolution, shape.batch_size, encodes_here, shape.is_evaluation)

    run.stack.enter_context(memory_errors(run.device, run.memory, suggestions))
    return shapes, encodes_here


def use_attention(run: RunContext, spec: ModelSpec, shape: MicroBatchShape) -> AttentionChoice:
    """Choose the kernel of attention for the largest micro-batches, and use it until the run ends.

    All processes take the main one's choice.

    Raises:
        ConfigError: the configuration asks for one that does not work here.
    """
    attention = AttentionShape.of(spec.files, shape.batch_size, shape.size.num_tokens)
    choice = broadcast_from_main(
        run.accelerator, partial(choose_attention, run.config.attention, run.device, spec.dtype, attention)
    )
    logger.info("%s", choice)
    run.stack.enter_context(choice.in_use(run.device))
    return choice


def counts_zeros(attention: str, spec: ModelSpec) -> bool:
    """Return True if the text's rows of zeros may be counted: on a GPU by FlashAttention, if that is exact there.

    Args:
        attention: that the configuration asks for.
        spec: the model.
    """
    if spec.device.type != "cuda" or spec.dtype.itemsize > 2:
        return True
    if attention not in ("auto", "flash"):
        return False  # the kernel asked for does not tell the log-sum-exp
    if folds_exactly(spec.device, spec.dtype, TransformerShape.of(spec.files.transformer_header.entries).head_dim):
        return True
    logger.warning("the text's rows of zeros are computed, and steps are slower: FlashAttention cannot count them here")
    return False


def encode_previews(run: RunContext, spec: ModelSpec) -> Previews | None:
    """Return the run's previews, their prompts encoded; None on processes that draw none."""
    sampling = run.config.sampling
    if sampling is None or not run.is_main:
        return None
    folder, offline = run.folder, run.config.offline
    return Previews.of(sampling.prompts, spec, folder.path / "samples", folder.name, sampling.judge, offline)


def lora_to_begin_with(run: RunContext, spec: ModelSpec) -> InitialLora | None:
    """Return the LoRA that the configuration begins with, and tell; None if there is none, or the run has a state."""
    if run.resume_point.saved is not None:
        if begins_with_lora(run.config.adapter):
            logger.info("adapter.init_from_existing: not read again, as the weights come from the training state")
        return None
    initial = initial_lora(run.config.adapter, spec, run.config.learning_rates())
    if initial is None:
        return None
    for line in initial.lines:
        logger.info("%s", line)
    for warning in initial.warnings:
        logger.warning("%s", warning)
    return initial


def build_model(run: RunContext, spec: ModelSpec, num_steps: int, initial: InitialLora | None = None) -> TrainState:
    """Load the transformer with what is trained attached, and make its optimizer, average and schedule.

    Args:
        run: the run.
        spec: its model.
        num_steps: of the run.
        initial: the LoRA that it begins with.

    Raises:
        ConfigError: nothing is trained.
    """
    config = run.config
    rates = config.learning_rates()
    run_block = block_runner(config.recompute, config.compile, spec.device, config.checkpointed_blocks)
    transformer, groups = load_trained(
        spec, config.adapter, rates, config.seed, config.optimizer.weight_decay, run_block, config.blocks_to_swap
    )
    for line in (*groups_text(group_rows(transformer, rates)), *selection_text(config.adapter, transformer)):
        logger.info("%s", line)
    if initial is not None:
        initial.load(transformer)
    patient_barrier(run.accelerator)  # one process has encoded prompts, each has read the model
    shards = None
    if run.divides:
        shards = divide(run, transformer, spec.dtype if config.model.uses_autocast else None)
        groups = optimizer_groups(shards.parameters.items(), rates, config.optimizer.weight_decay)
    optimizer, release = build_optimizer(config.optimizer, groups, config.seed, transformer.block_swap)
    if transformer.block_swap is not None:
        logger.info("%s", swap_text(transformer.block_swap, config.gradient_accumulation_steps, spec.device))
    # It is on its device, and its swapped blocks are not to be.
    model = run.accelerator.prepare(transformer, device_placement=[False]) if shards is None else transformer
    trained = trained_parameters(transformer) if shards is None else shards.parameters
    ema = None if config.ema is None else WeightAverage(trained, config.ema)

    def factor(step: int) -> float:
        if config.force_constant_lr is not None:
            return 1.0
        return lr_factor(config.lr_scheduler, step, num_steps, config.warmup_steps)

    passes = None
    if run.loaded.preservation is not None:
        assert not isinstance(config.adapter, Full)
        # Without what exchanges gradients, but with autocast.
        plain = run.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        passes = BasePasses(plain, partial(config.adapter.as_base, transformer), run.device)
    norms = UpdateNorms(transformer) if config.eval_datasets or config.sampling is not None else None
    return TrainState(
        transformer, model, optimizer, ema, factor, shards, release=release, base_passes=passes, norms=norms
    )
