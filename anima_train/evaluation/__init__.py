"""Losses on evaluation sets, and previews."""
