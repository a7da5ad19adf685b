"""How a fit ends before its end: signals, steps that are not finite, and other processes of the run that have gone."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer, WeightAveraging
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed import DistError
from torch.distributed.distributed_c10d import _get_default_store

from gptlit.callbacks import StepCheckpoint
from gptlit.errors import InputError, note
from gptlit.module import GPTModule


class GracefulStop(Callback):
    """SIGTERM, SIGINT, SIGHUP and SLURM's SIGUSR1 save and end a fit between two steps; a second one ends at once.

    A signal handler only sets a flag. With several devices the process that was signalled chooses the step to stop
    before, and the others read it from the process group's store (see `_agreed`). The exit status is 128 + the signal.
    A hang-up that is ignored when the fit begins (`nohup`) stays so.

    Args:
        checkpoint: Saves; None where nothing is to be saved.
    """

    SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    ECHO = 2.0  # seconds in which a signal may come twice: to the process group, and passed on by torchrun or `timeout`
    fits = 0  # of this process: a name for each in the store

    def __init__(self, checkpoint: StepCheckpoint | None) -> None:
        self.checkpoint = checkpoint
        self.signal: signal.Signals | None = None
        self._signalled = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's own handling of SIGTERM is left out: it synchronises all devices in every batch, and can hang."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers."""
        GracefulStop.fits += 1
        self._key = f"gptlit/stop/{GracefulStop.fits}"
        if threading.current_thread() is not threading.main_thread():
            return
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

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning tears nothing down then."""
        self.teardown(trainer, pl_module, "")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Stop between two steps."""
        assert isinstance(pl_module, GPTModule)
        if not pl_module.is_between_steps:
            return
        if trainer.world_size > 1:
            stop, number = self._agreed(trainer)
            if trainer.global_step == stop:
                self._stop(trainer, number)
        elif self.signal is not None:
            self._stop(trainer, self.signal)

    def _agreed(self, trainer: pl.Trainer) -> tuple[int, signal.Signals]:
        """Return before which step all devices stop, and by which signal; -1 where there was none.

        Hosts are not in step: they may run ahead of their devices. Each one publishes its step and looks for a signal
        after that. One that has seen none has therefore published before the signal was, so that the process that was
        signalled, which reads all steps after that, chooses a later step than any host has passed.
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
        return int(store.get(self._key)), signal.Signals(number)  # waits for the choice

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before a validation rather than after it: the resumed run makes it. All devices are here at once."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            number = torch.tensor(int(self.signal or 0), device=pl_module.device)
            number = trainer.strategy.reduce(number, reduce_op="max") if trainer.world_size > 1 else number
            if int(number):
                self._stop(trainer, signal.Signals(int(number)))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Alone, stop in the midst of one."""
        if trainer.state.fn == "fit" and trainer.world_size == 1 and self.signal is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)  # the model holds the average until then
            self._stop(trainer, self.signal)

    def _stop(self, trainer: pl.Trainer, number: signal.Signals) -> NoReturn:
        """Save and leave, with the status that a shell gives to this signal."""
        if self.checkpoint is not None:
            self.checkpoint.save(trainer)
            self.checkpoint.io.wait()
        for process in children(trainer):
            process.wait(timeout=60)
        next_ = "nothing is saved"
        if self.checkpoint is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            next_ = f"--ckpt_path {shlex.quote(str(self.checkpoint.run))} goes on there"
        note(f"stopped by {number.name} after step {trainer.global_step}; {next_}")
        if number.name == "SIGUSR1" and trainer.is_global_zero and (job := os.environ.get("SLURM_JOB_ID")):
            subprocess.run(["scontrol", "requeue", job], check=False)
        raise SystemExit(128 + number)


def early_end(trainer: pl.Trainer) -> str | None:
    """Return why a fit has ended before its last step; None where it has not."""
    if trainer.global_step >= trainer.max_steps:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            return "the time of trainer.max_time is over"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping: {callback.stopping_reason_message}"
    return "a callback set trainer.should_stop"


class NonFinite(Callback):
    """Ends a fit after too many steps in a row whose gradient was not finite.

    The windows of these steps are written to `non-finite.json` in the run's folder, by shard and offset.

    Args:
        run: The run's folder.
        limit: Steps in a row.
    """

    def __init__(self, run: Path, limit: int) -> None:
        self.run = run
        self.limit = limit

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look at the count: after each step on a CPU, at log points where looking means waiting for the device.

        Raises:
            InputError: There were too many.
        """
        assert isinstance(pl_module, GPTModule)
        waits = pl_module.device.type != "cpu"
        if not pl_module.is_between_steps or (waits and not trainer._logger_connector.should_update_logs):
            return
        if not (count := pl_module.skipped_in_a_row):
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


PERIOD = 2.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one, after which a process has gone


def children(trainer: pl.Trainer) -> "list[subprocess.Popen[bytes]]":
    """Return the processes that Lightning has started for the other devices; none under torchrun or SLURM."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


class PeerWatch(Callback):
    """Ends this process, with a line that says why, when another one of the run has gone: it would wait for it forever.

    Each process gives signs of life in the process group's store, and a thread of it looks for those of the next one:
    a ring, so that each costs the store two requests a second, however many there are. Who finds one missing writes it
    down for all to read. Processes that were started by this one are asked directly.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin, once."""
        if trainer.world_size == 1 or self._thread is not None:
            return
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":  # Lightning's own kills this process without a word
                thread._child_processes = []  # type: ignore[attr-defined]
        self._rank, self._world_size, self._local_rank = trainer.global_rank, trainer.world_size, trainer.local_rank
        self._children = dict(enumerate(children(trainer), start=trainer.global_rank + 1))
        self._store: Any = _get_default_store().clone()  # type: ignore[attr-defined]  # a connection of its own
        self._store.set_timeout(timedelta(seconds=PATIENCE))
        self._host = socket.gethostname()
        self._store.set(f"gptlit/host/{self._rank}", self._host)
        self._first_host = self._store.get("gptlit/host/0").decode()
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        following = (self._rank + 1) % self._world_size
        seen, since, beat = b"", time.monotonic(), 0
        while not self._ended.wait(PERIOD):
            beat += 1
            try:
                for rank, process in self._children.items():
                    if process.poll() and self._read(f"gptlit/beat/{rank}") != b"ended":
                        self._end(rank, self._host, f"has ended with status {process.returncode}")
                if self._store.check(["gptlit/gone"]):
                    time.sleep(2 * PERIOD)  # it may still be saying why
                    self._end(*json.loads(self._store.get("gptlit/gone")))
                self._store.set(f"gptlit/beat/{self._rank}", str(beat))
                sign = self._read(f"gptlit/beat/{following}")
                if sign != seen or sign == b"ended":
                    seen, since = sign, time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    host = self._read(f"gptlit/host/{following}").decode()
                    self._end(following, host, f"has given no sign of life for {PATIENCE:.0f} s")
            except DistError:  # the store is in the first process
                self._end(0, self._first_host, "cannot be reached any more")

    def _read(self, key: str) -> bytes:
        return self._store.get(key) if self._store.check([key]) else b""

    def _end(self, rank: int, host: str, what: str) -> NoReturn:
        """Say it, unless there is nothing to add; pass it on; end. What a lost connection would print is not news."""
        if what and (self._local_rank == 0 or host == self._host):
            message = f"error: device {rank} of {self._world_size} (on {host}) {what}: this run ends here"
            print(f"{message}; start it again with --ckpt_path last", file=sys.stderr, flush=True)
        with suppress(DistError):
            self._store.set("gptlit/gone", json.dumps([rank, host, what]))
        for process in self._children.values():
            process.kill()
        if self._rank == 0 and not self._children:
            time.sleep(2 * PERIOD)  # the store ends with this process: the others read it first
        os._exit(1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nobody needs to wait for this process any more."""
        self._leave(f"gptlit/beat/{trainer.global_rank}", "ended")

    def _leave(self, key: str, value: str) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread, self._ended = None, threading.Event()
            with suppress(DistError):
                self._store.set(key, value)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A lost connection is explained by the thread, which needs a moment; an error of this process ends all."""
        is_input = isinstance(exception, InputError | OSError)
        if isinstance(exception, SystemExit | KeyboardInterrupt):
            self.teardown(trainer, pl_module, "")
        elif self._thread is not None and self._is_connection(exception):
            self._thread.join(PATIENCE + 5 * PERIOD)
        else:
            what = "" if is_input else f"has failed with {type(exception).__name__}"
            self._leave("gptlit/gone", json.dumps([trainer.global_rank, socket.gethostname(), what]))
            for process in children(trainer) if is_input else ():  # they have met the same, or wait for this one
                process.kill()

    @staticmethod
    def _is_connection(exception: BaseException) -> bool:
        text = str(exception)
        return isinstance(exception, DistError) or "gloo" in text or "onnection closed by peer" in text
