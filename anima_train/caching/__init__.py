"""The cache of latents, masks and captions: what is needed, what is missing, and its making."""
