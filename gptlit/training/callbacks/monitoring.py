"""Throughput, memory and the use of the data."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from gptlit.training.callbacks.checkpoint import StepCheckpoint
from gptlit.training.estimate import count_parameters, datasheet_peak, flops_per_token
from gptlit.training.lightning_compat import is_log_step
from gptlit.training.module import GPTModule
from gptlit.training.tensorboard import StepLogger

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Throughput(Callback):
    """Logs between two log points: perf/tokens_per_second over all devices, without validations and checkpoints;
    perf/mfu, the fraction of the device's peak matmul throughput; perf/memory_gb, the peak so far; and the fractions of
    wall-clock time (time/data, model, optimizer, validation, checkpoint).

    Wall-clock time is measured on the host: kernels run asynchronously on a GPU, so there the fractions say where the
    host waited. Must come after the callbacks that work at the end of a validation.

    Args:
        peak: Of one device, in FLOP/s; None: from the datasheet of a known GPU, else measured at the start.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self._spent = dict.fromkeys(("data", "model", "optimizer", "validation"), 0.0)  # seconds since the start

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, GPTModule)
        for logger in trainer.loggers:
            if isinstance(logger, StepLogger):
                logger.tokens = lambda: pl_module.tokens  # here, as a validation may precede the first step

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        """Return the seconds spent so far, by part."""
        saves = [c.seconds for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint)]
        return {**self._spent, "checkpoint": sum(saves)}

    def _mark(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        self._began, self._tokens, self._before = time.perf_counter(), pl_module.tokens, self._seconds(trainer)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        # Lightning calls checkpoint callbacks last: a save that is due comes after this.
        self._batch_began, self._saves = time.perf_counter(), self._seconds(trainer)["checkpoint"]
        self._spent["data"] += self._batch_began - self._batch_ended

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, _: Any) -> None:
        self._step_began = time.perf_counter()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stopped = time.perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._spent["validation"] += time.perf_counter() - self._stopped
            self._batch_ended = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, GPTModule)
        now = time.perf_counter()
        accumulates = not pl_module.is_between_steps
        optimizer = 0.0 if accumulates else now - self._step_began
        self._spent["optimizer"] += optimizer
        saved = self._seconds(trainer)["checkpoint"] - self._saves
        self._spent["model"] += now - self._batch_began - optimizer - saved
        if not accumulates and is_log_step(trainer, trainer.global_step):
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
    """Return the FLOP/s of a large square matmul in the dtype of the activations: the best of ten."""
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
    """Return the peak bytes allocated on a GPU, or the peak resident set size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class DrawnWindows(Callback):
    """Logs data/NAME: the windows drawn from each corpus of a mixture since the run began."""

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, GPTModule)
        if pl_module.is_between_steps and is_log_step(trainer, trainer.global_step):
            pl_module.log_dict({f"data/{name}": float(count) for name, count in datamodule.drawn().items()})
