"""What a checkpoint may and may not change in a run that resumes from it."""

from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from gptlit.config import GPTConfig
from gptlit.errors import InputError, note
from gptlit.training.lightning_compat import set_global_step
from gptlit.training.supported import is_averaging


def check_architecture(config: GPTConfig, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint has the model's architecture; `drop_rate` may differ.

    Raises:
        InputError: A key differs; it is named, with both values.
    """
    theirs = checkpoint["hyper_parameters"]["config"]
    for field in fields(GPTConfig):
        ours = getattr(config, field.name)
        if field.name != "drop_rate" and theirs.get(field.name) != ours:
            raise InputError(
                f"model.config.{field.name} is {ours}, but the checkpoint was trained with "
                f"{theirs.get(field.name)}: set it to that, or start a new run"
            )


def check_optimizer(name: str, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint has the state of this optimizer.

    Raises:
        InputError: It has another one's.
    """
    theirs = checkpoint["hyper_parameters"].get("optimizer", name)
    if theirs != name:
        raise InputError(
            f"model.optimizer is {name!r}, but the checkpoint was trained with {theirs!r}: "
            "set it to that, or start a new run with --model.init_from"
        )


def prepare_fit(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a fit continue at the checkpoint's step, with the callbacks and the accumulation of this configuration."""
    if "current_model_state" in checkpoint and not is_averaging(trainer):
        note("the checkpoint has averaged weights too: the run goes on with the others, without an average")
        checkpoint["state_dict"] = checkpoint["current_model_state"]
    set_global_step(trainer, checkpoint["global_step"])
    for timer in (callback for callback in trainer.callbacks if isinstance(callback, Timer)):  # type: ignore[attr-defined]
        checkpoint.get("callbacks", {}).pop(timer.state_key, None)  # trainer.max_time counts from each start
