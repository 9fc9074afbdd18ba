"""`anima extract` and `anima resize`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from anima_train.cli.merge import error_lines
from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Findings, check_written, show
from anima_train.core.errors import ConfigError
from anima_train.core.format import count

if TYPE_CHECKING:
    from anima_train.tools.spectra import Limit

Rank = Annotated[int | None, Option(min=1, help="The largest rank of a module.")]
Energy = Annotated[
    float | None, Option(help="The share of |D|^2 that each module keeps, such as 0.95: the rank follows from it.")
]
Out = Annotated[Path, Option(dir_okay=False, help="The .safetensors file to write.")]
Precision = Annotated[Literal["bfloat16", "float32"], Option("--dtype", help="Of the file. Absent: float32.")]


def extract(
    base: Annotated[Path, Argument(metavar="A", help="A checkpoint: a transformer's .safetensors file.")],
    other: Annotated[Path, Argument(metavar="B", help="A fine-tune of it, or an adapter for it, such as a DoRA.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Write the difference of two checkpoints as a LoRA: with it, A is nearly B. The error of each module is told.

    Of an adapter it is what the adapter adds to A: so a DoRA becomes a LoRA.
    """

    show(lambda: extracted(base, other, out, limit_of(rank, energy), dtype), as_json)
    check_written(out)


def extracted(base: Path, other: Path, out: Path, limit: "Limit", dtype: Literal["bfloat16", "float32"]) -> Findings:
    """Write the LoRA of a difference, and return what is to be told of it."""
    from tqdm import tqdm

    from anima_train.core.device import DTYPES
    from anima_train.run.log import logged_to, terminal
    from anima_train.tools import extract as extraction
    from anima_train.tools.outputs import expect_new_file

    expect_new_file(out)
    told = terminal(is_main=True, stream=sys.stderr)
    with logged_to(told), tqdm(desc="weights", unit="", leave=False) as bar:
        found = extraction.extract(base, other, out, limit, DTYPES[dtype], lambda name: bar.update())
    lines = [
        f"{out}: a LoRA of rank {found.largest_rank} for {count(len(found.errors), 'module')}",
        f"relative error of all together: {found.error:.2%}",
        *error_lines(found.errors),
    ]
    if found.left_out:
        name, share = max(found.left_out.items(), key=lambda pair: pair[1])
        what = f"{count(len(found.left_out), 'changed tensor')} left out, which a LoRA does not hold"
        lines.append(f"{what}; the largest change: {share:.2%} of {name}")
    return {"path": out, **vars(found)}, lines


def resize(
    path: Annotated[Path, Argument(metavar="LORA", help="A LoRA, LoKr, LoHa or file of differences.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, Option("--dtype", help="Of the file. Absent: as in LORA.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a LoRA of a lower rank of a LoRA, or a LoRA of a LoKr or LoHa, and tell the error of each module."""

    show(lambda: resized(path, out, limit_of(rank, energy), dtype), as_json)
    check_written(out)


def resized(path: Path, out: Path, limit: "Limit", dtype: Literal["bfloat16", "float32"] | None) -> Findings:
    """Write the LoRA that is nearest to an adapter, and return what is to be told of it."""
    from tqdm import tqdm

    from anima_train.core.device import DTYPES
    from anima_train.tools.merge import Source, merge_adapters
    from anima_train.tools.outputs import expect_new_file

    expect_new_file(out)
    with tqdm(desc="weights", unit="", leave=False) as bar:
        precision = None if dtype is None else DTYPES[dtype]
        found = merge_adapters([Source(path)], out, limit, precision, lambda name: bar.update())
    line = f"{out}: {found.kind} for {count(found.num_changed, 'module')}"
    return {"path": out, **vars(found)}, [line, *error_lines(found.errors)]


def limit_of(rank: int | None, energy: float | None) -> "Limit":
    """Return the limit that the options ask for.

    Raises:
        ConfigError: none is given, or the share is none.
    """
    from anima_train.tools.spectra import Limit

    if rank is None and energy is None:
        raise ConfigError("give --rank R, or --energy with a share such as 0.95, or both")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy is a share above 0, of at most 1, found {energy:g}; write 0.95")
    return Limit(rank, energy)
