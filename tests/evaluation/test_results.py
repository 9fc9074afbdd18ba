"""Differences from the base model: their standard errors, and what sets of several roles say together."""

import json
import math
import statistics

import pytest
import torch

from anima_train.evaluation.results import Drift, Evaluation, described, paired_difference, score, summary

LEVELS = ("quantile_0.30", "quantile_0.70")


def evaluation(losses, role="validation", kinds=None, name=None, drift=None):
    losses = torch.tensor(losses, dtype=torch.float64)
    return Evaluation(name or role, role, LEVELS, tuple(kinds or [""] * len(losses)), losses, drift)


def test_the_error_over_samples_is_that_of_a_mean():
    values = [0.5, 0.25, -0.125, 0.75]
    found = paired_difference(torch.tensor(values), [""] * 4)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert found.kind_error is None


def test_of_equally_many_samples_the_error_over_kinds_is_that_of_the_kinds_means():
    """However alike the samples of a kind are, and however many."""
    means = {"artist": 0.5, "text": -0.25, "hands": 0.125}
    for number in (2, 50):
        values = torch.tensor([mean for mean in means.values() for _ in range(number)], dtype=torch.float64)
        found = paired_difference(values, [kind for kind in means for _ in range(number)])
        assert found.kind_error == pytest.approx(statistics.stdev(means.values()) / math.sqrt(3))
    assert found.error < found.kind_error / 3


def test_samples_without_a_kind_are_kinds_by_themselves():
    values = torch.tensor([0.1, 0.4, 0.3, 0.2])
    alone = paired_difference(values, ["a", "b", "c", "d"])
    assert alone.kind_error == pytest.approx(alone.error)
    assert paired_difference(values, ["a", "", "", ""]).kind_error == pytest.approx(alone.error)


def test_a_difference_beyond_chance_is_so_over_kinds_too():
    alike = torch.tensor([0.2, 0.21, 0.19, 0.2, 0.01, 0.0, 0.02, 0.01])
    over_samples = paired_difference(alike, [""] * 8)
    over_kinds = paired_difference(alike, ["one"] * 4 + ["other"] * 4)
    assert over_samples.standard_errors > over_kinds.standard_errors
    assert not over_kinds.is_beyond_chance
    assert paired_difference(torch.tensor([0.2, 0.21, 0.19]), [""] * 3).is_beyond_chance
    assert not paired_difference(torch.tensor([0.2]), [""]).is_beyond_chance  # one sample proves nothing
    assert paired_difference(torch.zeros(3), [""] * 3).standard_errors == 0


def test_differences_that_are_all_the_same_are_beyond_chance_and_json_holds_them():
    found = paired_difference(torch.tensor([-0.5, -0.5, -0.5]), ["hands", "hands", "text"])
    assert (found.mean, found.error, found.kind_error) == (-0.5, 0, 0)
    assert found.is_beyond_chance
    values = found.metrics("held/difference_from_base")
    assert sorted(values) == [f"held/difference_from_base{end}" for end in ("", "_stderr", "_stderr_kinds")]
    json.dumps(values, allow_nan=False)


def test_differences_are_logged_by_level_and_by_kind():
    base = evaluation([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], kinds=["artist", "artist", "text"])
    now = evaluation([[1.5, 2.0], [1.5, 3.0], [3.0, 2.0]], kinds=["artist", "artist", "text"])
    values = now.metrics(base)
    assert values["validation/loss"] == pytest.approx(13 / 6)
    assert values["validation/loss_quantile_0.30"] == pytest.approx(2.0)
    assert values["validation/difference_from_base"] == pytest.approx(0.0)
    assert values["validation/difference_from_base_quantile_0.70"] == pytest.approx(-1 / 3)
    assert values["validation/difference_from_base_of_artist"] == pytest.approx(0.5)
    assert values["validation/difference_from_base_of_text"] == pytest.approx(-1.0)
    assert values["validation/difference_from_base_stderr_of_artist"] == pytest.approx(0.25)
    assert values["validation/difference_from_base_stderr_quantile_0.30"] == pytest.approx(1 / 6)
    assert values["validation/loss_of_artist"] == pytest.approx(2.0)
    assert not any("from_base" in name for name in now.metrics(None))


def test_drift_and_cross_term_are_logged_beside_the_base():
    drift = Drift(torch.full((2, 2), 0.5), torch.full((2, 2), -0.1), torch.full((2, 2), 4.0))
    values = evaluation([[1.0, 1.0]] * 2, drift=drift).metrics(None)
    assert values["validation/drift"] == pytest.approx(0.5)
    assert values["validation/drift_relative"] == pytest.approx(0.125)
    assert values["validation/drift_cross_term"] == pytest.approx(-0.1)
    squared = torch.tensor([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]])
    values = evaluation([[1.0, 1.0]] * 3, kinds=["text", "text", "hands"], drift=Drift(squared, squared, squared))
    values = values.metrics(None)
    assert (values["validation/drift_of_text"], values["validation/drift_of_hands"]) == (1.5, 6.0)
    assert values["validation/drift_stderr_of_text"] == pytest.approx(0.5)
    assert values["validation/drift_relative_stderr"] == pytest.approx(values["validation/drift_stderr"] / 3)


def test_sets_of_several_roles_tell_what_was_learned_memorized_and_forgotten():
    base = {role: evaluation([[1.0, 1.0]], role) for role in ("train", "validation", "retention")}
    now = [
        evaluation([[loss, loss]], role) for role, loss in (("train", 0.5), ("validation", 0.75), ("retention", 1.1))
    ]
    found = summary(now, base)
    assert found == pytest.approx(
        {
            "evaluation/learning": 0.25, "evaluation/learning_at_highest_t": 0.25, "evaluation/memorization": 0.25,
            "evaluation/forgetting": 0.1, "evaluation/forgetting_relative": 0.1,
        }
    )  # fmt: skip
    assert summary(now[1:2], base) == {}  # it is the set's own difference
    assert summary(now, {}) == {}


def test_what_sets_say_together_has_the_errors_of_independent_samples():
    source = torch.Generator().manual_seed(0)
    roles = {"seen": "train", "new": "validation", "newer": "validation", "known": "retention"}
    base = {name: evaluation([[2.0, 4.0]] * 5, role, name=name) for name, role in roles.items()}
    changes = {name: torch.randn(5, 2, generator=source, dtype=torch.float64) for name in roles}
    drift = Drift(changes["known"].square(), changes["known"], torch.full((5, 2), 4.0))
    now = [
        Evaluation(name, role, LEVELS, ("",) * 5, base[name].losses + changes[name], drift if name == "known" else None)
        for name, role in roles.items()
    ]
    found = summary(now, base)
    means = {name: change.mean(dim=1) for name, change in changes.items()}
    squares = {name: float(each.var() / 5) for name, each in means.items()}  # of the errors
    assert found["evaluation/learning"] == pytest.approx(-float(means["new"].mean() + means["newer"].mean()) / 2)
    assert found["evaluation/learning_stderr"] == pytest.approx(math.sqrt(squares["new"] + squares["newer"]) / 2)
    assert found["evaluation/memorization_stderr"] == pytest.approx(
        math.sqrt((squares["new"] + squares["newer"]) / 4 + squares["seen"])
    )
    highest = torch.stack([changes["new"][:, 1], changes["newer"][:, 1]])  # at quantile 0.70
    assert found["evaluation/learning_at_highest_t"] == pytest.approx(-float(highest.mean()))
    assert found["evaluation/learning_at_highest_t_stderr"] == pytest.approx(
        math.sqrt(float((highest.var(dim=1) / 5).sum())) / 2
    )
    assert found["evaluation/forgetting_relative"] == pytest.approx(found["evaluation/forgetting"] / 3)
    assert found["evaluation/forgetting_relative_stderr"] == pytest.approx(math.sqrt(squares["known"]) / 3)
    assert found["evaluation/drift_relative"] == pytest.approx(float(drift.squared.mean()) / 4)
    assert found["evaluation/drift_relative_stderr"] == pytest.approx(
        float(drift.squared.mean(dim=1).std()) / math.sqrt(5) / 4
    )
    assert not any(name.endswith("_kinds") for name in found)


def test_the_best_state_is_that_of_the_validation_sets():
    kept, new = evaluation([[9.0, 9.0]], "retention"), evaluation([[1.0, 2.0]], "validation")
    assert score([kept, new]) == 1.5
    assert score([kept]) == 9.0


def test_an_evaluation_is_described_with_its_error_and_whether_it_may_be_chance():
    base = evaluation([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    sure = evaluation([[1.1, 1.1], [2.11, 2.11], [3.09, 3.09]])
    assert described(base, base) == "validation/loss 2.00000"
    assert described(sure, None) == "validation/loss 2.10000"
    assert described(sure, base) == "validation/loss 2.10000, +0.10000 +- 0.00577 from the base"
    unsure = evaluation([[1.1, 1.1], [1.9, 1.9], [3.2, 3.2]])
    assert described(unsure, base).endswith("from the base (may be chance)")
