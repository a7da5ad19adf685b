"""Which Trainer settings and callbacks work with GPTModule. The others are refused by name before the first step."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from gptlit.errors import InputError
from gptlit.training.distributed import FSDP2Strategy
from gptlit.training.lightning_compat import uses_distributed_sampler

REFUSED_CALLBACKS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "the accumulation follows from data.batch_size and data.micro_batch_size",
    LearningRateFinder: "the rate of each step follows from model.lr and model.schedule: compare short runs instead",
    BatchSizeFinder: "a step has data.batch_size windows whatever fits: lower data.micro_batch_size",
    StochasticWeightAveraging: "it needs a schedule in epochs: use EMAWeightAveraging",
    ModelPruning: "it renames the weights, and no checkpoint could be read back",
}


def check_supported(trainer: pl.Trainer) -> None:
    """Check for values and callbacks that Lightning accepts but that would train wrongly or not at all."""
    if trainer.world_size > 1 and uses_distributed_sampler(trainer):
        raise InputError("trainer.use_distributed_sampler must be false: the data module's samplers shard by rank")
    for key in ("accumulate_grad_batches", "log_every_n_steps"):
        if not isinstance(value := getattr(trainer, key), int) or value < 1:
            raise InputError(f"trainer.{key} must be a positive integer, got {value}")
    clip = trainer.gradient_clip_val
    if clip is not None and not clip >= 0:  # nor NaN
        raise InputError(f"trainer.gradient_clip_val must be at least 0 (0: no clipping), got {clip}")
    if trainer.precision == "16-true":
        raise InputError("trainer.precision 16-true is not supported: gradients underflow in fp16, use 16-mixed")
    strategy = trainer.strategy
    works = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy)
    if not works or isinstance(strategy, DeepSpeedStrategy):  # a kind of DDPStrategy
        raise InputError(f"trainer.strategy {type(strategy).__name__} is not supported: use auto, ddp, fsdp2 or hsdp")
    if isinstance(strategy, FSDP2Strategy):
        strategy.mesh_shape()  # raises InputError
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for refused, why in REFUSED_CALLBACKS.items():
            if isinstance(callback, refused):
                raise InputError(f"trainer.callbacks: {name} does not work here: {why}")
        if isinstance(callback, WeightAveraging) and isinstance(strategy, FSDP2Strategy):
            raise InputError(f"trainer.callbacks: {name} does not work with sharded weights: use trainer.strategy ddp")
