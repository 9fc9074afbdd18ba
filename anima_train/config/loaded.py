"""A loaded configuration: its settings, and its datasets with their folders found."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anima_train.config.base_drawn import BaseDrawn
from anima_train.config.config import Config
from anima_train.config.sections import EvalDataset, PreservationSettings, Role
from anima_train.core.shapes import LATENT_CHANNELS, LATENT_PIXELS
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache
from anima_train.data.preservation import Preservation
from anima_train.data.samples import Sample
from anima_train.data.settings import DatasetSettings

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Dataset:
    """A dataset's settings with its folders found."""

    name: str  # "train", or the name of the evaluation set
    settings: DatasetSettings
    folders: tuple[Path, ...]  # or files; or, for what is on the Hub, names
    masks: tuple[Path | None, ...]
    caches: tuple[Cache, ...]
    offline: bool  # nothing may be looked up on the Hub
    role: Role | Literal["preservation"] = "validation"  # of all but the training set
    drawn: BaseDrawn | None = None  # the captions that the base model draws it from
    share: float = 0.0  # of the samples that are trained, where it is added to them


@dataclass(frozen=True)
class Preserved:
    """The samples that keep the base, and where they come from."""

    settings: PreservationSettings  # with the captions of a file in them: others are noticed, and it may be gone
    samples: Preservation
    dataset: Dataset | None  # of pictures that are added to the training set
    captions: frozenset[str]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed every check which needs no model and no image."""

    config: Config
    run_name: str
    train: Dataset
    evals: tuple[Dataset, ...]
    notes: tuple[str, ...]  # one for each key that changes nothing
    missing: tuple[str, ...] = ()  # problems of files that a resumed run does not read
    warnings: tuple[str, ...] = ()  # one for each that is probably a mistake
    preserved: Preserved | None = None  # what keeps the base

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """All sets, that which is trained first."""
        added = None if self.preserved is None else self.preserved.dataset
        return (self.train, *self.evals, *([] if added is None else [added]))

    def passes(self, evals: Mapping[str, Sequence[Sample]]) -> list[tuple[Size, int]]:
        """Return the size of each image of the evaluation sets, those to be drawn too, with its number of passes.

        Args:
            evals: the samples of each set that is not to be drawn first, by its name.
        """
        adapter = self.config.adapter
        return [
            (size, len(entry.points()) * (1 + adapter.masks_ranks + (adapter.leaves_base and entry.measures_drift)))
            for entry, size in self.evaluated(evals)
        ]

    def base_velocity_bytes(self, evals: Mapping[str, Sequence[Sample]]) -> int:
        """Return the bytes of what a full fine-tune keeps of its base to measure drift; argument as of `passes`."""
        if self.config.adapter.leaves_base:
            return 0
        return sum(
            len(entry.points()) * size.width * size.height // LATENT_PIXELS**2 * LATENT_CHANNELS * FLOAT32
            for entry, size in self.evaluated(evals)
            if self.config.measures_drift(entry)
        )

    def evaluated(self, evals: Mapping[str, Sequence[Sample]]) -> Iterator[tuple[EvalDataset, Size]]:
        """Yield the set and the size of each image that is evaluated; argument as of `passes`."""
        for entry, dataset in zip(self.config.eval_datasets, self.evals, strict=True):
            sizes = [sample.size for sample in evals.get(dataset.name, ())]
            if dataset.name not in evals and dataset.drawn is not None:
                sizes = [dataset.drawn.size] * len(dataset.drawn)
            yield from ((entry, size) for size in sizes)

    @property
    def preservation(self) -> Preservation | None:
        """The samples that keep the base; None: none do."""
        return None if self.preserved is None else self.preserved.samples
