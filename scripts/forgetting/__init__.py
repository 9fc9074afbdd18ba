"""The parts of `scripts/forgetting_experiment.py`."""
