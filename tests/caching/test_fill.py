"""Filling the cache: what a change rebuilds, what becomes of damage, and several processes at once."""

import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import load_file, save_file

from anima_train.caching import fill as encode_module
from anima_train.caching.entries import needed_entries, text_identity, vae_identity
from anima_train.caching.fill import RankInfo, fill_cache, lock_all
from anima_train.cli.cache import cache as anima_cache
from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec, find_model_files
from anima_train.core.errors import DataError, SpaceError
from anima_train.data.cache import Cache
from anima_train.model.loading import ModelFiles
from anima_train.model.tiny import tiny_paths, write_tiny
from anima_train.model.vae import SingleFrameVAE, load_vae
from anima_train.training.prepare import scan_all

REPO = Path(__file__).parents[2]
CACHE = [sys.executable, "-c", "from anima_train.cli.main import main; main()", "cache"]


@pytest.fixture
def images(tmp_path, images_drawer):
    """Twelve images in two buckets."""
    return images_drawer(tmp_path / "images", [(96, 96)] * 6 + [(128, 80)] * 6)


@pytest.fixture
def config(trainer, images):
    """A configuration of these images."""
    return trainer.config(dataset={"directory": [{"path": str(images)}]})


@pytest.fixture
def fill(config, capsys):
    """Runs `anima cache` in this process; returns (latents, texts) that were made, and all it printed."""

    def run(path=config, **options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        anima_cache(path, **options)
        output = capsys.readouterr().out
        latents, texts = re.search(r"cache: (\d+) latents, \d+ masks and (\d+) texts added", output).groups()
        return (int(latents), int(texts)), output

    return run


def entries(images, kind="latent"):
    return sorted((images / ".anima_cache" / kind).glob("??/*.safetensors"))


HANGS_AFTER_THREE = """
import time
from anima_train.caching import writer
from anima_train.cli.main import main
write_files, number = writer.write_files, 0

def write_three(files):
    global number
    for file in files:
        if number == 3:
            print("hangs", flush=True)
            time.sleep(600)
        number += 1
        write_files([file])

writer.write_files = write_three
main()
"""


def start(config, script=None):
    command = CACHE if script is None else [sys.executable, "-c", script, "cache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        [*command, str(config)], cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_second_start_makes_nothing_and_a_changed_image_or_caption_only_its_own(fill, images):
    assert fill()[0] == (12, 12)
    assert fill()[0] == (0, 0)
    shutil.copy(images / "image1.png", images / "image0.png")  # equal images share a latent: nothing to make
    assert fill()[0] == (0, 0)
    (images / "image2.txt").write_text("another caption")
    assert fill()[0] == (0, 1)


def test_a_changed_size_rebuilds_latents_only(trainer, fill, images):
    fill()
    other = trainer.config(dataset={"resolutions": [64], "directory": [{"path": str(images)}]})
    assert fill(other)[0] == (12, 0)


@pytest.mark.parametrize(("slot", "expected"), [("vae", (12, 0)), ("llm", (0, 12)), ("transformer", (0, 12))])
def test_a_changed_model_file_rebuilds_what_it_made(trainer, fill, images, tiny, tmp_path, slot, expected):
    shutil.copytree(tiny, tmp_path / "tiny")
    data = {"directory": [{"path": str(images)}]}
    other = trainer.config(dataset=data, model={"tiny_path": str(tmp_path / "tiny")})
    fill(other)
    write_tiny(tmp_path / "another", seed=1)
    paths = [getattr(tiny_paths(tmp_path / name), slot) for name in ("another", "tiny")]
    shutil.copy(*paths)
    assert fill(other)[0] == expected


@pytest.mark.parametrize("slot", ["tokenizer", "t5_tokenizer"])
def test_a_changed_tokenizer_rebuilds_the_texts(trainer, fill, images, tiny, tmp_path, slot):
    shutil.copytree(tiny, tmp_path / "tiny")
    other = trainer.config(dataset={"directory": [{"path": str(images)}]}, model={"tiny_path": str(tmp_path / "tiny")})
    fill(other)
    with open(getattr(tiny_paths(tmp_path / "tiny"), slot) / "tokenizer.json", "a") as file:
        file.write("\n")
    assert fill(other)[0] == (0, 12)


@pytest.mark.parametrize(("part", "frozen", "trained"), [("llm_adapter", 12, 0), ("blocks", 0, 0)])
def test_only_a_frozen_llm_adapters_weights_belong_to_the_texts(
    trainer, fill, images, tiny, tmp_path, part, frozen, trained
):
    shutil.copytree(tiny, tmp_path / "tiny")
    keys = {"tiny_path": str(tmp_path / "tiny")}
    data = {"directory": [{"path": str(images)}]}
    configs = [trainer.config(f"lr{lr}", dataset=data, model={**keys, "llm_adapter_lr": lr}) for lr in (0, 1e-4)]
    assert [fill(path)[0] for path in configs] == [(12, 12), (0, 12)]
    path = tiny_paths(tmp_path / "tiny").transformer
    tensors = load_file(path)
    name = next(name for name in tensors if f".{part}." in name and name.endswith("weight"))
    save_file(tensors | {name: tensors[name] * 1.5}, path, {"format": "pt"})
    assert [fill(path)[0] for path in configs] == [(0, frozen), (0, trained)]


def test_an_image_with_new_content_is_all_that_is_made_again(fill, images):
    fill()
    Image.new("RGB", (96, 96), "teal").save(images / "image3.png")
    assert fill()[0] == (1, 0)
    assert len(entries(images)) == 13


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"horizontal_flip": True}, (12, 0)),
        ({"crop_position": "left"}, (6, 0)),  # half of the images are cut along that side
        ({"crop_position": "top"}, (0, 0)),
        ({"caption_prefix": "a, "}, (0, 12)),
        ({"cache_shuffle_num": 2}, None),  # of three tags, some orders are equal
        ({"cache_shuffle_num": 2, "tag_dropout": 0.9}, None),
        ({"shuffle_tags": True, "tag_dropout": 0.5}, (0, 0)),
        ({"num_repeats": 3.5, "alpha_as_mask": True}, (0, 0)),
    ],
)
def test_a_key_of_the_dataset_makes_just_what_it_changes(trainer, fill, images, keys, expected):
    dataset = {"resolutions": [64], "enable_ar_bucket": False, "directory": [{"path": str(images)}]}
    assert fill(trainer.config(dataset=dataset))[0] == (12, 12)
    (latents, texts), _ = fill(trainer.config(dataset={**dataset, **keys}))
    assert (latents, texts) == expected or (expected is None and latents == 0 and 0 < texts <= 24)


def test_entries_of_a_newer_version_are_ignored_with_a_note_and_left_alone(fill, images):
    cache = images / ".anima_cache"
    newer = cache / "latent" / "ab" / ("ab" + "0" * 62 + ".safetensors")
    newer.parent.mkdir(parents=True)
    newer.write_bytes(b"of a schema to come")
    (cache / "schema.json").write_text('{"schema": 1000, "more": []}')
    made, output = fill()
    assert made == (12, 12)
    assert "holds entries of a newer anima-train (schema 1000, this one writes 1); they are ignored" in output
    assert newer.read_bytes() == b"of a schema to come"
    assert json.loads((cache / "schema.json").read_text())["schema"] == 1000


def test_a_cache_says_its_schema_and_an_own_or_older_one_needs_no_note(fill, images):
    assert "schema" not in fill()[1]
    assert json.loads((images / ".anima_cache" / "schema.json").read_text()) == {"schema": 1}
    (images / ".anima_cache" / "schema.json").write_text("damaged")
    assert "schema" not in fill()[1]


def test_latents_that_are_not_finite_are_never_stored(trainer, fill, images, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tiny")
    path = tiny_paths(tmp_path / "tiny").vae
    tensors = load_file(path)
    tensors["conv1.weight"][0] = 3e38  # finite itself; sums of it are not
    save_file(tensors, path, {"format": "pt"})
    other = trainer.config(dataset={"directory": [{"path": str(images)}]}, model={"tiny_path": str(tmp_path / "tiny")})
    with pytest.raises(DataError, match="not finite"):
        fill(other)
    assert entries(images) == []


def test_one_image_whose_latents_are_not_finite_is_skipped_and_never_stored(trainer, fill, images, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tiny")
    path = tiny_paths(tmp_path / "tiny").vae
    tensors = load_file(path)
    for name in ("weight", "bias"):
        tensors[f"encoder.head.2.{name}"][0] *= 1e6  # so that a finite factor makes its channel infinite

    def scale(factor):
        """Make one latent channel that many times one channel of the encoder."""
        tensors["conv1.weight"][0] = 0
        tensors["conv1.weight"][0, 0] = factor
        tensors["conv1.bias"][0] = 0
        save_file(tensors, path, {"format": "pt"})

    data = {"directory": [{"path": str(images)}], "max_bad_fraction": 0.1}
    other = trainer.config(dataset=data, model={"tiny_path": str(tmp_path / "tiny")})
    scale(1)
    fill(other)
    vae = load_vae(path, torch.float32, torch.device("cpu"))
    raw = [load_file(entry)["latents"][0] * vae.latents_std[0] + vae.latents_mean[0] for entry in entries(images)]
    *_, second, largest = sorted(float(each.abs().max()) for each in raw)
    scale(torch.finfo(torch.float32).max / (second * largest) ** 0.5)
    made, output = fill(other)
    assert made == (11, 0)
    (line,) = [line for line in output.splitlines() if "its latents are not finite" in line]
    assert re.search(r"image\d+\.png", line)
    written = [load_file(entry)["latents"] for entry in entries(images)]
    assert len(written) == 12 + 11  # those of both files of the VAE
    assert all(bool(each.isfinite().all()) for each in written)


def test_captions_that_are_too_long_are_warned_of_by_the_names_of_their_images(fill, images, caplog):
    for number in (2, 5):
        (images / f"image{number}.txt").write_text(f"image {number}, " + "cat, " * 600)
    made, _ = fill()
    assert made == (12, 12)
    (message,) = [record.msg for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(
        f"{images}: images with a caption that is longer than model.max_caption_tokens = 512 and loses its end (up to "
    )
    assert [re.sub(r"\([\d,]+ tokens\)", "(tokens)", entry) for entry in message.entries] == [
        "image2.png (tokens)", "image5.png (tokens)",
    ]  # fmt: skip


def test_a_truncated_entry_is_rebuilt_at_the_next_start(fill, images):
    fill()
    content = entries(images)[3].read_bytes()
    entries(images)[3].write_bytes(content[:-1])
    entries(images)[4].write_bytes(b"")
    assert fill()[0] == (2, 0)
    assert entries(images)[3].read_bytes() == content


def test_verify_rebuilds_flipped_bits(fill, images):
    fill()
    path = entries(images)[3]
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert fill()[0] == (0, 0)  # its length is right
    made, output = fill(verify=True)
    assert made == (1, 0)
    assert "24 entries read, 1 damaged" in output
    assert path.read_bytes() == content


def test_verify_names_a_damaged_entry_that_cannot_be_removed(fill, images):
    fill()
    path = entries(images)[3]
    path.unlink()
    path.mkdir()
    with pytest.raises(SpaceError, match=rf"{path} could not be removed: "):
        fill(verify=True)


def test_prune_removes_what_is_not_needed_and_nothing_else(fill, images):
    fill()
    cache = images / ".anima_cache"
    (images / "image11.txt").unlink()
    (images / "image11.png").unlink()
    foreign = [cache / "latent" / "notes.txt", cache / "own" / ("a" * 64 + ".safetensors"), cache / "README"]
    (cache / "own").mkdir()
    (cache / "rejected").mkdir(exist_ok=True)
    unused = [cache / "rejected" / ("b" * 64 + ".txt"), entries(images)[0].parent / ("." + "c" * 40 + ".a1_b2.tmp")]
    fresh = entries(images)[0].parent / ("." + "d" * 40 + ".a1_b2.tmp")
    claims = cache / "claims"  # of an earlier version
    claims.mkdir()
    foreign.append(claims / "notes.txt")
    unused.append(claims / ("e" * 64))
    for path in (*foreign, *unused, fresh):
        path.write_text("x")
    os.utime(unused[1], (time.time() - 4000,) * 2)
    made, output = fill(prune=True)
    assert made == (0, 0)
    assert "cache: 5 files removed" in output
    assert len(entries(images, "text")) == 11
    assert all(path.exists() for path in foreign)
    assert not any(path.exists() for path in (*unused, fresh))  # a new one, too: no process has the cache's lock


def test_a_cache_that_cannot_be_written_names_the_bytes(fill, trainer, images, tmp_path):
    (tmp_path / "file").write_text("no folder")
    other = trainer.config(dataset={"directory": [{"path": str(images)}]}, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(SpaceError, match=r"latents that are missing need about [\d,]+ bytes"):
        fill(other)


@pytest.mark.slow
def test_two_processes_make_each_entry_once(config, images):
    processes = [start(config) for _ in range(2)]
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    made = [re.search(r"cache: (\d+) latents, \d+ masks and (\d+) texts", output).groups() for output, _ in results]
    assert [sum(map(int, column)) for column in zip(*made, strict=True)] == [12, 12]
    assert len(entries(images)) == len(entries(images, "text")) == 12
    assert not list((images / ".anima_cache").rglob("*.tmp"))


def kill_after(process, images, number):
    """SIGKILL when this many latents are there."""
    deadline = time.monotonic() + 60
    while len(entries(images)) < number and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_after_a_kill_at_any_moment_whole_entries_are_all_there_is(config, fill, images, seed):
    process = start(config)
    while not (images / ".anima_cache").exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 6))  # the scan has just made it; the rest takes seconds
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for kind in ("latent", "text") for path in entries(images, kind)}
    for path in before:
        Cache(images / ".anima_cache").load(path.parent.parent.name, path.stem)  # raises if it is not whole
    fill(verify=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(entries(images)) == len(entries(images, "text")) == 12


@pytest.mark.slow
def test_after_a_kill_the_next_run_goes_on_and_keeps_what_was_made(config, fill, images):
    kill_after(start(config), images, random.Random(0).randrange(1, 8))
    before = {path: path.stat().st_mtime_ns for path in entries(images)}
    assert before
    made, _ = fill(verify=True)
    assert made[0] == 12 - len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # whole, and not made again


@pytest.mark.slow
def test_what_a_killed_process_was_making_the_other_makes(config, images):
    process = start(config, HANGS_AFTER_THREE)
    while process.stdout.readline() != "hangs\n":
        assert process.poll() is None
    other = start(config)
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(15)  # it has begun to wait by then
    assert len(entries(images)) == 3
    kill_after(process, images, 3)
    output, errors = other.communicate(timeout=100)
    assert other.returncode == 0, errors
    assert "cache: 9 latents, 0 masks and 12 texts added" in output
    assert len(entries(images)) == len(entries(images, "text")) == 12


# The processes of a run


@pytest.fixture
def fill_together(trainer, images_drawer, tmp_path, monkeypatch):
    """Fills caches from several ranks, which are threads here; returns what each has made."""
    loading = threading.Lock()  # models are loaded under patches that hold for the whole process

    def one_at_a_time(load):
        def call(*arguments):
            with loading:
                return load(*arguments)

        return call

    for name in ("load_vae", "CaptionEncoder"):
        monkeypatch.setattr(encode_module, name, one_at_a_time(getattr(encode_module, name)))

    def run(folders, ranks):
        needed, model = [], None
        for folder in folders:
            images_drawer(tmp_path / "images", [(96, 96)] * 6 + [(128, 80)] * 5)
            dataset = {"directory": [{"path": str(tmp_path / "images")}]}
            loaded = load_config(trainer.config(dataset=dataset, cache_dir=str(folder)))
            files = find_model_files(loaded.config)
            model = build_model_spec(loaded.config, torch.device("cpu"))
            samples = scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=True)["train"].samples
            identity = text_identity(files, True, torch.float32)
            needed.append(needed_entries(samples, [], vae_identity(files), identity, 0, False, True))
        meeting = threading.Barrier(len(ranks), timeout=60)
        with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
            made = [
                pool.submit(fill_cache, needed[index], model, rank, 4, meeting.wait) for index, rank in enumerate(ranks)
            ]
            return [each.result() for each in made]

    return run


def num_entries(folder):
    return [len(list(folder.rglob(f"{kind}/??/*.safetensors"))) for kind in ("latent", "text")]


def test_each_rank_makes_every_nth_entry(fill_together, tmp_path):
    ranks = [RankInfo(rank, 3, rank, 3) for rank in range(3)]
    made = fill_together([tmp_path / "cache"] * 3, ranks)
    assert made == [{"latents": 4, "texts": 4}, {"latents": 4, "texts": 4}, {"latents": 3, "texts": 3}]
    assert num_entries(tmp_path / "cache") == [11, 11]


@pytest.mark.slow
def test_ranks_on_machines_with_caches_of_their_own_make_there_what_is_missing(fill_together, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second", tmp_path / "second"]
    ranks = [RankInfo(0, 3, 0, 1), RankInfo(1, 3, 0, 2), RankInfo(2, 3, 1, 2)]
    made = fill_together(folders, ranks)
    assert made[0] == {"latents": 11, "texts": 11}
    assert made[1] + made[2] == {"latents": 11, "texts": 11}
    assert min(made[1]["latents"], made[2]["latents"]) >= 5
    assert num_entries(tmp_path / "first") == num_entries(tmp_path / "second") == [11, 11]
    assert fill_together(folders, ranks) == [{}] * 3


def test_the_encoder_goes_on_while_another_thread_waits_for_the_disk(trainer, fill, images, monkeypatch):
    names, third, encodings = set(), threading.Event(), []
    replace, encode = os.replace, SingleFrameVAE.encode

    def slow_replace(source, target):
        if Path(target).suffix in (".safetensors", ".txt"):
            assert third.wait(30), "the encoder waits for the disk"
            names.add((Path(target).suffix, threading.current_thread().name))
        replace(source, target)

    def noted_encode(*arguments):
        encodings.append(arguments)
        if len(encodings) == 3:
            third.set()
        return encode(*arguments)

    monkeypatch.setattr(os, "replace", slow_replace)
    monkeypatch.setattr(SingleFrameVAE, "encode", noted_encode)
    path = images / "image7.png"
    path.write_bytes(path.read_bytes()[:60])
    data = {"directory": [{"path": str(images)}], "max_bad_fraction": 0.1}
    assert fill(trainer.config("some", dataset=data))[0] == (11, 11)
    assert (".safetensors", "cache writer") in names
    assert {name for _, name in names} == {"cache writer"}


@pytest.mark.parametrize("number", [None, 1, 4])
def test_entries_are_what_the_vae_makes_of_each_image(trainer, fill, images, error, monkeypatch, number):
    encode, expected, batches = SingleFrameVAE.encode, [], []

    def noted_encode(vae, pixels):
        batches.append(len(pixels))
        expected.extend(encode(vae, each[None])[0] for each in pixels)
        return encode(vae, pixels)

    monkeypatch.setattr(SingleFrameVAE, "encode", noted_encode)
    given = {} if number is None else {"caching_batch_size": number}
    made, output = fill(trainer.config("some", dataset={"directory": [{"path": str(images)}]}, **given))
    assert made == (12, 12)
    assert batches == ([4, 2, 4, 2] if number == 4 else [1] * 12)
    assert f"cache: encoding latents, up to {number or 1} at once\n" in output
    assert f"cache: encoding captions, up to {number or 1} at once\n" in output
    stored = [load_file(entry)["latents"] for entry in entries(images)]
    for latents in expected:
        (found,) = [each for each in stored if each.shape == latents.shape and error(each, latents) < 1e-5]
        assert number == 4 or torch.equal(found, latents)  # a batch may round otherwise than an image alone


def test_two_links_to_one_cache_are_one_lock(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with contextlib.ExitStack() as locks:
        lock_all([Cache(tmp_path / "link"), Cache(tmp_path / "folder"), Cache(tmp_path / "a")], locks)
        assert not FileLock(tmp_path / "other" / ".lock").is_locked
        with pytest.raises(Timeout):
            FileLock(tmp_path / "folder" / ".lock").acquire(timeout=0)
    FileLock(tmp_path / "folder" / ".lock").acquire(timeout=0).lock.release()


@pytest.mark.slow
def test_two_ranks_make_each_entry_once(config, images, command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    (tmp_path / "script.py").write_text("from anima_train.cli.main import main; main()")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = command([*launch, str(tmp_path / "script.py"), "cache", str(config)])
    assert result.returncode == 0, result.stderr
    made = re.findall(r"cache: (\d+) latents, \d+ masks and (\d+) texts", result.stdout)
    assert made == [("12", "12")]  # of both ranks together: none was made twice
    assert len(entries(images)) == len(entries(images, "text")) == 12


def test_a_second_start_reads_no_image_and_loads_neither_vae_nor_text_encoder(fill, images, opened, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("loaded")

    assert fill()[0] == (12, 12)
    monkeypatch.setattr(encode_module, "load_vae", refuse)
    monkeypatch.setattr(ModelFiles, "load_text_encoder", refuse)
    opened.clear()
    assert fill()[0] == (0, 0)
    assert any(name.endswith(".json") for name in opened)  # the memory of the images was read
    assert not [name for name in opened if name.endswith(".png")]
    (images / "image5.txt").write_text("another")
    with pytest.raises(AssertionError, match="loaded"):
        fill()  # so that the above can fail
