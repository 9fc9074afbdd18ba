"""A run, from its images to its last saved file. Read `train` first: it is the story, top to bottom."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from anima_train.checkpoint.resume import find_resume_point
from anima_train.config.launch import launch_settings
from anima_train.config.loaded import LoadedConfig
from anima_train.config.model_files import build_model_spec
from anima_train.config.resolved import plain
from anima_train.core.determinism import deterministic_kernels
from anima_train.core.device import choose_device, describe_device
from anima_train.core.random import derive
from anima_train.core.transfers import HostCopy, is_asynchronous
from anima_train.data.loader import Batch
from anima_train.distributed.clipping import clip_gradients
from anima_train.distributed.collectives import broadcast_from_main
from anima_train.distributed.environment import read_environment
from anima_train.distributed.launcher import rank, world_size
from anima_train.evaluation.base_drawn import split_undrawn
from anima_train.objective.step import compute_loss
from anima_train.optim.by_block import step_by_block
from anima_train.optim.skipping import step_unless
from anima_train.run.log import logged_to, terminal
from anima_train.training.anomalies import UpdateGuard
from anima_train.training.build import check_compiler, check_judge, check_release
from anima_train.training.context import RunContext, run_context
from anima_train.training.divided import check_can_divide
from anima_train.training.dry_run import describe_run
from anima_train.training.ladder import build_fitting_model
from anima_train.training.metrics import MadeStep, StepLogger, StepSums, rates_in_use
from anima_train.training.prefetch import RankStep, prefetch_steps, rank_steps
from anima_train.training.prepare import prepare_data, scan_all, with_online_text_encoder
from anima_train.training.restore import restore
from anima_train.training.saving import Saver
from anima_train.training.setup import TrainState, build_plan, encode_previews, use_attention, watch_memory  # fmt: skip
from anima_train.training.tasks import PeriodicTasks

logger = logging.getLogger(__name__)


def run_training(
    loaded: LoadedConfig, dry_run: bool = False, resume: bool = False, resume_path: Path | None = None
) -> Path | None:
    """Train as the configuration says; return the final weights' path, or None for a dry run.

    Args:
        loaded: the configuration.
        dry_run: check everything, report, and stop.
        resume: go on with this run.
        resume_path: the state, or the run, to go on from.

    Raises:
        Interrupted: a signal or a file has asked for it; the state is saved.
    """
    check_release(loaded.config.optimizer.releases_gradients, world_size())
    if not dry_run:
        with deterministic_kernels(loaded.config.deterministic), run_context(loaded, resume, resume_path) as run:
            return train(run)
    config, device = loaded.config, choose_device()
    with logged_to(terminal(is_main=rank() == 0)):
        point = find_resume_point(plain(config), loaded.run_name, resume, resume_path)
    loaded = replace(loaded, run_name=point.run_name)
    launch = read_environment(os.environ, launch_settings(config, world_size()))
    loaded = replace(loaded, notes=(*loaded.notes, *launch.notes))
    if rank() == 0:
        with logged_to(terminal(is_main=True)):
            spec = build_model_spec(config, device)
            logger.info("%s", describe_device(device, spec.dtype))
            ready, undrawn = split_undrawn(loaded.datasets)
            scans = scan_all(ready, config.seed, write=True)
            lines = describe_run(
                loaded, spec, scans, world_size(), launch.shards, starts=True, point=point
            )  # fmt: skip
            for line in (*point.notes, *undrawn, *lines):
                logger.info("%s", line)
    return None


def train(run: RunContext, lag: int | None = None) -> Path:
    """Train; return the path of the final weights.

    Args:
        run: the run.
        lag: steps that the device is told to make before the numbers of one are read, see `LateSteps`; None: one where
            the device works behind the host's back, so that it never has to wait for the host.

    Raises:
        Interrupted: a signal or a file has asked for it; the state is saved.
    """
    config = run.config
    check_compiler(config.compile, run.device)
    if run.divides:
        check_can_divide(config.optimizer, config.blocks_to_swap, config.model.quantization, bool(config.preservation))
    broadcast_from_main(run.accelerator, partial(check_judge, config.sampling, config.offline))
    # Data: everything into the cache, then the plan of every batch.
    data = prepare_data(run.loaded, run.accelerator, trains=True, saved=run.resume_point.saved)
    plan, schedule = build_plan(run, data)
    # Whatever runs out of memory from here on says what to change.
    shapes, encodes_here = watch_memory(run, data, plan, schedule)
    attention = use_attention(run, data.spec, shapes[0])

    # Prompts are encoded, and the text encoder is freed, before the transformer is loaded.
    previews = encode_previews(run, data.spec)
    data = with_online_text_encoder(data, config.model.cache_text_embeddings, config.seed)

    # Model: base weights, what is trained, its optimizer, in the memory that there is: the largest micro-batches are
    # tried, so that a run that does not fit ends here. Then the state that it goes on from, if there is one.
    run, state = build_fitting_model(run, data.spec, shapes, encodes_here, schedule.num_steps)
    manifest = restore(run, state, data, plan, schedule, attention.kernel)
    log = StepLogger(run, state, schedule.num_steps)
    is_async = is_asynchronous(run.device)
    lag = int(is_async) if lag is None else lag
    saver = Saver(run, state, data, plan, schedule, manifest)
    tasks = PeriodicTasks(run, state, data, plan, schedule, previews, saver, log, shapes[-1], lag)

    tasks.run(tasks.before_first_step())

    has_roles = data.train.preservation is not None or len({sample.role for sample in plan.samples}) > 1
    sums = StepSums(run.device, has_roles)
    guard = UpdateGuard(run.device, state.skipped.in_a_row)
    steps = rank_steps(plan, schedule, state.step, run.accelerator.process_index, run.accelerator.num_processes)
    with prefetch_steps(
        steps, data.train, config.timesteps().at, config.uncond_fraction, config.num_workers, pins=is_async
    ) as prefetched:
        log.start()
        run.signals.is_stepping = True
        for step, batches in prefetched:
            if tasks.ending is not None:  # an evaluation of the run that is resumed, or of the step before, has said so
                break
            tasks.late.add(train_step(run, state, step, batches, sums, guard))
            tasks.run_due(step)
    if state.base_passes is not None:
        logger.info("%s", state.base_passes.cost(log.seconds))
    return tasks.finish()


def train_step(
    run: RunContext, state: TrainState, step: RankStep, batches: Iterator[Batch], sums: StepSums, guard: UpdateGuard
) -> MadeStep:
    """Make one optimizer step: forward and backward of its micro-batches, clipping, the update, the average.

    Each sample weighs the same in the step, whatever the sizes of the micro-batches. An update that is not finite is
    skipped, on all processes together; where gradients are released, from the first one that is not finite on. Nothing
    here waits for the device.
    """
    config, accelerator = run.config, run.accelerator
    loss_function = config.loss()
    state.set_rates(step.index)
    state.moved.before_update()
    for mine, batch in zip(step.micro_batches, batches, strict=True):
        run.memory.doing, run.memory.shape = f"step {step.index + 1}", mine.shape
        is_last = mine is step.micro_batches[-1]
        on_device = batch.to(run.device, non_blocking=True)
        if state.base_passes is not None:
            on_device = state.base_passes.complete(on_device)
        torch.manual_seed(derive(config.seed, "dropout", step.index, mine.address))
        with contextlib.nullcontext() if is_last else accelerator.no_sync(state.model):
            losses = compute_loss(state.model, on_device, loss_function)
            weighted = losses if on_device.weights is None else losses * on_device.weights
            share = weighted.sum() / step.planned.num_samples * (0.0 if mine.is_padding else 1.0)
            if state.release is not None:
                state.release.begin(guard.must_skip(share.detach()))
            accelerator.backward(share * accelerator.num_processes)  # DDP averages, and a sum is wanted
        sums.add(share, losses, on_device, mine.is_padding)

    if state.release is None:
        is_divided = state.shards is not None
        grad_norm = clip_gradients(accelerator, state.parameters, config.gradient_clipping or math.inf, is_divided)
    else:
        grad_norm = state.release.end()
    totals = sums.take(accelerator)  # of all processes, as is the norm: all skip together
    skips = guard.skips(totals[0], grad_norm)
    rates = rates_in_use(state.optimizer)
    if state.release is None:
        step_by_block(state.optimizer, state.transformer.block_swap, partial(step_unless, state.optimizer, skips))
    if state.ema is not None:
        state.ema.update(step.index + 1, skips)
    state.optimizer.zero_grad(set_to_none=True)
    state.step = step.index + 1
    state.samples_seen += step.planned.num_samples
    numbers = HostCopy(torch.cat([totals, grad_norm.float().reshape(1), state.moved.after_update()]))
    return MadeStep(step, state.samples_seen, rates, numbers)
