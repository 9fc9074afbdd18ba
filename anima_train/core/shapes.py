"""The sizes of latents beside the image that they stand for, which several rooms share."""

LATENT_PIXELS = 8  # image pixels per latent pixel, along a side
LATENT_CHANNELS = 16
