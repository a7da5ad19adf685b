"""Files that are complete or absent."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptlit.data.atomic import atomic_file


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def recorded(name: str, call: Callable[..., Any]) -> None:
        def record(*args: Any) -> Any:
            found.append(name)
            return call(*args)

        monkeypatch.setattr(os, name, record)

    recorded("fsync", os.fsync)
    recorded("replace", os.replace)
    return found


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synchronized there")
def test_a_file_is_on_disk_before_its_name_is(tmp_path: Path, calls: list[str]) -> None:
    with atomic_file(tmp_path / "new" / "a") as file:
        file.write(b"text")
        assert not (tmp_path / "new" / "a").exists()
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert (tmp_path / "new" / "a").read_bytes() == b"text"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_file(path) as first:
        first.write(b"first")
        with atomic_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
