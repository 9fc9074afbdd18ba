"""Adapters merged into a checkpoint or into one LoRA, and checkpoints by weights: in float32, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anima_train.adapters.parts import is_adapter, read_adapter
from anima_train.adapters.updates import Parts, is_for_one_base, kind_of, low_rank_factors, product
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.core.format import count
from anima_train.model.file_kinds import open_model
from anima_train.model.safetensors_io import TensorFile, first_five, open_header, read_tensors
from anima_train.model.variants import architecture
from anima_train.tools.outputs import (
    adapter_architecture,
    adapter_depth,
    base_architecture,
    metadata_of,
    save_lora,
    save_streamed,
)
from anima_train.tools.spectra import Limit, LowRank, truncated, truncated_product

Tell = Callable[[str], object]  # gets the name of each weight before it is worked on


@dataclass(frozen=True)
class Source:
    """A file to merge."""

    path: Path
    strength: float | None = None  # None: as it is, or an equal share


@dataclass(frozen=True)
class Merged:
    """The file that a merge has written."""

    kind: str  # "a checkpoint", "a LoRA of rank 32"
    num_changed: int  # weights that the sources change
    errors: Mapping[str, float]  # |D - L| / |D| by module, of a LoRA of lower rank than what it stands for


def merge(
    sources: Sequence[Source], out: Path, into: Path | None = None, rank: int | None = None,
    dtype: torch.dtype | None = None, tell: Tell = lambda name: None,
) -> Merged:  # fmt: skip
    """Merge files of one kind into one file.

    Args:
        sources: adapters of any kind that `adapters/updates.py` knows, or checkpoints.
        out: the file to write.
        into: a checkpoint to which adapters are added.
        rank: of the one LoRA that adapters become; None: the sum of their ranks, which changes nothing.
        dtype: of the file; None: as in the checkpoint, or the widest of the adapters.
        tell: gets the name of each weight before it is worked on.

    Raises:
        ConfigError: the files cannot be merged in this way.
        ModelFileError: a file cannot be read, or does not fit.
    """
    adapters = [is_adapter(open_header(source.path)) for source in sources]
    if any(adapters) and not all(adapters):
        lora, model = (sources[adapters.index(kind)].path for kind in (True, False))
        raise ConfigError(
            f"{lora} is an adapter, and {model} is none; give the checkpoint to which adapters are added as --into"
        )
    if all(adapters) and into is not None:
        if rank is not None:
            raise ConfigError("--rank has no effect with --into, which merges adapters as they are; leave it out")
        return merge_into(into, sources, out, dtype, tell)
    if all(adapters):
        return merge_adapters(sources, out, None if rank is None else Limit(rank), dtype, tell)
    if into is not None or rank is not None:
        option = "--into" if into is not None else "--rank"
        raise ConfigError(f"{option} is for adapters, and {sources[0].path} is none; leave it out")
    return merge_checkpoints(sources, out, dtype, tell)


def shapes_of(file: TensorFile, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of a file on the meta device, in another dtype if one is given."""
    return {
        name: torch.empty(entry.shape, dtype=dtype or entry.dtype, device="meta")
        for name, entry in file.entries.items()
    }


def merge_into(
    base: Path, sources: Sequence[Source], out: Path, dtype: torch.dtype | None, tell: Tell = lambda name: None
) -> Merged:
    """Add adapters to a checkpoint, one after the other; arguments as of `merge`."""
    file, prefix = open_model(base)
    parameters = [name.removeprefix(prefix) for name in file.entries]
    adapters = [(read_adapter(source.path, parameters), strength_of(source)) for source in sources]
    changed = {name for adapter, _ in adapters for name in adapter.changes}
    shapes = shapes_of(file, dtype)

    def make(name: str) -> Tensor:
        tell(name)
        ((_, tensor),) = read_tensors(file, [name])
        bare = name.removeprefix(prefix)
        if bare not in changed:
            return tensor.to(shapes[name].dtype)
        for adapter, strength in adapters:
            if bare in adapter.changes:
                tensor = adapter.updated(bare, tensor, strength)
        return tensor.to(shapes[name].dtype)

    save_streamed(out, shapes, model_metadata(out, file, prefix, {"merge": told(sources), "into": base.name}), make)
    return Merged("a checkpoint", len(changed), {})


def model_metadata(path: Path, first: TensorFile, prefix: str, origin: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a checkpoint that is made of others, of which this is the first, with its prefix."""
    made = base_architecture(first.stripped(prefix).entries, first.metadata)
    return metadata_of(made, path, origin, first.metadata)


def strength_of(source: Source) -> float:
    """Return the strength of an adapter."""
    return 1.0 if source.strength is None else source.strength


def told(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the sources as the metadata tell them."""
    return [{"file": source.path.name, "strength": source.strength} for source in sources]


def merge_checkpoints(
    sources: Sequence[Source], out: Path, dtype: torch.dtype | None, tell: Tell = lambda name: None
) -> Merged:
    """Add up checkpoints by weights whose sum is 1; arguments as of `merge`. The first gives keys and dtypes."""
    weights = shares(sources)
    files = [open_model(source.path) for source in sources]
    file, prefix = files[0]
    for other, other_prefix in files[1:]:
        expect_same(file.stripped(prefix), other.stripped(other_prefix))
    shapes = shapes_of(file, dtype)

    def make(name: str) -> Tensor:
        tell(name)
        total = torch.zeros(shapes[name].shape)
        for (each, each_prefix), weight in zip(files, weights, strict=True):
            ((_, tensor),) = read_tensors(each, [each_prefix + name.removeprefix(prefix)])
            total += weight * tensor.float()
        return total.to(shapes[name].dtype)

    named = [Source(source.path, weight) for source, weight in zip(sources, weights, strict=True)]
    save_streamed(out, shapes, model_metadata(out, file, prefix, {"merge": told(named)}), make)
    return Merged("a checkpoint", len(file.entries), {})


def shares(sources: Sequence[Source]) -> list[float]:
    """Return the weight of each checkpoint.

    Raises:
        ConfigError: only some have one, or the sum is not 1.
    """
    given = [source.strength for source in sources if source.strength is not None]
    if len(sources) < 2:
        raise ConfigError(f"{sources[0].path}: one checkpoint alone; give at least two to merge by weights")
    if not given:
        return [1 / len(sources)] * len(sources)
    if len(given) < len(sources) or abs(sum(given) - 1) > 1e-3:
        found = f"{sum(given):g}" if len(given) == len(sources) else f"weights for {len(given)} of {len(sources)}"
        raise ConfigError(
            f"the weights of checkpoints sum up to 1, found {found}; write each, such as a.safetensors:0.7 "
            "b.safetensors:0.3, or none for equal shares"
        )
    given = [each / sum(given) for each in given]
    return given


def expect_same(base: TensorFile, other: TensorFile) -> None:
    """Raise ModelFileError unless two checkpoints have the same tensors, in the same shapes."""
    shapes, others = ({name: entry.shape for name, entry in file.entries.items()} for file in (base, other))
    if names := sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name)):
        raise ModelFileError(
            f"{other.path}: {count(len(names), 'tensor')} not as in {base.path}: {first_five(names)}; only "
            "checkpoints of one shape can be merged"
        )


def merge_adapters(
    sources: Sequence[Source], out: Path, limit: Limit | None, dtype: torch.dtype | None, tell: Tell = lambda name: None
) -> Merged:
    """Make one LoRA of adapters, beside each other or the best within a limit of rank; arguments as of `merge`."""
    adapters = [(read_adapter(source.path), strength_of(source)) for source in sources]
    found, errors = {}, {}
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter.changes):
        tell(name)
        changes = [
            (adapter.path, adapter.changes[name], strength) for adapter, strength in adapters if name in adapter.changes
        ]
        module = name.removesuffix(".weight")
        found[module] = joined(name, changes, limit)
        if limit is not None:
            errors[module] = found[module].error
    precision = dtype or max(
        (t.dtype for a, _ in adapters for parts in a.changes.values() for key, t in parts.items() if key != "alpha"),
        key=lambda kind: kind.itemsize,
    )
    origin = {"merge": told(sources)} | ({} if limit is None else vars(limit))
    depth = max(adapter_depth(adapter.changes, adapter.metadata) for adapter, _ in adapters)
    architectures = {adapter_architecture(depth, adapter.metadata) for adapter, _ in adapters}
    made = architectures.pop() if len(architectures) == 1 else architecture(depth, is_adapter=True)
    save_lora(out, found, precision, made, origin, adapters[0][0].metadata if len(adapters) == 1 else {})
    ranks = sorted({len(factors.down) for factors in found.values()})
    kind = f"a LoRA of rank {ranks[0]}" if len(ranks) == 1 else f"a LoRA of ranks {ranks[0]} to {ranks[-1]}"
    return Merged(kind, len(found), errors)


def joined(name: str, changes: Sequence[tuple[Path, Parts, float]], limit: Limit | None) -> LowRank:
    """Return the factors of the sum of changes of one weight.

    Args:
        name: of the parameter.
        changes: file, parts and strength of each.
        limit: of the rank; None: the factors of all beside each other.

    Raises:
        ConfigError: a change is of a kind that a LoRA of this rank cannot hold.
    """
    kinds = [kind_of(parts) for _, parts, _ in changes]
    for (path, parts, _), kind in zip(changes, kinds, strict=True):
        if is_for_one_base(parts):
            raise ConfigError(
                f"{path}: {name} is a {kind}, whose values hold for its base alone; make a LoRA of it with "
                f"`anima extract BASE {path.name}`"
            )
        if kind != "LoRA" and limit is None:
            raise ConfigError(f"{path}: {name} is a {kind}, which has no factors to put beside others; give --rank")
    try:
        if all(kind == "LoRA" for kind in kinds):
            pairs = [(low_rank_factors(parts), strength) for _, parts, strength in changes]
            up = torch.cat([strength * up for (up, _), strength in pairs], dim=1)
            down = torch.cat([down for (_, down), _ in pairs])
            return LowRank(up, down, 0.0) if limit is None else truncated_product((up, down), limit)
        total = sum((strength * product(parts) for _, parts, strength in changes), start=torch.zeros(()))
    except (ValueError, RuntimeError) as error:
        files = ", ".join(str(path) for path, _, _ in changes)
        raise ModelFileError(f"{files}: {name}: the changes do not fit each other ({error})") from error
    if total.dim() != 2:
        raise ConfigError(f"{changes[0][0]}: {name} is no matrix, and a LoRA holds none but those; merge it --into one")
    return truncated(total, limit or Limit(), name)
