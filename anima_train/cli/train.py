"""`anima train`."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anima_train.cli.options import ConfigPath, Overrides, Quiet, Version
from anima_train.cli.output import quiet
from anima_train.core.format import printable
from anima_train.distributed.launcher import rank

if TYPE_CHECKING:
    from anima_train.config.loaded import LoadedConfig

RESUME = "--resume"


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, report, and stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume this run, or from a PATH: a training state, or another run.")
    ] = False,
    resume_path: Annotated[Path | None, typer.Option("--resume-path", hidden=True)] = None,
    quietly: Quiet = False,
    version: Version = False,
) -> None:
    """Train a LoRA, or the whole Anima model, from a TOML file."""
    from anima_train.config.load import load_config

    loaded = load_config(config, overrides or [])
    with quiet(quietly):
        final = train_and_report(loaded, dry_run, resume, resume_path)
    if final is not None and rank() == 0 and not quietly:
        print("\n".join(map(printable, next_steps(loaded, final, config, overrides or []))))


def train_and_report(
    loaded: "LoadedConfig", dry_run: bool = False, resume: bool = False, resume_path: Path | None = None
) -> Path | None:
    """Run the training, then write its page; return as `run_training` does."""
    from anima_train.training.train import run_training

    final = run_training(loaded, dry_run, resume, resume_path)
    if final is not None and rank() == 0:
        write_report(final.parent.parent)
    return final


def next_steps(loaded: "LoadedConfig", weights: Path, file: Path, overrides: Sequence[str]) -> list[str]:
    """Return lines about a run's final weights: where they are, how to try them, where ComfyUI wants them.

    Those of the best evaluation or previews, where they are kept, are named with them.

    Args:
        loaded: the configuration of the run.
        weights: their file.
        file: of the configuration.
        overrides: of --set; those that `anima sample` reads hold for the pictures, too.
    """
    from anima_train.config.model_part import ModelPart

    config = loaded.config
    flag, folder = ("--checkpoint", "diffusion_models") if config.adapter.type == "full" else ("--lora", "loras")
    words = ["anima", "sample", str(file), flag, str(weights)]
    for each in overrides:
        if re.split(r"[.=]", each)[0].strip() in ModelPart.model_fields:
            words += ["--set", each]
    if config.sampling is None:  # else its prompts are drawn
        triggers = (directory.trigger_word for directory in loaded.train.settings.directory if directory.trigger_word)
        words += ["--prompt", next(triggers, "1girl, solo")]
    keeps = [key for key in ("keep_best", "forgetting_budget") if getattr(config, key) is not None]
    best = weights.with_name(f"{weights.stem}-best{weights.suffix}")
    kept = [f"kept by {' and '.join(keeps)}: {best}"] if keeps and best.exists() else []
    return [
        f"weights {weights}",
        *kept,
        f"try them: {shlex.join(words)}",
        f"for ComfyUI: copy them to ComfyUI/models/{folder}",
    ]


def with_resume_path(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments in which `--resume PATH`, whose path may be absent, is an option typer knows.

    A configuration's file is not such a path.
    """
    found = list(arguments)
    for index, argument in enumerate(found):
        if argument.startswith(f"{RESUME}="):
            found[index : index + 1] = [f"{RESUME}-path", argument.partition("=")[2]]
        elif argument == RESUME and index + 1 < len(found):
            following = found[index + 1]
            if not following.startswith("-") and not following.endswith(".toml"):
                found[index] = f"{RESUME}-path"
    return found


def write_report(run: Path) -> None:
    """Write the page of a run that has ended; the run does not fail where that does."""
    from anima_train.reports.run_page import write_run_report
    from anima_train.run.log import is_quiet

    try:
        page = write_run_report(run)
        if not is_quiet():
            print(f"report {printable(str(page))}")
    except Exception as error:  # noqa: BLE001 whatever it is: the weights are saved, and `anima report` can be tried again
        print(printable(f"warning: no report of the run was written ({type(error).__name__}: {error})"))
