"""Where documents come from: a corpus is a list of parts, each with its documents in a fixed order."""

import ast
import codecs
import glob
import gzip
import hashlib
import io
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from gptlit.data.download import CATALOGUE, fetch
from gptlit.errors import InputError, user_path

PYTHON_DOCS = "python-docs"


HUB = "hf:"


KINDS = (".txt", ".jsonl", ".parquet")  # what is looked for in a folder; .gz and .zst may follow the first two


ALIASES = {".ndjson": ".jsonl", ".jsonlines": ".jsonl"}


JSON = ".json"  # read where it is named; in a folder of texts it is metadata more often than not


PACKED = (".gz", ".zst")


UNPACKED_BLOCK = 2**13  # bytes unpacked at once: those that damage may cost


BLOCK = 2**20  # bytes read at once


PIECE = 2**20  # characters: a text is read, and encoded, in pieces of about this size


LONGEST = 2**24  # characters after which a text without a good place to cut is cut anywhere


LONGEST_DOCUMENT = 2**28  # characters between two separators


DIGEST_LIMIT = 2**26  # bytes: larger files are told apart by their size and this much of them


# A text may be cut before this space, or after this line end, and its halves encoded apart, with the same ids as
# together: for the patterns of all of tiktoken's encodings, a new word begins at a space between two letters, and with
# a letter after a line.
CUT = re.compile(r"[ \n](?=[^\W\d_])(?<=[^\W\d_] |\S\n)")


# What files begin with that are not plain text, and what to do with them.
OFFICE = "an office document: save it as .txt"


FORMATS = {
    b"PK\x03\x04": "a zip archive, as .docx, .xlsx, .odt and .epub are: unpack it, or save it as .txt",
    b"%PDF": "a PDF: save its text as .txt, for instance with pdftotext",
    b"\xfd7zXZ": "packed with xz: unpack it with xz -d",
    b"BZh": "packed with bzip2: unpack it with bunzip2",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a rar archive: unpack it",
    b"\x1f\x8b": "packed with gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "packed with zstd: let its name end in .zst",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"{\\rtf": OFFICE,
    b"\xd0\xcf\x11\xe0": OFFICE,
    b"\xff\xfe": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
}


BEGINS_AS_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"(\\.|[^"\\\n])*"\s*:')


TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Args:
        text_key: Key or column of the text in JSON lines and Parquet.
        separator: What stands between two documents of a text file; empty: a file is one document.
    """

    text_key: str = "text"
    separator: str = ""


@dataclass(frozen=True)
class UnreadableDocument:
    """A document that cannot be read.

    Args:
        reason: Why, in one line.
        ends_file: What follows it in its file cannot be read either.
    """

    reason: str
    ends_file: bool = False


Document = str | UnreadableDocument


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Args:
        name: For people.
        size: Bytes on disk; 0 where there is no file.
        fingerprint: Hexadecimal digest that changes when the documents may have changed.
        open: Opens the file.
        parse: From the file to its documents.
        whole: Everything that `parse` yields is one document, in pieces.
    """

    name: str
    size: int
    fingerprint: str
    open: Callable[[], BinaryIO]
    parse: Callable[[BinaryIO], Iterator[Document]]
    is_single_document: bool = False

    def read(self, report: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Yield documents, or the pieces of the only one; `report` is told how many bytes were read."""
        with self.open() as file:
            counted = _Counted(file, report) if report is not None and self.size else file
            yield from self.parse(counted)  # type: ignore[arg-type]


class _Counted(io.RawIOBase):
    """A file that tells how much was read of it."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]) -> None:
        self._file, self._report, self._count = file, report, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._count += len(data)
        self._report(self._count)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


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


def text_or_raise(text: Document) -> str:
    """Return a text that could be read.

    Raises:
        InputError: It could not.
    """
    if isinstance(text, UnreadableDocument):
        raise InputError(text.reason)
    return text


def open_corpus(
    sources: str | Sequence[str],
    reading: ReadOptions | None = None,
    downloads: Path = Path("data/downloads"),
    report: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Find a corpus.

    Args:
        sources: One or several of: "python-docs"; a name of the catalogue; a file or folder or glob of `.txt`,
            `.jsonl` (plain, `.gz`, `.zst`) and `.parquet`; a `.json` file, of JSON lines or an array of objects;
            `hf:OWNER/NAME[/PATH]`, a data set on Hugging Face's hub.
        reading: How files are read.
        downloads: Where files of the catalogue are kept.
        report: Called with (bytes so far, bytes in all) of a download.

    Raises:
        InputError: There is nothing of that name, or nothing in it.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    if not sources:
        raise InputError("no source is given: name a file, a folder, or one of " + ", ".join(names()))
    reading = reading or ReadOptions()
    found = [_open(source, reading, downloads, report) for source in sources]
    return Corpus("-".join(corpus.name for corpus in found)[:80], [part for corpus in found for part in corpus.files])


def names() -> list[str]:
    """Return the corpora that need no file."""
    return [PYTHON_DOCS, *CATALOGUE]


def _open(source: str, reading: ReadOptions, downloads: Path, report: Callable[[int, int], None] | None) -> Corpus:
    if source == PYTHON_DOCS:
        digest = hashlib.sha256(sys.version.encode()).hexdigest()
        return Corpus(source, [SourceFile(source, 0, digest, io.BytesIO, lambda _: python_docs())])
    if source in CATALOGUE:
        if not reading.separator:
            reading = ReadOptions(reading.text_key, CATALOGUE[source].separator)
        return Corpus(source, [_file_part(fetch(source, downloads, report), reading)])
    if source.startswith(HUB):
        return _hub_corpus(source, reading)
    paths = _files(source)
    words = [_stem(paths[0])] if len(paths) == 1 else [p for p in Path(source).parts if not set(p) & set("*?[]")]
    name = re.sub(r"[^\w-]+", "_", words[-1]).strip("_") if words else ""
    return Corpus(name or "text", [_file_part(path, reading) for path in paths])


def _files(source: str) -> list[Path]:
    path = user_path(source)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(p for p in path.rglob("*") if _kind(p.name)[0] in KINDS and p.is_file())
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


def _kind(name: str) -> tuple[str, str]:
    """Return what is in a file and how it is packed: "a.jsonl.gz" -> (".jsonl", ".gz")."""
    path = Path(name)
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    kind = (Path(path.stem) if packed else path).suffix.lower()
    return ALIASES.get(kind, kind), packed


def _stem(path: Path) -> str:
    return re.sub(r"(\.(txt|jsonl?|ndjson|jsonlines|parquet))?(\.(gz|zst))?$", "", path.name, flags=re.IGNORECASE)


def _file_part(path: Path, reading: ReadOptions) -> SourceFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= DIGEST_LIMIT:
            content = file.read()
        else:
            content = file.read(DIGEST_LIMIT // 2)
            file.seek(-DIGEST_LIMIT // 2, io.SEEK_END)
            content += file.read()
    return _part(str(path), size, hashlib.sha256(content).hexdigest(), lambda: path.open("rb"), reading)


def _part(name: str, size: int, digest: str, opened: Callable[[], BinaryIO], reading: ReadOptions) -> SourceFile:
    """Choose the parser by the file's name."""
    kind, packed = _kind(name)
    is_text = kind not in (".jsonl", JSON, ".parquet")
    option = reading.separator if is_text else reading.text_key
    fingerprint = hashlib.sha256(json.dumps([size, digest, option]).encode()).hexdigest()
    if kind == ".parquet":
        return SourceFile(name, size, fingerprint, opened, partial(_parquet, name, reading.text_key))
    if is_text:
        parse: Callable[[io.BufferedReader], Iterator[Document]] = partial(_plain, name, reading.separator)
    else:
        parse = partial(_json_lines if kind == ".jsonl" else _json, name, reading.text_key)
    whole = is_text and not reading.separator
    return SourceFile(name, size, fingerprint, opened, partial(_unpacked, name, packed, parse), whole)


def _hub_corpus(source: str, reading: ReadOptions) -> Corpus:
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
        kinds = (JSON,) if _kind(pattern)[0] == JSON else KINDS
        found: Any = files.glob(pattern if _kind(pattern)[0] in kinds else f"{pattern}/**", detail=True)
    except Exception as error:  # whatever the client raises: no such data set, no network, no permission
        raise InputError(f"{source!r} cannot be listed ({type(error).__name__}: {error})") from error
    entries = [entry for _, entry in sorted(found.items()) if _is_data(entry, root, kinds, named=bool(path))]
    there = {_kind(entry["name"])[0] for entry in entries}
    best = next((kind for kind in (".parquet", ".jsonl", ".txt") if kind in there), "")  # one text in several formats
    entries = [entry for entry in entries if path or _kind(entry["name"])[0] == best]
    if not entries:
        raise InputError(f"{source!r} has no {', '.join(KINDS)} file for training: name one as hf:OWNER/NAME/PATH")

    def part(entry: dict[str, Any]) -> SourceFile:
        version = str((entry.get("lfs") or {}).get("sha256") or entry.get("blob_id") or entry["name"])
        return _part(entry["name"], int(entry["size"]), version, partial(_remote, files, entry["name"]), reading)

    return Corpus(re.sub(r"[^\w-]+", "_", name), [part(entry) for entry in entries])


class _Remote(_Counted):
    """A file on the network: what goes wrong there is no damage of the file."""

    def read(self, size: int = -1) -> bytes:
        try:
            return super().read(size)
        except Exception as error:  # the client has several libraries' errors
            raise InputError(
                f"the connection broke ({type(error).__name__}: {error}): give the same command again, it goes on"
            ) from error


def _remote(files: Any, name: str) -> BinaryIO:
    return _Remote(files.open(name, "rb"), lambda _: None)  # type: ignore[return-value]


def _is_data(entry: dict[str, Any], root: str, kinds: Sequence[str], named: bool) -> bool:
    """Whether an entry is a file of these kinds; unless it was named, also whether it is for training."""
    path = str(entry["name"]).removeprefix(root).lower()
    other = re.search(r"(^|[/_.-])(val|valid|validation|dev|test)([/_.-]|$)", path)
    return entry.get("type") == "file" and _kind(path)[0] in kinds and (named or not other)


# Parsers: from an open file to documents, or to the pieces of one.


class _Unpacked(io.RawIOBase):
    """What can be read of a compressed file: it ends where the file is damaged, and `damage` says how."""

    def __init__(self, file: Any, errors: tuple[type[Exception], ...]) -> None:
        self._file, self._errors = file, errors
        self.damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:  # read1 returns what there is; read would lose it where the damage comes before the end of the buffer
            data = b"" if self.damage else self._file.read1(len(buffer))
        except self._errors as error:
            self.damage, data = error, b""
        buffer[: len(data)] = data
        return len(data)


def _unpacked(
    name: str, packed: str, parse: Callable[[io.BufferedReader], Iterator[Document]], file: BinaryIO
) -> Iterator[Document]:
    """Parse a file that may be compressed; damage ends it."""
    if not packed:
        yield from parse(io.BufferedReader(file, BLOCK))  # type: ignore[arg-type]
        return
    if packed == ".zst":
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            try:
                from backports import zstd
            except ImportError as error:
                raise InputError(f"{name} needs the package backports.zstd: pip install backports.zstd") from error
        unpacked = _Unpacked(zstd.open(file), (zstd.ZstdError, EOFError))
    else:
        unpacked = _Unpacked(gzip.GzipFile(fileobj=file), (gzip.BadGzipFile, EOFError, zlib.error))
    count = 0
    for text in parse(io.BufferedReader(unpacked, UNPACKED_BLOCK)):
        if unpacked.damage and isinstance(text, UnreadableDocument):
            continue  # the document that the damage cuts
        yield text
        count += 1
    if unpacked.damage:
        reason = f"{name} is damaged after {count} documents ({unpacked.damage})"
        yield UnreadableDocument(f"{reason}: fetch it again, or leave the rest out", ends_file=True)


def _json_lines(name: str, key: str, file: Iterable[bytes]) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield UnreadableDocument(f"{name} line {number} is not JSON ({error})")
            continue
        yield _text_of(row, key, f"{name} line {number}")


def _json(name: str, key: str, file: io.BufferedReader) -> Iterator[Document]:
    """Yield the texts of JSON lines, or of the one value that fills the file: an object or an array of objects."""
    first = file.readline()
    if isinstance(_loads(first), dict):
        yield from _json_lines(name, key, chain([first], file))
        return
    content = first + file.read()
    value = _loads(content)
    if value is not None:
        for number, row in enumerate(value if isinstance(value, list) else [value], 1):
            yield _text_of(row, key, f"{name} item {number}")
    elif content.lstrip(codecs.BOM_UTF8 + b" \r\n\t").startswith(b"["):
        yield UnreadableDocument(f"{name} is not a whole array of JSON: fetch it again", ends_file=True)
    else:
        yield from _json_lines(name, key, io.BytesIO(content))


def _loads(content: bytes) -> Any:
    """Return a JSON value; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _text_of(row: Any, key: str, place: str) -> Document:
    text = row.get(key) if isinstance(row, dict) else None
    if isinstance(text, str):
        return _without_surrogates(text)
    if isinstance(row, dict) and key in row:
        return UnreadableDocument(f"{place}: {key!r} is {type(text).__name__}, not text")
    keys = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    return UnreadableDocument(f"{place} has no {key!r}, only {keys}: set text_key")


def _without_surrogates(text: str) -> str:
    """Replace what JSON can escape but no encoding can hold: halves of pairs."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(name: str, key: str, file: BinaryIO) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{name} needs the package pyarrow: pip install pyarrow") from error
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
        columns = table.schema_arrow.names
        if key not in columns:
            raise InputError(f"{name} has no column {key!r}, only {', '.join(map(repr, columns))}: set text_key")
        for batch in table.iter_batches(batch_size=256, columns=[key], use_threads=False):
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    yield UnreadableDocument(f"{name} row {row}: {key!r} is not UTF-8")
                    continue
                yield (
                    text
                    if isinstance(text, str)
                    else UnreadableDocument(f"{name} row {row}: {key!r} is {type(text).__name__}")
                )
    except (pyarrow.ArrowException, OSError) as error:
        yield UnreadableDocument(f"{name} is damaged after row {row} ({error}): fetch it again, or leave the rest out")


def _plain(name: str, separator: str, file: io.BufferedReader) -> Iterator[Document]:
    """Yield the documents of a text file, or the pieces of its only one; nothing of what is no plain text."""
    if reason := _other_format(name, separator, file.peek()):
        yield UnreadableDocument(f"{name} {reason}", ends_file=True)
    elif separator:
        yield from _separated(name, separator, file)
    else:
        yield from pieces(_decoded(name, file))


def _other_format(name: str, separator: str, head: bytes) -> str:
    """Return what a file is, if it is no plain text, and what to do with it."""
    for magic, what in FORMATS.items():
        if head.startswith(magic):
            return f"is {what}"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    if b"\0" in head[:8000]:
        return "is binary, no text: save its text as .txt (a file of tokens is read by the name of its folder)"
    if separator:
        return ""  # whoever sets one has looked into the file
    if _kind(name)[0] in TABLES:
        return "is a table: save it as .jsonl or .parquet, or set a separator to train on it as it is"
    if BEGINS_AS_JSON.match(head):
        return "holds JSON: let its name end in .jsonl or .json, or set a separator to train on it as it is"
    return ""


def _separated(name: str, separator: str, file: BinaryIO) -> Iterator[Document]:
    held: list[str] = []
    edge, size = "", 0  # a separator may begin in one block and end in the next
    for block in _decoded(name, file):
        if isinstance(block, UnreadableDocument):
            yield block
            return
        first, *others = (edge + block).split(separator)
        if others:
            yield "".join([*held, first]).strip()
            yield from (text.strip() for text in others[:-1])
            held, size, first = [], 0, others[-1]
        cut = max(0, len(first) - len(separator) + 1)
        held.append(first[:cut])
        edge, size = first[cut:], size + cut
        if size > LONGEST_DOCUMENT:
            yield UnreadableDocument(
                f"{name} has no separator {separator!r} in {size:,} characters: set another one", ends_file=True
            )
            return
    yield "".join([*held, edge]).strip()


def pieces(blocks: Iterable[Document], size: int = PIECE, longest: int = LONGEST) -> Iterator[Document]:
    """Cut a stream of text where no word is cut, into pieces of at least `size` characters but for the last.

    Encoded apart they give the ids of the whole. Each character is searched for a cut once.
    """
    rest, bad = "", None
    for block in blocks:
        if isinstance(block, UnreadableDocument):
            bad = block
            break
        start = max(size, len(rest) - 1)  # the last character may be a cut now that the next is known
        rest += block
        while found := CUT.search(rest, start):
            cut = found.start() + (found[0] == "\n")
            yield rest[:cut]
            rest, start = rest[cut:], size
        if len(rest) > longest:
            yield rest
            rest = ""
    if rest:
        yield rest
    if bad is not None:
        yield bad


def _decoded(name: str, file: BinaryIO) -> Iterator[Document]:
    r"""Yield the text block by block, without a byte order mark, "\r\n" as "\n"; at the end, why there is no more."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    before, held = 0, ""
    while True:
        block = file.read(BLOCK)
        waiting = len(decoder.getstate()[0])
        try:
            text = held + decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte, position = error.object[error.start], before - waiting + error.start
            reason = f"{name} is not UTF-8: byte {byte:#04x} at position {position}"
            yield UnreadableDocument(f"{reason}; if it is a text, convert it, for instance with iconv", ends_file=True)
            return
        before += len(block)
        held = "\r" if block and text.endswith("\r") else ""  # its "\n" may be in the next block
        text = text[: len(text) - len(held)].replace("\r\n", "\n")
        if text:
            yield text
        if not block:
            return


def python_docs() -> Iterator[str]:
    """Yield the language reference topic by topic, then the docstrings of the standard library module by module.

    A text that came before is left out. Nothing is imported but `pydoc_data`: sources are parsed, not run.

    Raises:
        InputError: This Python comes without them.
    """
    try:
        from pydoc_data import topics  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError(
            f"this Python ({sys.executable}) comes without pydoc_data: give --data.source a text file or folder"
        ) from error
    seen: set[str] = set()

    def new(texts: Iterable[str]) -> str:
        fresh = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(fresh)
        return "\n\n".join(fresh)

    topics_of_the_language = ([text.strip()] for _, text in sorted(topics.topics.items()))
    yield from filter(None, map(new, chain(topics_of_the_language, map(_docstrings, _library_files()))))


def _library_files() -> list[Path]:
    """Return the sources of the standard library, but for its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = {path.relative_to(library).parts: path for path in library.rglob("*.py")}
    return [files[parts] for parts in sorted(files) if not left_out & set(parts)]


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one source file, outermost first."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file of another Python version
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node) or "").strip()
            if docstring:
                yield docstring
