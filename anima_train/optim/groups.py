"""Parameter groups: the component of each parameter, its learning rate, and its weight decay."""

from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of each component before the schedule; 0 freezes it."""

    by_component: Mapping[Component, float]

    def of(self, name: str) -> float:
        """Return the learning rate of a parameter or module, by its full name."""
        return self.by_component[component_of(name)]

    def is_frozen(self, name: str) -> bool:
        """Return True if a parameter or module gets no update at all."""
        return self.of(name) == 0


def optimizer_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], rates: LearningRates, weight_decay: float
) -> list[dict[str, Any]]:
    """Return torch parameter groups for the trainable parameters: one per component, split where nothing decays.

    1-D parameters (norms, biases) and embeddings get no weight decay. Each group carries `component` and `base_lr`,
    from which the loop sets `lr` at every step.
    """
    groups: dict[tuple[Component, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith("embed.weight")
        component = component_of(name)
        lr = rates.of(name)
        group = groups.setdefault(
            (component, decays),
            {
                "params": [],
                "names": [],
                "component": component,
                "base_lr": lr,
                "lr": lr,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: (COMPONENTS.index(key[0]), not key[1]))]


@dataclass(frozen=True)
class GroupRow:
    """A line of the table printed before training."""

    component: Component
    lr: float
    num_modules: int
    num_parameters: int


def group_table(
    trainable: Iterable[tuple[str, nn.Parameter]], present: Iterable[str], rates: LearningRates
) -> list[GroupRow]:
    """Return the numbers of modules and parameters trained per component; components without any have zero.

    Args:
        trainable: names and parameters that get updates. A LoRA's A and B count as one module.
        present: parameter names of the whole model, to leave out components that it does not have.
        rates: learning rates before the schedule.
    """
    modules: dict[Component, set[str]] = {component: set() for component in COMPONENTS}
    numbers: dict[Component, int] = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in trainable:
        component = component_of(name)
        modules[component].add(name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0])
        numbers[component] += parameter.numel()
    existing = {component_of(name) for name in present}
    return [
        GroupRow(component, rates.by_component[component], len(modules[component]), numbers[component])
        for component in COMPONENTS
        if component in existing
    ]


def group_rows(transformer: nn.Module, rates: LearningRates) -> list[GroupRow]:
    """Return the table of what is trained, a frozen LLM adapter that is not in memory included."""
    parameters = list(transformer.named_parameters())
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    return group_table(trained, [*(name for name, _ in parameters), "llm_adapter."], rates)
