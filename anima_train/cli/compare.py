"""`anima compare`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from anima_train.cli.options import Argument, Json, Option, Overrides, Quiet
from anima_train.cli.output import Facts, Findings, quiet, show

if TYPE_CHECKING:
    from anima_train.sampling.comparison import Comparison
    from anima_train.sampling.judges import Judged

JUDGE = (
    "What scores each picture: clip:PATH, a folder or a name on the Hub with a CLIP; or one that is installed; "
    "may be repeated. Absent: that of [sampling], or all that are installed."
)


def compare(
    run: Annotated[Path, Argument(metavar="RUN", help="The run's folder.")],
    checkpoints: Annotated[
        str | None, Option(metavar="C1,C2,...", help="Steps, best, final, or names of files. Absent: all.")
    ] = None,
    strengths: Annotated[str | None, Option(metavar="S1,S2,...", help="Of adapters, such as 0.5,1. Absent: 1.")] = None,
    prompts: Annotated[
        Path | None,
        Option(
            help="A .txt file, a prompt in each line; or .toml, a table called prompt for each. "
            "Absent: the run's [sampling]."
        ),
    ] = None,
    judge: Annotated[list[str] | None, Option(metavar="NAME[:TEXT]", help=JUDGE)] = None,
    out: Annotated[Path | None, Option(help="Folder of the pictures. Absent: compare in the run's folder.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    quietly: Quiet = False,
) -> None:
    """Draw what a run has saved beside its base model: checkpoints, LoRAs at strengths, on one page.

    Choose prompts that the run was not trained on. All pictures of a prompt begin with the same noise.
    """
    from anima_train.sampling.comparison import parse_strengths

    def make() -> Findings:
        values = None if strengths is None else parse_strengths(strengths)
        words = [] if checkpoints is None else [word.strip() for word in checkpoints.split(",")]
        with quiet(quietly):
            folder = out or run / "compare"
            found = draw_comparison(run, words, values, prompts, judge or [], folder, overrides or [])
        return found, [str(found["page"])]

    show(make, as_json)


def draw_comparison(
    run: Path, checkpoints: Sequence[str], strengths: Sequence[float] | None, prompts: Path | None,
    judges: Sequence[str], out: Path, overrides: Sequence[str],
) -> Facts:  # fmt: skip
    """Draw a comparison and write its page; return what was drawn.

    Raises:
        ConfigError: no run, nothing to draw, no such checkpoint or judge, or a setting that has no effect.
        UserError: as `draw`.
    """
    from anima_train.cli.draw import choose_requests, draw
    from anima_train.config.model_part import load_model_part
    from anima_train.reports.compare_page import write_compare_page
    from anima_train.reports.run import check_is_run
    from anima_train.run.folder import RunFolder
    from anima_train.run.log import logged_to, terminal
    from anima_train.sampling.comparison import choose_checkpoints, compare, find_checkpoints
    from anima_train.sampling.judges import judged, load_judges

    check_is_run(run)
    run = run.absolute()
    folder = RunFolder(run.parent, run.name)
    model = load_model_part(folder.config_path, overrides)
    found = choose_checkpoints(find_checkpoints(folder.weights_path(None).parent, run.name), checkpoints)
    comparison = compare(found, strengths, choose_requests([], prompts, {}, model))
    pictures: dict[int, Path] = {}
    with logged_to(terminal(is_main=True, stream=sys.stderr)):
        own = None if model.sampling is None else model.sampling.judge
        chosen = load_judges(judges or [word for word in [own] if word], model.offline)
        for transformer, places in comparison.by_transformer().items():
            part = model if transformer is None else load_model_part(folder.config_path, overrides, transformer)
            paths = draw(part, [comparison.cells[place] for place in places], out)
            pictures.update(zip(places, paths, strict=True))
        files = [pictures[place] for place in range(len(pictures))]
        prompts_drawn = [cell.request.prompt for cell in comparison.cells]
        results = [result for each in chosen if (result := judged(each, files, prompts_drawn)) is not None]
    page = out / "compare.html"
    write_compare_page(page, f"Comparison of {run.name}", comparison, files, results)
    return {"page": page, **comparison_facts(comparison, files, results)}


def comparison_facts(comparison: "Comparison", files: Sequence[Path], results: "Sequence[Judged]") -> Facts:
    """Return what was drawn, for programs."""
    width = len(comparison.columns)
    return {
        "judges": [{"name": each.judge, "higher_is_better": each.higher_is_better} for each in results],
        "pictures": [
            {
                "path": path,
                "checkpoint": comparison.columns[place % width].name,
                "strength": comparison.columns[place % width].strength,
                "prompt": cell.request.prompt,
                "seed": cell.request.seed,
                "scores": {each.judge: each.scores[place] for each in results},
            }
            for place, (path, cell) in enumerate(zip(files, comparison.cells, strict=True))
        ],
    }
