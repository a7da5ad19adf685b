"""Named corpora: downloaded once, verified by SHA-256 before use."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EFBIG, EISDIR, ENOSPC, EROFS
from pathlib import Path
from urllib.request import urlopen

from filelock import FileLock

from gptlit.errors import InputError

TIMEOUT = 30.0  # seconds without a byte
DISK_ERRORS = (EACCES, EDQUOT, EFBIG, EISDIR, ENOSPC, EROFS)


@dataclass(frozen=True)
class WebFile:
    """A small file at an address that contains a revision, so that it does not change.

    Args:
        url: The address.
        sha256: Hexadecimal.
        separator: Between two documents; empty: the file is one document.
    """

    url: str
    sha256: str
    separator: str = ""

    @property
    def file_name(self) -> str:
        """Its name on disk."""
        return self.url.rsplit("/", 1)[-1]

    def download(self, folder: Path) -> Path:
        """Download it into a folder and return its path."""
        path = folder / f"{self.file_name}.partial"
        with urlopen(self.url, timeout=TIMEOUT) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file)
        return path


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the Hugging Face Hub.

    Args:
        repo_id: OWNER/NAME.
        revision: Commit hash.
        path: In the repository.
        sha256: Hexadecimal.
        separator: Between two documents; empty: the file is one document, or a table.
    """

    repo_id: str
    revision: str
    path: str
    sha256: str
    separator: str = ""

    @property
    def file_name(self) -> str:
        """Its name on disk."""
        return self.path.rsplit("/", 1)[-1]

    def download(self, folder: Path) -> Path:
        """Download it into a folder, resuming an interrupted download, and return its path."""
        try:
            import huggingface_hub
        except ImportError as error:
            message = f"{self.repo_id} needs the package huggingface-hub: pip install huggingface-hub"
            raise InputError(message) from error
        path = huggingface_hub.hf_hub_download(
            self.repo_id, self.path, repo_type="dataset", revision=self.revision, local_dir=folder
        )
        return Path(path)


_STORIES = ("roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64")
_FINEWEB = ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9")
CATALOGUE: dict[str, WebFile | HubFile] = {
    "the-verdict": WebFile(
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/"
        "ch02/01_main-chapter-code/the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    ),
    "tiny-shakespeare": WebFile(
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
        "data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": HubFile(
        *_STORIES,
        "TinyStories-train.txt",
        "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
        separator="<|endoftext|>",
    ),
    "tinystories-val": HubFile(
        *_STORIES,
        "TinyStories-valid.txt",
        "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
        separator="<|endoftext|>",
    ),
    "fineweb-edu-sample": HubFile(
        *_FINEWEB,
        "sample/10BT/013_00000.parquet",
        "b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Return the file of a named corpus, downloaded into `folder/name` unless it is there.

    Args:
        name: A key of `CATALOGUE`.
        folder: Where downloads are kept.

    Raises:
        InputError: The download failed, or the SHA-256 is another one.
    """
    wanted = CATALOGUE[name]
    path = folder / name / wanted.file_name
    verified = path.with_name(f"{path.name}.verified")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not (path.is_file() and verified.is_file()):
            downloaded = path if path.is_file() else _download(name, path)
            _verify(downloaded, wanted.sha256)
            os.replace(downloaded, path)
            verified.touch()
    return path


def _download(name: str, path: Path) -> Path:
    try:
        return CATALOGUE[name].download(path.parent)
    except InputError:
        raise
    except Exception as error:  # urllib and the hub's client have many
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{name} cannot be downloaded ({type(error).__name__}: {reason}): give the same command again, or put the "
            f"file there yourself, as {path}"
        ) from error


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb+") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if found != sha256:
        path.unlink()
        raise InputError(
            f"{path} has the SHA-256 {found[:12]}..., not {sha256[:12]}...: it was deleted; give the same command "
            "again, it may have been damaged in transfer"
        )
