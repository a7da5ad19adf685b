"""Parsers: from an open file, which may be compressed, to documents; `FORMATS` has one for each kind of file."""

import codecs
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from gptlit.data.tokenizer import without_surrogates
from gptlit.errors import InputError, needs

ALIASES = {".ndjson": ".jsonl", ".jsonlines": ".jsonl"}
COMPRESSED = (".gz", ".zst")
TABLES = (".csv", ".tsv")
BLOCK = 2**20  # characters read at once
PIECE = 2**20  # characters: a text is read, and encoded, in pieces of about this size
LONGEST = 2**24  # characters after which a text without a good place to cut is cut anywhere

# A text may be cut before this space, or after this line end, and its halves encoded apart, with the same ids as
# the full text: in all of tiktoken's patterns a new token begins at a space between two letters, and with a letter
# after a line end.
CUT = re.compile(r"[ \n](?=[^\W\d_])(?<=[^\W\d_] |\S\n)")

# Magic numbers of files that are not plain text, and what to do with them.
MAGIC = {
    b"PK\x03\x04": "a zip archive, as .docx, .xlsx, .odt and .epub are: unpack it, or save it as .txt",
    b"%PDF": "a PDF: save its text as .txt, for instance with pdftotext",
    b"\x1f\x8b": "compressed with gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: let its name end in .zst",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"\xff\xfe": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
}


@dataclass(frozen=True)
class ReadOptions:
    """How files are read."""

    text_key: str = "text"  # key or column of the text in JSON lines and Parquet
    separator: str = ""  # between two documents of a text file; empty: a file is one document


@dataclass(frozen=True)
class UnreadableDocument:
    """A document that cannot be read."""

    reason: str  # one line
    ends_file: bool = False  # what follows it in its file cannot be read either


Document = str | UnreadableDocument
Parser = Callable[[BinaryIO], Iterator[Document]]


def text_or_raise(text: Document) -> str:
    """Return a text that could be read.

    Raises:
        InputError: It could not.
    """
    if isinstance(text, UnreadableDocument):
        raise InputError(text.reason)
    return text


def file_kind(name: str) -> tuple[str, str]:
    """Return the kind of a file and its compression: "a.jsonl.gz" -> (".jsonl", ".gz")."""
    path = Path(name)
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    kind = (Path(path.stem) if compression else path).suffix.lower()
    return ALIASES.get(kind, kind), compression


def without_ending(name: str) -> str:
    """Return a file name without what says its format: "a.jsonl.gz" -> "a"."""
    endings = ([*FORMATS, *ALIASES], COMPRESSED)
    return re.sub("".join(f"({'|'.join(map(re.escape, some))})?" for some in endings) + "$", "", name, flags=re.I)


@dataclass(frozen=True)
class FileFormat:
    """A format of corpus files. Without a separator a file is one document, and `parse` yields its pieces."""

    parse: Callable[[str, str, Any], Iterator[Document]]  # (name, value of the option, file) -> documents
    option: Literal["text_key", "separator"]  # the field of `ReadOptions` that the documents depend on
    in_folders: bool = True  # read from a folder, or only where it is named


def file_format(name: str) -> FileFormat:
    """Return the format of a file, by its name; what is not known is text."""
    return FORMATS.get(file_kind(name)[0], FORMATS[".txt"])


def parse(name: str, option: str, file: BinaryIO) -> Iterator[Document]:
    """Yield the documents of a file in its format; `option` is the value of the format's option."""
    opened: Any = file
    compression = file_kind(name)[1]
    damage: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    if compression == ".gz":
        opened = gzip.GzipFile(fileobj=file)
    elif compression == ".zst":
        zstd = _zstd(name)
        opened, damage = zstd.open(file), (zstd.ZstdError, EOFError)
    count = 0
    try:
        for text in file_format(name).parse(name, option, opened):
            yield text
            count += 1
    except damage as error:
        reason = f"{name} is damaged after {count} documents ({error})"
        yield UnreadableDocument(f"{reason}: fetch it again, or leave the rest out", ends_file=True)


def _zstd(name: str) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        with needs("backports.zstd", name):
            from backports import zstd
    return zstd


def json_rows(name: str, file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the location of each row for messages, and the row: of JSON lines, or of an array that fills the file."""
    if file.peek(1).lstrip(codecs.BOM_UTF8 + b" \r\n\t").startswith(b"["):
        try:
            rows = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            yield name, UnreadableDocument(f"{name} is not a JSON array ({error})", ends_file=True)
            return
        yield from ((f"{name} item {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(file, 1):
        location = f"{name} line {number}"
        if line.strip():
            try:
                yield location, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield location, UnreadableDocument(f"{location} is not JSON ({error})")


def _json_texts(name: str, key: str, file: Any) -> Iterator[Document]:
    for location, row in json_rows(name, file):
        yield row if isinstance(row, UnreadableDocument) else _text_of(row, key, location)


def _text_of(row: Any, key: str, location: str) -> Document:
    text = row.get(key) if isinstance(row, dict) else None
    if isinstance(text, str):
        return without_surrogates(text)
    if isinstance(row, dict) and key in row:
        return UnreadableDocument(f"{location}: {key!r} is {type(text).__name__}, not text")
    keys = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    remedy = "fit reads instructions as they are, without prepare, or " if "instruction" in keys else ""
    return UnreadableDocument(f"{location} has no {key!r}, only {keys}: {remedy}set text_key")


def _parquet(name: str, key: str, file: BinaryIO) -> Iterator[Document]:
    with needs("pyarrow", name):
        import pyarrow
        import pyarrow.parquet
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
        columns = table.schema_arrow.names
        if key not in columns:
            raise InputError(f"{name} has no column {key!r}, only {', '.join(map(repr, columns))}: set text_key")
        for batch in table.iter_batches(batch_size=256, columns=[key], use_threads=False):
            for text in batch.column(0).to_pylist():
                row += 1
                is_text = isinstance(text, str)
                yield text if is_text else UnreadableDocument(f"{name} row {row}: {key!r} is {type(text).__name__}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"{name} is damaged after row {row} ({error}): fetch it again, or leave the rest out"
        yield UnreadableDocument(reason, ends_file=True)


def _text(name: str, separator: str, file: io.BufferedReader) -> Iterator[Document]:
    """Yield the documents of a text file, or the pieces of its only one."""
    if reason := _other_format(name, separator, file.peek(1)):
        yield UnreadableDocument(f"{name} {reason}", ends_file=True)
    elif separator:
        yield from _separated(name, separator, file)
    else:
        yield from pieces(_decoded(name, file))


def _other_format(name: str, separator: str, head: bytes) -> str:
    """Return what a file is if it is not plain text, and what to do with it."""
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return f"is {what}"
    if b"\0" in head[:8000]:
        return "is binary, not text: save its text as .txt (a file of tokens is read by the name of its folder)"
    if re.match(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"', head):
        return "holds JSON, not plain text: let its name end in .jsonl or .json"
    if file_kind(name)[0] in TABLES and not separator:
        return "is a table: save it as .jsonl or .parquet, or set a separator to train on it as it is"
    return ""


def _separated(name: str, separator: str, file: BinaryIO) -> Iterator[Document]:
    held: list[str] = []
    edge = ""  # a separator may begin in one block and end in the next
    for block in _decoded(name, file):
        if isinstance(block, UnreadableDocument):
            yield block
            return
        first, *others = (edge + block).split(separator)
        if others:
            yield "".join([*held, first]).strip()
            yield from (text.strip() for text in others[:-1])
            held, first = [], others[-1]
        cut = max(0, len(first) - len(separator) + 1)
        held.append(first[:cut])
        edge = first[cut:]
    yield "".join([*held, edge]).strip()


def pieces(blocks: Iterable[Document], size: int = PIECE, longest: int = LONGEST) -> Iterator[Document]:
    """Cut a stream of text between words into pieces of at least `size` characters, except the last.

    Encoded separately they give the ids of the full text. Each character is searched for a cut once.
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
    r"""Yield the text block by block, without a byte order mark, with "\r\n" and "\r" as "\n"."""
    reader = io.TextIOWrapper(file, encoding="utf-8-sig")
    try:
        while block := reader.read(BLOCK):
            yield block
    except UnicodeDecodeError as error:
        reason = f"{name} is not UTF-8: it has the byte {error.object[error.start]:#04x}"
        yield UnreadableDocument(f"{reason}; if it is a text, convert it, for instance with iconv", ends_file=True)
    reader.detach()  # or it would close the file


FORMATS = {  # of a data set in several formats on the Hub, the last one is read
    ".txt": FileFormat(_text, "separator"),
    ".jsonl": FileFormat(_json_texts, "text_key"),
    ".parquet": FileFormat(_parquet, "text_key"),
    ".json": FileFormat(_json_texts, "text_key", in_folders=False),  # metadata more often than not
}
