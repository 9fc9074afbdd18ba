"""The samples that keep the base, as [preservation] asks for them, and the pictures that it draws for them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from anima_train.config.base_drawn import PRESERVED_CAPTIONS, SHIPPED
from anima_train.config.config import Config
from anima_train.config.loaded import Dataset, Preserved
from anima_train.core.format import count
from anima_train.data.buckets import SIDE_MULTIPLE
from anima_train.data.preservation import Preservation
from anima_train.data.settings import DatasetSettings

if TYPE_CHECKING:
    from anima_train.config.load import Loader

FIRST_SEED = 2**40  # far from the seeds of pictures that are measured


def load_preserved(loader: "Loader", config: Config, train: Dataset | None) -> Preserved | None:
    """Return what keeps the base; None where nothing does, or with its problems filed.

    Args:
        loader: of the configuration.
        config: the main file.
        train: the training set, whose largest resolution pictures are drawn at.
    """
    settings, place = config.preservation, loader.main.inside("preservation")
    if settings is None:
        return None
    part = Preservation(settings.share, settings.weight)
    if settings.on in ("class_caption", "empty_caption"):
        caption = settings.class_caption or ""
        return Preserved(settings, replace(part, captions=(caption,)), None, frozenset([caption]))
    by_kind = loader.find_captions(place, settings.captions, PRESERVED_CAPTIONS)
    if by_kind is None:
        return None
    captions = tuple(chain.from_iterable(by_kind.values()))
    if settings.on == "training_latents" or settings.captions != SHIPPED:
        settings = settings.model_copy(update={"captions": dict(by_kind)})
    if settings.on == "training_latents":
        return Preserved(settings, replace(part, captions=captions), None, frozenset(captions))
    side = 1024 if train is None else largest_side(train.settings)
    pictures = {"width": side, "height": side, **settings.pictures}
    drawn = loader.load_drawn("preservation", by_kind, pictures, place, config, FIRST_SEED)
    if drawn is None:
        return None
    return Preserved(settings, part, replace(drawn, role="preservation", share=settings.share), frozenset(captions))


def largest_side(settings: DatasetSettings) -> int:
    """Return the largest resolution of a dataset, rounded to the sides that pictures have."""
    options = [settings.options(index) for index in range(len(settings.directory))]
    largest = max(resolution for each in options for resolution, _ in each.buckets)
    return max(SIDE_MULTIPLE, largest // SIDE_MULTIPLE * SIDE_MULTIPLE)


def measured_too(kept: Preserved, evals: Iterable[Dataset]) -> Iterator[str]:
    """Yield a warning for each set that measures on what is protected."""
    for each in evals:
        drawn = each.drawn
        shared = [] if drawn is None else [
            caption for caption in chain.from_iterable(drawn.captions.values()) if caption in kept.captions
        ]  # fmt: skip
        if shared:
            noun = count(len(shared), "caption")
            yield f"the evaluation set {each.name} measures on {noun} of them; of others more is forgotten"
