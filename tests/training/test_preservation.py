"""[preservation]: samples whose target is the velocity of the base model, so that it is not forgotten."""

import json
import math
import re
from fractions import Fraction
from itertools import chain
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anima_train.adapters.lora import Lora, lora_layers
from anima_train.cli.main import COMMANDS, application
from anima_train.config.base_drawn import PRESERVED_CAPTIONS, SHIPPED_CAPTIONS, read_captions
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.core.random import stream
from anima_train.core.text_batch import CONTEXT_ROWS, TextContext
from anima_train.data.buckets import Size
from anima_train.data.loader import Batch
from anima_train.data.preservation import Preservation
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.objective.flow import velocity_target
from anima_train.objective.losses import Loss
from anima_train.objective.step import compute_loss, predict, with_base_velocity
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.run.progress import ProgressBar
from anima_train.training import train as train_module
from anima_train.training.build import plan_run
from anima_train.training.prepare import scan_all
from anima_train.training.train import run_training

CAPTIONS = {"manner": ["ink, a fox", "oil painting of a hill"], "sign": ['a sign that says "OPEN"']}
DRAWN = {"captions": CAPTIONS, "pictures": {"width": 96, "height": 96, "steps": 2}}


def small_model():
    """A transformer with a LoRA that is not zero, and the LoRA."""
    torch.manual_seed(0)
    model = MiniTrainDIT(TransformerShape(2, 48, 24, 16, 20, 8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    lora = Lora(rank=4)
    lora.attach(model, LearningRates(dict.fromkeys(COMPONENTS, 1.0)), seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model, lora


def batch_of(preserved):
    """Three samples, of which those keep the base."""
    draw = stream(0, "batch")
    latents, noise = torch.randn(2, 3, 16, 1, 4, 4, generator=draw)
    rows = torch.randn(3, 16, 20, generator=draw)
    return Batch(
        latents, noise, torch.tensor([0.2, 0.5, 0.8]), TextContext(rows, CONTEXT_ROWS - 16), None, ("a", "b", "c"),
        preserved=torch.tensor(preserved),
    )  # fmt: skip


@pytest.mark.parametrize("preserved", [[1], [0, 2], [0, 1, 2]])
def test_the_target_of_preserved_samples_is_the_base_on_the_same_noise(preserved):
    model, lora = small_model()
    batch = batch_of(preserved)
    complete = with_base_velocity(model, batch, lambda: lora.as_base(model))
    losses = compute_loss(model, complete, Loss())
    velocity = predict(model, batch)
    expected = (velocity - velocity_target(batch.latents, batch.noise)).square().flatten(1).mean(dim=1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.zero_()
        base = predict(model, batch)
    kept = (velocity - base).square().flatten(1).mean(dim=1)
    expected[preserved] = kept[preserved]
    torch.testing.assert_close(losses, expected)
    assert float(kept.detach().min()) > 1e-3
    assert losses.requires_grad
    assert not complete.base_velocity.requires_grad


def test_a_share_of_the_showings_of_each_image_is_spread_evenly(trainer):
    loaded = load_config(trainer.config(preservation={"on": "training_latents", "captions": CAPTIONS, "share": 0.3}))
    samples = scan_all(loaded.datasets, 0, write=False)["train"].samples
    kept = loaded.preservation
    assert kept == Preservation(0.3, 1.0, tuple(text for texts in CAPTIONS.values() for text in texts))
    used = set()
    for sample in samples:
        drawn = [kept.caption(sample, 0, repeat) for repeat in range(200)]
        found = [caption is not None for caption in drawn]
        assert sum(found) in (59, 60, 61)
        gaps = [sum(found[start : start + 10]) for start in range(190)]
        assert set(gaps) <= {2, 3, 4}
        used |= {caption.text for caption in drawn if caption is not None}
    assert used == set(kept.captions)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_drawn_pictures_are_their_share_of_an_epoch(trainer, share):
    run = trainer("run", preservation=DRAWN | {"share": share}, max_steps=1)
    assert (run.path / "weights").exists()
    loaded = load_config(trainer.config(preservation=DRAWN | {"share": share}, epochs=4, max_steps=None))
    scans = scan_all(loaded.datasets, 0, write=False)
    assert set(scans) == {"train"}
    plan, _ = plan_run(loaded.config, scans["train"].samples, 1)
    counts = {True: 0, False: 0}
    for epoch in range(4):
        for step in plan.epoch(epoch):
            for batch in step.micro_batches:
                for ref in batch.refs:
                    counts[plan.samples[ref.sample].is_preserved] += 1
    assert counts[False] == 24
    assert Fraction(counts[True], sum(counts.values())) == pytest.approx(share, abs=0.03)
    added = [sample for sample in plan.samples if sample.is_preserved]
    assert [sample.id for sample in added] == [
        "preservation/manner/0000.png@96", "preservation/manner/0001.png@96", "preservation/sign/0000.png@96",
    ]  # fmt: skip
    assert {sample.role for sample in added} == {"preservation"}
    assert not {sample.directory for sample in added} & {sample.directory for sample in plan.samples[:6]}


def test_a_run_keeps_the_base_resumes_on_the_same_bits_and_tells_the_cost(trainer, capsys):
    keys = {"preservation": DRAWN | {"share": 0.5}, "checkpoint_every_n_steps": 3, "max_steps": 8}
    run = trainer("run", **keys)
    text = capsys.readouterr().out
    assert "dataset preservation: the base model draws 3 pictures into " in text
    told = re.search(r"preservation: for (\d+)% of the samples the target is the base's velocity, on 3 pictures", text)
    assert 30 < int(told[1]) < 70  # of so few
    assert "preservation: the base's passes took " in text
    assert "dataset train: 6 images of 6 found" in text
    first = next(line for line in run.metrics if "loss/preservation" in line)
    kept = [line["loss/preservation"] for line in run.metrics if "loss/preservation" in line]
    learned = [line["loss/train"] for line in run.metrics if "loss/train" in line]
    assert len(kept) + len(learned) == 8  # micro-batches of one
    assert len(kept) in (3, 4, 5)
    assert max(kept) < min(learned) / 10  # as it changes little
    if first["step"] == 1:
        assert kept[0] == 0
    assert min(kept[1:]) > 0
    seconds = [line["preservation_seconds"] for line in run.metrics]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < run.metrics[-1]["seconds"]
    state = run.path / "checkpoints" / "step-000006"
    weights, metrics = run.weights, run.losses
    resumed = trainer("run", resume=state, **keys)
    assert resumed.losses == metrics
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ConfigError, match="decides what each step sees"):
        trainer("run", resume=True, **keys | {"preservation": DRAWN | {"share": 0.4}})


@pytest.mark.slow
def test_a_model_that_is_held_drifts_less(trainer):
    known = {"name": "known", "role": "retention", "captions": "shipped", "quantiles": [0.5]}
    known["pictures"] = {"width": 64, "height": 64, "steps": 1}
    keys = {
        "eval_datasets": [known], "max_steps": 24, "optimizer": {"lr": 3e-3}, "micro_batch_size_per_gpu": 2,
        "eval_micro_batch_size_per_gpu": 30, "eval_every_n_steps": 24,
    }  # fmt: skip
    plain = trainer("plain", **keys).evaluations[-1]["known/drift"]
    held = {"on": "training_latents", "share": 0.5, "weight": 4.0}
    kept = trainer("kept", preservation=held, **keys).evaluations[-1]["known/drift"]
    assert kept < 0.8 * plain


@pytest.mark.parametrize(
    ("settings", "captions"),
    [
        ({"on": "empty_caption"}, ("",)),
        ({"on": "class_caption", "class_caption": "1girl"}, ("1girl",)),
        ({"on": "training_latents"}, tuple(chain.from_iterable(read_captions(PRESERVED_CAPTIONS, "").values()))),
    ],
)
def test_training_images_get_the_captions_of_the_mode(trainer, monkeypatch, settings, captions):
    seen = []
    real = train_module.compute_loss
    monkeypatch.setattr(train_module, "compute_loss", lambda *given: (seen.append(given[1]), real(*given))[1])
    loaded = load_config(trainer.config(preservation=settings | {"share": 0.5}))
    assert loaded.preservation.captions == captions
    run = trainer("run", preservation=settings | {"share": 0.5, "weight": 3.0}, max_steps=8)
    kept = [batch for batch in seen if batch.preserved is not None]
    assert 2 <= len(kept) <= 6
    assert all(batch.base_velocity is not None and batch.weights.tolist() == [3.0] for batch in kept)
    assert all(batch.weights is None for batch in seen if batch.preserved is None)
    for line, batch in zip(run.metrics, seen, strict=True):
        if batch.preserved is not None:  # the step's loss is weighted, that of the role is not
            assert line["loss"] == pytest.approx(3 * line["loss/preservation"], rel=1e-5, abs=1e-12)


def test_a_mask_does_not_hide_what_is_kept(trainer, tmp_path, pictures):
    from PIL import Image

    for number in range(6):
        with Image.open(pictures / f"image{number}.png") as image:
            Image.new("L", image.size, 0 if number else 255).save(tmp_path / f"image{number}.png")
    dataset = {"directory": [{"path": str(pictures), "mask_path": str(tmp_path)}]}
    run = trainer("run", dataset=dataset, preservation={"on": "empty_caption", "share": 0.5}, max_steps=12,
                  optimizer={"lr": 1e-2})  # fmt: skip
    kept = [line["loss/preservation"] for line in run.metrics if "loss/preservation" in line]
    assert sum(loss > 0 for loss in kept) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"type": "full", "rank": None}}, "preservation: needs [adapter]: a full fine-tune has no base"),
        ({"sharding": "fsdp2"}, "preservation: excludes sharding: a process asks the base alone"),
        ({"adapter": {"type": "lora", "min_rank": 2}}, "preservation: excludes min_rank in [adapter]: the masked LoRA"),
        ({"preservation": {"on": "class_caption"}}, 'preservation.class_caption: missing, with on = "class_caption"'),
        ({"preservation": {"class_caption": "1girl"}}, 'class_caption: has no effect without on = "class_caption"'),
        ({"preservation": {"on": "empty_caption", "captions": CAPTIONS}}, 'has no effect with on = "empty_caption"'),
        ({"preservation": {"on": "training_latents", "pictures": {"steps": 2}}}, "where nothing is drawn"),
        ({"preservation": {"captions": {"a/b": ["x"]}}}, 'preservation.captions: "a/b" is no name of a kind'),
        ({"preservation": {"captions": {}}}, "preservation.captions:"),
        ({"preservation": {"captions": "none.toml"}}, "preservation.captions: "),
        ({"preservation": {"pictures": {"stepps": 2}}}, "preservation.pictures.stepps: unknown key; did you mean"),
        ({"preservation": {"share": 0.95}}, "preservation.share: "),
        ({"preservation": {"on": "class_caption", "class_caption": " "}}, "preservation.class_caption: "),
        ({"preservation": {"captions": {"a": ["x"], "b": ["x"]}}}, '"x" stands in two kinds; remove one'),
        ({"preservation": {"weight": 0}}, "preservation.weight: "),
    ],
)
def test_what_contradicts_is_refused(trainer, changes, message):
    with pytest.raises(ConfigError) as refused:
        load_config(trainer.config(**{"preservation": {}, **changes}))
    assert message in str(refused.value)


def test_what_is_measured_is_not_what_is_kept(trainer):
    shipped, kept = (read_captions(path, "") for path in (SHIPPED_CAPTIONS, PRESERVED_CAPTIONS))
    measured = {text for texts in shipped.values() for text in texts}
    assert not measured & {text for texts in kept.values() for text in texts}
    assert kept.keys() == shipped.keys()
    known = {"name": "known", "role": "retention", "captions": "shipped"}
    loaded = load_config(trainer.config(eval_datasets=[known], preservation={}))
    assert loaded.warnings == ()
    both = {"captions": {"manner": shipped["manner"]}}
    loaded = load_config(trainer.config(eval_datasets=[known], preservation=both))
    (warning,) = loaded.warnings
    assert warning.endswith(
        "run.toml: preservation.captions: the evaluation set known measures on 8 captions of them; of others more is "
        "forgotten"
    )
    noises = [{request.seed for _, _, request in each.drawn.pictures()} for each in loaded.datasets[1:]]
    assert not noises[0] & noises[1]


def test_a_dry_run_says_what_would_be_drawn_plans_with_it_and_draws_nothing(trainer, capsys):
    keys = {"preservation": DRAWN | {"share": 0.4}, "epochs": 5, "max_steps": None}
    run_training(load_config(trainer.config(**keys)), dry_run=True)
    text = capsys.readouterr().out
    assert "dataset preservation: the base model draws 3 pictures first, 96x96 in 2 steps, into " in text
    told = re.search(r"preservation: for (\d+)% of the samples the target is the base's velocity, on 3 pictures", text)
    assert 37 < int(told[1]) < 43
    assert not (trainer.folder / "runs").exists()
    trainer("run", **keys)
    assert re.search(r".*steps in the first epoch.*", text)[0] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("on", ["retention", "training_latents"])
def test_two_processes_train_as_one(trainer, on):
    settings = (DRAWN if on == "retention" else {"on": on, "captions": CAPTIONS}) | {"share": 0.4}
    keys = {"preservation": settings, "micro_batch_size_per_gpu": 2, "max_steps": 6}
    one = trainer("one", gradient_accumulation_steps=2, **keys)
    two = trainer.processes(2, "two", **keys)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    kept = [[line.get("loss/preservation", -1) for line in run.metrics] for run in (one, two)]
    assert kept[1] == pytest.approx(kept[0], rel=1e-3, abs=1e-9)
    assert max(kept[0]) > 0


def test_pictures_are_as_large_as_those_that_are_trained(trainer, pictures):
    loaded = load_config(trainer.config(preservation={}))
    assert loaded.datasets[-1].drawn.size == Size(96, 96)
    dataset = {"resolutions": [64, [160, 96]], "directory": [{"path": str(pictures)}]}
    loaded = load_config(trainer.config(dataset=dataset, preservation={}))
    assert loaded.datasets[-1].drawn.size == Size(112, 112)
    loaded = load_config(trainer.config(preservation={"pictures": {"width": 64, "height": 48}}))
    assert loaded.datasets[-1].drawn.size == Size(64, 48)


def test_the_share_is_counted_and_none_is_a_warning(trainer, pictures, capsys):
    folders = [{"path": str(pictures), "weight": 1}, {"path": str(pictures), "weight": 1, "role": "regularization"}]
    held = {"on": "training_latents", "share": 0.4}
    keys = {"dataset": {"directory": folders}, "preservation": held, "epochs": 20, "max_steps": None}
    run_training(load_config(trainer.config(**keys)), dry_run=True)
    told = capsys.readouterr().out
    assert "preservation: for 20% of the samples the target is the base's velocity" in told
    assert "regularization: 50% of the samples" in told
    held |= {"share": 0.001}
    run_training(load_config(trainer.config(preservation=held, max_steps=2)), dry_run=True)
    text = capsys.readouterr().out
    assert "warning: preservation: no sample of this run keeps the base, as it is so short; raise share" in text


def test_the_table_of_losses_by_noise_is_of_what_is_learned(trainer):
    run = trainer("run", preservation={"on": "empty_caption", "share": 0.5}, max_steps=8)
    for line in run.metrics:
        assert sum(number for *_, number in line["loss_by_t"]) == ("loss/train" in line)


def test_check_tells_programs_of_it_and_of_what_evaluations_cost(trainer):
    known = {"name": "known", "role": "retention", "captions": "shipped", "quantiles": [0.5]}
    config = trainer.config(preservation=DRAWN | {"share": 0.4}, eval_datasets=[known])
    result = CliRunner().invoke(application(COMMANDS, ""), ["check", str(config), "--json"])
    found = json.loads(result.stdout)
    assert found["preservation"] == {"share": 0.4, "weight": 1.0, "captions": []}
    assert found["evaluation_passes"] == 60  # of 30 pictures and of the base
    assert found["datasets"]["train"]["images"] == 6
    page = Path(found["page"]).read_text(encoding="utf-8")
    lines = (
        "6 of 6 images are used",
        "% of the samples the target is the base",
        "evaluation sets: known (retention, drift)",
        "evaluations: 1 with 60 passes",
    )
    assert [line for line in lines if line not in page] == []


def test_the_bar_has_a_number_where_the_first_step_learns_nothing(trainer, monkeypatch):
    shown = []
    real = ProgressBar.update
    monkeypatch.setattr(ProgressBar, "update", lambda self, *given: (shown.append(given[1]), real(self, *given))[1])
    run = trainer("run", preservation={"on": "empty_caption", "share": 0.9}, max_steps=6)
    assert "loss/train" not in run.metrics[0]
    assert all(math.isfinite(loss) for loss in shown)
    last = 0.0
    for line, loss in zip(run.metrics, shown, strict=True):
        last = line.get("loss/train", last)
        assert loss == last
