"""The description of a run, made without running it."""

from collections.abc import Mapping
from pathlib import Path

from anima_train.config.ladder import rungs
from anima_train.config.load import LoadedConfig
from anima_train.config.plan_notes import plan_notes
from anima_train.core.format import format_bytes, message_lines
from anima_train.data.scan import Scan
from anima_train.model.loading import ModelSpec
from anima_train.optim.groups import group_rows
from anima_train.training.build import (
    check_blocks,
    check_compiler,
    disk_plan,
    file_sizes,
    plan_run,
    trainable_transformer,
)  # fmt: skip
from anima_train.training.divided import check_can_divide
from anima_train.training.ladder import choose_here, num_blocks
from anima_train.training.summary import data_messages, groups_text, plan_text


def describe_run(
    loaded: LoadedConfig, spec: ModelSpec, scans: Mapping[str, Scan], num_processes: int, divides: bool = False
) -> list[str]:
    """Return lines about the data, the memory, the plan, what is trained, and the files that the run would write.

    Args:
        loaded: the configuration.
        spec: the model.
        scans: by the set's name; "train" is trained.
        num_processes: that train.
        divides: True if they divide the transformer among them.

    Raises:
        ConfigError: the run would have no step, no compiler where one is asked for, too few blocks to swap, something
            that cannot be divided, or no room in `max_memory_gib`.
    """
    config = loaded.config
    check_compiler(config.compile, spec.device)
    check_blocks(config.blocks_to_swap, config.checkpointed_blocks, config.adapter, spec, num_processes)
    if divides:
        check_can_divide(config.optimizer, config.blocks_to_swap, config.model.quantization)
    lines = [f"note: {note}" for note in loaded.notes]
    for name, found in scans.items():
        lines.extend(line for message in data_messages(name, found) for line in message_lines(message))
    plan, schedule = plan_run(config, scans["train"].samples, num_processes)
    choice = choose_here(rungs(config, num_blocks(spec), num_processes, divides), spec, plan, schedule)
    lines.extend((*choice.lines, *choice.card_lines))
    lines.extend(plan_text(plan, schedule, config.epochs, config.ema))
    evaluated = [sample for name, scan in scans.items() if name != "train" for sample in scan.samples]
    lines.extend(f"note: {note}" for note in plan_notes(config, plan, schedule, evaluated))
    transformer = trainable_transformer(spec, config.adapter, config.learning_rates(), config.seed)
    lines.extend(groups_text(group_rows(transformer, config.learning_rates())))
    folder = Path(config.output_dir) / loaded.run_name
    planned = disk_plan(config, folder, file_sizes(config, spec), plan, schedule)
    lines.append(f"files: {planned.described()}: {format_bytes(planned.num_bytes)} in all")
    if warning := planned.warning(config.keep_last):
        lines.append(f"warning: {warning}")
    return lines
