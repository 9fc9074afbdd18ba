"""Captions drawn at random are encoded while the model trains, to what the cache would hold."""

import threading

import pytest
import torch
from PIL import Image

from anima_train.caching.text_encoding import CaptionEncoder, OnlineTextEncoder
from anima_train.config.load import load_config
from anima_train.config.model_files import find_model_files
from anima_train.model.loading import ModelSpec
from anima_train.model.text import load_tokenizers

CAPTIONS = ["red circle, flat color", "", "one", "red circle, number 3, flat color, " * 4]
ONLINE = {"cache_text_embeddings": False}
DROPS_NOTHING = {"tag_dropout": 1e-12}  # drawn for each showing all the same


@pytest.fixture
def encoder(trainer):
    """Makes encoders of the tiny model."""

    def make(apply_llm_adapter, dtype=torch.float32):
        files = find_model_files(load_config(trainer.config()).config)
        tokenizers = load_tokenizers(files.tokenizer, files.t5_tokenizer)
        cpu = torch.device("cpu")
        return CaptionEncoder(ModelSpec(files, dtype, dtype, not apply_llm_adapter, cpu, cpu), tokenizers)

    return make


@pytest.mark.parametrize("apply_llm_adapter", [True, False])
def test_a_caption_alone_is_encoded_as_in_a_batch(encoder, apply_llm_adapter, error):
    batched = encoder(apply_llm_adapter).encode(CAPTIONS)
    online = OnlineTextEncoder(encoder(apply_llm_adapter))
    for caption, expected in zip(CAPTIONS, batched, strict=True):
        found = online(caption)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert tensor.numel() == 0 or error(found[name].float(), tensor.float()) < 1e-5


def test_conditions_do_not_depend_on_order_or_threads(encoder):
    expected = {caption: OnlineTextEncoder(encoder(True))(caption)["context"] for caption in CAPTIONS}
    online = OnlineTextEncoder(encoder(True))
    found = {}

    def ask(caption):
        found[caption] = online(caption)["context"]

    threads = [threading.Thread(target=ask, args=(caption,)) for caption in reversed(CAPTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[caption], expected[caption]) for caption in CAPTIONS)


@pytest.mark.parametrize("adapter_lr", [pytest.param(0, marks=pytest.mark.slow), 1e-3])
def test_losses_are_those_of_cached_captions(trainer, adapter_lr, error):
    model = {"llm_adapter_lr": adapter_lr}
    cached = torch.tensor(trainer("cached", model=model, uncond_fraction=0.3).losses)
    online = torch.tensor(trainer("online", model={**model, **ONLINE}, uncond_fraction=0.3).losses)
    drawn = torch.tensor(trainer("drawn", model=model, uncond_fraction=0.3, dataset=DROPS_NOTHING).losses)
    assert error(online, cached) < 1e-5
    assert error(drawn, cached) < 1e-5


def test_what_runs_beside_the_text_encoder_does_not_matter(trainer):
    dataset = {"shuffle_tags": True, "tag_dropout": 0.3}
    cpu = trainer("cpu", dataset=dataset, model={"text_encoder_device": "cpu"})
    assert trainer("training", dataset=dataset).losses == cpu.losses


def test_drawn_captions_resume_bitwise(trainer):
    keys = {
        "dataset": {"shuffle_tags": True, "tag_dropout": 0.3, "horizontal_flip": True},
        "checkpoint_every_n_steps": 2,
    }
    whole = trainer("whole", max_steps=5, **keys)
    trainer("halves", max_steps=3, **keys)
    halves = trainer("halves", max_steps=5, resume=True, **keys)
    assert halves.losses == whole.losses
    assert all(torch.equal(tensor, halves.weights[name]) for name, tensor in whole.weights.items())


@pytest.mark.slow
def test_drawn_captions_are_the_same_on_two_processes(trainer, error):
    keys = {"dataset": {"shuffle_tags": True, "tag_dropout": 0.3, "role": "train"}, "micro_batch_size_per_gpu": 2}
    one = trainer("one", gradient_accumulation_steps=2, **keys)
    two = trainer.processes(2, "two", **keys)
    assert error(torch.tensor(two.losses), torch.tensor(one.losses)) < 1e-5


def test_drawn_captions_change_what_is_trained_and_not_what_is_cached(trainer, images_drawer, tmp_path, capsys):
    images = images_drawer(tmp_path / "images", [(96, 96)] * 3)
    dataset = {"directory": [{"path": str(images)}], "keep_first_n_tags": 1, "protected_tags": ["flat color"]}
    plain = trainer("plain", dataset={**dataset, "tag_dropout": 1e-12}).losses
    capsys.readouterr()
    dropped = trainer("dropped", dataset={**dataset, "tag_dropout": 0.9}).losses
    output = capsys.readouterr().out
    assert "cache: 0 latents, 0 masks and 0 texts added" in output
    assert "captions are encoded during training, on cpu" in output
    assert dropped != plain
    assert not (images / ".anima_cache" / "text").exists()


def test_a_long_drawn_caption_is_warned_of(trainer, images_drawer, tmp_path, caplog):
    images = images_drawer(tmp_path / "images", [(96, 96)])
    (images / "image0.txt").write_text(", ".join(f"tag {number}" for number in range(600)))
    trainer(max_steps=1, dataset={"directory": [{"path": str(images)}], "shuffle_tags": True})
    assert "longer than model.max_caption_tokens = 512 and loses its end (up to " in caplog.text
    assert "such as image0.png (" in caplog.text
    assert "tag 1," not in caplog.text


@pytest.mark.parametrize("llm_adapter_lr", [0, pytest.param(1e-4, marks=pytest.mark.slow)])
def test_longer_captions_are_trained_where_they_are_asked_for(trainer, images_drawer, tmp_path, caplog, llm_adapter_lr):
    """A long caption beside a short one, in one batch; the first 512 tokens are those of the short limit."""
    images = images_drawer(tmp_path / "images", [(96, 96)] * 2)
    (images / "image0.txt").write_text(", ".join(f"tag {number}" for number in range(100)))
    changes = {
        "max_steps": 1, "micro_batch_size_per_gpu": 2, "dataset": {"directory": [{"path": str(images)}]},
        "eval_datasets": [{"name": "held", "config": {"resolutions": [96], "directory": [{"path": str(images)}]}}],
        "sampling": {"prompts": ["1girl"], "width": 64, "height": 64, "steps": 1},
    }  # fmt: skip
    runs = {}
    for limit in (512, 1024):
        caplog.clear()
        model = {"llm_adapter_lr": llm_adapter_lr, "max_caption_tokens": limit}
        runs[limit] = trainer(f"run{limit}", model=model, **changes)
        assert ("loses its end" in caplog.text) == (limit == 512)
    assert runs[512].losses != runs[1024].losses
    assert runs[512].evaluations[0]["held/loss"] != runs[1024].evaluations[0]["held/loss"]


# What else a dataset may ask for, through the whole run


@pytest.mark.slow
def test_flips_have_latents_of_their_own_and_are_trained(trainer, images_drawer, tmp_path, capsys):
    images = images_drawer(tmp_path / "images", [(96, 96)] * 2)
    plain = trainer("plain", dataset={"directory": [{"path": str(images)}]})
    capsys.readouterr()
    flipped = trainer("flipped", dataset={"directory": [{"path": str(images)}], "horizontal_flip": True})
    assert "cache: 2 latents, 0 masks" in capsys.readouterr().out
    assert flipped.losses != plain.losses


def test_losses_are_logged_by_role_and_mean_to_the_whole(trainer, plain_run, images_drawer, tmp_path):
    mine = images_drawer(tmp_path / "mine", [(96, 96)] * 4)
    others = images_drawer(tmp_path / "others", [(96, 96)] * 2)
    directories = [
        {"path": str(mine), "weight": 3, "trigger_word": "sks"},
        {"path": str(others), "weight": 1, "role": "regularization"},
    ]
    run = trainer(max_steps=12, gradient_accumulation_steps=4, dataset={"directory": directories})
    shares = []
    for line in run.metrics:
        roles = [line.get(f"loss/{role}") for role in ("train", "regularization")]
        if None not in roles:
            share = (line["loss"] - roles[0]) / (roles[1] - roles[0])  # of the regularization images in the step
            assert min(abs(share - n / of) for of in (2, 3, 4) for n in range(1, of)) < 1e-4
            shares.append(share)
        else:
            assert line["loss"] == pytest.approx(next(role for role in roles if role is not None), rel=1e-6)
    assert shares
    assert all("loss/train" not in line for line in plain_run.metrics)


def test_alpha_hides_what_is_transparent(trainer, tmp_path):
    def losses(name, colour):
        folder = tmp_path / name
        folder.mkdir()
        image = Image.new("RGBA", (96, 96), (200, 30, 30, 255))
        image.paste((*colour, 0), (0, 0, 96, 48))  # transparent, whatever the colour below
        image.save(folder / "a.png")
        return trainer(name, dataset={"directory": [{"path": str(folder)}], "alpha_as_mask": True}).losses

    first = losses("first", (0, 0, 0))
    masked = trainer("whole", dataset={"directory": [{"path": str(tmp_path / "first")}]}).losses
    assert first == losses("second", (0, 255, 0))
    assert first != masked
