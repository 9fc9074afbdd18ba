"""`anima remap`: a LoRA of one variant on the blocks that another one has of it."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anima_train.cli.main import COMMANDS, application
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.tools.convert_adapter import convert_adapter
from anima_train.tools.merge import Source, merge_adapters
from anima_train.tools.remap import DEPTHS, INSERTED, Variant, block_map, remap
from anima_train.tools.spectra import Limit


def lora(path, blocks, stem="diffusion_model.blocks.{}.mlp.layer1", more=()):
    """A LoRA of these blocks, whose tensors tell the block that they are of."""
    tensors = {}
    for number in blocks:
        tensors[f"{stem.format(number)}.lora_A.weight"] = torch.full((2, 8), float(number))
        tensors[f"{stem.format(number)}.lora_B.weight"] = torch.full((16, 2), float(number))
    for name in more:
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = torch.ones(2, 8), torch.ones(8, 2)
    save_file(tensors, path, {"ss_output_name": "mine", "sshs_model_hash": "old"})
    return path


def blocks_of(path):
    """The block that each block's tensors came from, by its number now."""
    found = {}
    for name, tensor in load_file(path).items():
        prefix, _, rest = name.partition("diffusion_model.blocks.")
        if not prefix:
            found.setdefault(int(rest.partition(".")[0]), set()).add(float(tensor.flatten()[0]))
    return {number: values for number, values in found.items() if number >= 0}


def grown(depth):
    """The block of the 28 that each block of a deeper variant is; None for added ones: by inserting, one by one."""
    blocks = list(range(28))
    for number in DEPTHS[1:]:
        if number <= depth:
            for place in INSERTED[number]:
                blocks.insert(place, None)
    return blocks


@pytest.mark.parametrize("depth", [40, 52])
def test_the_map_is_that_of_blocks_inserted_one_by_one(depth):
    expected = {old: new for new, old in enumerate(grown(depth)) if old is not None}
    assert len(grown(depth)) == depth
    assert block_map(28, Variant.of(str(depth))) == expected
    assert block_map(depth, Variant.of("28")) == {new: old for old, new in expected.items()}
    both = block_map(40, Variant.of("52"))
    assert {old: both[new] for old, new in block_map(28, Variant.of("40")).items()} == block_map(28, Variant.of("52"))


def test_there_and_back_is_the_same_and_the_llm_adapter_stays_where_it_is(tmp_path):
    more = ["diffusion_model.llm_adapter.blocks.3.mlp.0"]
    first = lora(tmp_path / "a.safetensors", range(28), more=more)
    found = remap(first, tmp_path / "b.safetensors", Variant.of("40"))
    assert (found.depths, found.num_changed, found.left_out) == ((28, 40), 29, {})
    assert blocks_of(tmp_path / "b.safetensors") == {
        new: {float(old)} for old, new in block_map(28, Variant.of("40")).items()
    }
    remap(tmp_path / "b.safetensors", tmp_path / "c.safetensors", Variant.of("28"))
    before, after = load_file(first), load_file(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_changes_of_added_blocks_are_left_out_and_told(tmp_path):
    found = remap(lora(tmp_path / "a.safetensors", range(40)), tmp_path / "b.safetensors", Variant.of("28"))
    assert found.num_changed == 28
    assert list(found.left_out) == [f"blocks.{number}.mlp.layer1.weight" for number in INSERTED[40]]
    assert found.left_out["blocks.5.mlp.layer1.weight"] == pytest.approx(5 * (2 * 8 + 16 * 2) ** 0.5)


def test_keys_of_kohya_are_moved_too_and_a_few_blocks_need_from(tmp_path):
    stem = "lora_unet_blocks_{}_mlp_layer1"
    path = lora(tmp_path / "a.safetensors", [1, 2, 31], stem)
    remap(path, tmp_path / "b.safetensors", Variant.of("28"))
    assert blocks_of(tmp_path / "b.safetensors") == {1: {1.0}, 21: {31.0}}
    path = lora(tmp_path / "c.safetensors", [3, 4], stem)
    remap(path, tmp_path / "d.safetensors", Variant.of("28"), source=40)
    assert blocks_of(tmp_path / "d.safetensors") == {2: {3.0}, 3: {4.0}}


def test_a_base_tells_where_its_blocks_were_added(tmp_path):
    model = MiniTrainDIT(TransformerShape(6, 48, 24, 16, 20, 8))
    tensors = {f"net.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    base = tmp_path / "base.safetensors"
    save_file(tensors, base, {"insertion_positions": "[1, 4]"})
    variant = Variant.of(str(base))
    assert block_map(4, variant) == {0: 0, 1: 2, 2: 3, 3: 5}
    remap(lora(tmp_path / "a.safetensors", range(4)), tmp_path / "b.safetensors", variant, source=4)
    assert blocks_of(tmp_path / "b.safetensors") == {0: {0.0}, 2: {1.0}, 3: {2.0}, 5: {3.0}}
    save_file(tensors, base, {"insertion_positions": "[9]"})
    with pytest.raises(ModelFileError, match="insertion_positions in its metadata is no list of blocks of 6"):
        Variant.of(str(base))
    save_file(tensors, base)
    with pytest.raises(ConfigError, match="has 6 blocks and no insertion_positions"):
        Variant.of(str(base))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "28"], "both have 28 blocks, and there is nothing to change; if the LoRA is of more, say"),
        (["--to", "33"], "33: no variant of so many blocks is known (28, 40, 52); give its file instead"),
        (["--to", "40", "--from", "20"], "changes block 27, and is not of a model of 20 blocks"),
        (["--to", "40", "--from", "30"], "no way from 30 blocks to 40 is known"),
        (["--to", "none.safetensors"], "none.safetensors"),
    ],
)
def test_what_has_no_way_is_told(tmp_path, arguments, message):
    path = lora(tmp_path / "a.safetensors", range(28))
    result = CliRunner().invoke(
        application(COMMANDS, ""), ["remap", str(path), *arguments, "--out", str(tmp_path / "b.safetensors")]
    )
    assert message in str(result.exception)
    assert not (tmp_path / "b.safetensors").exists()


def test_the_command_tells_what_it_did_and_writes_its_origin(tmp_path):
    path, out = lora(tmp_path / "a.safetensors", range(40)), tmp_path / "b.safetensors"
    result = CliRunner().invoke(application(COMMANDS, ""), ["remap", str(path), "--to", "28", "--out", str(out)])
    assert result.exit_code == 0
    assert f"{out}: 28 weights changed, in 28 blocks instead of 40" in result.output
    assert "12 changes left out, of blocks that are not there, such as blocks.2.mlp.layer1.weight" in result.output
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in load_file(out).values())
    header = out.read_bytes()[8:].partition(b'"__metadata__":')[2]
    metadata = json.JSONDecoder().raw_decode(header.decode(errors="replace"))[0]
    assert json.loads(metadata["anima_train.origin"]) == {"remap": "a.safetensors", "from": 40, "to": 28}
    assert metadata["ss_output_name"] == "mine"
    assert metadata["sshs_model_hash"] == hashlib.sha256(out.read_bytes()[-num_bytes:]).hexdigest()


def test_the_depth_that_a_lora_tells_stays_in_its_metadata_whatever_blocks_it_changes(tmp_path):
    def architecture(path):
        with safe_open(path, "pt") as file:
            return file.metadata()["modelspec.architecture"]

    deep, kohya, small, back = (tmp_path / f"{name}.safetensors" for name in ("deep", "kohya", "small", "back"))
    remap(lora(tmp_path / "a.safetensors", range(3)), deep, Variant.of("52"))
    assert architecture(deep) == "anima-3.8b/lora"
    convert_adapter(deep, kohya, "kohya")
    merge_adapters([Source(kohya)], small, Limit(1), None)
    assert architecture(kohya) == architecture(small) == "anima-3.8b/lora"
    assert remap(small, back, Variant.of("28")).depths == (52, 28)
    assert architecture(back) == "anima-2b/lora"
