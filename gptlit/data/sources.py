"""Where documents come from: a corpus is a list of files, each with its documents in a fixed order."""

import glob
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

from gptlit.data.download import CATALOGUE, fetch
from gptlit.data.parsers import JSON, Document, Parser, ReadOptions, file_kind, parser_for, text_or_raise
from gptlit.data.python_docs import python_docs
from gptlit.errors import InputError, user_path

PYTHON_DOCS = "python-docs"
HUB = "hf:"
KINDS = (".txt", ".jsonl", ".parquet")  # read from a folder, where .json files are metadata more often than not
DIGEST_LIMIT = 2**26  # bytes: of larger files the fingerprint covers the size and this much of both ends


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Args:
        name: Its path, for messages.
        size: Bytes on disk; 0 if there is no file.
        fingerprint: Hexadecimal digest that changes when the documents may have changed.
        open: Opens it.
        parse: From the open file to its documents.
        is_single_document: Everything that `parse` yields is one document, in pieces.
    """

    name: str
    size: int
    fingerprint: str
    open: Callable[[], BinaryIO]
    parse: Parser
    is_single_document: bool = False

    def read(self, report: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Yield documents, or the pieces of the only one. `report` is called with the number of bytes read."""
        with self.open() as file:
            for document in self.parse(file):
                if report is not None:
                    report(file.tell())
                yield document
        if report is not None:
            report(self.size)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Args:
        name: Short, fit for a folder's name.
        parts: Its files.
    """

    name: str
    files: Sequence[SourceFile] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the documents may have changed."""
        return hashlib.sha256("".join(part.fingerprint for part in self.files).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(part.size for part in self.files)

    def documents(self) -> Iterator[str]:
        """Yield every text.

        Raises:
            InputError: One cannot be read; file and line are named.
        """
        for part in self.files:
            if part.is_single_document:
                yield "".join(map(text_or_raise, part.read()))
            else:
                yield from map(text_or_raise, part.read())


def open_corpus(
    sources: str | Sequence[str],
    options: ReadOptions | None = None,
    downloads: Path = Path("data/downloads"),
) -> Corpus:
    """Find a corpus.

    Args:
        sources: One or several of: "python-docs"; a name of the catalogue; a file or folder or glob of `.txt`,
            `.jsonl` (plain, `.gz`, `.zst`) and `.parquet`; a `.json` file, of JSON lines or an array of objects;
            `hf:OWNER/NAME[/PATH]`, a data set on Hugging Face's hub.
        options: How files are read.
        downloads: Where files of the catalogue are kept.

    Raises:
        InputError: There is nothing of that name, or nothing in it.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    if not sources:
        raise InputError("no source is given: name a file, a folder, or one of " + ", ".join(names()))
    found = [_open(source, options or ReadOptions(), downloads) for source in sources]
    return Corpus("-".join(corpus.name for corpus in found)[:80], [part for corpus in found for part in corpus.files])


def names() -> list[str]:
    """Return the corpora that are known by name."""
    return [PYTHON_DOCS, *CATALOGUE]


def _open(source: str, options: ReadOptions, downloads: Path) -> Corpus:
    if source == PYTHON_DOCS:
        digest = hashlib.sha256(sys.version.encode()).hexdigest()
        return Corpus(source, [SourceFile(source, 0, digest, io.BytesIO, lambda _: python_docs())])
    if source in CATALOGUE:
        if not options.separator:
            options = ReadOptions(options.text_key, CATALOGUE[source].separator)
        return Corpus(source, [_local_file(fetch(source, downloads), options)])
    if source.startswith(HUB):
        return _hub_corpus(source, options)
    paths = _files(source)
    words = [_stem(paths[0])] if len(paths) == 1 else [p for p in Path(source).parts if not set(p) & set("*?[]")]
    name = re.sub(r"[^\w-]+", "_", words[-1]).strip("_") if words else ""
    return Corpus(name or "text", [_local_file(path, options) for path in paths])


def _files(source: str) -> list[Path]:
    path = user_path(source)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(p for p in path.rglob("*") if file_kind(p.name)[0] in KINDS and p.is_file())
        if not paths:
            raise InputError(
                f"data.source {source!r} has no {', '.join(KINDS)} file in it (.json files are read where they are "
                "named), and has no .bin file with 'train' in its name"
            )
    else:
        paths = sorted(p for match in glob.glob(str(path), recursive=True) if (p := Path(match)).is_file())
        if not paths:
            raise InputError(
                f"data.source {source!r} does not exist: give a text, .jsonl or .parquet file, a folder or glob of "
                f"them, hf:OWNER/NAME, or one of {', '.join(names())}"
            )
    full = [path for path in paths if path.stat().st_size]
    if not full:
        raise InputError(f"{paths[0]} is empty: there is no text to train on")
    return full


def _stem(path: Path) -> str:
    return re.sub(r"(\.(txt|jsonl?|ndjson|jsonlines|parquet))?(\.(gz|zst))?$", "", path.name, flags=re.IGNORECASE)


def _local_file(path: Path, options: ReadOptions) -> SourceFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= DIGEST_LIMIT:
            content = file.read()
        else:
            content = file.read(DIGEST_LIMIT // 2)
            file.seek(-DIGEST_LIMIT // 2, io.SEEK_END)
            content += file.read()
    return _source_file(str(path), size, hashlib.sha256(content).hexdigest(), lambda: path.open("rb"), options)


def _source_file(name: str, size: int, digest: str, opened: Callable[[], BinaryIO], options: ReadOptions) -> SourceFile:
    is_text = file_kind(name)[0] not in (".jsonl", JSON, ".parquet")
    option = options.separator if is_text else options.text_key
    fingerprint = hashlib.sha256(json.dumps([size, digest, option]).encode()).hexdigest()
    return SourceFile(name, size, fingerprint, opened, *parser_for(name, options))


def _hub_corpus(source: str, options: ReadOptions) -> Corpus:
    """List the data files of `hf:OWNER/NAME`, or those under `hf:OWNER/NAME/PATH` (a file, a folder or a glob)."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise InputError(
            f"{source!r} needs the package huggingface-hub: pip install huggingface-hub pyarrow"
        ) from error
    owner, _, rest = source.removeprefix(HUB).strip("/").partition("/")
    name, _, path = rest.partition("/")
    if not owner or not name:
        raise InputError(f"{source!r} is no data set: write hf:OWNER/NAME or hf:OWNER/NAME/PATH")
    files = HfFileSystem()
    root = f"datasets/{owner}/{name}"
    try:
        pattern = f"{root}/{path}" if path else root
        kinds = (JSON,) if file_kind(pattern)[0] == JSON else KINDS
        found: Any = files.glob(pattern if file_kind(pattern)[0] in kinds else f"{pattern}/**", detail=True)
    except Exception as error:  # whatever the client raises: no such data set, no network, no permission
        raise InputError(f"{source!r} cannot be listed ({type(error).__name__}: {error})") from error
    entries = [entry for _, entry in sorted(found.items()) if _is_data(entry, root, kinds, named=bool(path))]
    there = {file_kind(entry["name"])[0] for entry in entries}
    best = next((kind for kind in (".parquet", ".jsonl", ".txt") if kind in there), "")  # one text in several formats
    entries = [entry for entry in entries if path or file_kind(entry["name"])[0] == best]
    if not entries:
        raise InputError(f"{source!r} has no {', '.join(KINDS)} file for training: name one as hf:OWNER/NAME/PATH")

    def part(entry: dict[str, Any]) -> SourceFile:
        version = str((entry.get("lfs") or {}).get("sha256") or entry.get("blob_id") or entry["name"])
        opened: Any = partial(_RemoteFile, files, entry["name"])
        return _source_file(entry["name"], int(entry["size"]), version, opened, options)

    return Corpus(re.sub(r"[^\w-]+", "_", name), [part(entry) for entry in entries])


class _RemoteFile(io.RawIOBase):
    """A file on the hub. A failed read is a lost connection, not a damaged file."""

    def __init__(self, files: Any, name: str) -> None:
        self._file = files.open(name, "rb")

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    @override
    def tell(self) -> int:
        return int(self._file.tell())

    @override
    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # the client has several libraries' errors
            raise InputError(
                f"the connection broke ({type(error).__name__}: {error}): give the same command again, it resumes"
            ) from error
        buffer[: len(data)] = data
        return len(data)


def _is_data(entry: dict[str, Any], root: str, kinds: Sequence[str], named: bool) -> bool:
    """Whether an entry is a file of these kinds; unless it was named, also whether it is for training."""
    path = str(entry["name"]).removeprefix(root).lower()
    other = re.search(r"(^|[/_.-])(val|valid|validation|dev|test)([/_.-]|$)", path)
    return entry.get("type") == "file" and file_kind(path)[0] in kinds and (named or not other)
