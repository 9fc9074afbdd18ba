"""Model files from the Hugging Face Hub: downloaded once into its local cache, and checked there before use.

A file is asked for by its place in a repository. In the cache it is used as it is; else it is downloaded, its size and
hash are compared with what the Hub announced, and a file that differs is removed. A file already in the cache was
checked when it arrived, so using it opens no connection. A branch or tag is pinned: the commit that it meant when it
was first used is remembered in the cache, and used from then on. Everything that can go wrong on the way becomes an
error that says what to do, down to where to get the file by hand.
"""

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)

# HTTPError comes from httpx or httpx2, whichever this release of huggingface_hub is built on.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from anima_train.core.errors import ConfigError, ModelFileError, SpaceError, UserError
from anima_train.core.files import HASH_CHUNK, sha256_file, write_text

SCHEME = "hf://"
MAIN = "main"
REFERENCE = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?/(?P<path>.+?)(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)
EXPECTED_FORM = (
    "expected hf://owner/name[@revision]/path/in/the/repository[#sha256=64 digits], "
    "for example hf://circlestone-labs/Anima/split_files/vae/qwen_image_vae.safetensors"
)
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")

# The Hub's etag is the file's hash: SHA-256 for large files, git's own for those that lie in the repository itself.
SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_BLOB = re.compile(r"[0-9a-f]{40}")
COMMIT = re.compile(r"[0-9a-f]{40}")
PINS = "anima-train"  # our folder among a cached repository's refs, which are files that hold a commit

CACHE_CANNOT_BE_WRITTEN = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class HubFile:
    """One file in a Hub repository."""

    repo: str  # owner/name
    path: str
    revision: str = MAIN  # branch, tag or commit
    sha256: str | None = None  # what the user says it is, in hex

    @property
    def reference(self) -> str:
        """`hf://owner/name@revision/path#sha256=...`, without the revision when it is the main branch."""
        return reference(self.repo, self.revision, self.path) + (f"#sha256={self.sha256}" if self.sha256 else "")

    @property
    def members(self) -> tuple["HubFile", ...]:
        """The files to download: this one."""
        return (self,)


@dataclass(frozen=True)
class HubFolder:
    """Some files of one folder in a Hub repository, wanted together in one local folder."""

    repo: str  # owner/name
    folder: str  # "" is the top of the repository
    files: tuple[str, ...]  # names in that folder
    revision: str = MAIN

    @property
    def reference(self) -> str:
        """`hf://owner/name@revision/folder`, without the revision when it is the main branch."""
        return reference(self.repo, self.revision, self.folder)

    @property
    def members(self) -> tuple[HubFile, ...]:
        """The files to download."""
        return tuple(HubFile(self.repo, str(PurePosixPath(self.folder, name)), self.revision) for name in self.files)


Source = HubFile | HubFolder

ANIMA = "circlestone-labs/Anima"
OFFICIAL: dict[str, Source] = {
    "transformer_path": HubFile(ANIMA, "split_files/diffusion_models/anima-base-v1.0.safetensors"),
    "vae_path": HubFile(ANIMA, "split_files/vae/qwen_image_vae.safetensors"),
    "llm_path": HubFile(ANIMA, "split_files/text_encoders/qwen_3_06b_base.safetensors"),
    "tokenizer_path": HubFolder(
        "Qwen/Qwen3-0.6B", "", ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    ),
    "t5_tokenizer_path": HubFolder("google-t5/t5-11b", "", ("tokenizer.json", "spiece.model", "config.json")),
}


def reference(repo: str, revision: str, path: str) -> str:
    """The text a user writes for a place on the Hub."""
    at = "" if revision == MAIN else f"@{revision}"
    return f"{SCHEME}{repo}{at}/{path}".rstrip("/")


def is_reference(text: str) -> bool:
    """Whether a path in the config names a file on the Hub rather than on this machine."""
    return text.startswith(SCHEME)


def parse_reference(text: str) -> HubFile:
    """The file that `hf://owner/name[@revision]/path/in/repo[#sha256=...]` names.

    Raises:
        ConfigError: the text has another form, or leads out of the repository.
    """
    match = REFERENCE.fullmatch(text)
    if match is None or not text.isprintable():
        raise ConfigError(f'"{ascii(text)[1:-1]}": {EXPECTED_FORM}')
    revision = match["revision"] or MAIN
    try:
        validate_repo_id(match["repo"])
    except HFValidationError as error:
        raise ConfigError(f'"{text}": "{match["repo"]}" is not a repository name; {EXPECTED_FORM}') from error
    # The revision and the path become folders of the local cache; backslash and colon mean something on Windows.
    for part in (revision, *match["path"].split("/")):
        if part in ("", ".", "..") or "\\" in part or ":" in part or "#sha256" in part:
            raise ConfigError(f'"{text}": "{part}" cannot be part of a path in a repository; {EXPECTED_FORM}')
    return HubFile(match["repo"], match["path"], revision, match["sha256"])


def resolve(
    slot: str,
    path: str | None,
    offline: bool = False,
    say: Say = print,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The local path for a slot of `[model]`: the path given, or the Hub file it refers to, or the official one.

    A local path is returned as it is; whether it exists is checked where it is read.

    Raises:
        ConfigError, ModelFileError, SpaceError: as `parse_reference` and `fetch` do.
    """
    if path is not None and not is_reference(path):
        return Path(path)
    source = OFFICIAL[slot] if path is None else parse_reference(path)
    return fetch(source, offline, say, slot=slot, endpoint=endpoint, cache_dir=cache_dir)


def download_all(
    offline: bool = False,
    say: Say = print,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> dict[str, Path]:
    """Every official file, by slot; one that fails does not stop the others.

    Raises:
        ModelFileError, SpaceError: all problems in one report, of the kind of the first.
    """
    paths: dict[str, Path] = {}
    failures: list[UserError] = []
    for slot, source in OFFICIAL.items():
        try:
            paths[slot] = fetch(source, offline, say, slot=slot, endpoint=endpoint, cache_dir=cache_dir)
        except (ModelFileError, SpaceError) as error:
            failures.append(error)
    if failures:
        raise type(failures[0])([problem for failure in failures for problem in failure.problems])
    return paths


def fetch(
    source: Source,
    offline: bool = False,
    say: Say = print,
    *,
    slot: str | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The local file or folder: from the local Hub cache, else downloaded into it and checked.

    Args:
        source: what to fetch.
        offline: open no connection, as when the environment sets `HF_HUB_OFFLINE`.
        say: is told in one line what is downloaded; the progress bar is huggingface_hub's.
        slot: the key of `[model]` this is for, to name it in errors; else found in `OFFICIAL`.
        endpoint: address of another Hub; else `HF_ENDPOINT` or the public one.
        cache_dir: another cache folder; else huggingface_hub's (`HF_HUB_CACHE`, `HF_HOME`).

    Raises:
        ModelFileError: not to be had, or damaged on the way, or a pickle; says what to do.
        SpaceError: the disk cannot hold it.
    """
    for file in source.members:
        if file.path.lower().endswith(PICKLES):
            raise ModelFileError(
                f"{file.reference}: a {PurePosixPath(file.path).suffix} file is a pickle, which can run code when "
                "loaded; pickles are not loaded: use a .safetensors file"
            )
    cache = cache_dir or Path(constants.HF_HUB_CACHE)
    pin = pin_path(source, cache)
    pinned = read_pin(pin)
    members = [replace(file, revision=pinned or file.revision) for file in source.members]
    paths = find_cached(members, cache)
    if paths is None:
        remedy = by_hand(source, slot, endpoint)
        if offline or constants.HF_HUB_OFFLINE:
            raise ModelFileError(
                f"{source.reference}: not in the local Hub cache {cache}, and offline mode is on. "
                f"Run once with a connection (`anima download` for the official files), or {remedy}"
            )
        try:
            paths = download(source, members, remedy, say, endpoint, cache)
        except ModelFileError as error:
            if pinned is None or not isinstance(error.__cause__, RevisionNotFoundError | RemoteEntryNotFoundError):
                raise
            raise ModelFileError(
                f"{error}; {source.revision} is pinned to commit {pinned} in the local Hub cache: to take what it "
                f"means now, remove {pin}"
            ) from error
    check_digests(members, paths)
    if pinned is None and not COMMIT.fullmatch(source.revision):
        write_pin(pin, paths[0], say)
    return paths[0].parent if isinstance(source, HubFolder) else paths[0]


def pin_path(source: Source, cache: Path) -> Path:
    """The file that holds the commit which the source's revision means here."""
    return cache / repo_folder_name(repo_id=source.repo, repo_type="model") / "refs" / PINS / source.revision


def read_pin(path: Path) -> str | None:
    """The commit that a revision is pinned to, if it is."""
    try:
        commit = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def write_pin(pin: Path, file: Path, say: Say) -> None:
    """Remember the commit of a cached file for its revision, also where another program moves the branch on."""
    origin = origin_of(file)
    if origin is None or not COMMIT.fullmatch(origin.revision):
        return
    try:
        write_text(pin, origin.revision)
    except (SpaceError, OSError):  # a cache that is shared, and only read here
        say(f"note: {pin} could not be written, so that {pin.name} may mean another commit next time")


def origin_of(path: Path) -> HubFile | None:
    """Where a file in a local Hub cache is from, with its commit; None for other files."""
    for folder in path.parents:
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            name = repository.removeprefix("models--").replace("--", "/")
            return HubFile(name, path.relative_to(folder).as_posix(), folder.name)
    return None


def check_digests(files: Iterable[HubFile], paths: Iterable[Path]) -> None:
    """Compare files with what the user says they are.

    Raises:
        ModelFileError: one is another, with both hashes.
    """
    for file, path in zip(files, paths, strict=True):
        if file.sha256 is not None and (found := sha256_file(path)) != file.sha256:
            raise ModelFileError(
                f"{file.reference}: found sha256 {found}; the file is not the one that is meant: check the reference, "
                "or whom you have it from"
            )


def find_cached(files: Sequence[HubFile], cache: Path) -> list[Path] | None:
    """The paths of all these files if the local cache has every one of them."""
    found = [try_to_load_from_cache(file.repo, file.path, cache, file.revision) for file in files]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths if len(paths) == len(found) else None


def download(
    source: Source, files: Sequence[HubFile], remedy: str, say: Say, endpoint: str | None, cache: Path
) -> list[Path]:
    """Download what the cache lacks of a source's files, and check every one."""
    announced: list[HfFileMetadata] = []
    for file in files:
        with explained(file, remedy):
            announced.append(ask(file, remedy, endpoint))

    blobs = cache / repo_folder_name(repo_id=source.repo, repo_type="model") / "blobs"
    missing = [
        (PurePosixPath(file.path).name, metadata.size or 0)
        for file, metadata in zip(files, announced, strict=True)
        if not (blobs / str(metadata.etag)).exists()  # else another revision brought the same content
    ]
    if missing:
        num_bytes = sum(size for _, size in missing)
        check_space(source, num_bytes, blobs)
        size = f" ({size_text(num_bytes)})" if num_bytes else ""
        say(f"downloading {', '.join(name for name, _ in missing)}{size} from {source.repo}")

    paths = []
    for file, metadata in zip(files, announced, strict=True):
        with explained(file, remedy):
            path = hf_hub_download(file.repo, file.path, revision=file.revision, endpoint=endpoint, cache_dir=cache)
        check(Path(path), file, metadata, say)
        paths.append(Path(path))
    if len({path.parent for path in paths}) > 1 and isinstance(source, HubFolder):
        raise ModelFileError(f"{source.reference}: the repository changed during the download; run the command again")
    return paths


def ask(file: HubFile, remedy: str, endpoint: str | None) -> HfFileMetadata:
    """What the Hub announces about the file; asked once, so that no connection is noticed at once."""
    metadata = get_hf_file_metadata(address(file, endpoint), endpoint=endpoint)
    if metadata.etag is None or metadata.commit_hash is None:
        # A hotel's login page or a company proxy answers every address with a page of its own.
        raise ModelFileError(
            f"{file.reference}: {address(file, endpoint)} did not answer as the Hub does; check the proxy, "
            f"whether this network wants a login first, and HF_ENDPOINT if it is set; or {remedy}"
        )
    return metadata


def check_space(source: Source, num_bytes: int, folder: Path) -> None:
    """Raise SpaceError unless the disk that holds the folder has room for so many bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SpaceError(
            f"{source.reference}: the download needs {num_bytes:,} bytes and the disk of {folder} has {free:,} bytes "
            "free; free some space, or set HF_HOME to a folder on a larger disk"
        )


def check(path: Path, file: HubFile, announced: HfFileMetadata, say: Say) -> None:
    """Compare a downloaded file with what the Hub announced, and remove it from the cache if they differ.

    Raises:
        ModelFileError: size or hash differ, with both values.
    """
    blob = path.resolve()
    finished = False
    try:
        problem = difference(blob, file, announced, say)
        finished = True
    finally:
        if not finished:
            # Interrupted (Ctrl-C while 4 GB are hashed): without the link in the snapshot the file does not count as
            # cached, and the next attempt finds the content and only checks it.
            path.unlink(missing_ok=True)
    if problem:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise ModelFileError(
            f"{file.reference}: the download is damaged: {problem}. It was removed; run the command again, and if this "
            "repeats, look for a proxy or a disk that alters files"
        )


def difference(path: Path, file: HubFile, announced: HfFileMetadata, say: Say) -> str:
    """How the file differs from what the Hub announced; empty if it does not."""
    size = path.stat().st_size
    if announced.size is not None and announced.size != size:
        return f"found {size:,} bytes, expected {announced.size:,}"
    etag = announced.etag or ""
    if SHA256.fullmatch(etag):
        kind, found = "sha256", sha256_file(path)
    elif GIT_BLOB.fullmatch(etag):
        kind, found = "git blob sha1", git_blob_hash(path)
    else:
        say(f"{PurePosixPath(file.path).name}: the Hub reports no hash for it, so only its size was checked")
        return ""
    return "" if found == etag else f"found {kind} {found}, expected {etag}"


def git_blob_hash(path: Path) -> str:
    """The name git gives the file's content: SHA-1 of `blob <size>`, a zero byte and the bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def explained(file: HubFile, remedy: str) -> Iterator[None]:
    """Turn what huggingface_hub raises about a file into errors for the person at the terminal."""
    try:
        yield
    except HfHubHTTPError as error:
        raise ModelFileError(f"{file.reference}: {refusal(error, file)}") from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise ModelFileError(
            f"{file.reference}: not in the local Hub cache, and the Hub cannot be reached ({first_line(error)}). "
            f"Check the connection, or {remedy}"
        ) from error
    except OSError as error:
        if error.errno in CACHE_CANNOT_BE_WRITTEN:
            raise SpaceError(
                f"{file.reference}: the Hub cache could not be written: {error}; "
                "set HF_HOME to a folder with room that you may write to"
            ) from error
        raise ModelFileError(failure(file, error, remedy)) from error
    except RuntimeError as error:  # how hf_xet, which transfers large files, reports whatever goes wrong
        raise ModelFileError(failure(file, error, remedy)) from error


def refusal(error: HfHubHTTPError, file: HubFile) -> str:
    """Why the Hub did not give the file, and what to do about it."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"access to {file.repo} is gated: accept its conditions on its page on the Hub, "
            "then log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f'{file.repo} has no revision "{file.revision}"; check the name after the @'
    if isinstance(error, RemoteEntryNotFoundError):
        return f'{file.repo} has no file "{file.path}" in revision "{file.revision}"; check the path'
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return f"there is no repository {file.repo}, or it is private: check the name, or log in with `hf auth login`"
    if status == 403:
        return f"your access token may not read {file.repo}; log in with `hf auth login` and a token that may"
    if status == 404:
        return f'the Hub has no such file; check the name {file.repo}, the path and the revision "{file.revision}"'
    return f"the Hub answered with status {status}; try again later"


def failure(file: HubFile, error: OSError | RuntimeError, remedy: str) -> str:
    """The sentence for a download that broke off."""
    return f"{file.reference}: the download failed: {first_line(error)}. Run the command again, or {remedy}"


def by_hand(source: Source, slot: str | None, endpoint: str | None) -> str:
    """How to get the files without this program, and the key that then names them."""
    key = slot or next((name for name, official in OFFICIAL.items() if official == source), None)
    setting = f"set model.{key} =" if key else "give, instead of the reference,"
    first = source.members[0]
    names = ", ".join(file.path for file in source.members)
    repository = f"the Hub repository {source.repo}"
    if source.revision != MAIN:
        repository += f" at revision {source.revision}"
    if isinstance(source, HubFolder):
        return (
            f"get {names} from {repository} ({address(first, endpoint)} and beside it), "
            f'put them into one folder anywhere and {setting} "/path/to/that/folder"'
        )
    return (
        f"get {names} from {repository} ({address(first, endpoint)}), "
        f'put it anywhere and {setting} "/path/to/{PurePosixPath(source.path).name}"'
    )


def address(file: HubFile, endpoint: str | None) -> str:
    """The address of the file's content on the Hub."""
    return hf_hub_url(file.repo, file.path, revision=file.revision, endpoint=endpoint)


def first_line(error: Exception) -> str:
    """The first line of an exception's message; the lines after it are for programmers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def size_text(num_bytes: int) -> str:
    """A size in decimal units, three digits: `4.18 GB`, `254 MB`."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
