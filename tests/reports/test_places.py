"""Pages name no folder of this machine, and lose nothing else."""

import tomllib

import pytest

from anima_train.reports.places import shared_config, shared_text

PLACES = ["/home/some one/data/cats", "C:\\Users\\someone\\models\\vae.safetensors", "data/own/pics", "/srv", "/"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset train: cannot be used: a/image3.png: truncated", None),
        ("/home/some one/data/cats/a b.png: truncated", "cats/a b.png: truncated"),
        ("/home/some one/data/other.png: truncated", "other.png: truncated"),
        ("no preview ([Errno 28]: '/mnt/someone/s.png')", "no preview ([Errno 28]: 's.png')"),
        ("~someone/runs/a.png, ~/a.png", "a.png, ~/a.png"),
        ("C:\\Users\\someone\\models\\vae.safetensors and D:\\x\\y.png", "vae.safetensors and y.png"),
        ("data/own/pics/a.png", "pics/a.png"),
        ("https://huggingface.co/a/b, hf://owner/name@main/x/y, 1/2, 1girl/solo, 3 / 4", None),
    ],
)
def test_messages_keep_all_but_the_folders(text, expected):
    assert shared_text(text, PLACES) == (text if expected is None else expected)


CONFIG = """
output_dir = "/home/someone/runs"
run_name = "a/b"
dataset = "../someone/dataset.toml"
[model]
vae_path = 'C:\\Users\\someone\\vae.safetensors'
llm_path = "hf://owner/name/x/y.safetensors"
[adapter]
init_from_existing = "/home/someone/loras/style.safetensors"
[[own.directory]]
path = "/home/someone/pictures/"
hf_dataset = "owner/name"
[[own.directory]]
hf_dataset = "/home/someone/tables/x.parquet"
[sampling]
prompts = ["1girl, /home/someone"]
"""


def test_a_config_keeps_names_in_place_of_paths():
    text, places = shared_config(CONFIG)
    found = tomllib.loads(text)
    assert (found["output_dir"], found["run_name"], found["dataset"]) == ("runs", "a/b", "dataset.toml")
    assert found["model"] == {"vae_path": "vae.safetensors", "llm_path": "hf://owner/name/x/y.safetensors"}
    assert found["own"]["directory"] == [{"path": "pictures", "hf_dataset": "owner/name"}, {"hf_dataset": "x.parquet"}]
    assert found["sampling"] == {"prompts": ["1girl, /home/someone"]}  # what was written to be drawn
    assert found["adapter"] == {"init_from_existing": "style.safetensors"}
    assert len(places) == 6


def test_a_damaged_config_is_shown_without_its_folders():
    assert shared_config("output_dir = '/home/someone/runs") == ("output_dir = 'runs", [])
