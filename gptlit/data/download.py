"""Named corpora by address and SHA-256: fetched once, in as many attempts as it takes, and verified before use."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock

from gptlit.errors import InputError

BLOCK = 2**20
ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Download:
    """A file on the network.

    Args:
        address: Where it is; one that names a revision, so that it does not change.
        sha256: Of the whole file, hexadecimal.
        size: In bytes.
        separator: What stands between two documents of a text file; empty: the file is one document.
    """

    address: str
    sha256: str
    size: int
    separator: str = ""

    @property
    def file(self) -> str:
        """The name that it gets on disk."""
        return self.address.rsplit("/", 1)[-1]


_GITHUB = "https://raw.githubusercontent.com"
_HUB = "https://huggingface.co/datasets"
_STORIES = f"{_HUB}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
_FINEWEB = f"{_HUB}/HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
CATALOGUE = {
    "the-verdict": Download(
        f"{_GITHUB}/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/"
        "ch02/01_main-chapter-code/the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        20_479,
    ),
    "tiny-shakespeare": Download(
        f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        1_115_394,
    ),
    "tinystories": Download(
        f"{_STORIES}/TinyStories-train.txt",
        "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
        1_924_281_556,
        separator="<|endoftext|>",
    ),
    "tinystories-val": Download(
        f"{_STORIES}/TinyStories-valid.txt",
        "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
        19_447_282,
        separator="<|endoftext|>",
    ),
    "fineweb-edu-sample": Download(
        f"{_FINEWEB}/sample/10BT/013_00000.parquet",
        "b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de",
        540_632_672,
    ),
}


def fetch(name: str, folder: Path, report: Callable[[int, int], None] | None = None) -> Path:
    """Return the file of a named corpus, downloaded into a folder of its own unless it is there.

    A connection that breaks is taken up again where it broke, until five attempts in a row bring nothing; then by the
    next call.

    Args:
        name: A key of `CATALOGUE`.
        folder: Where downloads are kept.
        report: Called with (bytes so far, bytes in all).

    Raises:
        InputError: The address cannot be reached, or what came is not the file that was meant.
    """
    wanted = CATALOGUE[name]
    path = folder / name / wanted.file
    verified = path.with_name(f"{path.name}.verified")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            partial = path.with_name(f"{path.name}.partial")
            _transfer_all(wanted, partial, path, report or (lambda done, size: None))
            _verify(wanted, partial)
            os.replace(partial, path)
        elif not verified.is_file():  # somebody put it there
            _verify(wanted, path)
        verified.touch()
    return path


def _transfer_all(wanted: Download, partial: Path, path: Path, report: Callable[[int, int], None]) -> None:
    """Transfer in as many attempts as it takes, while each brings something; after some that do not, give up."""
    vain = 0
    while True:
        before = _size(partial)
        try:
            _transfer(wanted, partial, report)
            return
        except HTTPError as error:
            raise InputError(f"{wanted.address} answers {error.code} ({error.reason}): {_by_hand(path)}") from error
        except (OSError, HTTPException) as error:
            if getattr(error, "filename", None) or getattr(error, "errno", None) in (ENOSPC, EDQUOT, EFBIG):
                raise  # the disk, not the network
            done = _size(partial)
            vain = 0 if done > before else vain + 1
            if vain == ATTEMPTS:
                raise InputError(
                    f"{wanted.address} cannot be read ({error}): {done} of {wanted.size} bytes are here; give the same "
                    f"command again to go on, or {_by_hand(path)}"
                ) from error
            time.sleep(0.2 * 2**vain)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _by_hand(path: Path) -> str:
    return f"put the file there yourself, as {path}"


def _transfer(wanted: Download, partial: Path, report: Callable[[int, int], None]) -> None:
    """Append what is missing to the partial file.

    Raises:
        OSError: The connection broke.
    """
    done = _size(partial)
    if done >= wanted.size:
        return
    request = Request(wanted.address, headers={"Range": f"bytes={done}-"} if done else {})
    with urlopen(request, timeout=TIMEOUT) as response, partial.open("ab") as file:
        if response.status != 206:  # this server sends the whole file again
            file.truncate(0)
        _copy(response, file, wanted.size, report)


def _copy(response: HTTPResponse, file: BinaryIO, size: int, report: Callable[[int, int], None]) -> None:
    done = file.tell()
    while block := response.read(BLOCK):
        file.write(block)
        done += len(block)
        report(done, size)
        if done > size:
            return
    if done < size:
        raise ConnectionError(f"the connection ended at {done} of {size} bytes")


def _verify(wanted: Download, partial: Path) -> None:
    with partial.open("rb+") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if found != wanted.sha256:
        partial.unlink()
        raise InputError(
            f"{partial} has the SHA-256 {found[:12]}..., not {wanted.sha256[:12]}...: it was deleted; "
            f"either {wanted.address} serves something else now, or it was damaged on the way"
        )
