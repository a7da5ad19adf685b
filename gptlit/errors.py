"""One-line errors for what a user can mend (a bug keeps its traceback), and the standard streams."""

import io
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """Something from outside (a file, a flag, a key) is wrong; the message names it, its value and the remedy."""


def user_path(text: str) -> Path:
    """Return a path that a user wrote, with `~` resolved.

    Raises:
        InputError: It is empty or not UTF-8 (as configurations and checkpoints are), or there is no such home.
    """
    if not text:
        raise InputError("a path is empty: name a file or folder")
    try:
        text.encode()
        return Path(text).expanduser()
    except (UnicodeEncodeError, RuntimeError) as error:
        raise InputError(f"the path {text!r} cannot be used ({error}): rename it, or name its folder") from error


@contextmanager
def needs(package: str, what: object, install: str = "") -> Iterator[None]:
    """Import an optional package in here.

    Raises:
        InputError: It is missing; `what` needs it.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(f"{what} needs the package {package}: pip install {install or package}") from error


def shell_quote(*words: str) -> str:
    """Return words as they are pasted into a shell: a POSIX one, or on Windows one that knows double quotes only."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def local_rank() -> int:
    """Return the number of this process on its node, as torchrun, Lightning or SLURM counts."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def note(message: str) -> None:
    """Print to stderr, on local rank 0 only."""
    if local_rank() == 0:
        print(message, file=sys.stderr)


def fail(error: object, status: int = 1) -> NoReturn:
    """Print one line and exit with `status`. GPTLIT_TRACEBACK=1 in the environment shows the traceback."""
    if isinstance(error, BaseException) and os.environ.get("GPTLIT_TRACEBACK"):
        raise error
    if local_rank() > 0:
        time.sleep(2)  # local rank 0 prints the same, and ends this process
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(status)


class _LossyOutput(io.TextIOWrapper):
    """A standard stream that drops what cannot be written.

    The other end of a pipe may be closed, a disk may be full, a terminal may have gone (OSError); a signal handler may
    print while the same stream is being written to (RuntimeError).
    """

    def write(self, text: str) -> int:
        with suppress(OSError, RuntimeError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, RuntimeError):
            super().flush()


def set_up_streams(drop_unwritable: bool = False) -> None:
    """Let the standard streams take any text: what their encoding lacks is escaped, or replaced on input.

    Args:
        drop_unwritable: Let no failed write raise, for a run that must survive a closed pipe or a full disk.
    """
    for name, errors in (("stdin", "replace"), ("stdout", "backslashreplace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        is_own = type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__")  # not captured
        if stream is None and drop_unwritable:  # closed when the process began
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        elif is_own and drop_unwritable and name != "stdin":
            buffering = stream.line_buffering, stream.write_through
            setattr(sys, name, _LossyOutput(stream.buffer, stream.encoding, errors, None, *buffering))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
