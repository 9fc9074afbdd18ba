"""From image files and captions to the batches of every step."""
