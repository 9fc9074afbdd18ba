"""What `scripts/gpu_check.py` measures."""
