"""The choice of the settings that save memory: by the estimate, then tried on the largest micro-batch of the run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object

from anima_train.caching.text_encoding import encodes_online
from anima_train.checkpoint.manifest import SavedState
from anima_train.config.ladder import Rung, rungs
from anima_train.core.device import device_name, free_device_bytes, is_out_of_memory, memory_bytes, release_memory
from anima_train.core.errors import ConfigError
from anima_train.core.format import format_bytes
from anima_train.data.plan import EpochSchedule, Plan
from anima_train.distributed.collectives import any_rank
from anima_train.model.dit import TransformerShape
from anima_train.model.loading import ModelSpec
from anima_train.training.build import trainable_transformer
from anima_train.training.context import RunContext
from anima_train.training.costs import memory_cost, model_stats
from anima_train.training.memory import MicroBatchShape
from anima_train.training.memory_check import largest_shapes, try_shape
from anima_train.training.setup import TrainState, build_model, counts_zeros, lora_to_begin_with

logger = logging.getLogger(__name__)

GIB = 2**30
USABLE = 0.95  # of what is free; the allocator's fragments and the libraries' workspaces take some
CARDS = (6, 8, 12, 16, 24, 32)  # GiB of common cards
TAKEN = 0.75 * GIB  # of a card, by its driver and the screen


@dataclass(frozen=True)
class Budget:
    """The memory that a run may take."""

    num_bytes: int
    described: str
    device: str  # with all of its memory
    is_cap: bool = False  # `max_memory_gib`

    @property
    def usable(self) -> float:
        """The bytes of it that an estimate may reach."""
        return self.num_bytes if self.is_cap else USABLE * self.num_bytes


@dataclass(frozen=True)
class Choice:
    """A rung of the ladder, chosen by the estimate."""

    mode: str  # the setting `memory`
    shape: MicroBatchShape
    rungs: Sequence[Rung]
    costs: Sequence[int]  # of each, in bytes
    budget: Budget
    index: int

    @property
    def rung(self) -> Rung:
        """The rung that is chosen."""
        return self.rungs[self.index]

    @property
    def num_bytes(self) -> int:
        """The estimate, in bytes."""
        return self.costs[self.index]

    @property
    def fits(self) -> bool:
        """True if the estimate is within the budget."""
        return self.num_bytes <= self.budget.usable

    def chosen_for(self, budget: Budget) -> "Choice":
        """Return what would be chosen for another budget: the first that fits, else that of least memory."""
        fitting = [index for index, cost in enumerate(self.costs) if cost <= budget.usable]
        least = min(range(len(self.costs)), key=self.costs.__getitem__)
        return replace(self, budget=budget, index=fitting[0] if fitting else least)

    def next_rung(self) -> "Choice | None":
        """Return the next rung that needs less memory; None if there is none."""
        later = range(self.index + 1, len(self.rungs))
        index = next((index for index in later if self.costs[index] < self.costs[self.index]), None)
        return None if index is None else replace(self, index=index)

    @property
    def lines(self) -> list[str]:
        """The choice, and its reason."""
        return [
            f"memory: {self.cost}, of {self.budget.described}{'' if self.fits else '; it may run out'}",
            *self.reason,
        ]

    @property
    def lasting_lines(self) -> list[str]:
        """The same without what is free just now."""
        return [f"{self.cost}, on {self.budget.device}", *self.reason]

    @property
    def warnings(self) -> list[str]:
        """A line where the memory may run out."""
        return [] if self.fits else [f"memory may run out: {self.lasting_lines[0]}"]

    @property
    def cost(self) -> str:
        """The memory that is needed."""
        return f"about {format_bytes(self.num_bytes)} (an estimate) for {self.shape}"

    @property
    def reason(self) -> list[str]:
        """The settings that were chosen, and what it would be with those before them; nothing if there are none."""
        if not self.rung.settings:
            is_idle = len(self.rungs) == 1 and "memory" in self.rung.config.model_fields_set
            return [f'memory = "{self.mode}" has no effect, as all that it could set is written'] if is_idle else []
        text, before = f'memory = "{self.mode}" sets {self.rung.price}', self.index - 1
        if before >= 0:
            text += f"; {self.rungs[before]} would take {format_bytes(self.costs[before])}"
        return [text]

    @property
    def on_cards(self) -> list[tuple[int, "Choice"]]:
        """The choices for common cards, each with the card's GiB."""
        return [(card, self.chosen_for(Budget(round(card * GIB - TAKEN), "", ""))) for card in CARDS]

    @property
    def card_lines(self) -> list[str]:
        """The choices for common cards."""
        found = [f'memory = "{self.mode}" on other cards, by estimate:']
        for card, of_card in self.on_cards:
            cost = format_bytes(of_card.num_bytes)
            found.append(
                f"  {card} GiB: {of_card.rung} ({cost})" if of_card.fits else f"  {card} GiB: too small ({cost})"
            )
        return found


def device_budget(device: torch.device, max_memory_gib: float | None, is_repeatable: bool) -> Budget:
    """Return what a run may take of a device's memory.

    Args:
        device: that trains.
        max_memory_gib: the setting.
        is_repeatable: True if the same run has to get the same on another day: all of the device's memory counts, not
            what is free.
    """
    name, total = device_name(device), memory_bytes(device)
    whole = f"{name} with {format_bytes(total)}"
    free = total if is_repeatable else free_device_bytes(device)
    if max_memory_gib is not None and max_memory_gib * GIB <= free:
        text = f"the {max_memory_gib:g} GiB of max_memory_gib, on {whole}"
        return Budget(round(max_memory_gib * GIB), text, whole, is_cap=True)
    text = f"{format_bytes(free)} that are free on {whole}"
    return Budget(free, whole if is_repeatable else text, whole)


def choose_rung(
    ladder: Sequence[Rung], spec: ModelSpec, shape: MicroBatchShape, encodes: bool, budget: Budget
) -> Choice:
    """Return the first rung whose estimate fits, else that of least memory.

    Args:
        ladder: the rungs.
        spec: the model.
        shape: of the largest micro-batch.
        encodes: True if captions are encoded on the device during training.
        budget: that it has to fit into.

    Raises:
        ConfigError: nothing fits into `max_memory_gib`.
    """
    first = ladder[0].config
    transformer = trainable_transformer(spec, first.adapter, first.learning_rates(), first.seed)
    stats = model_stats(first.adapter, spec, transformer, encodes)
    costs = [memory_cost(rung.config, stats, shape.size, shape.batch_size).total for rung in ladder]
    choice = Choice(first.memory, shape, ladder, costs, budget, 0).chosen_for(budget)
    if budget.is_cap and not choice.fits:
        raise ConfigError(
            f"max_memory_gib: found {first.max_memory_gib:g}, and {shape} take about "
            f"{format_bytes(choice.costs[choice.index])} at least (an estimate), with {choice.rung}; raise it, remove "
            "what is written of the settings that save memory, or lower the batch size or the resolution"
        )
    return choice


def choose_here(ladder: Sequence[Rung], spec: ModelSpec, plan: Plan, schedule: EpochSchedule) -> Choice:
    """Return the rung that a run of one process would begin with on this device.

    Raises:
        ConfigError: nothing fits into `max_memory_gib`.
    """
    settings = ladder[0].config
    (shape,) = largest_shapes(plan, len(schedule.epoch_starts) - 1, ())
    is_online = encodes_online(settings.model.cache_text_embeddings, plan.samples)
    budget = device_budget(spec.device, settings.max_memory_gib, settings.deterministic)
    return choose_rung(ladder, spec, shape, is_online and spec.text_device.type != "cpu", budget)


def model_ladder(config_rungs: Sequence[Rung], saved: SavedState | None) -> list[Rung]:
    """Return the rungs that a run may take: a resumed one keeps what its results depend on, and begins where it was.

    Args:
        config_rungs: all of them.
        saved: the state that the run goes on from.

    Raises:
        ConfigError: none of them has what the results of the resumed run depend on.
    """
    if saved is None:
        return list(config_rungs)
    before: Mapping[str, Any] = saved.manifest.run.get("memory", {})
    kept = Rung(config_rungs[0].config, before)
    same = [rung for rung in config_rungs if rung.results == kept.results]
    if not same:
        offered = " or ".join(str(Rung(kept.config, rung.results)) for rung in config_rungs[:1])
        raise ConfigError(
            f"memory: the run that is resumed was trained with {Rung(kept.config, kept.results)}, and now it would be "
            f"{offered}, which decides what is learned; set memory back, or start another run"
        )
    start = next((index for index, rung in enumerate(same) if dict(rung.settings) == dict(before)), 0)
    return same[start:]


def choose_settings(run: RunContext, spec: ModelSpec, shape: MicroBatchShape, encodes: bool) -> Choice:
    """Choose the settings that save memory, the same ones on all processes.

    Raises:
        ConfigError: nothing fits into `max_memory_gib`, or the resumed run had others.
    """
    written, accelerator = run.loaded.config, run.accelerator
    possible = rungs(written, num_blocks(spec), accelerator.num_processes, run.divides)
    ladder = model_ladder(possible, run.resume_point.saved)
    budget = device_budget(run.device, written.max_memory_gib, written.deterministic)
    least = min(gather_object([budget.num_bytes]))  # of all processes: they take the same rung
    return choose_rung(ladder, spec, shape, encodes, replace(budget, num_bytes=least))


def num_blocks(spec: ModelSpec) -> int:
    """Return the number of the transformer's blocks."""
    return TransformerShape.of(spec.files.transformer_header.entries).num_blocks


def build_fitting_model(
    run: RunContext, spec: ModelSpec, shapes: Sequence[MicroBatchShape], encodes: bool, num_steps: int
) -> tuple[RunContext, TrainState]:
    """Choose the settings that save memory, build the model with them, and try the largest micro-batches.

    Where memory runs out in the trial, the next rung is built instead.

    Args:
        run: the run.
        spec: the model.
        shapes: the largest micro-batches.
        encodes: True if captions are encoded on the device during training.
        num_steps: of the run.

    Returns:
        The run with the settings that were chosen, and its model.
    """
    choice: Choice | None = choose_settings(run, spec, shapes[0], encodes)
    limit_memory(run.device, run.config.max_memory_gib)
    initial = lora_to_begin_with(run, spec)
    while choice is not None:
        for line in choice.lines:
            logger.info("%s", line)
        run = replace(run, rung=choice.rung)
        run.memory.config, run.memory.shape = run.config, None
        following = choice.next_rung()
        spec = replace(spec, quantization=run.config.model.quantization)
        state = build_model(run, spec, num_steps, initial)
        state.transformer.folds_zeros = counts_zeros(run.config.attention, spec)
        if fits(run, state, spec, shapes, is_last=following is None):
            return run, state
        del state
        run.accelerator.free_memory()
        release_memory(run.device)
        logger.warning("memory ran out in the trial with %s; the next rung is tried", choice.rung)
        choice = following
    raise AssertionError("the last rung either fits or raises")


def fits(run: RunContext, state: TrainState, spec: ModelSpec, shapes: Sequence[MicroBatchShape], is_last: bool) -> bool:
    """Try the largest micro-batches; return False if memory ran out on any process, and it is not the last rung."""
    config, ran_out = run.config, False
    for shape in shapes:
        chosen = f" with {run.rung}, as memory has chosen" if run.rung is not None and run.rung.settings else ""
        run.memory.doing, run.memory.shape = f"a trial before the first step{chosen}", shape
        try:
            try_shape(
                shape, state.model, state.optimizer, run.accelerator, config.optimizer, config.loss(), spec,
                config.gradient_accumulation_steps > 1,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if is_last or not is_out_of_memory(error):
                raise
            ran_out = True
            break
    return not any_rank(run.accelerator, [ran_out])[0]


def limit_memory(device: torch.device, max_memory_gib: float | None) -> None:
    """Let torch take no more of a CUDA device than this from here on."""
    if max_memory_gib is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_memory_gib * GIB / memory_bytes(device)), device)
