"""What the process runs on: launcher, precision, allocator."""

import ctypes
import os
import platform
import signal
import sys
from typing import Any

import torch


def launched() -> tuple[int | None, int | None]:
    """Return the number of nodes and of processes on each that torchrun or SLURM has started; None for neither."""
    get = os.environ.get
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(get("WORLD_SIZE", 1)) // int(get("LOCAL_WORLD_SIZE", 1)), int(get("LOCAL_WORLD_SIZE", 1))
    if "SLURM_NTASKS" in os.environ and get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(get("SLURM_NNODES", 1))
        return nodes, int(get("SLURM_NTASKS", 1)) // nodes
    return None, None


def best_precision(accelerator: Any) -> tuple[str, str]:
    """Return the precision for a device, and why: bf16-mixed where it multiplies bf16 natively, else 16-mixed on a GPU
    of Nvidia's, else 32-true.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU multiplies bf16 natively"
        return "16-mixed", "this GPU multiplies fp16 natively, and no bf16"
    is_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
    if is_cpu and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16-mixed", "this CPU multiplies bf16 natively"
    return "32-true", f"this {'CPU' if is_cpu else 'device'} does not multiply bf16 natively"


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    It would give every large block back to the kernel at once, and a CPU run would spend more than half of each step
    on faulting the same pages in again.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of <malloc.h>
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def end_with_parent() -> None:
    """On Linux, let a process that Lightning or torchrun has started end when its parent does, even by SIGKILL."""
    if sys.platform == "linux" and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
