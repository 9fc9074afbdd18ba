"""What other programs read in prompts and settings is refused with what to write."""

import pytest
from pydantic import ValidationError

from anima_train.config.prompt_files import read_requests
from anima_train.core.errors import ConfigError
from anima_train.sampling.elsewhere import SAMPLERS, SCHEDULES, prompt_fault
from anima_train.sampling.generate import Request
from anima_train.sampling.names import SAMPLER_NAMES, SCHEDULE_NAMES


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("1girl, <lora:style_v2:0.7>", "write --lora style_v2.safetensors:STRENGTH"),
        ("<lyco:x:1>", "write --lora x.safetensors:STRENGTH"),
        ("1girl --n bad", 'write { prompt = "...", negative_prompt = ... } in a file, or --negative in the command'),
        ("1girl --w 768 --h 512", 'write { prompt = "...", width = ... } in a file, or --size in the command'),
        ("1girl --s 28", 'write { prompt = "...", steps = ... } in a file, or --steps in the command'),
        ("1girl --ar 2:3", 'found "--ar" in the prompt, where no options are read; remove it'),
        ("embedding:easynegative, 1girl", "embeddings are not read; remove it"),
    ],
)
def test_what_another_program_reads_in_a_prompt_is_refused(prompt, said):
    assert prompt_fault(prompt).endswith(said)
    with pytest.raises(ValidationError, match="Value error, found"):
        Request(prompt=prompt)
    with pytest.raises(ValidationError, match="Value error, found"):
        Request(prompt="a", negative_prompt=prompt)


@pytest.mark.parametrize("prompt", ["", "1girl, (smile:1.2), x-ray -- a view", "2020-2024", "<3, :<", "a--b", ">:--<"])
def test_other_prompts_are_left_alone(prompt):
    assert prompt_fault(prompt) is None
    assert Request(prompt=prompt).prompt == prompt


def test_a_file_of_kohyas_prompts_is_refused_with_each_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("fine\n1girl --w 640\n<lora:a:1>\n")
    with pytest.raises(ConfigError) as caught:
        read_requests(tmp_path / "prompts.txt", {})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("written", ["euler_a", "Euler a", "DPM++ 2M", "dpmpp-2m-sde-gpu", {"type": "k_euler"}])
def test_samplers_of_other_programs_are_refused_with_ours(written):
    with pytest.raises(ValidationError, match="which is not one of ours; write"):
        Request(prompt="a", sampler=written)


def test_names_of_ours_are_promised_and_not_refused():
    assert set(SAMPLERS.values()) <= set(SAMPLER_NAMES)
    assert set(SCHEDULES.values()) <= set(SCHEDULE_NAMES)
    assert not SAMPLERS.keys() & set(SAMPLER_NAMES)
    assert not SCHEDULES.keys() & set(SCHEDULE_NAMES)
    for name in SCHEDULE_NAMES:
        assert Request(prompt="a", schedule=name).schedule.type == name
