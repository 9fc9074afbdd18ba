"""Colours: from any mode and ICC profile to RGB in sRGB, and transparency over a background."""

import io

import numpy as np
from PIL import Image, ImageCms


def colour_mode(mode: str) -> str:
    """Return the mode for the colours of an image of this mode with 8 bits and without alpha: L, RGB or CMYK."""
    if mode in ("1", "L", "LA") or mode.startswith("I"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


def colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours in `colour_mode`, and the alpha as L if anything may be transparent."""
    mode = colour_mode(image.mode)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion to L would clip at 255
        deep = np.asarray(image, dtype=np.uint32)
        grey = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
        transparent = image.info.get("transparency")
        if transparent is None:
            return grey, None
        return grey, Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8))
    if image.has_transparency_data:  # an alpha channel, or transparent palette entries, or one transparent colour
        layered = image.convert("RGBA")
        return layered.convert(mode), layered.getchannel("A")
    return convert(image, mode), None


def srgb_transform(icc: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile's colours to sRGB; None if it is damaged, or not for images of this mode.

    Relative colorimetric with black point compensation: what photo editors do by default.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc or b""))
        source = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space, "")
        if source != mode and (source, mode) != ("RGB", "L"):
            return None
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), source, "RGB", intent, flags)
    except (OSError, ImageCms.PyCMSError):
        return None


def to_srgb(colour: Image.Image, icc: bytes | None) -> Image.Image:
    """Return the colours as RGB in sRGB; without a usable profile grey and RGB are sRGB, CMYK is converted plainly."""
    transform = srgb_transform(icc, colour.mode)
    if transform is None:
        return convert(colour, "RGB")
    return transform.apply(colour.convert(transform.input_mode))


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in this mode; itself, not a copy, if it is in it already."""
    return image if image.mode == mode else image.convert(mode)


def composite(colour: Image.Image, alpha: Image.Image | None, background: str) -> Image.Image:
    """Return the RGB colours over a background, by their alpha."""
    if alpha is None:
        return colour
    canvas = Image.new("RGB", colour.size, background)
    canvas.paste(colour, mask=alpha)
    return canvas
