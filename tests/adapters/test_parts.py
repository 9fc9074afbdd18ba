"""Adapter files of any kind: read with the parts of each change, or refused in a sentence."""

import pytest
import torch
from safetensors.torch import save_file

from anima_train.adapters.parts import adapter_keys, read_adapter
from anima_train.core.errors import ModelFileError

STEM = "diffusion_model.blocks.0.mlp.layer1"


def write(path, tensors):
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("key", "module", "part", "form"),
    [
        ("diffusion_model.blocks.3.mlp.layer1.lora_A.weight", "blocks.3.mlp.layer1", "down", "ComfyUI"),
        ("lora_unet_blocks_3_self_attn_q_proj.lora_up.weight", "blocks.3.self_attn.q_proj", "up", "kohya"),
        ("lora_unet_llm_adapter_blocks_1_mlp_0.alpha", "llm_adapter.blocks.1.mlp.0", "alpha", "kohya"),
        ("transformer.transformer_blocks.2.attn2.to_q.lora_B.weight", "blocks.2.cross_attn.q_proj", "up", "diffusers"),
        ("text_conditioner.blocks.1.mlp.2.lora_A.weight", "llm_adapter.blocks.1.mlp.2", "down", "diffusers"),
        ("base_model.model.blocks.0.mlp.layer2.lora_A.default.weight", "blocks.0.mlp.layer2", "down", "PEFT"),
        ("diffusion_model.final_layer.linear.hada_w1_a", "final_layer.linear", "hada_w1_a", "ComfyUI"),
        ("net.blocks.1.mlp.layer2.lora_A.weight", "blocks.1.mlp.layer2", "down", "bare"),
        ("lycoris_transformer_blocks_4_ff_net_2.lokr_w1", "blocks.4.mlp.layer2", "lokr_w1", "LyCORIS"),
        ("lycoris_llm_adapter_blocks_1_mlp_0.alpha", "llm_adapter.blocks.1.mlp.0", "alpha", "LyCORIS"),
        ("lora_transformer_transformer_blocks_12_attn1_to_q.lora_up.weight", "blocks.12.self_attn.q_proj", "up",
         "OneTrainer"),
        ("blocks.1.mlp.layer2.lokr_w2_b", "blocks.1.mlp.layer2", "lokr_w2_b", "bare"),
        ("lora_te_layers_0_mlp_up_proj.lora_up.weight", None, "up", None),
        ("diffusion_model.blocks.0.mlp.layer3.lora_A.weight", None, "down", None),
        ("something.else", None, "", None),
    ],
)  # fmt: skip
def test_a_key_is_of_a_module_in_anybodys_names(key, module, part, form):
    ((found),) = adapter_keys([key])
    assert (found.module, found.part, found.form) == (module, part, form)


def test_changes_of_biases_and_norms_are_differences_of_their_own(tmp_path):
    file = {
        "diffusion_model.llm_adapter.blocks.0.mlp.0.diff_b": torch.ones(4),
        "diffusion_model.llm_adapter.blocks.0.mlp.0.lora_A.weight": torch.ones(2, 3),
        "diffusion_model.llm_adapter.blocks.0.mlp.0.lora_B.weight": torch.ones(4, 2),
        "diffusion_model.t_embedding_norm.w_norm": torch.ones(5),
    }
    found = read_adapter(write(tmp_path / "a.safetensors", file)).changes
    assert {name: set(parts) for name, parts in found.items()} == {
        "llm_adapter.blocks.0.mlp.0.bias": {"diff"},
        "llm_adapter.blocks.0.mlp.0.weight": {"down", "up"},
        "t_embedding_norm.weight": {"diff"},
    }


HADA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (3, 6)}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_A.weight": (2, 6), "lora_B.weight": (8, 3)}, "do not fit each other"),
        (HADA, "do not fit each other"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 3)}, "do not fit each other"),
        ({"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "alpha": (2,)}, "do not fit each other"),
        ({"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "dora_scale": (8,)}, r"has \(out, 1\) or \(1, in\)$"),
        ({"lora_A.weight": (2, 6)}, "make no change that is known"),
        ({"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "lora_mid.weight": (2, 2, 1, 1)}, "make no change that is"),
        ({"oft_blocks": (2, 2, 2)}, "make no change that is known"),
        ({"lora_A.weight": (2, 6), "lora_B.weight": (8, 2), "lora_down.weight": (2, 6)}, "repeats another key"),
    ],
)
def test_a_file_of_which_nothing_can_be_made_is_refused(tmp_path, shapes, words):
    path = write(tmp_path / "a.safetensors", {f"{STEM}.{part}": torch.ones(shape) for part, shape in shapes.items()})
    with pytest.raises(ModelFileError, match=words):
        read_adapter(path)


def test_what_is_no_adapter_or_of_another_model_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", {"some.weight": torch.ones(2)})
    with pytest.raises(ModelFileError, match="expected a LoRA or another adapter"):
        read_adapter(path)
    path = write(path, {"lora_te_layers_0_mlp_up_proj.alpha": torch.ones(1)})
    with pytest.raises(ModelFileError, match=r"changes only the text encoder \(1 key such as lora_te_layers_0"):
        read_adapter(path)
    path = write(path, {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.ones(1)})
    with pytest.raises(ModelFileError, match="is a LoRA of Flux or HunyuanVideo, not of Anima"):
        read_adapter(path)
    path = write(path, {"diffusion_model.blocks.0.other.alpha": torch.ones(1)})
    with pytest.raises(ModelFileError, match="1 key for nothing in the transformer"):
        read_adapter(path)
    path = write(path, {f"{STEM}.diff": torch.ones(2, 2)})
    with pytest.raises(ModelFileError, match="for nothing in the transformer"):
        read_adapter(path, ["blocks.0.mlp.layer2.weight"])
