"""Downloads: corpora by name, verified by SHA-256 before use, and files of data sets on the Hugging Face Hub."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from filelock import FileLock

from gptlit.errors import InputError, needs

TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class NamedFile:
    """A file of the catalogue. It names a revision, so that it does not change."""

    source: str | tuple[str, str, str]  # a URL, or (OWNER/NAME, revision, path) of a data set on the Hub
    sha256: str
    separator: str = ""  # between two documents; empty: the file is one document, or a table


_STORIES = ("roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64")
_FINEWEB = ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9")
CATALOGUE: dict[str, NamedFile] = {
    "the-verdict": NamedFile(
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/"
        "ch02/01_main-chapter-code/the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    ),
    "tiny-shakespeare": NamedFile(
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
        "data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": NamedFile(
        (*_STORIES, "TinyStories-train.txt"),
        "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
        separator="<|endoftext|>",
    ),
    "tinystories-val": NamedFile(
        (*_STORIES, "TinyStories-valid.txt"),
        "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
        separator="<|endoftext|>",
    ),
    "fineweb-edu-sample": NamedFile(
        (*_FINEWEB, "sample/10BT/013_00000.parquet"),
        "b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """Return the file of a named corpus, downloaded into `folder/name` unless it is there.

    Raises:
        InputError: The download failed, or the SHA-256 is another one.
    """
    wanted = CATALOGUE[name]
    address = wanted.source if isinstance(wanted.source, str) else wanted.source[-1]
    path = folder / name / address.rpartition("/")[-1]
    verified = path.with_name(f"{path.name}.verified")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not (path.is_file() and verified.is_file()):
            downloaded = path if path.is_file() else _download(wanted.source, path)
            _verify(downloaded, wanted.sha256)
            os.replace(downloaded, path)
            verified.touch()
    return path


def _download(source: str | tuple[str, str, str], path: Path) -> Path:
    if not isinstance(source, str):
        repo_id, revision, name = source
        return download_from_hub(repo_id, name, revision=revision, local_dir=path.parent)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with urlopen(source, timeout=TIMEOUT) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, HTTPException) as error:
        raise InputError(
            f"{source} cannot be downloaded ({type(error).__name__}: {error}): give the same command again, or put the "
            f"file there yourself, as {path}"
        ) from error
    return partial


def download_from_hub(repo_id: str, path: str, **options: Any) -> Path:
    """Return a file of a data set on the Hub, downloaded unless it is there; an interrupted download resumes.

    Args:
        repo_id: OWNER/NAME.
        path: In the data set.
        options: Options of `huggingface_hub.hf_hub_download`.

    Raises:
        InputError: It cannot be downloaded.
    """
    with needs("huggingface-hub", repo_id):
        import huggingface_hub
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, path, repo_type="dataset", **options))
    except Exception as error:  # the client raises those of several libraries
        raise InputError(
            f"{path} of {repo_id} cannot be downloaded ({type(error).__name__}: {error}): give the same command again"
        ) from error


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise InputError(
            f"{path} has the SHA-256 {found[:12]}..., not {sha256[:12]}...: it was deleted; give the same command "
            "again, it may have been damaged in transfer"
        )
