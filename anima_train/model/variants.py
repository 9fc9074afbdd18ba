"""The variants of Anima, told apart by the names and sizes of their files, and what to know before training on them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ARCHITECTURE = "modelspec.architecture"  # the key of metadata
KOHYA_MODULE = "networks.lora_anima"  # of kohya's scripts, for Anima alone: ss_network_module
COSMOS = "cosmos-predict2"
COSMOS_LICENSE = "NVIDIA Open Model License"
COSMOS_SIZES = {2048: "2B", 5120: "14B"}  # by the width
ANIMA = "Anima"
FAMILIES = {"anima": ANIMA, COSMOS: "Cosmos-Predict2"}  # by the begin of an architecture
LICENSE = "CircleStone Labs Non-Commercial License v1.2; NVIDIA Open Model License"  # of the base
# By the number of blocks; those after the first are by others: the base's blocks with copies between them.
VARIANTS = {28: "Anima 2B", 40: "Anima 2.9B", 52: "Anima 3.8B"}
BASE_BLOCKS = min(VARIANTS)
DISTILLED = re.compile(r"(?<![a-z])turbo(?![a-z])", re.IGNORECASE)
TUNED = re.compile(r"(?<![a-z])aesthetic(?![a-z])", re.IGNORECASE)
EARLY = re.compile(r"(?<![a-z])preview\d*(?![a-z])", re.IGNORECASE)
# Of Turbo the model's card says cfg 1 and 8 to 12 steps; of the base and of Aesthetic 4 to 5 and 30 to 50, as
# `PictureSettings` has it. For the 2.9B, the 3.8B, Previews and fine-tunes nothing else was found.
TURBO_PICTURES = {"cfg": 1.0, "steps": 10}


def architecture(num_blocks: int, is_adapter: bool = False) -> str:
    """Return the name of an architecture for ModelSpec: "anima-2.9b", of an adapter for it "anima-2.9b/lora".

    kohya's scripts write "anima-preview" for all; managers of files look for "anima" in it.
    """
    name = VARIANTS.get(num_blocks, "Anima").lower().replace(" ", "-")
    return f"{name}/lora" if is_adapter else name


def cosmos_architecture(width: int, is_adapter: bool = False) -> str:
    """Return the name of an architecture of Cosmos-Predict2 as `architecture` does: "cosmos-predict2-2b/lora"."""
    size = f"-{COSMOS_SIZES[width].lower()}" if width in COSMOS_SIZES else ""
    return COSMOS + size + ("/lora" if is_adapter else "")


def told_family(metadata: Mapping[str, str]) -> str | None:
    """Return the family of models that a file is of, or for, as its metadata tell it; None if they do not."""
    made = metadata.get(ARCHITECTURE, "")
    return next((family for begin, family in FAMILIES.items() if made.startswith(begin)), None)


def is_of_cosmos(metadata: Mapping[str, str]) -> bool:
    """Return True if the metadata of a file tell that it is of, or for, Cosmos-Predict2."""
    return told_family(metadata) == FAMILIES[COSMOS]


def family_warning(name: str, metadata: Mapping[str, str], family: str) -> str | None:
    """Return what to know of an adapter by its metadata, on a model of this family; None if they do not differ."""
    told = told_family(metadata)
    if told in (None, family):
        return None
    return f"{name} was made for {told}, as its metadata tell, and not for {family}: it fits in shape alone"


def picture_defaults(transformer: str | Path | None) -> dict[str, Any]:
    """Return the keys of pictures that the variant with this path draws with, and not as the base does.

    Told by the name of the file alone; None stands for the official base.
    """
    return dict(TURBO_PICTURES) if transformer is not None and DISTILLED.search(Path(transformer).name) else {}


def drawn_with(transformer: Path) -> str:
    """Return `picture_defaults` in words; empty for those of the base."""
    return " and ".join(f"{key} {value:g}" for key, value in picture_defaults(transformer).items())


def variant_warnings(transformer: Path, num_blocks: int) -> Iterator[str]:
    """Yield what to know of the transformer that a run begins with, by its file's name and its number of blocks."""
    name = transformer.name
    if DISTILLED.search(name):
        yield (
            f"{name} looks like Turbo, which was distilled to draw in few steps: training on the plain objective "
            "unlearns that; train on the base, and use the LoRA with Turbo. Pictures of it have "
            f"{drawn_with(transformer)}, where nothing else is set"
        )
    elif TUNED.search(name):
        yield (
            f"{name} looks like Aesthetic, which was tuned to one taste: what is trained on it carries that along, and "
            "fits the base less; train on the base, and use the LoRA with Aesthetic"
        )
    elif EARLY.search(name):
        yield f"{name} looks like a preview of Anima: a LoRA of it may not fit the final weights; train on the base"
    if num_blocks <= BASE_BLOCKS:
        return
    known = VARIANTS.get(num_blocks, "a variant").replace("Anima", "the")
    yield f"{name} has {num_blocks} blocks ({known}): a LoRA of it does not fit Anima's {BASE_BLOCKS}, nor theirs this"
    if num_blocks == 52:
        yield f"{name}: its second text encoder is not used here; the context is that of Qwen3 and the LLM adapter"
