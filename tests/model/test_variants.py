"""The variants of Anima, and what a run on them says first."""

from pathlib import Path

import pytest

from anima_train.model.variants import architecture, picture_defaults, variant_warnings


@pytest.mark.parametrize(
    ("name", "num_blocks", "words"),
    [
        ("anima-base-v1.0.safetensors", 28, []),
        ("anima-tiny.safetensors", 10, []),
        ("Anima_Turbo-v1.safetensors", 28, ["distilled to draw in few steps"]),
        ("anima-aesthetic-v1.0.safetensors", 28, ["tuned to one taste"]),
        ("anima-preview3-base.safetensors", 28, ["may not fit the final weights"]),
        ("turboprop.safetensors", 28, []),
        ("anima-2.9b.safetensors", 40, ["has 40 blocks (the 2.9B)"]),
        ("anima.safetensors", 52, ["has 52 blocks (the 3.8B)", "its second text encoder is not used"]),
        ("mine.safetensors", 33, ["has 33 blocks (a variant)"]),
    ],
)
def test_what_to_know_of_a_variant_is_told(name, num_blocks, words):
    found = list(variant_warnings(Path("models") / name, num_blocks))
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
    assert "models" not in "".join(found)


def test_turbo_alone_is_drawn_in_another_way_than_the_base():
    assert picture_defaults("models/anima-turbo-v1.1.safetensors") == {"cfg": 1.0, "steps": 10}
    others = [None, "anima-base-v1.0.safetensors", "turbo/anima-aesthetic-v1.0.safetensors", "turbopunk.safetensors"]
    assert not any(map(picture_defaults, others))


def test_architectures_tell_the_depth_and_are_animas_for_managers_of_files():
    found = [architecture(depth) for depth in (28, 40, 52, 10)]
    assert found == ["anima-2b", "anima-2.9b", "anima-3.8b", "anima"]
    assert architecture(40, is_adapter=True) == "anima-2.9b/lora"
