"""Probes of a training run: kernels, synchronizations, saves."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Lines = Iterator[dict[str, Any]]


def probe_lines(probe: str, device: str) -> Lines:
    """Train with one of the probes below in a separate process; yield the lines it prints."""
    command = [sys.executable, "-m", "benchmarks.gpu_probes", probe, device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    process.wait()


class KernelProfiler:
    """Profiles ten steps, one of them with a log point; prints the time of the kernels."""

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> None:
        """Call after each step."""
        from torch.profiler import ProfilerActivity, profile

        from benchmarks.contenders import synchronize

        self.count += 1
        if self.count == 12:
            synchronize()
            self._profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
            self._profile.__enter__()
            self._began = time.perf_counter()
        elif self.count == 22:
            synchronize()
            wall = time.perf_counter() - self._began
            self._profile.__exit__(None, None, None)
            for line in kernel_times(self._profile.events(), wall, 10):
                print(json.dumps(line), flush=True)
            os._exit(0)


def kernel_times(events: Any, wall: float, steps: int) -> Lines:
    """Yield the milliseconds per step of all kernels, and of the slowest ones."""
    ours = [event for event in events if "CUDA" in str(event.device_type) and "#" not in event.name]
    totals: dict[str, list[float]] = {}
    for event in ours:
        totals.setdefault(event.name, []).append((event.time_range.end - event.time_range.start) / 1e3)
    yield {
        "kernel": "all",
        "ms a step": sum(map(sum, totals.values())) / steps,
        "times": len(ours) / steps,
        "wall ms a step": 1e3 * wall / steps,
    }
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:20]:
        yield {"kernel": name[:110], "ms a step": round(sum(times) / steps, 3), "times": len(times) / steps}


class SyncCounter:
    """Counts host-device synchronizations over five steps between two log points (steps 10 and 20)."""

    def __init__(self) -> None:
        self.count = 0
        self.places: dict[str, int] = {}

    def step(self) -> None:
        """Call after each step."""
        import traceback
        import warnings

        import torch

        self.count += 1
        if self.count == 12:
            self._mode(torch, "warn")
            warnings.simplefilter("always")

            def show(message: Any, *_: Any, **__: Any) -> None:
                frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename][-6:-1]
                place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
                self.places[f"{str(message)[:60]} {place}"] = self.places.get(f"{str(message)[:60]} {place}", 0) + 1

            warnings.showwarning = show
        elif self.count == 17:
            self._mode(torch, "default")
            print(json.dumps({"synchronizations in 5 steps": self.places}), flush=True)
            os._exit(0)

    @staticmethod
    def _mode(torch: Any, mode: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(mode)


class SaveTimer:
    """Saves with the run's own callback and prints for how long training is blocked."""

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> None:
        """Call after each step."""
        import gc

        import torch

        from gptlit.training.callbacks.checkpoint import StepCheckpoint

        self.count += 1
        if self.count < 10 or self.count % 10:
            return
        saver = next(item for item in gc.get_objects() if isinstance(item, StepCheckpoint))
        import lightning.pytorch as pl

        trainer = next(item for item in gc.get_objects() if isinstance(item, pl.Trainer))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        saver.save(trainer)
        print(json.dumps({"save": self.count // 10, "seconds waited": time.perf_counter() - began}), flush=True)
        began = time.perf_counter()
        saver.io.wait()
        print(json.dumps({"save": self.count // 10, "seconds to the disk": time.perf_counter() - began}), flush=True)
        if self.count == 30:
            os._exit(0)


PROBES = {"KernelProfiler": KernelProfiler, "SyncCounter": SyncCounter, "SaveTimer": SaveTimer}

if __name__ == "__main__":
    from benchmarks.peers import train_gptlit

    size, batch, length = ("124m", 16, 1024) if sys.argv[2] == "cuda" else ("toy", 2, 16)
    more = ["--model.residual_in_fp32=false"] if sys.argv[2] == "cuda" else ["--model.compile=false"]
    train_gptlit(size, batch, length, "tuned", PROBES[sys.argv[1]](), sys.argv[2], more)
