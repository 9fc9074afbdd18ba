"""The change of one weight by the tensors that a file has for it: LoRA, LoKr, LoHa, DoRA, or a whole difference.

Tensors in, tensor out, in float32. ComfyUI applies the same files by these equations; golden weights settle them.
Parts have the names of their keys in files, but for `down` and `up`, which have several.
"""

import math
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Parts = Mapping[str, Tensor]  # name of a part -> its tensor
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
MIDDLES = {"lora_mid.weight", "lokr_t2", "hada_t1", "hada_t2"}  # third factors, of convolutions
NEVER_ROUNDED = ("alpha", "dora_scale")  # lengths of whole rows, of which the change may be a thousandth
MAGNITUDE = "lora_magnitude_vector"  # PEFT's lengths of rows, which ComfyUI does not read
EPS = torch.finfo(torch.float32).eps  # on DoRA's norms


def kind_of(names: Collection[str]) -> str | None:
    """Return the kind of change that these parts make together; None if some of it is missing, or it is another kind.

    Args:
        names: of the parts of one weight.
    """
    found = set(names)
    if found & MIDDLES or any(name.startswith(MAGNITUDE) for name in found):
        return None
    if {"down", "up"} <= found:
        return "DoRA" if "dora_scale" in found else "LoRA"
    if all(f"lokr_{side}" in found or {f"lokr_{side}_a", f"lokr_{side}_b"} <= found for side in ("w1", "w2")):
        return "LoKr"
    if found >= LOHA:
        return "LoHa"
    if found in ({"diff"}, {"set_weight"}):
        return "difference" if "diff" in found else "replacement"
    return None


def change_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of the change that parts make; () where they do not fit each other, None for an unknown kind.

    Args:
        shapes: of the parts of one weight, by name.
    """
    kind = kind_of(shapes)
    if math.prod(shapes.get("alpha", ())) != 1:
        return ()
    if kind in ("LoRA", "DoRA"):
        shape = product_shape(shapes["up"], shapes["down"])
    elif kind == "LoHa":
        first, second = (product_shape(shapes[f"hada_{side}_a"], shapes[f"hada_{side}_b"]) for side in ("w1", "w2"))
        shape = first if first == second else ()
    elif kind == "LoKr":
        first, second = (
            shapes.get(f"lokr_{side}")
            or product_shape(shapes.get(f"lokr_{side}_a", ()), shapes.get(f"lokr_{side}_b", ()))
            for side in ("w1", "w2")
        )
        shape = tuple(a * b for a, b in zip(first, second, strict=True)) if len(first) == len(second) else ()
    else:
        return shapes["diff" if kind == "difference" else "set_weight"] if kind else None
    scale = shapes.get("dora_scale")  # with one side alone ComfyUI would multiply columns by what is of rows
    return shape if scale is None or (shape and scale in ((shape[0], 1), (1, shape[1]))) else ()


def is_for_one_base(parts: Collection[str]) -> bool:
    """Return True if these parts (names) make a change that depends on the weight that it was made for."""
    return "dora_scale" in parts or "set_weight" in parts


def product_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a product of matrices; () if they do not fit."""
    fits = len(left) == len(right) == 2 and left[1] == right[0] and 0 not in (*left, *right)
    return (left[0], right[1]) if fits else ()


def updated(weight: Tensor, parts: Parts, strength: float = 1.0) -> Tensor:
    """Return a weight in float32 after a change of this strength.

    Raises:
        ValueError: as `change`.
    """
    if "set_weight" in parts:
        return expect_shape(parts["set_weight"].float(), weight)  # at any strength, as there
    return weight.float() + strength * change(weight, parts)


def change(weight: Tensor, parts: Parts) -> Tensor:
    """Return the change of a weight at strength 1, in float32: `W' - W`.

    Args:
        weight: of the base, which DoRA and `set_weight` depend on.
        parts: of it.

    Raises:
        ValueError: the parts make no change, or one of another shape than the weight's.
    """
    if "set_weight" in parts:
        return expect_shape(parts["set_weight"].float(), weight) - weight.float()
    found = expect_shape(product(parts), weight)
    if "dora_scale" not in parts:
        return found
    return rescaled(weight.float(), found, parts["dora_scale"].float()) - weight.float()


def rescaled(
    weight: Float[Tensor, "m n"], added: Float[Tensor, "m n"], scale: Float[Tensor, "m 1"] | Float[Tensor, "1 n"]
) -> Float[Tensor, "m n"]:
    """Return DoRA's weight (Liu et al. 2024): by rows `scale (W + D) / ||W||`, by columns `scale (W + D) / ||W + D||`.

    Raises:
        ValueError: the scale has neither a value for each row nor one for each column.
    """
    whole = weight + added
    if scale.shape[0] == len(weight) and scale.numel() == len(weight):
        return whole * scale.reshape(-1, 1) / (weight.norm(dim=1, keepdim=True) + EPS)
    if scale.numel() != weight.shape[1]:
        raise ValueError(f"dora_scale has the shape {tuple(scale.shape)}, and the weight {tuple(weight.shape)}")
    return whole * scale.reshape(1, -1) / (whole.norm(dim=0, keepdim=True) + EPS)


def product(parts: Parts) -> Tensor:
    """Return what the parts of a LoRA, LoKr, LoHa or difference make, with alpha, in float32; DoRA's scale is left out.

    Raises:
        ValueError: they make nothing.
    """
    kind = kind_of(parts)
    if "diff" in parts:
        return parts["diff"].float()
    if kind == "LoKr":
        first, second = kronecker_factors(parts)
        return torch.kron(first, second)
    if kind == "LoHa":
        first, second = (parts[f"hada_{side}_a"].float() @ parts[f"hada_{side}_b"].float() for side in ("w1", "w2"))
        return first * second * scale_of(parts, parts["hada_w1_b"].shape[0])
    if kind is None:
        raise ValueError(f"{', '.join(sorted(parts))}: these make no change that is known here")
    up, down = low_rank_factors(parts)
    return up @ down


def low_rank_factors(parts: Parts) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """Return up, alpha folded in, and down of a LoRA or DoRA, in float32.

    Raises:
        ValueError: they do not fit each other.
    """
    up, down = parts["up"].float(), parts["down"].float()
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != len(down):
        raise ValueError(f"up is {tuple(up.shape)} and down {tuple(down.shape)}, which do not fit each other")
    return up * scale_of(parts, len(down)), down


def kronecker_factors(parts: Parts) -> tuple[Float[Tensor, "a b"], Float[Tensor, "c d"]]:
    """Return both factors of a LoKr, in float32, alpha folded into the second; of two full ones alpha has no effect."""
    rank = None
    factors = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            factors.append(parts[side].float())
        else:
            rank = parts[f"{side}_b"].shape[0]
            factors.append(parts[f"{side}_a"].float() @ parts[f"{side}_b"].float())
    return factors[0], factors[1] * (1.0 if rank is None else scale_of(parts, rank))


def scale_of(parts: Parts, rank: int) -> float:
    """Return alpha / rank; 1 without an alpha."""
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


def expect_shape(found: Tensor, weight: Tensor) -> Tensor:
    """Return the tensor.

    Raises:
        ValueError: its shape is not that of the weight.
    """
    if found.shape != weight.shape:
        raise ValueError(f"the change has the shape {tuple(found.shape)}, and the weight {tuple(weight.shape)}")
    return found
