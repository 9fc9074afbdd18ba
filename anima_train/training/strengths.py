"""The strengths that a trained adapter is tried at, when its last step is made."""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from anima_train.core.files import write_text
from anima_train.distributed.collectives import patient_barrier
from anima_train.distributed.signals import Abandoned
from anima_train.evaluation.previews import Previews
from anima_train.evaluation.results import Evaluation
from anima_train.evaluation.strengths import AtStrength, at_strength, strengths_record, strengths_to_try
from anima_train.evaluation.strengths_table import strengths_table, table_lines
from anima_train.training.context import RunContext
from anima_train.training.memory import MicroBatchShape
from anima_train.training.setup import TrainState

logger = logging.getLogger(__name__)

Draw = Callable[[Previews | None], tuple[Sequence[Path], Mapping[str, np.ndarray]]]


def try_all(
    run: RunContext,
    state: TrainState,
    evaluated: MicroBatchShape,
    measure: Callable[[], Sequence[Evaluation]],
    previews: Previews | None,
    draw: Draw,
) -> None:
    """Measure, and draw, the adapter at each of the wished strengths; keep and tell what is found.

    Args:
        run: the run.
        state: with the weights that are saved.
        evaluated: the largest micro-batch of an evaluation.
        measure: evaluates all sets with the weights as they are.
        previews: on the process that draws.
        draw: draws them, or takes part in it.

    Raises:
        Abandoned: on all processes, as the run is to stop.
    """
    strengths = strengths_to_try(run.config.strengths_after_training)
    folder, draws, found = run.folder, run.config.sampling is not None, []
    for strength in strengths:
        place = folder.strengths_folder / f"{strength:g}"
        drawn = None if previews is None else replace(previews, folder=place)
        paths: Sequence[Path] = []
        with at_strength(state.transformer, strength):
            run.memory.doing, run.memory.shape = "an evaluation", evaluated
            results = measure()
            run.memory.doing, run.memory.shape = "a preview", None
            with contextlib.suppress(Abandoned):  # all processes leave together, below
                paths = draw(drawn)[0] if draws else []
            judged = None if drawn is None else drawn.scored(paths)
        patient_barrier(run.accelerator)  # one process draws
        if run.signals.is_requested(run.accelerator):
            raise Abandoned
        names = [path.relative_to(folder.path).as_posix() for path in paths]
        found.append(AtStrength(strength, results, names, judged))
    if not run.is_main:
        return
    record = strengths_record(state.step, found)
    folder.check()
    write_text(folder.strengths_path, json.dumps(record, indent=1))
    logger.info("the adapter at several strengths, loss minus the base's:")
    for line in table_lines(*strengths_table(record)):
        logger.info("%s", line)
