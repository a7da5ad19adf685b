"""Which Trainer settings and callbacks work with GPTModule. The others are refused by name before the first step."""

import difflib
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from gptlit.errors import InputError
from gptlit.training.lightning_compat import uses_distributed_sampler

REFUSED_PRECISIONS = {
    "16-true": "gradients and optimizer state overflow and underflow in fp16: use 16-mixed, bf16-mixed or bf16-true",
    "transformer-engine": "use bf16-mixed",
    "transformer-engine-float16": "use 16-mixed",
}


REFUSED_CALLBACKS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "the accumulation follows from data.batch_size and data.micro_batch_size",
    LearningRateFinder: "the rate of each step follows from model.lr and model.schedule: compare short runs instead",
    BatchSizeFinder: "a step has data.batch_size windows whatever fits: lower data.micro_batch_size",
    StochasticWeightAveraging: "it needs a schedule in epochs: use EMAWeightAveraging",
    ModelPruning: "it renames the weights, and no checkpoint could be read back",
}


METRICS = (
    "train/loss",
    "train/grad_norm",
    "train/tokens",
    "train/skipped_steps",
    "lr",
    "val/loss",
    "val/perplexity",
    "val/bits_per_byte",
)


METRIC_GROUPS = ("perf/", "time/", "data/")


def check_trainer(trainer: pl.Trainer) -> None:
    """Check for values and callbacks that Lightning accepts but that would train wrongly or not at all.

    Raises:
        InputError: One of them does not work here.
    """
    if trainer.world_size > 1 and uses_distributed_sampler(trainer):
        raise InputError("trainer.use_distributed_sampler must be false: the data module's samplers shard by rank")
    clip = trainer.gradient_clip_val
    if clip is not None and not clip >= 0:  # nor NaN
        raise InputError(f"trainer.gradient_clip_val must be at least 0 (0: no clipping), got {clip}")
    for key, least in {"accumulate_grad_batches": 1, "log_every_n_steps": 0 if trainer.barebones else 1}.items():
        value: Any = getattr(trainer, key)
        if not isinstance(value, int) or value < least:
            raise InputError(f"trainer.{key} must be an integer of at least {least}, got {value}")
    check_precision(trainer.precision)
    name = type(trainer.strategy).__name__
    works = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not works or isinstance(trainer.strategy, DeepSpeedStrategy):  # a kind of DDPStrategy
        raise InputError(f"trainer.strategy {name} is not supported: use auto, ddp or fsdp2")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_callback(trainer, callback)


def check_precision(precision: Any) -> None:
    """Check `trainer.precision`.

    Raises:
        InputError: It is not supported.
    """
    if precision in REFUSED_PRECISIONS:
        raise InputError(f"trainer.precision {precision} is not supported: {REFUSED_PRECISIONS[precision]}")


def _check_callback(trainer: pl.Trainer, callback: Callback) -> None:
    name = type(callback).__name__
    for refused, why in REFUSED_CALLBACKS.items():
        if isinstance(callback, refused):
            raise InputError(f"trainer.callbacks: {name} does not work here: {why}")
    if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, ModelParallelStrategy):
        raise InputError(f"trainer.callbacks: {name} does not work with sharded weights: use trainer.strategy ddp")
    monitor = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
    if monitor is None or monitor in METRICS or monitor.startswith(METRIC_GROUPS) or _may_log_more(trainer):
        return
    near = difflib.get_close_matches(monitor, METRICS, 1)
    hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(METRICS)}"
    raise InputError(f"trainer.callbacks: {name} monitors {monitor!r}, which is not logged: {hint}")


def is_averaging(trainer: pl.Trainer) -> bool:
    """Whether a WeightAveraging callback is used."""
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _may_log_more(trainer: pl.Trainer) -> bool:
    """Whether the module or a callback is the user's own: its metrics are not known here."""
    parts = [getattr(trainer, "lightning_module", None), *trainer.callbacks]  # type: ignore[attr-defined]
    packages = {type(part).__module__.split(".")[0] for part in parts if part is not None}
    return not packages <= {"gptlit", "lightning", "pytorch_lightning"}
