"""What `anima verify` says of every kind of file that is saved here, and of others' formats made by hand."""

import json
import math
import struct
import sys

import pytest
import torch
from diffusers.loaders.lora_pipeline import AnimaLoraLoaderMixin
from safetensors.torch import load_file, save_file

from anima_train.adapters.parts import read_adapter
from anima_train.cli.main import main
from anima_train.core.errors import ModelFileError
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.model.tiny import tiny_paths, write_tiny_cosmos
from anima_train.tools.convert import to_diffusers
from anima_train.tools.verdict import lines
from anima_train.tools.verify import verify

Q, OUT, IN = "blocks.1.self_attn.q_proj", 64, 64  # of the tiny model
OURS = f"diffusion_model.{Q}"
KOHYA = "lora_unet_blocks_1_self_attn_q_proj"


def pair(stem, down="lora_A", up="lora_B", rank=4):
    return {f"{stem}.{down}.weight": torch.ones(rank, IN), f"{stem}.{up}.weight": torch.ones(OUT, rank)}


LOKR = {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(16, 2), "lokr_w2_b": torch.ones(2, 16)}
LOHA = {
    f"hada_{side}_{half}": torch.ones((OUT, 4) if half == "a" else (4, IN)) for side in ("w1", "w2") for half in "ab"
}
ALPHA = torch.tensor(2.0)


def under(stem, parts):
    return {f"{stem}.{name}": tensor for name, tensor in parts.items()}


# name -> tensors, words of the kind, whether ComfyUI and diffusers use all
FORMATS = {
    "kohya": (pair(KOHYA, "lora_down", "lora_up") | {f"{KOHYA}.alpha": ALPHA}, "LoRA of Anima", True, False),
    "diffusers": (pair("transformer.transformer_blocks.1.attn1.to_q"), "LoRA of Anima", False, True),
    "peft": (pair(f"base_model.model.{Q}"), "LoRA of Anima", False, False),
    "comfy with alpha": (pair(OURS) | {f"{OURS}.alpha": ALPHA}, "LoRA of Anima", True, False),
    "lokr": (under(OURS, LOKR | {"alpha": ALPHA}), "LoKr of Anima", True, False),
    "loha": (under(KOHYA, LOHA | {"alpha": ALPHA}), "LoHa of Anima", True, False),
    "dora": (pair(OURS) | {f"{OURS}.dora_scale": torch.ones(OUT, 1)}, "DoRA of Anima", True, False),
    "peft dora": (pair(OURS) | {f"{OURS}.lora_magnitude_vector": torch.ones(OUT)}, "DoRA in PEFT's keys", False, True),
    "diff": (under(OURS, {"diff": torch.ones(OUT, IN)}), "whole differences of weights of Anima", True, False),
    "set_weight": (
        {"diffusion_model.t_embedding_norm.set_weight": torch.ones(OUT)}, "whole weights of Anima", True, False,
    ),
    "text encoder of kohya": (
        pair("lora_te_layers_3_mlp_up_proj", "lora_down", "lora_up"), "of Anima's text encoder", True, False,
    ),
    "text encoder of comfy": (
        pair("text_encoders.qwen3_06b.transformer.model.layers.3.mlp.up_proj"), "of Anima's text encoder", True, False,
    ),
    "lllite": ({"lllite_unet_blocks_1_self_attn_q_proj.down.0.weight": torch.ones(4, 4)}, "an LLLite", True, False),
    "sdxl": (pair("lora_unet_input_blocks_4_1_proj_in", "lora_down", "lora_up"), "LoRA of SDXL or SD 1", False, False),
    "oft": (under(OURS, {"oft_blocks": torch.ones(4, 16, 16)}), "OFT of Anima", True, False),
    "glora": (
        under(OURS, {f"{name}.weight": torch.full((4, 4), float(len(name))) for name in ("a1", "a2", "b1", "b2")}),
        "GLoRA of Anima", True, False,
    ),
    "lycoris": (
        under("lycoris_blocks_1_self_attn_q_proj", LOKR) | pair("lycoris_transformer_blocks_0_attn2_to_k"),
        "LoKr and LoRA of Anima", False, False,
    ),
    "onetrainer": (
        pair("lora_transformer_transformer_blocks_1_attn1_to_q", "lora_down", "lora_up"), "LoRA of Anima", False, False,
    ),
    "names of a checkpoint": (pair(f"model.{OURS}") | pair("net.blocks.0.mlp.layer1"), "LoRA of Anima", False, False),
    "compiled": (pair("diffusion_model.blocks.1._orig_mod.self_attn.q_proj"), "LoRA of Anima", False, False),
    "middle factor": (
        under(OURS, {**LOKR, "lokr_t2": torch.ones(2, 2, 1, 1)}), "LoKr with a middle factor of Anima", True, False,
    ),
    "text encoder of peft": (pair("text_encoder.model.layers.3.mlp.up_proj"), "LoRA of a text encoder", False, False),
    "bias that is not there": (under(OURS, {"diff_b": torch.ones(OUT)}), "differences of weights", False, False),
    "the same twice": (pair(OURS) | pair(KOHYA, "lora_down", "lora_up"), "LoRA of Anima", False, False),
    "halves without weight": (
        {f"{OURS}.lora_down": torch.ones(4, IN), f"{OURS}.lora_up": torch.ones(OUT, 4)}, "LoRA of Anima", False, False,
    ),
    "scale of one side": (pair(OURS) | {f"{OURS}.dora_scale": torch.ones(OUT)}, "DoRA of Anima", False, False),
    "half": ({f"{OURS}.lora_A.weight": torch.ones(4, IN)}, "parts of an adapter of Anima", False, False),
}  # fmt: skip
NOT_WHOLE = ("half", "halves without weight", "scale of one side", "compiled")  # diffusers looks at prefixes alone


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_others_are_known_and_what_each_program_uses(name, tmp_path, tiny):
    tensors, kind, in_comfy, in_diffusers = FORMATS[name]
    path = tmp_path / "file.safetensors"
    save_file(tensors, path)
    for base in (None, tiny_paths(tiny).transformer):
        found = verify(path, base)
        assert kind in found.kind
        assert found.is_good_for("ComfyUI") == in_comfy
        assert found.is_good_for("diffusers") == in_diffusers
    reading = found.programs["ComfyUI"]
    assert reading.num_used + sum(map(len, reading.ignored.values())) == len(tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_diffusers_rules_are_those_of_diffusers(name, tmp_path):
    tensors, *_ = FORMATS[name]
    path = tmp_path / "file.safetensors"
    save_file(tensors, path)
    reading = verify(path).programs["diffusers"]
    kept = AnimaLoraLoaderMixin.lora_state_dict(dict(tensors))
    assert (reading.refusal is not None) == (not all("lora" in key for key in kept))
    if reading.refusal is None and name not in NOT_WHOLE:
        assert reading.num_used == sum(key.startswith(("transformer.", "text_conditioner.")) for key in kept)


def test_a_lora_that_is_saved_here_is_used_by_both_and_described(plain_run, tiny):
    path = plain_run.path / "weights" / "plain.safetensors"
    found = verify(path, tiny_paths(tiny).transformer)
    assert found.kind == "LoRA of Anima"
    assert all(found.is_good_for(program) for program in ("ComfyUI", "diffusers"))
    assert found.facts["rank"] == "4"
    assert found.facts["modules"].startswith("32 (self_attn 8, cross_attn 8, mlp 4, mod 12")
    assert found.facts["trained on"] == "anima-tiny.safetensors, anima, anima/lora"
    assert found.facts["trained with"].startswith("anima-train")


def test_the_weights_of_a_training_state_are_no_file_to_load(tmp_path):
    path = tmp_path / "trained.safetensors"
    save_file({f"{Q}.lora_A": torch.ones(4, IN), f"{Q}.lora_B": torch.ones(OUT, 4)}, path, {"anima_train.scale": "0.5"})
    found = verify(path)
    assert found.kind == "LoRA of a training state"
    assert found.facts["alpha"] == "in the metadata of the state"
    assert not found.is_good_for("ComfyUI")
    assert any("for resuming" in note for note in found.notes)
    with pytest.raises(ModelFileError, match="belongs to a training state"):
        read_adapter(path)


def write_hollow(path, shapes, dtype, num_bytes, metadata=None):
    """Write a file whose tensors are a hole, which takes no room on the disk."""
    header, end = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return path


def test_a_whole_model_is_used_by_comfyui_and_its_folder_by_diffusers(tiny, tmp_path):
    files = tiny_paths(tiny)
    found = verify(files.transformer)
    assert found.kind == "an Anima transformer"
    assert found.is_good_for("ComfyUI")
    assert not found.is_good_for("diffusers")
    assert "anima convert" in found.programs["diffusers"].refusal
    assert found.facts["variant"] == "none of those known (2 blocks, width 64)"
    assert any("makes 10 blocks of this width, and the file has 2" in note for note in found.notes)
    for path in (files.vae, files.llm):
        assert verify(path).is_good_for("ComfyUI")
    to_diffusers(files, tmp_path / "folder")
    parts = sorted((tmp_path / "folder").rglob("*.safetensors"))
    assert len(parts) == 4
    for path in parts:
        assert verify(path).is_good_for("diffusers"), path
    assert not verify(tmp_path / "folder" / "transformer" / parts[0].name).is_good_for("ComfyUI")


def changed(tiny, path, change):
    tensors = load_file(tiny_paths(tiny).transformer)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("net.blocks.1.mlp.layer1.weight"), "1 tensor missing: blocks.1.mlp.layer1.weight"),
        (lambda tensors: tensors.update({"net.some.weight": ALPHA}), "ComfyUI ignores 1 key: the model has no such"),
        (lambda tensors: tensors.update({"other": ALPHA}), "they lack the prefix net."),
        (lambda tensors: tensors.pop("net.blocks.0.self_attn.q_norm.weight"), "q_norm.weight is missing"),
        (
            lambda tensors: tensors.update({"net.final_layer.linear.weight": torch.ones(3, 3)}),
            "the model's have another shape",
        ),
    ],
)
def test_what_a_checkpoint_lacks_or_has_besides_is_told(tiny, tmp_path, change, words):
    found = verify(changed(tiny, tmp_path / "model.safetensors", change))
    assert not found.is_good_for("ComfyUI")
    assert words in "\n".join(lines(found))


def test_prefixes_bundles_quantised_files_and_those_without_an_adapter_are_told_apart(tiny, tmp_path):
    bare = {name.removeprefix("net."): tensor for name, tensor in load_file(tiny_paths(tiny).transformer).items()}

    def look(tensors, metadata=None):
        save_file(tensors, tmp_path / "model.safetensors", metadata)
        return verify(tmp_path / "model.safetensors")

    assert look(bare).is_good_for("ComfyUI")
    other = look({f"diffusion_model.{name}": tensor for name, tensor in bare.items()})
    assert not other.is_good_for("ComfyUI")
    bundle = {f"model.diffusion_model.{name}": tensor for name, tensor in bare.items()} | {"vae.conv1.weight": ALPHA}
    found = look(bundle)
    assert found.kind == "a bundle with an Anima transformer"
    assert found.is_good_for("ComfyUI")
    cosmos = look({name: tensor for name, tensor in bare.items() if not name.startswith("llm_adapter.")})
    assert cosmos.is_good_for("ComfyUI")
    assert any("it counts as Cosmos-Predict2, as it has no LLM adapter" in note for note in cosmos.notes)
    assert "convert_cosmos_to_diffusers" in cosmos.programs["diffusers"].refusal
    name = "blocks.0.mlp.layer1.weight"
    scaled = bare | {name: bare[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    scaled["blocks.0.pos_embedder.seq"] = ALPHA
    found = look(scaled)
    assert found.is_good_for("ComfyUI")
    assert any("quantised" in note for note in found.notes)
    scaled["blocks.0.mlp.layer1.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    scaled[name] = torch.zeros(bare[name].shape[0], bare[name].shape[1] // 2, dtype=torch.uint8)
    scaled[f"{name}_scale_2"] = torch.ones(1)
    found = look(scaled)
    assert found.is_good_for("ComfyUI")
    assert any("anima-train does not read it" in note and "nvfp4" in note for note in found.notes)
    del scaled["blocks.0.mlp.layer1.comfy_quant"]
    assert "the model's have another shape" in look(scaled).programs["ComfyUI"].ignored
    assert look(scaled, {"_quantization_metadata": "{}"}).is_good_for("ComfyUI")


@pytest.mark.parametrize(
    ("width", "num_blocks", "told", "variant"),
    [
        (2048, 28, "Cosmos-Predict2 2B (28 blocks, width 2048)", "Anima 2B"),
        (5120, 36, "Cosmos-Predict2 14B (36 blocks, width 5120)", "none of those known"),
        (2048, 40, "none of those known (40 blocks, width 2048)", "Anima 2.9B"),
    ],
)
def test_sizes_are_those_of_cosmos_predict2_or_as_metadata_tell_of_anima(width, num_blocks, told, variant, tmp_path):
    shape = TransformerShape(
        width=width, in_channels=16, head_dim=128, context_width=1024, adaln_lora_dim=256, num_blocks=num_blocks
    )
    with torch.device("meta"):
        model = MiniTrainDIT(shape)
    shapes = {f"net.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    path = write_hollow(tmp_path / "a.safetensors", shapes, "BF16", 2)
    found = verify(path)
    assert found.facts["variant"] == told
    assert "Cosmos-Predict2" in found.kind
    assert "convert_cosmos_to_diffusers" in found.programs["diffusers"].refusal
    found = verify(write_hollow(path, shapes, "BF16", 2, {"modelspec.architecture": "anima-2b"}))
    assert found.kind == "an Anima transformer that lacks its LLM adapter"
    assert found.facts["variant"].startswith(variant)
    assert "`anima convert CONFIG OUT --to diffusers`" in found.programs["diffusers"].refusal


def test_convert_is_advised_where_it_reads_the_file(tiny, tmp_path):
    path, files = tmp_path / "a.safetensors", tiny_paths(tiny)
    stem = "lycoris_blocks_1_self_attn_q_proj"
    for tensors, is_read in (
        (under("_orig_mod", load_file(files.transformer)), True),
        (under("_orig_mod", load_file(files.vae)), False),
        (under(stem, LOKR), True),
        (under(stem, {"oft_blocks": torch.ones(4, 16, 16)}), False),
    ):
        save_file(tensors, path)
        assert ["anima convert" in reason for reason in verify(path).programs["ComfyUI"].ignored] == [is_read]


def test_a_weight_that_is_changed_twice_may_be_used_by_no_program(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(pair(f"net.{Q}") | pair("lycoris_blocks_1_self_attn_q_proj"), path)
    found = verify(path)
    assert found.problems == [f"1 weight changed twice, such as {Q}.weight: a program takes one of the two, or none"]
    assert [reading.num_used for reading in found.programs.values()] == [0, 0]


def test_a_lora_of_another_family_than_its_base_is_warned_of(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    for made, is_warned in (("cosmos-predict2-2b/lora", True), ("anima-2b/lora", False)):
        save_file(pair(OURS), path, {"modelspec.architecture": made})
        notes = verify(path, tiny_paths(tiny).transformer).notes
        assert any("made for Cosmos-Predict2, as its metadata tell, and not for Anima" in n for n in notes) == is_warned


def test_a_lora_for_more_blocks_is_told_and_does_not_fit_a_smaller_base(tmp_path, tiny):
    path = tmp_path / "big.safetensors"
    save_file(pair("diffusion_model.blocks.39.self_attn.q_proj"), path)
    found = verify(path)
    assert found.is_good_for("ComfyUI")
    assert "Anima 2.9B has 40" in found.facts["blocks"]
    assert any("more than 28 blocks" in note for note in found.notes)
    assert not verify(path, tiny_paths(tiny).transformer).is_good_for("ComfyUI")
    save_file(pair(OURS) | {f"{OURS}.lora_B.weight": torch.ones(OUT + 1, 4)}, path)
    found = verify(path, tiny_paths(tiny).transformer)
    assert "the change has the shape (65, 64), and anima-tiny.safetensors (64, 64)" in found.problems[0]
    with pytest.raises(ModelFileError, match="looks like a LoRA"):
        verify(path, path)


def test_a_lora_of_another_variant_than_its_base_is_warned_of(tmp_path, tiny):
    bare = {name.removeprefix("net."): tensor for name, tensor in load_file(tiny_paths(tiny).transformer).items()}
    block = {name: tensor for name, tensor in bare.items() if name.startswith("blocks.1.")}
    for number in range(2, 40):
        bare |= {name.replace("blocks.1.", f"blocks.{number}.", 1): tensor.clone() for name, tensor in block.items()}
    save_file(bare, tmp_path / "long.safetensors")
    for number, is_warned in ((28, True), (40, False), (27, False)):
        path = tmp_path / f"{number}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for index in range(number):
            tensors |= pair(f"diffusion_model.blocks.{index}.self_attn.q_proj")
        save_file(tensors, path)
        found = verify(path, tmp_path / "long.safetensors")
        assert found.is_good_for("ComfyUI")
        assert any("was not trained on" in note for note in found.notes) == is_warned


def test_a_huge_file_takes_no_time_because_its_tensors_are_not_read(tmp_path):
    shapes = {f"{OURS}.lora_A.weight": (1, 100_000_000_000), f"{OURS}.lora_B.weight": (1, 1)}
    path = write_hollow(tmp_path / "huge.safetensors", shapes, "U8", 1)
    assert verify(path).kind == "LoRA of Anima"


def test_the_command_ends_with_1_and_a_list_where_a_key_would_be_ignored(tmp_path, monkeypatch, capsys):
    path = tmp_path / "file.safetensors"
    save_file(pair(f"base_model.model.{Q}"), path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["anima", "verify", str(path), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().out

    code, text = run()
    assert code == 1
    assert "ComfyUI ignores 2 keys: their names are PEFT's" in text
    assert f"  base_model.model.{Q}.lora_A.weight" in text
    code, text = run("--json")
    assert code == 1
    found = json.loads(text)
    assert sum(map(len, found["programs"]["ComfyUI"]["ignored"].values())) == 2
    assert found["good_for"] == {"ComfyUI": False, "diffusers": False}
    save_file(pair("transformer.transformer_blocks.1.attn1.to_q"), path)
    assert run()[0] == 1
    assert run("--program", "diffusers")[0] == 0
    path.write_bytes(b"PK\3\4")
    assert run("--json")[0] == 4


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"lora_A.weight": torch.ones(4, IN), "lora_B.weight": torch.ones(16, 5)}, "parts that do not fit each other"),
        ({"lora_A.weight": torch.ones(0, IN), "lora_B.weight": torch.ones(16, 0)}, "parts that do not fit each other"),
        (
            {"lora_A.weight": torch.ones(4, IN), "lora_B.weight": torch.ones(16, 4), "alpha": torch.ones(2)},
            "parts that do not fit each other",
        ),
        (
            {"lora_A.weight": torch.ones(4, IN), "lora_B.weight": torch.ones(16, 4), "dora_scale": torch.ones(3, 1)},
            "parts that do not fit each other",
        ),
        (
            {"lora_A.weight": torch.ones(0, IN), "lora_B.weight": torch.ones(16, 0), "alpha": torch.tensor(1.0)},
            "parts that do not fit each other",
        ),
        (
            {"lora_A.weight": torch.ones(4, IN, dtype=torch.int8), "lora_B.weight": torch.ones(16, 4)},
            "without floating-point numbers",
        ),
    ],
)
def test_what_is_broken_in_itself_is_told_without_a_base_and_not_read(tmp_path, tensors, problem):
    path = tmp_path / "a.safetensors"
    save_file({f"{OURS}.{part}": tensor for part, tensor in tensors.items()}, path)
    found = verify(path, None)
    assert any(problem in each for each in found.problems)
    assert not found.is_good_for("ComfyUI")
    with pytest.raises(ModelFileError):
        read_adapter(path)


def test_a_block_of_a_huge_number_costs_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    key = "diffusion_model.blocks.99999999.mlp.layer1"
    save_file({f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}, path)
    assert read_adapter(path).changes.keys() == {"blocks.99999999.mlp.layer1.weight"}


def test_a_dora_of_peft_is_not_read_as_a_lora_without_its_lengths(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(pair(OURS) | {f"{OURS}.lora_magnitude_vector": torch.ones(OUT)}, path)
    with pytest.raises(ModelFileError, match="parts that make no change that is known"):
        read_adapter(path)


def test_files_of_cosmos_predict2_are_told_as_such(tmp_path):
    path = write_tiny_cosmos(tmp_path).llm
    found = verify(path)
    assert "T5-XXL" in found.kind
    assert found.is_good_for("ComfyUI")
    assert "as NVIDIA has it" in found.programs["diffusers"].refusal
    save_file(pair(OURS.replace(".1.", ".35.")), path, {"modelspec.architecture": "cosmos-predict2-14b/lora"})
    found = verify(path)
    assert (found.kind, found.facts["blocks"]) == ("LoRA of Cosmos-Predict2", "1, up to number 35")
    assert not any("Anima" in text for text in (*found.facts.values(), *found.notes))


@pytest.mark.parametrize(
    ("num_made", "num_base", "words"),
    [
        (28, 40, "as Anima 2B has, and base.safetensors 40: if it was made for the former, it loads without a word"),
        (
            40,
            28,
            "as Anima 2.9B has, and base.safetensors 28: if it was made for the former, it loses those for blocks",
        ),
        (40, 40, ""),
    ],
)
def test_an_adapter_for_another_depth_than_its_base_is_warned_of(tmp_path, num_made, num_base, words):
    with torch.device("meta"):
        model = MiniTrainDIT(TransformerShape(num_base, 48, 24, 16, 20, 8))
    save_file(
        {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}, tmp_path / "base.safetensors"
    )
    stems = [f"lora_unet_blocks_{number}_mlp_layer1" for number in range(num_made)]
    factors = {"lora_down": torch.ones(2, 48), "lora_up": torch.ones(192, 2)}
    tensors = {f"{stem}.{half}.weight": factor.clone() for stem in stems for half, factor in factors.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = verify(tmp_path / "lora.safetensors", tmp_path / "base.safetensors")
    warned = [note for note in found.notes if "it was made for the former" in note]
    assert [words in note and f"`anima remap --to {num_base}`" in note for note in warned] == [True] * bool(words)
    ignored = found.programs["ComfyUI"].ignored
    lost = 2 * max(0, num_made - num_base)
    assert {reason: len(keys) for reason, keys in ignored.items()} == (
        {"base.safetensors has no such module": lost} if lost else {}
    )
