"""The linears that an adapter is added to, and what differs among them: regular expressions over their full names."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

from pydantic import Field, field_validator
from torch import nn

from anima_train.core.errors import ConfigError
from anima_train.core.format import count
from anima_train.core.settings import Settings, nearest, quoted
from anima_train.model.dit import Block
from anima_train.model.llm_adapter import TransformerBlock
from anima_train.optim.groups import LearningRates

ATTENTION = r".*\.(self|cross)_attn\.\w+"
MLP = r".*\.mlp\.\w+"
ADALN = r".*\.adaln_modulation_\w+\.\w+"
PRESETS: Mapping[str, tuple[str, ...]] = {
    "all": (".*",),
    "attention": (ATTENTION,),
    "attention+adaln": (ATTENTION, ADALN),
    "attention+mlp": (ATTENTION, MLP),
    "attention+mlp+adaln": (ATTENTION, MLP, ADALN),
}
Patterns = Sequence[str]
Above0 = Annotated[float, Field(gt=0)]


class Selection(Settings):
    """The part of an adapter's settings that chooses linears by their names."""

    target_modules: str | list[str] = "all"
    """The linears that are trained: "all" in the blocks; "attention" or "attention+mlp", each without AdaLN (linears
    that make shift, scale and gate of the timestep, a third of the parameters of "all"), or with it "attention+adaln"
    and "attention+mlp+adaln", which is "all"; or regular expressions over full names, one or a list, such as
    ".*[.]self_attn[.].*" or "blocks[.](1[0-9]|2[0-7])[.].*", which have to match all of a name. One that matches
    nothing is an error. A component with a learning rate of 0, in [model], stays frozen."""
    exclude_modules: str | list[str] = Field(default=[])
    """Regular expressions, or presets, for linears that are left out of them."""
    lr_pattern: dict[str, Above0] = Field(default={})
    """Learning rates of linears by a regular expression over their full names, instead of their components'; the first
    that matches counts. exclude_modules freezes."""

    @field_validator("target_modules")
    @classmethod
    def all_or_some(cls, value: str | list[str]) -> str | list[str]:
        """Take an empty text or list as all, as other trainers do."""
        return value or "all"

    @field_validator(
        "target_modules", "exclude_modules", "lr_pattern", "rank_pattern", "alpha_pattern", check_fields=False
    )
    @classmethod
    def are_patterns(cls, value: str | list[str] | dict[str, float]) -> str | list[str] | dict[str, float]:
        """Refuse what is no regular expression."""
        for pattern in as_list(value):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f'{quoted(pattern)} is no regular expression: {error}; any text is ".*", and a dot is "[.]"'
                ) from None
        return value

    @property
    def patterns(self) -> Mapping[str, Patterns]:
        """The expressions of each key that have to match one of the linears chosen."""
        return {"lr_pattern": list(self.lr_pattern)}

    def selected(self, transformer: nn.Module, rates: LearningRates) -> list[str]:
        """Return the full names of the linears to train, in the model's order.

        Raises:
            ConfigError: an expression matches none that could be trained, or nothing is left.
        """
        everything = block_linears(transformer)
        names = [name for name in everything if not rates.is_frozen(name)]
        if not names:
            return []
        problems = unmatched("target_modules", as_list(self.target_modules), names, everything)
        targets = [name for name in names if matches(as_list(self.target_modules), name)]
        problems += unmatched("exclude_modules", as_list(self.exclude_modules), targets or names, everything)
        chosen = [name for name in targets if not matches(as_list(self.exclude_modules), name)]
        for key, patterns in self.patterns.items():
            problems += unmatched(key, patterns, chosen or names, everything)
        if not chosen and not problems:
            problems.append("adapter.exclude_modules: leaves out all that target_modules chooses; nothing is trained")
        if problems:
            raise ConfigError(problems)
        return chosen

    @property
    def is_partial(self) -> bool:
        """True if linears are chosen, or differ."""
        return self.target_modules != "all" or bool(self.exclude_modules) or any(self.patterns.values())


def as_list(value: str | Iterable[str]) -> list[str]:
    """Return the expressions of a key that may be a single one; those of a preset as one."""
    return [value] if isinstance(value, str) else list(value)


def matches(patterns: Patterns, name: str) -> bool:
    """Return True if one of these expressions or presets matches all of a name."""
    return any(re.fullmatch(each, name) for pattern in patterns for each in PRESETS.get(pattern, (pattern,)))


def of_pattern(table: Mapping[str, float], name: str) -> float | None:
    """Return the value of the first expression that matches a name; None if none does."""
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


def unmatched(key: str, patterns: Patterns, names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Return a problem for each expression that matches none of these names, with what comes near.

    Args:
        key: in [adapter].
        patterns: its expressions.
        names: that it could match.
        everything: all linears of the blocks, also frozen ones.
    """
    problems, left = [], list(names)
    for pattern in patterns:
        if not any(matches([pattern], name) for name in names):
            problems.append(f"adapter.{key}: {quoted(pattern)} {near(pattern, names, everything)}")
        elif key.endswith("_pattern") and not any(matches([pattern], name) for name in left):
            problems.append(
                f"adapter.{key}: {quoted(pattern)} never counts, as expressions before it match all that it matches; "
                "put it before them"
            )
        left = [name for name in left if not matches([pattern], name)]
    return problems


def near(pattern: str, names: Sequence[str], everything: Sequence[str]) -> str:
    """Return what an expression that matches nothing comes near to."""
    if found := [name for name in everything if matches([pattern], name)]:
        return f"matches no linear that is trained here: {found[0]} is frozen or left out; remove the expression"
    if preset := nearest(pattern, PRESETS):
        return f"matches no linear; did you mean {quoted(preset)}?"
    if found := [name for name in names if re.search(pattern, name)]:
        wider = quoted(f".*{pattern}.*")
        parts = f"a part of {count(len(found), 'name')} such as {found[0]}"
        return f"matches no whole name, and {parts}; write {wider} for these"
    similar = nearest(pattern, [*everything, *(name.rpartition(".")[2] for name in everything)])
    example = next((name for name in everything if similar and name.endswith(similar)), names[0])
    return f"matches no linear; names are such as {example}"


def block_linears(transformer: nn.Module) -> list[str]:
    """Return the full names of all linears inside a `Block` or `TransformerBlock`, in the model's order."""
    return [
        f"{block_name}.{name}"
        for block_name, block in transformer.named_modules()
        if isinstance(block, Block | TransformerBlock)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def described(names: Iterable[str]) -> str:
    """Return names in short, with the number of blocks that have each: `blocks.*.mlp.layer1 (28)`."""
    numbers = Counter(re.sub(r"blocks\.\d+", "blocks.*", name) for name in names)
    return ", ".join(f"{name} ({number})" for name, number in numbers.items())
