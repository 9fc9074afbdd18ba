"""The pictures that the base model draws from captions, once, so that what is forgotten can be measured without any."""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping

from tqdm import tqdm

from anima_train.config.base_drawn import BaseDrawn
from anima_train.config.loaded import Dataset
from anima_train.core.device import release_memory
from anima_train.core.files import sha256_file, write_text
from anima_train.core.format import count
from anima_train.data.samples import Picture, Sample
from anima_train.data.scan import Scan, make_samples
from anima_train.model.loading import ModelFiles, ModelSpec
from anima_train.sampling.grids import Cell
from anima_train.sampling.pipeline import sample

logger = logging.getLogger(__name__)

RECORD = "base.json"  # what drew the pictures


def split_undrawn(datasets: Iterable[Dataset]) -> tuple[list[Dataset], list[str]]:
    """Return the sets that can be looked at now, and a line for each that the run will draw first.

    Pictures that keep the base can be planned with before they are drawn, see `stand_ins`.
    """
    ready, lines = [], []
    for dataset in datasets:
        if dataset.drawn is None or not (missing := undrawn(dataset.drawn)):
            ready.append(dataset)
            continue
        if dataset.role == "preservation":
            ready.append(dataset)
        settings = dataset.drawn.settings
        lines.append(
            f"dataset {dataset.name}: the base model draws {count(len(missing), 'picture')} first, "
            f"{settings.width}x{settings.height} in {count(settings.steps, 'step')}, into {dataset.drawn.folder}"
        )
    return ready, lines


def stand_ins(dataset: Dataset) -> Scan:
    """Return the samples of a set whose pictures are yet to be drawn, with all that is known but their bytes."""
    assert dataset.drawn is not None
    kinds = list(dataset.drawn.captions)
    samples: list[Sample] = []
    for path, caption, request in dataset.drawn.pictures():
        index = kinds.index(path.parent.name)
        digest = hashlib.sha256(repr(request).encode()).hexdigest()
        picture = Picture(path, path, digest, request.width, request.height, tags=(caption,))
        samples.extend(make_samples(path.name, picture, index, dataset.settings.options(index), dataset.caches[index]))
    return Scan(samples, len(dataset.drawn))


def undrawn(drawn: BaseDrawn) -> list[int]:
    """Return the numbers of the pictures that are not there yet."""
    return [number for number, (path, _, _) in enumerate(drawn.pictures()) if not path.is_file()]


def draw_missing(datasets: Iterable[Dataset], spec: ModelSpec) -> None:
    """Have the base model draw what is missing of the sets that begin with captions; those of another base go.

    A picture's caption is written before it, so that a picture that is there is whole, and a drawing that was
    interrupted goes on.

    Raises:
        UserError: as `sample`.
    """
    for dataset in datasets:
        drawn = dataset.drawn
        if drawn is None:
            continue
        base = base_of(spec.files)
        if undrawn(drawn) or recorded_base(drawn) != base:
            with dataset.caches[0].locked():
                if recorded_base(drawn) != base:
                    begin_anew(drawn, base)
                draw(dataset.name, drawn, spec)


def draw(name: str, drawn: BaseDrawn, spec: ModelSpec) -> None:
    """Draw what is missing of one set."""
    numbers = undrawn(drawn)
    if not numbers:
        return
    logger.info("dataset %s: the base model draws %s into %s", name, count(len(numbers), "picture"), drawn.folder)
    pictures = list(drawn.pictures())
    cells = [Cell(pictures[number][2]) for number in numbers]
    scratch = drawn.folder / "unfinished"
    with tqdm(total=len(cells), desc="base draws", unit="image") as bar:
        for place, made in sample(spec, cells, scratch):
            path, caption, _ = pictures[numbers[place]]
            write_text(path.with_suffix(".txt"), caption + "\n")
            made.replace(path)
            bar.update()
    shutil.rmtree(scratch)
    release_memory(spec.device)


def base_of(files: ModelFiles) -> dict[str, str]:
    """Return what draws the pictures: the SHA-256 of each file, by its name."""
    paths = (files.transformer, files.llm_adapter, files.llm, files.vae)
    return {path.name: sha256_file(path) for path in paths if path is not None and path.is_file()}


def recorded_base(drawn: BaseDrawn) -> object:
    """Return what has drawn the pictures; None where there is no record that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((drawn.folder / RECORD).read_text(encoding="utf-8"))
    return None


def begin_anew(drawn: BaseDrawn, base: Mapping[str, str]) -> None:
    """Remove the pictures that another model has drawn, and note which one does now."""
    for kind in drawn.captions:
        if (drawn.folder / kind).is_dir():
            shutil.rmtree(drawn.folder / kind)
    write_text(drawn.folder / RECORD, json.dumps(base, indent=1))
