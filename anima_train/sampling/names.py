"""The names of samplers, noise schedules and the previews' score, for what must not wait for torch."""

SAMPLER_NAMES = ("euler", "euler_ancestral", "heun", "er_sde", "dpmpp_2m", "dpmpp_2m_sde")
SCHEDULE_NAMES = ("simple", "normal", "sgm_uniform", "beta")
SCORE = "score"  # the mean that the judge of a run's previews gives them, as `keep_best` names it
