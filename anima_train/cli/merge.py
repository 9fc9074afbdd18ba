"""`anima merge`."""

import contextlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Findings, check_written, show
from anima_train.core.errors import ConfigError
from anima_train.core.format import count

if TYPE_CHECKING:
    from anima_train.tools.merge import Source

Precision = Annotated[
    Literal["bfloat16", "float32"] | None, Option("--dtype", help="Of the file. Absent: as in what it is of.")
]


def merge(
    files: Annotated[list[str], Argument(metavar="FILE[:STRENGTH]...", help="Adapters of any kind, or checkpoints.")],
    out: Annotated[Path, Option(dir_okay=False, help="The .safetensors file to write.")],
    into: Annotated[Path | None, Option(help="The checkpoint to which the adapters are added.")] = None,
    rank: Annotated[int | None, Option(min=1, help="Of the one LoRA. Absent: the sum of the ranks, exactly.")] = None,
    dtype: Precision = None,
    as_json: Json = False,
) -> None:
    """Merge adapters into a checkpoint, or into one LoRA; or checkpoints by weights, which sum up to 1.

    Adapters are LoRA, LoKr, LoHa, DoRA and differences, and are added as ComfyUI does it, in float32. A strength is
    written behind the name: style.safetensors:0.8. The file says in its metadata what it was made of.
    """

    def run() -> Findings:
        from tqdm import tqdm

        from anima_train.core.device import DTYPES
        from anima_train.run.log import logged_to, terminal
        from anima_train.tools import merge as merging
        from anima_train.tools.outputs import expect_new_file

        expect_new_file(out)
        sources = [source(text) for text in files]
        told = terminal(is_main=True, stream=sys.stderr)
        with logged_to(told), tqdm(desc="weights", unit="", leave=False) as bar:
            precision = None if dtype is None else DTYPES[dtype]
            found = merging.merge(sources, out, into, rank, precision, lambda name: bar.update())
        line = f"{out}: {found.kind}, with {count(found.num_changed, 'weight')} changed"
        return {"path": out, **vars(found)}, [line, *error_lines(found.errors)]

    show(run, as_json)
    check_written(out)


def source(text: str) -> "Source":
    """Return the file that a word of the command line names, and its strength."""
    from anima_train.tools.merge import Source

    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Source(Path(text))
    with contextlib.suppress(ValueError):
        if math.isfinite(strength := float(number)):
            return Source(Path(name), strength)
    raise ConfigError(f"{text}: {number!a} is no strength; write FILE or FILE:0.8")


def error_lines(errors: Mapping[str, float]) -> list[str]:
    """Return the mean and the largest of relative errors by module."""
    if not errors:
        return []
    worst = sorted(errors.items(), key=lambda pair: -pair[1])[:5]
    mean = sum(errors.values()) / len(errors)
    return [
        f"relative error |D - L| / |D|: {mean:.2%} in the mean; the largest:",
        *(f"  {error:>8.2%}  {module}" for module, error in worst),
    ]
