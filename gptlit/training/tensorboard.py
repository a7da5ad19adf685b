"""The TensorBoard logger: points at optimizer steps, losses by tokens, hyper-parameters."""

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

LAYOUT = {
    "loss": {
        "by step": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "by tokens": ["Multiline", ["loss_by_tokens/.*"]],
    },
    "speed": {"tokens per second": ["Multiline", ["perf/tokens_per_second"]], "time": ["Multiline", ["time/.*"]]},
}


def _values(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out `epoch`, which never moves here."""
    return {key: float(value) for key, value in metrics.items() if key != "epoch"}


class StepLogger(TensorBoardLogger):
    """TensorBoard with points at optimizer steps 1...n, where Lightning counts from 0.

    Beside the scalars: both losses in one chart, by steps and by tokens (custom scalars), and the run's settings with
    its last val/loss (hparams).

    Args:
        settings: What the page of hyper-parameters shows of the run, by name.
        purge_tokens: After a resume: the tokens seen at its checkpoint.
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

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the metrics of the step that has just been made."""
        values = _values(metrics)
        if not values:
            return
        super().log_metrics(values, None if step is None else step + 1)
        losses = {key.split("/")[0]: value for key, value in values.items() if key in ("train/loss", "val/loss")}
        if losses and self.tokens is not None:
            self._log_by_tokens(losses, self.tokens())

    @rank_zero_only
    def _log_by_tokens(self, losses: dict[str, float], tokens: int) -> None:
        """Write to a folder of its own: a resume purges points by their x, and this one is no step."""
        if self._by_tokens is None:
            purge = None if self.purge_tokens is None else self.purge_tokens + 1
            self._by_tokens = SummaryWriter(os.path.join(self.log_dir, "tokens"), purge_step=purge)
        for name, loss in losses.items():
            self._by_tokens.add_scalar(f"loss_by_tokens/{name}", loss, tokens)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Write the settings, with val/loss as what they are judged by, and the layout of the charts."""
        self.experiment.add_custom_scalars(LAYOUT)
        for summary in hparams(self.settings, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
            self.experiment._get_file_writer().add_summary(summary)

    @rank_zero_only
    def save(self) -> None:
        """Write what is waiting."""
        super().save()
        if self._by_tokens is not None:
            self._by_tokens.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the files."""
        super().finalize(status)
        if self._by_tokens is not None:
            self._by_tokens.close()
            self._by_tokens = None
