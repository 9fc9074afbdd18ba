"""The noise schedules against tables worked out by hand, numpy, and scipy's quantiles."""

from fractions import Fraction
from itertools import pairwise
from math import gamma

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from anima_train.core.settings import Settings, validation_problems
from anima_train.sampling.noise_schedules import Beta, Normal, ScheduleSetting, SgmUniform, Simple, beta_edges

ALL = [Simple(), Normal(), SgmUniform(), Beta()]

# rint(scipy.stats.beta.ppf(1 - i / steps, 0.6, 0.6) * 999) of scipy 1.17, as ComfyUI has it
SCIPY_ENTRIES = {
    1: [999],
    2: [999, 500],
    20: [999, 986, 959, 922, 876, 823, 765, 703, 637, 569, 500, 430, 362, 296, 234, 176, 123, 77, 40, 13],
    21: [999, 987, 963, 928, 886, 837, 782, 724, 662, 598, 532, 467, 401, 337, 275, 217, 162, 113, 71, 36, 12],
}


def flow(t, shift):
    """The sigma of a flow at t, exactly."""
    t, shift = Fraction(t), Fraction(shift)
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: schedule.type)
@pytest.mark.parametrize("steps", [1, 2, 20, 30, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_levels_fall_from_1_to_0(schedule, steps, shift):
    sigmas = schedule.sigmas(steps, shift)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(before > after for before, after in pairwise(sigmas))
    assert len(sigmas) == 848 if schedule.type == "beta" and steps == 1000 else len(sigmas) == steps + 1


@pytest.mark.parametrize("steps", [1, 2, 20, 30, 1000])
@pytest.mark.parametrize("shift", [1, 3])
def test_simple_takes_entries_of_the_table_from_its_end(steps, shift):
    expected = [flow(Fraction(1000 - 1000 * step // steps, 1000), shift) for step in range(steps)]
    assert Simple().sigmas(steps, float(shift)) == pytest.approx([*map(float, expected), 0.0])


@pytest.mark.parametrize("steps", [2, 20, 30, 1000])
@pytest.mark.parametrize("shift", [1, 3])
def test_schedules_even_in_t_end_where_the_shift_has_acted_twice(steps, shift):
    smallest = float(flow(Fraction(1, 1000), shift))
    normal, sgm_uniform = np.linspace(1, smallest, steps), np.linspace(1, smallest, steps + 1)[:-1]
    for schedule, t in [(Normal(), normal), (SgmUniform(), sgm_uniform)]:
        expected = shift * t / (1 + (shift - 1) * t)
        assert schedule.sigmas(steps, float(shift)) == pytest.approx([*expected, 0.0])


def test_small_tables_worked_out_by_hand():
    assert Simple().sigmas(4, 3.0) == pytest.approx([1, 9 / 10, 3 / 4, 1 / 2, 0])
    assert Simple().sigmas(3, 1.0) == pytest.approx([1, 0.667, 0.334, 0])
    # Shift 3 moves t = 1/1000 to 3/1002 = 1/334, and that to 1/112; halfway from it to 1 is t = 335/668.
    assert Normal().sigmas(3, 3.0) == pytest.approx([1, 1005 / 1338, 1 / 112, 0])
    assert SgmUniform().sigmas(2, 3.0) == pytest.approx([1, 1005 / 1338, 0])
    assert Normal().sigmas(2, 1.0) == pytest.approx([1, 0.001, 0])
    assert Normal().sigmas(1, 3.0) == SgmUniform().sigmas(1, 3.0) == [1, 0]


@pytest.mark.parametrize("steps", SCIPY_ENTRIES)
@pytest.mark.parametrize("shift", [1, 3])
def test_beta_has_scipys_quantiles(steps, shift):
    expected = [float(flow(Fraction(entry + 1, 1000), shift)) for entry in SCIPY_ENTRIES[steps]]
    assert Beta().sigmas(steps, float(shift)) == pytest.approx([*expected, 0.0])


def test_beta_has_fewer_levels_where_quantiles_share_an_entry():
    assert len(Beta().sigmas(138, 1.0)) == 138 + 1
    sigmas = Beta().sigmas(139, 1.0)
    assert len(sigmas) == 139
    assert sum(sigmas) * 1000 == pytest.approx(68931 + 138)  # scipy's entries, each counted from 1


def test_beta_edges_are_the_distribution_function():
    # With u = v^5 the density u^-0.4 (1 - u)^-0.4 is smooth at 0: 5 v^2 (1 - v^5)^-0.4.
    nodes, weights = np.polynomial.legendre.leggauss(80)
    whole = gamma(0.6) ** 2 / gamma(1.2)
    edges = beta_edges()
    assert len(edges) == 999
    for entry in (0, 1, 7, 100, 400, 498):
        end = ((entry + 0.5) / 999) ** 0.2
        v = end * (nodes + 1) / 2
        below = float(np.sum(weights * 5 * v**2 * (1 - v**5) ** -0.4) * end / 2 / whole)
        assert edges[entry] == pytest.approx(below, rel=1e-10)
        assert edges[998 - entry] == pytest.approx(1 - below, rel=1e-10)


def test_a_name_is_short_for_a_table():
    setting = TypeAdapter(ScheduleSetting)
    for schedule in ALL:
        assert setting.validate_python(schedule.type) == setting.validate_python({"type": schedule.type}) == schedule


class Preview(Settings):
    schedule: ScheduleSetting = Simple()


def test_an_unknown_name_is_answered_with_the_likely_one():
    data = {"schedule": "sgm_uniforn"}
    with pytest.raises(ValidationError) as caught:
        Preview.model_validate(data)
    names = '"simple", "normal", "sgm_uniform", "beta"'
    assert validation_problems(caught.value, data, Preview, {}) == {
        "schedule": f'found "sgm_uniforn" (text), expected one of {names}; did you mean "sgm_uniform"?'
    }
