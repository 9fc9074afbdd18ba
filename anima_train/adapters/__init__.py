"""The weights that are trained on top of (or instead of) the base weights, and their names in files."""
