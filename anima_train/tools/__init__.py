"""What is done with model files beside training."""
