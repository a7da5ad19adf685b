"""One-line errors: what a user can mend is told in a line; a bug keeps its traceback."""

import io
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """Something from outside (a file, a flag, a key) is wrong; the message names it, its value and the remedy."""


def check_utf8(text: str) -> None:
    """Check that a name can be written to configurations, logs and checkpoints, which are UTF-8.

    Raises:
        InputError: It cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{text!r} is not UTF-8: rename it, or name its folder or a glob that matches it") from error


def user_path(text: str) -> Path:
    """Return a path that a user wrote, with `~` resolved.

    Raises:
        InputError: It is empty or not UTF-8, or there is no such home.
    """
    check_utf8(text)
    if not text:
        raise InputError("a path is empty: name a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text!r}: {error}") from error


def allow_any_encoding() -> None:
    """Let the standard streams take any text: what their encoding does not have is escaped, or replaced on input."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def note(message: str) -> None:
    """Say a word on standard error, once and not on every device."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(message, file=sys.stderr)


def fail(error: object, status: int = 1) -> NoReturn:
    """Print one line and exit with `status`. With GPTLIT_TRACEBACK=1 in the environment the traceback comes back."""
    if isinstance(error, BaseException) and os.environ.get("GPTLIT_TRACEBACK"):
        raise error
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(2)  # the first process says it, and then ends this one
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(status)


class _LossyOutput(io.TextIOWrapper):
    """Standard output or error of a run that must survive it: what cannot be written is dropped.

    The other end of a pipe may have been closed, a disk may be full, a terminal may have gone (OSError); a signal
    handler may print while the same stream is being written to (RuntimeError).
    """

    def write(self, text: str) -> int:
        """Write `text`, or nothing."""
        with suppress(OSError, RuntimeError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, RuntimeError):
            super().flush()


def make_output_lossy() -> None:
    """Let no failed write to standard output or error raise, and escape what their encoding does not have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the process began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and stream is getattr(
            sys, f"__{name}__"
        ):  # not a notebook's, nor captured
            line, through = stream.line_buffering, stream.write_through
            setattr(sys, name, _LossyOutput(stream.buffer, stream.encoding, "backslashreplace", None, line, through))


class OneLineErrors:
    """Mixin for a jsonargparse parser: a wrong flag or key is answered with one line instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2."""
        fail(ex if ex is not None and os.environ.get("GPTLIT_TRACEBACK") else message, status=2)
