"""The random or chosen matrices that adapters begin with."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anima_train.core.random import stream

Init = Literal["kaiming", "orthogonal", "svd"]

OVERSAMPLED = 8  # columns beside those asked for, which make the leading ones exact
ITERATIONS = 6


def uniform(seed: int, name: str, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Return a Kaiming-uniform matrix (a = sqrt 5, of its columns), from a stream of its own per name."""
    draw = torch.rand((rows, columns), generator=stream(seed, "lora", name))
    return (draw * 2 - 1).mul_(1 / math.sqrt(columns))


def down_matrix(init: Init, rank: int, weight: Float[Tensor, "out in"], seed: int, name: str) -> Tensor:
    """Return A of a LoRA, (rank, in): rows of length 1 for "orthogonal" and "svd", of about 0.58 for "kaiming".

    Args:
        init: "kaiming": uniform; "orthogonal": rows at right angles; "svd": leading right singular vectors of the
            weight, directions of inputs that it passes on most, and uniform rows where it has fewer of them than rank.
        rank: number of rows.
        weight: of the linear; on the meta device, its shape.
        seed: of the random ones.
        name: of the linear in the transformer.
    """
    columns = weight.shape[1]
    if init == "orthogonal":
        return nn.init.orthogonal_(torch.empty(rank, columns), generator=stream(seed, "lora", name))
    if init == "kaiming" or weight.is_meta:
        return uniform(seed, name, rank, columns)
    leading = right_singular_vectors(weight, rank, seed, name)
    if len(leading) == rank:
        return leading
    return torch.cat([leading, uniform(seed, name, rank - len(leading), columns).to(leading)])


@torch.no_grad()
def right_singular_vectors(weight: Float[Tensor, "out in"], number: int, seed: int, name: str) -> Float[Tensor, "n in"]:
    """Return the leading right singular vectors of a weight in float32, by subspace iteration (arXiv:0909.4061)."""
    matrix = weight.float()
    width = min(number + OVERSAMPLED, *matrix.shape)
    start = torch.randn((matrix.shape[1], width), generator=stream(seed, "svd", name)).to(matrix.device)
    basis = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis).Q).Q
    inside = torch.linalg.svd(matrix @ basis, full_matrices=False).Vh  # (width, width), in the basis
    return (inside @ basis.t())[: min(number, *matrix.shape)]
