"""Named corpora: complete, truncated, wrong, missing."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from gptlit.data.download import CATALOGUE, NamedFile, fetch
from gptlit.data.sources import open_corpus
from gptlit.errors import InputError

CONTENT = b"".join(b"story %d <|end|> " % n for n in range(20_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`."""

    content = CONTENT
    status: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with one corpus, "stories", in the catalogue."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/stories.txt"
        monkeypatch.setitem(CATALOGUE, "stories", NamedFile(url, SHA256, separator="<|end|>"))
        yield server
        server.shutdown()


def files_in(folder: Path) -> list[str]:
    hidden = (".lock", ".verified")
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix not in hidden)


def test_a_file_is_fetched_once_and_verified(server: Server, tmp_path: Path) -> None:
    path = fetch("stories", tmp_path)
    assert path.read_bytes() == CONTENT
    assert fetch("stories", tmp_path) == path
    assert server.requests == 1
    assert files_in(tmp_path) == ["stories.txt"]


def test_a_named_corpus_is_read_with_its_separator(server: Server, tmp_path: Path) -> None:
    corpus = open_corpus("stories", downloads=tmp_path)
    assert list(corpus.documents())[:3] == ["story 0", "story 1", "story 2"]


def test_a_file_put_there_by_hand_is_verified_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    path = tmp_path / "stories" / "stories.txt"
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(InputError, match=r"stories.txt has the SHA-256 .* it was deleted"):
        fetch("stories", tmp_path)
    path.write_bytes(CONTENT)
    assert fetch("stories", tmp_path) == path
    assert server.requests == 0


def test_two_at_once_fetch_it_once(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: fetch("stories", tmp_path), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert server.requests == 1


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT[:5000]])
def test_another_or_a_truncated_file_is_deleted(server: Server, tmp_path: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(InputError, match=r"stories.txt.partial has the SHA-256 .* it was deleted; give the same"):
        fetch("stories", tmp_path)
    assert files_in(tmp_path) == []
    server.content = CONTENT
    assert fetch("stories", tmp_path).read_bytes() == CONTENT


def test_a_missing_file_and_a_closed_port_are_named(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(InputError, match=r"stories.txt cannot be downloaded \(HTTPError: .*404: Not Found\): "):
        fetch("stories", tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"stories.txt cannot be downloaded \(URLError: .*put the file there yourself"):
        fetch("stories", tmp_path)


def test_a_file_of_the_hub_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "stories", NamedFile(("some/one", "c0ffee", "deep/stories.txt"), SHA256))

    def download(repo_id: str, path: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        if not is_connected:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        assert (repo_id, path, repo_type, revision) == ("some/one", "deep/stories.txt", "dataset", "c0ffee")
        (local_dir / "deep").mkdir()
        (local_dir / path).write_bytes(CONTENT)
        return str(local_dir / path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    is_connected = False
    with pytest.raises(InputError, match=r"stories.txt of some/one cannot be downloaded \(LocalEntryNotFound"):
        fetch("stories", tmp_path)
    is_connected = True
    assert fetch("stories", tmp_path) == tmp_path / "stories" / "stories.txt"
    assert files_in(tmp_path) == ["stories.txt"]


def test_the_catalogue_names_revisions() -> None:
    for wanted in CATALOGUE.values():
        parts = wanted.source.split("/") if isinstance(wanted.source, str) else wanted.source
        assert any(len(part) == 40 for part in parts)
