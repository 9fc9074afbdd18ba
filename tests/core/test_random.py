"""Addressed randomness: stable for ever, and independent."""

import hashlib
import itertools
import random
import statistics

import numpy as np
import pytest
import torch

from anima_train.core.random import derive, shuffled, stream, uniform

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("address", "number"),
    [
        ((0,), 3582888934675442504),
        ((0, "noise", 3, "0/cat.png@512"), 218266359995845177),
        ((1, "noise", 3, "0/cat.png@512"), 2709555631590827115),
        ((0, "noise", "3", "0/cat.png@512"), 2309489079546454162),
        ((2**70, "x"), 3372842084141675569),
        ((-1, "猫\n'\""), 2684382773171402197),
    ],
)
def test_numbers_are_the_same_in_every_version(address, number):
    """A changed number here means that no old run can be resumed or repeated."""
    assert derive(*address) == number


def test_numbers_are_the_start_of_a_sha256():
    digest = hashlib.sha256(b"(7, 'a', 2)").digest()
    assert derive(7, "a", 2) == int.from_bytes(digest[:8], "little") // 2


def test_every_part_of_the_address_counts():
    addresses = [
        (0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", "1"), (0, "a"), (0, "a", 1, 0), (0, 1, "a"),
        (0, "a, 1"), (0, "a'", 1), (0, "a1"), (0, "a", 11), (0, "", "a", 1),
    ]  # fmt: skip
    assert len({derive(*address) for address in addresses}) == len(addresses)


def test_numbers_fit_a_torch_seed():
    assert all(0 <= derive(0, index) < 2**63 for index in range(1000))


def test_a_stream_depends_on_its_address_alone():
    torch.manual_seed(1)
    first = torch.randn(5, generator=stream(0, "noise", 1))
    torch.manual_seed(2)
    torch.randn(100)
    stream(0, "noise", 0)
    assert torch.equal(torch.randn(5, generator=stream(0, "noise", 1)), first)


def test_neighbouring_streams_are_unrelated():
    draws = torch.stack([torch.randn(4096, generator=stream(0, "noise", index)) for index in range(8)])
    correlation = torch.corrcoef(draws) - torch.eye(8)
    assert correlation.abs().max() < 5 / 4096**0.5  # five standard errors


def test_no_global_generator_is_read_or_moved():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    torch.randn(3, generator=stream(0, "a"))
    uniform(0, "a")
    shuffled(LETTERS, str, 0, "a")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_uniform_numbers_are_uniform():
    numbers = [uniform(0, "t", index) for index in range(20_000)]
    assert all(0 <= number < 1 for number in numbers)
    assert statistics.mean(numbers) == pytest.approx(1 / 2, abs=5 * (1 / 12 / 20_000) ** 0.5)
    assert statistics.variance(numbers) == pytest.approx(1 / 12, abs=5 * (1 / 180 / 20_000) ** 0.5)


def test_an_order_is_the_same_in_every_version():
    assert "".join(shuffled("abcdefgh", str, 0, "epoch", 1)) == "cedfhabg"


def test_an_order_holds_every_item_once_and_depends_on_seed_and_address():
    orders = [shuffled(LETTERS, str, seed, "epoch", epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    assert all(sorted(order) == sorted(LETTERS) for order in orders)
    assert all(first != second for first, second in itertools.combinations(orders, 2))


def test_an_order_does_not_depend_on_the_order_before():
    assert shuffled(reversed(LETTERS), str, 0, "epoch") == shuffled(LETTERS, str, 0, "epoch")


def test_adding_an_item_leaves_the_order_of_the_others_alone():
    whole = shuffled(LETTERS, str, 0, "epoch")
    for missing in LETTERS:
        kept = [letter for letter in LETTERS if letter != missing]
        assert shuffled(kept, str, 0, "epoch") == [letter for letter in whole if letter != missing]


def test_every_order_is_equally_likely():
    orders = ["".join(shuffled("abc", str, seed)) for seed in range(6000)]
    counts = [orders.count("".join(order)) for order in itertools.permutations("abc")]
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001


def test_items_are_ordered_by_their_keys():
    items = [{"name": letter} for letter in LETTERS]
    order = shuffled(items, lambda item: item["name"], 0, "epoch")
    assert [item["name"] for item in order] == shuffled(LETTERS, str, 0, "epoch")


def test_equal_keys_keep_all_their_items():
    assert sorted(shuffled([(1, "a"), (1, "b"), (2, "c")], lambda item: item[0], 0)) == [(1, "a"), (1, "b"), (2, "c")]
