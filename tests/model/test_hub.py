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
from huggingface_hub import close_session, hf_hub_download, scan_cache_dir

from anima_train.core.errors import ConfigError, ModelFileError, SpaceError
from anima_train.model.hub import (
    OFFICIAL,
    HubFile,
    HubFolder,
    download_all,
    fetch,
    git_blob_hash,
    is_reference,
    origin_of,
    parse_reference,
    resolve,
    size_text,
)

COMMIT = "c0ffee" + "0" * 34
VAE = HubFile("owner/model", "split_files/vae/vae.safetensors")
TOKENIZER = HubFolder("owner/text", "", ("tokenizer.json", "vocab.json"))
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
        if self.etag:
            return self.etag
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob " + str(len(self.content)).encode() + b"\0" + self.content).hexdigest()


@dataclass
class Hub:
    """A Hub and, on another port, the storage that its redirects lead to."""

    files: dict[str, Served] = field(default_factory=dict)  # owner/name/resolve/revision/path
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""

    def add(self, file: HubFile, served: Served) -> None:
        for revision in (file.revision, served.commit):
            self.files[f"/{file.repo}/resolve/{revision}/{file.path}"] = served

    @property
    def transfers(self) -> list[str]:
        return [request for request in self.requests if request.startswith("GET")]


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
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

        def log_message(self, format: str, *args: object) -> None:
            """Silence: requests are recorded above."""

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub)) for _ in range(2)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    yield hub
    close_session()
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def nowhere() -> str:
    """An address where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def cached_files(cache: Path) -> list[Path]:
    return [path for path in cache.glob("models--*/*/**/*") if path.is_file() and "refs" not in path.parts]


def fetch_in_a_process(hub: Hub, home: Path, **environment: str) -> str:
    """Fetch the VAE where huggingface_hub reads its settings anew; the error, or nothing."""
    program = """
import sys
from anima_train.core.errors import UserError
from anima_train.model.hub import fetch, parse_reference
try:
    fetch(parse_reference(sys.argv[1]), endpoint=sys.argv[2])
except UserError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
    result = subprocess.run(
        [sys.executable, "-c", program, VAE.reference, hub.endpoint],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment,
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


def test_large_file_arrives_through_the_redirect(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    said: list[str] = []
    path = fetch(VAE, say=said.append, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert path.read_bytes() == LARGE
    assert path.name == "vae.safetensors"
    assert said == ["downloading vae.safetensors (102 kB) from owner/model"]
    assert [request for request in hub.transfers if "/storage/" in request]


def test_cached_file_is_used_without_a_request(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    first = fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    hub.requests.clear()
    said: list[str] = []
    assert fetch(VAE, say=said.append, endpoint=hub.endpoint, cache_dir=tmp_path) == first
    assert hub.requests == []
    assert said == []


def test_small_file_is_checked_by_its_git_hash(hub: Hub, tmp_path: Path) -> None:
    file = HubFile("owner/model", "config.json")
    hub.add(file, Served(b'{"a": 1}'))
    assert fetch(file, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == b'{"a": 1}'


def test_revision_is_what_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    tagged = HubFile(VAE.repo, VAE.path, "v1")
    hub.add(tagged, Served(b"older", commit="a" * 40))
    assert fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == LARGE
    assert fetch(tagged, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == b"older"


def test_content_known_from_another_revision_is_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    tagged = HubFile(VAE.repo, VAE.path, "v1")
    hub.add(tagged, Served(LARGE, large=True, commit="a" * 40))
    fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    hub.requests.clear()
    said: list[str] = []
    assert fetch(tagged, say=said.append, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == LARGE
    assert hub.transfers == []
    assert said == []


def test_broken_transfer_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True, breaks_at=60_000))
    assert fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == LARGE
    assert len(hub.transfers) == 2


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(17, "17 bytes"), (1000, "1 kB"), (253_806_246, "254 MB"), (999_999_999, "1 GB"), (4_182_218_328, "4.18 GB")],
)
def test_size_is_written_with_three_digits(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


def test_git_hash_is_the_one_git_gives(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")
    assert git_blob_hash(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


# Damage


@pytest.mark.parametrize(("large", "digits"), [(True, 64), (False, 40)])
def test_wrong_hash_removes_the_file(hub: Hub, tmp_path: Path, large: bool, digits: int) -> None:
    right = Served(LARGE, large=large)
    altered = Served(LARGE[:-1] + b"?", large=large)
    hub.add(VAE, Served(altered.content, etag=right.hash, large=large))
    with pytest.raises(ModelFileError) as caught:
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert right.hash in str(caught.value)
    assert altered.hash in str(caught.value)
    assert len(right.hash) == digits
    assert cached_files(tmp_path) == []

    hub.add(VAE, right)
    assert fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == LARGE


def test_wrong_size_is_an_error_with_both_sizes(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True, announced_size=len(LARGE) + 11))
    with pytest.raises(ModelFileError, match=f"size {len(LARGE) + 11} but has size {len(LARGE)}"):
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert cached_files(tmp_path) == []


def test_content_damaged_in_the_cache_is_found_when_it_is_linked_again(hub: Hub, tmp_path: Path) -> None:
    served = Served(LARGE, large=True)
    hub.add(VAE, served)
    blob = tmp_path / "models--owner--model" / "blobs" / served.hash
    blob.parent.mkdir(parents=True)
    blob.write_bytes(LARGE[:100])
    with pytest.raises(ModelFileError, match=f"found 100 bytes, expected {len(LARGE):,}"):
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert not blob.exists()
    assert fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == LARGE


def test_unknown_kind_of_hash_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, etag="5-multipart"))
    said: list[str] = []
    fetch(VAE, say=said.append, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert said[1:] == ["vae.safetensors: the Hub reports no hash for it, so only its size was checked"]


def test_interrupted_check_is_made_again_without_a_second_download(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, etag="5-multipart"))
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if "only its size" in line:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fetch(VAE, say=interrupt, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert [line.split()[0] for line in said] == ["downloading", "vae.safetensors:", "vae.safetensors:"]
    assert len(hub.transfers) == 1


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
def test_refusal_says_why_and_what_to_do(
    hub: Hub, tmp_path: Path, status: int, error_code: str, words: list[str]
) -> None:
    hub.add(VAE, Served(status=status, error_code=error_code))
    with pytest.raises(ModelFileError) as caught:
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert [word for word in [VAE.reference, *words] if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_login_page_in_place_of_the_hub_is_recognised(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(b"<html>please log in</html>", commit=""))
    with pytest.raises(ModelFileError, match=r"did not answer as the Hub does.*proxy"):
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin", "PT"])
def test_pickle_is_refused_before_any_request(hub: Hub, tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ModelFileError, match=r"pickles are not loaded: use a \.safetensors file"):
        resolve("vae_path", f"hf://owner/model/vae.{suffix}", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert hub.requests == []


def test_file_larger_than_the_disk_is_refused_before_the_transfer(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True, announced_size=10**18))
    with pytest.raises(SpaceError, match=r"1,000,000,000,000,000,000 bytes .* has [\d,]+ bytes free"):
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path / "not" / "made" / "yet")
    assert hub.transfers == []


def test_cache_that_cannot_be_written_is_named_with_the_remedy(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    with pytest.raises(SpaceError, match=r"cache.*set HF_HOME"):
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")


def test_failure_of_the_chunked_transfer_is_explained(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True, chunked=True))
    error = fetch_in_a_process(hub, tmp_path, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="0")
    assert "GET /xet-token" in hub.requests
    assert error.startswith(f"ModelFileError: {VAE.reference}: the download failed: ")
    assert "Run the command again, or get" in error


# No connection


def test_missing_connection_tells_how_to_get_the_file_by_hand(nowhere: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        fetch(OFFICIAL["vae_path"], endpoint=nowhere, cache_dir=tmp_path)
    text = str(caught.value)
    for part in (
        "cannot be reached",
        "split_files/vae/qwen_image_vae.safetensors from the Hub repository circlestone-labs/Anima",
        f"{nowhere}/circlestone-labs/Anima/resolve/main/split_files/vae/qwen_image_vae.safetensors",
        'put it anywhere and set model.vae_path = "/path/to/qwen_image_vae.safetensors"',
    ):
        assert part in text
    assert "\n" not in text


def test_cached_file_needs_no_connection(hub: Hub, nowhere: str, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    path = fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert fetch(VAE, endpoint=nowhere, cache_dir=tmp_path) == path
    assert fetch(VAE, offline=True, endpoint=nowhere, cache_dir=tmp_path) == path


def test_offline_opens_no_connection(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    with pytest.raises(ModelFileError) as caught:
        resolve("vae_path", VAE.reference, offline=True, endpoint=hub.endpoint, cache_dir=tmp_path)
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
    assert error.startswith("ModelFileError")
    assert "offline mode is on" in error
    assert hub.requests == []


# Folders


def add_tokenizer(hub: Hub) -> dict[str, bytes]:
    contents = {name: json.dumps({"file": name}).encode() for name in TOKENIZER.files}
    for file in TOKENIZER.members:
        hub.add(file, Served(contents[file.path]))
    return contents


def test_folder_holds_all_its_files(hub: Hub, tmp_path: Path) -> None:
    contents = add_tokenizer(hub)
    said: list[str] = []
    folder = fetch(TOKENIZER, say=said.append, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert said == ["downloading tokenizer.json, vocab.json (48 bytes) from owner/text"]
    hub.requests.clear()
    assert fetch(TOKENIZER, endpoint=hub.endpoint, cache_dir=tmp_path) == folder
    assert hub.requests == []


def test_folder_below_the_top_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    source = HubFolder("owner/text", "tokenizer", ("vocab.json",))
    hub.add(HubFile("owner/text", "tokenizer/vocab.json"), Served(b"{}"))
    folder = fetch(source, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert folder.name == "tokenizer"
    assert (folder / "vocab.json").read_bytes() == b"{}"
    assert source.reference == "hf://owner/text/tokenizer"


def test_only_the_missing_file_of_a_folder_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    contents = add_tokenizer(hub)
    fetch(TOKENIZER.members[0], endpoint=hub.endpoint, cache_dir=tmp_path)
    hub.requests.clear()
    said: list[str] = []
    folder = fetch(TOKENIZER, say=said.append, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert said == ["downloading vocab.json (22 bytes) from owner/text"]
    assert hub.transfers == [f"GET /owner/text/resolve/{COMMIT}/vocab.json"]


def test_files_of_two_commits_are_not_taken_for_one_folder(hub: Hub, tmp_path: Path) -> None:
    add_tokenizer(hub)
    hub.add(TOKENIZER.members[1], Served(b"newer", commit="b" * 40))
    with pytest.raises(ModelFileError, match="changed during the download"):
        fetch(TOKENIZER, endpoint=hub.endpoint, cache_dir=tmp_path)


def test_missing_folder_names_every_file_and_the_key(nowhere: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        fetch(OFFICIAL["t5_tokenizer_path"], offline=True, endpoint=nowhere, cache_dir=tmp_path)
    text = str(caught.value)
    assert "tokenizer.json, spiece.model, config.json from the Hub repository google-t5/t5-11b" in text
    assert "put them into one folder anywhere and set model.t5_tokenizer_path =" in text


# Slots


def test_local_path_is_returned_as_given(tmp_path: Path) -> None:
    assert resolve("vae_path", "models/vae.safetensors") == Path("models/vae.safetensors")


def test_slot_without_a_path_gets_the_official_file(hub: Hub, tmp_path: Path) -> None:
    hub.add(HubFile("circlestone-labs/Anima", "split_files/vae/qwen_image_vae.safetensors"), Served(LARGE, large=True))
    path = resolve("vae_path", None, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert path.read_bytes() == LARGE


def test_slot_with_a_reference_gets_that_file(hub: Hub, tmp_path: Path) -> None:
    hub.add(HubFile("me/tuned", "a.safetensors", "v2"), Served(LARGE, large=True))
    path = resolve("transformer_path", "hf://me/tuned@v2/a.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert path.read_bytes() == LARGE


def test_all_official_files_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    for source in OFFICIAL.values():
        for file in source.members:
            hub.add(file, Served(file.path.encode()))
    paths = download_all(endpoint=hub.endpoint, cache_dir=tmp_path)
    assert list(paths) == ["transformer_path", "vae_path", "llm_path", "tokenizer_path", "t5_tokenizer_path"]
    assert paths["transformer_path"].read_bytes() == b"split_files/diffusion_models/anima-base-v1.0.safetensors"
    assert (paths["tokenizer_path"] / "merges.txt").read_bytes() == b"merges.txt"


def test_all_problems_come_in_one_report_and_the_rest_arrives(hub: Hub, tmp_path: Path) -> None:
    for source in OFFICIAL.values():
        for file in source.members:
            hub.add(file, Served(file.path.encode()))
    hub.add(OFFICIAL["transformer_path"].members[0], Served(status=403, error_code="GatedRepo"))
    hub.add(OFFICIAL["tokenizer_path"].members[1], Served(status=503))
    with pytest.raises(ModelFileError) as caught:
        download_all(endpoint=hub.endpoint, cache_dir=tmp_path)
    assert [problem.split(":")[1] for problem in caught.value.problems] == [
        "//circlestone-labs/Anima/split_files/diffusion_models/anima-base-v1.0.safetensors",
        "//Qwen/Qwen3-0.6B/tokenizer_config.json",
    ]
    assert fetch(OFFICIAL["t5_tokenizer_path"], offline=True, cache_dir=tmp_path).is_dir()


# Pins


LATER = "badcab" + "0" * 34


def move_on(hub: Hub, file: HubFile, content: bytes) -> None:
    """A new commit on the branch; the one before can still be had by its name."""
    hub.files[f"/{file.repo}/resolve/{file.revision}/{file.path}"] = Served(content, large=True, commit=LATER)


def test_branch_means_the_commit_it_meant_at_first(hub: Hub, tmp_path: Path) -> None:
    """Also where the file has to be downloaded again, and where another program has moved the branch in the cache."""
    hub.add(VAE, Served(LARGE, large=True))
    first = fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    move_on(hub, VAE, b"another")
    (other,) = tmp_path.glob("models--*/refs/main")
    other.write_text(LATER)
    assert fetch(VAE, offline=True, cache_dir=tmp_path) == first
    first.resolve().unlink()
    first.unlink()
    again = fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert again == first
    assert again.read_bytes() == LARGE


def test_files_of_one_branch_are_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    other = HubFile(VAE.repo, "other.safetensors")
    hub.add(VAE, Served(LARGE, large=True))
    hub.add(other, Served(b"of the first commit", large=True))
    fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    move_on(hub, other, b"of the second")
    assert fetch(other, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == b"of the first commit"


def test_file_that_was_cached_by_another_program_is_pinned_too(hub: Hub, tmp_path: Path) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    hf_hub_download(VAE.repo, VAE.path, endpoint=hub.endpoint, cache_dir=tmp_path)
    path = fetch(VAE, offline=True, cache_dir=tmp_path)
    (pin,) = tmp_path.glob("models--*/refs/anima-train/main")
    assert pin.read_text() == COMMIT
    assert origin_of(path) == HubFile(VAE.repo, VAE.path, COMMIT)
    (revision,) = next(iter(scan_cache_dir(tmp_path).repos)).revisions  # the pin is nothing that the cache minds
    assert revision.refs == {"main", "anima-train/main"}


def test_pinned_commit_that_is_gone_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    other = HubFile(VAE.repo, "other.safetensors")
    hub.add(VAE, Served(LARGE, large=True))
    fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    hub.files.clear()
    move_on(hub, other, b"another")
    (pin,) = tmp_path.glob("models--*/refs/anima-train/main")
    with pytest.raises(ModelFileError) as caught:
        fetch(other, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert str(caught.value).endswith(
        f"main is pinned to commit {COMMIT} in the local Hub cache: to take what it means now, remove {pin}"
    )
    pin.unlink()
    assert fetch(other, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == b"another"


@pytest.mark.parametrize("is_cached", [False, True])
def test_file_that_is_not_the_one_meant_is_refused(hub: Hub, tmp_path: Path, is_cached: bool) -> None:
    hub.add(VAE, Served(LARGE, large=True))
    digest = hashlib.sha256(LARGE).hexdigest()
    if is_cached:
        fetch(VAE, endpoint=hub.endpoint, cache_dir=tmp_path)
    meant = parse_reference(f"{VAE.reference}#sha256={digest}")
    assert fetch(meant, endpoint=hub.endpoint, cache_dir=tmp_path).read_bytes() == LARGE
    other = parse_reference(f"{VAE.reference}#sha256={'0' * 64}")
    with pytest.raises(ModelFileError, match=f"#sha256={'0' * 64}: found sha256 {digest}; the file is not the one"):
        fetch(other, endpoint=hub.endpoint, cache_dir=tmp_path)


def test_files_that_are_no_part_of_a_hub_cache_have_no_origin(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "snapshots" / "x" / "y.safetensors") is None
