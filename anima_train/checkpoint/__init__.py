"""Files that a run leaves to go on from, or to load elsewhere."""
