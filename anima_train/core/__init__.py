"""What every room stands on: errors, strict settings, addressed randomness, atomic files."""
