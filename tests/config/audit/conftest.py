"""The observations that the audit makes of a configuration: what its run would see, compute, save and draw."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import tarfile
import threading
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from anima_train.adapters.lora import Lora
from anima_train.caching.batches import caption_batch_size, image_batch_size
from anima_train.caching.entries import model_text_identity, needed_entries, vae_identity
from anima_train.caching.fill import RankInfo, fill_cache
from anima_train.checkpoint.metadata import at_level, data_metadata, weights_metadata
from anima_train.checkpoint.resume import ResumePoint
from anima_train.checkpoint.weights import weights_to_save
from anima_train.config.ladder import rungs
from anima_train.config.launch import launch_settings
from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec
from anima_train.config.plan_notes import plan_notes
from anima_train.config.saved_settings import settings_metadata
from anima_train.core.determinism import deterministic_kernels
from anima_train.core.errors import UserError
from anima_train.data.loader import CachedData
from anima_train.distributed.environment import read_environment
from anima_train.distributed.signals import SignalHandler
from anima_train.evaluation.base_drawn import split_undrawn
from anima_train.evaluation.bounds import Bounds
from anima_train.evaluation.evaluate import EvalSet
from anima_train.evaluation.strengths import strengths_to_try
from anima_train.model.attention_choice import AttentionShape, choose_attention
from anima_train.model.compiled import CompiledBlocks
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.safetensors_io import open_header
from anima_train.model.tiny import tiny_paths, write_tiny_cosmos
from anima_train.objective.timesteps import TENTHS
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.run.accelerator import make_accelerator
from anima_train.run.folder import RunFolder
from anima_train.run.log import WarningsHandler
from anima_train.run.trackers import make_trackers
from anima_train.sampling.generate import generate, initial_noise
from anima_train.sampling.pipeline import texts_of
from anima_train.training.anomalies import UpdateGuard
from anima_train.training.build import all_intervals, block_runner, disk_plan, file_sizes, plan_run
from anima_train.training.context import RunContext
from anima_train.training.ladder import choose_here, num_blocks
from anima_train.training.memory import MemoryContext
from anima_train.training.metrics import StepLogger, StepSums
from anima_train.training.prefetch import prefetch_steps, rank_steps
from anima_train.training.prepare import Prepared, scan_all, with_online_text_encoder
from anima_train.training.setup import build_model, lora_to_begin_with
from anima_train.training.tasks import PeriodicTasks
from anima_train.training.train import train_step

CPU = torch.device("cpu")
REPEATS = 6


def digest(tensors):
    """A hash of tensors by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def draw(path, size, colour, alpha=None):
    """A picture of two colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB" if alpha is None else "RGBA", size, colour if alpha is None else (*colour, alpha))
    image.paste((250, 240, 10) if alpha is None else (250, 240, 10, 255), (4, 4, size[0] // 2, size[1] // 2))
    image.save(path)


def write_pictures(folder):
    """Pictures on which every key of a dataset has something to act."""
    captions = {
        "a": "1girl, long_hair, smile \\(happy\\), hat, red ||| mia",
        "b": "one, two, three, four\nfive, six, seven",
        "c": "cat, tree, house, sky", "c_nl": "A cat sits in a tree.", "d": "",
    }  # fmt: skip
    sizes = {"a": (96, 96), "b": (200, 100), "c": (128, 80), "d": (80, 128), "e": (70, 70), "small": (50, 50),
             "wide": (400, 90)}  # fmt: skip
    for number, (name, size) in enumerate(sizes.items()):
        draw(folder / f"{name}.png", size, (30 * number, 90, 200), 90 if name == "b" else None)
    for name, text in captions.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    draw(folder / "sub" / "f.png", (96, 90), (1, 2, 3))
    draw(folder / "3_sub" / "g.png", (96, 90), (3, 2, 1))
    inside = io.BytesIO()
    Image.new("RGB", (100, 100), (9, 99, 9)).save(inside, "PNG")
    with tarfile.open(folder / "some.tar", "w") as archive:
        member = tarfile.TarInfo("h.png")
        member.size = len(inside.getvalue())
        archive.addfile(member, io.BytesIO(inside.getvalue()))
    draw(folder.parent / "masks" / "a.png", (96, 96), (0, 0, 0))
    draw(folder.parent / "others" / "z.png", (96, 128), (7, 8, 9))
    (folder.parent / "others" / "z.txt").write_text("dog, grass, ball")
    (folder.parent / "captions").write_text('manner = ["ink", "oil"]')


def write_table(path, colour):
    """A parquet file of two rows, with captions and pictures in several columns."""

    def png(size, colour):
        content = io.BytesIO()
        Image.new("RGB", size, colour).save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    rows = [
        {"image": png((96, 96), (number, *colour)), "picture": png((128, 80), (number, 7, 7)), "text": f"a, b{number}",
         "tags": f"x, y{number}", "prose": f"A cat {number} sits here.", "mask": png((96, 96), (9 + number,) * 3)}
        for number in range(2)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_lora(path, transformer):
    """A LoRA on the blocks of this transformer file, without its LLM adapter."""
    model, lora = MiniTrainDIT(TransformerShape.of(open_header(transformer).stripped("net.").entries)), Lora(rank=4)
    lora.attach(model, LearningRates(dict.fromkeys(COMPONENTS, 1e-3)), seed=3)
    generator = torch.Generator().manual_seed(3)
    save_file({name: torch.randn(each.shape, generator=generator) * 0.1 for name, each in lora.tensors(model).items()},
              path)  # fmt: skip


class Audit:
    """Makes configurations in a folder, and observes them."""

    def __init__(self, folder, tiny, merge):
        self.folder, self.merge = folder, merge
        write_pictures(folder / "pictures")
        self.tiny = tiny
        for name, colour in (("table", (1, 2)), ("other", (3, 4))):
            write_table(folder / f"{name}.parquet", colour)
        files, copies = vars(tiny_paths(tiny)), folder / "copies"
        copies.mkdir()
        for name in ("transformer", "vae", "llm"):
            shutil.copy(files[name], copies / f"{name}.safetensors")
        for name in ("tokenizer", "t5_tokenizer"):
            shutil.copytree(files[name], copies / name)
        write_lora(folder / "lora.safetensors", files["transformer"])
        self.base = {
            "output_dir": str(folder / "runs"),
            "run_name": "run",
            "epochs": 2,
            "dataset": {
                "resolutions": [96], "num_ar_buckets": 3, "max_bad_fraction": 0.5,
                "directory": [{"path": str(folder / "pictures")}],
            },
            "model": {"type": "anima", "tiny_path": str(tiny), "dtype": "float32", "llm_adapter_lr": 0},
            "adapter": {"type": "lora", "rank": 4},
            "optimizer": {"type": "adamw", "lr": 1e-3},
            "monitoring": {"tensorboard": False},
        }  # fmt: skip
        self.known = {}

    def place(self, value):
        """A value with this folder, or the tiny model's files, for $FOLDER and $TINY."""
        if isinstance(value, dict):
            return {key: self.place(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.place(each) for each in value]
        if not isinstance(value, str):
            return value
        files = vars(tiny_paths(self.tiny))
        if value.startswith("$COSMOS"):
            files |= {f"cosmos_{name}": path for name, path in self.cosmos.items()}
        return re.sub(r"\$(\w+)", lambda m: str(files.get(m[1].lower(), self.folder / m[1].lower())), value)

    @cached_property
    def cosmos(self):
        """The files of a tiny Cosmos-Predict2, of which there are copies of other names."""
        files, copies = vars(write_tiny_cosmos(self.folder / "cosmos")), self.folder / "cosmos_copies"
        copies.mkdir()
        for name, path in files.items():
            if path is not None:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, copies / name)
        return files

    def __call__(self, *changes, steps=0, work=False, memory=False, trackers=False, machine=False):
        """The observations of a configuration: of its data and settings, and of its first steps or its memory."""
        key = repr((changes, steps, work, memory, trackers, machine))
        if key not in self.known:
            data = self.base
            for each in changes:
                data = self.merge(data, self.place(each))
            path = self.folder / "config.toml"
            path.write_text(tomli_w.dumps(data))
            try:
                self.known[key] = dict(self.observe(path, steps, work, memory, trackers, machine))
            except UserError as error:
                self.known[key] = {"refused": str(error)}
        return self.known[key]

    def observe(self, path, steps, work, memory, trackers, machine):
        """Yield (name, value) for each observation."""
        loaded = load_config(path)
        config, spec = loaded.config, build_model_spec(loaded.config, CPU)
        known, _ = split_undrawn(loaded.datasets)  # what is to be drawn from captions is not there
        known = [dataset for dataset in known if dataset.role != "preservation"]
        scans = scan_all(known, config.seed, write=False)
        yield (
            "drawn",
            [
                (path.name, path.parent.name, caption, request.model_dump())
                for each in loaded.datasets
                if each.drawn is not None
                for path, caption, request in each.drawn.pictures()
            ],
        )
        train = scans["train"]
        plan, schedule = plan_run(config, train.samples, 1)
        evals = {name: found.samples for name, found in scans.items() if name != "train"}
        texts = model_text_identity(spec)
        vae_id = vae_identity(spec.files)
        needed = needed_entries(
            train.samples, [sample for found in evals.values() for sample in found], vae_id, texts, config.seed,
            config.uncond_fraction > 0, config.model.cache_text_embeddings, loaded.preservation,
        )  # fmt: skip
        yield "preserved", loaded.preservation
        yield "notes", (*loaded.notes, *plan_notes(config, spec, plan, schedule, evals))
        yield from of_settings(config, loaded, spec, plan, schedule)
        yield from of_data(config, train, evals, needed, plan)
        if config.sampling is not None:
            yield "pictures", [picture(request) for request in config.sampling.prompts]
        if trackers:
            with patch.dict(os.environ):  # what W&B is told through it does not reach the next observation
                made = make_trackers(config.monitoring, Path("runs") / loaded.run_name, config.offline)
                yield "trackers", [(each.name, each.run_name, str(each.init_kwargs)) for each in made]
                yield "wandb key", os.environ.get("WANDB_API_KEY")
        if machine:
            yield from of_machine(config, loaded, spec, plan, schedule)
        if memory:
            choice = choose_here(rungs(config, num_blocks(spec)), spec, plan, schedule)
            yield "memory", (choice.rungs[-1].settings.keys(), str(choice.budget.is_cap))
        if steps:
            fill_cache(needed, spec, RankInfo(0, 1, 0, 1), config.caching_batch_size, lambda: None)
            data = CachedData(
                train.samples, vae_id, texts, config.seed, config.model.cache_text_embeddings,
                preservation=loaded.preservation,
            )  # fmt: skip
            prepared = with_online_text_encoder(
                Prepared(spec, data, [], [], []), config.model.cache_text_embeddings, config.seed
            )
            yield from self.of_steps(loaded, spec, prepared.train, plan, schedule, 1 + steps, work)

    def of_steps(self, loaded, spec, data, plan, schedule, num_steps, work):
        """Yield the observations of the first steps, made by the code of a run."""
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        config = loaded.config
        run = RunContext(
            loaded, make_accelerator(config.model.uses_autocast), RunFolder(self.folder / "runs", "run"),
            ResumePoint("run"), SignalHandler(self.folder), WarningsHandler(), contextlib.ExitStack(),
            MemoryContext("the audit"), divides=False,
        )  # fmt: skip
        state = build_model(run, spec, schedule.num_steps, lora_to_begin_with(run, spec))
        threads, t_of = set(), config.timesteps().at

        def at(quantile, num_tokens):
            threads.add(threading.current_thread() is threading.main_thread())
            return t_of(quantile, num_tokens)

        sums, guard = StepSums(CPU, has_roles=False), UpdateGuard(CPU, 0)
        steps = rank_steps(plan, schedule, 0, 0, 1)
        made = []
        counter = FlopCounterMode(display=False)
        with (
            counter if work else contextlib.nullcontext(),
            prefetch_steps(steps, data, at, config.uncond_fraction, config.num_workers) as prefetched,
        ):
            for _, (step, batches) in zip(range(num_steps), prefetched, strict=False):
                result = train_step(run, state, step, batches, sums, guard)
                made.append((result.result(), result.rates))
        first = made[0][0]
        yield "loss", round(first.losses.loss, 5)
        yield "gradient", float(f"{first.grad_norm:.4g}")
        yield "rates in use", [rates for _, rates in made]
        yield "weights", digest(dict(state.transformer.named_parameters()))
        with state.averaged():
            dtype = None if config.save_dtype is None else getattr(torch, config.save_dtype)
            saved = weights_to_save(config.adapter, state.transformer, spec.files, dtype)
            yield "saved", digest(saved)
        if work:
            yield "work", counter.get_total_flops()
        yield "threads", threads
        states = [value for each in state.optimizer.state.values() for value in each.values()]
        kinds = {str(value.dtype) for value in states if isinstance(value, torch.Tensor)}
        yield "state", (type(state.optimizer).__name__, kinds, state.release is not None)
        yield "host", 0 if state.transformer.block_swap is None else len(state.transformer.block_swap.hosts)


def of_settings(config, loaded, spec, plan, schedule):
    """Yield the observations that need no image."""
    yield "place", str(RunFolder(Path(config.output_dir), loaded.run_name).path)
    yield "length", schedule.num_steps
    yield "rates", rates_of(config, schedule.num_steps)
    yield "objective", objective(config)
    yield "t", [config.timesteps().at(quantile, tokens) for quantile in TENTHS for tokens in (36, 4096)]
    yield "files", [str(path) for path in vars(spec.files).values() if isinstance(path, Path)]
    yield "precision", (spec.dtype, spec.weights_dtype, spec.quantization, config.model.uses_autocast)
    yield "encoder", spec.text_quantization
    yield "due", due_steps(config, plan, schedule)
    context = SimpleNamespace(config=config, resume_point=ResumePoint("run"))
    yield "first", PeriodicTasks.before_first_step(SimpleNamespace(context=context))
    sizes = (
        image_batch_size(config.caching_batch_size, CPU, 8, 4),
        caption_batch_size(config.caching_batch_size, CPU, 1),
    )
    yield "at once", [size.number(9000) for size in sizes]
    yield "offline", loaded.train.offline
    yield "axis", StepLogger.x(SimpleNamespace(run=SimpleNamespace(config=config)), 5, 50)
    metadata = weights_metadata("t", 1, 1, config.adapter, 28, settings_metadata(config), {})
    times = ("modelspec.date", "ss_training_finished_at")
    told = at_level({key: value for key, value in metadata.items() if key not in times}, config.metadata.level)
    yield "metadata", told | {"thumbnail": config.metadata.thumbnail}


def of_machine(config, loaded, spec, plan, schedule):
    """Yield the observations of kernels, processes and disk, which take long."""
    yield "attention", choose_attention(config.attention, CPU, spec.dtype, AttentionShape.of(spec.files, 1, 36)).kernel
    with deterministic_kernels(config.deterministic):
        yield "deterministic", torch.are_deterministic_algorithms_enabled()
    yield "compiles", isinstance(block_runner("nothing", config.compile, CPU), CompiledBlocks)
    yield "divides", read_environment({}, launch_settings(config, 2)).shards
    folder = Path(config.output_dir) / loaded.run_name
    yield "disk", disk_plan(config, folder, file_sizes(config, spec), plan, schedule).num_states


def rates_of(config, num_steps):
    """The learning rate of each component in each step."""
    from anima_train.optim.lr_schedules import lr_factor

    def factor(step):
        constant = config.force_constant_lr is not None
        return 1.0 if constant else lr_factor(config.lr_scheduler, step, num_steps, config.warmup_steps)

    base = config.learning_rates().by_component
    return [{name: rate * factor(step) for name, rate in base.items()} for step in range(min(num_steps, 12))]


def objective(config):
    """The loss of fixed predictions at two sizes, with and without masks."""
    found = []
    for side in (8, 128):
        generator = torch.Generator().manual_seed(side)
        prediction, target = (torch.randn(1, 16, 1, side, side, generator=generator) for _ in range(2))
        mask = (torch.arange(side) < side // 4).float().expand(1, 1, 1, side, side)
        found += [round(float(config.loss()(prediction, target, each)), 6) for each in (None, mask)]
    return found


def due_steps(config, plan, schedule):
    """The steps after which each task is due; with minutes, as they are written."""
    found = {}
    for name, interval in all_intervals(config).items():
        seen, steps = 0, []
        minutes, interval.minutes = interval.minutes, None
        for step in range(schedule.num_steps):
            epoch, place = schedule.locate(step)
            now = seen + plan.epoch(epoch)[place].num_samples
            if interval.after(step + 1, epoch, schedule.epochs_done(step), seen, now):
                steps.append(step + 1)
            seen = now
        found[name] = (steps, minutes)
    return found


def of_data(config, train, evals, needed, plan):
    """Yield the observations of images and captions."""
    samples = train.samples
    yield "images", (sorted({sample.picture.path.name for sample in samples}), len(train.skipped), len(train.bad))
    yield "samples", [(sample.id, str(sample.size), sample.resolution) for sample in samples]
    yield "captions", [[sample.caption(config.seed, repeat).text for repeat in range(REPEATS)] for sample in samples]
    yield "views", [[sample.view(config.seed, repeat).crop for repeat in range(2)] for sample in samples]
    yield "masks", [(sample.has_mask, sample.views()[0].mask_key()) for sample in samples if sample.has_mask]
    yield "roles", [sample.role for sample in samples]
    yield "cache", sorted({str(cache.folder) for cache in needed.caches()})
    yield "latents", sorted(entry.key for entry in needed.latents)
    yield "texts", sorted(entry.key for entry in needed.texts)
    order = [[[samples[ref.sample].id for ref in batch.refs] for step in plan.epoch(epoch)
              for batch in step.micro_batches] for epoch in range(3)]  # fmt: skip
    yield "order", order
    yield "steps", [len(plan.epoch(epoch)) for epoch in range(3)]
    yield "tags told", data_metadata(samples, config.metadata.tag_frequencies).get("ss_tag_frequency")
    yield "kinds", sorted({sample.options.kind for sample in samples})
    yield "bounds", decided(config)
    yield "strengths", strengths_to_try(config.strengths_after_training)
    yield (
        "measured",
        [measured(config, entry, evals[entry.name]) for entry in config.eval_datasets if entry.name in evals],
    )


def measured(config, entry, samples):
    """What an evaluation measures: images and captions, in batches, at noise levels, for a purpose."""
    data = CachedData(samples, "", None, 0)
    found = EvalSet(
        entry.name, data, config.eval_batch_sizes(), entry.role, entry.points(), config.measures_drift(entry)
    )
    levels = [found.points.t(level, config.timesteps(), 36) for level in range(len(found.points.names))]
    captions = [(sample.id, sample.options.kind, sample.evaluation_caption().text) for sample in samples]
    return entry.name, captions, found.batches(), entry.role, levels, len(found.points), found.measures_drift


def decided(config):
    """What a run keeps, and why it ends, after evaluations whose loss rises again while the drift grows."""
    headline = [f"{each.name}/drift_relative" for each in config.eval_datasets if each.role == "retention"]
    bounds = Bounds(config.keep_best, config.early_stopping, config.forgetting_budget, config.at_budget == "stop",
                    tuple(headline))  # fmt: skip
    history = [
        (step, {"known/loss": abs(step - 3.2), "known/difference_from_base": -step, "known/drift_relative": step / 10})
        for step in range(9)
    ]
    return [(bounds.best(history[:number]), bounds.ending(history[:number])) for number in range(1, 10)]


def picture(request):
    """The latents of a picture, drawn from a small transformer and a context that is made of the prompt's text."""
    torch.manual_seed(0)
    shape = TransformerShape(num_blocks=1, width=64, head_dim=16, in_channels=16, context_width=64, adaln_lora_dim=16)
    with torch.no_grad():
        transformer = MiniTrainDIT(shape).eval()
        for parameter in transformer.parameters():
            parameter.normal_(std=0.1)

    def context(text):
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(number))

    negative = context(request.negative_prompt) if request.is_guided else None
    assert request.prompt in texts_of([request])
    drawn = generate(transformer, request, context(request.prompt), negative, CPU, torch.float32)
    assert drawn.shape == initial_noise(request.seed, request.width, request.height).shape
    return digest({"latents": drawn})


@pytest.fixture(scope="module")
def audit(tmp_path_factory, tiny, merged):
    """Observes configurations that are the base with some changes."""
    return Audit(tmp_path_factory.mktemp("audit"), tiny, merged)
