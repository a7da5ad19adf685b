"""The time of an optimizer step on this machine, for `plan --measure`."""

import time
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from typing_extensions import override

from gptlit.training.estimate import RunSpec, accumulation
from gptlit.training.module import GPTModule

WARM_UP, MEASURED = 2, 3  # steps


def measure(spec: RunSpec) -> float:
    """Return the seconds of an optimizer step, from a few steps of one micro-batch of random ids on one device."""
    module = GPTModule(
        spec.config,
        optimizer=spec.optimizer,
        lr=spec.lr,
        compile=spec.compile,
        activation_checkpointing=spec.activation_checkpointing,
    )
    ids = torch.randint(spec.config.vocab_size, (spec.micro_batch_size, spec.config.context_length + 1))
    batch = ids[:, :-1], ids[:, 1:]
    timer = _StepTimer()
    trainer = pl.Trainer(
        accelerator=spec.device,
        devices=1,
        precision=spec.precision,  # type: ignore[arg-type]
        max_steps=WARM_UP + MEASURED,
        gradient_clip_val=1.0,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * (WARM_UP + MEASURED), batch_size=None))  # type: ignore[arg-type]
    return accumulation(spec) * median(timer.backward[WARM_UP:]) + median(timer.step[WARM_UP:])


class _StepTimer(Callback):
    """Measures forward and backward of each micro-batch, and clipping and the optimizer's step."""

    def __init__(self) -> None:
        self.backward: list[float] = []  # seconds
        self.step: list[float] = []

    def _lap(self, pl_module: pl.LightningModule) -> float:
        getattr(torch, pl_module.device.type).synchronize()
        began, self._began = getattr(self, "_began", 0.0), time.perf_counter()
        return self._began - began

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._lap(pl_module)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.backward.append(self._lap(pl_module))

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.step.append(self._lap(pl_module))
