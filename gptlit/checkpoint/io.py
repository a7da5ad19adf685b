"""Checkpoints on disk: durable writes, safe reads, and which one to go on from.

A run's folder is `<root>/<name>/version_<n>`; its checkpoints are `checkpoints/step-00000500.ckpt`, each with a
checksum beside it, and `best.ckpt` is a link to the one with the lowest validation loss. They are plain
dicts and tensors and are only ever read with `weights_only=True`, so that none can run code.
"""

import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from gptlit.errors import InputError, note

SUFFIX = ".ckpt"


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


PIECE = 2**26  # bytes of a checkpoint that are brought to the disk at once


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file and a checksum beside the final file, makes them durable, then renames: a checkpoint is
    whole or absent, and damage that comes later is found.

    Args:
        asynchronous: Take a copy in memory and write it while training goes on, one checkpoint at a time.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        super().__init__()
        self.asynchronous = asynchronous
        self.then: Callable[[], None] | None = None  # done once, after the next write is durable
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write atomically; an asynchronous write returns when it has its copy.

        Raises:
            InputError: This or the write before it failed.
        """
        self.wait()
        then, self.then = self.then, None
        if self.asynchronous:
            copy = snapshot(checkpoint)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()  # copies to pinned memory are asynchronous
            self._writing = self._thread.submit(_write, copy, Path(path), then)
        else:
            _write(checkpoint, Path(path), then)

    def check(self) -> None:
        """Raise what went wrong in a write that has ended; cost nothing while one goes on."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            InputError: The write failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def teardown(self) -> None:
        """Let a write end that is under way when a run ends by an error of its own."""
        try:
            self.wait()
        except InputError as error:
            note(f"error: {error}")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read without executing anything, whatever `weights_only` says."""
        checkpoint = read_checkpoint(Path(path))
        check_finite(checkpoint["state_dict"], Path(path))
        checkpoint.setdefault("pytorch-lightning_version", version("lightning"))  # weights that were imported
        return checkpoint


def snapshot(value: Any, memo: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """Copy a tree of dicts, lists, tuples and tensors to CPU memory; tensors that share memory still do.

    Copies from a GPU are asynchronous.
    """
    memo = {} if memo is None else memo
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in memo:
            pin = value.device.type == "cuda"  # many times as fast; torch keeps the memory for the next snapshot
            target = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin).untyped_storage()
            memo[storage.data_ptr()] = target.copy_(storage, non_blocking=pin)
        copy = torch.empty(0, dtype=value.dtype)
        return copy.set_(memo[storage.data_ptr()], value.storage_offset(), value.size(), value.stride())
    if isinstance(value, Mapping):
        return type(value)((key, snapshot(item, memo)) for key, item in value.items())  # type: ignore[call-arg]
    if type(value) in (list, tuple):
        return type(value)(snapshot(item, memo) for item in value)
    return value


class _Hashing:
    """A file for torch.save that hashes what is written, and brings it to the disk piece by piece.

    What is on the disk leaves the page cache at once: the next piece takes its memory, the data that is trained on
    keeps its own, and gigabytes of fresh pages, which a virtual machine is given one by one, are not needed.
    """

    def __init__(self, file: FileIO) -> None:
        self._file, self._digest, self._cached = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        left = memoryview(data)
        while left:  # an unbuffered file may take less than all
            done = self._file.write(left[:PIECE])
            left = left[done:]
            self._cached += done
            if self._cached >= PIECE:
                self._cached = 0
                os.fsync(self._file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _write(checkpoint: dict[str, Any], path: Path, then: Callable[[], None] | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            hashing = _Hashing(file)
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
            with _replacing(checksum_path(path)) as beside:  # first: a checkpoint that is there has its checksum
                beside.write(f"{hashing.hexdigest()}  {path.name}\n".encode())
        sync_folder(path.parent)
        if then is not None:
            then()
    except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
        raise InputError(f"{path} cannot be written ({_reason(error)}): {_space(path.parent)}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[FileIO]:
    """Give a temporary file in the same folder; it gets its name when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}.partial")
    try:
        with temporary.open("wb", buffering=0) as file:  # a buffer would copy gigabytes in small pieces
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    if os.name != "nt":  # Windows has no such call; its rename is journalled
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException | None) -> str:
    """Return the first line of what the operating system said."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        last, error = error, error.__context__
    return str(last).splitlines()[0]


def _space(folder: Path) -> str:
    """Say what the disk of a folder has left."""
    if not folder.is_dir():
        return f"the folder {folder} has gone"
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free in {folder}; earlier checkpoints are whole"


def checksum_path(path: Path) -> Path:
    """Return where the SHA-256 of a checkpoint is, as `sha256sum` writes it."""
    return path.with_name(f"{path.name}.sha256")


def remove(path: Path) -> None:
    """Delete a checkpoint and its checksum."""
    path.unlink(missing_ok=True)
    checksum_path(path).unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Delete what a killed process left half-written in a folder of checkpoints."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"*{SUFFIX}.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def _check_sum(path: Path) -> None:
    """Compare a checkpoint with its checksum, if it has one."""
    path = path.resolve()  # of the best one, to which a link points
    beside = checksum_path(path)
    if not beside.is_file():
        return
    state = path.stat()
    if _digest(path, state.st_size, state.st_mtime_ns) not in beside.read_text(errors="replace").split():
        raise InputError(f"{path} does not match the checksum in {beside.name}: it was damaged after it was written")


@lru_cache(maxsize=8)
def _digest(path: Path, size: int, mtime: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_plain(path: Path) -> dict[str, Any]:
    """Load a file that torch saved, on the CPU and memory-mapped, without executing anything in it.

    Raises:
        InputError: The file is missing, damaged, no dict, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist")
    is_zip = _is_zip(path)
    if not is_zip and path.suffix == SUFFIX:
        raise InputError(f"{path} is truncated or no checkpoint: it has {path.stat().st_size} bytes and no end")
    _check_sum(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged, or holds more than tensors and plain values: it is not opened") from error
    except Exception as error:  # bytes that are no pickle make the reader fail in a dozen ways
        raise InputError(f"{path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is a checkpoint of another kind: it holds a {type(content).__name__}, no dict")
    return content


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one whose end is damaged in a certain way
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this project; as `load_plain`.

    Raises:
        InputError: As in `load_plain`, or it is of another project.
    """
    checkpoint = load_plain(path)
    if not all(isinstance(checkpoint.get(key), dict) for key in ("state_dict", "hyper_parameters")):
        raise InputError(f"{path} is a checkpoint of another kind: no state_dict and hyper_parameters in it")
    if not isinstance(checkpoint["hyper_parameters"].get("config"), dict):
        raise InputError(f"{path} is a checkpoint of another model: its hyper_parameters have no config")
    return checkpoint


def check_finite(weights: Mapping[str, Any], path: Path) -> None:
    """Refuse weights with which nothing can be computed.

    Raises:
        InputError: A tensor has NaN or Inf; it is named.
    """
    for name, value in weights.items():
        if getattr(value, "dtype", None) in FLOATS and value.numel() and not all(map(torch.isfinite, value.aminmax())):
            raise InputError(f"{path} has NaN or Inf in {name!r}: take another checkpoint, or fetch the file again")
