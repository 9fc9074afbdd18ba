"""Several processes: agreement, signals, collectives."""
