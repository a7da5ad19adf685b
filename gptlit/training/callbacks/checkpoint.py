"""When checkpoints are saved, and which are kept."""

import math
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from gptlit.checkpoint.io import DurableCheckpointIO
from gptlit.checkpoint.runs import best_path, checkpoint_path, checkpoints
from gptlit.data.atomic import delete_partial_files
from gptlit.errors import InputError
from gptlit.model.sharding import local
from gptlit.training.lightning_compat import is_validation_of_fit


class StepCheckpoint(Checkpoint):
    """Saves after every `every_n_steps` optimizer steps, after a validation that was the best so far, and at the end of
    a fit; keeps the newest `keep_last` and the best.

    A save is delayed to the start of the next step, so that a validation due at the same step comes first.

    Args:
        run: The run's folder.
        io: Writes the checkpoints.
        every_n_steps: Optimizer steps from one checkpoint to the next.
        keep_last: How many to keep; -1 keeps all.
        keep_best: Whether to keep the one with the lowest val/loss too.
    """

    def __init__(
        self, run: Path, io: DurableCheckpointIO, every_n_steps: int, keep_last: int, keep_best: bool = True
    ) -> None:
        self.run = run
        self.io = io
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.seconds = 0.0  # spent on saving, while training waited
        self.best_loss, self.best_step = math.inf, -1
        self._saved_step = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.run = trainer.strategy.broadcast(self.run)  # the folder that rank 0 chose

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if checkpoint_path(self.run, state_dict["best_step"]).is_file():  # not in a run that branches off
            self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._folder.mkdir(parents=True, exist_ok=True)
            delete_partial_files(self._folder)

    @property
    def _folder(self) -> Path:
        return checkpoint_path(self.run, 0).parent

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        if is_validation_of_fit(trainer) and self.keep_best and loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        self.io.check()
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == self.best_step:
            self.save(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A fit is one epoch of Lightning's. At `on_train_end` WeightAveraging has already replaced the weights.
        self.save(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.io.wait()

    def save(self, trainer: pl.Trainer) -> None:
        """Save now, unless this step is already saved.

        Raises:
            InputError: The folder is gone, the disk is full, or a weight is not finite.
        """
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        began = time.perf_counter()
        if trainer.is_global_zero and not self._folder.is_dir():
            raise InputError(f"the folder {self._folder} has gone: step {step} cannot be saved")
        parameters = trainer.lightning_module.named_parameters()
        wrong = next((name for name, parameter in parameters if not local(parameter).isfinite().all()), None)
        if trainer.strategy.reduce_boolean_decision(wrong is not None, all=False):  # a shard may be on another device
            raise InputError(
                f"{wrong or 'a weight on another device'} is not finite at step {step}: it is not saved, the "
                "checkpoint before it is good"
            )
        path = checkpoint_path(self.run, step)
        trainer.save_checkpoint(path, storage_options=partial(self._link_and_prune, path, self.best_step))
        self.seconds += time.perf_counter() - began
        self._saved_step = step

    def _link_and_prune(self, newest: Path, best_step: int) -> None:
        """Link the best checkpoint and delete old ones, once the newest is on disk."""
        best = checkpoint_path(self.run, best_step)
        if best_step >= 0 and best.is_file():
            link = best.with_name(".best.partial")
            with suppress(OSError):  # some file systems have no links; the checkpoint itself is kept all the same
                link.unlink(missing_ok=True)
                link.symlink_to(best.name)
                link.replace(best_path(self.run))
        if self.keep_last > 0:  # what has a higher number is damaged, or not of this timeline
            for path in [path for path in checkpoints(self.run) if path <= newest][: -self.keep_last]:
                if path != best:
                    with suppress(PermissionError):  # of Windows, while it is mapped: the next save tries again
                        path.unlink(missing_ok=True)


def step_checkpoint(trainer: pl.Trainer) -> StepCheckpoint | None:
    """Return the Trainer's StepCheckpoint; None if it saves nothing."""
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint)), None)
