"""The environment that page templates are rendered in: text becomes printable, then is escaped."""

import base64
import hashlib
import io
import math

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from anima_train.core.format import count, format_bytes, format_duration, printable


def finalize(value: object) -> str:
    """Return markup as it is, and anything else as printable text, which is still to be escaped.

    A template must not join text to markup (`~`, `|join`) before that: the text would be escaped, but not printable.
    """
    return value if isinstance(value, Markup) else printable(str(value))


def rounded(value: float) -> str:
    """Return a number as tables show it, "" if it is not finite."""
    return f"{value + 0.0:.5g}" if math.isfinite(value) else ""  # + 0.0: -0 is 0


def sha256_base64(script: str) -> str:
    """Return the hash by which a Content-Security-Policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Return the image with its longer side at most `side` pixels."""
    width, height = image.size
    factor = min(1.0, side / max(width, height))
    return image.resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.BOX)


def small_jpeg(image: Image.Image, side: int) -> str:
    """Return the image as a JPEG in base64, its longer side at most `side` pixels."""
    file = io.BytesIO()
    shrunk(image, side).save(file, "JPEG", quality=70)
    return base64.b64encode(file.getvalue()).decode("ascii")


TEMPLATES = Environment(
    loader=PackageLoader("anima_train.reports"),
    autoescape=True,
    finalize=finalize,  # of every expression's value, before it is escaped
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters.update(
    counted=count, code_point=ord, grouped="{:,}".format, format_bytes=format_bytes, format_duration=format_duration,
    rounded=rounded, sha256=sha256_base64,
)  # fmt: skip
