"""Early termination by a signal: save between two steps, then exit."""

import os
import signal
import subprocess
import time
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch.distributed.distributed_c10d import _get_default_store
from typing_extensions import override

from gptlit.checkpoint.runs import checkpoint_path
from gptlit.errors import note, shell_quote
from gptlit.training.callbacks.checkpoint import StepCheckpoint
from gptlit.training.lightning_compat import disable_signal_handlers, is_validation_of_fit
from gptlit.training.module import GPTModule


class GracefulStop(Callback):
    """SIGTERM, SIGINT, SIGHUP and SLURM's SIGUSR1 save and end a fit between two steps; a second one exits immediately.

    The signal handler only sets a flag. With several devices the signalled process chooses the step to stop before, and
    the others read it from the process group's store (see `_agree_on_step`). The exit status is 128 + the signal. A
    SIGHUP that is ignored when the fit begins (`nohup`) stays ignored.

    Args:
        checkpoint: Saves the checkpoint; None saves nothing.
    """

    SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    ECHO = 2.0  # seconds in which a signal may come twice: to the process group, and passed on by torchrun or `timeout`
    fits = 0  # in this process: each has its own key in the store

    def __init__(self, checkpoint: StepCheckpoint | None) -> None:
        self.checkpoint = checkpoint
        self.signal: signal.Signals | None = None
        self._signalled = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        disable_signal_handlers(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        GracefulStop.fits += 1
        self._key = f"gptlit/stop/{GracefulStop.fits}"
        for name in self.SIGNALS:
            number = getattr(signal, name, None)  # Windows has neither SIGUSR1 nor SIGHUP
            if number and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signalled = signal.Signals(number), now
            again = f"a second one, after {self.ECHO:.0f} s, ends at once"
            note(f"{self.signal.name}: saving and ending after this step ({again})")
        elif now - self._signalled > self.ECHO:
            os._exit(128 + number)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")  # Lightning does not call it then

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        assert isinstance(pl_module, GPTModule)
        if not pl_module.is_between_steps:
            return
        if trainer.world_size > 1:
            stop, number = self._agree_on_step(trainer)
            if trainer.global_step == stop:
                self._stop(trainer, number)
        elif self.signal is not None:
            self._stop(trainer, self.signal)

    def _agree_on_step(self, trainer: pl.Trainer) -> tuple[int, signal.Signals]:
        """Return the step before which all ranks stop, and the signal; step -1 without one.

        Hosts are not synchronized: they may run ahead of their devices. Each publishes its step first and looks for a
        signal afterwards. One that sees none has therefore published before the signal, so the signalled process, which
        reads all steps after it, chooses a later step than any host has passed.
        """
        store: Any = _get_default_store()
        store.set(f"{self._key}/step/{trainer.global_rank}", str(trainer.global_step))
        if self.signal is not None:
            own = f"{trainer.global_rank} {int(self.signal)}"
            store.compare_set(f"{self._key}/signal", "", own)
            if store.get(f"{self._key}/signal") == own.encode() and not store.check([self._key]):
                steps = [int(store.get(f"{self._key}/step/{rank}")) for rank in range(trainer.world_size)]
                store.set(self._key, str(max(steps) + 1))
        if not store.check([f"{self._key}/signal"]):
            return -1, signal.SIGTERM
        number = int(store.get(f"{self._key}/signal").split()[1])
        return int(store.get(self._key)), signal.Signals(number)  # blocks until it is chosen

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_validation_of_fit(trainer):  # before it: the resumed run validates
            number = torch.tensor(int(self.signal or 0), device=pl_module.device)
            number = trainer.strategy.reduce(number, reduce_op="max") if trainer.world_size > 1 else number
            if int(number):
                self._stop(trainer, signal.Signals(int(number)))

    @override
    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_validation_of_fit(trainer) and trainer.world_size == 1 and self.signal is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)  # the model holds the average until then
            self._stop(trainer, self.signal)

    def _stop(self, trainer: pl.Trainer, number: signal.Signals) -> NoReturn:
        """Save and exit with the status that a shell reports for this signal."""
        if self.checkpoint is not None:
            self.checkpoint.save(trainer)
            self.checkpoint.io.wait()
        next_ = "nothing is saved"
        if self.checkpoint is not None and checkpoint_path(self.checkpoint.run, trainer.global_step).is_file():
            next_ = f"continue with --ckpt_path {shell_quote(str(self.checkpoint.run))}"
        note(f"stopped by {number.name} after step {trainer.global_step}; {next_}")
        if number.name == "SIGUSR1" and trainer.is_global_zero and (job := os.environ.get("SLURM_JOB_ID")):
            try:
                subprocess.run(["scontrol", "requeue", job], check=False)
            except OSError as error:
                note(f"the job is not requeued, as scontrol cannot be run here ({error})")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise SystemExit(0 if is_child else 128 + number)  # Lightning kills the parent of a child that fails
