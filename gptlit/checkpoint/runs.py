"""Run folders `<root>/<name>/version_<n>` and the checkpoints in them."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptlit.checkpoint.io import SUFFIX, read_checkpoint
from gptlit.errors import InputError, note

LOCK = ".lock"


def run_folders(root: Path, name: str) -> list[Path]:
    """Return the folders of all runs of a name, oldest first."""
    folders = {int(m[1]): p for p in (root / name).glob("version_*") if (m := re.fullmatch(r"version_(\d+)", p.name))}
    return [folders[version] for version in sorted(folders)]


def new_run_folder(root: Path, name: str) -> Path:
    """Return the folder of the next run of a name, without creating it."""
    folders = run_folders(root, name)
    version = int(folders[-1].name.removeprefix("version_")) + 1 if folders else 0
    return root / name / f"version_{version}"


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps."""
    return run / "checkpoints" / f"step-{step:08d}{SUFFIX}"


def best_path(run: Path) -> Path:
    """Return the link to the checkpoint with the lowest validation loss."""
    return run / "checkpoints" / f"best{SUFFIX}"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob(f"step-*{SUFFIX}"))


@contextmanager
def locked(run: Path) -> Iterator[Path]:
    """Lock a run's folder for this process; the lock is released even if the process is killed.

    Raises:
        BlockingIOError: Another process holds it.
    """
    try:
        lock = FileLock(run / LOCK).acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another process is training in {run}: wait for it, or start a new run") from None
    with lock:
        yield run


@contextmanager
def locked_new_run(root: Path, name: str) -> Iterator[Path]:
    """Create and lock the folder of a new run; concurrent processes get different ones.

    It is removed again, with the parents created for it, if nothing is written to it.
    """
    while True:
        run = new_run_folder(root, name)
        parents = [folder for folder in run.parents if not folder.exists()]
        with suppress(FileExistsError):  # another process was faster
            run.mkdir(parents=True)
            break
    try:
        with locked(run):
            yield run
    finally:
        with suppress(OSError):  # the folder no longer exists, or a parent holds other runs
            if all(path.name == LOCK for path in run.iterdir()):
                shutil.rmtree(run)
                for folder in parents:
                    folder.rmdir()


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a run that loads, and what is in it; None if it has none.

    Raises:
        InputError: It has checkpoints, but none of them loads.
    """
    found = checkpoints(run)
    for path in reversed(found):
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            note(f"skipped: {error}")
        else:
            return path, checkpoint
    if found:
        raise InputError(f"none of the {len(found)} checkpoints of {run} loads")
    return None


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint and what is in it: the file itself, or the newest one in a run's folder or in a folder of its
    versions.

    Raises:
        InputError: There is none, or the file is damaged.
    """
    if path.is_file():
        return path, read_checkpoint(path)
    if not path.exists():
        raise InputError(f"checkpoint {str(path)!r} does not exist: give a .ckpt file or a run's folder")
    if path.name == "checkpoints":
        path = path.parent
    for run in [path, *reversed(run_folders(path.parent, path.name))]:
        if (found := newest_checkpoint(run)) is not None:
            return found
    raise InputError(f"no checkpoint in {path}: a run keeps them in version_<n>/checkpoints")


def last_run(root: Path, name: str, must_exist: bool = False, is_requeued: bool = False) -> Path | None:
    """Return the newest run of a name that has a checkpoint; None if there is none.

    Args:
        root: Folder of the runs.
        name: Their name.
        must_exist: Whether there has to be one.
        is_requeued: Only the newest run of all will do: an older one is not the one that was interrupted.

    Raises:
        InputError: There is none, and `must_exist`.
    """
    runs = run_folders(root, name)
    found = [run for run in (runs[-1:] if is_requeued else runs) if checkpoints(run)]
    if found:
        return found[-1]
    if must_exist:
        raise InputError(f"--ckpt_path last: there is no checkpoint in {root / name}: fit a model first")
    note(f"--ckpt_path last: there is no run to resume in {root / name} yet: starting a new one")
    return None


def folder_to_continue(path: Path, name: str, is_newest: bool) -> Path | None:
    """Return the run to resume in: that of the checkpoint if it has this name and no newer one; None: a new run.

    Args:
        path: The checkpoint.
        name: Of the run.
        is_newest: The checkpoint is known to be the newest one that loads.
    """
    run = path.resolve().parent.parent
    is_newest = is_newest or checkpoints(run)[-1:] == [path.resolve()]
    if path.parent.name == "checkpoints" and run.parent.name == name and is_newest:
        return path.parent.parent
    return None
