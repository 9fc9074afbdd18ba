"""The sizes that rooms share: of latents, beside the image that they stand for."""

LATENT_PIXELS = 8  # image pixels per latent pixel, along a side
LATENT_CHANNELS = 16
