"""The run's manifest: what someone needs to reproduce it."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from anima_train import __version__
from anima_train.core.files import sha256_file
from anima_train.data.loader import CachedData
from anima_train.data.plan import EpochSchedule, Plan, times_seen
from anima_train.data.samples import Sample
from anima_train.model.hub import origin_of
from anima_train.model.loading import ModelFiles
from anima_train.optim.groups import GroupRow

LIBRARIES = ("torch", "accelerate", "transformers", "diffusers", "safetensors", "pillow", "numpy")


def dataset_digest(samples: Iterable[Sample]) -> str:
    """Return a hash of every image, size and caption."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.id, sample.picture.sha256, str(sample.size), sample.captions(0))).encode())
        if sample.has_mask:
            digest.update(repr(sample.picture.mask_sha256).encode())
    return digest.hexdigest()


def manifest(
    run_name: str, files: ModelFiles, data: CachedData, groups: Iterable[GroupRow], seed: int, num_steps: int,
    num_processes: int, accumulation_steps: int, attention: str,
) -> dict[str, Any]:  # fmt: skip
    """Return what someone needs to reproduce the run, or to know what a file came from."""
    slots = {"transformer": files.transformer, "vae": files.vae, "text_encoder": files.llm}
    if files.llm_adapter is not None:
        slots["llm_adapter"] = files.llm_adapter
    rows = list(groups)
    return {
        "run": run_name,
        "finished": False,
        "anima_train": __version__,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "attention": attention,
        "model_files": {
            slot: {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for slot, path in slots.items()
            if path.is_file()
        },
        "model_sources": {
            slot: origin.reference for slot, path in slots.items() if (origin := origin_of(path)) is not None
        },
        "dataset_sha256": dataset_digest(data.samples),
        "tokenizers": {name: getattr(data.text_identity, name) for name in ("tokenizer", "t5_tokenizer")},
        "seed": seed,
        "num_steps": num_steps,
        "num_processes": num_processes,
        "micro_batches_per_step": accumulation_steps * num_processes,
        "groups": [
            {"component": row.component, "lr": row.lr, "modules": row.num_modules, "parameters": row.num_parameters}
            for row in rows
        ],
        "trained": [row.component for row in rows if row.num_parameters],
        "llm_adapter_trained": any(row.component == "llm_adapter" and row.num_parameters for row in rows),
    }


def seen_facts(plan: Plan, timetable: EpochSchedule, num_steps: int) -> dict[str, dict[str, int]]:
    """Return how often each sample was seen in the first steps, and how many of each bucket (size@resolution)."""
    times = times_seen(plan, timetable, num_steps)
    buckets: Counter[str] = Counter()
    for sample, number in zip(plan.samples, times, strict=True):
        buckets[f"{sample.size}@{sample.resolution}"] += number
    samples = {sample.id: number for sample, number in zip(plan.samples, times, strict=True)}
    return {"samples": samples, "buckets": dict(sorted(buckets.items()))}
