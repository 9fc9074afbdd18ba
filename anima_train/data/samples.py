"""A picture, and a picture at one size with its captions: what a batch is made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anima_train.core.random import uniform
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache, entry_key
from anima_train.data.captions import shuffled_tags, without_underscores
from anima_train.data.rules import Rules


@dataclass(frozen=True, slots=True)
class Picture:
    """One image file with its captions, as they are in the files, and its mask."""

    path: Path
    sha256: str
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str  # tags; "" where only natural language is used, or nothing
    mask: Path | None
    mask_sha256: str
    more_captions: tuple[str, ...] = ()  # tags too; with `caption` they take turns
    natural: tuple[str, ...] = ()  # in natural language, none empty; none where caption_mode does not use them

    @property
    def tags(self) -> tuple[str, ...]:
        """All captions that are not in natural language."""
        return (self.caption, *self.more_captions)

    @property
    def has_caption(self) -> bool:
        """Whether any caption holds text."""
        return any(self.tags) or bool(self.natural)


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture at one size: what a batch is made of."""

    id: str  # unique in the dataset, without any absolute path
    picture: Picture
    size: Size
    resolution: int
    directory: int
    rules: Rules
    cache: Cache

    # Captions. A picture has T captions of tags, each in S = max(1, cache_shuffle_num) orders, and N in natural
    # language. Its showings 0, 1, 2 ... are its variants. Of those before showing k, floor(k * share + phase) use
    # natural language, with a phase in [0, 1) of its own for each picture; so each picture keeps the share from its
    # first showings on, and all of them together in each epoch. The n-th of these showings uses caption n mod N. The
    # m-th of the others uses caption m mod T, in order (m div T) mod S. So there are at most T * S + N texts, however
    # often the picture is shown.

    @property
    def name(self) -> str:
        """Of the picture, in addresses: every resolution shares the same texts in the cache."""
        return self.id.rpartition("@")[0]

    @property
    def natural_share(self) -> float:
        """Share of the showings that use natural language."""
        if not self.picture.natural:
            return 0.0
        only = self.rules.caption_mode == "nl" or not any(self.picture.tags)
        return 1.0 if only else self.rules.nl_weight

    def caption(self, seed: int, variant: int) -> str:
        """The caption of a variant: what showing number `variant` of the sample, 0 the first, is trained with."""
        natural, share = self.picture.natural, self.natural_share
        if share > 0:
            phase = uniform(seed, "natural", self.name)
            before = math.floor(variant * share + phase)
            if math.floor((variant + 1) * share + phase) > before:
                return self.dressed(natural[before % len(natural)])
            variant -= before
        tags = self.picture.tags
        return self.tags_caption(seed, tags[variant % len(tags)], variant // len(tags))

    def captions(self, seed: int) -> list[str]:
        """Every caption this sample can be trained with."""
        texts = []
        if self.natural_share < 1:
            orders = range(max(1, self.rules.cache_shuffle_num))
            texts = [self.tags_caption(seed, tags, order) for order in orders for tags in self.picture.tags]
        if self.natural_share > 0:
            texts += map(self.dressed, self.picture.natural)
        return texts

    def tags_caption(self, seed: int, tags: str, order: int) -> str:
        """Tags as they are trained, in one of their orders; these repeat after `cache_shuffle_num`."""

        def arranged(text: str) -> str:
            if self.rules.replace_underscores:
                text = without_underscores(text, delimiter)
            return shuffled_tags(text, delimiter, seed, self.name, order % number) if number and text else text

        number, delimiter = self.rules.cache_shuffle_num, self.rules.cache_shuffle_delimiter
        return self.dressed(tags, arranged)

    def dressed(self, text: str, arranged: Callable[[str], str] = str) -> str:
        """A caption with what stands before it; `arranged` changes all of it but a trigger word it begins with."""
        prefix, word, delimiter = self.rules.caption_prefix, self.rules.trigger_word, self.rules.cache_shuffle_delimiter
        if not word or not text:
            return prefix + arranged(text)
        rest = "" if text == word else arranged(text.removeprefix(word + delimiter))
        return delimiter.join(filter(None, [word, prefix + rest]))

    def latent_key(self, vae_identity: str) -> str:
        """Key of its latent in the cache."""
        return entry_key(
            "latent", image=self.picture.sha256, width=self.size.width, height=self.size.height, vae=vae_identity
        )

    def mask_key(self) -> str:
        """Key of its mask in the cache."""
        picture = self.picture
        return entry_key(
            "mask",
            mask=picture.mask_sha256,
            image_width=picture.width,
            image_height=picture.height,
            width=self.size.width,
            height=self.size.height,
        )
