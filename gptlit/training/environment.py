"""The environment of a process: launcher, precision, allocator, logging."""

import ctypes
import logging
import os
import platform
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator

from gptlit.errors import InputError
from gptlit.training.lightning_compat import has_native_bf16


def launched() -> tuple[int, int] | None:
    """Return the numbers of nodes and of processes per node that torchrun or SLURM started; None without either."""
    get = os.environ.get
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(get("WORLD_SIZE", 1)) // int(get("LOCAL_WORLD_SIZE", 1)), int(get("LOCAL_WORLD_SIZE", 1))
    if "SLURM_NTASKS" in os.environ and get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(get("SLURM_NNODES", 1))
        return nodes, int(get("SLURM_NTASKS", 1)) // nodes
    return None


def check_devices(trainer: pl.Trainer) -> None:
    """Check, before a process is started for each device, that the machine can run them and they can connect."""
    limit = max(8, os.cpu_count() or 1)
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > limit:
        raise InputError(f"trainer.devices {trainer.num_devices} would start as many processes: use at most {limit}")
    port = os.environ.get("MASTER_PORT")
    is_launched = launched() is not None or {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys()
    if port and trainer.num_devices * trainer.num_nodes > 1 and not is_launched:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(f"MASTER_PORT {port} cannot be used ({error}): set another, or none") from error


def is_first_process() -> bool:
    """Whether this is the first process of a run, whichever launcher started it."""
    return not any(int(os.environ.get(key) or 0) for key in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def best_precision(accelerator: Any) -> tuple[str, str]:
    """Return the precision for a device, and why: bf16-mixed where it multiplies bf16 natively, else 16-mixed on a GPU
    of Nvidia's, else 32-true.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if has_native_bf16(torch.device("cuda")):
            return "bf16-mixed", "this GPU multiplies bf16 natively"
        return "16-mixed", "this GPU multiplies fp16 natively, and no bf16"
    is_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
    if is_cpu and has_native_bf16(torch.device("cpu")):
        return "bf16-mixed", "this CPU multiplies bf16 natively"
    return "32-true", f"this {'CPU' if is_cpu else 'device'} does not multiply bf16 natively"


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors.

    By default it returns large blocks to the kernel at once, and a CPU run spends more than half of each step on page
    faults.
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


def silence_lightning() -> None:
    """Hide Lightning's seed, device and tip lines; keep warnings and the output of callbacks and profilers."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True")  # they are means
    warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in (
        "pytorch.callbacks",
        "pytorch.profilers",
        "pytorch.utilities.rank_zero",
        "fabric.strategies.launchers",
    ):
        logging.getLogger(f"lightning.{name}").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's shared logger is a warning or comes from a callback."""
    return record.levelno > logging.INFO or Path(record.pathname).parent.name == "callbacks"
