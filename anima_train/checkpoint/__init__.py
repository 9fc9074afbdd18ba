"""The files that a run leaves to resume from, or to load elsewhere."""
