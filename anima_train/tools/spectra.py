"""Singular values of the changes in adapter files, and low-rank factors of matrices."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anima_train.adapters.updates import Parts, kind_of, kronecker_factors, low_rank_factors, product, scale_of
from anima_train.tools.diff import leading_directions

Factors = tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]  # up, down


def singular_values(parts: Parts) -> Float[Tensor, " k"] | None:
    """Return the singular values of the change that parts make, the largest first; those left out are zero.

    DoRA's scale is left out, as it needs the base. None where the change is no matrix.
    """
    kind = kind_of(parts)
    if kind in ("LoRA", "DoRA"):
        return core_of(low_rank_factors(parts))[1]
    if kind == "LoKr":
        first, second = (torch.linalg.svdvals(factor) for factor in kronecker_factors(parts))
        return torch.outer(first, second).flatten().sort(descending=True).values
    if kind == "LoHa":
        up, down = row_products(parts)
        if up.shape[1] < min(len(up), down.shape[1]):
            return core_of((up, down))[1]
    change = product(parts)
    return gram_spectrum(change)[0] if change.dim() == 2 else None


def row_products(parts: Parts) -> Factors:
    """Return factors of a LoHa: (A1 B1) * (A2 B2) is the product of all products of columns of A with rows of B."""
    (a1, b1), (a2, b2) = ((parts[f"hada_{side}_a"].float(), parts[f"hada_{side}_b"].float()) for side in ("w1", "w2"))
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1) * scale_of(parts, len(b1))  # (m, r1 r2)
    return up, (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # (r1 r2, n)


def core_of(factors: Factors) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Return the singular value decomposition of `up @ down`, without making the product."""
    up, down = factors
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u, values, vh @ right.Q.T


def gram_spectrum(matrix: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """Return singular values, the largest first, and the singular vectors of the shorter side as columns.

    From the eigenvalues of the smaller Gram matrix: several times faster than a decomposition, and exact enough for
    values above 1e-3 of the largest.
    """
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0).sqrt().flip(0), vectors.flip(1)


def effective_rank(values: Float[Tensor, " k"]) -> float | None:
    """Return (sum s^2)^2 / sum s^4, which is n for n equal singular values; None if all are zero."""
    squares = values.double().square()
    total = float(squares.sum())
    return total**2 / float(squares.square().sum()) if total else None


def rank_of_energy(values: Float[Tensor, " k"], energy: float) -> int:
    """Return how many of the largest singular values hold this share of the sum of squares; at least 1."""
    squares = values.double().square()
    held = squares.cumsum(0) >= energy * float(squares.sum()) * (1 - 1e-6)
    return int(held.int().argmax()) + 1 if bool(held.any()) else len(values)


@dataclass(frozen=True)
class Limit:
    """The rank that a matrix may have: at most `rank`, and no more than what holds a share of its sum of squares."""

    rank: int | None = None
    energy: float | None = None

    def among(self, values: Float[Tensor, " k"]) -> int:
        """Return how many of these singular values are kept."""
        number = len(values) if self.energy is None else rank_of_energy(values, self.energy)
        return number if self.rank is None else min(self.rank, number)


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank in the place of another one."""

    up: Float[Tensor, "m r"]
    down: Float[Tensor, "r n"]
    error: float  # |D - up down| / |D|


def truncated(matrix: Float[Tensor, "m n"], limit: Limit, name: str) -> LowRank:
    """Return the best factors of a matrix within a limit.

    A rank that is small beside the matrix is found by iteration in a subspace, a hundred times faster, and the error is
    within a percent of the least.

    Args:
        matrix: float32.
        limit: of its rank.
        name: of the matrix, whose random numbers are always the same.
    """
    if limit.energy is None and limit.rank is not None and limit.rank < min(matrix.shape) // 8:
        _, right = leading_directions(matrix, limit.rank, name)
        up, down = balanced(matrix @ right, right.T)
    else:
        values, vectors = gram_spectrum(matrix)
        vectors = vectors[:, : limit.among(values)]
        is_wide = len(matrix) <= matrix.shape[1]
        up, down = balanced(vectors, vectors.T @ matrix) if is_wide else balanced(matrix @ vectors, vectors.T)
    size = float(matrix.norm())
    return LowRank(up, down, float((matrix - up @ down).norm()) / size if size else 0.0)


def truncated_product(factors: Factors, limit: Limit) -> LowRank:
    """Return the best factors of `up @ down` within a limit, without making the product."""
    left, values, right = core_of(factors)
    number = limit.among(values)
    up, down = balanced(left[:, :number] * values[:number], right[:number])
    size = float(values.norm())
    return LowRank(up, down, float(values[number:].norm()) / size if size else 0.0)


def balanced(up: Float[Tensor, "m r"], down: Float[Tensor, "r n"]) -> Factors:
    """Return the factors of the same product with equal norms, which round alike in bfloat16."""
    sizes = float(up.norm()), float(down.norm())
    if not all(sizes):
        return up, down
    factor = math.sqrt(sizes[1] / sizes[0])
    return up * factor, down / factor
