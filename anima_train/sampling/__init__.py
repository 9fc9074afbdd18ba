"""The way from a prompt and noise to a picture: samplers, schedules, guidance, grids."""
