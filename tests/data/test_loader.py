"""Batches as functions of their address, from entries really written to a cache, and reading ahead."""

import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

import anima_train
from anima_train.core.errors import DataError
from anima_train.core.text_batch import TextContext, TextStates, pad_rows
from anima_train.data.buckets import Size
from anima_train.data.cache import Cache
from anima_train.data.loader import NUM_THREADS, READ_AHEAD, Batch, CachedData, TextIdentity, read_ahead
from anima_train.data.plan import MicroBatch, SampleRef
from anima_train.data.samples import EMPTY, Caption, Picture, Sample, View
from anima_train.data.settings import DirectoryOptions
from anima_train.objective.timesteps import Timesteps
from tests.data.test_cache import save

SIZE = Size(32, 48)
VAE = "vae"
OUTPUT = TextIdentity("encoder", "tokenizer", "t5", adapter="adapter", dtype="bfloat16")
STATES = TextIdentity("encoder", "tokenizer", "t5", adapter="", dtype="bfloat16")
TIMESTEPS = Timesteps(sigmoid_scale=1.3)

CAPTIONS = {"a": "a cat", "b": "two words", "c": "", "d": "tag, another, third"}
ROWS = {"a cat": 3, "two words": 5, "": 1, "tag, another, third": 9}  # T5 tokens

OTHER_PROCESS = """
import pickle, sys
data, micro_batch, timesteps = pickle.load(open(sys.argv[1], "rb"))
batch = data.training_batch(micro_batch, 2, False, timesteps.at, 0.3)
pickle.dump(batch, open(sys.argv[2], "wb"))
"""


def make_data(folder: Path, identity: TextIdentity = OUTPUT, seed: int = 0, masked: str = "") -> CachedData:
    """Four samples, everything of them in the cache."""
    cache = Cache(folder)
    samples = []
    for name, caption in CAPTIONS.items():
        mask = Path(f"{name}_mask.png") if name in masked else None
        path = Path(f"{name}.png")
        mask_sha256 = f"mask of {name}" if mask else ""
        picture = Picture(path, path, f"hash of {name}", 64, 96, (caption,), mask=mask, mask_sha256=mask_sha256)
        samples.append(Sample(f"0/{name}.png@40", picture, SIZE, 40, 0, DirectoryOptions(), cache))
    generator = torch.Generator().manual_seed(1)
    for sample in samples:
        save(cache, "latent", View(sample).latent_key(VAE), {"latents": torch.randn(16, 1, 6, 4, generator=generator)})
        if sample.picture.mask is not None:
            save(cache, "mask", View(sample).mask_key(), {"mask": torch.rand(1, 6, 4, generator=generator)})
    for caption, rows in ROWS.items():
        values = torch.randn(rows, 8, generator=generator).to(torch.bfloat16)
        states = {"qwen": values[1:], "t5_ids": torch.arange(rows) + 5}
        save(cache, "text", identity.key(caption), {"context": values} if identity.adapter else states)
    return CachedData(samples, VAE, identity, seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_data(tmp_path_factory.mktemp("cache"))


def batch_of(data: CachedData, *refs: tuple[int, int], epoch: int = 0, uncond: float = 0.0) -> Batch:
    """The batch of these (sample, repeat)."""
    micro_batch = MicroBatch(SIZE, tuple(SampleRef(*ref) for ref in refs))
    return data.training_batch(micro_batch, epoch, False, TIMESTEPS.at, uncond)


def equal(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.latents, second.latents)
        and torch.equal(first.noise, second.noise)
        and torch.equal(first.t, second.t)
        and torch.equal(rows(first), rows(second))
        and first.names == second.names
    )


def rows(batch: Batch) -> Tensor:
    """The context with all its zeros."""
    assert isinstance(batch.text, TextContext)
    assert batch.text.rows.shape[1] + batch.text.num_zeros == 512
    return pad_rows(batch.text.rows)


def contexts(data: CachedData, *captions: str) -> list[Tensor]:
    return [data.samples[0].cache.load("text", data.text_identity.key(caption))["context"] for caption in captions]


# A batch is a function of its address


def test_a_batch_holds_what_is_in_the_cache(data: CachedData):
    batch = batch_of(data, (0, 0), (3, 0))
    for row, index in enumerate((0, 3)):
        sample = data.samples[index]
        assert torch.equal(batch.latents[row], sample.cache.load("latent", View(sample).latent_key(VAE))["latents"])
    assert batch.latents.dtype == batch.noise.dtype == batch.t.dtype == torch.float32
    assert batch.latents.shape == batch.noise.shape == (2, 16, 1, 6, 4)
    assert batch.names == ("0/a.png@40", "0/d.png@40")
    assert batch.size == 2
    assert not batch.is_padding
    assert batch.mask is None


def test_the_same_address_gives_the_same_batch_whatever_came_before(data: CachedData):
    first = batch_of(data, (0, 0), (1, 4), epoch=3)
    torch.manual_seed(123)
    torch.randn(7)
    batch_of(data, (2, 0))
    assert equal(batch_of(data, (0, 0), (1, 4), epoch=3), first)


def test_global_random_state_is_left_alone(data: CachedData):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    batch_of(data, (0, 0), (1, 0), uncond=0.5)
    assert torch.equal(torch.randn(3), expected)


def test_the_neighbours_in_a_batch_do_not_matter(data: CachedData):
    together = batch_of(data, (0, 0), (1, 4), (3, 2), epoch=1, uncond=0.4)
    for row, ref in enumerate([(0, 0), (1, 4), (3, 2)]):
        alone = batch_of(data, ref, epoch=1, uncond=0.4)
        assert torch.equal(alone.noise[0], together.noise[row])
        assert torch.equal(alone.t[0], together.t[row])
        assert torch.equal(rows(alone)[0], rows(together)[row])


def test_another_process_makes_the_same_batch(data: CachedData, tmp_path: Path):
    micro_batch = MicroBatch(SIZE, (SampleRef(1, 0), SampleRef(0, 7)))
    (tmp_path / "in").write_bytes(pickle.dumps((data, micro_batch, TIMESTEPS)))
    environment = {**os.environ, "PYTHONPATH": str(Path(anima_train.__file__).parents[1]), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True)
    found = pickle.loads((tmp_path / "out").read_bytes())
    assert equal(found, data.training_batch(micro_batch, 2, False, TIMESTEPS.at, 0.3))


def test_noise_and_t_differ_between_samples_repeats_epochs_and_seeds(data: CachedData):
    seeded = CachedData(data.samples, VAE, data.text_identity, seed=1)
    batches = [
        batch_of(data, (0, 0)),
        batch_of(data, (1, 0)),
        batch_of(data, (0, 1)),
        batch_of(data, (0, 0), epoch=1),
        batch_of(seeded, (0, 0)),
    ]
    for first, second in itertools.combinations(batches, 2):
        assert not torch.equal(first.noise, second.noise)
        assert not torch.equal(first.t, second.t)


def test_the_same_image_twice_in_a_batch_gets_two_noises(data: CachedData):
    batch = batch_of(data, (0, 0), (0, 1))
    assert torch.equal(batch.latents[0], batch.latents[1])
    assert abs(float(torch.corrcoef(batch.noise.reshape(2, -1))[0, 1])) < 0.2  # 384 values: deviation 0.05


def test_noise_is_standard_normal(data: CachedData):
    noise = torch.cat([batch_of(data, (0, repeat)).noise.flatten() for repeat in range(100)])  # 38,400 values
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise**4).mean()) - 3) < 0.2


# The distribution of t


def distance(values: list[float], distribution: Callable[[float], float]) -> float:
    """Kolmogorov and Smirnov's: the largest distance of the empirical from the true distribution function."""
    ordered = sorted(values)
    number = len(ordered)
    return max(
        max(abs(distribution(value) - rank / number), abs(distribution(value) - (rank + 1) / number))
        for rank, value in enumerate(ordered)
    )


def logit_normal(t: float, scale: float) -> float:
    return NormalDist().cdf(math.log(t / (1 - t)) / scale)


@pytest.mark.parametrize(
    ("timesteps", "distribution"),
    [
        (Timesteps(sigmoid_scale=1.0), lambda t: logit_normal(t, 1.0)),
        (Timesteps(sigmoid_scale=1.3), lambda t: logit_normal(t, 1.3)),
        (Timesteps(method="uniform"), lambda t: t),
        (Timesteps(shift=3.0), lambda t: logit_normal(t / (3 - 2 * t), 1.0)),  # t = 3 s / (1 + 2 s)
    ],
)
def test_t_has_the_distribution_that_is_asked_for(
    data: CachedData, timesteps: Timesteps, distribution: Callable[[float], float]
):
    number = 1500
    micro_batch = MicroBatch(SIZE, tuple(SampleRef(0, repeat) for repeat in range(number)))
    t = data.training_batch(micro_batch, 0, False, timesteps.at, 0.0).t.tolist()
    assert distance(t, distribution) < 1.63 / math.sqrt(number)  # one seed in a hundred would exceed it
    assert distance(t, lambda value: distribution(value) ** 1.2) > 1.63 / math.sqrt(number)


def test_the_distribution_of_t_is_told_the_number_of_image_tokens(data: CachedData):
    told = []
    data.training_batch(
        MicroBatch(SIZE, (SampleRef(0, 0),)),
        0,
        False,
        lambda quantile, tokens: told.append((quantile, tokens)) or 0.5,
        0.0,
    )
    ((quantile, tokens),) = told
    assert tokens == 2 * 3
    assert 0 <= quantile < 1


# Captions


def test_captions_are_dropped_at_the_rate_asked_for(data: CachedData):
    refs = [(0, repeat) for repeat in range(1000)]
    text = rows(batch_of(data, *refs, uncond=0.1))
    (empty, whole) = contexts(data, "", "a cat")
    dropped = [bool(torch.equal(row[:1], empty) and not row[1:].any()) for row in text]
    assert 70 <= sum(dropped) <= 130  # deviation 9.5
    assert all(torch.equal(row[:3], whole) for row, gone in zip(text, dropped, strict=True) if not gone)
    more = rows(batch_of(data, *refs, uncond=0.2))
    assert all(torch.equal(row[:1], empty) for row, gone in zip(more, dropped, strict=True) if gone)


@pytest.mark.parametrize(("fraction", "caption"), [(0.0, "a cat"), (1.0, "")])
def test_the_extremes_drop_none_and_all(data: CachedData, fraction: float, caption: str):
    text = rows(batch_of(data, *[(0, repeat) for repeat in range(200)], uncond=fraction))
    (expected,) = contexts(data, caption)
    assert all(torch.equal(row[: len(expected)], expected) for row in text)


def test_dropping_captions_changes_neither_noise_nor_t(data: CachedData):
    refs = [(0, repeat) for repeat in range(20)]
    kept, dropped = batch_of(data, *refs), batch_of(data, *refs, uncond=1.0)
    assert torch.equal(kept.noise, dropped.noise)
    assert torch.equal(kept.t, dropped.t)
    assert not torch.equal(rows(kept), rows(dropped))


def test_the_repeat_picks_the_caption_variant(tmp_path: Path):
    cache = Cache(tmp_path)
    picture = Picture(Path("a.png"), Path("a.png"), "hash", 64, 96, ("one, two, three, four",))
    sample = Sample("0/a.png@40", picture, SIZE, 40, 0, DirectoryOptions(cache_shuffle_num=3), cache)
    save(cache, "latent", View(sample).latent_key(VAE), {"latents": torch.zeros(16, 1, 6, 4)})
    for variant, caption in enumerate(sample.captions(0)):
        save(cache, "text", OUTPUT.key(caption), {"context": torch.full((1, 8), variant + 1.0)})
    batch = batch_of(CachedData([sample], VAE, OUTPUT, 0), *[(0, repeat) for repeat in range(7)])
    assert rows(batch)[:, 0, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_contexts_have_512_rows_of_which_those_past_the_longest_caption_are_only_counted(data: CachedData):
    batch = batch_of(data, (0, 0), (3, 0))
    assert isinstance(batch.text, TextContext)
    assert (batch.text.rows.shape, batch.text.num_zeros) == ((2, 16, 8), 496)
    text = rows(batch)
    assert text.dtype == torch.bfloat16
    for row, caption in enumerate(("a cat", "tag, another, third")):
        (expected,) = contexts(data, caption)
        assert torch.equal(text[row, : ROWS[caption]], expected)
        assert not text[row, ROWS[caption] :].any()


def test_a_trained_adapter_gets_states_and_ids_with_masks(tmp_path: Path):
    data = make_data(tmp_path, STATES)
    text = batch_of(data, (0, 0), (2, 0), (3, 0)).text  # 3, 1 and 9 T5 tokens, one less of Qwen
    assert isinstance(text, TextStates)
    assert text.source.shape == (3, 8, 8)
    assert text.source_mask.sum(dim=1).tolist() == [2, 0, 8]
    assert text.t5_ids.shape == (3, 9)
    assert text.t5_mask.sum(dim=1).tolist() == [3, 1, 9]
    assert text.t5_ids[0].tolist() == [5, 6, 7] + [0] * 6
    assert not text.source[0, 2:].any()


# Masks


def test_samples_without_a_mask_get_ones_beside_one_with(tmp_path: Path):
    data = make_data(tmp_path, masked="b")
    batch = batch_of(data, (0, 0), (1, 0))
    assert batch.mask is not None
    assert batch.mask.shape == (2, 1, 1, 6, 4)
    assert torch.equal(batch.mask[0], torch.ones(1, 1, 6, 4))
    masked = data.samples[1]
    assert torch.equal(batch.mask[1, 0], masked.cache.load("mask", View(masked).mask_key())["mask"])
    assert batch_of(data, (0, 0), (2, 0)).mask is None


# Other batches


def test_given_captions_t_and_noise_are_taken_as_they_are(data: CachedData):
    generators = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    views = [View(sample) for sample in data.samples[:2]]
    batch = data.batch(views, [EMPTY, Caption("two words")], [0.25, 0.75], generators, is_padding=True)
    expected = [torch.randn(16, 1, 6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (8, 9)]
    assert torch.equal(batch.noise, torch.stack(expected))
    assert batch.t.tolist() == [0.25, 0.75]
    assert torch.equal(rows(batch)[1, :5], contexts(data, "two words")[0])
    assert batch.is_padding


@pytest.mark.parametrize("identity", [OUTPUT, STATES])
def test_a_batch_moves_whole(tmp_path: Path, identity: TextIdentity):
    moved = batch_of(make_data(tmp_path, identity, masked="a"), (0, 0)).to(torch.device("meta"))
    text = moved.text
    texts = [text.source, text.source_mask, text.t5_ids, text.t5_mask] if isinstance(text, TextStates) else [text.rows]
    assert moved.mask is not None
    assert {tensor.device.type for tensor in (moved.latents, moved.noise, moved.t, moved.mask, *texts)} == {"meta"}


def test_a_damaged_entry_is_removed_and_the_error_says_what_it_is_of_and_what_to_do(tmp_path: Path):
    data = make_data(tmp_path, masked="b")
    view, caption = View(data.samples[1]), data.samples[1].picture.tags[0]
    cache = view.sample.cache
    keys = {"latent": view.latent_key(VAE), "mask": view.mask_key(), "text": data.text_identity.key(caption)}
    for kind, key in keys.items():
        make_data(tmp_path, masked="b")
        path = cache.path(kind, key)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError) as caught:
            batch_of(data, (0, 0), (1, 0))
        described = "the caption 'two words'" if kind == "text" else "the image 0/b.png@40"
        assert str(caught.value) == (
            f"cache entry damaged: {path}: its content is not what was written; it is of {described}; it was removed: "
            "start again with the same command, which makes it again and resumes the run"
        )
        assert not path.exists()


def test_a_damaged_entry_that_cannot_be_removed_is_to_be_removed(tmp_path: Path):
    data = make_data(tmp_path)
    view = View(data.samples[1])
    path = view.sample.cache.path("latent", view.latent_key(VAE))
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"it could not be removed \(.+\): remove it, then start again") as caught:
        batch_of(data, (0, 0), (1, 0))
    assert str(path) in str(caught.value)


def test_a_missing_entry_is_named(tmp_path: Path):
    data = make_data(tmp_path)
    view = View(data.samples[1])
    path = view.sample.cache.path("latent", view.latent_key(VAE))
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        batch_of(data, (0, 0), (1, 0))


# Reading ahead


def settle(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds within a few seconds."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def test_results_come_in_order_though_later_ones_are_ready_first():
    def slow_then_fast(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * 10

    assert list(read_ahead(range(20), slow_then_fast)) == [number * 10 for number in range(20)]
    assert list(read_ahead([], slow_then_fast)) == []


def test_work_is_done_ahead_but_not_far_ahead():
    taken: list[int] = []
    done: list[int] = []

    def endless() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    results = read_ahead(endless(), lambda number: done.append(number) or number)
    assert taken == []  # nothing before the first result is wanted
    for expected in range(10):
        assert next(results) == expected
        assert expected + 1 < len(taken) <= expected + 1 + READ_AHEAD
        wanted = len(taken)
        assert settle(lambda wanted=wanted: len(done) == wanted)  # without anybody asking for more
    results.close()


def test_more_can_be_done_ahead_than_there_are_threads_for():
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    results = read_ahead(items(), lambda number: number, num_threads=2, num_ahead=20)
    assert next(results) == 0
    assert len(taken) == 1 + 20
    assert list(results) == list(range(1, 40))


@pytest.mark.parametrize("chosen", [{}, {"num_threads": 1}, {"num_threads": 5}])
def test_the_consumer_takes_the_items_and_so_many_threads_work_at_once(chosen: dict[str, int]):
    num_threads = chosen.get("num_threads", 2)
    together = threading.Barrier(num_threads, timeout=5)
    taken: list[int] = []
    takers: set[int] = set()

    def items() -> Iterator[int]:
        for number in range(4 * num_threads):
            taken.append(number)
            takers.add(threading.get_ident())
            yield number

    def make(number: int) -> tuple[int, int]:
        together.wait()  # passes only when so many work at once
        return number, threading.get_ident()

    results = read_ahead(items(), make, **chosen)
    first = next(results)
    assert len(taken) <= 1 + max(READ_AHEAD, 2 * num_threads)
    found = [first, *results]
    assert [number for number, _ in found] == list(range(4 * num_threads))
    makers = {thread for _, thread in found}
    assert len(makers) == num_threads
    assert takers == {threading.get_ident()}
    assert threading.get_ident() not in makers


def test_an_error_comes_where_its_result_would():
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise DataError("the third")
        return number

    results = read_ahead(range(100), fail_at_three)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="the third"):
        next(results)
    assert list(results) == []


def test_an_error_of_the_items_is_raised():
    def items() -> Iterator[int]:
        yield 1
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        list(read_ahead(items(), lambda number: number))


@pytest.mark.parametrize("end", ["close", "break", "error", "exhausted"])
def test_threads_end_with_the_results(end: str):
    before = set(threading.enumerate())

    def make(number: int) -> int:
        if end == "error" and number == 2:
            raise DataError("stop")
        return number

    results = read_ahead(range(8), make)
    assert next(results) == 0
    assert set(threading.enumerate()) > before
    if end == "close":
        results.close()
    elif end == "break":
        del results  # as at the end of a for loop
    elif end == "error":
        with pytest.raises(DataError):
            list(results)
    else:
        assert list(results) == list(range(1, 8))
    assert set(threading.enumerate()) <= before


def test_what_has_not_begun_is_given_up_when_the_consumer_stops():
    started: list[int] = []
    gate = threading.Event()

    def make(number: int) -> None:
        started.append(number)
        if number:
            gate.wait(5)

    results = read_ahead(range(100), make)
    next(results)
    threading.Timer(0.2, gate.set).start()  # lets the threads end, after what waits for them has been given up
    results.close()
    assert len(started) <= 1 + NUM_THREADS
