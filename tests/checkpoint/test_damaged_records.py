"""Records of a run and its states with another byte, or cut off: a state before, a sentence, or the same run."""

import json
import logging
import os
import random
import shutil

import pytest
import torch

from anima_train.checkpoint.manifest import CHECKSUM, DamagedState, checksum, read_manifest
from anima_train.checkpoint.training_state import StateManifest, check_state
from anima_train.core.errors import ConfigError, UserError
from anima_train.core.files import sha256_file
from anima_train.evaluation.evaluate import read_base
from anima_train.training.anomalies import replay
from tests.resuming import STATES, numbers, run_until

NESTED = b"[" * 100_000


def write_state(folder, step=3, num_steps=4):
    """A state whose tensors are not looked into."""
    folder.mkdir(parents=True)
    files = {}
    for name in ("weights", "optimizer"):
        path = folder / f"{name}.safetensors"
        path.write_bytes(name.encode())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    config = {"max_steps": num_steps, "optimizer": {"lr": 1e-05, "betas": [0.9, 0.99]}, "adapter": {"type": "full"}}
    values = {
        "step": step, "optimizer": "AdamW", "pending": ["evaluation"], "score": 0.25,
        "run": {"seed": 0, "num_steps": num_steps, "trained": ["mlp"], "name": "größer"},
        "config": config, "records": {"metrics.jsonl": "ab" * 32}, "files": files,
    }  # fmt: skip
    (folder / "state.json").write_text(StateManifest.model_validate(values).text())
    return folder


def outcome(folder):
    """The manifest of a state; None where it is seen to be damaged."""
    try:
        return check_state(folder).manifest
    except DamagedState:
        return None


def test_no_flipped_bit_of_a_state_record_is_believed(tmp_path):
    folder = write_state(tmp_path / "step-000003")
    path = folder / "state.json"
    content, whole = path.read_bytes(), check_state(folder).manifest
    for place in range(len(content)):
        for bit in (1 << place % 8, 1 << (place + 3) % 8):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            assert outcome(folder) in (None, whole), (place, bit)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert outcome(folder) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", 2), ("optimizer", "Lion"), ("pending", []), ("score", 0.1), ("run", {}), ("records", {}), ("version", 2)],
)
def test_an_edited_state_record_is_damaged(tmp_path, key, value):
    folder = write_state(tmp_path / "step-000003")
    values = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(DamagedState, match=r"state\.json has other content than was written"):
        check_state(folder)
    (folder / "state.json").write_text(json.dumps({k: v for k, v in values.items() if k != CHECKSUM}))
    with pytest.raises(DamagedState):
        check_state(folder)


@pytest.mark.parametrize("content", [NESTED, b"5", b"[1]", b'{"version": 1e999}', b"\xff", b'{"version": null}'])
def test_what_is_no_record_at_all_is_damaged(tmp_path, content):
    folder = write_state(tmp_path / "step-000003")
    (folder / "state.json").write_bytes(content)
    with pytest.raises(DamagedState, match="missing or cannot be read"):
        read_manifest(folder)


def test_a_state_under_another_name_or_beyond_the_run_is_damaged(tmp_path):
    folder = write_state(tmp_path / "step-000003").rename(tmp_path / "step-000004")
    with pytest.raises(DamagedState, match=r"step-000004: damaged: state\.json is of step 3$"):
        check_state(folder)
    folder = write_state(tmp_path / "step-000009", step=9, num_steps=4)
    with pytest.raises(DamagedState, match="is of step 9 in a run of 4"):
        check_state(folder)


def test_however_it_is_spaced_a_record_has_one_checksum():
    values = {"b": [1, 2.5, None], "a": {"é": 1e-05}}
    assert checksum(values) == checksum(json.loads(json.dumps(values, indent=4)))
    assert checksum(values) != checksum(values | {"b": [1, 2.5, 0]})


@pytest.mark.parametrize("line", ["", "5", '{"step": 1e999}', '{"step": 2}', '{"step": 2, "loss": "x"}', "[" * 100_000])
def test_a_line_of_metrics_that_is_damaged_is_passed_over(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": float("nan"), "grad_norm": 1.0}) for step in (1, 3)]
    path.write_text("\n".join([good[0], line, good[1]]) + "\n")
    assert replay(path, 3)[0].in_a_row == 2
    assert replay(tmp_path / "none.jsonl", 3)[0].in_a_row == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        NESTED,
        b"[]",
        b'{"held": 5}',
        b'{"held": {}}',
        b'{"held": {"dataset_sha256": "a", "losses": [[1]]}}',
        b"\xff",
    ],
)
def test_a_damaged_base_evaluation_counts_as_none(tmp_path, content):
    path = tmp_path / "base_evaluations.json"
    path.write_bytes(content)

    class Data:
        samples = ()

    class Set:
        name, data, identity = "held", Data, {"dataset_sha256": "a"}

    assert read_base(path, [Set]) == {}


# Whole runs ----------------------------------------------------------------------------------------------------------


def held_out(pictures):
    return {
        "eval_datasets": [{"name": "held", "config": {"resolutions": [64], "directory": [{"path": str(pictures)}]}}],
        "eval_every_n_steps": 1,
    }


def test_damaged_records_are_told_and_training_goes_on_from_a_whole_state(trainer, caplog, capsys):
    whole = trainer("whole")
    run = run_until(trainer, 3)
    state = run / "checkpoints" / "step-000003" / "state.json"
    state.write_text(state.read_text().replace('"step": 3', '"step": 1'))
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": ', '"loss": 9', 1))
    (run / "manifest.json").write_text("[1]")
    with caplog.at_level(logging.WARNING):
        resumed = trainer("run", **STATES)
    told = " ".join(caplog.messages)
    assert "step-000003: damaged: state.json has other content than was written; going back to step 2" in told
    assert "metrics.jsonl: is missing, or was changed after step 2 was saved; the training is the same, but" in told
    warning = f"{run}/manifest.json: damaged; it is written anew"
    assert f"\nwarning: {warning}\n" in capsys.readouterr().out
    assert any(json.loads(line)["text"] == warning for line in (run / "warnings.jsonl").read_text().splitlines())
    assert all(torch.equal(tensor, resumed.weights[key]) for key, tensor in whole.weights.items())
    assert resumed.manifest["finished"]


@pytest.mark.slow
def test_a_run_whose_metrics_are_gone_goes_on_and_does_not_begin_again(trainer, caplog):
    whole = trainer("whole")
    run = run_until(trainer, 2)
    (run / "metrics.jsonl").unlink()
    resumed = trainer("run", **STATES)
    assert any("metrics.jsonl: is missing" in text for text in caplog.messages)
    assert [line["step"] for line in resumed.metrics] == [3, 4]
    assert all(torch.equal(tensor, resumed.weights[key]) for key, tensor in whole.weights.items())


def test_a_run_that_would_end_at_or_before_its_state_is_refused(trainer):
    run = run_until(trainer, 3)
    for num_steps in (2, 3):
        with pytest.raises(ConfigError, match=rf"max_steps: the run would end at step {num_steps}, and .*of step 3,"):
            trainer("run", resume=True, **STATES, max_steps=num_steps)
    with pytest.raises(ConfigError, match="epochs: the run would end at step 3, and"):
        trainer("run", resume=True, **STATES, max_steps=9, epochs=1, gradient_accumulation_steps=2)
    finished = trainer("run", **STATES)
    assert [line["step"] for line in finished.metrics] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"max_steps: the run would end at step 4, and .*of step 4,"):
        trainer("run", resume=True, **STATES)
    assert run.exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_after_its_last_step_saves_its_weights(trainer):
    whole = trainer("whole", **STATES)
    weights = whole.weights
    (whole.path / "weights" / "whole.safetensors").unlink()
    manifest = whole.manifest | {"finished": False}
    (whole.path / "manifest.json").write_text(json.dumps(manifest))
    again = trainer("whole", **STATES)
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in weights.items())


RECORDS = (
    "manifest.json", "metrics.jsonl", "evaluations.jsonl", "base_evaluations.json", "config.toml",
    "checkpoints/step-000003/state.json", "checkpoints/step-000003/samples.json", "checkpoints/step-000002/state.json",
)  # fmt: skip


def damages(content, moments):
    """Contents with one bit, one byte or a piece changed, cut off, or replaced as a whole."""
    for _ in range(4):
        place, bit = moments.randrange(len(content)), 1 << moments.randrange(8)
        yield content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    place = moments.randrange(len(content))
    yield content[:place]
    yield content[:place] + moments.randbytes(5) + content[place + 5 :]
    yield from (b"", b"[1]", NESTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_no_damage_of_a_record_is_a_traceback_or_another_result(trainer, pictures, name, caplog, capsys):
    keys = held_out(pictures)
    whole = trainer("whole", **STATES, **keys)
    run = run_until(trainer, 3, **keys)
    kept = run.rename(run.with_name("kept"))
    moments = random.Random(name)
    outcomes = {"refused": 0, "told": 0, "the same": 0}
    for content in [*damages((kept / name).read_bytes(), moments), None]:
        shutil.copytree(kept, run)
        if content is None:
            os.unlink(run / name)
        else:
            (run / name).write_bytes(content)
        caplog.clear()
        try:
            resumed = trainer("run", **STATES, **keys)
        except UserError:
            outcomes["refused"] += 1
        else:
            assert all(torch.equal(tensor, resumed.weights[key]) for key, tensor in whole.weights.items())
            told = [record for record in caplog.records if record.levelno >= logging.WARNING]
            outcomes["told" if told else "the same"] += 1
            if not told:
                assert numbers(resumed) == numbers(whole)
                assert resumed.evaluations == whole.evaluations
        shutil.rmtree(run)
    with capsys.disabled():
        print(f"\n{name}: {outcomes}")
