"""A picture, and a picture at one size with its captions: what a batch is made of."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from anima_train.core.random import derive, uniform
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache, entry_key
from anima_train.data.captions import TagVariation, plain_tag, unescaped, without_underscores
from anima_train.data.images import Crop
from anima_train.data.settings import DirectoryOptions
from anima_train.data.sources.archive import ArchiveMember


@dataclass(frozen=True, slots=True)
class Picture:
    """One image with its captions, as they are in the files, and its mask."""

    path: Path  # for an image inside of another file, that file's path and the image's name in it
    sha256: str
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str  # tags; "" where only natural language is used, or nothing
    mask: Path | None
    mask_sha256: str
    more_captions: tuple[str, ...] = ()  # tags too; with `caption` they take turns
    natural: tuple[str, ...] = ()  # in natural language, none empty; none where caption_mode does not use them
    has_alpha: bool = False
    stored: ArchiveMember | None = None  # where the image is inside of another file
    stored_mask: ArchiveMember | None = None

    @property
    def tags(self) -> tuple[str, ...]:
        """All captions that are not in natural language."""
        return (self.caption, *self.more_captions)

    @property
    def has_caption(self) -> bool:
        """Whether any caption holds text."""
        return any(self.tags) or bool(self.natural)

    @property
    def source(self) -> Path | ArchiveMember:
        """Where the image is read from."""
        return self.path if self.stored is None else self.stored

    @property
    def mask_source(self) -> Path | ArchiveMember | None:
        """Where the mask is read from."""
        return self.mask if self.stored_mask is None else self.stored_mask


@dataclass(frozen=True, slots=True)
class Caption:
    """What a repeat is trained with."""

    text: str
    is_fixed: bool = True  # one of a finite set, encoded before training; else drawn for this repeat alone


EMPTY = Caption("")


@functools.cache
def exact(number: float) -> Fraction:
    """The number as it was written: 0.1 is 1/10."""
    return Fraction(str(number))


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture at one size: what a batch is made of."""

    id: str  # unique in the dataset, without any absolute path
    picture: Picture
    size: Size
    resolution: int
    directory: int
    options: DirectoryOptions
    cache: Cache
    repeat_factor: Fraction = Fraction(1)  # on num_repeats, by the weight of the directory

    @property
    def name(self) -> str:
        """Of the picture, in addresses: every resolution shares the same texts in the cache."""
        return self.id.rpartition("@")[0]

    @property
    def repeats(self) -> Fraction:
        """How often it is seen per epoch."""
        return exact(self.options.num_repeats) * self.repeat_factor

    @property
    def is_regularization(self) -> bool:
        """Whether it shows what the model should not forget."""
        return self.options.role == "regularization"

    # Captions. A picture has T captions of tags, each in S = max(1, cache_shuffle_num) orders, and N in natural
    # language. Its repeats 0, 1, 2 ... are its variants. Of those before repeat k, floor(k * share + phase) use
    # natural language, with a phase in [0, 1) of its own for each picture; so each picture keeps the share from its
    # first repeats on, and all of them together in each epoch. The n-th of these repeats uses caption n mod N. The
    # m-th of the others uses caption m mod T, in order (m div T) mod S. So there are at most T * S + N texts, however
    # often the picture is shown; but with shuffle_tags or tag_dropout and without cache_shuffle_num, every m has an
    # order and tags of its own.

    @property
    def natural_share(self) -> float:
        """Share of the repeats that use natural language."""
        if not self.picture.natural:
            return 0.0
        only = self.options.caption_mode == "nl" or not any(self.picture.tags)
        return 1.0 if only else self.options.nl_weight

    def caption(self, seed: int, repeat: int) -> Caption:
        """What repeat number `repeat` of the sample, 0 the first, is trained with."""
        natural, share = self.picture.natural, self.natural_share
        if share > 0:
            phase = uniform(seed, "natural", self.name)
            before = math.floor(repeat * share + phase)
            if math.floor((repeat + 1) * share + phase) > before:
                return Caption(self.with_prefix(natural[before % len(natural)]))
            repeat -= before
        texts = self.picture.tags
        tags, order = texts[repeat % len(texts)], repeat // len(texts)
        if self.options.draws_tags and tags:
            return Caption(self.tags_caption(seed, tags, order), is_fixed=False)
        return Caption(self.tags_caption(seed, tags, self.variants[order % len(self.variants)]))

    @property
    def variants(self) -> list[int | None]:
        """The orders of its tags that are fixed; None is that of the file."""
        return list(range(self.options.cache_shuffle_num)) or [None]

    def fixed_captions(self, seed: int) -> list[str]:
        """Every caption this sample can be trained with but those that are drawn for a repeat."""
        texts = []
        if self.natural_share < 1:
            tags = [text for text in self.picture.tags if not (text and self.options.draws_tags)]
            texts = [self.tags_caption(seed, text, order) for order in self.variants for text in tags]
        return texts + self.natural_captions()

    def captions(self, seed: int) -> list[str]:
        """Every caption it can be trained with; those that are drawn for a repeat as they are before that."""
        drawn = self.options.draws_tags and self.natural_share < 1
        tags = [self.tags_caption(seed, text, None) for text in self.picture.tags if text] if drawn else []
        return tags + self.fixed_captions(seed)

    def evaluation_caption(self) -> Caption:
        """What it is evaluated with: its first caption of tags, or else in natural language, as it is in the file."""
        return Caption(self.plain_captions()[0])

    def plain_captions(self) -> list[str]:
        """Every caption as it is in the file, but dressed."""
        tags = [self.tags_caption(0, text, None) for text in self.picture.tags] if self.natural_share < 1 else []
        return tags + self.natural_captions()

    def natural_captions(self) -> list[str]:
        """The captions in natural language, if any is used."""
        return [self.with_prefix(text) for text in self.picture.natural] if self.natural_share > 0 else []

    def tags_caption(self, seed: int, tags: str, variant: int | None) -> str:
        """Tags as they are trained, in a variant; None changes neither order nor number."""
        options = self.options
        variation = TagVariation(
            options.cache_shuffle_delimiter,
            options.keep_first_n_tags,
            options.shuffle_tags or options.cache_shuffle_num > 0,
            options.tag_dropout,
            frozenset(map(plain_tag, options.protected_tags)),
        )

        def arranged(text: str) -> str:
            if options.replace_underscores:
                text = without_underscores(text, options.cache_shuffle_delimiter)
            return text if variant is None or not text else variation.varied(text, seed, self.name, variant)

        return self.with_prefix(tags, arranged)

    def with_prefix(self, text: str, arranged: Callable[[str], str] = str) -> str:
        """A caption with what stands before it; `arranged` changes all of it but a trigger word it begins with."""
        options = self.options
        prefix, word, delimiter = options.caption_prefix, options.prefix_word, options.cache_shuffle_delimiter
        if options.unescape_parentheses:
            text = unescaped(text)
        if not word or not text:
            return prefix + arranged(text)
        rest = "" if text == word else arranged(text.removeprefix(word + delimiter))
        return delimiter.join(filter(None, [word, prefix + rest]))

    # What is cut out of the picture.

    def views(self) -> "list[View]":
        """Every view of the picture that is trained; the first is the plain one."""
        return [View(self, mirrored) for mirrored in ((False, True) if self.options.horizontal_flip else (False,))]

    def view(self, seed: int, repeat: int) -> "View":
        """The view that repeat number `repeat` is trained with: they take turns, and the first is drawn."""
        views = self.views()
        return views[(repeat + derive(seed, "view", self.name)) % len(views)]

    @property
    def has_mask(self) -> bool:
        """Whether anything but the whole picture is trained."""
        return self.picture.mask is not None or self.masks_alpha

    @property
    def masks_alpha(self) -> bool:
        """Whether the picture's alpha is part of its mask."""
        return self.options.alpha_as_mask and self.picture.has_alpha


@dataclass(frozen=True, slots=True)
class View:
    """A sample's picture as it is cut, mirrored or not: what latents and masks are made from."""

    sample: Sample
    mirrored: bool = False

    @property
    def crop(self) -> Crop:
        """What is made of the picture; the position counts only along the side that is cut."""
        size, picture = self.sample.size, self.sample.picture
        x, y = self.sample.options.position
        if picture.width * size.height <= size.width * picture.height:
            x = 0.5
        if picture.width * size.height >= size.width * picture.height:
            y = 0.5
        return Crop(size.width, size.height, (x, y), self.mirrored)

    def crop_facts(self) -> dict[str, str | int | float]:
        """What a cache key says of the crop; what is as usual is not mentioned, so that older entries stay valid."""
        crop = self.crop
        facts: dict[str, str | int | float] = {"width": crop.width, "height": crop.height}
        if crop.position != (0.5, 0.5):
            facts |= {"x": crop.position[0], "y": crop.position[1]}
        return facts | {"mirrored": 1} if self.mirrored else facts

    def latent_key(self, vae_identity: str) -> str:
        """Key of its latent in the cache."""
        return entry_key("latent", image=self.sample.picture.sha256, vae=vae_identity, **self.crop_facts())

    def mask_key(self) -> str:
        """Key of its mask in the cache."""
        picture = self.sample.picture
        alpha = {"alpha_of": picture.sha256} if self.sample.masks_alpha else {}
        return entry_key(
            "mask",
            mask=picture.mask_sha256,
            image_width=picture.width,
            image_height=picture.height,
            **alpha,
            **self.crop_facts(),
        )
