"""What a fit prints: a summary at its start, the progress bar, and its result."""

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.text import Text
from typing_extensions import override

from gptlit.checkpoint.runs import best_path, checkpoint_path
from gptlit.data.datamodule import TokenDataModule
from gptlit.errors import note, shell_quote
from gptlit.training.callbacks.checkpoint import step_checkpoint
from gptlit.training.callbacks.validation import SampleText
from gptlit.training.distributed import FSDP2Strategy
from gptlit.training.estimate import RunSpec, describe, make_plan, warnings
from gptlit.training.lightning_compat import is_log_step, is_validation_of_fit
from gptlit.training.module import GPTModule


class StepProgress(ProgressBar):
    """One bar over the optimizer steps with the last logged figures; plain lines where there is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", figures="")
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False  # on ranks above 0

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            self._bar.console.print(*args, highlight=False, soft_wrap=True, **kwargs)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._first_step = time.monotonic(), trainer.global_step
        for line in _summary(trainer, pl_module):
            self.print(line, markup=False)
        self._bar.reset(self._task, total=trainer.max_steps, completed=trainer.global_step)
        if self._enabled:
            self._bar.start()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, GPTModule)
        step = trainer.global_step
        self._bar.update(self._task, completed=step, figures=_figures(trainer))
        if self._bar.disable and pl_module.is_between_steps and is_log_step(trainer, step):
            rate = (time.monotonic() - self._began) / (step - self._first_step)
            left = timedelta(seconds=int(rate * (trainer.max_steps - step)))
            self.print(f"step {step}/{trainer.max_steps}  {_figures(trainer)}  {left} left")

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if is_validation_of_fit(trainer):
            self._bar.update(self._task, description=f"validating {batch_idx + 1}/{sum(trainer.num_val_batches)}")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_validation_of_fit(trainer):
            return
        self._bar.update(self._task, description="training", figures=_figures(trainer))
        metrics = trainer.callback_metrics
        if "val/loss" in metrics:
            self.print(f"step {trainer.global_step}: val/loss {metrics['val/loss']:.4f}, {_quality(metrics)}")
        sample = next((c.text for c in trainer.callbacks if isinstance(c, SampleText)), "")  # type: ignore[attr-defined]
        if sample:
            self.print(Rule("sample", style="dim"), Text(sample, style="italic"), Rule(style="dim"))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._bar.stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._bar.stop()


def _figures(trainer: pl.Trainer) -> str:
    """Return the metrics that were logged last. They are on the host: reading them does not synchronize."""
    known = {**{k: v for k, v in trainer.callback_metrics.items() if k == "val/loss"}, **trainer.logged_metrics}
    shown = (("train/loss", "loss", ".3f"), ("val/loss", "val", ".3f"), ("perf/tokens_per_second", "tokens/s", ",.0f"))
    return "  ".join(f"{label} {float(known[key]):{form}}" for key, label, form in shown if key in known)


def _quality(metrics: Mapping[str, Any]) -> str:
    """Return the metric that goes with val/loss: a classifier's accuracy, or the perplexity."""
    if "val/accuracy" in metrics:
        return f"accuracy {metrics['val/accuracy']:.4f}"
    return f"perplexity {metrics['val/perplexity']:,.1f}"


def _summary(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """Describe model, data and run in a few lines, with warnings last."""
    assert isinstance(pl_module, GPTModule)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, TokenDataModule):
        return []
    saver, strategy = step_checkpoint(trainer), trainer.strategy
    spec = RunSpec.of(
        pl_module,
        datamodule,
        precision=str(trainer.precision),
        device=strategy.root_device.type,
        devices=trainer.world_size,
        nodes=trainer.num_nodes,
        shards=strategy.mesh_shape()[-1] if isinstance(strategy, FSDP2Strategy) else 1,
        micro_batch_size=datamodule.micro_batch_size_used,
        steps=trainer.max_steps,
        keep_last=0 if saver is None else saver.keep_last,
        keep_best=saver is not None and saver.keep_best,
        folder=Path(".") if saver is None else saver.run,
    )
    plan = make_plan(spec)
    lines = describe(spec, plan)
    source = datamodule.source if isinstance(datamodule.source, str) else f"{len(datamodule.sources.divided)} corpora"
    mix = [f"        {line}" for line in datamodule.describe_mixture()]
    return [f"corpus  {source}", *mix, *lines, *(f"warning: {line}" for line in warnings(spec, plan))]


def print_closing(trainer: pl.Trainer, run: Path) -> None:
    """Print the result of a fit, its checkpoints, and commands that use them."""
    metrics = trainer.callback_metrics
    if "val/loss" in metrics:
        print(f"\nval/loss    {metrics['val/loss']:.4f}   {_quality(metrics)}")
    saver = step_checkpoint(trainer)
    if saver is not None and 0 <= saver.best_step < trainer.global_step:
        best = path if (path := best_path(run)).exists() else checkpoint_path(run, saver.best_step)  # without links
        if best.is_file():  # not if a run branched off at its best step
            print(f"best        {saver.best_loss:.4f} at step {saver.best_step}: {best}")
    folder, newest = shell_quote(str(run)), checkpoint_path(run, trainer.global_step)
    if trainer.global_step < trainer.max_steps:
        stops = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        reasons = [stop.stopping_reason_message for stop in stops]
        if any(left <= 0 for timer in timers if (left := timer.time_remaining()) is not None):
            reasons.append("the time of trainer.max_time is over")
        why = "".join(f": {reason}" for reason in reasons if reason)
        next_ = f"; continue with --ckpt_path {folder}" if newest.is_file() else ""
        note(f"stopped after step {trainer.global_step} of {trainer.max_steps}{why}{next_}")
    if newest.is_file():
        use, option = ("classify", "text") if "val/accuracy" in metrics else ("generate", "prompt")
        here = os.path.join(os.getcwd(), "")
        python = shell_quote(sys.executable.removeprefix(here))  # the environment may not be activated
        print(f"checkpoint  {newest}\n\nwhat next:\n  {python} -m gptlit {use} --checkpoint {folder} --{option} The")
        if trainer.loggers:
            print(f"  {python} -m gptlit plot {folder} --out curves.png")
            print(f"  {python} -m tensorboard.main --logdir {shell_quote(str(run.parent.parent))}")
