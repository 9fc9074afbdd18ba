"""Aspect-ratio buckets: the pixel sizes an image can be trained at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

SIDE_MULTIPLE = 16  # pixels: 8 by the VAE, 2 by the patches


@dataclass(frozen=True, order=True)
class Size:
    """A width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def aspect(self) -> float:
        """The width over the height."""
        return self.width / self.height

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the square with this area."""
        return round(math.sqrt(self.width * self.height))

    def fitted(self, width: int, height: int) -> "Size":
        """Return the largest size of about this aspect ratio that an image of this width and height covers unenlarged.

        A side of the image that is below 16 pixels is enlarged all the same.
        """
        scale = min(Fraction(1), Fraction(width, self.width), Fraction(height, self.height))

        def down(side: int) -> int:
            return max(SIDE_MULTIPLE, int(side * scale) // SIDE_MULTIPLE * SIDE_MULTIPLE)

        return Size(down(self.width), down(self.height))

    @property
    def num_tokens(self) -> int:
        """The number of image tokens in the transformer."""
        return (self.width // SIDE_MULTIPLE) * (self.height // SIDE_MULTIPLE)


def aspect_ratios(min_ar: float, max_ar: float, number: int) -> list[float]:
    """Return aspect ratios, width over height, evenly spaced in the logarithm from `min_ar` to `max_ar`."""
    if number == 1:
        return [math.sqrt(min_ar * max_ar)]
    step = (math.log(max_ar) - math.log(min_ar)) / (number - 1)
    return [math.exp(math.log(min_ar) + index * step) for index in range(number)]


def size_of(resolution: int, aspect: float) -> Size:
    """Return the size of about `resolution`^2 pixels with this aspect ratio, sides rounded to multiples of 16."""
    width = math.sqrt(resolution**2 * aspect)
    return Size(round_side(width), round_side(width / aspect))


def round_side(side: float) -> int:
    """Return the nearest multiple of 16, at least 16."""
    return max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)


def nearest(aspect: float, sizes: Sequence[Size]) -> Size:
    """Return the size whose aspect ratio is nearest in the logarithm; of equals the first."""
    return min(sizes, key=lambda size: abs(math.log(size.aspect) - math.log(aspect)))


def kept_fraction(width: int, height: int, size: Size) -> Fraction:
    """Return the share of an image's area that covering `size` and cropping keeps, in (0, 1], exactly."""
    ratio = Fraction(width * size.height, height * size.width)
    return min(ratio, 1 / ratio)
