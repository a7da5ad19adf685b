"""Files that are complete or absent."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: Path, opener: Callable[[Path, str], Any] = open) -> Iterator[Any]:
    """Open a file that replaces `path`, durably, once it is written. Several processes may do so at once.

    Raises:
        OSError: It cannot be written; it names `path`, and what was there is intact.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opener(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk has none
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def delete_partial_files(folder: Path) -> None:
    """Delete what a killed process left half-written in a folder."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """fsync a folder, which makes renames in it durable."""
    if os.name != "nt":  # no such call; renames are journalled
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
