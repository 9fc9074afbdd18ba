"""What `--resume PATH` says where there is nothing to resume."""

from pathlib import Path

import pytest

from anima_train.checkpoint.resume import resume_from_path
from anima_train.core.errors import ConfigError


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("out/stlye", r': "out/stlye" does not exist; did you mean "out/style"\? Give'),
        ("style", r': "style" does not exist; did you mean "out/style"\? Give'),
        ("nothing/like/it", r': "nothing/like/it" does not exist \(there is no "nothing"\); give'),
        ("styles", r' styles: there is no training state \(.*\) in it; did you mean "out/style"\? Give'),
        ("img", r" img: there is no training state \(a folder step-\.\.\.\) in it; give"),
    ],
)
def test_a_path_without_a_state_is_answered_with_what_to_give(tmp_path, monkeypatch, path, found):
    monkeypatch.chdir(tmp_path)
    for folder in ("img", "styles", "out/empty/checkpoints", "out/style/checkpoints/step-000003"):
        (tmp_path / folder).mkdir(parents=True)
    wanted = r" a run's folder or \.\.\./checkpoints/step-\.\.\.; states are saved with checkpoint_every_n_steps$"
    with pytest.raises(ConfigError, match=rf"^--resume{found}{wanted}"):
        resume_from_path({"output_dir": "out", "adapter": {"type": "lora"}}, "new", Path(path))
