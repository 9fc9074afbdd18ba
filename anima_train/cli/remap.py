"""`anima remap`."""

from pathlib import Path
from typing import Annotated

from anima_train.cli.options import Argument, Json, Option
from anima_train.cli.output import Findings, check_written, show
from anima_train.core.format import count


def remap(
    path: Annotated[Path, Argument(metavar="LORA", help="A LoRA, LoKr, LoHa or DoRA, in anybody's keys.")],
    out: Annotated[Path, Option(dir_okay=False, help="The .safetensors file to write.")],
    to: Annotated[
        str, Option(metavar="BLOCKS|BASE", help="The variant that it shall be for: 28, 40 or 52 blocks, or its file.")
    ],
    source: Annotated[
        int | None,
        Option("--from", min=1, metavar="BLOCKS", help="The variant that it is of. Absent: the least that it fits."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a LoRA of one variant (2B, 2.9B, 3.8B) one of another: the blocks that both have keep their changes.

    Blocks that were added get none; those that are not there lose theirs, which is told. Elsewhere a LoRA of another
    depth loads without a word, on the wrong blocks.
    """

    def run() -> Findings:
        from anima_train.tools import remap as remapping
        from anima_train.tools.outputs import expect_new_file

        expect_new_file(out)
        found = remapping.remap(path, out, remapping.Variant.of(to), source)
        before, now = found.depths
        lines = [f"{out}: {count(found.num_changed, 'weight')} changed, in {now} blocks instead of {before}"]
        if found.left_out:
            what = f"{count(len(found.left_out), 'change')} left out, of blocks that are not there"
            lines.append(f"{what}, such as {next(iter(found.left_out))}")
        return {"path": out, **vars(found)}, lines

    show(run, as_json)
    check_written(out)
