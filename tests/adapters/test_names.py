"""The keys in saved files."""

from anima_train.adapters.names import checkpoint_key, lora_key


def test_keys_of_a_lora_begin_as_comfyui_and_diffusers_expect():
    assert lora_key("blocks.0.self_attn.q_proj", "lora_A") == "diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight"
    assert (
        lora_key("llm_adapter.blocks.0.cross_attn.q_proj", "lora_B")
        == "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj.lora_B.weight"
    )


def test_keys_of_a_checkpoint_begin_as_in_the_official_file():
    assert checkpoint_key("llm_adapter.embed.weight") == "net.llm_adapter.embed.weight"
    assert checkpoint_key("blocks.0.mlp.layer1.weight") == "net.blocks.0.mlp.layer1.weight"
