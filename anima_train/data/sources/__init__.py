"""The places that images come from: folders, archives, Hugging Face datasets."""
