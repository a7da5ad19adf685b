"""Checkpoints on disk: durable writes, safe reads, and which one to go on from.

A run's folder is `<root>/<name>/version_<n>`; its checkpoints are `checkpoints/step-00000500.ckpt`. They are plain
dicts and tensors and are only ever read with `weights_only=True`, so that none can run code.
"""

import os
import pickle
import re
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from gptlit.errors import InputError, note

SUFFIX = ".ckpt"


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the final one, makes it durable, renames it: a checkpoint is whole or absent."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write atomically; the folder's entry is made durable too."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.stem}-{os.getpid()}.partial"
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read without executing anything, whatever `weights_only` says."""
        checkpoint = read_checkpoint(Path(path))
        checkpoint.setdefault("pytorch-lightning_version", version("lightning"))  # weights that were imported
        return checkpoint


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows has no such call; its rename is journalled
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_plain(path: Path) -> dict[str, Any]:
    """Load a file that torch saved, on the CPU and memory-mapped, without executing anything in it.

    Raises:
        InputError: The file is missing, damaged, no dict, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist")
    is_zip = zipfile.is_zipfile(path)
    if not is_zip and path.suffix == SUFFIX:
        raise InputError(f"{path} is truncated or no checkpoint: it has {path.stat().st_size} bytes and no end")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged, or holds more than tensors and plain values: it is not opened") from error
    except Exception as error:  # bytes that are no pickle make the reader fail in a dozen ways
        raise InputError(f"{path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is a checkpoint of another kind: it holds a {type(content).__name__}, no dict")
    return content


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


def run_folders(root: Path, name: str) -> list[Path]:
    """Return the folders of the runs of that name, oldest first."""
    folders = {int(m[1]): p for p in (root / name).glob("version_*") if (m := re.fullmatch(r"version_(\d+)", p.name))}
    return [folders[version] for version in sorted(folders)]


def new_run_folder(root: Path, name: str) -> Path:
    """Return the folder that the next run of that name gets; nothing is made yet."""
    folders = run_folders(root, name)
    version = int(folders[-1].name.removeprefix("version_")) + 1 if folders else 0
    return root / name / f"version_{version}"


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the file of the checkpoint after `step` optimizer steps."""
    return run / "checkpoints" / f"step-{step:08d}{SUFFIX}"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob(f"step-*{SUFFIX}"))


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that loads, or None when there is none at all.

    Raises:
        InputError: There are checkpoints, and not one of them loads.
    """
    errors: list[str] = []
    for path in reversed(checkpoints(run)):
        try:
            read_checkpoint(path)
        except InputError as error:
            errors.append(str(error))
            continue
        for error_text in errors:
            note(f"passed over: {error_text}")
        return path
    if errors:
        raise InputError(f"none of the {len(errors)} checkpoints of {run} loads: {errors[0]}")
    return None


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint file: the path itself, or the newest one of a run's folder (or of a folder of its versions).

    Raises:
        InputError: There is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise InputError(f"checkpoint {str(path)!r} does not exist: give a .ckpt file or a run's folder")
    for run in [path, *reversed(run_folders(path.parent, path.name))]:
        if (found := newest_checkpoint(run)) is not None:
            return found
    raise InputError(f"no checkpoint in {path}: a run keeps them in version_<n>/checkpoints")
