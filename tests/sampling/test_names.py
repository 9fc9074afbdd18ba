"""The names in the help are those that can be chosen."""

from anima_train.core.settings import members_of, type_name
from anima_train.sampling.names import SAMPLER_NAMES, SCHEDULE_NAMES
from anima_train.sampling.noise_schedules import AnySchedule
from anima_train.sampling.samplers import AnySampler


def test_every_sampler_and_schedule_is_named_in_the_help():
    assert [type_name(member) for member in members_of(AnySampler)] == list(SAMPLER_NAMES)
    assert [type_name(member) for member in members_of(AnySchedule)] == list(SCHEDULE_NAMES)
