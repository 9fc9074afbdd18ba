"""How many images and captions are encoded at once."""

import numpy as np
import pytest
import torch

from anima_train.caching.batches import (
    MAX_CAPTIONS,
    MAX_IMAGES,
    BatchSize,
    batches_of_one_size,
    caption_batch_size,
    captions_at_once,
    encoded,
    image_batch_size,
    images_at_once,
)

CPU = torch.device("cpu")
GIB = 2**30


def test_the_cpu_takes_one_at_once_unless_told():
    assert image_batch_size(None, CPU, 96, 4).number(1024**2) == caption_batch_size(None, CPU, 1).number() == 1
    assert image_batch_size(5, CPU, 96, 4).number(1024**2) == caption_batch_size(5, CPU, 1).number() == 5


@pytest.mark.parametrize(
    ("side", "free_gib", "expected"),
    [(1024, 130, 4), (512, 130, 16), (256, 130, MAX_IMAGES), (1024, 6, 2), (1024, 1, 1), (2048, 130, 1), (512, 6, 9)],
)
def test_a_gpu_takes_what_its_resolution_and_free_memory_allow(side, free_gib, expected):
    number = images_at_once(side**2, 96, 2, free_gib * GIB)
    assert number == expected
    # A tensor of full resolution is 96 x side x side numbers of 2 bytes; 6.2 of them live at once.
    assert number == 1 or number * 6.2 * 96 * side**2 * 2 <= free_gib * GIB / 2


def test_captions_on_a_gpu_depend_on_its_free_memory():
    assert [captions_at_once(gib * GIB, 96 * 2**20) for gib in (0, 1, 100)] == [1, 5, MAX_CAPTIONS]


def make(limit, calls):
    """Return an encoder that asks for a petabyte if it gets more than this number of items at once."""

    def encode(batch):
        calls.append(len(batch))
        torch.empty(2**50 if len(batch) > limit else 1, dtype=torch.int8)
        return [item * 10 for item in batch]

    return encode


def test_memory_that_runs_out_halves_what_was_chosen_for_good_with_a_warning(caplog):
    size, calls = BatchSize(None, lambda _: 16), []
    batches = [range(16), range(16, 32), range(32, 35)]
    parts = [part for batch in batches for part in encoded(batch, make(5, calls), size, CPU)]
    assert [item for part, _ in parts for item in part] == list(range(35))
    assert [value for _, values in parts for value in values] == [10 * item for item in range(35)]
    assert calls == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4, 3]
    assert caplog.messages == [
        f"memory ran out with {failed} at once while the cache is filled; it goes on with {number}"
        for failed, number in ((16, 8), (8, 4))
    ]


def test_a_smaller_last_batch_that_does_not_fit_is_halved_below_its_own_number():
    size, calls = BatchSize(None, lambda _: 16), []
    assert [list(part) for part, _ in encoded(range(3), make(1, calls), size, CPU)] == [[0], [1], [2]]
    assert calls == [3, 2, 1, 1, 1]


@pytest.mark.parametrize(("given", "limit"), [(4, 2), (None, 0)])
def test_a_given_number_and_one_alone_are_not_halved(given, limit):
    size = BatchSize(given, lambda _: 4)
    with pytest.raises(RuntimeError, match="allocate memory"):
        list(encoded(range(4), make(limit, []), size, CPU))


def test_other_errors_are_no_lack_of_memory():
    def fail(batch):
        raise RuntimeError("another reason")

    with pytest.raises(RuntimeError, match="another reason"):
        list(encoded(range(4), fail, BatchSize(None, lambda _: 4), CPU))


def test_batches_are_of_one_size_and_as_large_as_that_allows():
    size = BatchSize(None, lambda num_pixels: 64 // num_pixels)
    images = [np.zeros(shape) for shape in [(4, 4, 3)] * 5 + [(4, 8, 3)] * 3 + [(8, 4, 3)]]
    found = [
        [item[1].shape for item in batch] for batch in batches_of_one_size([(None, each) for each in images], size)
    ]
    assert [len(batch) for batch in found] == [4, 1, 2, 1, 1]
    assert all(len(set(batch)) == 1 for batch in found)
