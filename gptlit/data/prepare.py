"""Documents -> token shards and a manifest on disk.

Worker processes encode, this process writes in order, so the bytes do not depend on the number of workers. An
interrupted preparation resumes after its last complete shard. `manifest.json` is written last: a folder that has one
is complete.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from gptlit.data.shard_writer import PROGRESS, FolderWriter
from gptlit.data.sources import Corpus
from gptlit.data.splitting import Piece, Split, SplitReader
from gptlit.data.token_files import FORMAT, MANIFEST, SPLITS, VERIFY_LIMIT, TokenData, open_tokens
from gptlit.data.tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer, Tokenizer, fingerprint
from gptlit.errors import InputError, note

LOCK = ".lock"
LEFTOVERS = (LOCK, f"{PROGRESS}.partial", f"{MANIFEST}.partial")  # of a process that was killed as it started
SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 2**20  # encoded at once
BATCH_PIECES = 2**13
SMALL_CORPUS = 2**25  # bytes that are encoded in this process: starting workers takes longer


@dataclass(frozen=True)
class Report:
    """Progress of a preparation: bytes of sources read, and in all (0 if unknown); tokens and bytes of text so far."""

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
    """Tokenise a corpus into a folder; resume if an earlier call was interrupted; open it if it is complete.

    Args:
        corpora: The corpus to divide; or {"train": that, "val": ..., "test": ...} with separate sources.
        folder: Where the shards go.
        tokenizer: From text to ids.
        split: Validation and test fractions.
        shard_tokens: Length of every shard of a split but its last one.
        num_workers: Processes that encode, 0 for none; None: one per core, and none for a small corpus.
        skip_bad: Leave out what cannot be read instead of stopping.
        overwrite: Delete what another tokenizer, source or setting made there.
        wait: Wait for another process that prepares the same folder instead of refusing.
        report: Called after each batch.

    Raises:
        InputError: A document cannot be read, there is no text, the disk is full, the folder holds something else or
            is damaged, or another process writes it.
    """
    corpora = {"train": corpora} if isinstance(corpora, Corpus) else dict(corpora)
    if shard_tokens < 1:
        raise InputError(f"shard_tokens must be at least 1, got {shard_tokens}")
    if num_workers is not None and num_workers < 0:
        raise InputError(f"num_workers must be at least 0, got {num_workers}")
    settings = _settings(corpora, tokenizer, split, shard_tokens)
    with _one_line_if_disk_is_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        with _locked(folder, wait):
            if not _is_done(folder, settings, overwrite):
                reader = SplitReader(corpora, split, skip_bad)
                writer = FolderWriter(folder, tokenizer, settings, reader.first_positions())
                _write(reader, writer, num_workers, report)
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
def _one_line_if_disk_is_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"there is no space left for {folder} ({error.strerror}): free some and give the same command again, "
            "it resumes after the last complete shard"
        ) from error


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    """Keep other processes out. The lock ends with this process, however it ends."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        # A worker that imports a script without `if __name__ == "__main__"` would wait for its own parent.
        if not wait or multiprocessing.parent_process() is not None:
            raise InputError(f"another process is preparing {folder}: wait for it, or choose another --out") from None
        note(f"waiting for another process that prepares {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that is in use for something else."""
    if not any((folder / name).is_file() for name in (MANIFEST, PROGRESS)):
        others = sorted(path.name for path in folder.iterdir() if path.name not in LEFTOVERS)
        if others:
            raise InputError(f"{folder} is not empty ({others[0]}) and holds no tokens of ours: choose another --out")


def _is_done(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Return whether the folder is complete; delete what is to be overwritten.

    Raises:
        InputError: It holds something else.
    """
    found = next((path for name in (MANIFEST, PROGRESS) if (path := folder / name).is_file()), None)
    if found is not None:
        try:
            there = json.loads(found.read_bytes())
            differences = [key for key, value in settings.items() if there.get(key) != value]
        except (ValueError, AttributeError, RecursionError):
            there, differences = {}, ["content, it is damaged"]
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
    for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST):  # without it the folder is incomplete
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


def _write(
    reader: SplitReader, writer: FolderWriter, num_workers: int | None, report: Callable[[Report], None] | None
) -> None:
    """Write all shards that are not complete, then the manifest."""
    if num_workers is None:
        num_workers = 0 if reader.size < SMALL_CORPUS else _cores()
    pieces = filter(writer.needs, reader.read(writer.start))
    encoded = _encode_in_order(_batches(pieces), writer.tokenizer, num_workers)
    try:
        for batch, ids in encoded:
            writer.write(batch, ids)
            if report is not None:
                report(Report(reader.bytes_read, reader.size, writer.tokens, writer.text_bytes))
        writer.finish(reader.unreadable)
    finally:
        encoded.close()
        writer.close()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_order(
    batches: Iterable[list[Piece]], tokenizer: Tokenizer, num_workers: int
) -> Generator[tuple[list[Piece], list[np.ndarray]], None, None]:
    """Yield each batch with the ids of its pieces, in order; memory is bounded by two batches per worker."""
    if not num_workers:
        yield from ((batch, encode(tokenizer, [piece.text for piece in batch])) for batch in batches)
        return
    pending: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    pool = ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(tokenizer,))
    try:
        for batch in batches:
            pending.append((batch, pool.submit(_encode_in_worker, [piece.text for piece in batch])))
            if len(pending) > 2 * num_workers:
                batch, future = pending.popleft()
                yield batch, future.result()
        for batch, future in pending:
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return the ids of each text, int (T,). Text that spells a special token is ordinary text."""
    return [tokenizer.encode_to_numpy(text) for text in texts]


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group: the parent shuts down
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what a fork inherits may not end the process
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its queue forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return encode(_worker_tokenizer, texts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
