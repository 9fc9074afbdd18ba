"""The training loop, read from top to bottom."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from anima_train.caching.text_encoding import has_live_texts, text_device
from anima_train.checkpoint.async_writer import AsyncWriter
from anima_train.checkpoint.resume import ResumePoint, check_same_content, find_resume_point, retire_states
from anima_train.checkpoint.training_state import load_state, saved_states, trained_parameters
from anima_train.config.config import Config
from anima_train.config.load import LoadedConfig
from anima_train.config.model_files import find_model_files
from anima_train.core.device import DTYPES
from anima_train.core.errors import Interrupted
from anima_train.core.files import write_text
from anima_train.core.format import printable
from anima_train.core.random import derive
from anima_train.data.loader import Batch, read_ahead
from anima_train.data.plan import MicroBatch, Plan, Timetable, times_seen
from anima_train.distributed.collectives import from_main
from anima_train.distributed.consistency import Together, check_same_plan, settled
from anima_train.distributed.signals import Abandoned, Stopping
from anima_train.evaluation.previews import Previews
from anima_train.model.loading import ModelFiles
from anima_train.objective.step import compute_loss
from anima_train.optim.ema import WeightAverage
from anima_train.optim.lr_schedules import lr_factor
from anima_train.run.accelerator import make_accelerator
from anima_train.run.folder import RunFolder
from anima_train.run.intervals import Interval, next_event
from anima_train.run.manifest import config_toml, manifest, plain, seen_facts
from anima_train.run.progress import ProgressBar
from anima_train.run.trackers import Trackers, open_trackers
from anima_train.training.anomalies import naming, replay, step_names
from anima_train.training.build import disk_plan, file_sizes, group_rows, load_trained, make_plan, make_timetable
from anima_train.training.costs import memory_suggestions
from anima_train.training.memory import MemoryContext, MicroBatchShape, memory_errors, peak_bytes, start_peak
from anima_train.training.memory_check import largest_shapes, text_input, try_shape
from anima_train.training.metrics import StepSums
from anima_train.training.prepare import prepare_data, scan_all, with_live_texts
from anima_train.training.summary import groups_text, plan_text, report
from anima_train.training.tasks import Moment, Outputs, Trained

GO_ON = "resume with the same command or --resume"


@dataclass(frozen=True)
class Task:
    """One micro-batch of this process."""

    step: int
    epoch: int
    index: int  # among the step's micro-batches of all processes: addresses dropout
    micro_batch: MicroBatch
    counts: bool
    num_samples: int  # in the whole step, all processes
    last: bool  # of the step, for this process


def tasks(plan: Plan, timetable: Timetable, start: int, accelerator: Accelerator) -> Iterator[Task]:
    """This process's micro-batches from step `start` to the end of the run."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    planned: tuple[int, list] = (-1, [])
    for step in range(start, timetable.num_steps):
        epoch, place = timetable.place(step)
        if planned[0] != epoch:
            planned = (epoch, plan.epoch(epoch))
        share = planned[1][place].share(rank, world_size)
        for index, (micro_batch, counts) in enumerate(share):
            yield Task(
                step, epoch, rank + index * world_size, micro_batch, counts, planned[1][place].num_samples,
                index == len(share) - 1,
            )  # fmt: skip


def run_training(
    loaded: LoadedConfig, dry_run: bool = False, resume: bool = False, resume_path: Path | None = None
) -> Path | None:
    """Train as the configuration says; returns the final weights' path, or None for a dry run.

    Args:
        loaded: the configuration.
        dry_run: check everything, report, and stop.
        resume: go on with this run.
        resume_path: the state, or the run, to go on from.
    """
    config = loaded.config
    accelerator = make_accelerator(config, Path(config.output_dir) / loaded.run_name)
    if dry_run:
        if accelerator.is_main_process:
            files = find_model_files(loaded)
            files.check_headers()
            print(report(loaded, files, scan_all(loaded, write=True), accelerator.num_processes))
        return None
    with contextlib.ExitStack() as stack, Together(accelerator):  # which hears of a failure before the stack does
        # `end_training` would also close the trackers: their thread does, or warns where they cannot be opened.
        stack.callback(accelerator.state.destroy_process_group)
        loaded = settled(loaded, accelerator)
        deadline = config.stop_within_seconds if accelerator.num_processes == 1 else None
        if deadline != config.stop_within_seconds:
            note = "stop_within_seconds: has no effect, as several processes always finish the step"
            loaded = replace(loaded, notes=(*loaded.notes, note))
        for note in loaded.notes:
            accelerator.print(f"note: {printable(note)}")
        with collected_warnings() as warnings:
            origin = from_main(
                accelerator, lambda: find_resume_point(plain(loaded.config), loaded.run_name, resume, resume_path)
            )
        for line in (*(f"warning: {warning}" for warning in warnings), *origin.notes):
            accelerator.print(printable(line))
        loaded = replace(loaded, run_name=origin.run_name)
        run = RunFolder(Path(config.output_dir), loaded.run_name)
        places = accelerator.project_configuration  # made before the name was known
        places.project_dir = places.logging_dir = str(run.path)
        if accelerator.is_main_process:
            run.open()
            stack.callback(run.close)
        return train(
            loaded, run, accelerator, origin, warnings, stack, stack.enter_context(Stopping(run.path, deadline))
        )


def train(
    loaded: LoadedConfig, run: RunFolder, accelerator: Accelerator, origin: ResumePoint, warnings: list[str],
    stack: contextlib.ExitStack, stopping: Stopping,
) -> Path:  # fmt: skip
    """The run, from the images to the last saved file; what has to be closed at its end goes on the stack.

    Raises:
        Interrupted: a signal or a file has asked for it; the state is saved.
    """
    config = loaded.config
    is_main = accelerator.is_main_process
    device = accelerator.device
    rates = config.learning_rates()
    loss_function, timesteps = config.loss(), config.timesteps()

    # Data: everything into the cache, then the plan of every batch.
    data = prepare_data(loaded, accelerator, trains=True)
    plan = make_plan(loaded, data.train.samples, accelerator.num_processes)
    timetable = make_timetable(loaded, plan)
    check_same_plan(data.train, plan, timetable.num_steps, accelerator)
    accelerator.print("\n".join(plan_text(plan, timetable, config)))

    # Memory: whatever runs out of it from here on says what to change.
    shapes = largest_shapes(plan, len(timetable.first_steps) - 1, data.evals)
    attempt = MemoryContext("loading the model")
    encodes_here = has_live_texts(config, data.train.samples) and text_device(config, device).type != "cpu"

    def changes(tried: MicroBatchShape | None) -> list[str]:
        shape = tried or shapes[0]
        return memory_suggestions(config, shape.resolution, shape.batch_size, encodes_here, shape.is_evaluation)

    stack.enter_context(memory_errors(device, attempt, changes))

    # Previews: prompts are encoded, and the text encoder is freed, before the transformer is loaded.
    previews = make_previews(loaded, data.files, run, device) if is_main and config.sampling is not None else None

    # Model: base weights, what is trained, its optimizer.
    data = with_live_texts(data, loaded, accelerator)
    transformer, groups = load_trained(loaded, data.files, device)
    rows = group_rows(transformer, rates)
    accelerator.print("\n".join(groups_text(rows)))
    parameters = [parameter for group in groups for parameter in group["params"]]
    model = accelerator.prepare(transformer)
    optimizer = config.optimizer.build(groups)
    average = None if config.ema is None else WeightAverage(trained_parameters(transformer), config.ema)

    # Where to start.
    start, pending = 0, []

    def checked_facts() -> dict[str, Any]:
        facts = manifest(
            run.name, data.files, data.train, rows, config.seed, timetable.num_steps, accelerator.num_processes,
            config.gradient_accumulation_steps,
        )  # fmt: skip

        if origin.saved is not None:
            check_same_content(origin.saved, facts)
        return facts

    facts = from_main(accelerator, checked_facts)
    if origin.saved is not None:
        load_state(origin.saved, transformer, optimizer, average)
        start, pending = origin.saved.manifest.step, origin.saved.manifest.pending
    if is_main:
        for path in retire_states(run.checkpoints, start):
            accelerator.print(f"note: {printable(str(path))} is of a step that is made again; it is not read any more")
        run.start_records(origin.source, start, pending)
        write_text(run.path / "config.toml", config_toml(config))
        write_text(run.manifest_path, json.dumps(facts, indent=1))
        num_states = len(saved_states(run.checkpoints))
        expected = disk_plan(loaded, file_sizes(loaded, data.files), plan, timetable, start, num_states)
        if warning := expected.warning(config.keep_last):
            accelerator.print(f"warning: {printable(warning)}")
            warnings.append(warning)
        for warning in (*warnings, *loaded.notes, *data.warnings):
            run.warn(0, warning)
    skipped, spikes = from_main(accelerator, lambda: replay(run.metrics_path, start))  # after the records are trimmed
    progress = ProgressBar(run.name, timetable.num_steps, start, is_main)
    opens = partial(open_trackers, accelerator, config.monitoring, run.name, config.offline)
    trackers = stack.enter_context(Trackers(opens))  # closed where the run fails, too
    stack.callback(progress.close)
    writer = stack.enter_context(AsyncWriter())
    outputs = Outputs(
        config, run, accelerator, stopping, writer, progress, trackers,
        Trained(transformer, model, optimizer, average), data.files, plan, timetable, data.evals, previews, facts,
    )  # fmt: skip

    # The largest micro-batches first, so that a run that does not fit into the memory ends here.
    for shape in shapes:
        attempt.doing, attempt.shape = "a trial before the first step", shape
        try_shape(
            shape, model, optimizer, accelerator, config.optimizer, loss_function, text_input(config, data.files),
            config.gradient_accumulation_steps > 1,
        )  # fmt: skip

    # Before the first step, or what a process that had to stop has left.
    seen = sum(times_seen(plan, timetable, start))
    if origin.saved is None:
        sampling = config.sampling
        starts = {"evaluation": config.eval_before_first_step, "preview": sampling and sampling.before_first_step}
        pending = [name for name, is_due in starts.items() if is_due]
    attempt.doing, attempt.shape = "an evaluation", shapes[-1]
    outputs.make(pending, Moment(start, seen))

    due = all_due(config, time.monotonic())

    def make_batch(task: Task) -> tuple[Task, Batch]:
        batch = data.train.training_batch(
            task.micro_batch, task.epoch, task.counts, timesteps.at, config.uncond_fraction
        )
        return task, batch

    started, seen_here = time.monotonic(), 0
    step_started, step_seconds = started, 0.0
    sums = StepSums(device, has_roles=len({sample.is_regularization for sample in data.train.samples}) > 1)
    start_peak(device)
    stopping.is_stepping = True
    batches = read_ahead(tasks(plan, timetable, start, accelerator), make_batch, num_threads=config.num_workers)
    for task, batch in batches:
        # Forward and backward. Each sample weighs the same in the step, whatever the sizes of the micro-batches. DDP
        # averages gradients over processes, so that what is wanted as a sum is multiplied by their number.
        attempt.doing, attempt.shape = f"step {task.step + 1}", MicroBatchShape.of(task.micro_batch, plan.samples)
        torch.manual_seed(derive(config.seed, "dropout", task.step, task.index))
        left = step_started + step_seconds - time.monotonic() + writer.seconds
        try:
            with stopping.leaving(left), contextlib.nullcontext() if task.last else accelerator.no_sync(model):
                losses = compute_loss(model, batch.to(device), loss_function)
                share = losses.sum() / task.num_samples * (1.0 if task.counts else 0.0)
                accelerator.backward(share * accelerator.num_processes)
        except Abandoned:
            outputs.save_state(task.step)
            writer.wait()
            raise Interrupted(f"after step {task.step}; {GO_ON}", stopping.exit_code) from None
        sums.add(share, losses, batch, task.counts)
        if not task.last:
            continue

        # Update.
        schedule_factor = (
            1.0
            if config.force_constant_lr is not None
            else lr_factor(config.lr_scheduler, task.step, timetable.num_steps, config.warmup_steps)
        )
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule_factor
        norm = float(accelerator.clip_grad_norm_(parameters, config.gradient_clipping or math.inf))
        found = sums.take(accelerator)  # of all processes, as is the norm: all skip together
        if (problem := skipped.after(found.loss, norm)) is None:
            optimizer.step()
            if average is not None:
                average.update(task.step + 1)
        else:
            planned = plan.epoch(task.epoch)[timetable.place(task.step)[1]]
            warning = naming(problem, step_names(planned, plan.samples))
            progress.say(f"warning: step {task.step + 1}: {warning}")
            if is_main:
                run.warn(task.step + 1, warning)
            if skipped.is_over:
                if is_main:
                    outputs.save_state(task.step + 1 - skipped.in_a_row)  # nothing has changed since
                    writer.wait()
                accelerator.wait_for_everyone()  # a process that fails while another one saves would end that, too
            skipped.check()
        optimizer.zero_grad(set_to_none=True)

        # Log.
        step = task.step + 1
        seen_before, seen = seen, seen + task.num_samples
        seen_here += task.num_samples
        seconds = time.monotonic() - started
        speed = seen_here / seconds
        if is_main:
            values: dict[str, Any] = {
                "step": step,
                "epoch": task.epoch,
                "examples": seen,
                "loss": found.loss,
                "lr": config.optimizer.lr * schedule_factor,
                **{f"lr/{group['component']}": group["lr"] for group in optimizer.param_groups},
                **{f"loss/{role}": mean for role, mean in found.by_role.items()},
                "grad_norm": norm,
                "images_per_second": speed,
                "seconds": seconds,
                "memory_bytes": peak_bytes(device),
            }
            run.log(run.metrics_path, values | {"loss_by_t": found.by_t})
            shown = {key: value for key, value in values.items() if key not in ("step", "examples")}
            trackers.log(shown, seen if config.x_axis_examples else step)
            if spike := spikes.after(step, norm):
                progress.say(f"warning: step {step}: {spike}")
                run.warn(step, spike)
            progress.update(step, found.loss, speed, values["memory_bytes"], next_event(due, step, timetable))

        step_seconds = time.monotonic() - step_started

        # Look and save.
        writer.check()
        place = (step, task.epoch, timetable.epochs_done(task.step), seen_before, seen)
        attempt.doing, attempt.shape = "an evaluation", shapes[-1]
        is_due = {name: each.after(*place) for name, each in due.items()}
        pending = outputs.make((name for name in ("evaluation", "preview") if is_due[name]), Moment(step, seen))
        wish = stopping.after_step(accelerator)
        if is_main:
            for warning in data.repair.take():
                run.warn(step, warning)
            if (is_due["save"] or wish.saves) and step < timetable.num_steps:
                outputs.save_weights(step)
            if is_due["training state"] or wish.saves:
                outputs.save_state(step, pending)
        if wish.exit_code is not None and (step < timetable.num_steps or pending):
            writer.wait()
            accelerator.wait_for_everyone()  # a process that leaves while another one saves would end that, too
            raise Interrupted(f"after step {step}; {GO_ON}", wish.exit_code)
        step_started = time.monotonic()
    final = run.weights_path(None)
    if is_main:
        outputs.save_weights(None)
        writer.wait()
        run.finish()
        print(f"saved {printable(str(final))}")
        write_text(run.path / "seen.json", json.dumps(seen_facts(plan, timetable, timetable.num_steps), indent=1))
    accelerator.wait_for_everyone()
    return final


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Yield a list to which warnings are appended, until there is a folder to log them in."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("anima_train").addHandler(handler)
    yield texts
    logging.getLogger("anima_train").removeHandler(handler)


def all_due(config: Config, now: float) -> dict[str, Interval]:
    """What happens after some steps, by its name."""
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


def make_previews(loaded: LoadedConfig, files: ModelFiles, run: RunFolder, device: torch.device) -> Previews:
    """The run's previews, their prompts encoded."""
    config = loaded.config
    assert config.sampling is not None
    return Previews.of(
        config.sampling.prompts,
        files,
        run.path / "samples",
        run.name,
        config.learning_rates().by_component["llm_adapter"] != 0,
        device,
        text_device(config, device),
        DTYPES[config.model.dtype],
    )
