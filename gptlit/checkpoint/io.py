"""Checkpoint files: atomic, durable writes and safe reads.

A checkpoint is a zip file of plain dicts and tensors, as `torch.save` writes it, with a CRC-32 for each record. It is
only ever read with `weights_only=True`, so that it cannot execute code.
"""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from gptlit.data.atomic import atomic_file
from gptlit.errors import InputError, note

SUFFIX = ".ckpt"
PIECE = 2**26  # bytes per fsync


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, fsyncs it and renames it: a checkpoint is complete or absent.

    Args:
        asynchronous: Copy to memory and write while training continues, one checkpoint at a time.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        super().__init__()
        self.asynchronous = asynchronous
        self.preloaded: dict[Path, dict[str, Any]] = {}  # checkpoints that were read before the Trainer asks for them
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write atomically; an asynchronous write returns once the checkpoint is copied.

        Args:
            storage_options: A function to call once the checkpoint is on disk.

        Raises:
            InputError: This or the write before it failed.
        """
        self.wait()
        if self.asynchronous:
            copy = snapshot(checkpoint)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()  # copies to pinned memory are asynchronous
            self._writing = self._thread.submit(_write, copy, Path(path), storage_options)
        else:
            _write(checkpoint, Path(path), storage_options)

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
        checkpoint = self.preloaded.pop(Path(path), None) or read_checkpoint(Path(path))
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


class _SyncedFile(FileIO):
    """Written back to disk piece by piece, past the page cache, which keeps the training data instead."""

    _unsynced = 0  # bytes

    @override
    def write(self, data: Any) -> int:
        left = memoryview(data)
        while left:  # an unbuffered write may be partial
            written = super().write(left[:PIECE])
            left = left[written:]
            self._unsynced += written
            if self._unsynced >= PIECE:
                self.sync()
        return len(data)

    def sync(self) -> None:
        os.fsync(self.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0


def _write(checkpoint: dict[str, Any], path: Path, on_saved: Callable[[], None] | None) -> None:
    try:
        with atomic_file(path, _SyncedFile) as file:
            torch.save(checkpoint, file)
        if on_saved is not None:
            on_saved()
    except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
        cause = error.__context__ or error
        free = shutil.disk_usage(path.parent).free / 1e6
        raise InputError(
            f"{path} cannot be written ({getattr(cause, 'strerror', None) or cause}): {free:,.0f} MB are free in "
            f"{path.parent}; earlier checkpoints are intact"
        ) from error


def load_plain(path: Path) -> dict[str, Any]:
    """Load a file written by `torch.save`, memory-mapped on the CPU, without executing anything in it.

    Raises:
        InputError: The file is missing, damaged, not a dict, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist")
    try:
        is_zip = zipfile.is_zipfile(path)  # torch wrote another format before 1.6
        if is_zip:
            _check_crc(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged, or holds more than tensors and plain values: it is not opened") from error
    except Exception as error:  # damaged bytes raise a dozen types
        raise InputError(f"{path} is damaged, truncated or no checkpoint ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is a checkpoint of another kind: it holds a {type(content).__name__}, no dict")
    return content


def _check_crc(path: Path) -> None:
    """Check the CRC-32 of every record of a zip file, which `torch.load` does not."""
    with zipfile.ZipFile(path) as file:
        if (damaged := file.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this project with `load_plain`.

    Raises:
        InputError: As in `load_plain`, or it is of another project.
    """
    checkpoint = load_plain(path)
    settings = checkpoint.get("hyper_parameters")
    if "state_dict" not in checkpoint or not isinstance(settings, dict) or "config" not in settings:
        raise InputError(f"{path} is a checkpoint of another kind: it has no state_dict and hyper_parameters.config")
    return checkpoint


def check_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Check that no weight is NaN or Inf."""
    for name, value in weights.items():
        if value.is_floating_point() and value.numel() and not all(map(torch.isfinite, value.aminmax())):
            raise InputError(f"{path} has NaN or Inf in {name!r}: take another checkpoint, or fetch the file again")
