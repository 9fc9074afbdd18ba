"""What leaves a machine says nothing about it: secrets are in no file, paths and people in none that is shared.

One process goes through all commands with marks in its environment, paths and configuration, and notes each socket.
"""

import base64
import html
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w
from PIL import Image

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
PERSON = "zxperson"  # in HOME, in the user's name, and in every folder
HOST = "zxhost"
SECRETS = {
    "HF_TOKEN": "hf_zxsecretAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": "hf_zxsecretBBBBBBBBBBBBBBBBBBBBBBBBBB",
    "WANDB_API_KEY": "zxsecretC" + "0" * 31,
    "AWS_SECRET_ACCESS_KEY": "zxsecretD/EXAMPLE+KEY",
    "OPENAI_API_KEY": "sk-zxsecretE",
}
KEY_IN_FILE = "zxsecretF" + "0" * 31
KEY_ON_LINE = "zxsecretG" + "0" * 31

DRIVER = """
import json, socket, sys
sockets = []
def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        sockets.append([event, str(arguments[event.startswith(("socket.c", "socket.s")):])])
sys.addaudithook(note)
socket.gethostname = lambda: HOST
from accelerate.state import AcceleratorState, GradientState, PartialState
from anima_train.cli.main import main
codes = []
for line in json.loads(sys.argv[1]):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    sys.argv = ["anima", *line]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code or 0)
print("RESULT" + json.dumps([codes, sockets]))
"""


@dataclass
class Lived:
    """What the process left."""

    folder: Path  # everything is in here
    codes: list[int]  # of each command
    sockets: list[list[str]]
    output: str

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"

    def files(self, *patterns: str) -> list[Path]:
        found = [path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()]
        assert found, patterns
        return found


@pytest.fixture(scope="module")
def lived(tmp_path_factory, images_drawer, tiny):
    """Training, resuming, a report, a check, pictures, a comparison, a converted model, and mistakes; offline."""
    folder = tmp_path_factory.mktemp(PERSON)
    images = images_drawer(folder / "data" / PERSON / "pictures", [(96, 96)] * 2)
    (images / "broken.png").write_bytes(b"no image")
    os.symlink(tiny, folder / "tiny")
    start = f"{folder}/"
    data = {"resolutions": [96], "directory": [{"path": f"data/{PERSON}/pictures"}], "max_bad_fraction": 0.5}
    (folder / "set.toml").write_text(tomli_w.dumps(data))
    config = {
        "output_dir": f"{start}runs", "run_name": "run", "max_steps": 2, "offline": True,
        "checkpoint_every_n_steps": 1, "dataset": "set.toml",
        "eval_datasets": [{"name": "held", "config": data}],
        "model": {"type": "anima", "tiny_path": f"{start}tiny", "dtype": "float32", "llm_adapter_lr": 0},
        "adapter": {"type": "lora", "rank": 2}, "optimizer": {"type": "adamw", "lr": 1e-3},
        "sampling": {"every_n_steps": 1, "width": 64, "height": 64, "steps": 1, "prompts": ["a"]},
        "monitoring": {"enable_wandb": True, "wandb_api_key": KEY_IN_FILE},
    }  # fmt: skip
    (folder / "run.toml").write_text(tomli_w.dumps(config))
    path, lora = f"{start}run.toml", f"{start}runs/run/weights/run.safetensors"
    key = f'monitoring.wandb_api_key="{KEY_ON_LINE}"'
    strengths = "strengths_after_training=[0.5]"
    commands = [
        ["train", path, "--set", key, "--set", strengths],
        ["train", path, "--set", key, "--set", strengths, "--set", "max_steps=3", "--resume"],
        ["report", f"{start}runs/run"],
        ["check", path],
        ["sample", path, "--prompt", "a", "--lora", lora, "--out", f"{start}out", "--size", "64x64", "--steps", "1",
         "--grid", f"x=lora:none,{lora}"],
        ["compare", f"{start}runs/run", "--strengths", "0.5"],
        ["convert", path, f"{start}converted", "--to", "diffusers"],
        ["train", path, "--set", key],  # the run is there already
        ["train", path, "--set", f"monitoring.wandb_api_key={KEY_ON_LINE}x y"],
        ["train", path, "--set", f'monitoring.wandb_api_key=["{KEY_ON_LINE}"]'],
        ["train", path, "--set", f'monitoring.wandb_api_keyy="{KEY_ON_LINE}"'],
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HF_", "COVERAGE"))}
    environment |= {**SECRETS, "HOME": str(folder), "USER": PERSON, "LOGNAME": PERSON, "PYTHONPATH": str(REPO)}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "XDG_CACHE_HOME": str(folder / "xdg")}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER.replace("HOST", repr(HOST)), json.dumps(commands)],
        capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    output, _, found = result.stdout.partition("RESULT")
    codes, sockets = json.loads(found)
    return Lived(folder, codes, sockets, output + result.stderr)


def test_every_command_did_what_it_should(lived):
    assert lived.codes == [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2], lived.output
    assert lived.files("runs/run/wandb/offline-run-*/*.wandb", "runs/run/**/events.out.tfevents*")


def forms(secret: str) -> set[bytes]:
    """A secret as it is, and in base64 wherever it begins in what is encoded."""
    found = {secret.encode()}
    for shift in range(3):
        encoded = base64.b64encode(b" " * shift + secret.encode()).rstrip(b"=")
        found.add(encoded[4 * (shift > 0) : -2])
    return found


def test_no_secret_is_in_any_file_or_line(lived):
    marks = {form for secret in [*SECRETS.values(), KEY_IN_FILE, KEY_ON_LINE] for form in forms(secret)}
    written = {path: path.read_bytes() for path in lived.files("**/*") if path != lived.folder / "run.toml"}
    assert len(written) > 50
    written[Path("output")] = lived.output.encode()
    assert [str(path) for path, content in written.items() if any(mark in content for mark in marks)] == []


SHARED = (
    "runs/run/weights/*", "runs/run/samples/*", "runs/run/report.html", "runs/check_run.html", "runs/run/*.jsonl",
    "runs/run/manifest.json", "runs/run/seen.json", "runs/run/**/events.out.tfevents*", "runs/run/wandb/**/*.wandb",
    "runs/run/wandb/**/files/**/*", "out/*", "converted/**/*",
    "runs/run/compare/*", "runs/run/strengths.json", "runs/run/strengths/*/*",
)  # fmt: skip
PRIVATE = ("warnings.jsonl",)  # keeps what was said, with the paths in it


def test_no_path_and_no_name_is_in_what_may_be_shared(lived):
    words = [PERSON, HOST, str(lived.folder), str(REPO), str(Path(sys.prefix))]
    holders = {
        str(path.relative_to(lived.folder)): word
        for path in lived.files(*SHARED)
        for word in words
        if path.name not in PRIVATE and word.encode() in path.read_bytes()
    }
    assert holders == {}
    for path in lived.files("runs/run/samples/*.png", "out/*.png", "runs/run/compare/*.png"):
        with Image.open(path) as image:
            assert not re.search(f"{PERSON}|{HOST}|/tmp", str(image.info))


def test_what_the_page_says_is_still_of_use(lived):
    page = html.unescape((lived.run / "report.html").read_text())
    assert 'output_dir = "runs"' in page
    assert "pictures/broken.png: not an image" in page


def test_offline_connects_to_nothing(lived):
    """W&B's two processes talk through a socket of their own; in a file where the system has these."""
    assert [event for event in lived.sockets if "127.0.0.1" not in event[1] and "/" not in event[1]] == []
