"""The difference of two checkpoints, or what an adapter adds to one: how much, where, and along which directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from anima_train.adapters.parts import Adapter, is_adapter, read_adapter
from anima_train.core.errors import ModelFileError
from anima_train.core.format import count
from anima_train.core.random import stream
from anima_train.model.file_kinds import open_model, open_slot
from anima_train.model.safetensors_io import TensorFile, first_five, read_tensors
from anima_train.optim.groups import COMPONENTS, Component, block_of, component_of

OVERSAMPLING, ITERATIONS = 8, 3  # of the search for leading directions (Halko, Martinsson and Tropp, 2011)


@dataclass(frozen=True)
class TensorChange:
    """The change D of one tensor W; sums over its values, so that several can be added up."""

    name: str
    num_values: int
    num_moved: int  # values that are others, in the dtype of the base
    squared: float  # |D|^2
    base_squared: float  # |W|^2
    fourth: float | None  # |D'D|^2, of a matrix
    outside: float | None  # |D|^2 outside of the leading directions of W on both sides; None where not asked for


@dataclass(frozen=True)
class Change:
    """The change of several tensors together."""

    num_values: int
    relative: float  # |D| / |W|
    moved: float  # share of the values
    effective_rank: float | None  # mean over the changed matrices of |D|^4 / |D'D|^2: n for n equal singular values
    interference: float | None  # share of |D|^2 in the leading directions of W, on either side

    @classmethod
    def of(cls, parts: Sequence[TensorChange]) -> "Change":
        """Return the change of these tensors together."""
        squared, values = sum(part.squared for part in parts), sum(part.num_values for part in parts)
        base = sum(part.base_squared for part in parts)
        ranks = [part.squared**2 / part.fourth for part in parts if part.fourth]
        known = [part for part in parts if part.outside is not None]
        inside = sum(part.squared - (part.outside or 0.0) for part in known)
        known_squared = sum(part.squared for part in known)
        return cls(
            values,
            (squared / base) ** 0.5 if base else 0.0,
            sum(part.num_moved for part in parts) / values if values else 0.0,
            sum(ranks) / len(ranks) if ranks else None,
            max(0.0, inside / known_squared) if known_squared else None,
        )


@dataclass(frozen=True)
class Difference:
    """The changes between two files, added up in several ways."""

    base: str
    other: str
    directions: int  # leading ones of each base matrix that count for `interference`; 0: not asked for
    whole: Change
    by_component: Mapping[Component, Change]
    by_block: Mapping[str, Mapping[Component, Change]]  # block -> component -> change
    largest: Sequence[tuple[str, Change]]  # tensors, that with the largest relative change first


class Named(Protocol):
    """A value about one tensor of a model."""

    @property
    def name(self) -> str:
        """The tensor's name."""


Part = TypeVar("Part", bound=Named)
Total = TypeVar("Total")
# Computes the change of a tensor, in float32, and how many of its values are others, from its name, its value in
# float32, and the dtype that it has in the file.
Delta = Callable[[str, Tensor, torch.dtype], tuple[Tensor, int]]


def difference(
    base_path: Path, other_path: Path, directions: int = 16, num_largest: int = 20,
    tell: Callable[[str], object] = lambda name: None,
) -> Difference:  # fmt: skip
    """Compare two checkpoints tensor by tensor, or look at what an adapter adds to one.

    Args:
        base_path: a transformer, with the LLM adapter inside or without.
        other_path: another one with the same tensors, or an adapter of any kind.
        directions: leading ones of each base matrix in which changes count as interference; 0 leaves that out.
        num_largest: tensors to name.
        tell: gets the name of each tensor before it is compared.

    Raises:
        ModelFileError: a file cannot be read, is of another kind, or does not fit.
    """
    if is_adapter(open_slot(base_path, "transformer")):
        raise ModelFileError(f"{base_path}: is an adapter; the checkpoint that it is for comes first, and it second")
    base = open_transformer(base_path)
    delta = delta_of(base, other_path)
    parts = []
    for name, tensor in read_tensors(base):
        tell(name)
        parts.append(tensor_change(name, tensor, delta, directions))
    each = [(part.name, Change.of([part])) for part in parts if part.squared]
    return Difference(
        base_path.name, other_path.name, directions, Change.of(parts), by_component(parts, Change.of),
        by_block(parts, Change.of), sorted(each, key=lambda pair: -pair[1].relative)[:num_largest],
    )  # fmt: skip


def by_component(parts: Sequence[Part], total: Callable[[Sequence[Part]], Total]) -> dict[Component, Total]:
    """Return what parts are together, for each component that there is."""
    found = {key: [part for part in parts if component_of(part.name) == key] for key in COMPONENTS}
    return {key: total(group) for key, group in found.items() if group}


def by_block(parts: Sequence[Part], total: Callable[[Sequence[Part]], Total]) -> dict[str, dict[Component, Total]]:
    """Return the same for each block: numbers first, then "llm_adapter", or "" for what is in none."""
    blocks = sorted({block_of(part.name) for part in parts}, key=lambda name: (not name.isdecimal(), name.zfill(4)))
    return {block: by_component([part for part in parts if block_of(part.name) == block], total) for block in blocks}


def open_transformer(path: Path) -> TensorFile:
    """Return the tensors of a transformer file, without prefix and buffers."""
    file, prefix = open_model(path)
    return file.stripped(prefix)


def delta_of(base: TensorFile, path: Path) -> Delta:
    """Return what computes the change of a tensor: of the other checkpoint, or of an adapter."""
    if is_adapter(open_slot(path, "transformer")):
        return adapter_delta(read_adapter(path, base.entries))
    other = open_transformer(path)
    for problem, names in (
        ("lacks", base.entries.keys() - other.entries.keys()),
        ("has besides", other.entries.keys() - base.entries.keys()),
        ("has in another shape", {
            name for name, entry in base.entries.items()
            if name in other.entries and other.entries[name].shape != entry.shape
        }),
    ):  # fmt: skip
        if names:
            raise ModelFileError(
                f"{path}: {problem} {count(len(names), 'tensor')} of {base.path}: {first_five(sorted(names))}"
            )

    def delta(name: str, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        ((_, new),) = read_tensors(other, [name])
        found = new.float() - value
        return found, int(found.count_nonzero())

    return delta


def adapter_delta(adapter: Adapter) -> Delta:
    """Return what computes the change of a tensor by an adapter at strength 1, as if it were merged."""

    def delta(name: str, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        if name not in adapter.changes:
            return torch.zeros_like(value), 0
        found = adapter.change(name, value)
        return found, int(((value + found).to(dtype) != value.to(dtype)).sum())

    return delta


def tensor_change(name: str, tensor: Tensor, delta: Delta, directions: int) -> TensorChange:
    """Return the change of one tensor."""
    value = tensor.float()
    change, num_moved = delta(name, value, tensor.dtype)
    squared = float(change.square().sum())
    fourth = outside = None
    if change.dim() == 2 and squared:
        gram = change.T @ change if change.shape[0] >= change.shape[1] else change @ change.T
        fourth = float(gram.square().sum())
        if directions:
            left, right = leading_directions(value, directions, name)
            rest = change - left @ (left.T @ change)
            outside = float((rest - (rest @ right) @ right.T).square().sum())
    return TensorChange(
        name, value.numel(), num_moved, squared, float(value.square().sum()), fourth, outside
    )  # fmt: skip


def leading_directions(
    matrix: Float[Tensor, "m n"], number: int, name: str
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]]:
    """Return the singular vectors, left and right, of the largest singular values, by iteration in a random subspace.

    Args:
        matrix: float32.
        number: of directions; at most as many as there are.
        name: of the matrix, whose random numbers are always the same.
    """
    number = min(number, *matrix.shape)
    width = min(number + OVERSAMPLING, *matrix.shape)
    right = torch.randn(matrix.shape[1], width, generator=stream(0, "directions", name))
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(matrix @ right).Q
        right = torch.linalg.qr(matrix.T @ left).Q
    left = torch.linalg.qr(matrix @ right).Q
    u, _, vh = torch.linalg.svd(left.T @ matrix, full_matrices=False)
    return left @ u[:, :number], vh[:number].T


def table(found: Difference) -> Iterator[str]:
    """Yield the lines of a difference as a table."""
    columns = ("", "relative", "moved", "rank", f"in top {found.directions}")
    rows = [("all", found.whole), *found.by_component.items()]
    yield row(columns[: 5 if found.directions else 4])
    for name, change in rows:
        yield row(cells(name, change)[: 5 if found.directions else 4])
    yield ""
    yield row(("block", *found.by_component))
    for block, changes in found.by_block.items():
        yield row((block or "others", *(share(changes.get(key)) for key in found.by_component)))
    if found.largest:
        yield ""
        yield "largest relative changes:"
        yield from (f"  {share(change):>9}  {name}" for name, change in found.largest[:5])


def cells(name: str, change: Change) -> tuple[str, ...]:
    """Return the cells of a row of the table."""
    rank = "-" if change.effective_rank is None else f"{change.effective_rank:.1f}"
    inside = "-" if change.interference is None else f"{change.interference:.1%}"
    return name, share(change), f"{change.moved:.1%}", rank, inside


def share(change: Change | None) -> str:
    """Return a relative change as text."""
    return "-" if change is None else f"{change.relative:.3%}"


def row(texts: Iterable[str]) -> str:
    """Return a line of the table."""
    first, *others = texts
    return f"{first:<12}" + "".join(f"{text:>13}" for text in others)
