"""PNG files and what they say about themselves."""

import json

from PIL import Image

from anima_train import __version__
from anima_train.sampling.generate import Request
from anima_train.sampling.pictures import UsedLora, UsedWeights, parameters_text, save_picture

REQUEST = Request(
    prompt="1girl, (solo:1.2)\nsecond line", negative_prompt="bad, 日本", seed=5, width=832, cfg=4.5, sampler="euler"
)
SOURCES = UsedWeights("anima-base-v1.0", [UsedLora("style", 0.8, "ab" * 32), UsedLora("a, b", -1.0, "cd" * 32)])


def test_parameters_are_in_a1111s_form():
    assert parameters_text(REQUEST, SOURCES).split("\n") == [
        "1girl, (solo:1.2)",
        "second line <lora:style:0.8> <lora:a, b:-1>",
        "Negative prompt: bad, 日本",
        "Steps: 30, Sampler: Euler, Schedule type: Simple, CFG scale: 4.5, Shift: 3, Seed: 5, Size: 832x1024, "
        'Model: anima-base-v1.0, Lora hashes: "style: ababababab, a, b: cdcdcdcdcd", '
        f"Version: anima-train {__version__}",
    ]
    assert parameters_text(Request(prompt=""), UsedWeights("x")).startswith("\nSteps: 30, ")


def test_pictures_hold_both_texts_and_get_the_next_number(tmp_path):
    image = Image.new("RGB", (4, 3), (1, 2, 3))
    (tmp_path / "00007_1.png").touch()
    (tmp_path / "99999_notes.png").touch()
    paths = [save_picture(tmp_path, image, REQUEST, SOURCES) for _ in range(2)]
    assert [path.name for path in paths] == ["00008_5.png", "00009_5.png"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as saved:
        assert saved.info["parameters"] == parameters_text(REQUEST, SOURCES)
        facts = json.loads(saved.info["anima_train"])
        assert saved.tobytes() == image.tobytes()
    assert Request(**{key: facts.pop(key) for key in Request.model_fields}) == REQUEST
    assert facts == {
        "model": "anima-base-v1.0",
        "loras": [
            {"name": "style", "strength": 0.8, "sha256": "ab" * 32},
            {"name": "a, b", "strength": -1.0, "sha256": "cd" * 32},
        ],
        "version": __version__,
    }
