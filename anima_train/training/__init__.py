"""The training loop, and what surrounds it: the cache's filling, evaluation, saving, the run's folder, trackers."""
