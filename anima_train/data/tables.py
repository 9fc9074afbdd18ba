"""Hugging Face datasets as a source of images."""

from pathlib import Path

from anima_train.core.errors import DataError
from anima_train.data.folders import Files
from anima_train.data.rules import Directory


def table_files(directory: Directory, place: Path, offline: bool) -> Files:
    """The rows of a Hugging Face dataset as if they were files.

    Args:
        directory: which dataset, split and columns.
        place: where it is, or its name on the Hub.
        offline: whether nothing may be looked up on the Hub.

    Raises:
        DataError: it cannot be loaded, or a column is missing.
    """
    raise DataError(f"hf_dataset: {directory.hf_dataset}: not supported yet")
