"""What a training step costs, measured before the run."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from anima_train.config.load import LoadedConfig
from anima_train.data.buckets import Size
from anima_train.data.loader import Batch
from anima_train.data.plan import Plan, batch_size_for
from anima_train.tools.report_costs import Measured
from anima_train.training.memory import is_out_of_memory, peak_bytes, start_peak
from anima_train.training.model import ModelFiles
from anima_train.training.objective import compute_loss
from anima_train.training.prepare import make_accelerator
from anima_train.training.setup import load_trained
from anima_train.training.texts import live_encoder
from anima_train.training.trial import random_batch


def extremes(plan: Plan) -> list[tuple[Size, int]]:
    """Size and micro-batch size of the buckets with the fewest and the most image tokens in a batch; one if equal."""
    buckets = {(sample.size, batch_size_for(plan.batch_sizes, sample.resolution)) for sample in plan.samples}
    ordered = sorted(buckets, key=lambda bucket: (bucket[0].num_tokens * bucket[1], bucket))
    return list(dict.fromkeys((ordered[0], ordered[-1])))


def measure(
    loaded: LoadedConfig, files: ModelFiles, buckets: Sequence[tuple[Size, int]], num_steps: int, has_live_texts: bool
) -> list[Measured]:
    """Run the training steps of a run of one process, and take their time and memory; the result is thrown away.

    Latents, noise and text are random, because nothing is cached yet and their values do not change the cost; captions
    have all the tokens that are read. No file is written.

    Args:
        loaded: the configuration.
        files: of the model.
        buckets: size and micro-batch size of each. The CPU's peak is that of the process so far, so that the cheapest
            bucket must come first.
        num_steps: for each bucket. The first of several is not timed: kernels are chosen in it.
        has_live_texts: whether captions are encoded during training: the text encoder is in memory then, but does
            nothing here.
    """
    config = loaded.config
    accelerator = make_accelerator(config, Path(config.output_dir) / loaded.run_name)
    device = accelerator.device
    try:
        texts = live_encoder(loaded, files, accelerator.device) if has_live_texts else None
        step = training_step(loaded, files, accelerator)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [Measured(size, batch_size, None, peak_bytes(device)) for size, batch_size in buckets]
    measured = []
    for size, batch_size in buckets:
        batch = random_batch(loaded, files, size, batch_size)
        start_peak(device)
        try:
            seconds = [timed(step, batch, device) for _ in range(num_steps)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            measured.append(Measured(size, batch_size, None, peak_bytes(device)))
        else:
            measured.append(Measured(size, batch_size, statistics.median(seconds[1:] or seconds), peak_bytes(device)))
    del texts  # was in memory until now
    return measured


def training_step(loaded: LoadedConfig, files: ModelFiles, accelerator: Accelerator) -> Callable[[Batch], None]:
    """Load what is trained, and return a function that makes one optimizer update as the training loop does."""
    config = loaded.config
    num_micro_batches = config.gradient_accumulation_steps
    loss_function = config.loss()
    transformer, groups = load_trained(loaded, files, accelerator.device)
    parameters = [parameter for group in groups for parameter in group["params"]]
    model = accelerator.prepare(transformer)
    optimizer = config.optimizer.build(groups)
    # The optimizer's state, which all steps of a run but the first find in memory.
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)  # here: a step that ran out of memory leaves gradients
        for _ in range(num_micro_batches):
            losses = compute_loss(model, batch.to(accelerator.device), loss_function)
            accelerator.backward(losses.mean() / num_micro_batches)
        accelerator.clip_grad_norm_(parameters, config.gradient_clipping or math.inf)
        optimizer.step()

    return step


def timed(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Seconds until the device is done."""
    started = time.perf_counter()
    step(batch)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
