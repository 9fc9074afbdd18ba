"""The images of a directory, each read with its captions and its mask."""

import concurrent.futures
from collections.abc import Sequence
from typing import NamedTuple

from anima_train.data.captions import BadCaption, read_caption
from anima_train.data.image_headers import BadImage
from anima_train.data.image_index import ImageIndex
from anima_train.data.samples import Picture
from anima_train.data.settings import DirectoryOptions
from anima_train.data.sources.folder import Files, stem_of


class ScannedImage(NamedTuple):
    """An image that can be used, and what its scan found."""

    file: str  # its path in the directory
    picture: Picture
    is_uncaptioned: bool  # no caption of the kind that caption_mode asks for, not even an empty one
    warnings: Sequence[str]  # of `probe`, from the header
    mask_coverage: float = 1.0  # share of the image that its mask trains


def scan_images(
    files: Files, options: DirectoryOptions, image_index: ImageIndex, mask_index: ImageIndex
) -> tuple[list[ScannedImage], list[str]]:
    """Return the images that can be used, and "path: reason" for the others; read by several threads."""

    def attempt(name: str) -> ScannedImage | str:
        try:
            return scan_image(name, files, options, image_index, mask_index)
        except (BadImage, BadCaption) as error:
            return f"{files.folder / name}: {error}"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(attempt, files.images))
    images = [image for image in found if isinstance(image, ScannedImage)]
    return images, [reason for reason in found if isinstance(reason, str)]


def scan_image(
    name: str, files: Files, options: DirectoryOptions, image_index: ImageIndex, mask_index: ImageIndex
) -> ScannedImage:
    """Read an image's header, captions and mask.

    Raises:
        BadImage: the image or its mask cannot be used.
        BadCaption: a caption cannot be used.
    """
    source = files.file(name)
    record = image_index.lookup(name, source)
    stem = stem_of(name)
    tags: tuple[str, ...] = ()
    natural: tuple[str, ...] = ()
    if options.caption_mode != "nl":
        tags = files.listed_captions.get(name) or captions_in(files, files.caption_files.get(stem), options)
    if options.caption_mode != "tags":
        natural = files.listed_natural.get(name) or captions_in(files, files.natural_files.get(stem), options)
    mask, mask_sha256, coverage = None, "", 1.0
    if (file := mask_name(files, stem)) is not None:
        mask = files.file(file) if files.mask_folder is None else files.mask(file)
        try:
            mask_record = mask_index.lookup(file, mask)
            mask_sha256, coverage = mask_record.sha256, mask_record.coverage
        except BadImage as error:
            raise BadImage(f"its mask {file}: {error}") from error
    picture = Picture(
        path=files.folder / name,
        source=source,
        sha256=record.sha256,
        width=record.width,
        height=record.height,
        tags=tags or ("",),
        natural=tuple(filter(None, natural)),
        mask=mask,
        mask_sha256=mask_sha256,
        has_alpha=record.has_alpha,
    )
    return ScannedImage(name, picture, not tags and not natural, record.warnings, coverage)


def mask_name(files: Files, stem: str) -> str | None:
    """Return the name of an image's mask, in the mask folder or, without one, beside the image."""
    if files.mask_folder is not None:
        return files.mask_files[stem][0] if stem in files.mask_files else None
    return files.masks_beside[stem][0] if stem in files.masks_beside else None


def captions_in(files: Files, names: Sequence[str] | None, options: DirectoryOptions) -> tuple[str, ...]:
    """Return the captions in the first of these caption files; none if there is no file.

    Raises:
        BadCaption: it cannot be used; names the file.
    """
    if not names:
        return ()
    try:
        text = read_caption(files.file(names[0]))
    except BadCaption as error:
        raise BadCaption(f"its caption {names[0]}: {error}") from error
    lines = text.split("\n") if options.captions_per_line else [text]
    return tuple(line for line in map(str.strip, lines) if line) or ("",)
