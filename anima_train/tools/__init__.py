"""Tools for model files, beside training."""
