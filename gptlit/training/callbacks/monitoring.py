"""Throughput and memory of training, and the end of a fit whose gradients are not finite."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from gptlit.errors import InputError, note
from gptlit.training.callbacks.checkpoint import step_checkpoint
from gptlit.training.estimate import count_parameters, datasheet_peak, flops_per_token
from gptlit.training.lightning_compat import is_log_step, is_validation_of_fit, log_numbers
from gptlit.training.module import GPTModule

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Throughput(Callback):
    """Logs between two log points: perf/tokens_per_second over all devices, without validations and checkpoints;
    perf/mfu, the fraction of the devices' peak, not if weights are frozen or rows are trained on; perf/memory_gb, the
    peak so far; and the fractions of wall-clock time spent in waiting for data, in validation and in checkpoints
    (time/data, time/validation, time/checkpoint).

    Must come after the callbacks that work at the end of a validation.

    Args:
        peak: Peak throughput of a device in FLOP/s; None: from the datasheet of a known GPU, else no perf/mfu.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        self._flops_per_token = flops_per_token(pl_module.config, count_parameters(pl_module.config))
        self._learns_all = pl_module.targets_in_step() is None and all(p.requires_grad for p in pl_module.parameters())
        device = trainer.strategy.root_device
        if self.peak is None and device.type == "cuda":
            self.peak = datasheet_peak(torch.cuda.get_device_name(device), str(trainer.precision))
        self._saver = step_checkpoint(trainer)
        self._batch_ended = time.perf_counter()
        self._mark(pl_module)

    def _mark(self, pl_module: GPTModule) -> None:
        self._began, self._tokens = time.perf_counter(), pl_module.tokens
        self._spent = {"data": 0.0, "validation": 0.0, "checkpoint": -self._saving()}  # seconds

    def _saving(self) -> float:
        return 0.0 if self._saver is None else self._saver.seconds

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        self._spent["data"] += time.perf_counter() - self._batch_ended

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_began = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_validation_of_fit(trainer):
            self._batch_ended = time.perf_counter()
            self._spent["validation"] += self._batch_ended - self._validation_began

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, GPTModule)
        if pl_module.is_between_steps and is_log_step(trainer, trainer.global_step):
            self._log(trainer, pl_module)
            self._mark(pl_module)
        self._batch_ended = time.perf_counter()

    def _log(self, trainer: pl.Trainer, pl_module: GPTModule) -> None:
        wall = time.perf_counter() - self._began
        self._spent["checkpoint"] += self._saving()
        rate = (pl_module.tokens - self._tokens) / (wall - self._spent["validation"] - self._spent["checkpoint"])
        found = {"perf/tokens_per_second": rate, "perf/memory_gb": memory_peak(trainer.strategy.root_device) / 1e9}
        if self.peak is not None and self._learns_all:
            found["perf/mfu"] = rate * self._flops_per_token / (self.peak * trainer.world_size)
        log_numbers(pl_module, found | {f"time/{part}": seconds / wall for part, seconds in self._spent.items()})


def memory_peak(device: torch.device) -> int:
    """Return the peak bytes allocated on a GPU, or the peak resident set size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class NonFinite(Callback):
    """Ends a fit after `limit` consecutive steps with a non-finite gradient, and writes their windows to
    `non-finite.json` in the run's folder, by shard and offset in tokens.
    """

    def __init__(self, run: Path, limit: int) -> None:
        self.run, self.limit = run, limit

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Read the count after each step on a CPU, and at log points on a GPU, where it synchronizes.

        Raises:
            InputError: There were too many.
        """
        assert isinstance(pl_module, GPTModule)
        step, waits = trainer.global_step, pl_module.device.type != "cpu"
        if not pl_module.is_between_steps or (waits and not is_log_step(trainer, step)):
            return
        if count := pl_module.guard.in_a_row:
            note(f"step {step}: the gradient is not finite, nothing was changed ({count} in a row)")
        if count < self.limit:
            return
        path, datamodule = self.run / "non-finite.json", trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            windows = [window for past in range(step - count, step) for window in datamodule.addresses(past)]
            path.parent.mkdir(parents=True, exist_ok=True)  # trainer.fast_dev_run has none
            path.write_text(json.dumps(windows, indent=1) + "\n")
        raise InputError(
            f"the gradient was not finite in {count} steps in a row, up to step {step}; their windows are in {path}: "
            "look at them, or lower model.lr"
        )
