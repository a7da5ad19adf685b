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
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from gptlit.data.atomic import delete_partial_files
from gptlit.data.shard_writer import FolderWriter
from gptlit.data.sources import Corpus
from gptlit.data.splitting import Piece, Split, SplitReader
from gptlit.data.token_files import FORMAT, MANIFEST, PROGRESS, SPLITS, VERIFY_LIMIT, TokenData, open_prepared
from gptlit.data.tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer, Tokenizer, fingerprint
from gptlit.errors import InputError, note

LOCK = ".lock"
SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 2**20  # encoded at once
BATCH_PIECES = 2**13
MOST_WORKERS = 61  # Windows allows no more
SMALL_CORPUS = 2**25  # bytes that are encoded in this process: starting workers takes longer
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
OUR_FILES = re.compile(r"manifest\.json|progress\.json|tokenizer\.json|(train|val|test)-\d{5,}\.bin")


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
) -> TokenData:
    """Tokenize a corpus into a folder, with progress on stderr; resume if an earlier call was interrupted; open it if
    it is complete.

    Args:
        corpora: The corpus to divide; or {"train": that, "val": ..., "test": ...} with separate sources.
        shard_tokens: Length of every shard of a split but its last one.
        num_workers: Processes that encode, 0 for none; None: one per core, and none for a small corpus.
        skip_bad: Leave out what cannot be read instead of stopping.
        overwrite: Delete what another tokenizer, source or setting made there.
        wait: Wait for another process that prepares the same folder instead of refusing.

    Raises:
        InputError: A document cannot be read, there is no text, the disk is full, or the folder is not free for this.
    """
    corpora = {"train": corpora} if isinstance(corpora, Corpus) else dict(corpora)
    for name, value, least in (("shard_tokens", shard_tokens, 1), ("num_workers", num_workers or 0, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    settings = _settings(corpora, tokenizer, split, shard_tokens)
    with _one_line_if_disk_is_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        with _locked(folder, wait):
            if not _is_done(folder, settings, overwrite):
                reader = SplitReader(corpora, split, skip_bad)
                writer = FolderWriter(folder, tokenizer, settings)
                _write(reader, writer, num_workers)
    return open_prepared(folder)


def cache_folder(corpus: Corpus, root: Path, tokenizer: Tokenizer, split: Split) -> Path:
    """Return the folder under `root` that belongs to a corpus, a tokenizer and a split."""
    settings = _settings({"train": corpus}, tokenizer, split, SHARD_TOKENS)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return root / f"{corpus.name}-{key[:12]}"


def prepare_cached(corpus: Corpus, root: Path, tokenizer: Tokenizer, split: Split) -> TokenData:
    """Tokenize a corpus into a folder under `root` that is its own, or open the one that an earlier call left there.

    Raises:
        InputError: As in `prepare`; or what is there was changed.
    """
    folder = cache_folder(corpus, root, tokenizer, split)
    if (folder / MANIFEST).is_file():
        data = open_prepared(folder)
    else:
        data = prepare(corpus, folder, tokenizer, split, wait=True)
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
    """Keep other processes out, and delete what one that was killed left half-written.

    The lock ends with this process, however it ends.
    """
    lock = FileLock(folder / LOCK)
    try:
        acquired = lock.acquire(timeout=0)
    except Timeout:
        # A worker that imports a script without `if __name__ == "__main__"` would wait for its own parent.
        if not wait or multiprocessing.parent_process() is not None:
            raise InputError(f"another process is preparing {folder}: wait for it, or choose another --out") from None
        note(f"waiting for another process that prepares {folder}")
        acquired = lock.acquire()
    with acquired:
        delete_partial_files(folder)
        yield


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that is in use for something else."""
    if not any((folder / name).is_file() for name in (MANIFEST, PROGRESS)):
        others = sorted(path.name for path in folder.iterdir() if not path.name.endswith((LOCK, ".partial")))
        if others:
            raise InputError(f"{folder} is not empty ({others[0]}) and holds no tokens of ours: choose another --out")


def _is_done(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Return whether the folder is complete; delete what is to be overwritten.

    Raises:
        InputError: It holds something else.
    """
    found = next((path for name in (MANIFEST, PROGRESS) if (path := folder / name).is_file()), None)
    if found is None:
        return False
    try:
        there = json.loads(found.read_bytes())
    except ValueError:
        there = {}
    differences = [key for key, value in settings.items() if there.get(key) != value]
    if not differences:
        return found.name == MANIFEST
    if not overwrite:
        old, new = (f"{values.get(differences[0])!s:.40}" for values in (there, settings))
        raise InputError(
            f"{folder} was made with another {differences[0]} ({old}, now {new}): choose another --out, or replace it "
            "with --overwrite"
        )
    for path in sorted(folder.iterdir(), key=lambda path: path.name != MANIFEST):  # without it the folder is incomplete
        if OUR_FILES.fullmatch(path.name):
            path.unlink()
    return False


def _write(reader: SplitReader, writer: FolderWriter, num_workers: int | None) -> None:
    """Write all shards that are not complete, then the manifest."""
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = 0 if reader.size < SMALL_CORPUS else min(cores, MOST_WORKERS)
    pieces = (piece for piece in reader.read() if writer.needs(piece))
    encoded = _encode_in_order(_batches(pieces), writer.tokenizer, num_workers)
    try:
        with _progress(writer.folder.name, reader.size) as show:
            for batch, ids in encoded:
                writer.write(batch, ids)
                show(reader.bytes_read, writer.tokens)
        writer.finish(reader.unreadable)
    finally:
        encoded.close()
        writer.close()


@contextmanager
def _progress(name: str, size: int) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many of `size` bytes (0 if unknown) were read, and the tokens so far."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), "{task.fields[tokens]:,} tokens")
    with Progress(
        "{task.description}",
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(f"preparing {name}", total=size or None, tokens=0)
        last = time.monotonic()

        def show(read: int, tokens: int) -> None:
            nonlocal last
            progress.update(task, completed=read, tokens=tokens)
            if not console.is_terminal and time.monotonic() - last > LINE_EVERY:
                note(f"preparing {name}: {read:,} of {size:,} bytes, {tokens:,} tokens")
                last = time.monotonic()

        yield show


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
        yield from ((batch, [tokenizer.encode_to_numpy(piece.text) for piece in batch]) for batch in batches)
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
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died, possibly out of memory: run the same command again with a smaller --num_workers "
            f"(now {num_workers}; 0: no workers), it resumes after the last complete shard"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
    return [_worker_tokenizer.encode_to_numpy(text) for text in texts]
