"""anima-train: a config-driven trainer for the Anima text-to-image model."""

__version__ = "0.1.0"
