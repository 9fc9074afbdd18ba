"""The largest micro-batch of a run, tried before its first step: what cannot fit fails in seconds, not after hours."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.caching.text_encoding import CaptionEncoder
from anima_train.config.config import Config
from anima_train.core.device import is_out_of_memory
from anima_train.core.random import stream
from anima_train.core.shapes import LATENT_CHANNELS, LATENT_PIXELS
from anima_train.core.text_batch import EncodedText, TextContext, TextStates, pad_states
from anima_train.data.buckets import Size
from anima_train.data.loader import Batch
from anima_train.data.plan import Plan, batch_size_for
from anima_train.evaluation.evaluate import EvalSet
from anima_train.model.dit import TransformerShape
from anima_train.model.llm_adapter import LLMAdapterShape
from anima_train.model.loading import ModelSpec
from anima_train.objective.losses import Loss
from anima_train.objective.step import compute_loss
from anima_train.optim.by_block import step_by_block
from anima_train.optim.optimizers import AnyOptimizer
from anima_train.optim.release import GradientRelease
from anima_train.optim.split import SplitOptimizer
from anima_train.optim.state_shapes import optimizer_state
from anima_train.run.accelerator import make_accelerator
from anima_train.training.build import block_runner, build_optimizer, load_trained
from anima_train.training.costs import Measured
from anima_train.training.memory import MicroBatchShape, peak_bytes, start_peak


def largest_shapes(plan: Plan, num_epochs: int, evals: Iterable[EvalSet]) -> list[MicroBatchShape]:
    """Return the micro-batch that needs most memory in training, and that in evaluation if there is any."""
    trained = [
        MicroBatchShape(resolution, size, number)
        for (resolution, size), number in plan.largest_batches(num_epochs).items()
    ]
    evaluated = []
    for eval_set in evals:
        for indices in eval_set.batches():
            sample = eval_set.data.samples[indices[0]]
            evaluated.append(MicroBatchShape(sample.resolution, sample.size, len(indices), is_evaluation=True))
    return [max(shapes, key=lambda shape: shape.cost) for shapes in (trained, evaluated) if shapes]


def try_shape(
    shape: MicroBatchShape, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator, settings: AnyOptimizer,
    loss_function: Loss, spec: ModelSpec, accumulates: bool,
) -> None:  # fmt: skip
    """Run the forward pass on random values and, unless it is an evaluation's, the backward pass.

    In memory is what training will hold, too: the optimizer's state, and the gradients of a step's earlier
    micro-batches. All of it is dropped again: weights, optimizer and later steps are as if this had not been. The
    process does this alone: none waits for another.

    Args:
        shape: of the micro-batch.
        model: that trains, as the accelerator prepared it.
        optimizer: that trains.
        accelerator: device and processes.
        settings: of the optimizer.
        loss_function: of the run.
        spec: the model.
        accumulates: True if a step has several micro-batches.
    """
    device = accelerator.device
    start_peak(device)
    # Without what exchanges gradients, but with autocast.
    transformer = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = [] if optimizer.state else state_like(settings, parameters, device)
    batch = random_batch(shape.size, shape.batch_size, spec).to(device)
    if shape.is_evaluation:
        transformer.eval()
        with torch.no_grad():
            compute_loss(transformer, batch, loss_function)
        transformer.train()
    else:
        if accumulates:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        accelerator.backward(compute_loss(transformer, batch, loss_function).mean())
    optimizer.zero_grad(set_to_none=True)
    del held  # was in memory until now


def state_like(settings: AnyOptimizer, parameters: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors that take the memory of an optimizer's state on the device."""
    return [
        torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        for state in optimizer_state(settings, parameters, on_device=True)
        for tensor in state.values()
    ]


def random_batch(size: Size, batch_size: int, spec: ModelSpec) -> Batch:
    """Return a batch as the loader would make it from the cache, in shapes and dtypes."""
    generator = stream(0, "measure")
    shape = (batch_size, LATENT_CHANNELS, 1, size.height // LATENT_PIXELS, size.width // LATENT_PIXELS)
    return Batch(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        t=torch.rand(batch_size, generator=generator),
        text=random_text(batch_size, spec, generator),
        mask=None,
        names=(str(size),) * batch_size,
    )


def random_text(batch_size: int, spec: ModelSpec, generator: torch.Generator) -> TextContext | TextStates:
    """Return what the transformer reads, or what a trained LLM adapter reads."""
    if not spec.trains_llm_adapter:
        width = TransformerShape.of(spec.files.transformer_header.entries).context_width
        return TextContext(torch.randn(batch_size, spec.max_tokens, width, generator=generator).to(spec.dtype), 0)
    shape = LLMAdapterShape.of(spec.files.llm_adapter_header.entries)
    qwen = torch.randn(spec.max_tokens, shape.source_width, generator=generator).to(spec.dtype)
    t5_ids = torch.randint(shape.vocab_size, (spec.max_tokens,), generator=generator)
    return pad_states([EncodedText(qwen, t5_ids)] * batch_size)


def extremes(plan: Plan) -> list[tuple[Size, int]]:
    """Return size and micro-batch size of the cheapest and the dearest bucket, by image tokens; one if equal."""
    buckets = {(sample.size, batch_size_for(plan.batch_sizes, sample.resolution)) for sample in plan.samples}
    ordered = sorted(buckets, key=lambda bucket: (bucket[0].num_tokens * bucket[1], bucket))
    return list(dict.fromkeys((ordered[0], ordered[-1])))


def measure(
    config: Config, spec: ModelSpec, buckets: Sequence[tuple[Size, int]], num_steps: int, encodes_online: bool,
    folds_zeros: bool,
) -> list[Measured]:  # fmt: skip
    """Run the training steps of a run of one process, and take their time and memory; the result is thrown away.

    Latents, noise and text are random, because nothing is cached yet and their values do not change the cost; captions
    have all the tokens that are read. No file is written.

    Args:
        config: the configuration.
        spec: the model.
        buckets: size and micro-batch size of each. The CPU's peak is that of the process so far, so that the cheapest
            bucket must come first.
        num_steps: for each bucket, after one that is not timed: kernels are chosen and blocks compiled in it.
        encodes_online: True if captions are encoded during training: the text encoder is in memory then, but does
            nothing here.
        folds_zeros: True if the text's rows of zeros are counted, False if they are computed.
    """
    accelerator = make_accelerator(config.model.uses_autocast)
    device = accelerator.device
    encoder = None
    try:
        if encodes_online:
            encoder = CaptionEncoder(spec, spec.files.load_tokenizers())
        transformer, groups = load_trained(
            spec, config.adapter, config.learning_rates(), config.seed, config.optimizer.weight_decay,
            block_runner(config.recompute, config.compile, device, config.checkpointed_blocks), config.blocks_to_swap,
        )  # fmt: skip
        transformer.folds_zeros = folds_zeros
        model = accelerator.prepare(transformer, device_placement=[False])
        optimizer, release = build_optimizer(config.optimizer, groups, config.seed, transformer.block_swap)
        update = partial(step_by_block, optimizer, transformer.block_swap, optimizer.step)
        step = training_step(
            model, optimizer, update, release, config.loss(), accelerator, config.gradient_accumulation_steps,
            config.gradient_clipping,
        )  # fmt: skip
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [Measured(size, batch_size, None, peak_bytes(device)) for size, batch_size in buckets]
    measured = []
    for size, batch_size in buckets:
        batch = random_batch(size, batch_size, spec)
        start_peak(device)
        try:
            _, *seconds = [timed(step, batch, device) for _ in range(num_steps + 1)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            measured.append(Measured(size, batch_size, None, peak_bytes(device)))
        else:
            measured.append(Measured(size, batch_size, statistics.median(seconds), peak_bytes(device)))
    del encoder  # was in memory until now
    return measured


def training_step(
    model: nn.Module, optimizer: Optimizer, update: Callable[[], object], release: GradientRelease | None,
    loss_function: Loss, accelerator: Accelerator, num_micro_batches: int, gradient_clipping: float,
) -> Callable[[Batch], None]:  # fmt: skip
    """Return a function that makes one optimizer update as the training loop does, the optimizer's state in memory."""
    # The optimizer's state, which all steps of a run but the first find in memory.
    parameters = []
    for group in optimizer.param_groups:
        parameters.extend(group["params"])
        for parameter in group["params"]:
            if isinstance(optimizer, SplitOptimizer):
                optimizer.start(parameter, group)
            else:
                parameter.grad = torch.zeros_like(parameter)
    if not isinstance(optimizer, SplitOptimizer):
        update()

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)  # here: a step that ran out of memory leaves gradients
        for _ in range(num_micro_batches):
            losses = compute_loss(model, batch.to(accelerator.device), loss_function)
            if release is not None:
                release.begin(~losses.detach().isfinite().all())
            accelerator.backward(losses.mean() / num_micro_batches)
        if release is not None:
            release.end()
            return
        accelerator.clip_grad_norm_(parameters, gradient_clipping or math.inf)
        update()

    return step


def timed(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Return the seconds that a step takes, until the device is done."""
    started = time.perf_counter()
    step(batch)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
