"""Named corpora from a server of our own: whole, cut off, wrong, gone."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptlit.data import download as module
from gptlit.data.download import CATALOGUE, Download, fetch
from gptlit.data.sources import open_corpus
from gptlit.errors import InputError

CONTENT = b"".join(b"story %d <|end|> " % n for n in range(20_000))


class Server(ThreadingHTTPServer):
    """Serves `CONTENT`; `cut` ends each answer after so many bytes, `ranges` says whether it can go on."""

    cut: int | None = None
    ranges = True
    content = CONTENT
    status: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        rest = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.cut])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with one corpus, "stories", in the catalogue."""
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/stories.txt"
        wanted = Download(address, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), separator="<|end|>")
        monkeypatch.setitem(CATALOGUE, "stories", wanted)
        yield server
        server.shutdown()


def left(folder: Path) -> list[str]:
    hidden = (".lock", ".verified")
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix not in hidden)


def test_a_file_is_fetched_once_and_verified(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = fetch("stories", tmp_path, lambda done, size: told.append((done, size)))
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert fetch("stories", tmp_path) == path
    assert server.asked == [None]
    assert left(tmp_path) == ["stories.txt"]


def test_a_named_corpus_is_read_with_its_separator(server: Server, tmp_path: Path) -> None:
    corpus = open_corpus("stories", downloads=tmp_path)
    assert list(corpus.documents())[:3] == ["story 0", "story 1", "story 2"]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cut = len(CONTENT) // 3
    assert fetch("stories", tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, *(f"bytes={n * server.cut}-" for n in range(1, len(server.asked)))]
    assert 3 <= len(server.asked) <= 4


def test_a_connection_that_keeps_breaking_leaves_what_came_for_the_next_call(server: Server, tmp_path: Path) -> None:
    server.cut = 1000
    fail_after = 5
    transfer = module._transfer

    def broken(*arguments: Any) -> None:
        server.cut = 1000 if len(server.asked) < fail_after else 0
        transfer(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_transfer", broken)
        with pytest.raises(InputError, match=rf"5000 of {len(CONTENT)} bytes are here; give the same command again"):
            fetch("stories", tmp_path)
    assert len(server.asked) == 5 + module.ATTEMPTS
    assert left(tmp_path) == ["stories.txt.partial"]
    server.cut = None
    assert fetch("stories", tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=5000-"


def test_a_file_put_there_by_hand_is_verified_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    path = tmp_path / "stories" / "stories.txt"
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(InputError, match=r"stories.txt has the SHA-256 .* it was deleted"):
        fetch("stories", tmp_path)
    path.write_bytes(CONTENT)
    assert fetch("stories", tmp_path) == path
    assert server.asked == []


def test_two_at_once_fetch_it_once(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: fetch("stories", tmp_path), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(server.asked) == 1


def test_a_server_that_cannot_go_on_sends_it_whole(server: Server, tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "stories.txt.partial").write_bytes(CONTENT[:5000])
    server.ranges = False
    assert fetch("stories", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT + b"more"])
def test_another_file_than_was_meant_is_deleted(server: Server, tmp_path: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(InputError, match=r"stories.txt.partial has the SHA-256 .* it was deleted"):
        fetch("stories", tmp_path)
    assert left(tmp_path) == []


def test_a_missing_file_and_a_closed_port_are_named(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(InputError, match=r"stories.txt answers 404 \(Not Found\): put the file there yourself"):
        fetch("stories", tmp_path)
    assert server.asked == [None]
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"stories.txt cannot be read .*0 of \d+ bytes are here"):
        fetch("stories", tmp_path)


def test_a_full_disk_is_not_a_broken_connection(server: Server, tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "stories.txt.partial").mkdir()
    with pytest.raises(OSError, match="directory"):
        fetch("stories", tmp_path)


def test_no_space_is_not_tried_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        fetch("stories", tmp_path)
    assert len(server.asked) == 1


def test_the_catalogue_names_files_that_cannot_change() -> None:
    for download in CATALOGUE.values():
        assert download.address.startswith("https://")
        assert any(len(part) == 40 for part in download.address.split("/")), "a revision"
        assert len(download.sha256) == 64
        assert download.size > 0
