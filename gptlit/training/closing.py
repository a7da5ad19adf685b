"""What is printed at the end of a fit, validation or test."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer

from gptlit.checkpoint.runs import best_path, checkpoint_path
from gptlit.errors import note
from gptlit.training.callbacks.checkpoint import StepCheckpoint


def print_result(trainer: pl.Trainer, name: str) -> None:
    """Print the loss and perplexity of "val" or "test", on rank 0."""
    metrics = trainer.callback_metrics
    if trainer.is_global_zero and f"{name}/loss" in metrics:
        loss, perplexity = float(metrics[f"{name}/loss"]), float(metrics[f"{name}/perplexity"])
        print(f"{name + '/loss':<10}  {loss:.4f}   perplexity {perplexity:.1f}")


def print_closing(trainer: pl.Trainer, run: Path, config: Any) -> None:
    """Print the result of a fit, its checkpoints and the commands that a user may want next.

    Args:
        trainer: Of the fit that has ended.
        run: The run's folder.
        config: The parsed configuration of `fit`.
    """
    print()
    print_result(trainer, "val")
    newest = checkpoint_path(run, trainer.global_step)
    saver = trainer.checkpoint_callback
    if isinstance(saver, StepCheckpoint) and 0 <= saver.best_step < trainer.global_step:
        print(f"best        {saver.best_loss:.4f} at step {saver.best_step}: {best_path(run)}")
    if (why := early_end(trainer)) is not None:
        saved = f"; continue with --ckpt_path {shlex.quote(str(run))}" if newest.is_file() else ""
        note(f"stopped after step {trainer.global_step} of {trainer.max_steps}: {why}{saved}")
    if newest.is_file():
        print(f"checkpoint  {newest}\n\nwhat next:")
        for command in _next_commands(trainer, run, config):
            print(f"  {shlex.join(command)}")


def early_end(trainer: pl.Trainer) -> str | None:
    """Return why a fit ended before its last step; None if it did not."""
    if trainer.global_step >= trainer.max_steps:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            return "the time of trainer.max_time is over"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping: {callback.stopping_reason_message}"
    return "a callback set trainer.should_stop"


def _next_commands(trainer: pl.Trainer, run: Path, config: Any) -> list[list[str]]:
    """Return the commands that generate from this run, continue it and show its curves."""
    file = max(run.glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
    python = "python" if os.environ.get("VIRTUAL_ENV") == sys.prefix else os.path.relpath(sys.executable)
    script = os.path.relpath(Path(__file__).parent.parent.parent / "train.py")
    more: list[str] = []
    if trainer.global_step >= trainer.max_steps:  # raise both limits: either may have ended the run
        for key in ("max_steps", "max_epochs"):
            if (limit := config.trainer[key]) not in (None, -1):
                more += [f"--trainer.{key}", str(2 * limit)]
    prompt = f"--prompt={config.run.sample_prompt or 'The'}"
    commands = [
        [python, "-m", "gptlit", "generate", "--checkpoint", str(run), prompt],
        [python, script, "fit", "--config", str(file), "--ckpt_path", str(run), *more],
    ]
    if any(run.glob("events.out.tfevents.*")):
        commands.append([python, "-m", "gptlit", "plot", str(run), "--out", "curves.png"])
        commands.append([python, "-m", "tensorboard.main", "--logdir", str(run.parent.parent)])
    return commands
