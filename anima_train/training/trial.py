"""The largest micro-batch of a run, tried before its first step: what cannot fit fails in seconds, not after hours."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from anima_train.config.load import LoadedConfig
from anima_train.core.conditions import CONTEXT_ROWS, EncodedText, TextStates, pad_states
from anima_train.core.random import stream
from anima_train.data.buckets import Size
from anima_train.data.loader import Batch
from anima_train.data.plan import Plan
from anima_train.model.llm_adapter import LLMAdapterShape
from anima_train.model.text import MAX_TOKENS
from anima_train.model.vae import LATENT_CHANNELS
from anima_train.optim.optimizers import AnyOptimizer, Groups
from anima_train.tools.report_costs import PIXELS_PER_LATENT
from anima_train.training.evaluate import EvalSet
from anima_train.training.memory import Shape, start_peak
from anima_train.training.model import DTYPES, ModelFiles
from anima_train.training.objective import compute_loss


def largest_shapes(plan: Plan, num_epochs: int, evals: Iterable[EvalSet]) -> list[Shape]:
    """The micro-batch that needs most memory in training, and that in evaluation if there is any."""
    trained = [
        Shape(resolution, size, number) for (resolution, size), number in plan.largest_batches(num_epochs).items()
    ]
    evaluated = []
    for eval_set in evals:
        for indices in eval_set.batches():
            sample = eval_set.data.samples[indices[0]]
            evaluated.append(Shape(sample.resolution, sample.size, len(indices), is_evaluation=True))
    return [max(shapes, key=lambda shape: shape.cost) for shapes in (trained, evaluated) if shapes]


def try_shape(
    shape: Shape, loaded: LoadedConfig, files: ModelFiles, model: nn.Module, optimizer: Optimizer,
    accelerator: Accelerator,
) -> None:  # fmt: skip
    """Run the forward pass on random values and, unless it is an evaluation's, the backward pass.

    In memory is what training will hold, too: the optimizer's state, and the gradients of a step's earlier
    micro-batches. All of it is dropped again: weights, optimizer and later steps are as if this had not been. The
    process does this alone: none waits for another.
    """
    device = accelerator.device
    start_peak(device)
    # Without what exchanges gradients, but with autocast.
    transformer = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    held = [] if optimizer.state else state_like(loaded.config.optimizer, optimizer.param_groups)
    batch = random_batch(loaded, files, shape.size, shape.batch_size).to(device)
    loss_function = loaded.config.loss()
    if shape.is_evaluation:
        transformer.eval()
        with torch.no_grad():
            compute_loss(transformer, batch, loss_function)
        transformer.train()
    else:
        if loaded.config.gradient_accumulation_steps > 1:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        accelerator.backward(compute_loss(transformer, batch, loss_function).mean())
    optimizer.zero_grad(set_to_none=True)
    del held  # was in memory until now


def state_like(settings: AnyOptimizer, groups: Groups) -> list[Tensor]:
    """Tensors that take the memory of an optimizer's state: the state of updates to copies, one parameter at a time."""
    state: list[Tensor] = []
    for group in groups:
        for parameter in group["params"]:
            copy = nn.Parameter(torch.zeros_like(parameter))
            copy.grad = torch.zeros_like(copy)
            optimizer = settings.build([{**group, "params": [copy]}])
            optimizer.step()
            state.extend(value for value in optimizer.state[copy].values() if isinstance(value, Tensor))
    return state


def random_batch(loaded: LoadedConfig, files: ModelFiles, size: Size, batch_size: int) -> Batch:
    """A batch as the loader would make it from the cache, in shapes and dtypes."""
    generator = stream(loaded.config.seed, "measure")
    shape = (batch_size, LATENT_CHANNELS, 1, size.height // PIXELS_PER_LATENT, size.width // PIXELS_PER_LATENT)
    return Batch(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        t=torch.rand(batch_size, generator=generator),
        text=random_text(loaded, files, batch_size, generator),
        mask=None,
        names=(str(size),) * batch_size,
    )


def random_text(
    loaded: LoadedConfig, files: ModelFiles, batch_size: int, generator: torch.Generator
) -> Tensor | TextStates:
    """The frozen LLM adapter's output, or what a trained one reads."""
    dtype = DTYPES[loaded.config.model.dtype]
    shape = LLMAdapterShape.of(files.adapter_header.entries)
    if loaded.config.learning_rates().by_component["llm_adapter"] == 0:
        return torch.randn(batch_size, CONTEXT_ROWS, shape.target_width, generator=generator).to(dtype)
    qwen = torch.randn(MAX_TOKENS, shape.source_width, generator=generator).to(dtype)
    t5_ids = torch.randint(shape.vocab_size, (MAX_TOKENS,), generator=generator)
    return pad_states([EncodedText(qwen, t5_ids)] * batch_size)
