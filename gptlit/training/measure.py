"""The time of an optimizer step on this machine, for `plan --measure`."""

import time
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from gptlit.config import GPTConfig
from gptlit.data.windows import NO_TARGET
from gptlit.training.estimate import RunSpec, accumulation
from gptlit.training.module import GPTModule

WARM_UP, MEASURED = 2, 3  # steps


def measure(spec: RunSpec) -> float:
    """Return the seconds of an optimizer step, from a few steps of one random micro-batch on one device."""
    module = GPTModule(
        spec.config,
        optimizer=spec.optimizer,
        lr=spec.lr,
        compile=spec.compile,
        residual_in_fp32=spec.residual_in_fp32,
        activation_checkpointing=spec.activation_checkpointing,
        trainable=spec.trainable,
    )
    module.lora = spec.lora  # not an argument: adapters would need `init_from`
    batch = _random_batch(spec.config, spec.micro_batch_size, spec.length)
    laps = _Laps()
    trainer = pl.Trainer(
        accelerator=spec.device,
        devices=1,
        precision=spec.precision,  # type: ignore[arg-type]
        max_steps=WARM_UP + MEASURED,
        gradient_clip_val=1.0,
        callbacks=[laps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * (WARM_UP + MEASURED), batch_size=None))  # type: ignore[arg-type]
    starts, steps, ends = (laps.times[hook::3][WARM_UP:] for hook in range(3))
    backward = median(step - start for start, step in zip(starts, steps, strict=True))
    return accumulation(spec) * backward + median(end - step for step, end in zip(steps, ends, strict=True))


def _random_batch(config: GPTConfig, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return ids and targets, (B, T) each: the next ids, or for a classifier a label at the last token of each row."""
    ids = torch.randint(config.vocab_size, (rows, length + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if config.n_classes:
        targets = torch.full_like(inputs, NO_TARGET)
        targets[:, -1] = torch.randint(config.n_classes, (rows,))
    return inputs, targets


class _Laps(Callback):
    """Notes when a micro-batch begins, when its backward has ended, and when the optimizer's step has."""

    def __init__(self) -> None:
        self.times: list[float] = []  # seconds

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        getattr(torch, pl_module.device.type).synchronize()
        self.times.append(time.perf_counter())

    on_before_optimizer_step = on_train_batch_end = on_train_batch_start  # type: ignore[assignment]
