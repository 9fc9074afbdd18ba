"""The keys in saved files."""

import torch

from anima_train.adapters.names import BIAS, anima_modules, checkpoint_key, lora_key
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.llm_adapter import LLMAdapter, LLMAdapterShape


def test_keys_of_a_lora_begin_as_comfyui_and_diffusers_expect():
    assert lora_key("blocks.0.self_attn.q_proj", "lora_A") == "diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight"
    assert (
        lora_key("llm_adapter.blocks.0.cross_attn.q_proj", "lora_B")
        == "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj.lora_B.weight"
    )


def test_keys_of_a_checkpoint_begin_as_in_the_official_file():
    assert checkpoint_key("llm_adapter.embed.weight") == "net.llm_adapter.embed.weight"
    assert checkpoint_key("blocks.0.mlp.layer1.weight") == "net.blocks.0.mlp.layer1.weight"


def test_the_names_of_all_modules_are_those_of_the_transformer():
    shape = TransformerShape(num_blocks=3, width=64, head_dim=16, in_channels=16, context_width=64, adaln_lora_dim=16)
    adapter = LLMAdapterShape(num_blocks=2, width=32, head_dim=16, source_width=64, target_width=64, vocab_size=9)
    with torch.device("meta"):
        names = [
            *MiniTrainDIT(shape).state_dict(),
            *(f"llm_adapter.{name}" for name in LLMAdapter(adapter).state_dict()),
        ]
    assert {name.rpartition(".")[0] for name in names} == set(anima_modules(range(3), range(2)))
    assert [name for name in names if name.endswith(".bias")] == list(filter(BIAS.fullmatch, names))
