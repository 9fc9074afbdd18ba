"""The model files on the Hugging Face Hub, by way of huggingface_hub's cache.

A file that is in the cache for its revision is used as it is, and no connection is opened. Any other is downloaded by
huggingface_hub, which resumes a broken transfer and compares sizes, but not hashes; so the content is compared here
with the hash that the Hub announces, once, as it arrives. What can go wrong becomes an error that says what to do, down
to how to get the file by hand.
"""

import errno
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash

from anima_train.core.errors import ConfigError, ModelFileError, SpaceError, UserError
from anima_train.core.files import UNWRITABLE, sha256_file

log = logging.getLogger(__name__)

HTTPError = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, as huggingface_hub's release has it

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


@dataclass(frozen=True)
class HubFile:
    """One file in a Hub repository, or several of one folder there, wanted together in one local folder."""

    repo: str  # owner/name
    path: str
    revision: str = MAIN  # branch, tag or commit
    sha256: str | None = None  # in hex, from the reference
    beside: tuple[str, ...] = ()  # names of the other files

    @property
    def reference(self) -> str:
        """The text a user writes for it: `hf://owner/name@revision/path#sha256=...`; the main branch is left out.

        Of several files, that of their folder.
        """
        path = self.path.rpartition("/")[0] if self.beside else self.path
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        digest = "" if self.sha256 is None else f"#sha256={self.sha256}"
        return f"{SCHEME}{self.repo}{revision}/{path}{digest}".rstrip("/")

    @property
    def members(self) -> tuple["HubFile", ...]:
        """The files to download, each by itself."""
        others = [str(PurePosixPath(self.path).with_name(name)) for name in self.beside]
        return tuple(replace(self, path=path, beside=()) for path in (self.path, *others))


class Absent(ModelFileError):
    """A file of the Hub that is not here and cannot be fetched now."""

    def __init__(self, problems: str | Iterable[str], slot: str = "", reason: str = "") -> None:
        super().__init__(problems)
        self.slot, self.reason = slot, reason  # not known where the error of another process is raised again

    @classmethod
    def of(cls, slot: str, source: HubFile, reason: str, remedy: str) -> "Absent":
        """Return the error about a file of a slot."""
        here = f"not in the local Hub cache {constants.HF_HUB_CACHE}"
        return cls(f"{source.reference}: {here}, and {reason}. {remedy}", slot, reason)


def together(failures: Sequence[UserError], remedy: str = "run `anima download` once") -> list[str]:
    """Return the problems of several files, with one for all that are absent for want of a connection.

    Args:
        failures: one for each file.
        remedy: what to do with a connection.
    """
    absent = [failure for failure in failures if isinstance(failure, Absent)]
    if len(absent) < 2:
        return [problem for failure in failures for problem in failure.problems]
    slots = ", ".join(failure.slot for failure in absent)
    return [
        f"model: {len(absent)} files are not in the local Hub cache, and {absent[0].reason}: {remedy} "
        f"with a connection, or set {slots} in [model]",
        *(problem for failure in failures if not isinstance(failure, Absent) for problem in failure.problems),
    ]


ANIMA = "circlestone-labs/Anima"
OFFICIAL = {
    "transformer_path": HubFile(ANIMA, "split_files/diffusion_models/anima-base-v1.0.safetensors"),
    "vae_path": HubFile(ANIMA, "split_files/vae/qwen_image_vae.safetensors"),
    "llm_path": HubFile(ANIMA, "split_files/text_encoders/qwen_3_06b_base.safetensors"),
    "tokenizer_path": HubFile(
        "Qwen/Qwen3-0.6B", "tokenizer.json", beside=("tokenizer_config.json", "vocab.json", "merges.txt")
    ),
    "t5_tokenizer_path": HubFile("google-t5/t5-11b", "tokenizer.json", beside=("spiece.model", "config.json")),
}


def is_reference(text: str) -> bool:
    """Return True if a path in the config names a file on the Hub rather than on this machine."""
    return text.startswith(SCHEME)


def parse_reference(text: str) -> HubFile:
    """Return the file that `hf://owner/name[@revision]/path/in/repo[#sha256=...]` names.

    Raises:
        ConfigError: the text has another form, or leads out of the repository.
    """
    match = REFERENCE.fullmatch(text)
    if match is None or not text.isprintable():
        raise ConfigError(f'"{ascii(text)[1:-1]}": {EXPECTED_FORM}')
    revision = match["revision"] or MAIN
    try:
        validate_repo_id(match["repo"])
    except errors.HFValidationError as error:
        raise ConfigError(f'"{text}": "{match["repo"]}" is not a repository name; {EXPECTED_FORM}') from error
    # The revision and the path become folders of the local cache; backslash and colon mean something on Windows.
    for part in (revision, *match["path"].split("/")):
        if part in ("", ".", "..") or "\\" in part or ":" in part or "#sha256" in part:
            raise ConfigError(f'"{text}": "{part}" cannot be part of a path in a repository; {EXPECTED_FORM}')
    return HubFile(match["repo"], match["path"], revision, match["sha256"])


def resolve(slot: str, path: str | None, offline: bool = False) -> Path:
    """Return the local path for a slot of `[model]`: the path given, or its Hub file, or the official one.

    A local path is returned as it is; whether it exists is checked where it is read.

    Raises:
        ConfigError, ModelFileError, SpaceError: as `parse_reference` and `fetch` do.
    """
    if path is not None and not is_reference(path):
        return Path(path)
    return fetch(OFFICIAL[slot] if path is None else parse_reference(path), slot, offline)


def download_all() -> dict[str, Path]:
    """Return the local path of every official file, by slot; one that fails does not stop the others.

    Raises:
        ModelFileError, SpaceError: all problems in one report, of the kind of the first.
    """
    paths: dict[str, Path] = {}
    failures: list[UserError] = []
    for slot, source in OFFICIAL.items():
        try:
            paths[slot] = fetch(source, slot)
        except (ModelFileError, SpaceError) as error:
            failures.append(error)
    if failures:
        kind = ModelFileError if isinstance(failures[0], Absent) else type(failures[0])
        raise kind(together(failures, "run this command again"))
    return paths


def fetch(source: HubFile, slot: str, offline: bool = False) -> Path:
    """Return the local file or folder: from huggingface_hub's cache, else downloaded into it and checked.

    Args:
        source: what to fetch.
        slot: the key of `[model]` it is for, which errors name.
        offline: open no connection, as when the environment sets `HF_HUB_OFFLINE`.

    Raises:
        ModelFileError: not to be had, or damaged on the way, or not what `#sha256=` says, or a pickle.
        SpaceError: the cache's disk cannot hold it.
    """
    files = source.members
    for file in files:
        if file.path.lower().endswith(PICKLES):
            raise ModelFileError(
                f"{file.reference}: a {PurePosixPath(file.path).suffix} file is a pickle, which can run code when "
                "loaded; pickles are not loaded: use a .safetensors file"
            )
    paths = find_cached(files)
    if paths is None:
        remedy = by_hand(source, slot)
        if offline or constants.HF_HUB_OFFLINE:
            more = f"Run once with a connection (`anima download` for the official files), or {remedy}"
            raise Absent.of(slot, source, "offline mode is on", more)
        paths = [download(file, remedy, slot) for file in files]
        if len({path.parent for path in paths}) > 1:
            raise ModelFileError(
                f"{source.reference}: the repository changed during the download; run the command again"
            )
    for file, path in zip(files, paths, strict=True):
        if file.sha256 is not None and (found := sha256_file(path)) != file.sha256:
            raise ModelFileError(
                f"{file.reference}: found sha256 {found}; the file is not the one that is meant: check the reference, "
                "or whom you have it from"
            )
    return paths[0].parent if source.beside else paths[0]


def find_cached(files: Sequence[HubFile]) -> list[Path] | None:
    """Return the local paths of all these files if the cache has every one of them; opens no connection."""
    found = [try_to_load_from_cache(file.repo, file.path, revision=file.revision) for file in files]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths if len(paths) == len(files) else None


def origin_of(path: Path) -> HubFile | None:
    """Return the place on the Hub, with its commit, of a file in a local Hub cache; None for other files."""
    for folder in path.parents:
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            name = repository.removeprefix("models--").replace("--", "/")
            return HubFile(name, path.relative_to(folder).as_posix(), folder.name)
    return None


def download(file: HubFile, remedy: str, slot: str) -> Path:
    """Return a file's path in huggingface_hub's cache, into which it is downloaded, and checked.

    Raises:
        ModelFileError, SpaceError: with the remedy, where the Hub does not say what is wrong.
    """
    url = hf_hub_url(file.repo, file.path, revision=file.revision)
    try:
        # Asked once, for the hash, and because hf_hub_download tries half a minute where there is no connection.
        etag = (metadata := get_hf_file_metadata(url)).etag
        if etag is None or metadata.commit_hash is None:  # a hotel's login page, a company proxy
            raise ModelFileError(
                f"{file.reference}: {url} did not answer as the Hub does; check the proxy, whether this network wants "
                f"a login first, and HF_ENDPOINT if it is set; or {remedy}"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space")  # else it would go on until the disk is full
            path = Path(hf_hub_download(file.repo, file.path, revision=file.revision))
        verify(path, etag, file)
    except (HTTPError, OSError, RuntimeError, UserWarning) as error:
        raise explain(error, file, remedy, slot) from error
    return path


def verify(path: Path, etag: str, file: HubFile) -> None:
    """Remove a downloaded file from the cache unless it has the hash that the Hub announced.

    Args:
        path: of the file in a snapshot of the cache.
        etag: SHA-256 of a large file; of a small one, which lies in the git repository, git's SHA-1.
        file: for the message.

    Raises:
        ModelFileError: the hash is another, with both.
    """
    content, found = path.resolve(), None
    try:
        if len(etag) == 64:
            found = sha256_file(path)
        elif len(etag) == 40:
            found = git_hash(path.read_bytes())
        else:  # some mirrors
            log.warning("%s: the Hub announces no hash of it: only its size was checked", file.reference)
            found = etag
    finally:
        if found != etag:  # also when interrupted: then the next attempt finds the content, and checks it
            path.unlink(missing_ok=True)
    if found != etag:
        content.unlink(missing_ok=True)
        raise ModelFileError(
            f"{file.reference}: the download is damaged: found hash {found}, expected {etag}. It was removed; run the "
            "command again, and if this repeats, look for a proxy or a disk that alters files"
        )


def explain(error: Exception, file: HubFile, remedy: str, slot: str) -> UserError:
    """Return what huggingface_hub raised about a file as an error for the person at the terminal."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]  # the lines after it are for programmers
    if isinstance(error, errors.HfHubHTTPError):
        return ModelFileError(f"{file.reference}: {refusal(error, file)}")
    if isinstance(error, HTTPError | errors.LocalEntryNotFoundError):
        return Absent.of(slot, file, f"the Hub cannot be reached ({line})", f"Check the connection, or {remedy}")
    unwritable = isinstance(error, OSError) and error.errno in (*UNWRITABLE, errno.EPERM, errno.ENOTDIR)
    if unwritable or isinstance(error, UserWarning):
        return SpaceError(
            f"{file.reference}: the Hub cache could not be written: {line.rstrip('.')}; "
            "free some space, or set HF_HOME to a folder with room that you may write to"
        )
    return ModelFileError(f"{file.reference}: the download failed: {line}. Run the command again, or {remedy}")


def refusal(error: errors.HfHubHTTPError, file: HubFile) -> str:
    """Return the reason why the Hub did not give the file, and the remedy."""
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return (
            f"access to {file.repo} is gated: accept its conditions on its page on the Hub, "
            "then log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f'{file.repo} has no revision "{file.revision}"; check the name after the @'
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f'{file.repo} has no file "{file.path}" in revision "{file.revision}"; check the path'
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"there is no repository {file.repo}, or it is private: check the name, or log in with `hf auth login`"
    if status == 403:
        return f"your access token may not read {file.repo}; log in with `hf auth login` and a token that may"
    if status == 404:
        return f'the Hub has no such file; check the name {file.repo}, the path and the revision "{file.revision}"'
    return f"the Hub answered with status {status}; try again later"


def by_hand(source: HubFile, slot: str) -> str:
    """Return the steps to get the files without this program, and the key that then names them."""
    names = ", ".join(file.path for file in source.members)
    revision = "" if source.revision == MAIN else f" at revision {source.revision}"
    url = hf_hub_url(source.repo, source.path, revision=source.revision) + (" and beside it" if source.beside else "")
    put = "put them into one folder anywhere" if source.beside else "put it anywhere"
    example = "that/folder" if source.beside else PurePosixPath(source.path).name
    return (
        f"get {names} from the Hub repository {source.repo}{revision} ({url}), "
        f'{put} and set model.{slot} = "/path/to/{example}"'
    )
