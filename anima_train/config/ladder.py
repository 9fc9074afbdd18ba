"""The ladder: settings that save memory, rung by rung, that of least time first. What the user has written stays."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from anima_train.adapters.full import Full
from anima_train.config.config import Config
from anima_train.core.settings import Settings, describe_value

Values = dict[str, Any]  # by key path
AnySettings = TypeVar("AnySettings", bound=Settings)

POLICY, SOME, SWAP = "activation_checkpointing", "checkpointed_blocks", "blocks_to_swap"
WEIGHTS = "model.transformer_dtype"
RELEASE, MOMENTS, PLACE = "optimizer.gradient_release", "optimizer.moments_dtype", "optimizer.moments_device"
LADDER_KEYS = (POLICY, SOME, SWAP, WEIGHTS, RELEASE, MOMENTS, PLACE)
CHANGE_RESULTS = (WEIGHTS, MOMENTS)  # the others leave every gradient as it is
SWAP_STEPS = 4  # a quarter of the blocks each
POLICY_STEPS = 7  # between "selective" and true

PRICES: dict[str, dict[Any, str]] = {  # by key and value
    POLICY: {
        "selective": "at most 8 % more work",
        True: "about 40 % more work",
        "offload": "about 40 % more work, and copies to the host and back",
    },
    WEIGHTS: {"int8": "results change a little"},
    MOMENTS: {"8bit": "results change a little"},
    PLACE: {"cpu": "the optimizer's state is copied in each step"},
}
BLOCK_PRICES = {SOME: "about 40 % more work in these", SWAP: "their weights are copied in each pass"}


@dataclass(frozen=True)
class Rung:
    """A configuration with some settings that save memory."""

    config: Config
    settings: Mapping[str, Any]  # those that the user has not written, by key path

    @property
    def results(self) -> Values:
        """The settings among these that what is learned depends on."""
        return {key: value for key, value in self.settings.items() if key in CHANGE_RESULTS}

    def __str__(self) -> str:
        if not self.settings:
            return "the settings as they are written"
        return ", ".join(f"{key} = {toml(value)}" for key, value in self.settings.items())

    @property
    def price(self) -> str:
        """The settings, each with what it costs."""
        if not self.settings:
            return str(self)
        parts = []
        for key, value in self.settings.items():
            price = BLOCK_PRICES.get(key) or PRICES.get(key, {}).get(value)
            parts.append(f"{key} = {toml(value)}" + (f" ({price})" if price else ""))
        return ", ".join(parts)


def toml(value: object) -> str:
    """Return a value as the user would write it."""
    return describe_value(value).partition(" (")[0]


def rungs(config: Config, num_blocks: int, num_processes: int = 1, divides: bool = False) -> list[Rung]:
    """Return the rungs of the ladder that `memory` names, in their order.

    Settings that the user has written, that this configuration does not have or that it refuses are not on it.

    Args:
        config: as the user has written it.
        num_blocks: of the transformer.
        num_processes: that train; several cannot swap blocks that they all train, nor update in the backward pass.
        divides: True if they divide the transformer among them: then activations are what can be saved.
    """
    excluded = {SWAP, RELEASE} if num_processes > 1 and isinstance(config.adapter, Full) else set()
    excluded |= set(LADDER_KEYS) - {POLICY, SOME} if divides else set()
    found: dict[str, Rung] = {}
    for values in (*steps(config, num_blocks), {}):  # the last one for a ladder whose keys are all written
        settings = {key: value for key, value in values.items() if is_free(config, key) and key not in excluded}
        if not settings and found:
            continue
        try:
            rung = Rung(with_settings(config, settings), settings)
        except ValidationError:  # they exclude something that is written
            continue
        needed = getattr(rung.config.optimizer, "needs_library", None)
        if needed is None or importlib.util.find_spec(needed[0]) is not None:
            found.setdefault(str(rung), rung)
    return list(found.values())


def steps(config: Config, num_blocks: int) -> Iterator[Values]:
    """Yield the settings of each rung, whether or not they are free."""
    swapped = (num_blocks * part // SWAP_STEPS for part in range(1, SWAP_STEPS + 1))
    swaps: list[Values] = [{POLICY: "offload", SWAP: number} for number in swapped if number]
    checkpointed = (num_blocks * part // POLICY_STEPS for part in range(1, POLICY_STEPS))
    between: list[Values] = [{POLICY: "selective", SOME: number} for number in checkpointed if number]
    least: list[Values] = [{POLICY: True}, {POLICY: "offload"}]
    policies: list[Values] = [{}, {POLICY: "selective"}, *between, *least]
    trains_all = isinstance(config.adapter, Full)
    on_host: Values = {PLACE: "cpu"} if trains_all else {}
    smaller: Values = {MOMENTS: "8bit"} if trains_all else {WEIGHTS: "int8"}
    if config.memory == "low":
        ladder = [each | smaller for each in least]
    elif config.memory == "fast":
        ladder = [both for each in policies for both in (each, each | smaller)]
    else:
        ladder, smaller = policies, {}
    last = [each | smaller | on_host for each in (*least, *swaps)]
    for values in (*ladder, *last):
        yield values
        if trains_all:  # takes no time, where it is not refused
            yield values | {RELEASE: True}


def is_free(config: Config, key: str) -> bool:
    """Return True if a configuration has this key, and the user has not written it."""
    table: Settings = config
    *tables, name = key.split(".")
    for each in tables:
        table = getattr(table, each)
    return name in type(table).model_fields and name not in table.model_fields_set


def with_settings(table: AnySettings, settings: Mapping[str, Any]) -> AnySettings:
    """Return a table with these settings, by key path, checked as all of it was.

    Raises:
        ValidationError: it cannot have them.
    """
    values = {name: getattr(table, name) for name in table.model_fields_set}
    for path, value in settings.items():
        name, _, rest = path.partition(".")
        values[name] = with_settings(values.get(name, getattr(table, name)), {rest: value}) if rest else value
    return type(table).model_validate(values)
