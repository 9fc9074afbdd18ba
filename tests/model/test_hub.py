"""Downloads from a Hub that runs in this process on 127.0.0.1, with real requests, redirects, cache and hashes."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import close_session, constants, hf_hub_download

from anima_train.core.errors import ConfigError, ModelFileError, SpaceError
from anima_train.model import hub as model_hub
from anima_train.model.hub import (
    OFFICIAL,
    HubFile,
    download_all,
    fetch,
    is_reference,
    origin_of,
    parse_reference,
    resolve,
)

COMMIT = "c0ffee" + "0" * 34
LATER = "badcab" + "0" * 34
VAE = HubFile("owner/model", "split_files/vae/vae.safetensors")
TOKENIZER = HubFile("owner/text", "tokenizer.json", beside=("vocab.json",))
LARGE = bytes(range(256)) * 400


@dataclass
class Served:
    """One file of the Hub, and how it misbehaves."""

    content: bytes = b""
    etag: str = ""  # "" = the right one
    announced_size: int | None = None  # None = the right one
    large: bool = False  # kept outside the repository: SHA-256 as etag, the content behind a redirect
    chunked: bool = False  # a large file in Xet storage: fetched in chunks by hf_xet, not by a redirect
    commit: str = COMMIT  # "" = the header is missing, as from a login page
    status: int = 200
    error_code: str = ""
    breaks_at: int | None = None  # the first transfer stops after so many bytes

    @property
    def hash(self) -> str:
        """The etag: SHA-256 of a large file, git's SHA-1 of a small one."""
        if self.etag:
            return self.etag
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob " + str(len(self.content)).encode() + b"\0" + self.content).hexdigest()


@dataclass
class Hub:
    """A Hub and, on another port, the storage that its redirects lead to."""

    cache: Path  # huggingface_hub's, during the test
    files: dict[str, Served] = field(default_factory=dict)  # owner/name/resolve/revision/path
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""

    def add(self, file: HubFile, served: Served) -> None:
        """Serve a file at its revision and at the commit which that means."""
        for revision in (file.revision, served.commit):
            self.files[f"/{file.repo}/resolve/{revision}/{file.path}"] = served

    @property
    def transfers(self) -> list[str]:
        """The requests for contents."""
        return [request for request in self.requests if request.startswith("GET")]

    @property
    def cached(self) -> list[Path]:
        """The contents and snapshots in the cache."""
        return [path for path in self.cache.glob("models--*/*/**/*") if path.is_file() and "refs" not in path.parts]


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """Return what answers the requests to a Hub and to its storage."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with a file, its headers alone, a redirect to the storage, or an error."""
            path = unquote(self.path)
            hub.requests.append(f"{self.command} {path}")
            if path == "/xet-token":
                self.send_response(200)
                self.send_header("X-Xet-Cas-Url", hub.storage)
                self.send_header("X-Xet-Access-Token", "token")
                self.send_header("X-Xet-Token-Expiration", "9999999999")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            stored = path.startswith("/storage")
            served = hub.files.get(path.removeprefix("/storage"), Served(status=404, error_code="EntryNotFound"))
            if served.status != 200:
                self.send_response(served.status)
                self.send_header("X-Error-Code", served.error_code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = len(served.content) if served.announced_size is None else served.announced_size
            if served.large and not stored:
                self.send_response(302)
                self.send_header("Location", f"{hub.storage}/storage{self.path}")
                self.send_header("X-Linked-Etag", f'"{served.hash}"')
                self.send_header("X-Linked-Size", str(size))
                self.send_header("X-Repo-Commit", served.commit)
                if served.chunked:
                    self.send_header("X-Xet-Hash", "ab" * 32)
                    self.send_header("X-Xet-Refresh-Route", f"{hub.endpoint}/xet-token")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            body = served.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{served.hash}"')
            if served.commit:
                self.send_header("X-Repo-Commit", served.commit)
            self.send_header("Content-Length", str(size if self.command == "HEAD" else len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
            self.end_headers()
            if self.command == "GET":
                cut, served.breaks_at = served.breaks_at, None
                self.wfile.write(body[:cut])

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: requests are recorded above."""

    return Handler


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Have huggingface_hub ask this Hub, as `HF_ENDPOINT` would in a new process."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub with an empty cache, which are huggingface_hub's during the test."""
    hub = Hub(tmp_path / "cache")
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub)) for _ in range(2)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    use_hub(monkeypatch, hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    yield hub
    close_session()
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def disconnect(monkeypatch: pytest.MonkeyPatch) -> str:
    """Have huggingface_hub ask an address where nothing listens, and return it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    use_hub(monkeypatch, endpoint)
    return endpoint


def get(source: HubFile, offline: bool = False) -> Path:
    """Fetch a source for the slot of the VAE."""
    return fetch(source, "vae_path", offline)


def fetch_in_a_process(hub: Hub, home: Path, **environment: str) -> str:
    """Fetch the VAE where huggingface_hub reads its settings anew; return the error, or nothing."""
    program = """
import sys
from anima_train.core.errors import UserError
from anima_train.model.hub import resolve
try:
    resolve("vae_path", sys.argv[1])
except UserError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, VAE.reference],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stderr


# References


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://owner/name/model.safetensors", HubFile("owner/name", "model.safetensors", "main")),
        ("hf://o-1/n.2/a/b c.safetensors", HubFile("o-1/n.2", "a/b c.safetensors", "main")),
        ("hf://owner/name@v1.0/a/b@2.safetensors", HubFile("owner/name", "a/b@2.safetensors", "v1.0")),
        (
            f"hf://owner/name/a#1.safetensors#sha256={'0a' * 32}",
            HubFile("owner/name", "a#1.safetensors", "main", "0a" * 32),
        ),
    ],
)
def test_reference_names_a_file_and_is_written_back_the_same(text: str, expected: HubFile) -> None:
    assert parse_reference(text) == expected
    assert parse_reference(text).reference == text


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://owner",
        "hf://owner/name",
        "hf://owner/name/",
        "hf://owner/name@v1",
        "hf://owner/name@/model.safetensors",
        "hf:///name/model.safetensors",
        "hf://own er/name/model.safetensors",
        "hf://owner/na--me/model.safetensors",
        "hf://../name/model.safetensors",
        "hf://owner/../model.safetensors",
        "hf://owner/name/../../secret.safetensors",
        "hf://owner/name/a/../b.safetensors",
        "hf://owner/name/./b.safetensors",
        "hf://owner/name//etc/passwd",
        "hf://owner/name/..\\..\\secret.safetensors",
        "hf://owner/name/C:/secret.safetensors",
        "hf://owner/name@../model.safetensors",
        "hf://owner/name/\x1b[31mred.safetensors",
        "https://owner/name/model.safetensors",
        "hf://owner/name/model.safetensors#sha256=",
        "hf://owner/name/model.safetensors#sha256=0a",
        f"hf://owner/name/model.safetensors#sha256={'0A' * 32}",
    ],
)
def test_malformed_or_escaping_reference_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="expected hf://owner/name") as caught:
        parse_reference(text)
    assert "\x1b" not in str(caught.value)


def test_only_the_scheme_makes_a_reference() -> None:
    assert is_reference("hf://owner/name/a.safetensors")
    assert not is_reference("models/hf/a.safetensors")
    assert not is_reference("C:\\models\\a.safetensors")


def test_every_official_file_has_a_valid_reference() -> None:
    files = [file for source in OFFICIAL.values() for file in source.members]
    assert [parse_reference(file.reference) for file in files] == files


# What arrives


def test_large_file_arrives_through_the_redirect(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    path = get(VAE)
    assert path.read_bytes() == LARGE
    assert path.name == "vae.safetensors"
    assert [request for request in hub.transfers if "/storage/" in request]


def test_cached_file_is_used_without_a_request(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    first = get(VAE)
    hub.requests.clear()
    assert get(VAE) == first
    assert hub.requests == []


def test_small_file_is_checked_by_its_git_hash(hub: Hub) -> None:
    file = HubFile("owner/model", "config.json")
    hub.add(file, Served(b"hello\n", etag="ce013625030ba8dba906f756967f9e9ca394464a"))  # git hash-object
    assert get(file).read_bytes() == b"hello\n"


def test_revision_is_what_is_asked_for(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    tagged = HubFile(VAE.repo, VAE.path, "v1")
    hub.add(tagged, Served(b"older", commit="a" * 40))
    assert get(VAE).read_bytes() == LARGE
    assert get(tagged).read_bytes() == b"older"
    assert get(HubFile(VAE.repo, VAE.path, "a" * 40)).read_bytes() == b"older"


def test_content_known_from_another_revision_is_not_downloaded_again(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    tagged = HubFile(VAE.repo, VAE.path, "v1")
    hub.add(tagged, Served(LARGE, large=True, commit="a" * 40))
    get(VAE)
    hub.requests.clear()
    assert get(tagged).read_bytes() == LARGE
    assert hub.transfers == []


def test_broken_transfer_goes_on_where_it_stopped(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True, breaks_at=60_000))
    assert get(VAE).read_bytes() == LARGE
    assert len(hub.transfers) == 2


def test_branch_that_moved_on_is_not_asked_about_while_its_file_is_cached(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    first = get(VAE)
    hub.add(VAE, Served(b"another", large=True, commit=LATER))
    hub.requests.clear()
    assert get(VAE) == first
    assert hub.requests == []
    first.unlink()
    assert origin_of(get(VAE)) == HubFile(VAE.repo, VAE.path, LATER)


def test_file_that_another_program_cached_is_used_and_its_origin_known(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    hf_hub_download(VAE.repo, VAE.path)
    assert origin_of(get(VAE, offline=True)) == HubFile(VAE.repo, VAE.path, COMMIT)


def test_files_that_are_no_part_of_a_hub_cache_have_no_origin(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "snapshots" / "x" / "y.safetensors") is None


# Damage


@pytest.mark.parametrize(("large", "digits"), [(True, 64), (False, 40)])
def test_wrong_hash_removes_the_file(hub: Hub, large: bool, digits: int) -> None:
    right = Served(LARGE, large=large)
    altered = Served(LARGE[:-1] + b"?", large=large)
    hub.add(VAE, Served(altered.content, etag=right.hash, large=large))
    with pytest.raises(ModelFileError, match=f"found hash {altered.hash}, expected {right.hash}"):
        get(VAE)
    assert len(right.hash) == digits
    assert hub.cached == []

    hub.add(VAE, right)
    assert get(VAE).read_bytes() == LARGE


def test_wrong_size_is_an_error_with_both_sizes(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True, announced_size=len(LARGE) + 11))
    with pytest.raises(ModelFileError, match=f"size {len(LARGE) + 11} but has size {len(LARGE)}"):
        get(VAE)
    assert hub.cached == []


def test_content_damaged_in_the_cache_is_found_when_it_is_linked_again(hub: Hub) -> None:
    served = Served(LARGE, large=True)
    hub.add(VAE, served)
    blob = hub.cache / "models--owner--model" / "blobs" / served.hash
    blob.parent.mkdir(parents=True)
    blob.write_bytes(LARGE[:100])
    with pytest.raises(ModelFileError, match=f"found hash [0-9a-f]+, expected {served.hash}"):
        get(VAE)
    assert not blob.exists()
    assert get(VAE).read_bytes() == LARGE


def test_unknown_kind_of_hash_is_said(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.add(VAE, Served(LARGE, etag="5-multipart"))
    assert get(VAE).read_bytes() == LARGE
    assert caplog.messages == [f"{VAE.reference}: the Hub announces no hash of it: only its size was checked"]


def test_interrupted_check_is_made_again_without_a_second_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(VAE, Served(LARGE, large=True))

    def interrupt(path: Path) -> str:
        assert path.read_bytes() == LARGE
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_hub, "sha256_file", interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                get(VAE)
    assert get(VAE).read_bytes() == LARGE
    assert len([request for request in hub.transfers if "/storage/" in request]) == 1


@pytest.mark.parametrize("is_cached", [False, True])
def test_file_that_is_not_the_one_meant_is_refused(hub: Hub, is_cached: bool) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    digest = hashlib.sha256(LARGE).hexdigest()
    if is_cached:
        get(VAE)
    assert get(parse_reference(f"{VAE.reference}#sha256={digest}")).read_bytes() == LARGE
    other = parse_reference(f"{VAE.reference}#sha256={'0' * 64}")
    with pytest.raises(ModelFileError, match=f"#sha256={'0' * 64}: found sha256 {digest}; the file is not the one"):
        get(other)


# Refusals


@pytest.mark.parametrize(
    ("status", "error_code", "words"),
    [
        (401, "", ["owner/model", "hf auth login", "check the name"]),
        (401, "RepoNotFound", ["owner/model", "hf auth login", "check the name"]),
        (401, "GatedRepo", ["gated", "accept its conditions", "hf auth login"]),
        (403, "GatedRepo", ["gated", "accept its conditions", "hf auth login"]),
        (403, "", ["token", "owner/model", "hf auth login"]),
        (404, "RepoNotFound", ["no repository owner/model", "check the name"]),
        (404, "RevisionNotFound", ['no revision "main"']),
        (404, "EntryNotFound", ["no file", VAE.path]),
        (404, "", ["check the name", VAE.path]),
        (503, "", ["503", "try again later"]),
    ],
)
def test_refusal_says_why_and_what_to_do(hub: Hub, status: int, error_code: str, words: list[str]) -> None:
    hub.add(VAE, Served(status=status, error_code=error_code))
    with pytest.raises(ModelFileError) as caught:
        get(VAE)
    assert [word for word in [VAE.reference, *words] if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_login_page_in_place_of_the_hub_is_recognised(hub: Hub) -> None:
    hub.add(VAE, Served(b"<html>please log in</html>", commit=""))
    with pytest.raises(ModelFileError, match=r"did not answer as the Hub does.*proxy"):
        get(VAE)
    assert hub.cached == []


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin", "PT"])
def test_pickle_is_refused_before_any_request(hub: Hub, suffix: str) -> None:
    with pytest.raises(ModelFileError, match=r"pickles are not loaded: use a \.safetensors file"):
        resolve("vae_path", f"hf://owner/model/vae.{suffix}")
    assert hub.requests == []


@pytest.mark.filterwarnings("default")  # huggingface_hub only warns; it must be the trainer that makes it an error
def test_file_larger_than_the_disk_is_refused_before_the_transfer(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True, announced_size=10**18))
    with pytest.raises(SpaceError, match=r"file size is: 1000000000000\.00 MB.* MB free disk space; .*set HF_HOME"):
        get(VAE)
    assert hub.transfers == []
    assert hub.cached == []


def test_cache_that_cannot_be_written_is_named_with_the_remedy(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    hub.cache.write_text("a file where the cache folder should be")
    with pytest.raises(SpaceError, match=r"cache.*set HF_HOME"):
        get(VAE)


def test_failure_of_the_chunked_transfer_is_explained(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True, chunked=True))
    error = fetch_in_a_process(hub, tmp_path, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="0")
    assert "GET /xet-token" in hub.requests
    assert error.startswith(f"ModelFileError: {VAE.reference}: the download failed: ")
    assert "Run the command again, or get" in error


# No connection


def test_missing_connection_tells_how_to_get_the_file_by_hand(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = disconnect(monkeypatch)
    with pytest.raises(ModelFileError) as caught:
        resolve("vae_path", None)
    text = str(caught.value)
    for part in (
        "cannot be reached",
        "split_files/vae/qwen_image_vae.safetensors from the Hub repository circlestone-labs/Anima",
        f"{endpoint}/circlestone-labs/Anima/resolve/main/split_files/vae/qwen_image_vae.safetensors",
        'put it anywhere and set model.vae_path = "/path/to/qwen_image_vae.safetensors"',
    ):
        assert part in text
    assert "\n" not in text


def test_cached_file_needs_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    path = get(VAE)
    disconnect(monkeypatch)
    assert get(VAE) == path
    assert get(VAE, offline=True) == path


def test_what_is_missing_for_one_reason_is_one_message(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = disconnect(monkeypatch)
    with pytest.raises(ModelFileError) as caught:
        download_all()
    (problem,) = caught.value.problems
    assert problem.startswith("model: 5 files are not in the local Hub cache, and the Hub cannot be reached (")
    assert "): run this command again with a connection, or set " in problem  # it is `anima download`
    assert "set transformer_path, vae_path, llm_path, tokenizer_path, t5_tokenizer_path in [model]" in problem
    assert endpoint not in problem


def test_offline_opens_no_connection(hub: Hub) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    with pytest.raises(ModelFileError) as caught:
        resolve("vae_path", VAE.reference, offline=True)
    text = str(caught.value)
    assert "offline mode is on" in text
    assert "anima download" in text
    assert 'set model.vae_path = "/path/to/vae.safetensors"' in text
    assert hub.requests == []


def test_offline_environment_opens_no_connection(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    assert fetch_in_a_process(hub, tmp_path / "online", HF_HUB_OFFLINE="0") == ""
    hub.requests.clear()
    error = fetch_in_a_process(hub, tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert error.startswith("Absent")
    assert "offline mode is on" in error
    assert hub.requests == []


# Folders


def add_tokenizer(hub: Hub) -> dict[str, bytes]:
    """Serve both files; return their contents."""
    contents = {file.path: json.dumps({"file": file.path}).encode() for file in TOKENIZER.members}
    for file in TOKENIZER.members:
        hub.add(file, Served(contents[file.path]))
    return contents


def test_folder_holds_all_its_files(hub: Hub) -> None:
    contents = add_tokenizer(hub)
    folder = get(TOKENIZER)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    hub.requests.clear()
    assert get(TOKENIZER) == folder
    assert hub.requests == []


def test_folder_below_the_top_of_a_repository(hub: Hub) -> None:
    source = HubFile("owner/text", "tokenizer/vocab.json", beside=("config.json",))
    hub.add(HubFile("owner/text", "tokenizer/vocab.json"), Served(b"{}"))
    hub.add(HubFile("owner/text", "tokenizer/config.json"), Served(b"[]"))
    folder = get(source)
    assert folder.name == "tokenizer"
    assert (folder / "vocab.json").read_bytes() == b"{}"
    assert (folder / "config.json").read_bytes() == b"[]"
    assert source.reference == "hf://owner/text/tokenizer"


def test_only_the_missing_file_of_a_folder_is_downloaded(hub: Hub) -> None:
    contents = add_tokenizer(hub)
    get(TOKENIZER.members[0])
    hub.requests.clear()
    folder = get(TOKENIZER)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert hub.transfers == ["GET /owner/text/resolve/main/vocab.json"]


def test_files_of_two_commits_are_not_taken_for_one_folder(hub: Hub) -> None:
    add_tokenizer(hub)
    hub.add(TOKENIZER.members[1], Served(b"newer", commit="b" * 40))
    with pytest.raises(ModelFileError, match="changed during the download"):
        get(TOKENIZER)


def test_missing_folder_names_every_file_and_the_key(hub: Hub) -> None:
    with pytest.raises(ModelFileError) as caught:
        resolve("t5_tokenizer_path", None, offline=True)
    text = str(caught.value)
    assert "tokenizer.json, spiece.model, config.json from the Hub repository google-t5/t5-11b" in text
    assert 'put them into one folder anywhere and set model.t5_tokenizer_path = "/path/to/that/folder"' in text


# Slots


def test_local_path_is_returned_as_given() -> None:
    assert resolve("vae_path", "models/vae.safetensors") == Path("models/vae.safetensors")


def test_slot_without_a_path_gets_the_official_file(hub: Hub) -> None:
    hub.add(HubFile("circlestone-labs/Anima", "split_files/vae/qwen_image_vae.safetensors"), Served(LARGE, large=True))
    path = resolve("vae_path", None)
    assert path.read_bytes() == LARGE


def test_slot_with_a_reference_gets_that_file(hub: Hub) -> None:
    hub.add(HubFile("me/tuned", "a.safetensors", "v2"), Served(LARGE, large=True))
    path = resolve("transformer_path", "hf://me/tuned@v2/a.safetensors")
    assert path.read_bytes() == LARGE


def test_all_official_files_are_downloaded(hub: Hub) -> None:
    for source in OFFICIAL.values():
        for file in source.members:
            hub.add(file, Served(file.path.encode()))
    paths = download_all()
    assert list(paths) == ["transformer_path", "vae_path", "llm_path", "tokenizer_path", "t5_tokenizer_path"]
    assert paths["transformer_path"].read_bytes() == b"split_files/diffusion_models/anima-base-v1.0.safetensors"
    assert (paths["tokenizer_path"] / "merges.txt").read_bytes() == b"merges.txt"


def test_all_problems_come_in_one_report_and_the_rest_arrives(hub: Hub) -> None:
    for source in OFFICIAL.values():
        for file in source.members:
            hub.add(file, Served(file.path.encode()))
    hub.add(OFFICIAL["transformer_path"].members[0], Served(status=403, error_code="GatedRepo"))
    hub.add(OFFICIAL["tokenizer_path"].members[1], Served(status=503))
    with pytest.raises(ModelFileError) as caught:
        download_all()
    assert [problem.split(":")[1] for problem in caught.value.problems] == [
        "//circlestone-labs/Anima/split_files/diffusion_models/anima-base-v1.0.safetensors",
        "//Qwen/Qwen3-0.6B/tokenizer_config.json",
    ]
    assert resolve("t5_tokenizer_path", None, offline=True).is_dir()
