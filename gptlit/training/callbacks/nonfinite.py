"""Early termination after non-finite steps."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from gptlit.errors import InputError, note
from gptlit.training.lightning_compat import is_log_step
from gptlit.training.module import GPTModule


class NonFinite(Callback):
    """Ends a fit after too many consecutive non-finite gradients.

    The windows of these steps are written to `non-finite.json` in the run's folder, by shard and offset.

    Args:
        run: The run's folder.
        limit: Consecutive steps that end the fit.
    """

    def __init__(self, run: Path, limit: int) -> None:
        self.run = run
        self.limit = limit

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Read the count after each step on a CPU, and at log points on a GPU, where it synchronises.

        Raises:
            InputError: There were too many.
        """
        assert isinstance(pl_module, GPTModule)
        waits = pl_module.device.type != "cpu"
        if not pl_module.is_between_steps or (waits and not is_log_step(trainer, trainer.global_step)):
            return
        if not (count := pl_module.guard.in_a_row):
            return
        step = trainer.global_step
        note(f"step {step}: the gradient is not finite, nothing was changed ({count} in a row)")
        if count < self.limit:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        windows = [window for past in range(step - count, step) for window in datamodule.addresses(past)]
        path = self.run / "non-finite.json"
        if trainer.is_global_zero:
            path.write_text(json.dumps({"steps": [step - count + 1, step], "windows": windows}, indent=1) + "\n")
        raise InputError(
            f"the gradient was not finite in {count} steps in a row, up to step {step}; their windows are in {path}: "
            "look at them, or lower model.lr"
        )
