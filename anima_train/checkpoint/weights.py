"""The weights that users load elsewhere: a LoRA or a model, safetensors only."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from anima_train import __version__
from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.core.divided import is_divided
from anima_train.core.errors import ModelFileError, NumericError
from anima_train.core.files import atomic_path
from anima_train.core.format import count
from anima_train.data.caption_parts import tags_of
from anima_train.data.samples import Sample
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.loading import ModelFiles
from anima_train.model.safetensors_io import byte_view, file_bytes, match_keys, open_header, read_tensors, write_tensors
from anima_train.optim.optimizers import AnyOptimizer


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA or a checkpoint atomically, after reading back every key, shape and value of it.

    Tensors of which each process holds a part are gathered, checked, written and dropped one by one.

    Raises:
        NumericError: a weight is not finite; nothing is written.
        SpaceError: the disk is full; earlier files are intact.
        ModelFileError: the disk does not give back what was written; earlier files are intact.
    """
    at_hand = {name: tensor for name, tensor in tensors.items() if not is_divided(tensor)}
    check_finite(path, at_hand)
    digests: dict[str, bytes] = {}  # of those that are gathered once

    def look(name: str, tensor: Tensor) -> None:
        if name not in at_hand:
            check_finite(path, {name: tensor})
            digests[name] = digest(tensor)

    metadata = {"format": "pt", **metadata}
    with atomic_path(path, file_bytes(tensors, metadata)) as temporary:
        write_tensors(temporary, tensors, metadata, look)
        found = open_header(temporary)
        match_keys(found.entries, tensors, f"{path}: reads back with other keys than were written; check the disk")
        for name, tensor in read_tensors(found):
            gathered = name in digests
            if digests[name] != digest(tensor) if gathered else not torch.equal(tensor, tensors[name].detach().cpu()):
                raise ModelFileError(f"{path}: {name} reads back with other values than were written; check the disk")


def digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(byte_view(tensor)).digest()


def weights_to_save(
    adapter: Lora | Full, transformer: MiniTrainDIT, files: ModelFiles, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the LoRA or the whole model under the names of its file; of a transformer on the meta device, the shapes.

    Args:
        adapter: what is trained.
        transformer: with it.
        files: of the model; the frozen LLM adapter of a whole model, which is not in memory, comes from there.
        dtype: of the file; None: as trained.
    """
    tensors = adapter.tensors(transformer)
    if isinstance(adapter, Full) and not hasattr(transformer, "llm_adapter"):
        on_meta = any(tensor.is_meta for tensor in tensors.values())
        tensors |= adapter.outside(files.llm_adapter_tensors(on_meta))
    return tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()}


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericError if any tensor that is about to be saved holds NaN or infinity."""
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise NumericError(
            f"{path.name}: not saved, because {count(len(broken), 'tensor')} of {len(tensors):,} hold NaN or infinity, "
            f"such as {broken[0]}; earlier files are intact"
        )


def caption_metadata(samples: Sequence[Sample], counts_tags: bool) -> dict[str, str]:
    """Return the safetensors metadata that come from captions: the trigger words and, if wanted, the tags.

    Args:
        samples: that are trained; what only keeps the base is not told.
        counts_tags: also tell how many images have each tag, in the form in which kohya's scripts do.
    """
    samples = [sample for sample in samples if not sample.is_preserved]
    words = [word for word in dict.fromkeys(sample.options.prefix_word for sample in samples) if word]
    metadata = {"modelspec.trigger_phrase": ", ".join(words)} if words else {}
    if counts_tags:
        pictures = {sample.picture.path: sample for sample in samples}  # each once, whatever its resolutions
        counts = Counter(
            tag
            for sample in pictures.values()
            for tag in {
                tag
                for caption in sample.picture.tags
                for tag in tags_of(caption, sample.options.cache_shuffle_delimiter)
            }
        )
        metadata["ss_tag_frequency"] = json.dumps({"train": dict(counts.most_common())}, ensure_ascii=False)
    return metadata


def weights_metadata(
    title: str, step: int, epoch: int, num_samples: int, seed: int, adapter: Lora | Full, optimizer: AnyOptimizer,
    lr_schedule: str,
) -> dict[str, str]:  # fmt: skip
    """Return the safetensors metadata of the weights after `step` steps, in the `epoch`-th epoch."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "anima-train",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": "rectified_flow",
        "anima_train.version": __version__,
        "ss_base_model_version": "anima",
        "ss_output_name": title,
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_seed": str(seed),
        "ss_learning_rate": str(optimizer.lr),
        "ss_optimizer": optimizer.type,
        "ss_lr_scheduler": lr_schedule,
        "ss_num_train_images": str(num_samples),
        **adapter.metadata(),
    }
