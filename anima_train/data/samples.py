"""Pictures, samples (a picture at one size with its captions) and views of them: the parts of a batch."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from anima_train.core.random import derive, uniform
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache, entry_key
from anima_train.data.captions import unescaped, vary_tags
from anima_train.data.images import Crop
from anima_train.data.settings import DirectoryOptions
from anima_train.data.sources.archive import ArchiveMember


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with its mask and with its captions as they are in the files."""

    path: Path  # for messages; of an image inside of another file: that file's path and the image's name in it
    source: Path | ArchiveMember
    sha256: str
    width: int  # pixels, after EXIF orientation
    height: int
    tags: tuple[str, ...] = ("",)  # captions of tags, used in turn; ("",) where there is none, or none is used
    natural: tuple[str, ...] = ()  # in natural language, no empty one; () where caption_mode does not use them
    mask: Path | ArchiveMember | None = None
    mask_sha256: str = ""
    has_alpha: bool = False

    @property
    def has_caption(self) -> bool:
        """True if any caption holds text."""
        return any(self.tags) or bool(self.natural)


@dataclass(frozen=True, slots=True)
class Caption:
    """The caption of one repeat of a sample."""

    text: str
    is_fixed: bool = True  # one of a finite set, encoded before training; else drawn for this repeat


EMPTY = Caption("")
ROLES: tuple[Literal["train", "regularization", "preservation"], ...] = ("train", "regularization", "preservation")
WAYS: tuple[Literal["nl", "tags_nl", "nl_tags", "tags"], ...] = ("nl", "tags_nl", "nl_tags", "tags")  # to use captions


@functools.cache
def exact(number: float) -> Fraction:
    """Return the number as it was written: 0.1 is 1/10."""
    return Fraction(str(number))


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture at one size, with its captions and options."""

    id: str  # unique in the dataset, without any absolute path
    picture: Picture
    size: Size
    resolution: int
    directory: int
    options: DirectoryOptions
    cache: Cache
    repeat_factor: Fraction = Fraction(1)  # on num_repeats, by the weight of the directory
    is_preserved: bool = False  # True: it shows no more than what the base model does with it, and that is its target

    @property
    def name(self) -> str:
        """The picture's name in random addresses: the same at every resolution, so that they share their captions."""
        return self.id.rpartition("@")[0]

    @property
    def file(self) -> str:
        """The picture's path in its directory, for messages."""
        return self.name.partition("/")[2]

    @property
    def folder(self) -> Path:
        """The directory, or the archive or dataset that is one."""
        return self.picture.path.parents[self.file.count("/")]

    @property
    def repeats(self) -> Fraction:
        """The number of times it is seen per epoch."""
        return exact(self.options.num_repeats) * self.repeat_factor

    @property
    def role(self) -> Literal["train", "regularization", "preservation"]:
        """Its purpose: only images of "train" show something new."""
        return "preservation" if self.is_preserved else self.options.role

    # Captions. A picture has T captions of tags, each in S = max(1, cache_shuffle_num) orders, and N in natural
    # language. Its repeats 0, 1, 2 ... are its variants. Of those before repeat k, floor(k * share + phase) use
    # natural language, with a phase in [0, 1) of its own for each picture; so each picture keeps the share from its
    # first repeats on, and all of them together in each epoch. The n-th of these repeats uses caption n mod N. The
    # m-th of the others uses caption m mod T, in order (m div T) mod S. So there are at most T * S + N texts, however
    # often the picture is shown; but with shuffle_tags or tag_dropout and without cache_shuffle_num, every m has an
    # order and tags of its own. With `caption_shares` repeats are parted among four ways one after the other by the
    # same rule; those that use both take the tags and the sentences of their number.

    @property
    def shares(self) -> dict[str, float]:
        """The share of the repeats for each way to use captions; the last one takes what the others leave."""
        options, picture = self.options, self.picture
        if not picture.natural:
            return {"tags": 1.0}
        if options.caption_mode == "nl" or not any(picture.tags):
            return {"nl": 1.0}
        if options.caption_shares is None:
            return {"nl": options.nl_weight, "tags": 1 - options.nl_weight}
        shares = {way: options.caption_shares.get(way, 0.0) for way in WAYS}
        total = sum(shares.values())
        return {way: share / total for way, share in shares.items()}

    def uses(self, *ways: str) -> bool:
        """Return True if some repeat uses captions in one of these ways."""
        return any(share > 0 for way, share in self.shares.items() if way in ways)

    def caption(self, seed: int, repeat: int) -> Caption:
        """Return the caption of a repeat, 0 the first."""
        shares, left = {way: share for way, share in self.shares.items() if share > 0}, 1.0
        for way, share in list(shares.items())[:-1]:
            of_left = share / left
            phase = uniform(seed, "natural" if way == "nl" else way, self.name)
            before = math.floor(repeat * of_left + phase)
            if math.floor((repeat + 1) * of_left + phase) > before:
                return self.caption_in(seed, way, before)
            repeat, left = repeat - before, left - share
        return self.caption_in(seed, list(shares)[-1], repeat)

    def caption_in(self, seed: int, way: str, number: int) -> Caption:
        """Return the caption of the repeat of this number, 0 the first, among those that use captions in one way."""
        natural, texts = self.picture.natural, self.picture.tags
        if way == "nl":
            return Caption(self.with_prefix(natural[number % len(natural)]))
        sentences = natural[number % len(natural)] if way != "tags" else ""
        tags, order = texts[number % len(texts)], number // len(texts)
        if self.options.draws_tags and tags:
            return Caption(self.tags_caption(seed, tags, order, sentences, way == "nl_tags"), is_fixed=False)
        variant = self.variants[order % len(self.variants)]
        return Caption(self.tags_caption(seed, tags, variant, sentences, way == "nl_tags"))

    @property
    def variants(self) -> list[int | None]:
        """The variants of its tags that are encoded before training; None is the order of the file."""
        return list(range(self.options.cache_shuffle_num)) or [None]

    def fixed_captions(self, seed: int) -> list[str]:
        """Return every caption this sample can be trained with, except those that are drawn anew for each repeat."""
        texts = []
        if self.uses("tags"):
            tags = [text for text in self.picture.tags if not (text and self.options.draws_tags)]
            texts = [self.tags_caption(seed, text, order) for order in self.variants for text in tags]
        number = math.lcm(len(self.picture.tags) * len(self.variants), max(1, len(self.picture.natural)))
        both = [
            caption.text
            for way in ("tags_nl", "nl_tags")
            for caption in (self.caption_in(seed, way, each) for each in range(number if self.uses(way) else 0))
            if caption.is_fixed
        ]
        return texts + both + self.natural_captions()

    def captions(self, seed: int) -> list[str]:
        """Return every caption it can be trained with; those that are drawn anew for each repeat as before drawing."""
        is_drawn = self.options.draws_tags and self.uses("tags", "tags_nl", "nl_tags")
        return (self.with_tags(empty=False) if is_drawn else []) + self.fixed_captions(seed)

    def evaluation_caption(self) -> Caption:
        """Return the caption for evaluation: its first one of tags, or else in natural language, as in the file."""
        return Caption(self.plain_captions()[0])

    def plain_captions(self) -> list[str]:
        """Return every caption as it is in the file, but `with_prefix`."""
        return self.with_tags() + self.natural_captions()

    def with_tags(self, empty: bool = True) -> list[str]:
        """Return the captions that hold tags, as they are in the file, but `with_prefix`; none if none is used.

        Args:
            empty: True if captions without a tag are among them.
        """
        texts = [text for text in self.picture.tags if text or empty]
        tags = [self.tags_caption(0, text, None) for text in texts] if self.uses("tags") else []
        pairs = [(text, natural) for text in self.picture.tags for natural in self.picture.natural if text]
        for way in ("tags_nl", "nl_tags"):
            if self.uses(way):
                tags.extend(self.tags_caption(0, text, None, natural, way == "nl_tags") for text, natural in pairs)
        return tags

    def natural_captions(self) -> list[str]:
        """Return the captions in natural language, if any is used alone."""
        return [self.with_prefix(text) for text in self.picture.natural] if self.uses("nl") else []

    def tags_caption(
        self, seed: int, tags: str, variant: int | None, sentences: str = "", sentences_first: bool = False
    ) -> str:
        """Return tags as they are trained, in a variant; None changes neither their order nor their number.

        Args:
            seed: of the run.
            tags: as in the file.
            variant: of their order and number.
            sentences: in a line of their own beside them; "" for none.
            sentences_first: True if that line comes first.
        """
        vary = functools.partial(vary_tags, options=self.options, seed=seed, sample=self.name, variant=variant)
        if self.options.unescape_parentheses:
            tags, sentences = unescaped(tags), unescaped(sentences)
        if sentences_first:
            return self.with_prefix(sentences, lambda text, num_fixed: joined(text, vary(tags)))
        return self.with_prefix(tags, lambda text, num_fixed: joined(vary(text, num_fixed=num_fixed), sentences))

    def with_prefix(self, text: str, vary: Callable[..., str] | None = None) -> str:
        """Return a caption with trigger word and prefix.

        Args:
            text: of the caption.
            vary: all of it but a trigger word that it begins with; takes the number of tags that stay as `num_fixed`.
        """
        options = self.options
        prefix, word, delimiter = options.caption_prefix, options.prefix_word, options.cache_shuffle_delimiter
        if options.unescape_parentheses:
            text = unescaped(text)

        def varied(text: str, num_fixed: int = 0) -> str:
            return text if vary is None else vary(text, num_fixed=num_fixed)

        if not word or not text:
            return prefix + varied(text)
        spelled = text.replace("_", " ") if options.replace_underscores and vary is not None else text
        if not re.match(rf"{re.escape(word)}(?!\w)", text) and not re.match(rf"{re.escape(word)}(?!\w)", spelled):
            return delimiter.join(filter(None, [word, prefix + varied(text)]))
        rest = text[len(word) :]
        behind = re.match(rf"{re.escape(delimiter)}|\s*\n\s*|\s*,\s*|$", rest)
        if behind is None:  # a tag or a sentence that begins with it
            return prefix + varied(text, num_fixed=1)
        between = behind[0] if "\n" in behind[0] else delimiter
        return between.join(filter(None, [word, prefix + varied(rest[behind.end() :])]))

    # Views of the picture.

    def views(self) -> "list[View]":
        """Return every view of the picture that is trained; the first is not mirrored."""
        return [View(self, mirrored) for mirrored in ((False, True) if self.options.horizontal_flip else (False,))]

    def view(self, seed: int, repeat: int) -> "View":
        """Return the view of a repeat: they alternate, and the first one is drawn from the seed."""
        views = self.views()
        return views[(repeat + derive(seed, "view", self.name)) % len(views)]

    @property
    def has_mask(self) -> bool:
        """True if anything but the whole picture is trained."""
        return self.picture.mask is not None or self.masks_alpha

    @property
    def masks_alpha(self) -> bool:
        """True if the picture's alpha is part of its mask."""
        return self.options.alpha_as_mask and self.picture.has_alpha


def joined(*lines: str) -> str:
    """Return lines as one text, without empty ones."""
    return "\n".join(filter(None, lines))


@dataclass(frozen=True, slots=True)
class View:
    """A sample's picture as it is cropped, mirrored or not: the source of a latent and a mask."""

    sample: Sample
    mirrored: bool = False

    @property
    def crop(self) -> Crop:
        """The crop of the picture; a position along a side that is not cut is 0.5, whatever the options say."""
        size, picture = self.sample.size, self.sample.picture
        x, y = self.sample.options.position
        if picture.width * size.height <= size.width * picture.height:
            x = 0.5
        if picture.width * size.height >= size.width * picture.height:
            y = 0.5
        return Crop(size.width, size.height, (x, y), self.mirrored)

    def crop_key(self) -> dict[str, str | int | float]:
        """Return the crop's part of a cache key; defaults are left out, so that older entries stay valid."""
        crop = self.crop
        key: dict[str, str | int | float] = {"width": crop.width, "height": crop.height}
        if crop.position != (0.5, 0.5):
            key |= {"x": crop.position[0], "y": crop.position[1]}
        return key | {"mirrored": 1} if self.mirrored else key

    def latent_key(self, vae_identity: str) -> str:
        """Return the key of its latent in the cache."""
        return entry_key("latent", image=self.sample.picture.sha256, vae=vae_identity, **self.crop_key())

    def mask_key(self) -> str:
        """Return the key of its mask in the cache."""
        picture = self.sample.picture
        key = self.crop_key() | {"image_width": picture.width, "image_height": picture.height}
        if self.sample.masks_alpha:
            key["alpha_of"] = picture.sha256
        return entry_key("mask", mask=picture.mask_sha256, **key)
