"""The rules of our optimizers: what one step does to a weight in float32. How it is kept is `optim.split`'s."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anima_train.optim.split import Groups, SplitOptimizer, Storage


class KahanAdamW(SplitOptimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101).

    Bytes per bf16 parameter: 2 for the compensation, and 8 for the moments in float32, 4 in bfloat16, 2 in 8 bits.
    """

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0,
        storage: Storage | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, storage)

    def moment_names(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def rule(
        self, weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], numbers: dict[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:  # fmt: skip
        adamw(weight, gradient, moments, numbers["step"], group)


def adamw(weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], step: Tensor, group: Mapping[str, Any]) -> None:
    """Make AdamW's step."""
    beta1, beta2 = group["betas"]
    mean = moments["exp_avg"].lerp_(gradient, 1 - beta1)
    square = moments["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = square.div(bias_correction(beta2, step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(mean.mul(-group["lr"] / bias_correction(beta1, step)), denominator)


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """Return `1 - beta^step`, in float64 where the device has it."""
    return 1 - beta ** step.to(torch.float32 if step.device.type == "mps" else torch.float64)


class SplitLion(SplitOptimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a running mean. Bytes per bf16 parameter: 2 and 4."""

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float], storage: Storage | None = None
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0}, storage)

    def moment_names(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def rule(
        self, weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], numbers: dict[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:  # fmt: skip
        (beta1, beta2), mean = group["betas"], moments["exp_avg"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(mean.lerp(gradient, 1 - beta1).sign_(), alpha=group["lr"])
        mean.lerp_(gradient, 1 - beta2)


class SplitAdafactor(SplitOptimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with the learning rate that is given, and no first moment.

    Bytes per bf16 parameter of a matrix: 2 for the compensation; the second moment has one number a row and column.
    """

    is_elementwise = False

    def __init__(
        self, params: Groups, lr: float, eps: tuple[float, float], clip_threshold: float, decay_rate: float,
        scale_parameter: bool, storage: Storage | None = None,
    ) -> None:  # fmt: skip
        options = {
            "lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate,
            "scale_parameter": scale_parameter, "weight_decay": 0.0,
        }  # fmt: skip
        super().__init__(params, options, storage)

    def moment_names(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        return () if parameter.ndim > 1 else ("exp_avg_sq",)

    def start(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        super().start(parameter, group)
        if parameter.ndim > 1:
            *rows, columns = parameter.shape
            state = self.state[parameter]
            state["exp_avg_sq_row"] = torch.zeros(*rows, 1, device=parameter.device)
            state["exp_avg_sq_col"] = torch.zeros(*rows[:-1], 1, columns, device=parameter.device)

    def rule(
        self, weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], numbers: dict[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:  # fmt: skip
        smallest, smallest_scale = group["eps"]
        share = numbers["step"] ** group["decay_rate"]  # of this step in the running means
        square = gradient.square() + smallest
        if "exp_avg_sq" in moments:
            update = gradient * moments["exp_avg_sq"].lerp_(square, share).rsqrt()
        else:
            rows = moments["exp_avg_sq_row"].lerp_(square.mean(-1, keepdim=True), share)
            columns = moments["exp_avg_sq_col"].lerp_(square.mean(-2, keepdim=True), share)
            update = gradient * (rows / rows.mean(-2, keepdim=True)).rsqrt_() * columns.rsqrt()
        update /= (root_mean_squares(update) / group["clip_threshold"]).clamp_(min=1)
        rate = group["lr"]
        if group["scale_parameter"]:
            rate = rate * root_mean_squares(weight).clamp_(min=smallest_scale)
        weight.mul_(1 - rate * group["weight_decay"]).sub_(update.mul_(rate))


def root_mean_squares(tensors: Tensor) -> Tensor:
    """Return the root of the mean square of each of several tensors of one shape, in a shape that fits them."""
    return tensors.square().mean(tuple(range(1, tensors.ndim)), keepdim=True).sqrt()


class SplitMuon(SplitOptimizer):
    """Muon (Jordan et al. 2024) for the matrices of the blocks and of adapters, AdamW for everything else.

    The update of a matrix is its momentum with all singular values made about 1, times `0.2 sqrt(max(rows, columns))`,
    so that it is as large as AdamW's and takes its learning rate (Liu et al. 2025, arXiv:2502.16982). Embeddings,
    norms, and the layers around the blocks get AdamW.

    Bytes per bf16 parameter of a matrix: 2 for the compensation and 4.
    """

    is_elementwise = False

    def __init__(
        self, params: Groups, lr: float, momentum: float, betas: tuple[float, float], eps: float,
        storage: Storage | None = None,
    ) -> None:  # fmt: skip
        options = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(params, options, storage)

    def moment_names(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        is_hidden = group.get("decays", True) and group.get("component") != "base"
        return ("momentum",) if parameter.ndim == 2 and is_hidden else ("exp_avg", "exp_avg_sq")

    def rule(
        self, weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], numbers: dict[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:  # fmt: skip
        if "momentum" not in moments:
            adamw(weight, gradient, moments, numbers["step"], group)
            return
        momentum = moments["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalized(gradient.lerp_(momentum, group["momentum"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(weight.shape[1:])))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return `U S V^T` of each matrix, with singular values S of 0.7 to 1.2: five Newton-Schulz steps in bfloat16."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if is_tall else x).float()


class ScheduleFreeAdamW(SplitOptimizer):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682).

    The weights that train, y, are between a sequence z that AdamW moves, and x, its average, which is what is saved,
    evaluated and drawn: `y = (1 - beta1) z + beta1 x`. z is in float32. Bytes per bf16 parameter: 2 and 8.
    """

    numbers: ClassVar[tuple[str, ...]] = ("step", "lr_max", "weight_sum")

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float], eps: float, storage: Storage | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}, storage)

    def moment_names(self, parameter: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg_sq",)

    def start(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        super().start(parameter, group)
        self.state[parameter]["z"] = parameter.detach().float().clone()

    def advance(self, numbers: dict[str, Tensor], group: Mapping[str, Any]) -> dict[str, Tensor]:
        lr_max = numbers["lr_max"].clamp(min=group["lr"])
        return {"step": numbers["step"] + 1, "lr_max": lr_max, "weight_sum": numbers["weight_sum"] + lr_max.square()}

    def rule(
        self, weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], numbers: dict[str, Tensor],
        group: Mapping[str, Any],
    ) -> None:  # fmt: skip
        (beta1, beta2), lr = group["betas"], group["lr"]
        square = moments["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = square.div(bias_correction(beta2, numbers["step"])).sqrt_().add_(group["eps"])
        update = gradient.div_(denominator).add_(weight, alpha=group["weight_decay"])
        share = (numbers["lr_max"].square() / numbers["weight_sum"]).nan_to_num_(0)  # of this step in the average
        weight.lerp_(moments["z"], share).sub_(update * (lr * (1 - beta1 * (1 - share))))
        moments["z"].sub_(update, alpha=lr)

    def averaged(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Return x, in float32."""
        weight, state = self.whole(parameter), self.state[parameter]
        return weight.lerp(state["z"], 1 - 1 / group["betas"][0]) if "z" in state else weight
