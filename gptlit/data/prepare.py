"""Documents -> token shards and a manifest on disk.

Texts are encoded by several processes and written in order by one, so the bytes do not depend on how many there are.
While it goes on, `progress.json` says how far everything on disk is whole: after a kill the same call cuts off what
came later and goes on there. `manifest.json` is written last, so a folder that has one is complete.
"""

import errno
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from gptlit.data.encoder import Encoders
from gptlit.data.sources import Corpus, SourceFile, UnreadableDocument
from gptlit.data.token_files import FORMAT, MANIFEST, SPLITS, VERIFY_LIMIT, TokenData, open_tokens
from gptlit.data.tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer, Tokenizer, fingerprint, tokenizer_spec
from gptlit.errors import InputError, note

PROGRESS = "progress.json"
LOCK = ".lock"
LEFTOVERS = (LOCK, f"{PROGRESS}.partial", f"{MANIFEST}.partial")  # of a process that was killed as it began
SHARD_TOKENS = 100_000_000
BATCH = 2**20  # characters encoded at once
BATCH_PIECES = 2**13  # and documents
SAVE_EVERY = 5.0  # seconds between two notes of the progress
SMALL = 2**25  # bytes of text that are encoded in this process: starting others takes longer
MANY = 100_000  # documents that are never too few
FEW = 10  # a corpus is small when its smallest split would get fewer documents than that


@dataclass(frozen=True)
class Split:
    """How a corpus is divided: the shares of the validation and the test part, each at least 0, together below 1.

    Documents stay whole where there are several, and a document's part follows from its own text, so that it keeps it
    when the corpus grows; of few (below 10 for the smallest part) those with the lowest numbers are taken, so that
    every part gets some. The characters of a single text are divided: the first train, the next validate, the last
    test.

    Raises:
        InputError: A share is out of its range.
    """

    val_fraction: float = 0.05
    test_fraction: float = 0.0

    def __post_init__(self) -> None:
        for key in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"{key} must be at least 0 and below 1, got {getattr(self, key)!r}")
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} leave nothing to train on"
            )

    @property
    def few(self) -> int:
        """How many documents are too few for their numbers to be evenly spread."""
        smallest = min(f for f in (self.val_fraction, self.test_fraction, 1.0) if f)
        return math.ceil(FEW / max(smallest, FEW / MANY))

    def thresholds(self, numbers: list[float]) -> tuple[float, float]:
        """Return the numbers below which a document validates and tests; one at least is left to train on.

        Args:
            numbers: Of the first `few` documents.
        """
        if len(numbers) >= self.few:
            return self.val_fraction, self.val_fraction + self.test_fraction
        numbers = sorted(set(numbers))  # a document may be there twice
        vals, tests = (max(1, round(len(numbers) * f)) if f else 0 for f in (self.val_fraction, self.test_fraction))
        vals = max(0, min(vals, len(numbers) - 1))
        tests = max(0, min(tests, len(numbers) - 1 - vals))
        numbers = [*numbers, 1.0]
        return numbers[vals], numbers[vals + tests]


def number(pieces: Iterable[str]) -> float:
    """Return a document's own number, from 0 to 1."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode())
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


Position = tuple[int, int, int]  # part, documents or pieces taken of it, documents skipped so far


@dataclass(frozen=True, slots=True)
class _Piece:
    """A document or a piece of one, on its way to a split."""

    text: str
    split: str
    first: bool


class _Feed:
    """The pieces of all corpora with their splits, from any position on.

    Args:
        corpora: By the split that they are for; what is under "train" is divided.
        split: The shares.
        skip_bad: Count what cannot be read and go on.
    """

    def __init__(self, corpora: Mapping[str, Corpus], split: Split, skip_bad: bool) -> None:
        self.files = [(name, part) for name in SPLITS if name in corpora for part in corpora[name].files]
        self.read = 0  # bytes of sources, compressed as they are
        self.skipped = 0  # documents that could not be read
        self._split, self._skip_bad = split, skip_bad
        self._before = 0
        self._numbers: dict[str, float] = {}  # of whole parts
        self._noted: set[str] = set()  # parts whose end is left out
        train = [part for name, part in self.files if name == "train"]
        if len(train) == 1 and train[0].is_single_document:
            numbers = [0.0]
        else:
            numbers = list(islice(self._first_numbers(train), split.few))
        self._is_single = len(numbers) == 1 and (split.val_fraction > 0 or split.test_fraction > 0)
        self._val, self._test = split.thresholds(numbers)

    def _first_numbers(self, parts: list[SourceFile]) -> Iterator[float]:
        for part in parts:
            if part.is_single_document:
                yield self._number_of(part)
            else:
                yield from (number([text]) for text in self._texts(part) if text)

    def _number_of(self, part: SourceFile) -> float:
        if part.name not in self._numbers:
            self._numbers[part.name] = number(filter(None, self._texts(part)))
        return self._numbers[part.name]

    def _texts(self, part: SourceFile, report: Callable[[int], None] | None = None) -> Iterator[str | None]:
        """Yield the texts of a part that are not empty; None for what cannot be read.

        Raises:
            InputError: One cannot be read, and that is not to be passed over.
        """
        for text in part.read(report):
            if isinstance(text, UnreadableDocument):
                if not self._skip_bad:
                    raise InputError(f"{text.reason} (gptlit prepare --skip_bad leaves out what cannot be read)")
                if text.ends_file and part.name not in self._noted:
                    self._noted.add(part.name)
                    note(f"left out, with all that follows in that file: {text.reason}")
                yield None
            elif text:
                yield text

    def __call__(self, start: Position) -> Iterator[tuple[Position, _Piece]]:
        """Yield (position after this piece, piece)."""
        self.skipped = start[2]
        for index, (name, part) in enumerate(self.files):
            if index >= start[0]:
                for taken, piece in enumerate(self._pieces(name, part), 1):
                    if (index, taken) > start[:2]:
                        self.skipped += piece is None
                        if piece is not None:
                            yield (index, taken, self.skipped), piece
            self._before += part.size

    def _pieces(self, name: str, part: SourceFile) -> Iterator[_Piece | None]:
        """Yield the pieces of a part; None for what could not be read."""
        texts = self._texts(part, self._count)
        if name == "train" and self._is_single:
            yield from self._cut(texts, sum(len(text or "") for text in self._texts(part)))
        elif part.is_single_document:
            place = self._place(self._number_of(part)) if name == "train" else name
            yield from (_Piece(text, place, first=not done) if text else None for done, text in enumerate(texts))
        else:
            for text in texts:
                place = self._place(number([text])) if text and name == "train" else name
                yield _Piece(text, place, first=True) if text else None

    def _place(self, own: float) -> str:
        return "val" if own < self._val else "test" if own < self._test else "train"

    def _cut(self, texts: Iterator[str | None], length: int) -> Iterator[_Piece | None]:
        """Divide a single text by its characters."""
        train = int(length * (1 - self._split.val_fraction - self._split.test_fraction))
        val = int(length * (1 - self._split.test_fraction))
        done = 0
        for text in texts:
            if text is None:
                yield None
                continue
            for name, start, end in (("train", 0, train), ("val", train, val), ("test", val, length)):
                if piece := text[max(0, start - done) : max(0, end - done)]:
                    yield _Piece(piece, name, first=start >= done)
            done += len(text)

    def _count(self, read: int) -> None:
        self.read = self._before + read


def _batches(pieces: Iterator[tuple[Position, _Piece]]) -> Iterator[tuple[tuple[Position, list[_Piece]], list[str]]]:
    """Collect pieces until they have `BATCH` characters: ((position after them, pieces), texts)."""
    batch: list[_Piece] = []
    size = 0
    position = (0, 0, 0)
    for position, piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH or len(batch) >= BATCH_PIECES:
            yield (position, batch), [piece.text for piece in batch]
            batch, size = [], 0
    if batch:
        yield (position, batch), [piece.text for piece in batch]


@dataclass
class _SplitWriter:
    """Writes the documents of a split to shards, with the end-of-text token between them.

    Args:
        folder: Where the shards go.
        name: Of the split.
        dtype: Of the ids on disk.
        end: The end-of-text token.
        shard_tokens: Length of every shard but the last.
        documents: Written so far.
        text_bytes: Encoded so far.
        shards: Entries of the manifest, one a finished shard.
        tokens: In the shard that is being written.
    """

    folder: Path
    name: str
    dtype: str
    end: int
    shard_tokens: int
    documents: int = 0
    text_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    _file: BinaryIO | None = field(default=None, init=False)
    _digest: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Go on with a shard that was begun: cut off what came after the last note of the progress."""
        width = np.dtype(self.dtype).itemsize
        for shard in self.shards:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["tokens"] * width:
                raise InputError(f"{path} is damaged: delete {self.folder} to begin again")
        if not self.tokens:
            return
        path = self._path
        whole = self.tokens * width
        if not path.is_file() or path.stat().st_size < whole:
            raise InputError(f"{path} is damaged: delete {self.folder} to begin again")
        self._file = path.open("rb+")
        self._file.truncate(whole)
        self._digest = hashlib.file_digest(self._file, "sha256")
        self._file.seek(0, os.SEEK_END)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.shards):05d}.bin"

    @property
    def total(self) -> int:
        """Tokens in all shards."""
        return sum(int(shard["tokens"]) for shard in self.shards) + self.tokens

    def add(self, ids: np.ndarray, text_bytes: int, first: bool) -> None:
        """Write a document, or the next piece of one."""
        if first and self.documents:
            ids = np.concatenate([np.array([self.end], dtype=ids.dtype), ids])
        self.documents += first
        self.text_bytes += text_bytes
        while len(ids):
            if self._file is None:
                self._file = self._path.open("wb")
                self._digest = hashlib.sha256()
            part, ids = ids[: self.shard_tokens - self.tokens], ids[self.shard_tokens - self.tokens :]
            data = part.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self.tokens += len(part)
            if self.tokens == self.shard_tokens:
                self.finish()

    def sync(self) -> dict[str, Any]:
        """Bring what is written to the disk; return what the progress says of it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {key: getattr(self, key) for key in ("documents", "text_bytes", "shards", "tokens")}

    def finish(self) -> None:
        """End the shard that is being written, if there is one."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self.shards.append({"file": self._path.name, "tokens": self.tokens, "sha256": self._digest.hexdigest()})
            self._file, self.tokens = None, 0

    def close(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Report:
    """What a preparation tells while it goes on: bytes of sources read and in all (0 where nobody knows), tokens and
    bytes of text so far.
    """

    read: int
    size: int
    tokens: int
    text_bytes: int


def prepare(
    corpora: Corpus | Mapping[str, Corpus],
    folder: Path,
    tokenizer: Tokenizer,
    split: Split,
    *,
    shard_tokens: int = SHARD_TOKENS,
    num_workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    report: Callable[[Report], None] | None = None,
) -> TokenData:
    """Tokenise a corpus into a folder; go on where an earlier call was interrupted; open what is there already.

    Args:
        corpora: What is divided; or {"train": that, "val": ..., "test": ...} with separate sources.
        folder: Where the shards go.
        tokenizer: From text to ids.
        split: Shares for validation and test.
        shard_tokens: Length of every shard of a split but its last one.
        num_workers: Processes that encode, 0 for none; None: one a core, and none for a small corpus.
        skip_bad: Leave out what cannot be read, rather than stop.
        overwrite: Delete what another tokenizer, source or setting made there.
        wait: Wait for another process that prepares the same folder, rather than refuse.
        report: Called after each batch.

    Raises:
        InputError: A document cannot be read, there is nothing to read, the disk is full, the folder is of something
            else or damaged, or another process writes it.
    """
    corpora = {"train": corpora} if isinstance(corpora, Corpus) else dict(corpora)
    if shard_tokens < 1:
        raise InputError(f"shard_tokens must be at least 1, got {shard_tokens}")
    if num_workers is not None and num_workers < 0:
        raise InputError(f"num_workers must be at least 0, got {num_workers}")
    settings = _settings(corpora, tokenizer, split, shard_tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        with _locked(folder, wait):
            if not _is_done(folder, settings, overwrite):
                feed = _Feed(corpora, split, skip_bad)
                _write(feed, _Shards(folder, tokenizer, settings), num_workers, report)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"there is no space left for {folder} ({error.strerror}): free some and give the same command again, "
            "it goes on where it stopped"
        ) from error
    return open_tokens(folder)


def cache_folder(corpora: Corpus | Mapping[str, Corpus], root: Path, tokenizer: Tokenizer, split: Split) -> Path:
    """Return the folder under `root` that belongs to a corpus, a tokenizer and a split."""
    corpora = {"train": corpora} if isinstance(corpora, Corpus) else dict(corpora)
    settings = _settings(corpora, tokenizer, split, SHARD_TOKENS)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return root / f"{corpora['train'].name}-{key[:12]}"


def prepare_cached(
    corpora: Corpus | Mapping[str, Corpus],
    root: Path,
    tokenizer: Tokenizer,
    split: Split,
    report: Callable[[Report], None] | None = None,
) -> TokenData:
    """Tokenise a corpus into a folder under `root` that is its own, or open the one that an earlier call left there.

    Raises:
        InputError: As in `prepare`; or what is there was changed.
    """
    folder = cache_folder(corpora, root, tokenizer, split)
    if (folder / MANIFEST).is_file():
        data = open_tokens(folder)
    else:
        data = prepare(corpora, folder, tokenizer, split, wait=True, report=report)
    if sum(data.tokens(name) for name in SPLITS) * np.dtype(data.manifest["dtype"]).itemsize <= VERIFY_LIMIT:
        data.verify()
    return data


def _settings(corpora: Mapping[str, Corpus], tokenizer: Tokenizer, split: Split, shard_tokens: int) -> dict[str, Any]:
    """Return everything that the bytes on disk depend on."""
    return {
        "format": FORMAT,
        "tokenizer": TOKENIZER_JSON if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.name,
        "tokenizer_sha256": fingerprint(tokenizer),
        "sources": {name: corpus.fingerprint for name, corpus in corpora.items()},
        **asdict(split),
        "shard_tokens": shard_tokens,
    }


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    """Keep other processes out. The lock ends with this process, however it ends."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise InputError(f"another process is preparing {folder}: wait for it, or choose another --out") from None
        note(f"waiting for another process that prepares {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _refuse_foreign(folder: Path) -> None:
    """Touch nothing in a folder that is in use for something else."""
    if not any((folder / name).is_file() for name in (MANIFEST, PROGRESS)):
        others = sorted(path.name for path in folder.iterdir() if path.name not in LEFTOVERS)
        if others:
            raise InputError(f"{folder} is not empty ({others[0]}) and holds no tokens of ours: choose another --out")


def _is_done(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds what is wanted already; make room for it if not.

    Raises:
        InputError: It holds something else.
    """
    found = next((path for name in (MANIFEST, PROGRESS) if (path := folder / name).is_file()), None)
    if found is not None:
        try:
            there = json.loads(found.read_bytes())
            differences = [key for key, value in settings.items() if there.get(key) != value]
        except (ValueError, AttributeError, RecursionError):
            there, differences = {}, ["what it says, it is damaged"]
        if not differences and not (overwrite and found.name == MANIFEST and _is_damaged(folder)):
            if found.name == MANIFEST:
                (folder / PROGRESS).unlink(missing_ok=True)  # the process was killed in between
            return found.name == MANIFEST
        if not overwrite:
            key = differences[0]
            raise InputError(
                f"{folder} was made with another {key} ({_short(there.get(key))}, now {_short(settings.get(key))}): "
                "choose another --out, or replace it with --overwrite"
            )
    for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST):  # without it the rest is nothing
        if _is_ours(path.name) and path.name != LOCK:
            path.unlink()
    return False


def _is_damaged(folder: Path) -> bool:
    try:
        open_tokens(folder).verify()
    except InputError:
        return True
    return False


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 40 else f"{text[:37]}..."


def _is_ours(name: str) -> bool:
    files = (*LEFTOVERS, MANIFEST, PROGRESS, TOKENIZER_JSON)
    return name in files or re.fullmatch(r"(train|val|test)-\d{5,}\.bin", name) is not None


class _Shards:
    """All shards of a folder while they are written; `progress.json` says up to where they are whole.

    Args:
        folder: Where they go.
        tokenizer: Made the ids.
        settings: What the bytes depend on.

    Raises:
        InputError: What an earlier process left cannot be used.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        self.folder, self.tokenizer, self.settings = folder, tokenizer, settings
        self.dtype = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
        progress = folder / PROGRESS
        try:
            there: Any = {"position": (0, 0, 0), "splits": {}}
            if progress.is_file():
                there = json.loads(progress.read_bytes())
            part, taken, skipped = map(int, there["position"])
            self.position: Position = (part, taken, skipped)
            self.writers = {name: self._writer(name, there["splits"].get(name, {})) for name in SPLITS}
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{progress} is damaged: delete {folder} to begin again") from error
        self.save()

    def _writer(self, name: str, begun: dict[str, Any]) -> _SplitWriter:
        end, length = self.tokenizer.eot_token, self.settings["shard_tokens"]
        return _SplitWriter(self.folder, name, self.dtype, end, length, **begun)

    @property
    def _finished(self) -> int:
        return sum(len(writer.shards) for writer in self.writers.values())

    def add(self, position: Position, pieces: list[_Piece], ids: np.ndarray, counts: list[int]) -> None:
        """Write a batch; note the progress after each shard, and now and then."""
        start = 0
        for piece, count in zip(pieces, counts, strict=True):
            self.writers[piece.split].add(ids[start : start + count], len(piece.text.encode()), piece.first)
            start += count
        self.position = position
        if self._finished > self._saved[0] or time.monotonic() - self._saved[1] > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Bring everything to the disk, then note how far it goes."""
        splits = {name: writer.sync() for name, writer in self.writers.items()}
        _replace(self.folder / PROGRESS, {**self.settings, "position": self.position, "splits": splits})
        self._saved = self._finished, time.monotonic()

    def report(self, read: int, size: int) -> Report:
        """Say how far it is."""
        writers = self.writers.values()
        return Report(read, size, sum(w.total for w in writers), sum(w.text_bytes for w in writers))

    def finish(self, skipped: int) -> None:
        """End the shards and write the manifest; `skipped` documents could not be read.

        Raises:
            InputError: There are none.
        """
        for writer in self.writers.values():
            writer.finish()
        if not self._finished:
            (self.folder / PROGRESS).unlink()
            raise InputError(f"there is no text in the sources of {self.folder} ({skipped} documents were left out)")
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            (self.folder / TOKENIZER_JSON).write_text(tokenizer_spec(self.tokenizer), encoding="utf-8")
        splits = {
            name: {"documents": writer.documents, "bytes": writer.text_bytes, "shards": writer.shards}
            for name, writer in self.writers.items()
        }
        values = {"vocab_size": self.tokenizer.n_vocab, "dtype": self.dtype, "skipped": skipped, "splits": splits}
        _replace(self.folder / MANIFEST, {**self.settings, **values})
        (self.folder / PROGRESS).unlink()

    def close(self) -> None:
        """Close the files as they are."""
        for writer in self.writers.values():
            writer.close()


def _write(feed: _Feed, shards: _Shards, num_workers: int | None, report: Callable[[Report], None] | None) -> None:
    """Write the shards, from the beginning or from where an earlier process stopped; then the manifest."""
    size = sum(part.size for _, part in feed.files) if all(part.size for _, part in feed.files) else 0
    if num_workers is None:
        num_workers = 0 if size < SMALL else _cores()
    try:
        with Encoders(shards.tokenizer, num_workers) as encoders:
            for (position, pieces), (ids, counts) in encoders.map(_batches(feed(shards.position))):
                shards.add(position, pieces, np.frombuffer(ids, dtype=np.uint32), counts)
                if report is not None:
                    report(shards.report(feed.read, size))
        shards.finish(feed.skipped)
    finally:
        shards.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Write JSON durably: whole or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
