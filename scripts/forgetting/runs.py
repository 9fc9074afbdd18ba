"""The runs of the experiment: configurations in the program's own keys, trained by its own loop, read off its logs."""

import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from accelerate.state import AcceleratorState, GradientState, PartialState

from anima_train.config.load import load_config
from anima_train.core.files import write_text
from anima_train.model.loading import ModelFiles
from anima_train.model.tiny import tiny_paths
from anima_train.training.train import run_training
from forgetting.judge import look, trained_judge
from forgetting.toy import (
    COLOURS,
    GROUNDS,
    NEW,
    NEW_COLOURS,
    SHAPES,
    SIDE,
    caption_of,
    random_words,
    trained_vae,
    write_frozen,
    write_pictures,
    write_transformer,
    write_weights,
)  # fmt: skip

BASE_PICTURES = 6400
NUM_TRAINED, NUM_REGULARIZATION = 20, 64
QUANTILES = [0.2, 0.5, 0.8]
LR = 3e-4
EVERY = 30  # steps between evaluations
LOOK_EVERY = 2 * EVERY  # between looks at pictures
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)  # at which the plain run's LoRA is measured in the end
CLASS_CAPTION = "checker"  # of the old shapes the one that the new one is most like
PICTURES = {"width": SIDE, "height": SIDE, "steps": 16, "cfg": 1, "sampler": "euler"}
Tables = dict[str, Any]


@dataclass(frozen=True)
class World:
    """A folder with everything that runs share."""

    folder: Path
    steps: int  # of each run

    @property
    def files(self) -> ModelFiles:
        """The files of the base model."""
        return replace(tiny_paths(self.folder / "model"), transformer=self.folder / "model" / "base.safetensors")

    def model_keys(self) -> Tables:
        """Return `[model]`, with the base model's files."""
        files = self.files
        return {
            "type": "anima", "dtype": "float32", "shift": 3.0, "transformer_path": str(files.transformer),
            "vae_path": str(files.vae), "llm_path": str(files.llm), "tokenizer_path": str(files.tokenizer),
            "t5_tokenizer_path": str(files.t5_tokenizer),
        }  # fmt: skip

    def common(self, name: str) -> Tables:
        """Return the keys that all runs have, the base's too."""
        return {
            "output_dir": str(self.folder / "runs"), "run_name": name, "cache_dir": str(self.folder / "cache"),
            "num_workers": 0, "offline": True, "monitoring": {"tensorboard": False}, "model": self.model_keys(),
        }  # fmt: skip


def pictures_in(*folders: Path, **keys: Any) -> Tables:
    """Return a dataset of folders; the name of each is the kind of its pictures."""
    directories = [{"path": str(folder), "kind": folder.name, **keys} for folder in folders]
    return {"size_buckets": [[SIDE, SIDE]], "directory": directories}


# The base -------------------------------------------------------------------------------------------------------------


def make_base(world: World, steps: int) -> None:
    """Train VAE and base from nothing, by a full fine-tune of random weights; what is there is not made again."""
    model = world.folder / "model"
    if world.files.transformer.is_file():
        return
    write_frozen(model)
    write_weights(world.files.vae, trained_vae(seed=0))
    pictures = world.folder / "base pictures"
    generator = np.random.default_rng(1)
    write_pictures(pictures, random_words(BASE_PICTURES, generator), generator)
    random_transformer = write_transformer(model)
    tables = world.common("base") | {
        "max_steps": steps, "micro_batch_size_per_gpu": 16, "warmup_steps": 100, "lr_scheduler": "cosine",
        "uncond_fraction": 0.1, "save_dtype": "bfloat16", "optimizer": {"type": "adamw", "lr": 2e-3},
        "checkpoint_every_n_steps": 500, "dataset": pictures_in(pictures, horizontal_flip=True),
    }  # fmt: skip
    tables["model"] = world.model_keys() | {"transformer_path": str(random_transformer)}
    shutil.copy(train(world, tables), world.files.transformer)


def copy_base(world: World, source: Path) -> None:
    """Take a base that is there already: a folder with `transformer.safetensors` and `vae.safetensors`."""
    if not world.files.transformer.is_file():
        write_frozen(world.folder / "model")
        world.files.vae.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "vae.safetensors", world.files.vae)
        shutil.copy(source / "transformer.safetensors", world.files.transformer)


# The runs -------------------------------------------------------------------------------------------------------------


def regularization(world: World, seed: int, weight: float) -> Tables:
    """Return a dataset with a share of old pictures beside the new ones."""
    new, old = world.folder / f"new {seed}", world.folder / f"old {seed}"
    directories = [
        {"path": str(new), "weight": 1 - weight}, {"path": str(old), "role": "regularization", "weight": weight},
    ]  # fmt: skip
    return {"dataset": {"size_buckets": [[SIDE, SIDE]], "directory": directories}}


def preservation(world: World, on: str, share: float) -> Tables:
    """Return `[preservation]`."""
    keys: Tables = {"on": on, "share": share}
    if on in ("retention", "training_latents"):
        keys["captions"] = str(world.folder / "preserved.toml")
    if on == "retention":
        keys["pictures"] = PICTURES
    if on == "class_caption":
        keys["class_caption"] = CLASS_CAPTION
    return {"preservation": keys}


def changes(world: World, method: str, seed: int) -> Tables:
    """Return the keys of a method, beside those of a plain run.

    Raises:
        KeyError: there is no such method.
    """
    kind, _, number = method.rpartition(" ")
    longer = {"max_steps": world.steps * 3 // 2}  # where less is learnt in a step
    if kind.startswith("preservation on "):
        keys = preservation(world, kind.removeprefix("preservation on ").replace(" ", "_"), float(number) / 100)
        return keys | (longer if float(number) > 30 else {})
    if kind == "regularization":
        return regularization(world, seed, float(number) / 100)
    if kind == "rank":
        return {"adapter": {"type": "lora", "rank": int(number)}}
    if kind == "lr":
        return {"optimizer": {"type": "adamw", "lr": float(number)}} | (longer if float(number) < LR else {})
    return {
        "plain": {"strengths_after_training": list(STRENGTHS)},
        "early": early(world, seed),
        "both 20": regularization(world, seed, 0.2) | preservation(world, "retention", 0.2),
        "DoRA": {"adapter": {"type": "lora", "rank": 16, "use_dora": True}},
        "T-LoRA": {"adapter": {"type": "lora", "rank": 16, "min_rank": 8}},
        "LoKr": {"adapter": {"type": "lokr", "rank": 16}, "optimizer": {"type": "adamw", "lr": 1e-3}},  # it learns late
        "LLM adapter": {"model": world.model_keys() | {"llm_adapter_lr": LR}},
    }[method]


def early(world: World, seed: int) -> Tables:
    """Return the keys of a run of few steps, which also measures the old pictures with captions of other shapes."""
    sets = evaluations(world, seed)
    folders = [world.folder / "miscaptioned" / shape for shape in SHAPES]
    sets.append({"name": "miscaptioned", "config": pictures_in(*folders), "quantiles": QUANTILES})
    return {"max_steps": 30, "eval_every_n_steps": 15, "eval_datasets": sets}


def evaluations(world: World, seed: int) -> list[Tables]:
    """Return the sets that runs are measured on."""
    trained, known, levels = world.folder / f"new {seed}", world.folder / "known", {"quantiles": QUANTILES}
    return [
        {"name": "trained", "role": "train", "config": pictures_in(trained), **levels},
        {"name": "held", "role": "validation", "config": pictures_in(world.folder / "held"), **levels},
        {"name": "known", "role": "retention", "config": pictures_in(*(known / s for s in SHAPES)), **levels},
        {"name": "drawn", "role": "retention", "captions": str(world.folder / "captions.toml"),
         "pictures": PICTURES, **levels},
    ]  # fmt: skip


def configuration(world: World, method: str, seed: int) -> Tables:
    """Return the configuration of a run."""
    return {
        **world.common(f"{method} {seed}".replace(" ", "_")),
        "seed": seed, "max_steps": world.steps, "micro_batch_size_per_gpu": 4, "warmup_steps": 20,
        "eval_micro_batch_size_per_gpu": 32, "eval_every_n_steps": EVERY, "save_every_n_steps": LOOK_EVERY,
        "adapter": {"type": "lora", "rank": 16}, "optimizer": {"type": "adamw", "lr": LR},
        "dataset": pictures_in(world.folder / f"new {seed}"),
        "eval_datasets": evaluations(world, seed),
        "model": world.model_keys() | {"llm_adapter_lr": 0},
    } | changes(world, method, seed)  # fmt: skip


def write_data(world: World, seed: int) -> None:
    """Draw the pictures that all runs are measured on, and those that the runs of a seed learn from."""
    if not (world.folder / "captions.toml").is_file():
        generator = np.random.default_rng(2)
        write_pictures(world.folder / "held", random_words(32, generator, [NEW], NEW_COLOURS), generator)
        known = random_words(48, generator)
        others = [(known[place - 1][0], *rest) for place, (_, *rest) in enumerate(known)]
        for name, told in (("known", known), ("miscaptioned", others)):
            write_pictures(world.folder / name, known, np.random.default_rng(5), by_shape=True, told=told)
        rest = {shape: sorted(caption_of((shape, c, g)) for c in COLOURS for g in GROUNDS) for shape in SHAPES}
        for captions in rest.values():
            generator.shuffle(captions)
        measured = {shape: captions[:3] for shape, captions in rest.items()}
        preserved = {shape: captions[4:12] for shape, captions in rest.items()}
        write_text(world.folder / "preserved.toml", tomli_w.dumps(preserved))
        write_text(world.folder / "captions.toml", tomli_w.dumps(measured))
    if not (world.folder / f"old {seed}").is_dir():
        generator = np.random.default_rng([4, seed])
        write_pictures(
            world.folder / f"new {seed}", random_words(NUM_TRAINED, generator, [NEW], NEW_COLOURS), generator
        )
        write_pictures(world.folder / f"old {seed}", random_words(NUM_REGULARIZATION, generator), generator)


def train(world: World, tables: Mapping[str, Any]) -> Path:
    """Train a configuration; return the path of its last weights. What it tells goes into a file."""
    path = world.folder / f"{tables['run_name']}.toml"
    write_text(path, tomli_w.dumps(tables))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # accelerate keeps one configuration per process
    with open(path.with_suffix(".log"), "a") as log, redirect_stdout(log), redirect_stderr(log):
        weights = run_training(load_config(path))
    assert weights is not None
    return weights


def run(world: World, method: str, seed: int, base_look: Mapping[str, float] | None) -> Tables:
    """Train and look; return what was logged, and what the judge sees in pictures, as JSON has it.

    Args:
        world: with the base.
        method: of `changes`.
        seed: of the pictures, the adapter and the noise.
        base_look: what the judge sees in the base's pictures; None: no pictures are drawn.
    """
    write_data(world, seed)
    last = train(world, configuration(world, method, seed))
    folder = last.parent.parent
    found: Tables = {"method": method, "seed": seed, **logged(folder)}
    if base_look is not None:
        judge = trained_judge(world.folder / "judge.safetensors")
        end = found["evaluations"][-1]["step"]
        saved = {
            step: last.with_name(f"{folder.name}-s{step:06}.safetensors") for step in range(LOOK_EVERY, end, LOOK_EVERY)
        }
        looks = {step: look(judge, world.files, path) for step, path in (saved | {end: last}).items()}
        found["pictures"] = {0: base_look} | looks
        if "strengths" in found:
            tried = [strength for strength in STRENGTHS if strength != 1]
            found["pictures_at_strength"] = {0: base_look} | {
                each: look(judge, world.files, last, each) for each in tried
            } | {1.0: looks[end]}  # fmt: skip
    return found


def step_seconds(world: World, method: str, turn: int) -> float:
    """Return the seconds of a step of a method, the median of 40 without evaluations."""
    write_data(world, seed=0)
    tables = configuration(world, method, 0)
    tables |= {"eval_datasets": [], "strengths_after_training": [], "save_every_n_steps": 1000, "max_steps": 40}
    last = train(world, tables | {"run_name": f"timed_{turn}_{tables['run_name']}"})
    lines = (last.parent.parent / "metrics.jsonl").read_text().splitlines()
    return float(np.median(np.diff([json.loads(line)["seconds"] for line in lines])))


def logged(folder: Path) -> Tables:
    """Return the evaluations of a run, and the base's loss on each picture."""
    steps: dict[int, Tables] = {}
    for line in (folder / "evaluations.jsonl").read_text().splitlines():
        values = json.loads(line)
        steps.setdefault(values["step"], {}).update(values)
    base = json.loads((folder / "base_evaluations.json").read_text())
    losses = {name: np.mean(base[name]["losses"], axis=1).tolist() for name in base}
    strengths = folder / "strengths.json"
    tried = {"strengths": json.loads(strengths.read_text())["strengths"]} if strengths.is_file() else {}
    return tried | {"evaluations": list(steps.values()), "base_losses": losses}
