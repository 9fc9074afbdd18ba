"""Parameter groups: the component of each parameter, its learning rate, and its weight decay."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Component = Literal["self_attn", "cross_attn", "mlp", "mod", "llm_adapter", "base"]
COMPONENTS: tuple[Component, ...] = ("self_attn", "cross_attn", "mlp", "mod", "llm_adapter", "base")
# First match on the full name wins. `adaln_modulation_self_attn` is mod: it has no dot before `self_attn`.
PATTERNS: tuple[tuple[str, Component], ...] = (
    ("llm_adapter", "llm_adapter"),
    (".self_attn", "self_attn"),
    (".cross_attn", "cross_attn"),
    (".mlp", "mlp"),
    (".adaln_modulation", "mod"),
)


def component_of(name: str) -> Component:
    """Return the component of a parameter or module, by its full name in the transformer."""
    return next((component for pattern, component in PATTERNS if pattern in name), "base")


def block_of(name: str) -> str:
    """Return the block of a parameter: a number, "llm_adapter", or "" for what is in none."""
    parts = name.split(".")
    return "llm_adapter" if component_of(name) == "llm_adapter" else parts[1] if parts[0] == "blocks" else ""


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of each component before the schedule; 0 freezes it."""

    by_component: Mapping[Component, float]
    by_pattern: Sequence[tuple[str, float]] = ()  # of modules of a LoRA, by an expression over the full name
    b_ratio: float = 1.0  # of a LoRA's B, to the rate of its A

    def of(self, name: str) -> float:
        """Return the learning rate of a parameter, by its full name in the transformer."""
        module = name.rpartition(".")[0]
        own = (rate for pattern, rate in self.by_pattern if re.fullmatch(pattern, module))
        rate = next(own, self.by_component[component_of(name)])
        return rate * self.b_ratio if name.endswith(".lora_B") else rate

    def is_frozen(self, name: str) -> bool:
        """Return True if a parameter or module gets no update at all."""
        return self.by_component[component_of(name)] == 0


def optimizer_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], rates: LearningRates, weight_decay: float
) -> list[dict[str, Any]]:
    """Return torch parameter groups for the trainable parameters: one per component, split where nothing decays,
    and where a learning rate is another one.

    1-D parameters (norms, biases) and embeddings get no weight decay. Each group carries `component` and `base_lr`,
    from which the loop sets `lr` at every step, and `decays`.
    """
    groups: dict[tuple[Component, bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith("embed.weight")
            groups[component_of(name), decays, rates.of(name)].append(parameter)
    return [
        {
            "params": groups[component, decays, rate],
            "component": component,
            "base_lr": rate,
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
            "decays": decays,
        }
        for component, decays, rate in sorted(groups, key=lambda key: (COMPONENTS.index(key[0]), not key[1], key[2]))
    ]


@dataclass(frozen=True)
class GroupRow:
    """A line of the table printed before training."""

    component: Component
    lr: float
    num_modules: int
    num_parameters: int
    lowest: float | None = None  # learning rate of any of these parameters; None: lr
    highest: float | None = None


def group_rows(transformer: nn.Module, rates: LearningRates) -> list[GroupRow]:
    """Return the numbers of modules and parameters trained per component; frozen components have zero.

    A LoRA's A and B count as one module. Components that the model does not have are left out, but not the LLM adapter:
    frozen, it is not in memory.
    """
    modules: dict[Component, set[str]] = {"llm_adapter": set()}
    numbers: Counter[Component] = Counter()
    found: dict[Component, set[float]] = defaultdict(set)
    for name, parameter in transformer.named_parameters():
        component = component_of(name)
        trained = modules.setdefault(component, set())
        if parameter.requires_grad:
            trained.add(name.rpartition(".")[0])
            numbers[component] += parameter.numel()
            found[component].add(rates.of(name))
    rows = []
    for component in (each for each in COMPONENTS if each in modules):
        rate, own = rates.by_component[component], found[component]
        several = (min(own), max(own)) if own - {rate} else (None, None)
        rows.append(GroupRow(component, rate, len(modules[component]), numbers[component], *several))
    return rows
