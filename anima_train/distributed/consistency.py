"""The checks that several processes start from the same configuration, data and plan."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from anima_train import __version__
from anima_train.config.loaded import LoadedConfig
from anima_train.core.errors import ConfigError, DataError
from anima_train.core.format import count
from anima_train.data.loader import CachedData
from anima_train.data.plan import Plan
from anima_train.data.scan import Scan
from anima_train.distributed.collectives import patient_barrier
from anima_train.run.manifest import LIBRARIES, dataset_digest

MAX_SHOWN = 100  # characters of a value in a message


def check_same_config(loaded: LoadedConfig, accelerator: Accelerator, shards: bool = False) -> LoadedConfig:
    """Return the configuration with process 0's name of the run, and a note where processes run different programs.

    Args:
        loaded: the configuration.
        accelerator: of the run.
        shards: True if this process's configuration or environment asks for a divided model.

    Raises:
        ConfigError: the processes have read different configurations.
    """
    patient_barrier(accelerator)  # the first one makes its process group, and all processes are here now
    values = loaded.config.model_dump(exclude={"monitoring": {"wandb_api_key"}})
    problems = differences(accelerator, {**dict(flat(values)), "sharding as it was launched": str(shards)})
    if problems:
        raise ConfigError([*problems, "all processes must get the same configuration: copy the files to all machines"])
    versions = {"anima-train": __version__, **{name: version(name) for name in LIBRARIES}}
    notes = [f"{line}; install the same version everywhere" for line in differences(accelerator, versions)]
    (name,) = broadcast_object_list([loaded.run_name])  # it may come from the clock
    return replace(loaded, run_name=name, notes=(*loaded.notes, *notes))


def check_same_data(scans: Mapping[str, Scan], accelerator: Accelerator) -> None:
    """Check that all processes have found the same images and captions.

    Raises:
        DataError: they have not.
    """
    if accelerator.num_processes == 1:
        return
    facts = {
        f"dataset {name}": f"{count(len(found.samples), 'sample')} (sha256 {dataset_digest(found.samples)[:16]})"
        for name, found in scans.items()
    }
    if problems := differences(accelerator, facts):
        remedy = "all processes must see the same images and captions: a folder was changed while the run started, or "
        raise DataError([*problems, f"{remedy}it is not the same on all machines; start again when it is"])


def check_same_plan(data: CachedData, plan: Plan, num_steps: int, accelerator: Accelerator) -> None:
    """Check that all processes are about to make the same steps from the same latents and text.

    Raises:
        DataError: they are not.
    """
    if accelerator.num_processes == 1:
        return
    buckets = Counter(f"{sample.size}@{sample.resolution}" for sample in plan.samples)
    facts = {
        "samples": f"{len(plan.samples):,} (sha256 {dataset_digest(plan.samples)[:16]})",
        "buckets": ", ".join(f"{bucket}: {number:,}" for bucket, number in sorted(buckets.items())),
        "batch sizes": str(plan.batch_sizes),
        "seed": str(plan.seed),
        "micro-batches per step": str(plan.micro_batches_per_step),
        "steps": f"{num_steps:,}",
        "VAE": f"sha256 {data.vae_identity[:16]}",
        "text encoder": str(data.text_identity),
    }
    if problems := differences(accelerator, facts):
        remedy = "all processes must train on the same: make the cache and the model's files the same on all machines"
        raise DataError([*problems, remedy])


def differences(accelerator: Accelerator, facts: Mapping[str, str]) -> list[str]:
    """Return in which of these facts which processes differ from process 0: the same on every process."""
    first, *others = gather_object([dict(facts)])
    return [
        f"process {rank} differs from process 0 in {name}: {shown(theirs.get(name))} there, {shown(first.get(name))} "
        "here"
        for rank, theirs in enumerate(others, start=1)
        for name in dict.fromkeys((*first, *theirs))
        if theirs.get(name) != first.get(name)
    ]


def shown(value: str | None) -> str:
    """Return a value as messages show it."""
    if value is None:
        return "nothing"
    return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."


def flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key path in nested tables and lists with its value, as text."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{key}[{index}]")
    else:
        yield key, repr(value)
