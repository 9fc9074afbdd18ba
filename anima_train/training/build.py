"""The plan, the model and the files of a run, made from its configuration."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from anima_train.adapters.choice import AnyAdapter
from anima_train.adapters.full import Full
from anima_train.adapters.initial import InitialLora, read_initial
from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.read import linear_shapes
from anima_train.checkpoint.disk_space import DiskPlan, FileSizes, first_state_bytes, picture_bytes, weights_bytes
from anima_train.checkpoint.samples import records_bytes
from anima_train.checkpoint.training_state import trained_parameters
from anima_train.checkpoint.weights import weights_to_save
from anima_train.config.config import Config
from anima_train.config.sections import Sampling
from anima_train.core.device import DTYPES
from anima_train.core.errors import ConfigError
from anima_train.core.files import on_disk
from anima_train.core.format import count, format_bytes
from anima_train.data.plan import EpochSchedule, Plan, times_seen
from anima_train.data.samples import Sample
from anima_train.evaluation.strengths import strengths_to_try
from anima_train.model.block_swap import BlockSwap, copied_blocks
from anima_train.model.dit import MiniTrainDIT, RunBlock, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.loading import ModelSpec, load_transformer
from anima_train.model.recompute import Recompute, mixed, offloading, runner
from anima_train.optim.groups import LearningRates, optimizer_groups
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.optim.release import GradientRelease
from anima_train.optim.split import SplitOptimizer
from anima_train.run.intervals import Interval
from anima_train.sampling.judges import load_judges
from anima_train.sampling.names import SCORE

logger = logging.getLogger(__name__)


def plan_run(config: Config, samples: Sequence[Sample], num_processes: int) -> tuple[Plan, EpochSchedule]:
    """Return the plan of the run's batches, and its schedule of epochs.

    Raises:
        ConfigError: the run would have no step, or no previews to decide by.
    """
    num_micro_batches = config.gradient_accumulation_steps * num_processes
    plan = Plan(samples, config.seed, config.micro_batch_size_per_gpu, num_micro_batches)
    schedule = EpochSchedule.of(plan, config.epochs, config.max_steps)
    rule = config.early_stopping
    if config.keep_best == SCORE or (rule is not None and rule.metric == SCORE):
        is_bound = config.keep_best == SCORE and config.forgetting_budget is not None
        check_previews(all_intervals(config), schedule, is_bound)
    return plan, schedule


def check_previews(intervals: Mapping[str, Interval], schedule: EpochSchedule, is_bound: bool) -> None:
    """Refuse to decide by the score of previews where none can.

    Args:
        intervals: as `all_intervals` returns them.
        schedule: of the epochs.
        is_bound: True if the best one has to be within a budget, which an evaluation of the same step tells.

    Raises:
        ConfigError: there are none, or none of a step that is evaluated.
    """
    drawn, evaluation = set(intervals["preview"].all_steps(schedule)), intervals["evaluation"]
    if not drawn:
        raise ConfigError(
            f"sampling: the run has {count(schedule.num_steps, 'step')}, and ends before the first previews, whose "
            f'"{SCORE}" is to decide; draw them more often, with every_n_steps'
        )
    if is_bound and evaluation.examples is None and drawn.isdisjoint(evaluation.all_steps(schedule)):
        raise ConfigError(
            f'keep_best: "{SCORE}" within forgetting_budget needs previews and an evaluation after the same step, and '
            "there is no such step; set eval_every_n_steps and sampling.every_n_steps to the same number"
        )


def check_compiler(compiles: bool | None, device: torch.device) -> None:
    """Refuse to compile the blocks where there is no compiler.

    Args:
        compiles: the setting `compile`.
        device: of the transformer.

    Raises:
        ConfigError: it is true, and there is none.
    """
    if not compiles:
        return
    from anima_train.model.compiled import missing_compiler  # takes long to import

    if (missing := missing_compiler(device)) is not None:
        raise ConfigError(f"compile: {missing}; install it, or set compile = false")


def check_judge(sampling: Sampling | None, offline: bool) -> None:
    """Load the judge of previews, and let it go: one that cannot be loaded is known before anything is done.

    Raises:
        ConfigError: it cannot.
    """
    if sampling is not None and sampling.judge is not None:
        load_judges([sampling.judge], offline)


def check_blocks(
    blocks_to_swap: int, checkpointed_blocks: int, adapter: AnyAdapter, spec: ModelSpec, num_processes: int
) -> None:
    """Refuse numbers of blocks that are not there, and to swap those that several processes would train.

    Raises:
        ConfigError: there are fewer blocks, or the whole model is trained by several processes.
    """
    num_blocks = TransformerShape.of(spec.files.transformer_header.entries).num_blocks
    for key, number in (("blocks_to_swap", blocks_to_swap), ("checkpointed_blocks", checkpointed_blocks)):
        if number > num_blocks:
            raise ConfigError(
                f"{key}: found {number}, and the transformer has {num_blocks} blocks; write {num_blocks} or less"
            )
    if blocks_to_swap and isinstance(adapter, Full) and num_processes > 1:
        raise ConfigError(
            f"blocks_to_swap: found {blocks_to_swap} in a full fine-tune by {num_processes} processes, whose weights "
            "have to stay where they are exchanged; set it to 0, or train a LoRA"
        )


def swap_text(swap: BlockSwap, num_micro_batches: int, device: torch.device) -> str:
    """Return a line about the price of swapping blocks.

    Args:
        swap: the swapped blocks.
        num_micro_batches: of a step of this process.
        device: that trains.
    """
    number = len(swap.hosts)
    num_bytes = (
        copied_blocks(number, num_micro_batches, swap.trains, swap.changes_in_backward) * swap.host_bytes // number
    )
    text = (
        f"blocks_to_swap: the weights of {number} blocks wait in {format_bytes(swap.host_bytes)} of the host's memory; "
        f"a step copies {format_bytes(num_bytes)} between host and device"
    )
    return f"{text}; on a CPU that saves nothing, and costs time" if device.type == "cpu" else text


def check_release(releases: bool, num_processes: int) -> None:
    """Refuse updates in the backward pass where several processes have to add up their gradients first.

    Args:
        releases: the setting `gradient_release`.
        num_processes: of the run.

    Raises:
        ConfigError: both.
    """
    if releases and num_processes > 1:
        raise ConfigError(
            f"optimizer.gradient_release: excludes several processes (there are {num_processes}), whose gradients are "
            "added up only after the backward pass; run one process, or remove it"
        )


def block_runner(
    recompute: Recompute, compiles: bool | None, device: torch.device, checkpointed_blocks: int = 0
) -> RunBlock:
    """Return the way to run the blocks in training.

    Args:
        recompute: the activations that are not kept.
        compiles: None: on CUDA, where a compiler is there; else a warning says what is missing.
        device: of the transformer.
        checkpointed_blocks: number of the first blocks that keep their input alone.

    Raises:
        ConfigError: `compile` is true, and there is no compiler.
    """
    check_compiler(compiles, device)
    first, run = runner("blocks"), runner(recompute)
    if compiles or (compiles is None and device.type == "cuda"):
        first, run = compiled(first, run, device)
    if recompute == "offload":
        run = offloading(run)
    return mixed(first, run, checkpointed_blocks) if checkpointed_blocks else run


def compiled(first: RunBlock, others: RunBlock, device: torch.device) -> tuple[RunBlock, RunBlock]:
    """Return these ways to run blocks compiled, or as they are, with a warning, where there is no compiler."""
    from anima_train.model.compiled import CompiledBlocks, missing_compiler  # takes long to import

    if (missing := missing_compiler(device)) is None:
        run = CompiledBlocks(others)
        return CompiledBlocks(first, beside=run), run
    logger.warning("the blocks are not compiled, and run slower: %s; compile = false is without this warning", missing)
    return first, others


def trainable_transformer(spec: ModelSpec, adapter: AnyAdapter, rates: LearningRates, seed: int) -> MiniTrainDIT:
    """Return the transformer with what is trained attached, on the meta device: names, shapes, dtypes, no memory."""
    with torch.device("meta"):
        transformer = MiniTrainDIT(TransformerShape.of(spec.files.transformer_header.entries))
        if spec.trains_llm_adapter:
            transformer.llm_adapter = LLMAdapter(LLMAdapterShape.of(spec.files.llm_adapter_header.entries))
    transformer.to(spec.weights_dtype)
    adapter.attach(transformer, rates, seed)
    return transformer


def begins_with_lora(adapter: AnyAdapter) -> bool:
    """Return True if the weights before the first step are not those that the seed gives."""
    return isinstance(adapter, Lora) and adapter.init_from_existing is not None


def initial_lora(adapter: AnyAdapter, spec: ModelSpec, rates: LearningRates) -> InitialLora | None:
    """Return the LoRA that the configuration begins with; None if there is none.

    Raises:
        ConfigError: it does not fit into the run's.
        ModelFileError: it cannot be read, or is of another model.
    """
    if not isinstance(adapter, Lora) or adapter.init_from_existing is None:
        return None
    transformer = trainable_transformer(spec, adapter, rates, seed=0)
    trained = [name for name, _ in lora_layers(transformer)]
    shapes, family = linear_shapes(spec.files), spec.files.FAMILY
    return read_initial(Path(adapter.init_from_existing), shapes, trained, adapter, family)


def load_trained(
    spec: ModelSpec, adapter: AnyAdapter, rates: LearningRates, seed: int, weight_decay: float, run_block: RunBlock,
    blocks_to_swap: int = 0,
) -> tuple[MiniTrainDIT, list[dict[str, Any]]]:  # fmt: skip
    """Return the transformer on its device with what is trained attached, ready for steps, and its parameter groups.

    Raises:
        ConfigError: nothing is trained.
    """
    transformer = load_transformer(
        spec.files, spec.trains_llm_adapter, spec.weights_dtype, spec.device, spec.quantization, blocks_to_swap
    )
    if blocks_to_swap:
        swap = transformer.block_swap = BlockSwap(transformer, blocks_to_swap, spec.device)
        run_block = swap.around(run_block)
    adapter.attach(transformer, rates, seed)
    transformer.batch_modulations()
    transformer.run_block = run_block
    transformer.train()
    groups = optimizer_groups(transformer.named_parameters(), rates, weight_decay)
    if not groups:
        raise ConfigError("nothing is trained: every component that this model has is frozen")
    return transformer, groups


def build_optimizer(
    settings: AnyOptimizer, groups: list[dict[str, Any]], seed: int, swap: BlockSwap | None = None
) -> tuple[Optimizer, GradientRelease | None]:
    """Return the optimizer of these groups, and what makes its updates in the backward pass where that is wished.

    Args:
        settings: of the optimizer.
        groups: of the parameters.
        seed: of stochastic rounding.
        swap: the swapped blocks, if there are any: what is updated in the backward pass is copied back.
    """
    optimizer = settings.build(groups, seed)
    if settings.releases_gradients and isinstance(optimizer, SplitOptimizer):
        if swap is not None:
            swap.changes_in_backward = swap.trains
        return optimizer, GradientRelease(optimizer)
    return optimizer, None


def file_sizes(config: Config, spec: ModelSpec, samples: Sequence[Sample] = ()) -> FileSizes:
    """Return the bytes on disk of the files that a run on these samples writes, at most."""
    transformer = trainable_transformer(spec, config.adapter, config.learning_rates(), config.seed)
    dtype = None if config.save_dtype is None else DTYPES[config.save_dtype]
    num_trackers = config.monitoring.tensorboard + config.monitoring.enable_wandb
    prompts = () if config.sampling is None else config.sampling.prompts
    return FileSizes(
        weights_bytes(weights_to_save(config.adapter, transformer, spec.files, dtype)),
        first_state_bytes(
            trained_parameters(transformer), config.optimizer, config.ema is not None, begins_with_lora(config.adapter)
        )
        + on_disk(records_bytes(samples)),
        sum(map(picture_bytes, prompts)) * (1 + num_trackers),
    )


def all_intervals(config: Config, now: float = 0.0) -> dict[str, Interval]:
    """Return when each task is due, by its name; minutes are counted from `now`."""
    sampling = config.sampling
    return {
        "evaluation": Interval(config.eval_every_n_epochs, config.eval_every_n_steps, config.eval_every_n_examples),
        "preview": Interval() if sampling is None else Interval(sampling.every_n_epochs, sampling.every_n_steps),
        "save": Interval(
            config.save_every_n_epochs, config.save_every_n_steps, config.save_every_n_examples,
            config.save_every_n_minutes, now,
        ),
        "training state": Interval(
            config.checkpoint_every_n_epochs, config.checkpoint_every_n_steps, None,
            config.checkpoint_every_n_minutes, now,
        ),
    }  # fmt: skip


def disk_plan(
    config: Config, folder: Path, sizes: FileSizes, plan: Plan, schedule: EpochSchedule, start: int = 0,
    num_states: int = 0, base_velocities: int = 0,
) -> DiskPlan:  # fmt: skip
    """Return what a run will write after its first `start` steps.

    Args:
        config: of the run.
        folder: of the run.
        sizes: of its files.
        plan: of its batches.
        schedule: of its epochs.
        start: number of steps that are made.
        num_states: training states that are there.
        base_velocities: bytes of what it keeps of the base model before the first step.
    """
    end = schedule.num_steps
    passed = (
        range(start, end),
        range(schedule.locate(start)[0], schedule.locate(end)[0]),
        range(*(sum(times_seen(plan, schedule, step)) for step in (start, end))),
    )
    times = {name: interval.count(*passed) for name, interval in all_intervals(config).items()}
    # The newest states and the best are kept, and one more is there while it is written.
    num_kept = max(1, config.keep_last + 2 - num_states)
    by_time = config.checkpoint_every_n_minutes is not None
    keeps_best = config.keep_best is not None or config.forgetting_budget is not None
    draws_first = config.sampling is not None and config.sampling.before_first_step and start == 0
    return DiskPlan(
        folder,
        sizes,
        num_weights=times["save"] + 1 + keeps_best,
        num_states=num_kept if by_time else min(num_kept, times["training state"]),
        num_previews=times["preview"] + draws_first + len(strengths_to_try(config.strengths_after_training)),
        base_velocities=base_velocities if start == 0 else 0,
    )
