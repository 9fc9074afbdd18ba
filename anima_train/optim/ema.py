"""An exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from anima_train.core.settings import Settings
from anima_train.model.safetensors_io import match_keys

CHUNK = 2**24  # elements updated at once: a bf16 model is not converted to float32 as a whole


class Ema(Settings):
    """A running average of the trained weights, which is steadier than the weights after any one step. Training itself
    goes on with the weights as they are. Takes 4 bytes for each trained parameter."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Share of the average that each step keeps: it covers about the last 1 / (1 - decay) steps. After n steps it is at
    most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage, so that the first weights are soon forgotten:
    until step 9 / (1 - decay), 9000 by default, the average covers about the last ninth of the run, and a larger decay
    would change nothing. Smaller for an average that follows faster."""

    def decay_after(self, num_updates: int) -> float:
        """Return the share that is kept at the update with this number; the first is 1."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates))


class WeightAverage:
    """The running average of some parameters; it begins as what they are now.

    Always in float32: an average in bfloat16 stands still, because what one step adds to it, (1 - decay) times the
    difference, is less than half of the last of its 8 bits. The number of updates is the optimizer's, known from the
    step, so that `tensors` are all there is to save.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Ema) -> None:
        self.settings = settings
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in parameters.items()
        }
        self.chunks = list(chunks(self.tensors.values(), parameters.values()))

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Follow the parameters, `average <- decay average + (1 - decay) parameter`, after an optimizer step.

        Args:
            num_updates: optimizer steps so far, this one included.
        """
        weight = 1 - self.settings.decay_after(num_updates)
        for averages, parameters in self.chunks:
            values = parameters
            if parameters[0].dtype != torch.float32:
                values = [torch.empty_like(average) for average in averages]
                torch._foreach_copy_(values, parameters)
            torch._foreach_lerp_(averages, values, weight)

    def load(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Put back what `tensors` were, exactly; nothing is changed unless all of it fits.

        Args:
            tensors: by name, as they were saved.
            what: begins the message of an error, with the file.

        Raises:
            ModelFileError: they have other names or shapes.
        """
        match_keys(tensors, self.tensors, what)
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the parameters the average's values, rounded to their dtype; afterwards they are bitwise what they were.

        They stay where they are in memory, and the optimizer's state is not touched. Takes as much memory again as the
        parameters do, while it lasts.
        """
        kept = [[parameter.detach().clone() for parameter in parameters] for _, parameters in self.chunks]
        try:
            with torch.no_grad():
                for averages, parameters in self.chunks:
                    torch._foreach_copy_(parameters, averages)
            yield
        finally:
            with torch.no_grad():
                for values, (_, parameters) in zip(kept, self.chunks, strict=True):
                    torch._foreach_copy_(parameters, values)


def chunks(averages: Iterable[Tensor], parameters: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield (averages, parameters) of one dtype and device, about `CHUNK` elements together: few kernels for many.

    `_foreach_copy_` of torch 2.10 takes all that it writes to for the dtype of the first.
    """
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for average, parameter in zip(averages, parameters, strict=True):
        kind = (parameter.dtype, parameter.device)
        chunk = kinds.setdefault(kind, ([], []))
        if chunk[0] and sum(map(torch.numel, chunk[0])) + average.numel() > CHUNK:
            yield chunk
            chunk = kinds[kind] = ([], [])
        chunk[0].append(average)
        chunk[1].append(parameter)
    yield from kinds.values()
