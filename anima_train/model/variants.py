"""The variants of Anima, told apart by the names and sizes of their files, and what to know before training on them."""

import re
from collections.abc import Iterator
from pathlib import Path

LICENSE = "CircleStone Labs Non-Commercial License v1.2; NVIDIA Open Model License"  # of the base
# By the number of blocks; those after the first are by others: the base's blocks with copies between them.
VARIANTS = {28: "Anima 2B", 40: "Anima 2.9B", 52: "Anima 3.8B"}
BASE_BLOCKS = min(VARIANTS)
DISTILLED = re.compile(r"(?<![a-z])turbo(?![a-z])", re.IGNORECASE)
TUNED = re.compile(r"(?<![a-z])aesthetic(?![a-z])", re.IGNORECASE)
EARLY = re.compile(r"(?<![a-z])preview\d*(?![a-z])", re.IGNORECASE)


def variant_warnings(transformer: Path, num_blocks: int) -> Iterator[str]:
    """Yield what to know of the transformer that a run begins with, by its file's name and its number of blocks."""
    name = transformer.name
    if DISTILLED.search(name):
        yield (
            f"{name} looks like Turbo, which was distilled to draw in few steps: training on the plain objective "
            "unlearns that; train on the base, use the LoRA with Turbo, and draw previews of Turbo with few steps and "
            "cfg = 1"
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
