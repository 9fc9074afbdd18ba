"""The sets of captions from which the base model draws the pictures that show what is forgotten."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anima_train.config.read import read_toml
from anima_train.core.errors import ConfigError
from anima_train.core.settings import describe_value, quoted
from anima_train.data.buckets import Size
from anima_train.data.settings import DatasetSettings, Directory
from anima_train.sampling.elsewhere import caption_fault
from anima_train.sampling.generate import PictureSettings, Request

SHIPPED = "shipped"  # the name of the captions that come with the package
SHIPPED_CAPTIONS = Path(__file__).with_name("retention_captions.toml")
PRESERVED_CAPTIONS = Path(__file__).with_name("preservation_captions.toml")  # none of which is among those
FOLDER = "base_drawn"  # in the cache's folder, or that of the runs
EXPECTED = 'a list of captions for a kind, as {} = ["...", "..."]'
KIND_LENGTH = 40
KIND = re.compile(rf"(?=.*\w)[\w .-]{{1,{KIND_LENGTH}}}")  # of a folder, and in the names of numbers


@dataclass(frozen=True)
class BaseDrawn:
    """Captions by their kind, and how the base model draws a picture for each."""

    captions: Mapping[str, list[str]]
    settings: PictureSettings
    parent: Path  # of the folder
    model: Mapping[str, Any]  # what the configuration says about the base's files

    @cached_property
    def folder(self) -> Path:
        """The folder of the pictures: another one for other captions, settings, or another model's files."""
        facts = [self.captions, self.settings.model_dump(mode="json"), self.model]
        return self.parent / FOLDER / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def size(self) -> Size:
        """The size of each picture."""
        return Size(self.settings.width, self.settings.height)

    def __len__(self) -> int:
        return sum(map(len, self.captions.values()))

    def pictures(self) -> Iterator[tuple[Path, str, Request]]:
        """Yield the path of each picture, its caption, and how it is drawn: each from a noise of its own."""
        fields = self.settings.model_dump(exclude={"seed"})
        number = 0
        for kind, captions in self.captions.items():
            for index, caption in enumerate(captions):
                prompt = caption.replace("\\(", "(").replace("\\)", ")").replace("(", "\\(").replace(")", "\\)")
                request = Request(prompt=prompt, seed=(self.settings.seed + number) % 2**64, **fields)
                yield self.folder / kind / f"{index:04d}.png", caption, request
                number += 1

    def dataset(self) -> DatasetSettings:
        """Return the settings of the pictures as a dataset."""
        size = [self.settings.width, self.settings.height]
        directories = [Directory(path=str(self.folder / kind), kind=kind) for kind in self.captions]
        return DatasetSettings(directory=directories, size_buckets=[size], min_image_side=1)


def read_captions(path: Path, name: str) -> Mapping[str, list[str]]:
    """Return the captions of a TOML file, by their kind; `name` is that of the file in messages.

    Raises:
        ConfigError: everything in it that is no list of captions of a kind.
    """
    table = read_toml(path)
    if problems := caption_problems(table):
        raise ConfigError([f"{name}: {problem}" for problem in problems])
    return table


def caption_problems(table: Mapping[str, object]) -> list[str]:
    """Return what is wrong with captions by their kind."""
    problems = [problem for kind, texts in table.items() for problem in kind_problems(kind, texts)]
    if not problems:
        counts = Counter(text for texts in table.values() if isinstance(texts, list) for text in texts)
        problems = [f"{quoted(text)} stands in two kinds; remove one" for text, number in counts.items() if number > 1]
    return problems or ([] if table else [f"holds no captions; expected {EXPECTED.format('manner')}"])


def kind_problems(kind: str, texts: object) -> Iterator[str]:
    """Yield what is wrong with the captions of a kind."""
    if not KIND.fullmatch(kind):
        yield f"{quoted(kind)} is no name of a kind: at most {KIND_LENGTH} letters, digits, blanks, dots and dashes"
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        yield f"{kind}: found {describe_value(texts)}, expected {EXPECTED.format(kind)}"
        return
    for text in texts:
        if (fault := caption_fault(text)) is not None:
            yield f"{kind}: {quoted(text)} {fault}"
    if repeated := sorted({text for text in texts if texts.count(text) > 1}):
        yield f"{kind}: {quoted(repeated[0])} stands there twice; remove one"
