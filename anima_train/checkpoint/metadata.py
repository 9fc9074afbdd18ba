"""The metadata of saved weights: ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec), and kohya's `ss_...` keys.

Managers of LoRA files and model sites show both. No path, and nothing of captions that was not asked for, is in them.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from PIL import Image

from anima_train import __version__
from anima_train.adapters.choice import AnyAdapter
from anima_train.data.caption_parts import tags_of
from anima_train.data.samples import Sample
from anima_train.model.safetensors_io import PLACEHOLDER
from anima_train.model.variants import KOHYA_MODULE, architecture, is_of_cosmos

THUMBNAIL_SIDE = 256  # pixels
PREVIEW = re.compile(r"s(\d+)_00\.png")
NEEDED = ("modelspec.", "sshs_", "ss_network_", "ss_base_model_version")  # without how it was trained

Level = Literal["full", "minimal", "none"]


def at_level(metadata: Mapping[str, str], level: Level) -> dict[str, str]:
    """Return what of the metadata is written."""
    if level == "full":
        return dict(metadata)
    return {key: value for key, value in metadata.items() if level == "minimal" and key.startswith(NEEDED)}


def weights_metadata(
    title: str, step: int, epoch: int, adapter: AnyAdapter, num_blocks: int, settings: Mapping[str, str],
    base: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Return the metadata of weights.

    Args:
        title: of the run.
        step: how many steps they were trained.
        epoch: that the last one was in, 1 the first.
        adapter: what is trained.
        num_blocks: of the transformer.
        settings: `config.saved_settings.settings_metadata`.
        base: "name" and "sha256" of the file of the base model.
    """
    is_kohya = adapter.leaves_base and not is_of_cosmos(settings)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(num_blocks, adapter.leaves_base),
        "modelspec.implementation": "anima-train",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": "rectified_flow",
        "modelspec.hash_sha256": f"0x{PLACEHOLDER}",
        "sshs_model_hash": PLACEHOLDER,
        "anima_train.version": __version__,
        "ss_base_model_version": "anima",
        "ss_sd_model_name": base.get("name", ""),
        "ss_new_sd_model_hash": base.get("sha256", ""),
        "ss_output_name": title,
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_training_finished_at": str(datetime.now(UTC).timestamp()),
        **({"ss_network_module": KOHYA_MODULE} if is_kohya else {}),
        **settings,
        **adapter.metadata(),
    }


def data_metadata(samples: Sequence[Sample], counts_tags: bool) -> dict[str, str]:
    """Return the metadata that come from the data: numbers and sizes, trigger words and, if wanted, the tags.

    Args:
        samples: that are trained; what only keeps the base is not told.
        counts_tags: also tell how many images have each tag.
    """
    samples = [sample for sample in samples if not sample.is_preserved]
    pictures = {sample.picture.path: sample for sample in samples}  # each once, whatever its resolutions
    roles = Counter(sample.role for sample in pictures.values())
    side = max(sample.resolution for sample in samples)
    buckets = sorted(Counter(sample.size for sample in samples).items())
    metadata = {
        "modelspec.resolution": f"{side}x{side}",
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(roles["train"]),
        "ss_num_reg_images": str(roles["regularization"]),
        "ss_bucket_info": json.dumps({
            "buckets": {
                str(number): {"resolution": [size.width, size.height], "count": count}
                for number, (size, count) in enumerate(buckets)
            }
        }),
    }  # fmt: skip
    if words := [word for word in dict.fromkeys(sample.options.prefix_word for sample in samples) if word]:
        metadata["modelspec.trigger_phrase"] = ", ".join(words)
    if counts_tags:
        metadata["ss_tag_frequency"] = tag_frequency(list(pictures.values()))
    return metadata


def tag_frequency(pictures: Sequence[Sample]) -> str:
    """Return how many images have each tag, as kohya's scripts write it."""
    counts = Counter(
        tag
        for sample in pictures
        for tag in {
            tag for caption in sample.picture.tags for tag in tags_of(caption, sample.options.cache_shuffle_delimiter)
        }
    )
    return json.dumps({"train": dict(counts.most_common())}, ensure_ascii=False)


def thumbnail(folder: Path, step: int) -> dict[str, str]:
    """Return the first of the last previews until a step as a JPEG in a data URL; nothing if there is none."""
    found = {int(match[1]): path for path in folder.glob("*.png") if (match := PREVIEW.fullmatch(path.name))}
    if not (steps := [each for each in found if each <= step]):
        return {}
    with Image.open(found[max(steps)], formats=["PNG"]) as picture:
        small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=85)
    return {"modelspec.thumbnail": "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()}
