"""Judges: what scores pictures against their prompts. One of ours, CLIP; others come from installed packages.

A package offers one as an entry point of the group `anima_train.judges`: its name, and a function that gets the text
behind the colon of `--judge NAME:TEXT` ("" without one) and returns a `Judge`.
"""

import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from anima_train.core.device import choose_device
from anima_train.core.errors import ConfigError, UserError
from anima_train.core.settings import quoted

logger = logging.getLogger(__name__)

GROUP = "anima_train.judges"
CLIP = "clip"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
BATCH_SIZE = 16  # pictures that a judge is given at once


class Judge(Protocol):
    """Scores pictures."""

    name: str
    higher_is_better: bool

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float]:
        """Return a number for each picture, given in RGB with the words of its prompt."""
        ...


@dataclass(frozen=True)
class Judged:
    """The scores of pictures by one judge."""

    judge: str
    higher_is_better: bool
    scores: Sequence[float]  # of the pictures in their order

    @property
    def mean(self) -> float:
        """The mean score."""
        return statistics.fmean(self.scores)

    def metrics(self) -> dict[str, float]:
        """Return the mean with its standard error over the pictures, under the names that trackers show."""
        name, number = f"score/{self.judge}", len(self.scores)
        errors = {f"{name}_stderr": statistics.stdev(self.scores) / math.sqrt(number)} if number > 1 else {}
        return {name: self.mean} | errors


class Clip:
    """CLIP's score: 100 times the cosine of the embeddings of picture and prompt (Hessel et al. 2021).

    It sees the middle square of a picture, and the first 77 tokens of a prompt.

    Args:
        place: a folder with a CLIPModel and its tokenizer, or its name on the Hub.
        offline: nothing may be looked up on the Hub.

    Raises:
        ConfigError: there is none.
    """

    higher_is_better = True

    def __init__(self, place: str, offline: bool = False) -> None:
        from transformers import CLIPModel, CLIPTokenizer  # take long to import

        self.name = f"CLIP {Path(place).name}"
        self.device = choose_device()
        options: dict[str, Any] = {"local_files_only": offline or Path(place).is_dir()}
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(place, **options)
            model = CLIPModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"judge {CLIP}:{place}: no CLIP can be loaded from there ({reason}); expected a folder or a name on "
                "the Hub with config.json, model.safetensors and the tokenizer"
            ) from error
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        settings = self.model.config
        words = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=settings.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        pixels = torch.stack([clip_pixels(picture, settings.vision_config.image_size) for picture in pictures])
        out = self.model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels.to(self.device)
        )
        cosines = (out.image_embeds * out.text_embeds).sum(dim=-1)  # both have length 1
        return (100 * cosines).tolist()


def clip_pixels(picture: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """Return the middle square of a picture, in the size and the range that CLIP was trained on."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    square = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255  # (3, side, side)
    mean, std = (torch.tensor(each)[:, None, None] for each in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (values - mean) / std


def installed_judges() -> dict[str, EntryPoint]:
    """Return the judges of installed packages, by their names."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_judges(words: Sequence[str], offline: bool = False) -> list[Judge]:
    """Return the judges that `NAME` or `NAME:TEXT` name; without words all that are installed and can be loaded.

    Raises:
        ConfigError: there is no such judge, or it cannot be loaded.
    """
    installed = installed_judges()
    judges = []
    for word in words or installed:
        name, _, text = word.partition(":")
        try:
            judges.append(load_judge(name, text, installed, offline))
        except ConfigError as error:
            if words:
                raise
            logger.warning("%s; it is left out", "; ".join(error.problems))
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ConfigError(f"judge: two are called {max(names, key=names.count)}; rename the folder of one")
    return judges


def load_judge(name: str, text: str, installed: Mapping[str, EntryPoint], offline: bool) -> Judge:
    """Return one judge; raises as `load_judges`."""
    if name == CLIP and text and CLIP not in installed:
        return Clip(text, offline)
    if (fault := judge_fault(name, text, installed)) is not None:
        raise ConfigError(f"judge: {fault}")
    try:
        make: Callable[[str], Judge] = installed[name].load()
        judge = make(text)
        judge.name, judge.higher_is_better  # noqa: B018  told here if it has none
    except UserError:
        raise
    except Exception as error:
        problem = f"judge {name}: {installed[name].value} cannot be loaded ({type(error).__name__}: {error})"
        raise ConfigError(problem) from error
    return judge


def judge_fault(name: str, text: str, installed: Mapping[str, EntryPoint]) -> str | None:
    """Return why there is no such judge, as far as that is seen without loading it; None where nothing is."""
    if name in installed:
        return None
    if name != CLIP:
        names = ", ".join(dict.fromkeys([CLIP, *installed]))
        return (
            f"found {quoted(name)}, expected one of {names}; another one comes with a package that has it under "
            f"[project.entry-points.{quoted(GROUP)}]: pip install PACKAGE"
        )
    if not text:
        return f"expected a folder or a name on the Hub; write {CLIP}:PATH"
    is_there = Path(text).is_dir() or HUB_NAME.fullmatch(text) is not None
    return None if is_there else f"{quoted(text)} is neither a folder nor a name on the Hub"


def plain_text(prompt: str) -> str:
    """Return the words of a prompt, without its weights."""
    from anima_train.sampling.prompts import weighted_pieces  # imports transformers; a configuration reads without it

    return "".join(text for text, _ in weighted_pieces(prompt))


def score(word: str, offline: bool, pictures: Sequence[Path], prompts: Sequence[str]) -> Judged | None:
    """Load a judge, and return what `judged` does; where it cannot be loaded, that is a warning, too."""
    try:
        (judge,) = load_judges([word], offline)
    except Exception as error:  # noqa: BLE001 code of others, and the pictures are drawn
        logger.warning("no scores (%s)", error)
        return None
    return judged(judge, pictures, prompts)


def judged(judge: Judge, pictures: Sequence[Path], prompts: Sequence[str]) -> Judged | None:
    """Return what a judge says of each picture; None, with a warning, if it fails: the pictures stay.

    Args:
        judge: that is asked, for a few pictures at once.
        pictures: PNG files.
        prompts: of the pictures, as they were drawn.
    """
    found: list[float] = []
    for start in range(0, len(pictures), BATCH_SIZE):
        images = []
        for path in pictures[start : start + BATCH_SIZE]:
            with Image.open(path, formats=["PNG"]) as image:
                images.append(image.convert("RGB"))
        try:
            values = judge(images, [plain_text(prompt) for prompt in prompts[start : start + BATCH_SIZE]])
            found += [float(value) for value in values]
        except Exception as error:  # noqa: BLE001 code of others, and the pictures are drawn
            logger.warning("the judge %s has failed (%s: %s): no scores", judge.name, type(error).__name__, error)
            return None
    if len(found) == len(pictures):
        return Judged(judge.name, judge.higher_is_better, found)
    text = "the judge %s has given %d scores for %d pictures: none is shown"
    logger.warning(text, judge.name, len(found), len(pictures))
    return None
