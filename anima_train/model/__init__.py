"""The Anima model: transformer, LLM adapter, text encoder, VAE, and the files that hold them."""
