"""What a run notes of itself for its report, and the report it leaves."""

import json
import shutil
from collections import Counter

import pytest

from anima_train.config.load import load_config
from anima_train.training.build import plan_run
from anima_train.training.prepare import scan_all


@pytest.fixture
def directories(images_drawer, tmp_path):
    """Images to learn, and one for regularization."""
    learn = images_drawer(tmp_path / "learn", [(96, 96), (96, 96), (128, 80)])
    keep = images_drawer(tmp_path / "keep", [(96, 96)])
    (learn / "image1.txt").unlink()
    return [{"path": str(learn), "num_repeats": 2}, {"path": str(keep), "role": "regularization"}]


@pytest.fixture
def left(trainer_in, images_drawer, tmp_path):
    """A run with images in folders, an evaluation set and a preview."""
    folder = tmp_path / "zxabove"
    folder.mkdir()
    images_drawer(folder / "zxdata" / "zxinside", [(96, 96), (128, 80)])
    images_drawer(folder / "zxheld", [(96, 96)])
    (folder / "zxdata" / "zxinside" / "image1.txt").unlink()
    (folder / "zxdata" / "zxinside" / "zxbroken.png").write_bytes(b"no image")
    held = {"resolutions": [96], "directory": [{"path": str(folder / "zxheld")}]}
    directory = {"path": str(folder / "zxdata"), "recursive": True}
    return trainer_in(folder)(
        "zxrun", dataset={"directory": [directory], "max_bad_fraction": 0.9}, max_steps=2,
        eval_datasets=[{"name": "zxset", "config": held}], eval_every_n_steps=2, eval_before_first_step=False,
        sampling={
            "every_n_steps": 2, "before_first_step": False, "width": 32, "height": 32, "steps": 1,
            "prompts": ["zxprompt"],
        },
    )  # fmt: skip


PRIVATE = {"config.toml", "warnings.jsonl", "lists.txt"}  # stay on the machine, and have whole paths
NAMES = {
    "zxabove": (),
    "zxdata": ("report.html",),
    "zxheld": ("report.html",),
    "zxinside": ("report.html", "seen.json"),
    "zxbroken": ("report.html",),
    "image0": ("report.html", "seen.json"),
    "zxset": ("report.html", "evaluations.jsonl"),
    "zxprompt": ("report.html", "s000002_00.png"),
    "zxrun": ("report.html", "manifest.json", "zxrun.safetensors", "s000002_00.png"),
}


def test_names_in_what_a_run_leaves(left):
    """As docs/security.md says."""
    files = [path for path in left.path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "metrics.jsonl",
        "manifest.json",
        "zxrun.safetensors",
        *PRIVATE,
        "s000002_00.png",
    }
    contents = {path.name: path.read_bytes() for path in files if path.name not in PRIVATE}
    for name, holders in NAMES.items():
        assert {file for file, content in contents.items() if name.encode() in content} == set(holders), name


def warnings_of(run):
    path = run.path / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_leaves_a_page_of_what_it_logged(trainer, directories, pictures):
    held = {"resolutions": [96], "directory": [{"path": str(pictures)}]}
    run = trainer(
        dataset={"directory": directories}, max_steps=5, eval_datasets=[{"name": "held", "config": held}],
        eval_every_n_steps=2, micro_batch_size_per_gpu=2,
    )  # fmt: skip
    page = (run.path / "report.html").read_text()
    for label in ("loss by role", "loss on held", "difference from base on held", "memory in GiB", "images per second"):
        assert f'aria-label="{label}"' in page
    assert "By t" in page
    assert "96x96@96" in page
    assert "max_steps = 5" in page
    assert "<h3>Notes" not in page  # nothing is missing
    assert page.count("without a .txt caption") == 1
    before = 0
    for line in run.metrics:
        bins = line["loss_by_t"]
        assert [place for place, _, _ in bins] == sorted({place for place, _, _ in bins} & set(range(10)))
        assert sum(number for _, _, number in bins) == line["examples"] - before
        total = sum(mean * number for _, mean, number in bins)
        assert total == pytest.approx(line["loss"] * (line["examples"] - before), rel=1e-5)
        assert line["memory_bytes"] > 2**26  # Python with torch alone is larger
        before = line["examples"]
    seconds = [line["seconds"] for line in run.metrics]
    assert seconds == sorted(set(seconds))


@pytest.mark.parametrize("max_steps", [*(pytest.param(number, marks=pytest.mark.slow) for number in (2, 5)), 11])
def test_seen_is_what_the_steps_showed(trainer, directories, max_steps):
    changes = {"dataset": {"directory": directories}, "max_steps": max_steps, "gradient_accumulation_steps": 2}
    run = trainer(**changes)
    loaded = load_config(trainer.config(**changes), [])
    plan, _ = plan_run(
        loaded.config, scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)["train"].samples, 1
    )
    steps = [step for epoch in range(max_steps) for step in plan.epoch(epoch)][:max_steps]
    refs = [ref for step in steps for batch in step.micro_batches for ref in batch.refs]
    samples = Counter({sample.id: 0 for sample in plan.samples})
    samples.update(plan.samples[ref.sample].id for ref in refs)
    buckets = Counter(f"{plan.samples[ref.sample].size}@96" for ref in refs)
    seen = json.loads((run.path / "seen.json").read_text())
    assert seen["samples"] == samples
    assert {name: number for name, number in seen["buckets"].items() if number} == buckets
    assert not any(str(trainer.folder) in name for name in seen["samples"])


def test_a_resumed_run_tells_its_warnings_once(trainer, directories):
    changes = {"dataset": {"directory": directories}, "checkpoint_every_n_steps": 2}
    shutil.rmtree(trainer(**changes).path / "checkpoints" / "step-000004")
    run = trainer(resume=True, **changes)
    assert (run.path / "report.html").read_text().count("without a .txt caption") == 1
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]


def test_gradients_that_are_not_applied_are_among_the_warnings(trainer):
    run = trainer(optimizer={"lr": 1e25})  # so that the second step's loss is infinite
    skipped = [line for line in warnings_of(run) if line["step"]]
    assert [line["step"] for line in skipped] == [2, 3, 4]
    assert "the loss is not finite (it is" in skipped[0]["text"]
    assert "images: 0/image" in skipped[0]["text"]
    page = (run.path / "report.html").read_text()
    assert "step 2: the loss is not finite" in page
    assert "3 values are not finite (NaN or infinite), from step 2 on" in page


def test_a_report_that_cannot_be_written_does_not_fail_the_run(trainer, capsys):
    (trainer.folder / "runs" / "run" / "report.html").mkdir(parents=True)
    run = trainer()
    assert run.weights
    assert "warning: no report of the run was written" in capsys.readouterr().out
