"""The TensorBoard logger: points at optimizer steps, losses by tokens, hyper-parameters."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from gptlit.training.lightning_compat import add_summary

LAYOUT = {
    "loss": {
        "by step": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "by tokens": ["Multiline", ["loss_by_tokens/.*"]],
    },
    "speed": {"tokens per second": ["Multiline", ["perf/tokens_per_second"]], "time": ["Multiline", ["time/.*"]]},
}


def _values(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without `epoch`, which is always 0 here."""
    return {key: float(value) for key, value in metrics.items() if key != "epoch"}


class StepLogger(TensorBoardLogger):
    """TensorBoard with points at optimizer steps 1...n, where Lightning counts from 0.

    Also writes both losses in one chart, by steps and by tokens (custom scalars), and the run's hyper-parameters with
    its last val/loss (hparams).

    Args:
        settings: Hyper-parameters to show, by name.
        purge_tokens: After a resume, the tokens seen at its checkpoint.
        options: TensorBoardLogger's.
    """

    def __init__(
        self, *args: Any, settings: Mapping[str, Any] | None = None, purge_tokens: int | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.settings = dict(settings or {})
        self.purge_tokens = purge_tokens
        self.tokens: Callable[[], int] | None = None  # seen so far
        self._by_tokens: SummaryWriter | None = None

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = _values(metrics)
        if not values:
            return
        super().log_metrics(values, None if step is None else step + 1)
        losses = {key.split("/")[0]: value for key, value in values.items() if key in ("train/loss", "val/loss")}
        if losses and self.tokens is not None:
            self._log_by_tokens(losses, self.tokens())

    @rank_zero_only
    def _log_by_tokens(self, losses: dict[str, float], tokens: int) -> None:
        """Write to a separate folder: a resume purges points by their x value, which here is not a step."""
        if self._by_tokens is None:
            purge = None if self.purge_tokens is None else self.purge_tokens + 1
            self._by_tokens = SummaryWriter(os.path.join(self.log_dir, "tokens"), purge_step=purge)
        for name, loss in losses.items():
            self._by_tokens.add_scalar(f"loss_by_tokens/{name}", loss, tokens)

    @override
    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.experiment.add_custom_scalars(LAYOUT)
        for summary in hparams(self.settings, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
            add_summary(self.experiment, summary)

    @override
    @rank_zero_only
    def save(self) -> None:
        super().save()
        if self._by_tokens is not None:
            self._by_tokens.flush()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._by_tokens is not None:
            self._by_tokens.close()
            self._by_tokens = None


def run_logger(run: Path, checkpoint: dict[str, Any] | None, config: Namespace) -> StepLogger:
    """Return the logger of a run's folder; after a resume, curves continue from the checkpoint's step.

    Args:
        run: The run's folder.
        checkpoint: That of a resume.
        config: The parsed configuration of `fit`.
    """
    step = tokens = None
    if checkpoint is not None:
        step, tokens = checkpoint["global_step"], checkpoint.get("tokens")
    return StepLogger(
        run.parent.parent,
        name=run.parent.name,
        version=run.name,
        default_hp_metric=False,
        purge_step=None if step is None else step + 1,
        purge_tokens=tokens,
        settings=_hyper_parameters(config),
    )


def _hyper_parameters(config: Namespace) -> dict[str, bool | int | float | str]:
    """Return the settings of model, data and run, and some of the Trainer's, by dotted name."""
    found = {}
    for key, value in config.clone().items():
        of_trainer = key.removeprefix("trainer.") in ("max_steps", "max_epochs", "precision", "gradient_clip_val")
        if (key.split(".")[0] in ("model", "data", "run", "seed_everything") or of_trainer) and value is not None:
            found[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
