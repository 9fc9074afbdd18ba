"""The measures of a run: losses on evaluation sets, and previews."""
