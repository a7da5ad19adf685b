"""The allocator setting of `train.py`, for all contenders; works in environments without gptlit."""

import ctypes


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, like `gptlit.training.environment.keep_freed_memory`."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)
