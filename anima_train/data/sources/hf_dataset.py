"""Hugging Face datasets as a source of images: each row stands for an image file with its captions and its mask."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from anima_train.core.errors import DataError, SpaceError
from anima_train.data.captions import cleaned
from anima_train.data.settings import Directory
from anima_train.data.sources.archive import ArchiveMember, MissingImage, ReferencedImage, RowImage, file_stamp
from anima_train.data.sources.folder import Files, stem_of

if TYPE_CHECKING:  # slow to import, and needed by those alone who have such a dataset
    from datasets import Dataset, DatasetBuilder

SAVED_FILES = ("state.json", "dataset_dict.json")  # in folders that `save_to_disk` wrote
ZIP_URL = re.compile(r"zip://(?P<member>.+)::(?P<archive>.+)")  # how datasets names what is in an archive
TEXTS = ("string", "large_string", "string_view", "null")
BINARY = ("binary", "large_binary", "binary_view")
MAX_REASON = 300  # characters
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def hf_dataset_files(directory: Directory, place: Path, offline: bool) -> Files:
    """Return the rows of a Hugging Face dataset as if they were files.

    Args:
        directory: names the dataset, split and columns.
        place: where it is, or its name on the Hub.
        offline: look nothing up on the Hub.

    Raises:
        DataError: it cannot be loaded, or columns are missing or hold something else; for all columns at once.
        SpaceError: there is no room for datasets' own copy.
    """
    table = load_rows(directory, place, offline)
    check_columns(directory, place, table)
    paths, images = column_images(table, directory.image_column, place)
    names = row_names(paths, place)
    masks = column_images(table, directory.mask_column, place)[1] if directory.mask_column else []
    mask_of = {stem_of(name): mask for name, mask in zip(names, masks, strict=False) if mask is not None}
    where = str(place.resolve()) if place.exists() else place.as_posix()
    parts = (where, directory.hf_subset or "", directory.hf_split, directory.hf_revision or "")
    identity = os.fsencode("\0".join(parts))
    return Files(
        folder=place,
        mask_folder=place if directory.mask_column else None,
        members={name: image or MissingImage() for name, image in zip(names, images, strict=True)},
        mask_members={f"{directory.mask_column}/{stem}": mask for stem, mask in mask_of.items()},
        images=names,
        listed_captions=column_texts(table, directory.caption_column, names, place),
        listed_natural=column_texts(table, directory.natural_column, names, place),
        mask_files={stem: [f"{directory.mask_column}/{stem}"] for stem in mask_of},
        identity=identity,
        mask_identity=identity,
        is_table=True,
    )


# Columns


def column_images(table: "Dataset", name: str, place: Path) -> tuple[list[str], list[ArchiveMember | None]]:
    """Return the paths of the files that the rows were made from ("": not known), and the images, none of them read.

    A path without a folder of its own lies beside the dataset. What lies elsewhere is never read: it would be named by
    whoever made the table, not by who trains on it. Links below the dataset are followed, as in folders.
    """
    column = table.select_columns([name]).with_format("arrow")  # as Arrow, so that nothing is decoded
    parts = column[:].flatten()  # into bytes and path, if it is not bytes alone
    is_bare = parts.column_names == [name]
    is_missing = parts.column(name if is_bare else f"{name}.bytes").is_null().to_pylist()
    paths = [""] * len(table) if is_bare else [path or "" for path in parts.column(f"{name}.path").to_pylist()]
    # Changes when the content of the column may have; the same in every run, without reading any row.
    files = [file_stamp(Path(file["filename"]))[:2] for file in table.cache_files]
    digest = hashlib.sha256(repr((table._fingerprint, name, files)).encode()).digest()
    content = int.from_bytes(digest[:7], "big"), int.from_bytes(digest[7:14], "big")
    folders = own_folders(place)
    images: list[ArchiveMember | None] = []
    for row, (missing, path) in enumerate(zip(is_missing, paths, strict=True)):
        match = ZIP_URL.fullmatch(path)
        if not missing:
            images.append(RowImage(column, row, (row, *content)))
        elif not path:
            images.append(None)
        elif (file := path_below(match["archive"] if match else path, folders)) is None:
            images.append(MissingImage(f"its row names {path!a}, which is not below the dataset, and never read"))
        else:
            images.append(ReferencedImage(file, match["member"] if match else None))
    return paths, images


def own_folders(place: Path) -> list[Path]:
    """Return the folders below which the files of a dataset lie; of one on the Hub, those that it is downloaded to."""
    if place.exists():
        folder = place if place.is_dir() else place.parent
        return [folder.resolve(), Path(os.path.abspath(folder))]  # rows may name the one or, by a link, the other
    from datasets import config

    downloads = (constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    return [Path(folder).absolute() for folder in downloads]


def path_below(path: str, folders: Sequence[Path]) -> Path | None:
    """Return the file that a row names, relative to the first of these folders if it is; None if it is below none."""
    file = Path(os.path.normpath(folders[0] / path))
    return file if any(file.is_relative_to(folder) for folder in folders) else None


def row_names(paths: Sequence[str], place: Path) -> list[str]:
    """Return the path of each row's file below the dataset's folder, or else its name alone, or the row's number.

    All are numbers where two names would differ in nothing but their ending, as captions and masks are found by it.
    """
    folders = (place.resolve(), Path(os.path.abspath(place)))
    names = []
    for row, path in enumerate(paths):
        match = ZIP_URL.fullmatch(path)
        folder = next((each for each in folders if match is None and Path(path).is_relative_to(each)), None)
        if folder is not None:
            names.append(Path(path).relative_to(folder).as_posix())
        else:  # without the folders of whoever made the dataset
            names.append(PurePosixPath((match["member"] if match else path).replace("\\", "/")).name or f"{row:08}")
    return names if len({stem_of(name) for name in names}) == len(names) else [f"{row:08}" for row in range(len(paths))]


def column_texts(table: "Dataset", name: str, names: Sequence[str], place: Path) -> dict[str, tuple[str, ...]]:
    """Return the captions of each row that has one; there is no column "".

    Raises:
        DataError: not UTF-8.
    """
    if not name:
        return {}
    try:
        values = table.select_columns([name]).with_format("arrow")[:].column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"hf_dataset {place}: the column {name!r} holds text that is not UTF-8") from error
    texts = {}
    for row, value in zip(names, values, strict=True):
        captions = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
        if captions:
            texts[row] = tuple(map(cleaned, captions))
    return texts


def check_columns(directory: Directory, place: Path, table: "Dataset") -> None:
    """Raise DataError with what is wrong with all columns, if one is missing or holds something else than it should."""
    problems = []
    for key in ("image_column", "caption_column", "natural_column", "mask_column"):
        name: str = getattr(directory, key)
        or_none = "" if key == "image_column" else ', or to "" for none'
        is_right, expected = holds_texts, "texts or lists of texts"
        if key in ("image_column", "mask_column"):
            is_right, expected = holds_images, "images"
        if name and name not in table.column_names:
            found = ", ".join(map(repr, table.column_names)) or "none"
            problems.append(f"no column {name!r}; found {found}. Set {key} to one of them{or_none}")
        elif name and not is_right(table.features[name]):
            found = repr(table.features[name])
            found = found if len(found) < 100 else f"{found[:100]}..."
            problems.append(f"the column {name!r} holds {found}, expected {expected}; set {key} to another{or_none}")
    if problems:
        raise DataError([f"hf_dataset {place}: {problem}" for problem in problems])


def holds_images(feature: Any) -> bool:
    """Return True if a column of this kind holds encoded images, with or without the path of their file."""
    import datasets

    if isinstance(feature, dict):  # as datasets' own, but written by something else
        kinds = {key: getattr(part, "dtype", "") for key, part in feature.items()}
        return kinds.keys() == {"bytes", "path"} and kinds["bytes"] in BINARY and kinds["path"] in TEXTS
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in BINARY


def holds_texts(feature: Any) -> bool:
    """Return True if a column of this kind holds a text, or a list of texts, in each row."""
    import datasets

    if isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in TEXTS


# Loading


def load_rows(directory: Directory, place: Path, offline: bool) -> "Dataset":
    """Return the rows that the directory's keys choose.

    Raises:
        DataError: there is no such dataset, subset or split, or it cannot be read or downloaded.
        SpaceError: there is no room for datasets' own copy.
    """
    import datasets

    if sys.stderr is None or not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would fill a log
    is_saved = any((place / name).is_file() for name in SAVED_FILES)
    if place.exists():
        check_keys(directory, place, has_subsets=place.is_dir() and not is_saved)
    if is_saved:
        with explain_failure(place, "write it again with save_to_disk"):
            saved = datasets.load_from_disk(str(place))
        with explain_failure(place, "set hf_split"):
            return select_split(saved, directory.hf_split)
    builder = make_builder(directory, place, offline)
    if not place.is_file():  # that one is read as parquet, and names no other
        check_builder(directory, place, builder)
    with explain_failure(place, "repair its files, or download them again"):
        builder.download_and_prepare()
    with explain_failure(place, "set hf_split"):
        return builder.as_dataset(split=directory.hf_split)


def select_split(saved: Any, split: str) -> "Dataset":
    """Return the rows that a split chooses of a saved dataset, one without splits being "train" unless it says."""
    import datasets

    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    instruction = datasets.ReadInstruction.from_spec(split)
    chosen = instruction.to_absolute({name: len(rows) for name, rows in splits.items()})
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in chosen]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def check_keys(directory: Directory, place: Path, has_subsets: bool) -> None:
    """Raise DataError if a file or folder cannot be a dataset, or a key makes no sense with it."""
    problems = []
    if place.is_file() and place.suffix.lower() != ".parquet":
        problems.append("expected owner/name, a .parquet file or a folder; for a .tar file set path")
    if directory.hf_subset is not None and not has_subsets:
        problems.append("has no subsets; remove hf_subset")
    if directory.hf_revision is not None:
        problems.append("is not on the Hub, and so has no revisions; remove hf_revision")
    if problems:
        raise DataError([f"hf_dataset {place}: {problem}" for problem in problems])


def make_builder(directory: Directory, place: Path, offline: bool) -> "DatasetBuilder":
    """Return what datasets would read a file, a folder or a name on the Hub with.

    No data is downloaded for it: on the Hub the card and the names of the files are read, also of those in zips.

    Raises:
        DataError: datasets finds nothing to read.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.parquet.parquet import Parquet

    name, subset = place.as_posix(), directory.hf_subset
    if not place.exists() and (offline or constants.HF_HUB_OFFLINE):
        advice = "offline mode is on, so load it once without, or set hf_subset to one that is cached"
        with explain_failure(place, advice):
            return Cache(repo_id=name, dataset_name=place.name, config_name=subset, version="auto", hash="auto")
    if place.is_dir():
        check_card(place)
    with explain_failure(place, "check hf_dataset, hf_subset and hf_revision"):
        if place.is_file():  # load_dataset_builder would ask a server to count that "parquet" was used
            return Parquet(data_files={"train": str(place.resolve())})
        # With all its folders, because "text" and the like are names of datasets' own.
        path = str(place.resolve()) if place.exists() else name
        return datasets.load_dataset_builder(path, subset, revision=directory.hf_revision)


def check_builder(directory: Directory, place: Path, builder: "DatasetBuilder") -> None:
    """Stop before data is read in a way that may read pickles or a database, or from files that lie elsewhere.

    Raises:
        DataError: it would be; or it is not of the revision that is asked for.
    """
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.parquet.parquet import Parquet

    if isinstance(builder, Cache):  # the latest that an earlier run made: without a connection datasets takes it, too
        if directory.hf_revision not in (None, builder.hash):
            raise DataError(
                f"hf_dataset {place}: revision {directory.hf_revision} cannot be looked up; the one in the cache is "
                f"commit {builder.hash}; set hf_revision to that, or load it once with a connection"
            )
        return
    if not isinstance(builder, ImageFolder | Parquet | Arrow):
        kind = type(builder).__module__.rpartition(".")[2]
        raise DataError(
            f"hf_dataset {place}: datasets would read it as {kind}; expected images in folders or zip files, parquet "
            "or arrow. For .tar files of images and captions set path"
        )
    inside = f"{place.resolve().as_posix()}/" if place.exists() else f"hf://datasets/{place.as_posix()}@"
    for file in itertools.chain(*(builder.config.data_files or {}).values()):
        if leads_out(file.replace("\\", "/").removeprefix(inside)):
            raise DataError(f"hf_dataset {place}: names data outside of itself, {file!a}, which is never read")


def check_card(place: Path) -> None:
    """Raise DataError if a folder's card cannot be read, or names data elsewhere, which datasets would look up."""
    import yaml  # type: ignore[import-untyped]
    from datasets import config
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    for file in (place / config.REPOCARD_FILENAME, place / config.REPOYAML_FILENAME):
        if not file.is_file():
            continue
        with explain_failure(place, f"repair its {file.name}"):
            text = file.read_text(encoding="utf-8")
            card = DatasetCard(text).data if file.suffix == ".md" else yaml.safe_load(text) or {}
            paths: list[str] = []
            for subset in MetadataConfigs.from_dataset_card_data(card).values():
                patterns = sanitize_patterns(subset.get("data_files") or [])
                paths += [subset.get("data_dir") or "", *itertools.chain(*patterns.values())]
            outside = next(filter(leads_out, paths), None)
        if outside is not None:
            raise DataError(
                f"hf_dataset {place}: its {file.name} names data outside of the folder, {outside!a}, which is "
                "never fetched; download that into the folder, or set hf_dataset to where it is"
            )


def leads_out(path: str) -> bool:
    """Return True if a path or pattern may lead out of the folder it is looked for in."""
    parts = re.split(r"[/\\]", path)
    return "://" in path or "::" in path or ".." in parts or Path(path).is_absolute()


@contextlib.contextmanager
def explain_failure(place: Path, advice: str) -> Iterator[None]:
    """Tell the user what datasets could not do.

    Raises:
        DataError: it failed.
        SpaceError: for lack of space.
    """
    import yaml
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError

    # What a damaged file, or a README.md or state.json of the wrong form, makes datasets raise.
    malformed = (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, zipfile.BadZipFile)
    try:
        yield
    except (DatasetsError, HTTPError, OSError, RuntimeError, ImportError, *malformed) as error:
        cause: BaseException = error
        while type(cause) is DatasetGenerationError and cause.__cause__ is not None:
            cause = cause.__cause__  # the outer one says nothing
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            raise SpaceError(
                f"hf_dataset {place}: datasets cannot write its copy ({cause.strerror}); free some space, or set "
                "HF_HOME to a folder with more"
            ) from error
        if isinstance(cause, DatasetNotFoundError):
            advice = "check hf_dataset and hf_revision; for a private one, log in with `hf auth login`"
        elif isinstance(cause, ConnectionError | HTTPError):
            advice = "check the connection; what was loaded once can be used with offline = true"
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:MAX_REASON].rstrip(".") or type(cause).__name__
        raise DataError(f"hf_dataset {place}: {reason}; {advice}") from error
