"""An exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool
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
        self.tensors: dict[str, Tensor] = {}
        self.chunks: list[tuple[list[Tensor], list[Tensor]]] = []  # averages, parameters
        self.flat: list[Tensor] = []  # of each chunk, all averages in one
        for names in chunks(parameters):
            members: list[Tensor] = [parameters[name] for name in names]
            flat = torch.cat([parameter.detach().reshape(-1).float() for parameter in members])
            parts = flat.split([parameter.numel() for parameter in members])
            averages = [part.view_as(parameter) for part, parameter in zip(parts, members, strict=True)]
            self.tensors.update(zip(names, averages, strict=True))
            self.chunks.append((averages, members))
            self.flat.append(flat)

    @torch.no_grad()
    def update(self, num_updates: int, skips: Bool[Tensor, ""] | None = None) -> None:
        """Follow the parameters, `average <- decay average + (1 - decay) parameter`, after an optimizer step.

        Args:
            num_updates: optimizer steps so far, this one included.
            skips: where it is True, no bit of the average changes; nothing waits for it.
        """
        weight = 1 - self.settings.decay_after(num_updates)
        for flat, (averages, parameters) in zip(self.flat, self.chunks, strict=True):
            before = None if skips is None else flat.clone()
            values = parameters
            if parameters[0].dtype != torch.float32:
                values = [torch.empty_like(average) for average in averages]
                torch._foreach_copy_(values, parameters)
            torch._foreach_lerp_(averages, values, weight)
            if skips is not None and before is not None:
                torch.where(skips, before, flat, out=flat)

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


def chunks(parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of parameters of one dtype and device, about `CHUNK` elements together: few kernels for many.

    `_foreach_copy_` of torch 2.10 takes all that it writes to for the dtype of the first.
    """
    found: list[list[str]] = []
    sizes: list[int] = []
    places: dict[tuple[torch.dtype, torch.device], int] = {}  # of the chunk that is being filled
    for name, parameter in parameters.items():
        kind = (parameter.dtype, parameter.device)
        if kind not in places or sizes[places[kind]] + parameter.numel() > CHUNK:
            places[kind] = len(found)
            found.append([])
            sizes.append(0)
        found[places[kind]].append(name)
        sizes[places[kind]] += parameter.numel()
    return found
