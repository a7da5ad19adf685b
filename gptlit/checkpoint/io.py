"""Checkpoint files: atomic, durable writes and safe reads.

A checkpoint is a zip file of plain dicts and tensors, as `torch.save` writes it, with a CRC-32 for each record. It is
only ever read with `weights_only=True`, so that it cannot execute code.
"""

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
from typing_extensions import override

from gptlit.errors import InputError, note

SUFFIX = ".ckpt"


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


PIECE = 2**26  # bytes per fsync


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, fsyncs it and renames it: a checkpoint is complete or absent.

    Args:
        asynchronous: Copy to memory and write while training continues, one checkpoint at a time.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        super().__init__()
        self.asynchronous = asynchronous
        self.then: Callable[[], None] | None = None  # called once, after the next write is durable
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write atomically; an asynchronous write returns once the checkpoint is copied.

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
        """Raise the error of a finished write; do not wait for one in progress."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk.

        Raises:
            InputError: The write failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @override
    def teardown(self) -> None:
        # After an error of the run: report that of the write too, instead of replacing it.
        try:
            self.wait()
        except InputError as error:
            note(f"error: {error}")

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        # Never executes anything, whatever `weights_only` says.
        checkpoint = read_checkpoint(Path(path))
        check_finite(checkpoint["state_dict"], Path(path))
        checkpoint.setdefault("pytorch-lightning_version", version("lightning"))  # missing in imported weights
        return checkpoint


def snapshot(value: Any, memo: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """Copy nested dicts, lists, tuples and tensors to CPU memory, preserving shared storages.

    Copies from a GPU are asynchronous.
    """
    memo = {} if memo is None else memo
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in memo:
            pin = value.device.type == "cuda"  # much faster; torch caches pinned memory for the next snapshot
            target = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin).untyped_storage()
            memo[storage.data_ptr()] = target.copy_(storage, non_blocking=pin)
        copy = torch.empty(0, dtype=value.dtype)
        return copy.set_(memo[storage.data_ptr()], value.storage_offset(), value.size(), value.stride())
    if isinstance(value, Mapping):
        return type(value)((key, snapshot(item, memo)) for key, item in value.items())  # type: ignore[call-arg]
    if type(value) in (list, tuple):
        return type(value)(snapshot(item, memo) for item in value)
    return value


class _SyncedFile:
    """A file for torch.save that is written back to disk piece by piece.

    Written pieces leave the page cache at once: it keeps the training data instead, and a virtual machine need not
    supply gigabytes of fresh pages.
    """

    def __init__(self, file: FileIO) -> None:
        self._file, self._cached = file, 0

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:  # an unbuffered file may write less than all
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


def _write(checkpoint: dict[str, Any], path: Path, then: Callable[[], None] | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            torch.save(checkpoint, _SyncedFile(file))  # type: ignore[arg-type]
        sync_folder(path.parent)
        if then is not None:
            then()
    except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
        raise InputError(f"{path} cannot be written ({_reason(error)}): {_space(path.parent)}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[FileIO]:
    """Yield a temporary file in the same folder, renamed to `path` once it is complete and on disk."""
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
    """fsync a folder, which makes renames in it durable."""
    if os.name != "nt":  # no such call; renames are journalled
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException | None) -> str:
    """Return the operating system's message."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        last, error = error, error.__context__
    return str(last).splitlines()[0]


def _space(folder: Path) -> str:
    """Describe the free space of a folder's disk."""
    if not folder.is_dir():
        return f"the folder {folder} no longer exists"
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free in {folder}; earlier checkpoints are intact"


def remove(path: Path) -> None:
    """Delete a checkpoint, and the checksum file that earlier versions wrote beside it."""
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Delete partial files of a killed process from a folder of checkpoints, and checksums without a checkpoint."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"*{SUFFIX}.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def load_plain(path: Path) -> dict[str, Any]:
    """Load a file written by `torch.save`, memory-mapped on the CPU, without executing anything in it.

    Raises:
        InputError: The file is missing, damaged, not a dict, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist")
    is_zip = _is_zip(path)
    if not is_zip and path.suffix == SUFFIX:
        raise InputError(f"{path} is truncated or no checkpoint: it has {path.stat().st_size} bytes and no end")
    if is_zip:
        state = path.stat()
        _check_crc(path.resolve(), state.st_size, state.st_mtime_ns)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged, or holds more than tensors and plain values: it is not opened") from error
    except Exception as error:  # bytes that are no pickle raise a dozen types
        raise InputError(f"{path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is a checkpoint of another kind: it holds a {type(content).__name__}, no dict")
    return content


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # some damage to the end of the file
        return False


@lru_cache(maxsize=8)
def _check_crc(path: Path, size: int, mtime: int) -> None:
    """Check the CRC-32 of every record of a zip file, which `torch.load` does not; once per process and file.

    Raises:
        InputError: The file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # a damaged directory raises a dozen types
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged: {damaged} does not match its checksum")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this project with `load_plain`.

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
    """Check that no weight is NaN or Inf.

    Raises:
        InputError: A tensor has NaN or Inf; it is named.
    """
    for name, value in weights.items():
        if getattr(value, "dtype", None) in FLOATS and value.numel() and not all(map(torch.isfinite, value.aminmax())):
            raise InputError(f"{path} has NaN or Inf in {name!r}: take another checkpoint, or fetch the file again")
