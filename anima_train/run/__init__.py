"""The run's folder and manifest, trackers and progress."""
