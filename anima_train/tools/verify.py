"""The kind of a file, and which of its keys ComfyUI and diffusers would use, by its header."""

from dataclasses import replace
from pathlib import Path

from anima_train.adapters.parts import is_adapter
from anima_train.model.file_kinds import (
    COMPILED,
    RENAMED_TRANSFORMER,
    RENAMED_VAE,
    SLOTS,
    bundle_part,
    identify,
    key_prefix,
    uncompiled,
)
from anima_train.model.safetensors_io import TensorFile, open_header
from anima_train.tools.diff import open_transformer
from anima_train.tools.verdict import Reading, Verdict
from anima_train.tools.verify_adapter import adapter_verdict
from anima_train.tools.verify_checkpoint import NEEDS_FOLDER, checkpoint_verdict, renamed_verdict

# Files that ComfyUI loads beside the transformer: it takes them whole, and their keys are not looked at one by one.
OTHER_PARTS = ("text_encoder", "t5", "vae")
WHOLE = ("transformer", "cosmos")


def verify(path: Path, base: Path | None = None) -> Verdict:
    """Return what a file is, and what programs would use of it.

    Only headers are read, and the numbers called alpha.

    Args:
        path: any safetensors file.
        base: a transformer, with which names and shapes are compared.

    Raises:
        ModelFileError: a file cannot be read, or the base is no transformer.
    """
    header = open_header(path)
    found = verdict_of(uncompiled(header), None if base is None else open_transformer(base))
    if not any(map(COMPILED.search, header.entries)):
        return found
    reason = "their names have `_orig_mod`, of torch.compile"
    if is_adapter(header) or identify(bundle_part(uncompiled(header), "transformer")) in WHOLE:
        reason += "; `anima convert --to comfyui` writes them without"
    compiled = Reading.of((name, reason if COMPILED.search(name) else None) for name in header.entries)
    programs = {name: reading if reading.refusal else compiled for name, reading in found.programs.items()}
    return replace(found, programs=programs)


def verdict_of(file: TensorFile, base: TensorFile | None) -> Verdict:
    """Return what the file with this header is; a base's header is without prefix."""
    if is_adapter(file):
        return adapter_verdict(file, base)
    kind = identify(bundle_part(file, "transformer"))
    if kind in WHOLE:
        return checkpoint_verdict(file, kind, base)
    if kind == RENAMED_TRANSFORMER or is_text_conditioner(file, kind):
        return renamed_verdict(file, kind)
    apart = Reading(refusal="it takes a model as a folder, as NVIDIA has it" if kind == "t5" else NEEDS_FOLDER)
    whole = Reading(len(file.entries))
    comfy = diffusers = Reading(refusal="it is no file for Anima, or has names that are not known")
    if kind in OTHER_PARTS:
        comfy, diffusers = whole, whole if (file.path.parent / "config.json").is_file() else apart
    elif kind == RENAMED_VAE:
        diffusers = whole
    facts = {"tensors": f"{len(file.entries):,}"}
    notes = ["its keys are not looked at one by one"] if diffusers is not comfy else []
    readings = {"ComfyUI": comfy, "diffusers": diffusers}
    return Verdict(file.path.name, SLOTS.get(kind, kind), facts, readings, notes=notes)


def is_text_conditioner(file: TensorFile, kind: str) -> bool:
    """Return True for an LLM adapter without a prefix to its keys, as diffusers has it."""
    return kind == "llm_adapter" and key_prefix(file, kind) == ""
