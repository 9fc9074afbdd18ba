"""The foundations of every room: errors, strict settings, addressed randomness, atomic files."""
