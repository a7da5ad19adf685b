"""What happens beside the training step: checkpoints, speed, sample text, progress. One small class each."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.text import Text

from gptlit.checkpoint import DurableCheckpointIO, best_path, checkpoint_path, checkpoints, remove, tidy
from gptlit.data.datamodule import TokenDataModule
from gptlit.errors import InputError
from gptlit.generate import generate
from gptlit.module import GPTModule
from gptlit.sharding import local


class StepLogger(TensorBoardLogger):
    """TensorBoard with points at optimizer steps 1...n, where Lightning counts from 0."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the metrics of the step that has just been made; `epoch`, which never moves here, is left out."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if values:
            super().log_metrics(values, None if step is None else step + 1)


class StepCheckpoint(Checkpoint):
    """Saves after every `every_n_steps` optimizer steps, after a validation that was the best so far, and at the end of
    a fit; keeps the newest `keep_last` and the best.

    A save waits until the next step begins, so that a validation due at the same step comes before it.

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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """All devices write to the folder that the first one chose."""
        self.run = trainer.strategy.broadcast(self.run)

    def state_dict(self) -> dict[str, Any]:
        """Keep which checkpoint is the best."""
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again; in a run that branches off there is none yet."""
        if checkpoint_path(self.run, state_dict["best_step"]).is_file():
            self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was resumed from is there already; what a killed process left half-written goes."""
        self._saved_step = trainer.global_step
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._folder.mkdir(parents=True, exist_ok=True)
            tidy(self._folder)

    @property
    def _folder(self) -> Path:
        return checkpoint_path(self.run, 0).parent

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the best loss; its checkpoint is due then."""
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.keep_best and loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Save when it is due; say what went wrong in the last save."""
        self.io.check()
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == self.best_step:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where the fit ends."""
        self.save(trainer)
        self.io.wait()

    def save(self, trainer: pl.Trainer) -> None:
        """Save now, unless this step is saved.

        Raises:
            InputError: The folder has gone, the disk is full, or a weight is not a number any more.
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
        self.io.then = partial(self._tidy, checkpoint_path(self.run, step), self.best_step)
        trainer.save_checkpoint(checkpoint_path(self.run, step))
        self.seconds += time.perf_counter() - began
        self._saved_step = step

    def _tidy(self, newest: Path, best_step: int) -> None:
        """Point to the best checkpoint, delete those that are too old. The newest one is on the disk."""
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
                    remove(path)


class FinalValidation(Callback):
    """Validates after the last step too, wherever the interval falls; and when a run is resumed at a step whose
    validation was not made, since the run was stopped before it.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.last_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Keep which validation was the last."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See whether the one of this step was made."""
        self.last_step = state_dict["last_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for it."""
        step = trainer.global_step
        if step > 0 and step % self.every_n_steps == 0 and self.last_step < step:
            loop = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped -= 1  # as in the step itself: its point in the curve is that of the step
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
            loop._batches_that_stepped += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning validates once more when it is told to stop."""
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True


class Throughput(Callback):
    """Logs perf/tokens_per_second: of all devices, between two log points, without validations and checkpoints.

    It is the wall clock that counts: a GPU works on after each call has returned, but not from one log point to the
    next. Must come after the callbacks that work at the end of a validation.
    """

    _validating = 0.0  # seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._mark(trainer, pl_module)

    def _mark(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        self._began, self._tokens, self._paused = time.perf_counter(), pl_module.tokens, self._pauses(trainer)

    def _pauses(self, trainer: pl.Trainer) -> float:
        """Return the seconds that validations and checkpoints have taken so far."""
        saves = [c.seconds for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint)]
        return self._validating + sum(saves)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._stopped = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validating += time.perf_counter() - self._stopped

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log at a log point, and begin anew."""
        assert isinstance(pl_module, GPTModule)
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            spent = time.perf_counter() - self._began - (self._pauses(trainer) - self._paused)
            pl_module.log("perf/tokens_per_second", (pl_module.tokens - self._tokens) / spent)
            self._mark(trainer, pl_module)


class DrawnWindows(Callback):
    """Logs data/NAME: the windows served of each corpus since the run began, where there are several."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log at a log point."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            pl_module.log_dict({f"data/{name}": float(count) for name, count in datamodule.drawn().items()})


class SampleText(Callback):
    """Continues a prompt after each validation: in TensorBoard's text tab and on the terminal.

    Args:
        prompt: Text to continue.
        max_new_tokens: Length of the continuation.
        seed: The draw is the same each time, so that only the model changes.
    """

    def __init__(self, prompt: str, max_new_tokens: int = 48, seed: int = 0) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.text = ""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every device samples (a sharded model needs them all), the first one shows it."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        assert isinstance(pl_module, GPTModule)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = datamodule.tokenizer
        prompt = torch.tensor([tokenizer.encode_ordinary(self.prompt)], device=pl_module.device)
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        with trainer.precision_plugin.forward_context():
            ids = generate(pl_module.model, prompt, self.max_new_tokens, temperature=0.8, top_k=50, generator=generator)
        self.text = tokenizer.decode(ids[0].tolist())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                markdown = "\n".join("    " + line for line in self.text.splitlines())
                logger.experiment.add_text("samples", markdown, trainer.global_step)


class StepProgress(ProgressBar):
    """One bar over the optimizer steps with the last logged figures; plain lines where there is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self._enabled = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown_step = -1

    def disable(self) -> None:
        """Lightning calls this on every device but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress here."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            (self._progress.console if self._progress else self.console).print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is about to happen, then show the bar."""
        self._began, self._first_step = time.monotonic(), trainer.global_step
        for line in _summary(trainer, pl_module):
            self.print(line, highlight=False, markup=False, soft_wrap=True)
        if self._enabled and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step, figures=""
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Advance by optimizer steps; the figures change only where something was logged."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=trainer.global_step, figures=_figures(trainer))
        elif self._enabled and trainer._logger_connector.should_update_logs:
            self._line(trainer)

    def _line(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._shown_step or step == self._first_step:
            return
        self._shown_step = step
        rate = (time.monotonic() - self._began) / (step - self._first_step)
        left = timedelta(seconds=int(rate * (trainer.max_steps - step)))
        self.print(
            f"step {step}/{trainer.max_steps}  {_figures(trainer)}  {left} left", highlight=False, soft_wrap=True
        )

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say in the bar that a validation is going on."""
        if self._progress is not None and self._task is not None:
            total = sum(trainer.num_val_batches)
            self._progress.update(self._task, description=f"validating {batch_idx + 1}/{total}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print a line a validation, and the sample under it."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description="training", figures=_figures(trainer))
        step = trainer.global_step
        metrics = trainer.callback_metrics
        if "val/loss" in metrics:
            loss, perplexity = float(metrics["val/loss"]), float(metrics["val/perplexity"])
            self.print(f"step {step}: val/loss {loss:.4f}, perplexity {perplexity:.1f}", highlight=False)
        sample = next((c.text for c in trainer.callbacks if isinstance(c, SampleText)), "")  # type: ignore[attr-defined]
        if sample:
            self.print(Rule("sample", style="dim"), Text(sample, style="italic"), Rule(style="dim"))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self.teardown(trainer, pl_module, "fit")


def _figures(trainer: pl.Trainer) -> str:
    """Return the figures that were logged last, from memory: nothing is read off the device for it."""
    metrics = trainer.logged_metrics
    names = {
        "train/loss": ("loss", ".3f"),
        "val/loss": ("val", ".3f"),
        "perf/tokens_per_second": ("tokens/s", ",.0f"),
    }
    known = {**{k: v for k, v in trainer.callback_metrics.items() if k == "val/loss"}, **metrics}
    return "  ".join(f"{label} {float(known[key]):{form}}" for key, (label, form) in names.items() if key in known)


def _summary(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
    """Describe model, data and run in a few lines."""
    assert isinstance(pl_module, GPTModule)
    config = pl_module.config
    parameters = sum(p.numel() for p in pl_module.model.parameters())
    lines = [
        f"model  {parameters:,} parameters: {config.n_layers} layers, {config.n_heads} heads, {config.emb_dim} wide, "
        f"context {config.context_length}; {trainer.precision} on "
        f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    ]
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(datamodule, TokenDataModule):
        tokens = {name: datamodule.data.tokens(name) for name in ("train", "val")}
        source = datamodule.source if isinstance(datamodule.source, str) else f"{len(datamodule.sources)} corpora"
        lines.append(f"data   {source}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate")
        lines += [f"       {line}" for line in datamodule.describe_mix()]
        step = f"{datamodule.batch_size} windows ({datamodule.batch_size * config.context_length:,} tokens)"
        if datamodule.accumulation > 1:
            micro = datamodule.micro_batch_size_used
            step += f", accumulated over {datamodule.accumulation} micro-batches of {micro} on each device"
        lines.append(f"run    {trainer.max_steps} steps of {step}")
    return lines
