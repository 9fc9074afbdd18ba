"""What is trained on top of (or instead of) the base weights, and the names it has in files."""
