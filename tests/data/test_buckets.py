"""Bucket sizes, compared with values worked out by hand and with the definition of covering and cropping."""

import math
import random

import pytest

from anima_train.data.buckets import Size, aspect_ratios, kept_fraction, nearest, round_side, size_of

# 1024 * 2^(k/8) for k = -4 ... 4, each to the nearest multiple of 16; the height belongs to -k.
SIZES_1024 = [
    (720, 1456), (784, 1328), (864, 1216), (944, 1120), (1024, 1024), (1120, 944), (1216, 864), (1328, 784), (1456, 720)
]  # fmt: skip


def test_ratios_are_evenly_spaced_in_the_logarithm():
    assert aspect_ratios(0.5, 2.0, 9) == pytest.approx([2 ** (k / 4) for k in range(-4, 5)], rel=1e-12)


def test_one_ratio_is_the_geometric_mean():
    assert aspect_ratios(0.5, 8.0, 1) == pytest.approx([2.0])


def test_equal_ends_give_one_size():
    assert {size_of(512, ratio) for ratio in aspect_ratios(1.0, 1.0, 5)} == {Size(512, 512)}


def test_sizes_of_the_standard_buckets():
    assert [size_of(1024, ratio) for ratio in aspect_ratios(0.5, 2.0, 9)] == [Size(*size) for size in SIZES_1024]


def test_sides_are_multiples_of_16_and_the_area_is_that_of_the_resolution():
    for resolution in (256, 512, 768, 1024, 1536):
        for ratio in aspect_ratios(0.25, 4.0, 33):
            size = size_of(resolution, ratio)
            assert size.width % 16 == 0
            assert size.height % 16 == 0
            # Each side is off by 8 pixels at most.
            exact_width, exact_height = resolution * math.sqrt(ratio), resolution / math.sqrt(ratio)
            assert abs(size.width - exact_width) <= 8
            assert abs(size.height - exact_height) <= 8
            assert abs(size.width * size.height / resolution**2 - 1) <= 8 / exact_width + 8 / exact_height + 1e-3


def test_a_side_is_never_zero():
    assert round_side(3.0) == 16
    assert size_of(64, 100.0) == Size(640, 16)


def test_nearest_is_in_the_logarithm():
    sizes = [Size(512, 512), Size(1024, 512)]
    # Between 1 and 2 the border is the square root of 2, not 1.5.
    assert nearest(1.41, sizes) == Size(512, 512)
    assert nearest(1.42, sizes) == Size(1024, 512)


def test_of_equally_near_sizes_the_first_is_taken():
    assert nearest(1.0, [Size(1024, 1024), Size(512, 512)]) == Size(1024, 1024)


def test_a_picture_turned_by_90_degrees_gets_the_turned_size():
    sizes = [Size(*size) for size in SIZES_1024]
    generator = random.Random(0)
    for _ in range(200):
        aspect = math.exp(generator.uniform(-1.5, 1.5))
        found, turned = nearest(aspect, sizes), nearest(1 / aspect, sizes)
        assert (found.width, found.height) == (turned.height, turned.width)


def test_kept_fraction_is_the_area_left_after_covering_and_cropping():
    generator = random.Random(0)
    for _ in range(200):
        width, height = generator.randint(1, 4000), generator.randint(1, 4000)
        size = Size(16 * generator.randint(1, 100), 16 * generator.randint(1, 100))
        scale = max(size.width / width, size.height / height)
        expected = size.width * size.height / (width * scale * height * scale)
        assert kept_fraction(width, height, size) == pytest.approx(expected)


def test_nothing_is_cropped_where_the_aspect_ratio_is_equal():
    assert kept_fraction(300, 200, Size(48, 32)) == 1.0


def test_a_size_knows_its_tokens_and_its_resolution():
    size = Size(720, 1456)
    assert size.num_tokens == 45 * 91
    assert size.resolution == 1024  # sqrt(720 * 1456) = 1023.9
    assert str(size) == "720x1456"
