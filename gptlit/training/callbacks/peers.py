"""Early termination when another process of the run has gone."""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.distributed import DistError
from torch.distributed.distributed_c10d import _get_default_store

from gptlit.errors import InputError
from gptlit.training.callbacks.signals import children

PERIOD = 2.0  # seconds between two signs of life


PATIENCE = 30.0  # seconds without one, after which a process has gone


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
