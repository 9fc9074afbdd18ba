"""The PNG files of pictures, which tell their settings: in the words of A1111, and in ours. No path is in them."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anima_train import __version__
from anima_train.core.files import atomic_path
from anima_train.sampling.generate import Request

# A1111's names of samplers and schedules; others are written as they are called here.
A1111_NAMES = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "er_sde": "ER SDE",
    "simple": "Simple",
    "normal": "Normal",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
}
HASH_DIGITS = 10  # of the SHA-256 by which Civitai finds a file
NUMBERED = re.compile(r"(\d+)_\d+\.png")


@dataclass(frozen=True)
class UsedLora:
    """A LoRA that a picture was made with."""

    name: str  # of the file, without folder and ending
    strength: float
    sha256: str


@dataclass(frozen=True)
class UsedWeights:
    """The weights that a picture was made with."""

    model: str  # name of the transformer's file, without folder and ending
    loras: Sequence[UsedLora] = ()


def parameters_text(request: Request, weights: UsedWeights) -> str:
    """Return the settings as A1111 writes them, which other tools and Civitai read."""
    loras = "".join(f" <lora:{lora.name}:{lora.strength:g}>" for lora in weights.loras)
    lines = [request.prompt + loras]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    facts = {
        "Steps": str(request.steps),
        "Sampler": A1111_NAMES.get(request.sampler.type, request.sampler.type),
        "Schedule type": A1111_NAMES.get(request.schedule.type, request.schedule.type),
        "CFG scale": f"{request.cfg:g}",
        "Shift": f"{request.shift:g}",
        "Seed": str(request.seed),
        "Size": f"{request.width}x{request.height}",
        "Model": weights.model,
    }
    if weights.loras:
        facts["Lora hashes"] = ", ".join(f"{lora.name}: {lora.sha256[:HASH_DIGITS]}" for lora in weights.loras)
    facts["Version"] = f"anima-train {__version__}"
    lines.append(", ".join(f"{key}: {in_quotes(value)}" for key, value in facts.items()))
    return "\n".join(lines)


def in_quotes(value: str) -> str:
    """Return a value, in quotes if it holds a character that divides values."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value


def settings_text(request: Request, weights: UsedWeights) -> str:
    """Return everything that a picture was made from, as JSON."""
    return json.dumps({**request.model_dump(), **asdict(weights), "version": __version__}, ensure_ascii=False)


def save_picture(folder: Path, image: Image.Image, request: Request, weights: UsedWeights) -> Path:
    """Write a picture into the folder under the next number, and return its path.

    Raises:
        SpaceError: the disk is full or read-only.
    """
    path = folder / f"{next_number(folder):05d}_{request.seed}.png"
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=png_info(request, weights))
    return path


def png_info(request: Request, weights: UsedWeights) -> PngInfo:
    """Return the text fields of a picture's PNG file."""
    info = PngInfo()
    info.add_text("parameters", parameters_text(request, weights))
    info.add_text("anima_train", settings_text(request, weights))
    return info


def next_number(folder: Path) -> int:
    """Return one more than the highest number of a picture in the folder."""
    numbers = (int(match[1]) for path in folder.glob("*.png") if (match := NUMBERED.fullmatch(path.name)))
    return max(numbers, default=0) + 1
