"""What happens beside the training step: checkpoints, speed, sample text, progress. One small class each."""

import math
import sys
import time
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
from gptlit.costs import Work, count_parameters, datasheet_peak, describe, make_plan, operations, warnings
from gptlit.data.datamodule import TokenDataModule
from gptlit.errors import InputError
from gptlit.generate import generate
from gptlit.logs import CsvLogger, StepLogger
from gptlit.module import GPTModule
from gptlit.sharding import local

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where the fit ends: a fit is one epoch of Lightning's. At `on_train_end` WeightAveraging has already
        replaced the weights by their average.
        """
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until it is written."""
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
    """Logs the speed between two log points: perf/tokens_per_second of all devices, without validations and
    checkpoints; perf/mfu, the share of the device's matrix peak; perf/memory_gb, its most so far; and what part of the
    wall clock went where (share/data, model, optimizer, validation, checkpoint).

    It is the wall clock that counts: a GPU works on after each call has returned, but not from one log point to the
    next. (So with a GPU the shares say where the host waited.) Must come after the callbacks that work at the end of a
    validation.

    Args:
        peak: Of a device, in floating-point operations a second; None: that of a known GPU's datasheet, else what
            some products at the start reach.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self._spent = dict.fromkeys(("data", "model", "optimizer", "validation"), 0.0)  # seconds since the start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the loggers their tokens; a validation may come before the first step."""
        assert isinstance(pl_module, GPTModule)
        for logger in trainer.loggers:
            if isinstance(logger, StepLogger | CsvLogger):
                logger.tokens = lambda: pl_module.tokens

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the peak, start the clock."""
        assert isinstance(pl_module, GPTModule)
        self._operations = operations(pl_module.config, count_parameters(pl_module.config))
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        if self.peak is None and device.type == "cuda":
            self.peak = datasheet_peak(torch.cuda.get_device_name(device), precision)
        if self.peak is None:
            self.peak = matmul_peak(device, precision)
        self._batch_ended = time.perf_counter()
        self._mark(trainer, pl_module)

    def _seconds(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return what has been spent so far, by part."""
        saves = [c.seconds for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint)]
        return {**self._spent, "checkpoint": sum(saves)}

    def _mark(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        self._began, self._tokens, self._before = time.perf_counter(), pl_module.tokens, self._seconds(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """The batch is here. (Lightning calls checkpoint callbacks last: a save that is due comes after this.)"""
        self._batch_began, self._saves = time.perf_counter(), self._seconds(trainer)["checkpoint"]
        self._spent["data"] += self._batch_began - self._batch_ended

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, _: Any) -> None:
        """The gradient is there."""
        self._step_began = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._stopped = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._spent["validation"] += time.perf_counter() - self._stopped
            self._batch_ended = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log at a log point, and begin anew."""
        now = time.perf_counter()
        accumulates = trainer.fit_loop._should_accumulate()
        optimizer = 0.0 if accumulates else now - self._step_began
        self._spent["optimizer"] += optimizer
        saved = self._seconds(trainer)["checkpoint"] - self._saves
        self._spent["model"] += now - self._batch_began - optimizer - saved
        if trainer._logger_connector.should_update_logs and not accumulates:
            self._log(trainer, pl_module)
            self._mark(trainer, pl_module)
        self._batch_ended = time.perf_counter()

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        wall = time.perf_counter() - self._began
        spent = {part: seconds - self._before[part] for part, seconds in self._seconds(trainer).items()}
        rate = (pl_module.tokens - self._tokens) / (wall - spent["validation"] - spent["checkpoint"])
        assert self.peak is not None
        pl_module.log_dict(
            {
                "perf/tokens_per_second": rate,
                "perf/mfu": rate * self._operations / (self.peak * trainer.world_size),
                "perf/memory_gb": memory_peak(trainer.strategy.root_device) / 1e9,
                **{f"share/{part}": seconds / wall for part, seconds in spent.items()},
            }
        )


def matmul_peak(device: torch.device, precision: str) -> float:
    """Return the operations a second of a large square product: the best of ten, in the type of the activations."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0], torch.float32)
    side = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, device=device, generator=generator).to(dtype)  # a GPU is faster on zeros and ones
    best = math.inf
    wait = getattr(torch, device.type).synchronize
    for _ in range(10):
        wait()
        began = time.perf_counter()
        matrix @ matrix
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def memory_peak(device: torch.device) -> int:
    """Return the most bytes that tensors have held on a GPU, or that the process has on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
    """Describe model, data and run in a few lines; what looks wrong comes last."""
    assert isinstance(pl_module, GPTModule)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, TokenDataModule):
        return []
    work = work_of(trainer, pl_module, datamodule)
    plan = make_plan(work)
    lines = describe(work, plan)
    source = datamodule.source if isinstance(datamodule.source, str) else f"{len(datamodule.sources)} corpora"
    mix = [f"        {line}" for line in datamodule.describe_mix()]
    return [f"corpus  {source}", *mix, *lines, *(f"warning: {line}" for line in warnings(work, plan))]


def work_of(trainer: pl.Trainer, module: GPTModule, datamodule: TokenDataModule) -> Work:
    """Return what a run that is about to begin will do."""
    saver = next((c for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint)), None)
    keep = saver.keep_last if saver is not None else 0
    return Work(
        config=module.config,
        optimizer=module.optimizer_name,
        precision=str(trainer.precision),
        device=trainer.strategy.root_device.type,
        devices=trainer.world_size,
        nodes=trainer.num_nodes,
        shards=module.device_mesh is not None,
        recompute=module.activation_checkpointing,
        compile=module.compile_model,
        batch_size=datamodule.batch_size,
        micro_batch_size=datamodule.micro_batch_size_used,
        steps=trainer.max_steps,
        lr=module.schedule.peak,
        warmup_steps=module.schedule.warmup_steps,
        is_pretrained=module.init_from is not None,
        windows=len(datamodule.windows["train"]),
        val_windows=len(datamodule.windows["val"]),
        train_tokens=datamodule.data.tokens("train"),
        saves=None if keep == -1 else keep + (saver is not None and saver.keep_best),
        folder=saver.run if saver is not None else Path("."),
    )
