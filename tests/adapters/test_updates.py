"""What each kind of adapter makes of a weight, against the weights that ComfyUI's own code makes."""

import pytest
import torch

from anima_train.adapters.updates import change, kind_of, low_rank_factors, updated

NAMES = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
CASES = {
    "lora": "LoRA", "lora_alpha": "LoRA", "lokr_full": "LoKr", "lokr_w2_low": "LoKr", "lokr_both_low": "LoKr",
    "loha": "LoHa", "dora_in": "DoRA", "dora_out": "DoRA", "diff": "difference",
}  # fmt: skip


@pytest.fixture
def case(golden):
    """The weight, the parts, and what becomes of it at strengths 1 and 0.5, of a golden case."""
    tensors = golden("adapters.safetensors")

    def find(name):
        prefix = f"{name}.file."
        parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        parts = {NAMES.get(key, key): tensor for key, tensor in parts.items()}
        return parts, *(tensors[f"{name}.{part}"] for part in ("weight", "merged", "merged_half"))

    return find


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_comfyui(case, name):
    parts, weight, merged, half = case(name)
    assert kind_of(parts) == CASES[name]
    torch.testing.assert_close(updated(weight, parts), merged, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(updated(weight, parts, 0.5), half, rtol=1e-5, atol=1e-6)
    assert (merged - weight).abs().max() > 0.01


def test_every_golden_case_is_tried(golden):
    assert {key.partition(".")[0] for key in golden("adapters.safetensors")} == set(CASES)


def test_set_weight_replaces_whatever_the_strength():
    weight, value = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(updated(weight, {"set_weight": value}, 0.3), value)


@pytest.mark.parametrize(
    "names", [("up",), ("alpha",), ("lokr_w1", "lokr_w2_a"), ("hada_w1_a",), ("diff", "down"), ("oft_blocks",)]
)
def test_a_part_alone_makes_no_change(names):
    assert kind_of(names) is None
    with pytest.raises(ValueError, match=r"these make no change|shape"):
        change(torch.zeros(2, 2), {name: torch.zeros(2, 3) for name in names})


def test_parts_of_other_shapes_are_told(case):
    parts, weight, *_ = case("lora")
    with pytest.raises(ValueError, match=r"the change has the shape \(24, 16\), and the weight \(24, 15\)"):
        change(weight[:, 1:], parts)
    with pytest.raises(ValueError, match="do not fit each other"):
        low_rank_factors({**parts, "down": parts["down"][1:]})
    parts, weight, *_ = case("dora_in")
    with pytest.raises(ValueError, match="dora_scale has the shape"):
        change(weight, {**parts, "dora_scale": torch.ones(1, 5)})
