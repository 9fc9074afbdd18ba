"""The names of the samplers and of the noise schedules, for help that must not wait for torch."""

SAMPLER_NAMES = ("euler", "euler_ancestral", "heun", "er_sde", "dpmpp_2m", "dpmpp_2m_sde")
SCHEDULE_NAMES = ("simple", "normal", "sgm_uniform", "beta")
