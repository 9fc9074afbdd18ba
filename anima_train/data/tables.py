"""Hugging Face datasets as a source of images: each row stands for an image file with its captions and its mask."""

import contextlib
import errno
import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from anima_train.core.errors import DataError, SpaceError
from anima_train.data.captions import cleaned
from anima_train.data.facts import file_stamp
from anima_train.data.folders import Files, stem_of
from anima_train.data.images import MAX_BYTES, BadImage, Unreadable, read_file
from anima_train.data.settings import Directory
from anima_train.data.stored import Stored

if TYPE_CHECKING:  # slow to import, and needed by those alone who have such a dataset
    from datasets import Dataset, DatasetBuilder

SAVED_FILES = ("state.json", "dataset_dict.json")  # in folders that `save_to_disk` wrote
IN_ZIP = re.compile(r"zip://(?P<member>.+)::(?P<archive>.+)")  # how datasets names what is in an archive
TEXTS = ("string", "large_string", "string_view", "null")
BINARY = ("binary", "large_binary", "binary_view")
MAX_REASON = 300  # characters
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def table_files(directory: Directory, place: Path, offline: bool) -> Files:
    """The rows of a Hugging Face dataset as if they were files.

    Each is named by the file that it was made from, or by its number where that is not known; all are named by their
    numbers where those names are not unique.

    Args:
        directory: which dataset, split and columns.
        place: where it is, or its name on the Hub.
        offline: whether nothing may be looked up on the Hub.

    Raises:
        DataError: it cannot be loaded, or columns are missing or hold something else; for all columns at once.
        SpaceError: there is no room for datasets' own copy.
    """
    table = loaded(directory, place, offline)
    check_columns(directory, place, table)
    images = column_images(table, directory.image_column, place)
    names = row_names(images.paths, place)
    stored_masks: dict[str, Stored] = {}
    masks: dict[str, list[str]] = {}
    if directory.mask_column:
        for name, mask in zip(names, column_images(table, directory.mask_column, place).rows, strict=True):
            if mask is not None:
                label = f"{directory.mask_column}/{stem_of(name)}"
                stored_masks[label] = mask
                masks[stem_of(name)] = [label]
    where = str(place.resolve()) if place.exists() else place.as_posix()
    parts = (where, directory.hf_subset or "", directory.hf_split, directory.hf_revision or "")
    identity = os.fsencode("\0".join(parts))
    return Files(
        folder=place,
        mask_folder=place if directory.mask_column else None,
        stored={name: image or NoImage() for name, image in zip(names, images.rows, strict=True)},
        stored_masks=stored_masks,
        images=names,
        captions={},
        natural={},
        given=column_texts(table, directory.caption_column, names, place),
        given_natural=column_texts(table, directory.natural_column, names, place),
        masks=masks,
        subfolders=[],
        again=[],
        others=[],
        identity=identity,
        mask_identity=identity,
        is_table=True,
    )


# Where the images are


@dataclass(frozen=True, slots=True)
class TableImage:
    """An image that is in a table."""

    column: "Dataset"  # that column alone, as Arrow
    row: int
    content: tuple[int, int]  # of the table

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Of the row, and the table."""
        return self.row, *self.content

    def read(self) -> bytes:
        """The content."""
        value = self.column[self.row].column(0)[0].as_py()
        content: bytes = value["bytes"] if isinstance(value, dict) else value
        return content


@dataclass(frozen=True, slots=True)
class TableFile:
    """An image that a table names, and does not hold."""

    path: Path

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Of the file."""
        return file_stamp(self.path)

    def read(self) -> bytes:
        """The content.

        Raises:
            BadImage: as `read_file`.
        """
        return read_file(self.path)


@dataclass(frozen=True, slots=True)
class ZipMember:
    """An image in a zip archive, as in many image folders on the Hub."""

    archive: Path
    member: str

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Of the archive."""
        return file_stamp(self.archive)

    def read(self) -> bytes:
        """The content.

        Raises:
            Unreadable: the archive cannot be read, or the member in it.
        """
        try:
            with zipfile.ZipFile(self.archive) as archive:
                if (num_bytes := archive.getinfo(self.member).file_size) > MAX_BYTES:  # no more than this is unpacked
                    raise Unreadable(f"{num_bytes:,} bytes is more than the limit of {MAX_BYTES:,}")
                return archive.read(self.member)
        except KeyError as error:
            raise Unreadable(f"it is not in {self.archive.name} any more") from error
        # RuntimeError: encrypted; NotImplementedError, a kind of it: packed in a way that Python does not know.
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise Unreadable(f"{self.archive.name} is not readable ({error})") from error


@dataclass(frozen=True, slots=True)
class NoImage:
    """What stands in a row without an image."""

    stamp: tuple[int, int, int] = (0, 0, 0)

    def read(self) -> bytes:
        """Nothing.

        Raises:
            BadImage: always.
        """
        raise BadImage("no image in this row")


# Columns


@dataclass(frozen=True)
class Images:
    """A column of images, by row."""

    rows: list[Stored | None]
    paths: list[str]  # of the files they were made from; "" where that is not known


def column_images(table: "Dataset", name: str, place: Path) -> Images:
    """Where the images of a column are; none is read, and no row without one has any."""
    column = table.select_columns([name]).with_format("arrow")  # as Arrow, so that nothing is decoded
    parts = column[:].flatten()  # into bytes and path, if it is not bytes alone
    is_bare = parts.column_names == [name]
    is_missing = parts.column(name if is_bare else f"{name}.bytes").is_null().to_pylist()
    paths = [""] * len(is_missing) if is_bare else [path or "" for path in parts.column(f"{name}.path").to_pylist()]
    content = content_of_table(table, name)
    rows: list[Stored | None] = []
    for row, (missing, path) in enumerate(zip(is_missing, paths, strict=True)):
        if not missing:
            rows.append(TableImage(column, row, content))
        else:
            rows.append(file_of(path, place) if path else None)
    return Images(rows, paths)


def file_of(path: str, place: Path) -> Stored:
    """The file that a table names; one without a folder of its own lies beside the table."""
    if match := IN_ZIP.fullmatch(path):
        return ZipMember(Path(match["archive"]), match["member"])
    return TableFile((place if place.is_dir() else place.parent) / path)


def content_of_table(table: "Dataset", column: str) -> tuple[int, int]:
    """What changes when the content of a column may have; the same in every run, without reading any row."""
    files = [file_stamp(Path(file["filename"]))[:2] for file in table.cache_files]
    digest = hashlib.sha256(repr((table._fingerprint, column, files)).encode()).digest()
    return int.from_bytes(digest[:7], "big"), int.from_bytes(digest[7:14], "big")


def row_names(paths: Sequence[str], place: Path) -> list[str]:
    """A name for each row, none like another but for its ending: captions and masks are found by it."""
    top = place.resolve()
    numbers = [f"{row:08}" for row in range(len(paths))]
    names = [file_name(path, top) or number for path, number in zip(paths, numbers, strict=True)]
    return names if len({stem_of(name) for name in names}) == len(names) else numbers


def file_name(path: str, top: Path) -> str:
    """A file's path below a folder, or else its name alone, without the folders of whoever made the table."""
    if match := IN_ZIP.fullmatch(path):
        path = match["member"]
    elif Path(path).is_relative_to(top):
        return Path(path).relative_to(top).as_posix()
    return PurePosixPath(path.replace("\\", "/")).name


def column_texts(table: "Dataset", name: str, names: Sequence[str], place: Path) -> dict[str, tuple[str, ...]]:
    """The captions of each row that has one; there is no column "".

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
    """Stop where a column is missing, or holds something else than it should.

    Raises:
        DataError: what is wrong with all columns.
    """
    wanted = {
        "image_column": (directory.image_column, "images"),
        "caption_column": (directory.caption_column, "texts or lists of texts"),
        "natural_column": (directory.natural_column, "texts or lists of texts"),
        "mask_column": (directory.mask_column, "images"),
    }
    problems = []
    for key, (name, expected) in wanted.items():
        if not name:
            continue
        or_none = "" if key == "image_column" else ', or to "" for none'
        if name not in table.column_names:
            found = ", ".join(map(repr, table.column_names)) or "none"
            problems.append(f"hf_dataset {place}: no column {name!r}; found {found}. Set {key} to one of them{or_none}")
        elif not (holds_images if expected == "images" else holds_texts)(table.features[name]):
            found = repr(table.features[name])
            found = found if len(found) < 100 else f"{found[:100]}..."
            problems.append(
                f"hf_dataset {place}: the column {name!r} holds {found}, expected {expected}; "
                f"set {key} to another{or_none}"
            )
    if problems:
        raise DataError(problems)


def holds_images(feature: Any) -> bool:
    """Whether a column of this kind can be read as images: encoded ones, with or without the path of their file."""
    import datasets

    if isinstance(feature, dict):  # as datasets' own, but written by something else
        kinds = {key: getattr(part, "dtype", "") for key, part in feature.items()}
        return kinds.keys() == {"bytes", "path"} and kinds["bytes"] in BINARY and kinds["path"] in TEXTS
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in BINARY


def holds_texts(feature: Any) -> bool:
    """Whether a column of this kind holds a text, or a list of texts, in each row."""
    import datasets

    if isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in TEXTS


# Loading


def loaded(directory: Directory, place: Path, offline: bool) -> "Dataset":
    """The rows that the directory's keys choose.

    Raises:
        DataError: there is no such dataset, subset or split, or it cannot be read or downloaded.
        SpaceError: there is no room for datasets' own copy.
    """
    import datasets

    if sys.stderr is None or not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would fill a log
    is_here = place.exists()
    is_saved = any((place / name).is_file() for name in SAVED_FILES)
    check_keys(directory, place, is_saved)
    if is_saved:
        with explained(place, "write it again with save_to_disk"):
            whole = datasets.load_from_disk(str(place))
    elif place.is_file():
        with explained(place, "repair the file, or download it again"):
            # Not load_dataset, which asks a server to count that it was used.
            whole = datasets.Dataset.from_parquet(str(place.resolve()))
    if is_saved or place.is_file():
        with explained(place, "set hf_split"):
            return rows_of(whole, directory.hf_split)
    if not is_here and (offline or constants.HF_HUB_OFFLINE):
        with explained(place, "offline mode is on, so load it once without, or set hf_subset to one that is cached"):
            builder = cached_builder(directory, place)
    else:
        if is_here:
            check_card(place)
        with explained(place, "check hf_dataset, hf_subset and hf_revision"):
            builder = found_builder(directory, place)
    with explained(place, "set hf_revision to that, or load it once with a connection"):
        check_revision(directory.hf_revision, builder)
    check_builder(place, builder)
    with explained(place, "repair its files, or download them again"):
        builder.download_and_prepare()
    with explained(place, "set hf_split"):
        return builder.as_dataset(split=directory.hf_split)


def check_keys(directory: Directory, place: Path, is_saved: bool) -> None:
    """Stop where the place, or a key with it, makes no sense.

    Raises:
        DataError: what is wrong with all of them.
    """
    if not place.exists():
        return
    problems = []
    if place.is_file() and place.suffix.lower() != ".parquet":
        problems.append(
            f"hf_dataset {place}: expected owner/name, a .parquet file or a folder; for a .tar file set path"
        )
    if directory.hf_subset is not None and (is_saved or place.is_file()):
        problems.append(f"hf_dataset {place}: has no subsets; remove hf_subset")
    if directory.hf_revision is not None:
        problems.append(f"hf_dataset {place}: is not on the Hub, and so has no revisions; remove hf_revision")
    if problems:
        raise DataError(problems)


def found_builder(directory: Directory, place: Path) -> "DatasetBuilder":
    """What makes the table from its files, here or on the Hub; datasets refuses those that come with code."""
    import datasets

    # With all its folders, because "text" and the like are names of datasets' own.
    path = str(place.resolve()) if place.exists() else place.as_posix()
    return datasets.load_dataset_builder(path, directory.hf_subset, revision=directory.hf_revision)


def check_card(place: Path) -> None:
    """Stop where a folder's own settings name data elsewhere: datasets looks that up before it is asked to load it.

    Raises:
        DataError: they do, or cannot be read.
    """
    import yaml  # type: ignore[import-untyped]
    from datasets import config
    from huggingface_hub import DatasetCard

    for name in (config.REPOCARD_FILENAME, config.REPOYAML_FILENAME):
        file = place / name
        if not file.is_file():
            continue
        with explained(place, f"repair its {name}"):
            text = file.read_text(encoding="utf-8")
            card: object = vars(DatasetCard(text).data) if file.suffix == ".md" else yaml.safe_load(text)
        if foreign := next((path for path in named_places(card) if leads_out(path)), None):
            raise DataError(
                f"hf_dataset {place}: its {name} names data outside of the folder, {foreign!a}, which is "
                "never fetched; download that into the folder, or set hf_dataset to where it is"
            )


def named_places(value: object, is_place: bool = False) -> Iterator[str]:
    """Every text below the keys that say where data lies, in nested tables and lists."""
    if isinstance(value, str) and is_place:
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from named_places(each, is_place or name in ("data_files", "data_dir"))
    elif isinstance(value, list):
        for each in value:
            yield from named_places(each, is_place)


def leads_out(path: str) -> bool:
    """Whether a path or pattern may lead out of the folder it is looked for in."""
    parts = re.split(r"[/\\]", path)
    return "://" in path or "::" in path or ".." in parts or Path(path).is_absolute()


def check_builder(place: Path, builder: "DatasetBuilder") -> None:
    """Stop where a table is made in a way that may read pickles or a database, or from files that lie elsewhere.

    Raises:
        DataError: it is.
    """
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.parquet.parquet import Parquet

    if isinstance(builder, Cache):  # made by one of those below, in an earlier run
        return
    if not isinstance(builder, ImageFolder | Parquet | Arrow):
        kind = type(builder).__module__.rpartition(".")[2]
        raise DataError(
            f"hf_dataset {place}: datasets would read it as {kind}; expected images in folders or zip files, parquet "
            "or arrow. For .tar files of images and captions set path"
        )
    inside = f"{place.resolve().as_posix()}/" if place.exists() else f"hf://datasets/{place.as_posix()}@"
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if leads_out(file.replace("\\", "/").removeprefix(inside)):
                raise DataError(f"hf_dataset {place}: names data outside of itself, {file!a}, which is never read")


def cached_builder(directory: Directory, place: Path) -> "DatasetBuilder":
    """What reads a table of the Hub that an earlier run has made, without any connection.

    Raises:
        ValueError: there is none.
    """
    from datasets.packaged_modules.cache.cache import Cache

    name = place.as_posix()
    return Cache(repo_id=name, dataset_name=place.name, config_name=directory.hf_subset, version="auto", hash="auto")


def check_revision(revision: str | None, builder: "DatasetBuilder") -> None:
    """Stop where what is cached is another revision: datasets takes the latest there is, without a connection too.

    Raises:
        ValueError: it is, or may be.
    """
    from datasets.packaged_modules.cache.cache import Cache

    if isinstance(builder, Cache) and revision not in (None, builder.hash):
        raise ValueError(f"revision {revision} cannot be looked up; the one in the cache is commit {builder.hash}")


def rows_of(whole: Any, split: str) -> "Dataset":
    """The rows that a split chooses of one table or, by their splits, several; one alone is "train" unless it says."""
    import datasets

    tables = whole if isinstance(whole, dict) else {str(whole.split or "train"): whole}
    instruction = datasets.ReadInstruction.from_spec(split)
    chosen = instruction.to_absolute({name: len(table) for name, table in tables.items()})
    parts = [tables[part.splitname].select(range(part.from_, part.to)) for part in chosen]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


@contextlib.contextmanager
def explained(place: Path, advice: str) -> Iterator[None]:
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
