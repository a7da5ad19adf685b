"""TensorBoard: points at optimizer steps, both losses in one chart, hyper-parameters, texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from gptlit.training.lightning_compat import add_summary

LAYOUT = {
    "loss": {"train and val": ["Multiline", ["^train/loss$", "^val/loss$"]]},
    "speed": {"tokens per second": ["Multiline", ["perf/tokens_per_second"]], "time": ["Multiline", ["time/.*"]]},
}


class StepLogger(TensorBoardLogger):
    """TensorBoard with points at optimizer steps 1...n, where Lightning counts from 0.

    Also lays out charts (custom scalars), and shows the settings with the last val/loss (hparams).

    Args:
        run: The run's folder.
        config: The parsed configuration of `fit`.
        resumed_step: The optimizer step of a resume: later points of the run are replaced. None: a new run.
    """

    def __init__(self, run: Path, config: Namespace, resumed_step: int | None) -> None:
        purge_step = None if resumed_step is None else resumed_step + 1
        super().__init__(run.parent.parent, run.parent.name, run.name, default_hp_metric=False, purge_step=purge_step)
        self.settings = _settings(config)

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}  # always 0 here
        super().log_metrics(values, None if step is None else step + 1)

    @override
    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.experiment.add_custom_scalars(LAYOUT)
        for summary in hparams(self.settings, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
            add_summary(self.experiment, summary)


def _settings(config: Namespace) -> dict[str, bool | int | float | str]:
    """Return the settings of model, data and run, and some of the Trainer's, by dotted name."""
    found = {}
    for key, value in config.clone().items():
        of_trainer = key.removeprefix("trainer.") in ("max_steps", "max_epochs", "precision", "gradient_clip_val")
        if (key.split(".")[0] in ("model", "data", "run", "seed_everything") or of_trainer) and value is not None:
            found[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def log_text(trainer: pl.Trainer, tag: str, markdown: str) -> None:
    """Write a text at the current step to TensorBoard's text tab."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown, trainer.global_step)


def log_confusion(trainer: pl.Trainer, name: str, matrix: Tensor) -> None:
    """Write the confusion matrix (K, K) of "val" or "test", with true labels in rows, to the text tab."""
    labels = getattr(getattr(trainer, "datamodule", None), "labels", range(len(matrix)))
    table = [["true, predicted", *labels], ["---"] * (len(labels) + 1)]
    table += [[label, *counts] for label, counts in zip(labels, matrix.tolist(), strict=True)]
    text = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)
    log_text(trainer, f"{name}/confusion", text)
