"""Throughput, memory and the use of the data."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from gptlit.training.callbacks.checkpoint import StepCheckpoint
from gptlit.training.estimate import count_parameters, datasheet_peak, flops_per_token
from gptlit.training.module import GPTModule
from gptlit.training.tensorboard import StepLogger

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Throughput(Callback):
    """Logs the speed between two log points: perf/tokens_per_second of all devices, without validations and
    checkpoints; perf/mfu, the share of the device's matrix peak; perf/memory_gb, its most so far; and what part of the
    wall clock went where (time/data, model, optimizer, validation, checkpoint).

    It is the wall clock that counts: a GPU works on after each call has returned, but not from one log point to the
    next. (So with a GPU the shares say where the host waited.) Must come after the callbacks that work at the end of a
    validation.

    Args:
        peak: Of a device, in floating-point operations a second; None: that of a known GPU's datasheet, else what
            some products at the start reach.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self._spent = dict.fromkeys(("data", "model", "optimizer", "validation"), 0.0)  # seconds since the start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the loggers their tokens; a validation may come before the first step."""
        assert isinstance(pl_module, GPTModule)
        for logger in trainer.loggers:
            if isinstance(logger, StepLogger):
                logger.tokens = lambda: pl_module.tokens

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the peak, start the clock."""
        assert isinstance(pl_module, GPTModule)
        self._flops_per_token = flops_per_token(pl_module.config, count_parameters(pl_module.config))
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        if self.peak is None and device.type == "cuda":
            self.peak = datasheet_peak(torch.cuda.get_device_name(device), precision)
        if self.peak is None:
            self.peak = matmul_peak(device, precision)
        self._batch_ended = time.perf_counter()
        self._mark(trainer, pl_module)

    def _seconds(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return what has been spent so far, by part."""
        saves = [c.seconds for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint)]
        return {**self._spent, "checkpoint": sum(saves)}

    def _mark(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        self._began, self._tokens, self._before = time.perf_counter(), pl_module.tokens, self._seconds(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """The batch is here. (Lightning calls checkpoint callbacks last: a save that is due comes after this.)"""
        self._batch_began, self._saves = time.perf_counter(), self._seconds(trainer)["checkpoint"]
        self._spent["data"] += self._batch_began - self._batch_ended

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, _: Any) -> None:
        """The gradient is there."""
        self._step_began = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._stopped = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._spent["validation"] += time.perf_counter() - self._stopped
            self._batch_ended = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log at a log point, and begin anew."""
        now = time.perf_counter()
        accumulates = trainer.fit_loop._should_accumulate()
        optimizer = 0.0 if accumulates else now - self._step_began
        self._spent["optimizer"] += optimizer
        saved = self._seconds(trainer)["checkpoint"] - self._saves
        self._spent["model"] += now - self._batch_began - optimizer - saved
        if trainer._logger_connector.should_update_logs and not accumulates:
            self._log(trainer, pl_module)
            self._mark(trainer, pl_module)
        self._batch_ended = time.perf_counter()

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        wall = time.perf_counter() - self._began
        spent = {part: seconds - self._before[part] for part, seconds in self._seconds(trainer).items()}
        rate = (pl_module.tokens - self._tokens) / (wall - spent["validation"] - spent["checkpoint"])
        assert self.peak is not None
        pl_module.log_dict(
            {
                "perf/tokens_per_second": rate,
                "perf/mfu": rate * self._flops_per_token / (self.peak * trainer.world_size),
                "perf/memory_gb": memory_peak(trainer.strategy.root_device) / 1e9,
                **{f"time/{part}": seconds / wall for part, seconds in spent.items()},
            }
        )


def matmul_peak(device: torch.device, precision: str) -> float:
    """Return the operations a second of a large square product: the best of ten, in the type of the activations."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0], torch.float32)
    side = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, device=device, generator=generator).to(dtype)  # a GPU is faster on zeros and ones
    best = math.inf
    wait = getattr(torch, device.type).synchronize
    for _ in range(10):
        wait()
        began = time.perf_counter()
        matrix @ matrix
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def memory_peak(device: torch.device) -> int:
    """Return the most bytes that tensors have held on a GPU, or that the process has on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class DrawnWindows(Callback):
    """Logs data/NAME: the windows served of each corpus since the run began, where there are several."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log at a log point."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            pl_module.log_dict({f"data/{name}": float(count) for name, count in datamodule.drawn().items()})
