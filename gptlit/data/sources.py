"""Where documents come from: a corpus is a list of files, each with its documents in a fixed order."""

import glob
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from gptlit.data.download import CATALOGUE, download_from_hub, fetch
from gptlit.data.parsers import (
    FORMATS,
    Document,
    Parser,
    ReadOptions,
    file_format,
    file_kind,
    parse,
    text_or_raise,
    without_ending,
)
from gptlit.data.python_docs import python_docs
from gptlit.data.token_files import holds_tokens
from gptlit.errors import InputError, needs, user_path

PYTHON_DOCS = "python-docs"
HUB = "hf:"
KINDS = [kind for kind, form in FORMATS.items() if form.in_folders]
HELD_OUT = re.compile(r"(^|[/_.-])(val|valid|validation|dev|test)([/_.-]|$)", re.IGNORECASE)  # in a path on the hub
DIGEST_LIMIT = 2**26  # bytes: of larger files the fingerprint covers the size and this much of both ends


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus."""

    name: str  # its path, for messages
    size: int  # bytes on disk; 0 if there is no file
    fingerprint: str  # hexadecimal digest that changes when the documents may have changed
    open: Callable[[], BinaryIO]
    parse: Parser
    is_single_document: bool = False  # everything that `parse` yields is one document, in pieces

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
    """Documents in a fixed order."""

    name: str  # short, fit for a folder's name
    files: Sequence[SourceFile] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the documents may have changed."""
        return hashlib.sha256("".join(file.fingerprint for file in self.files).encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield every text.

        Raises:
            InputError: One cannot be read; file and line are named.
        """
        for file in self.files:
            texts = map(text_or_raise, file.read())
            yield from ["".join(texts)] if file.is_single_document else texts


def open_corpus(
    sources: str | Sequence[str],
    options: ReadOptions = ReadOptions(),  # noqa: B008  (frozen)
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
    found = [_open(source, options, downloads) for source in sources]
    return Corpus("-".join(corpus.name for corpus in found)[:80], [part for corpus in found for part in corpus.files])


def _open(source: str, options: ReadOptions, downloads: Path) -> Corpus:
    if source == PYTHON_DOCS:
        digest = hashlib.sha256(sys.version.encode()).hexdigest()
        return Corpus(source, [SourceFile(source, 0, digest, io.BytesIO, lambda _: python_docs())])
    if source in CATALOGUE:
        if not options.separator:
            options = replace(options, separator=CATALOGUE[source].separator)
        return Corpus(source, [_local_file(fetch(source, downloads), options)])
    if source.startswith(HUB):
        return _hub_corpus(source, options)
    paths = _files(source)
    name = next((part for part in reversed(Path(source).parts) if not set(part) & set("*?[]")), "")
    if len(paths) == 1:
        name = without_ending(paths[0].name)
    return Corpus(_folder_name(name), [_local_file(path, options) for path in paths])


def _folder_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text).strip("_") or "text"


def _files(source: str) -> list[Path]:
    path = user_path(source)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        if holds_tokens(path):
            raise InputError(f"{source!r} holds tokens, not text: name the text that they were made of")
        paths = sorted(p for p in path.rglob("*") if file_kind(p.name)[0] in KINDS and p.is_file())
        if not paths:
            raise InputError(
                f"data.source {source!r} has no {', '.join(KINDS)} file in it, and has no .bin file with 'train' in "
                "its name"
            )
    else:
        paths = sorted(p for match in glob.glob(str(path), recursive=True) if (p := Path(match)).is_file())
        if not paths:
            raise InputError(
                f"data.source {source!r} does not exist: give a text, .jsonl or .parquet file, a folder or glob of "
                f"them, hf:OWNER/NAME, or one of {', '.join([PYTHON_DOCS, *CATALOGUE])}"
            )
    full = [path for path in paths if path.stat().st_size]
    if not full:
        raise InputError(f"{paths[0]} is empty: there is no text to train on")
    return full


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
    form = file_format(name)
    option = getattr(options, form.option)
    fingerprint = hashlib.sha256(json.dumps([size, digest, option]).encode()).hexdigest()
    is_single_document = form.option == "separator" and not option
    return SourceFile(name, size, fingerprint, opened, partial(parse, name, option), is_single_document)


def _hub_corpus(source: str, options: ReadOptions) -> Corpus:
    """Find the data files of `hf:OWNER/NAME`, or those under `hf:OWNER/NAME/PATH` (a file, a folder or a glob)."""
    owner, _, rest = source.removeprefix(HUB).strip("/").partition("/")
    name, _, path = rest.partition("/")
    if not owner or not name:
        raise InputError(f"{source!r} is no data set: write hf:OWNER/NAME or hf:OWNER/NAME/PATH")
    root = f"datasets/{owner}/{name}/"
    kind = file_kind(path)[0]
    patterns = [path] if kind in FORMATS else [f"{path}/**".lstrip("/"), *([path] if path else [])]
    entries = _list_hub(source, [root + pattern for pattern in patterns])
    if not path:  # one text in several formats, some of it held out
        entries = [entry for entry in entries if not HELD_OUT.search(entry["name"].removeprefix(root))]
        found = {file_kind(entry["name"])[0] for entry in entries}
        kind = next((kind for kind in reversed(KINDS) if kind in found), "")
    wanted = [kind] if kind in FORMATS else KINDS
    entries = [entry for entry in entries if file_kind(entry["name"])[0] in wanted]
    if not entries:
        raise InputError(f"{source!r} has no {', '.join(KINDS)} file for training: name one as hf:OWNER/NAME/PATH")

    def part(entry: dict[str, Any]) -> SourceFile:
        digest = str((entry.get("lfs") or {}).get("sha256") or entry.get("blob_id") or entry["name"])
        file = entry["name"].removeprefix(root)

        def opened() -> BinaryIO:
            return download_from_hub(f"{owner}/{name}", file).open("rb")

        return _source_file(entry["name"], entry["size"], digest, opened, options)

    return Corpus(_folder_name(name), [part(entry) for entry in entries])


def _list_hub(source: str, patterns: list[str]) -> list[dict[str, Any]]:
    """Return the files on the Hub that match one of several globs."""
    with needs("huggingface-hub", repr(source), "huggingface-hub pyarrow"):
        from huggingface_hub import HfFileSystem
    try:
        system: Any = HfFileSystem()
        found = {name: entry for pattern in patterns for name, entry in system.glob(pattern, detail=True).items()}
    except Exception as error:  # whatever the client raises: no such data set, no network, no permission
        raise InputError(f"{source!r} cannot be listed ({type(error).__name__}: {error})") from error
    return [entry for _, entry in sorted(found.items()) if entry["type"] == "file"]
