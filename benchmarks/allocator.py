"""The allocator's setting that `train.py` makes, for everybody: no import of gptlit, for other environments."""

import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: see `gptlit.training.environment.keep_freed_memory`."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)
