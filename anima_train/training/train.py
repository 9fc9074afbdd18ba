"""The training loop, read from top to bottom."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from anima_train.adapters.full import Full
from anima_train.config.config import Config
from anima_train.config.load import LoadedConfig
from anima_train.core.errors import Interrupted, NumericError, count
from anima_train.core.files import write_text
from anima_train.core.random import derive
from anima_train.data.loader import Batch, read_ahead
from anima_train.data.plan import MicroBatch, Plan, Timetable
from anima_train.model.dit import MiniTrainDIT
from anima_train.optim.schedules import lr_factor
from anima_train.tools.run_report import T_BINS
from anima_train.training.checkpoints import load_state, save_state, save_weights, saved_states
from anima_train.training.due import Due, what_follows
from anima_train.training.evaluate import Evaluation, evaluate
from anima_train.training.memory import peak_bytes, start_peak
from anima_train.training.metadata import weights_metadata
from anima_train.training.model import DTYPES, ModelFiles, find_model_files
from anima_train.training.objective import compute_loss
from anima_train.training.prepare import make_accelerator, prepare_data, with_live_texts
from anima_train.training.previews import Previews
from anima_train.training.progress import Progress
from anima_train.training.run import RunFolder, config_toml, leave_report, manifest
from anima_train.training.setup import (
    group_rows,
    groups_text,
    load_trained,
    make_plan,
    make_timetable,
    plan_text,
    report,
    scan_all,
)
from anima_train.training.stopping import Stopping
from anima_train.training.texts import text_device
from anima_train.training.trackers import Trackers, open_trackers

ROLES = ("train", "regularization")
MAX_SKIPPED = 10  # steps in a row without a finite gradient


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


def run_training(loaded: LoadedConfig, dry_run: bool = False, resume: bool = False) -> Path | None:
    """Train as the configuration says; returns the final weights' path, or None for a dry run."""
    config = loaded.config
    run = RunFolder(Path(config.output_dir), loaded.run_name)
    accelerator = make_accelerator(config, run.path)
    if dry_run:
        if accelerator.is_main_process:
            files = find_model_files(loaded)
            files.check_headers()
            print(report(loaded, files, scan_all(loaded, write=True), accelerator.num_processes))
        return None
    for note in loaded.notes:
        accelerator.print(f"note: {note}")
    if accelerator.is_main_process:
        run.open(resume)
    try:
        with contextlib.ExitStack() as stack:
            return train(loaded, run, accelerator, resume, stack, stack.enter_context(Stopping(run.path)))
    finally:
        if accelerator.is_main_process:
            run.close()
        accelerator.end_training()


def train(
    loaded: LoadedConfig, run: RunFolder, accelerator: Accelerator, resume: bool, stack: contextlib.ExitStack,
    stopping: Stopping,
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
    data = prepare_data(loaded, accelerator)
    plan = make_plan(loaded, data.train.samples, accelerator.num_processes)
    timetable = make_timetable(loaded, plan)
    accelerator.print("\n".join(plan_text(plan, timetable, config.epochs)))

    # Previews: prompts are encoded, and the text encoder is freed, before the transformer is loaded.
    previews = make_previews(loaded, data.files, run, device) if is_main and config.sampling is not None else None

    # Model: base weights, what is trained, its optimizer.
    with_adapter = rates.by_component["llm_adapter"] != 0
    data = with_live_texts(data, loaded, accelerator)
    transformer, groups = load_trained(loaded, data.files, device)
    rows = group_rows(transformer, rates)
    accelerator.print("\n".join(groups_text(rows)))
    parameters = [parameter for group in groups for parameter in group["params"]]
    model = accelerator.prepare(transformer)
    optimizer = config.optimizer.build(groups)

    # Where to start.
    start = 0
    if is_main:
        facts = manifest(
            config, run.name, data.files, data.train.samples, rows, timetable.num_steps, accelerator.num_processes
        )
        if resume:
            run.check_same_run(facts)
    if resume:
        states = saved_states(run.checkpoints)
        start = load_state(states[-1], transformer, optimizer) if states else 0
        accelerator.print(f"resuming after step {start}")
    if is_main:
        run.keep_metrics(start)
        write_text(run.path / "config.toml", config_toml(config))
        write_text(run.manifest_path, json.dumps(facts, indent=1))
        for warning in (*loaded.notes, *data.warnings):
            run.warn(0, warning)
    progress = Progress(run.name, timetable.num_steps, start, is_main)
    trackers = Trackers(partial(open_trackers, accelerator, config.monitoring, run.name), progress.say)
    stack.callback(trackers.close)  # where the run fails, too
    stack.callback(progress.close)

    base: dict[str, Evaluation] = {}

    def run_evaluation(step: int, seen: int) -> None:
        for eval_set in data.evals:
            result = evaluate(model, eval_set, loss_function, timesteps, accelerator)
            if step == 0:
                base[eval_set.name] = result
            values = result.metrics(base.get(eval_set.name))
            if is_main:
                run.log(run.evaluations_path, {"step": step, "examples": seen, **values})
            progress.say(f"step {step}: {eval_set.name}/loss {values[f'{eval_set.name}/loss']:.5f}")
            trackers.log(values, seen if config.x_axis_examples else step)

    def preview(step: int, seen: int) -> None:
        if previews is None:
            return
        try:
            paths = previews.draw(step, transformer, accelerator.unwrap_model(model, keep_fp32_wrapper=True))
        except Exception as error:  # noqa: BLE001  # whatever it is, the training goes on
            progress.say(f"warning: step {step}: no preview ({error})")
            run.warn(step, f"no preview ({error})")
            return
        progress.say(f"step {step}: {count(len(paths), 'preview')} in {previews.folder}")
        trackers.show(previews.pictures(paths), seen if config.x_axis_examples else step)

    def save(step: int | None) -> Path:
        path = run.weights_path(step)
        done = timetable.num_steps if step is None else step
        metadata = weights_metadata(config, run.name, done, timetable.place(max(0, done - 1))[0] + 1, len(plan.samples))
        save_weights(path, weights_to_save(config, transformer, data.files, with_adapter), metadata)
        return path

    if config.eval_before_first_step and start == 0:
        run_evaluation(0, 0)
    if config.sampling is not None and config.sampling.before_first_step and start == 0:
        preview(0, 0)

    now = time.monotonic()
    save_due = Due(
        config.save_every_n_epochs, config.save_every_n_steps, config.save_every_n_examples,
        config.save_every_n_minutes, now,
    )  # fmt: skip
    state_due = Due(
        config.checkpoint_every_n_epochs, config.checkpoint_every_n_steps, None, config.checkpoint_every_n_minutes, now
    )
    eval_due = Due(config.eval_every_n_epochs, config.eval_every_n_steps, config.eval_every_n_examples)

    def make_batch(task: Task) -> tuple[Task, Batch]:
        batch = data.train.training_batch(
            task.micro_batch, task.epoch, task.counts, timesteps.at, config.uncond_fraction
        )
        return task, batch

    sampling = config.sampling
    preview_due = Due() if sampling is None else Due(sampling.every_n_epochs, sampling.every_n_steps)
    events = {"evaluation": eval_due, "preview": preview_due, "save": save_due, "training state": state_due}
    started, seen, seen_here, skipped = time.monotonic(), images_before(plan, timetable, start), 0, 0
    step_loss = torch.zeros((), device=device)
    has_roles = len({sample.is_regularization for sample in data.train.samples}) > 1
    role_losses = torch.zeros(2, 2, device=device)  # (train, regularization), (sum, number)
    t_losses = torch.zeros(T_BINS, 2, device=device)  # range of t, (sum, number)
    start_peak(device)
    stopping.is_stepping = True
    for task, batch in read_ahead(tasks(plan, timetable, start, accelerator), make_batch):
        # Forward and backward. Each sample weighs the same in the step, whatever the sizes of the micro-batches. DDP
        # averages gradients over processes, so that what is wanted as a sum is multiplied by their number.
        torch.manual_seed(derive(config.seed, "dropout", task.step, task.index))
        with contextlib.nullcontext() if task.last else accelerator.no_sync(model):
            losses = compute_loss(model, batch.to(device), loss_function)
            share = losses.sum() / task.num_samples * (1.0 if task.counts else 0.0)
            accelerator.backward(share * accelerator.num_processes)
        step_loss += share.detach()
        if task.counts:
            sums = torch.stack([losses.detach(), torch.ones_like(losses)], dim=1)
            t_losses.index_add_(0, (batch.t * T_BINS).long().clamp(0, T_BINS - 1).to(device), sums)
            if has_roles:
                role_losses.index_add_(0, torch.tensor(batch.is_regularization, device=device).long(), sums)
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
        if math.isfinite(norm):
            optimizer.step()
            skipped = 0
        else:
            skipped += 1
            warning = f"the gradient is not finite; not applied ({batch.names[0]})"
            progress.say(f"warning: step {task.step + 1}: {warning}")
            if is_main:
                run.warn(task.step + 1, warning)
            if skipped == MAX_SKIPPED:
                raise NumericError(f"{skipped} steps in a row without a finite gradient; the last saved files are kept")
        optimizer.zero_grad(set_to_none=True)
        loss = float(accelerator.reduce(step_loss, "sum"))
        step_loss.zero_()
        by_role = accelerator.reduce(role_losses, "sum").tolist() if has_roles else []
        role_losses.zero_()
        by_t = accelerator.reduce(t_losses, "sum").tolist()
        loss_by_t = [(place, sum_ / n, int(n)) for place, (sum_, n) in enumerate(by_t) if n]
        t_losses.zero_()

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
                "loss": loss,
                "lr": config.optimizer.lr * schedule_factor,
                **{f"lr/{group['component']}": group["lr"] for group in optimizer.param_groups},
                **{f"loss/{role}": sum_ / n for role, (sum_, n) in zip(ROLES, by_role, strict=False) if n},
                "grad_norm": norm,
                "images_per_second": speed,
                "seconds": seconds,
                "memory_bytes": peak_bytes(device),
            }
            run.log(run.metrics_path, values | {"loss_by_t": loss_by_t})
            shown = {key: value for key, value in values.items() if key not in ("step", "examples")}
            trackers.log(shown, seen if config.x_axis_examples else step)
            progress.update(step, loss, speed, values["memory_bytes"], what_follows(events, step, timetable))

        # Evaluate and save.
        due = (step, task.epoch, timetable.epochs_done(task.step), seen_before, seen)
        if eval_due.after(*due):
            run_evaluation(step, seen)
        if preview_due.after(*due):
            preview(step, seen)
        if is_main and save_due.after(*due) and step < timetable.num_steps:
            progress.say(f"step {step}: saved {save(step)}")
        wish = stopping.after_step(accelerator)
        if is_main and (state_due.after(*due) or wish.saves):
            save_state(run.checkpoints, step, transformer, optimizer, config.keep_last)
        if wish.saves and step < timetable.num_steps:
            if is_main:
                progress.say(f"step {step}: saved {save(step)} and the training state, as asked")
            if wish.exit_code is not None:
                raise Interrupted(f"after step {step}; go on with --resume", wish.exit_code)
    final = run.weights_path(None)
    if is_main:
        save(None)
        print(f"saved {final}")
        leave_report(run, plan, timetable, timetable.num_steps)
    accelerator.wait_for_everyone()
    return final


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


def weights_to_save(
    config: Config, transformer: MiniTrainDIT, files: ModelFiles, with_adapter: bool
) -> dict[str, torch.Tensor]:
    """The LoRA, or the whole model; a frozen LLM adapter that is not in memory comes from its file."""
    tensors = config.adapter.tensors(transformer)
    if isinstance(config.adapter, Full) and not with_adapter:
        tensors |= config.adapter.outside(files.adapter_tensors())
    if config.save_dtype is None:
        return tensors
    return {name: tensor.to(DTYPES[config.save_dtype]) for name, tensor in tensors.items()}


def images_before(plan: Plan, timetable: Timetable, step: int) -> int:
    """Images seen in the steps before this one."""
    epoch, place = timetable.place(step) if step else (0, 0)
    whole = sum(plan.shown_before(index, epoch) for index in range(len(plan.samples)))
    return whole + sum(planned.num_samples for planned in plan.epoch(epoch)[:place])
