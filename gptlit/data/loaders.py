"""The DataLoader around windows, and its worker processes."""

import atexit
import multiprocessing.util  # registers the exit handler that joins all children: `kill_workers` has to run before it
import signal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Pairs = tuple[Tensor, Tensor]


def make_loader(
    dataset: Dataset[Pairs], sampler: Sampler[np.ndarray], num_workers: int, pin_memory: bool = False
) -> DataLoader[Pairs]:
    """Return a loader of the batches that a sampler yields."""
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # the sampler yields batches of indices
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory and num_workers > 0,
        generator=torch.Generator(),  # the global generator belongs to dropout
    )


def ignore_signals(_: int) -> None:
    """Keep a worker alive when its process group is signalled: the training process has to save first, and ends it.

    A worker whose parent has gone ends by itself.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers() -> None:
    """Kill the workers of loaders that are still in use: Python would send a SIGTERM, which they ignore, and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for a worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
