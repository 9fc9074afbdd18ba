"""No pickle is ever loaded: a file that runs code when it is unpickled lies in each place that is read, and does not.

One format at least stands in each place; where the place decides by the file's content, all of them do.
"""

import io
import json
import pickle
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from anima_train.adapters.read import peft_config
from anima_train.checkpoint.manifest import CHECKSUM, checksum
from anima_train.cli.main import COMMANDS, application
from anima_train.core.errors import DataError, ModelFileError, UserError
from anima_train.core.files import sha256_file
from anima_train.model.safetensors_io import open_header, read_tensors, write_tensors
from anima_train.model.text import load_tokenizers
from anima_train.model.tiny import tiny_paths


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def binary_pickle(canary):
    return pickle.dumps(canary, protocol=4)


def text_pickle(canary):
    return pickle.dumps(canary, protocol=0)


def torch_zip(canary):
    file = io.BytesIO()
    torch.save({"weight": canary}, file)
    return file.getvalue()


def torch_legacy(canary):
    file = io.BytesIO()
    torch.save({"weight": canary}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FORMATS = [binary_pickle, text_pickle, torch_zip, torch_legacy]


@pytest.fixture
def canary(tmp_path):
    """What must not be unpickled; that nobody did is checked at the end."""
    path = tmp_path / "UNPICKLED"
    yield Canary(path)
    assert not path.exists()


@pytest.mark.parametrize("make", FORMATS)
def test_each_of_these_files_would_run_code(tmp_path, make):
    path = tmp_path / "UNPICKLED"
    content = make(Canary(path))
    if make in (torch_zip, torch_legacy):
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert path.exists()


SLOTS = ["transformer_path", "vae_path", "llm_path", "llm_adapter_path"]


def test_model_files(trainer, tiny, tmp_path, canary):
    """Each of another format; all are told of at once."""
    files = [tmp_path / f"{slot}.safetensors" for slot in SLOTS]
    for file, make in zip(files, FORMATS, strict=True):
        file.write_bytes(make(canary))
    model = {slot: str(file) for slot, file in zip(SLOTS, files, strict=True)}
    tokenizers = {
        "tokenizer_path": str(tiny_paths(tiny).tokenizer),
        "t5_tokenizer_path": str(tiny_paths(tiny).t5_tokenizer),
    }
    with pytest.raises(ModelFileError) as caught:
        trainer(model={"tiny_path": None, **model, **tokenizers})
    for file in files:
        assert f"{file}: this is a pickle" in str(caught.value)


def test_text_encoder_folder(trainer, tiny, tmp_path, canary):
    paths = tiny_paths(tiny)
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "pytorch_model.bin").write_bytes(torch_zip(canary))
    (folder / "model.pkl").write_bytes(binary_pickle(canary))
    model = {"transformer_path": paths.transformer, "vae_path": paths.vae, "tokenizer_path": paths.tokenizer}
    model |= {"t5_tokenizer_path": paths.t5_tokenizer, "llm_path": folder}
    with pytest.raises(ModelFileError, match=r"holds no \.safetensors file; model\.pkl is a pickle"):
        trainer(model={"tiny_path": None, **{key: str(path) for key, path in model.items()}})


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "spiece.model", "tokenizer_config.json"])
def test_tokenizer_folder(tiny, tmp_path, canary, name):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_paths(tiny).tokenizer, folder)
    if name in ("vocab.json", "spiece.model"):
        for file in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
            (folder / file).unlink(missing_ok=True)
    for file in (name, "vocab.pkl", "vocab.bin", "corpus.bin", "added_tokens.pkl"):
        (folder / file).write_bytes(binary_pickle(canary))
    with pytest.raises(ModelFileError, match=r"model\.tokenizer_path"):
        load_tokenizers(folder, tiny_paths(tiny).t5_tokenizer)


CODE = "from pathlib import Path\nPath({path!r}).touch()\nclass Tokenizer: pass\n"


def test_code_in_a_tokenizer_folder(tiny, tmp_path, canary):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_paths(tiny).tokenizer, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(path=canary.path))
    with pytest.raises(ModelFileError, match=r"model\.tokenizer_path"):
        load_tokenizers(folder, tiny_paths(tiny).t5_tokenizer)


@pytest.mark.parametrize("make", FORMATS)
def test_lora_to_draw_with(trainer, tmp_path, canary, make):
    file = tmp_path / "style.safetensors"
    file.write_bytes(make(canary))
    arguments = ["sample", str(trainer.config()), "--prompt", "a", "--lora", str(file), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(application(COMMANDS, "anima"), arguments)
    assert isinstance(result.exception, ModelFileError)
    assert f"{file}: this is a pickle" in str(result.exception)


def test_settings_of_a_lora(tmp_path, canary):
    """In PEFT's own format they lie beside the file, as may the LoRA as a pickle."""
    file = tmp_path / "adapter_model.safetensors"
    write_tensors(file, {"base_model.model.blocks.0.lora_A.weight": torch.zeros(1)}, {})
    (tmp_path / "adapter_model.bin").write_bytes(torch_zip(canary))
    (tmp_path / "adapter_config.json").write_bytes(binary_pickle(canary))
    with pytest.raises(ModelFileError, match="settings for PEFT are damaged"):
        peft_config(open_header(file))


def test_cache_entries(trainer, images_drawer, tmp_path, canary, capsys):
    """They are made anew, and so is what is remembered of the images."""
    folder = images_drawer(tmp_path / "own", [(96, 96)] * 2)
    changes = {"dataset": {"directory": [{"path": str(folder)}]}, "max_steps": 1}
    first = trainer("first", **changes)
    entries = sorted(path for path in (folder / ".anima_cache").rglob("*") if path.is_file())
    assert {path.suffix or path.name for path in entries} == {".safetensors", ".json", ".lock"}
    for number, path in enumerate(entries):
        path.write_bytes(FORMATS[number % len(FORMATS)](canary))
    capsys.readouterr()
    again = trainer("again", **changes)
    assert "cache: 2 latents, 0 masks and 2 texts added" in capsys.readouterr().out
    assert again.losses == first.losses


def test_training_states(trainer, canary):
    """First the tensors of each state, in a manifest that has their hashes, then every file of it."""
    changes = {"checkpoint_every_n_steps": 1, "max_steps": 2}
    run = trainer(**changes)
    files = sorted(path for path in (run.path / "checkpoints").rglob("*") if path.is_file())
    for number, path in enumerate(path for path in files if path.suffix == ".safetensors"):
        path.write_bytes(FORMATS[number % len(FORMATS)](canary))
        manifest = path.with_name("state.json")
        facts = {key: value for key, value in json.loads(manifest.read_text()).items() if key != CHECKSUM}
        facts["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest.write_text(json.dumps(facts | {CHECKSUM: checksum(facts)}))
    with pytest.raises(UserError, match="this is a pickle"):
        trainer(**changes | {"max_steps": 3}, resume=True)
    for number, path in enumerate(files):
        path.write_bytes(FORMATS[number % len(FORMATS)](canary))
    with pytest.raises(UserError, match="damaged"):
        trainer(**changes | {"max_steps": 3}, resume=True)


def test_images_captions_masks_and_members_of_a_tar(trainer, images_drawer, tmp_path, canary):
    """webdataset's own reader would unpickle some of the members."""
    folder = images_drawer(tmp_path / "own", [(96, 96)] * 2)
    for suffix in ("pyd", "pickle", "pkl", "pth", "pt", "npy"):
        (folder / f"image0.{suffix}").write_bytes(binary_pickle(canary))
    for number, make in enumerate(FORMATS):
        (folder / f"pickle{number}.png").write_bytes(make(canary))
        (folder / f"pickle{number}.txt").write_text("a caption")
    archive = tmp_path / "own.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    (folder / "image1.txt").write_bytes(b"\x80\x04 not a caption")
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "image0.png").write_bytes(binary_pickle(canary))
    directories = [{"path": str(folder), "mask_path": str(masks)}, {"path": str(archive)}]
    run = trainer(dataset={"directory": directories, "max_bad_fraction": 1.0}, max_steps=1)
    warnings = [json.loads(line)["text"] for line in (run.path / "warnings.jsonl").read_text().splitlines()]
    bad = [text for text in warnings if "cannot be used" in text]
    assert sum("pickle" in text and "not an image" in text for text in bad) == 2 * len(FORMATS)
    assert any("its mask image0.png: not an image" in text for text in bad)


def hf_pickles(folder, canary):
    """A table that pandas would unpickle."""
    (folder / "train.pkl").write_bytes(binary_pickle(canary))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.pkl\n---\n")


def hf_webdataset(folder, canary):
    """datasets reads .pth in archives with torch.load."""
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name, content in (("a.pth", torch_zip(canary)), ("a.txt", b"caption"), ("a.pickle", binary_pickle(canary))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def hf_code(folder, canary):
    """datasets of old ran the script in a folder."""
    (folder / f"{folder.name}.py").write_text(CODE.format(path=canary.path))
    (folder / "train.csv").write_text("image,text\na,b\n")


def hf_state(folder, canary):
    """What save_to_disk leaves."""
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (folder / name).write_bytes(binary_pickle(canary))


def hf_parquet(folder, canary):
    """The table is one itself."""
    (folder / "train.parquet").write_bytes(binary_pickle(canary))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hf_pickles, "with any supported extension"), (hf_webdataset, "would read it as webdataset"),
        (hf_code, "scripts are no longer supported"), (hf_state, "utf-8"), (hf_parquet, "Parquet"),
    ],
)  # fmt: skip
def test_hugging_face_datasets(trainer, tmp_path, canary, make, reason, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "table"
    folder.mkdir()
    make(folder, canary)
    with pytest.raises(DataError, match=f"hf_dataset {folder}: .*{reason}"):
        trainer(dataset={"directory": [{"hf_dataset": str(folder)}]})


def test_files_that_a_run_left(tmp_path, canary):
    """The report reads them again."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples" / "s000001_00.png").write_bytes(binary_pickle(canary))
    for name in ("metrics.jsonl", "evaluations.jsonl", "seen.json", "manifest.json", "config.toml", "warnings.jsonl"):
        (run / name).write_bytes(text_pickle(canary))
    result = CliRunner().invoke(application(COMMANDS, "anima"), ["report", str(run)])
    assert result.exception is None


def test_a_safetensors_file_with_a_pickle_in_its_tensors_is_only_numbers(tmp_path, canary):
    content = torch.frombuffer(bytearray(binary_pickle(canary)), dtype=torch.uint8)
    write_tensors(tmp_path / "x.safetensors", {"weight": content}, {"pickle": text_pickle(canary).decode("latin-1")})
    ((_, found),) = read_tensors(open_header(tmp_path / "x.safetensors"))
    assert torch.equal(found, content)


FOUND: list[tuple[str, str]] = []  # what is unpickled while a test listens
LISTENING = threading.Event()


def note_find(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class" and LISTENING.is_set():
        FOUND.append(arguments)


sys.addaudithook(note_find)  # there is no way to remove one


@pytest.fixture
def finds():
    """What is unpickled in this process during the test, as (module, name)."""
    FOUND.clear()
    LISTENING.set()
    yield FOUND
    LISTENING.clear()


@pytest.mark.slow
def test_nothing_is_unpickled_by_a_run(trainer, tmp_path, finds):
    """Whatever the libraries do: with previews, evaluation, a state, resuming, a report and a picture afterwards."""
    pickle.loads(pickle.dumps(Path("x")))
    assert finds  # it would be noticed
    finds.clear()
    held = {"resolutions": [96], "directory": trainer.base["dataset"]["directory"]}
    changes = {
        "checkpoint_every_n_steps": 2,
        "eval_datasets": [{"name": "held", "config": held}],
        "sampling": {"every_n_steps": 2, "width": 64, "height": 64, "steps": 1, "prompts": ["a"]},
        "monitoring": {"tensorboard": True},
    }
    run = trainer(max_steps=2, **changes)
    trainer(max_steps=4, resume=True, **changes)
    for arguments in (
        ["report", str(run.path)],
        ["check", str(trainer.config(**changes)), "--html", str(tmp_path / "check.html")],
        ["sample", str(trainer.config()), "--prompt", "a", "--size", "64x64", "--steps", "1", "--out", str(tmp_path),
         "--lora", str(run.path / "weights" / "run.safetensors")],
    ):  # fmt: skip
        result = CliRunner().invoke(application(COMMANDS, "anima"), arguments)
        assert result.exception is None, result.output
    assert finds == []


@pytest.mark.slow
def test_an_image_folder_is_not_unpickled_by_datasets(trainer, tmp_path, images_drawer, monkeypatch, finds):
    """datasets pickles to make fingerprints, and so writes; it must not read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = images_drawer(tmp_path / "own", [(96, 96)] * 2, captions=False)
    Image.new("RGB", (96, 96)).save(folder / "plain.png")
    directory = {"hf_dataset": str(folder), "caption_column": "", "missing_caption": "empty"}
    trainer(max_steps=1, dataset={"directory": [directory]})
    assert finds == []
