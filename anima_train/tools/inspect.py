"""The statistics of a file: of the changes in an adapter, or of the tensors in a checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anima_train.adapters.parts import is_adapter, read_adapter
from anima_train.adapters.updates import Parts, kind_of, product
from anima_train.core.format import count
from anima_train.model.file_kinds import uncompiled
from anima_train.model.safetensors_io import open_header, read_tensors
from anima_train.optim.groups import Component
from anima_train.tools.diff import by_block, by_component, open_transformer, row
from anima_train.tools.spectra import effective_rank, singular_values


@dataclass(frozen=True)
class ParameterStats:
    """One change, or one tensor of a checkpoint."""

    name: str
    kind: str  # of change; "" in a checkpoint
    rank: int | None
    num_values: int
    norm: float  # |D|
    spectral: float | None  # the largest singular value
    effective_rank: float | None
    is_dead: bool  # all zero


@dataclass(frozen=True)
class GroupStats:
    """Several of them together."""

    number: int
    num_dead: int
    norm: float
    rms: float  # of all values
    spectral: float | None  # the largest
    effective_rank: float | None  # mean over those that have one

    @classmethod
    def of(cls, parts: Sequence[ParameterStats]) -> "GroupStats":
        """Return the statistics of these together."""
        squared, values = sum(part.norm**2 for part in parts), sum(part.num_values for part in parts)
        ranks = [part.effective_rank for part in parts if part.effective_rank is not None]
        return cls(
            len(parts),
            sum(part.is_dead for part in parts),
            float(squared**0.5),
            float((squared / values) ** 0.5) if values else 0.0,
            max((part.spectral for part in parts if part.spectral is not None), default=None),
            sum(ranks) / len(ranks) if ranks else None,
        )


@dataclass(frozen=True)
class Inspection:
    """The statistics of a file, added up in several ways."""

    path: str
    is_adapter: bool
    metadata: Mapping[str, str]
    whole: GroupStats
    by_component: Mapping[Component, GroupStats]
    by_block: Mapping[str, Mapping[Component, GroupStats]]
    parameters: Sequence[ParameterStats]
    dead: Sequence[str]


def inspect(path: Path, tell: Callable[[str], object] = lambda name: None) -> Inspection:
    """Return the statistics of an adapter of any kind, or of a transformer.

    Args:
        path: of the file.
        tell: gets the name of each weight before it is looked at.

    Raises:
        ModelFileError: it cannot be read, or is of another kind.
    """
    header = uncompiled(open_header(path))
    parts = []
    if is_adapter(header):
        for name, change in read_adapter(path).changes.items():
            tell(name)
            parts.append(change_stats(name, change))
    else:
        for name, tensor in read_tensors(open_transformer(path)):
            tell(name)
            parts.append(tensor_stats(name, tensor))
    return Inspection(
        path.name, is_adapter(header), header.metadata, GroupStats.of(parts),
        by_component(parts, GroupStats.of), by_block(parts, GroupStats.of), parts,
        [part.name for part in parts if part.is_dead],
    )  # fmt: skip


def change_stats(name: str, parts: Parts) -> ParameterStats:
    """Return the statistics of the change that parts make; without DoRA's scale, which needs the base."""
    kind = kind_of(parts) or ""
    if kind == "replacement":
        return tensor_stats(name, parts["set_weight"], kind)
    values = singular_values(parts)
    if values is None:
        return tensor_stats(name, product(parts), kind)
    norm = float(values.double().norm())
    shapes = [parts[key].shape[0] for key in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b") if key in parts]
    return ParameterStats(
        name, kind, shapes[0] if shapes else None, num_values(parts), norm, float(values.max()),
        effective_rank(values), norm == 0,
    )  # fmt: skip


def num_values(parts: Parts) -> int:
    """Return the number of values of the weight that parts change."""
    shapes = {name: tensor if name == "alpha" else tensor.to("meta") for name, tensor in parts.items()}
    return product(shapes).numel()


def tensor_stats(name: str, tensor: Tensor, kind: str = "") -> ParameterStats:
    """Return the statistics of a tensor by itself."""
    norm = float(tensor.float().norm())
    return ParameterStats(name, kind, None, tensor.numel(), norm, None, None, norm == 0)


def table(found: Inspection, num_shown: int = 10) -> Iterator[str]:
    """Yield the lines of an inspection as a table."""
    yield row(("", "number", "dead", "norm", "RMS", "spectral", "rank"))
    for name, group in (("all", found.whole), *found.by_component.items()):
        yield row(cells(name, group))
    yield ""
    yield row(("norms", *found.by_component))
    for block, groups in found.by_block.items():
        norms = (f"{groups[key].norm:.4g}" if key in groups else "-" for key in found.by_component)
        yield row((block or "others", *norms))
    if found.dead:
        yield ""
        yield f"{count(len(found.dead), 'weight')} dead (all zero):"
        yield from (f"  {name}" for name in found.dead[:num_shown])
        if len(found.dead) > num_shown:
            yield f"  ... and {len(found.dead) - num_shown:,} more (`--json` has all)"
    if "DoRA" in {part.kind for part in found.parameters}:
        yield ""
        yield "norms without DoRA's scales, which need the base: `anima diff BASE FILE` tells the whole change"
    if found.metadata:
        yield ""
        yield from (f"{name}: {shortened(text)}" for name, text in sorted(found.metadata.items()))


def cells(name: str, group: GroupStats) -> tuple[str, ...]:
    """Return the cells of a row of the table."""
    spectral = "-" if group.spectral is None else f"{group.spectral:.4g}"
    rank = "-" if group.effective_rank is None else f"{group.effective_rank:.1f}"
    return name, f"{group.number:,}", f"{group.num_dead:,}", f"{group.norm:.4g}", f"{group.rms:.3g}", spectral, rank


def shortened(text: str, length: int = 100) -> str:
    """Return the beginning of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."
