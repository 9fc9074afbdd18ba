"""The plan of batches: what is shown when, to whom, and that nothing is lost."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from anima_train.core.errors import ConfigError
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache
from anima_train.data.plan import EpochSchedule, MicroBatch, Plan, SampleRef, Step, batch_size_for
from anima_train.data.samples import Picture, Sample
from anima_train.data.settings import DirectoryOptions

SIZES = [(64, Size(64, 64)), (64, Size(48, 96)), (64, Size(96, 48)), (128, Size(128, 128)), (128, Size(96, 176))]
CACHE = Cache(Path("unused"))


def sample(name: str, place: int = 0, repeats: float = 1, directory: int = 0) -> Sample:
    resolution, size = SIZES[place]
    picture = Picture(Path(f"{name}.png"), Path(f"{name}.png"), name, 100, 100)
    options = DirectoryOptions(num_repeats=repeats)
    return Sample(f"{directory}/{name}.png@{resolution}", picture, size, resolution, directory, options, CACHE)


def samples(number: int, repeats: float = 1, directory: int = 0) -> list[Sample]:
    """Samples spread unevenly over the sizes."""
    generator = random.Random(number)
    weights = (5, 1, 2, 4, 1)
    places = generator.choices(range(len(SIZES)), weights, k=number)
    return [sample(f"{index:03}", place, repeats, directory) for index, place in enumerate(places)]


def plan(items: Sequence[Sample], seed: int = 0, batch: object = 3, micro_batches: int = 2) -> Plan:
    return Plan(items, seed, batch, micro_batches)


def refs(steps: Sequence[Step]) -> list[SampleRef]:
    return [ref for step in steps for micro_batch in step.micro_batches for ref in micro_batch.refs]


def shown(planned: Plan, epoch: int) -> Counter[int]:
    """How often each sample is shown in an epoch."""
    return Counter(ref.sample for ref in refs(planned.epoch(epoch)))


def ids(steps: Sequence[Step], items: Sequence[Sample]) -> list[str]:
    return [items[ref.sample].id for ref in refs(steps)]


# What is shown


@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_every_sample_is_shown_num_repeats_times_in_every_epoch(repeats: int):
    planned = plan(samples(37, repeats))
    for epoch in range(3):
        assert shown(planned, epoch) == dict.fromkeys(range(37), repeats)


@pytest.mark.parametrize("repeats", [0.5, 0.1, 0.3, 0.75, 1.5, 2.25, 0.333])
def test_fractional_repeats_take_turns(repeats: float):
    number = 13
    planned = plan(samples(number, repeats))
    exact = Fraction(str(repeats))
    total: Counter[int] = Counter()
    for epoch in range(25):
        now = shown(planned, epoch)
        assert math.floor(number * exact) <= now.total() <= math.ceil(number * exact)
        total += now
        for index in range(number):
            assert math.floor((epoch + 1) * exact) <= total[index] <= math.ceil((epoch + 1) * exact)


def test_half_of_the_images_are_shown_in_one_epoch_and_the_others_in_the_next():
    planned = plan(samples(20, 0.5))
    first, second = shown(planned, 0), shown(planned, 1)
    assert len(first) == len(second) == 10
    assert first + second == dict.fromkeys(range(20), 1)


@pytest.mark.parametrize("repeats", [0.5, 0.2])
def test_a_share_of_the_images_is_shown_at_all_of_their_resolutions(repeats: float):
    items = [sample(f"{index:03}", place, repeats) for index in range(10) for place in (0, 3)]
    planned, number = plan(items), round(1 / repeats)
    seen = []
    for epoch in range(number):
        found = shown(planned, epoch)
        pictures = {items[index].name for index in found}
        assert len(pictures) == 10 * repeats
        assert sorted(found) == [index for index, item in enumerate(items) if item.name in pictures]
        seen.extend(pictures)
    assert len(set(seen)) == 10


def test_each_directory_has_its_own_repeats():
    items = samples(10, 3, 0) + samples(12, 0.5, 1) + samples(7, 1, 2)
    total = sum((shown(plan(items), epoch) for epoch in range(2)), Counter())
    assert [total[index] for index in range(29)] == [6] * 10 + [1] * 12 + [2] * 7
    for epoch in range(2):
        assert sum(number for index, number in shown(plan(items), epoch).items() if 10 <= index < 22) == 6


def test_samples_of_one_directory_may_have_different_repeats():
    items = [item for pair in zip(samples(12, 3), samples(12, 0.5), strict=True) for item in pair]
    for epoch in range(2):
        now = shown(plan(items), epoch)
        assert [now[index] for index in range(0, 24, 2)] == [3] * 12
        assert sum(now[index] for index in range(1, 24, 2)) == 6


@pytest.mark.parametrize("repeats", [1, 3, 0.3])
def test_the_repeats_of_a_sample_are_numbered_through_the_run(repeats: float):
    planned = plan(samples(7, repeats))
    numbers: dict[int, list[int]] = {index: [] for index in range(7)}
    for epoch in range(20):
        for ref in sorted(refs(planned.epoch(epoch)), key=lambda ref: ref.repeat):
            numbers[ref.sample].append(ref.repeat)
    assert all(found == list(range(len(found))) and found for found in numbers.values())


def test_repeat_offsets_are_exact_in_the_millionth_epoch_too():
    planned = plan(samples(10, 0.1))
    for epoch in (10**6, 10**9, 10**15):
        assert [shown(planned, epoch + more).total() for more in range(10)] == [1] * 10
        assert sum((shown(planned, epoch + more) for more in range(10)), Counter()) == dict.fromkeys(range(10), 1)


# Batches


def test_a_micro_batch_holds_one_size_and_only_the_last_of_a_size_is_short():
    items = samples(50)
    short: Counter[Size] = Counter()
    for step in plan(items, batch=[(64, 4), (128, 2)]).epoch(0):
        for micro_batch in step.micro_batches:
            assert {items[ref.sample].size for ref in micro_batch.refs} == {micro_batch.size}
            wanted = {64: 4, 128: 2}[items[micro_batch.refs[0].sample].resolution]
            assert 1 <= len(micro_batch.refs) <= wanted
            short[micro_batch.size] += len(micro_batch.refs) < wanted
    assert max(short.values()) == 1


def test_only_the_last_step_is_short():
    lengths = [len(step.micro_batches) for step in plan(samples(50), micro_batches=4).epoch(0)]
    assert set(lengths[:-1]) == {4}
    assert 1 <= lengths[-1] <= 4


def test_a_step_counts_its_samples():
    steps = plan(samples(50)).epoch(0)
    assert sum(step.num_samples for step in steps) == 50


def test_a_plan_is_a_function_of_seed_and_epoch():
    items = samples(40)
    first = plan(items).epoch(3)
    assert plan(items).epoch(3) == first
    asked_before = plan(items)
    asked_before.epoch(0)
    assert asked_before.epoch(3) == first
    assert plan(items).epoch(4) != first
    assert plan(items, seed=1).epoch(3) != first
    # The order of the batches by itself, too.
    assert plan(items, batch=1).epoch(3) != plan(items, batch=1).epoch(4)
    assert plan(items, seed=1, batch=1).epoch(3) != plan(items, batch=1).epoch(3)


def test_epochs_differ_in_composition_not_only_in_order():
    def batches(epoch: int) -> set[frozenset[int]]:
        return {
            frozenset(ref.sample for ref in micro_batch.refs)
            for step in plan([sample(f"{index}") for index in range(60)]).epoch(epoch)
            for micro_batch in step.micro_batches
        }

    assert len(batches(0) & batches(1)) <= 2


def test_sizes_are_mixed_within_an_epoch():
    items = [sample(f"{index}", index % 2) for index in range(200)]
    sizes = [micro_batch.size for step in plan(items).epoch(0) for micro_batch in step.micro_batches]
    changes = sum(a != b for a, b in itertools.pairwise(sizes))
    assert changes > len(sizes) / 4  # half expected; 1 if one size came after the other


def test_one_more_image_leaves_the_order_of_the_others():
    items = [sample(f"{index:02}") for index in range(30)]
    more = [*items[:11], sample("new"), *items[11:]]
    # One wide batch shows the order in the bucket.
    before = ids(plan(items, batch=100).epoch(2), items)
    after = ids(plan(more, batch=100).epoch(2), more)
    assert [name for name in after if "new" not in name] == before
    assert len(after) == 31


def test_the_number_of_steps_is_known_without_planning():
    generator = random.Random(0)
    for _ in range(60):
        items = [
            one
            for directory in range(generator.randint(1, 3))
            for one in samples(generator.randint(1, 30), generator.choice([1, 2, 3, 0.5, 0.1, 0.7, 1.3]), directory)
        ]
        batch = generator.choice([1, 2, 5, [(64, 4), (128, 1)]])
        planned = plan(items, generator.randint(0, 9), batch, generator.randint(1, 5))
        for epoch in range(4):
            assert planned.steps_in(epoch) == len(planned.epoch(epoch))
        lengths = planned.lengths()
        assert [next(lengths) for _ in range(12)] == [planned.steps_in(epoch) for epoch in range(12)]


# Shares of processes


def all_steps() -> list[Step]:
    return [step for width in (1, 2, 3, 7) for step in plan(samples(40), micro_batches=width).epoch(0)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_processes_share_each_step_without_loss_and_with_equal_counts(world_size: int):
    for step in all_steps():
        shares = [step.share(rank, world_size) for rank in range(world_size)]
        counted = [micro_batch for share in shares for micro_batch, is_padding in share if not is_padding]
        assert Counter(counted) == Counter(step.micro_batches)
        assert {len(share) for share in shares} == {math.ceil(len(step.micro_batches) / world_size)}
        padding = [micro_batch for share in shares for micro_batch, is_padding in share if is_padding]
        cheapest = min(len(m.refs) * m.size.num_tokens for m in step.micro_batches)
        assert all(len(m.refs) * m.size.num_tokens == cheapest for m in padding)


def test_processes_that_work_at_once_have_similar_work():
    small, large = MicroBatch(Size(64, 64), (SampleRef(0, 0),)), MicroBatch(Size(128, 128), (SampleRef(1, 0),))
    other_small, other_large = (
        MicroBatch(Size(64, 64), (SampleRef(2, 0),)),
        MicroBatch(Size(128, 128), (SampleRef(3, 0),)),
    )
    step = Step((small, large, other_small, other_large))
    assert [[m.size.width for m, _ in step.share(rank, 2)] for rank in range(2)] == [[128, 64], [128, 64]]


def test_accumulation_and_processes_see_the_same_samples_at_the_same_step():
    items = samples(50)
    one_process = plan(items, micro_batches=2 * 1).epoch(0)
    two_processes = plan(items, micro_batches=1 * 2).epoch(0)
    for alone, together in zip(one_process, two_processes, strict=True):
        first = [m for m, is_padding in alone.share(0, 1) if not is_padding]
        second = [m for rank in range(2) for m, is_padding in together.share(rank, 2) if not is_padding]
        assert Counter(first) == Counter(second)


# Batch sizes


def test_one_number_is_the_batch_size_everywhere():
    assert batch_size_for(4, 512) == batch_size_for(4, 1024) == 4


def test_of_several_batch_sizes_the_one_of_the_nearest_resolution_holds():
    sizes = [(512, 4), (1024, 1)]
    assert [batch_size_for(sizes, side) for side in (256, 512, 640, 960, 1024, 2048)] == [4, 4, 4, 1, 1, 1]
    # The border is where the logarithms meet: 512 * sqrt(2) = 724.1
    assert [batch_size_for(sizes, side) for side in (724, 725)] == [4, 1]


def test_the_order_of_batch_sizes_does_not_matter():
    assert all(batch_size_for([(512, 4), (1024, 1)], s) == batch_size_for([(1024, 1), (512, 4)], s) for s in (600, 900))


# Epoch schedules


def expected_places(planned: Plan, num_steps: int) -> list[tuple[int, int]]:
    """(epoch, index) of each step, by counting through the planned epochs."""
    places: list[tuple[int, int]] = []
    epoch = 0
    while len(places) < num_steps:
        places.extend((epoch, index) for index in range(len(planned.epoch(epoch))))
        epoch += 1
    return places[:num_steps]


@pytest.mark.parametrize("repeats", [1, 3, 0.5, 0.3, 1.25])
@pytest.mark.parametrize(("epochs", "max_steps"), [(7, None), (None, 33), (7, 20), (7, 10_000), (100, 1)])
def test_every_step_has_its_place(repeats: float, epochs: int | None, max_steps: int | None):
    planned = plan(samples(11, repeats))
    schedule = EpochSchedule.of(planned, epochs, max_steps)
    all_epochs = math.inf if epochs is None else sum(len(planned.epoch(epoch)) for epoch in range(epochs))
    assert schedule.num_steps == min(all_epochs, math.inf if max_steps is None else max_steps)
    places = expected_places(planned, schedule.num_steps)
    assert [schedule.locate(step) for step in range(schedule.num_steps)] == places
    for step, (epoch, index) in enumerate(places):
        is_last = index == len(planned.epoch(epoch)) - 1
        assert schedule.epochs_done(step) == epoch + is_last


def test_epochs_without_a_step_are_passed_over():
    planned = plan([sample("only", repeats=0.25)])
    assert [planned.steps_in(epoch) for epoch in range(5)] == [0, 0, 0, 1, 0]
    schedule = EpochSchedule.of(planned, 10, None)
    assert schedule.num_steps == 2
    assert [schedule.locate(step) for step in range(2)] == [(3, 0), (7, 0)]
    # After the first step four epochs are complete and, as three more are empty, seven.
    assert [schedule.epochs_done(step) for step in range(2)] == [7, 10]


def test_max_steps_are_reached_with_few_images_and_rare_repeats():
    schedule = EpochSchedule.of(plan([sample("only", repeats=0.001)]), None, 3)
    assert schedule.num_steps == 3
    assert [schedule.locate(step) for step in range(3)] == [(999, 0), (1999, 0), (2999, 0)]


def test_a_run_without_a_step_is_refused():
    with pytest.raises(ConfigError, match="num_repeats"):
        EpochSchedule.of(plan([sample("only", repeats=0.1)]), 9, None)
    assert EpochSchedule.of(plan([sample("only", repeats=0.1)]), 10, None).num_steps == 1


def test_far_more_epochs_than_steps_cost_nothing():
    schedule = EpochSchedule.of(plan(samples(11)), 10**12, 50)
    assert schedule.num_steps == 50
    assert len(schedule.epoch_starts) < 60


def test_the_last_entry_tells_what_ends_the_run():
    planned = plan(samples(11))
    length = planned.steps_in(0)
    assert EpochSchedule.of(planned, 3, None).epoch_starts == [0, length, 2 * length, 3 * length]
    assert EpochSchedule.of(planned, 3, 3 * length).epoch_starts[-1] == 3 * length  # the epochs
    assert EpochSchedule.of(planned, 9, 3 * length).epoch_starts[-1] > 3 * length  # max_steps
