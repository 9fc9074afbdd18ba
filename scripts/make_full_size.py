"""Write a random Anima model of full size: 28 blocks, 2048 wide, 2.09 B parameters, bf16, 4.2 GB.

    python scripts/make_full_size.py FOLDER

The text encoder and the VAE beside it are those of `anima tiny --comfy`: as wide as the adapter expects, few layers.
"""

import sys
from pathlib import Path

import torch

from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape
from anima_train.model.safetensors_io import write_tensors
from anima_train.model.tiny import write_tiny

TRANSFORMER = TransformerShape(
    num_blocks=28, width=2048, head_dim=128, in_channels=16, context_width=1024, adaln_lora_dim=256
)
ADAPTER = LLMAdapterShape(num_blocks=6, width=1024, head_dim=64, source_width=1024, target_width=1024, vocab_size=32128)


def write_full_size(folder: Path) -> Path:
    """Write the model; returns the transformer's path."""
    paths = write_tiny(folder, comfy=True)
    with torch.device("meta"):
        model = MiniTrainDIT(TRANSFORMER, LLMAdapter(ADAPTER))
    tensors = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:
            tensor = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
        else:
            generator = torch.Generator().manual_seed(number)
            tensor = torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[1] ** -0.5
        tensors[f"net.{name}"] = tensor.to(torch.bfloat16)
    write_tensors(paths.transformer, tensors, {"format": "pt"})
    return paths.transformer


if __name__ == "__main__":
    print(write_full_size(Path(sys.argv[1])))
