"""The LoRA that a run begins with: read from a file, fitted into the rank of the run, and told."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from anima_train.adapters.lora import Lora, lora_layers
from anima_train.adapters.read import Shapes, Updates, read_lora
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.format import count, printable
from anima_train.model.safetensors_io import first_five, open_header
from anima_train.model.variants import family_warning

KEY = "adapter.init_from_existing"
FILES = ("adapter_model.safetensors", "weights.safetensors")  # in the folders of other trainers, and of our states


@dataclass(frozen=True)
class InitialLora:
    """A LoRA whose part that is trained fits into the run's; nothing of it is loaded yet."""

    path: Path
    updates: Updates  # of the modules that the run trains
    left_out: Sequence[str]  # modules of the file that it does not train
    absent: Sequence[str]  # modules that it trains, and that the file lacks
    settings: Lora
    family_warning: str | None  # of a file that was made for other models

    @property
    def lines(self) -> list[str]:
        """The file and what is taken from it, for the terminal."""
        name = printable(self.path.name)
        ranks = sorted({len(update.down) for update in self.updates.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text = f"{KEY}: begins with {name}, {rank} of {self.settings.rank}, {count(len(self.updates), 'module')}"
        scales = sorted(
            (update.scale, own)
            for name, update in self.updates.items()
            if update.scale != (own := self.settings.scale_of(name))
        )
        if scales:
            text += f"; its scale of {scales[-1][0]:g} instead of {scales[-1][1]:g} goes into lora_B"
        if self.settings.dtype == "bfloat16" and not all(map(self.fits_bfloat16, self.updates)):
            text += "; rounded to bfloat16 (adapter.dtype)"
        lines = [text]
        if self.absent:
            modules = count(len(self.absent), "trained module")
            lines.append(f"{KEY}: {modules} not in {name}, begin at zero: {first_five(self.absent)}")
        return lines

    def fits_bfloat16(self, name: str) -> bool:
        """Return True if bfloat16 holds what is loaded of a module exactly, as far as dtypes and scale tell."""
        update = self.updates[name]
        # A product with a power of two, or with zero, is exact.
        mantissa, _ = math.frexp(update.scale / self.settings.scale_of(name))
        return abs(mantissa) in (0, 0.5) and update.down.dtype == update.up.dtype == torch.bfloat16

    @property
    def warnings(self) -> list[str]:
        """The part of the file that is lost, and other models that it was made for."""
        found = [] if self.family_warning is None else [f"{KEY}: {printable(self.family_warning)}"]
        if self.left_out:
            modules = count(len(self.left_out), "module")
            found.append(
                f"{KEY}: {modules} of {printable(self.path.name)} not trained here, left out: "
                f"{first_five(self.left_out)}; the run begins without their part (a learning rate of 0, in [model], "
                "freezes a component, and target_modules, in [adapter], chooses modules)"
            )
        return found

    @property
    def described(self) -> list[str]:
        """The lines, and the warnings as some of them."""
        return [*self.lines, *(f"warning: {text}" for text in self.warnings)]

    @torch.no_grad()
    def load(self, transformer: nn.Module) -> None:
        """Put it into the layers: the model computes what it computes with the file, whatever rank and alpha are here.

        Of a larger rank, the rows of A that the file does not have stay random, and the columns of B zero.

        Raises:
            ModelFileError: the numbers do not fit into the dtype of the layers.
        """
        for name, layer in lora_layers(transformer):
            if (update := self.updates.get(name)) is None:
                continue
            rank = len(update.down)
            layer.lora_A[:rank] = update.down.to(layer.lora_A)
            layer.lora_B[:, :rank] = (update.up.float() * (update.scale / layer.scale)).to(layer.lora_B)
            if not bool(torch.isfinite(layer.lora_A).all() & torch.isfinite(layer.lora_B).all()):
                raise ModelFileError(f"{self.path}: {name} with its scale of {update.scale:g} is not finite; broken")


def read_initial(path: Path, shapes: Shapes, trained: Sequence[str], settings: Lora, family: str) -> InitialLora:
    """Read a LoRA for a run to begin with.

    Args:
        path: a safetensors file in any keys that `read_lora` reads, or a folder with one.
        shapes: of every linear's weight.
        trained: names of the modules that the run trains.
        settings: of the run's LoRA.
        family: of the run's model.

    Raises:
        ConfigError: its rank is larger than the run's, or the run trains none of its modules.
        ModelFileError: it cannot be read, or is of another model.
    """
    path = lora_file(path)
    updates = read_lora(path, shapes)
    taken = {name: updates[name] for name in trained if name in updates}
    name = printable(str(path))
    if not taken:
        raise ConfigError(
            f"{KEY}: the run trains none of the {count(len(updates), 'module')} of {name}: "
            f"{first_five(list(updates))}; give their component a learning rate above 0, in [model], or remove the key"
        )
    short = [module for module, update in taken.items() if len(update.down) > settings.rank_of(module)]
    if short:
        widest = max(short, key=lambda module: len(taken[module].down))
        rank, own = len(taken[widest].down), settings.rank_of(widest)
        where = "adapter.rank" if own == settings.rank else f"by adapter.rank_pattern that of {widest}"
        raise ConfigError(
            f"{KEY}: {name} has rank {rank}, and {where} is {own}, which cannot hold it; write "
            f"rank = {rank}, in [adapter]"
        )
    left_out = [name for name in updates if name not in taken]
    absent = [name for name in trained if name not in taken]
    warning = family_warning(path.name, open_header(path).metadata, family)
    return InitialLora(path, taken, left_out, absent, settings, warning)


def lora_file(path: Path) -> Path:
    """Return the LoRA's file: the path itself, or the one file that a folder has, as diffusion-pipe saves them.

    Raises:
        ConfigError: the folder has none, or several.
    """
    if not path.is_dir():
        return path
    found = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    known = [name for name in FILES if name in found]
    if known or len(found) == 1:
        return path / (known or found)[0]
    has = f"{len(found)} .safetensors files: {first_five(found)}" if found else "no .safetensors file"
    raise ConfigError(f"{KEY}: the folder {printable(str(path))} has {printable(has)}; name a LoRA's file")
