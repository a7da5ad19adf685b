"""Paired comparisons: one process per contender, one active at a time, interleaved rounds, ratios within a round."""

import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

Contender = tuple[str, dict[str, Any]]  # a module that defines `contender`, and the arguments of that function
PACKAGES = ("torch", "lightning", "transformers")


class Process:
    """A contender in a separate process: it is set up and warmed up once, then measures on request."""

    def __init__(self, contender: Contender, python: str = sys.executable) -> None:
        module, arguments = contender
        command = [python, "-m", "benchmarks.contenders", module, json.dumps(arguments)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_until_ready(self) -> "Process":
        """Wait for the end of the warm-up."""
        self._read()
        return self

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError("the contender exited without a result; see its output above")

    def measure(self) -> dict[str, float]:
        """Run one measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Stop the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class StepTimer:
    """Times the steps of a training loop, `steps` per measurement, and pauses it between two measurements.

    Args:
        warm: Steps before the first measurement.
        steps: Steps per measurement.
    """

    def __init__(self, warm: int, steps: int) -> None:
        self.warm, self.steps = warm, steps
        self.count = 0

    def step(self) -> None:
        """Call after each step."""
        self.count += 1
        if self.count < self.warm or (self.count - self.warm) % self.steps:
            return
        synchronize()
        found = {}
        if self.count > self.warm:
            found = {"seconds": (time.perf_counter() - self._began) / self.steps, "peak GB": peak_gigabytes()}
        print(json.dumps(found), flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._began = time.perf_counter()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, as `train.py` does; works in environments without gptlit."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)


def synchronize() -> None:
    """Synchronize with the GPU, if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_gigabytes() -> float:
    """Return the peak memory of this process in GB: of the GPU if it uses one, else of the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / 1e9)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(module: str, arguments: dict[str, Any]) -> None:
    """Run a contender: warm up twice, then measure once per line on stdin."""
    from importlib import import_module

    once = import_module(module).contender(**arguments)  # a training loop calls its timer and never returns
    for _ in range(2):
        once()
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


def compare(
    title: str,
    contenders: dict[str, Contender],
    pairs: Sequence[tuple[str, str]],
    metric: str,
    out: Path,
    rounds: int,
    pythons: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Measure all contenders in interleaved rounds; print and write their results and the paired ratios.

    Args:
        title: What is measured.
        contenders: Contenders by name.
        pairs: (numerator, denominator) of each ratio.
        metric: Key of the results whose ratio is taken.
        out: JSON file.
        rounds: Measurements of each contender; every other round runs in reverse order.
        pythons: Python executables of contenders that need a separate environment.
    """
    processes = {
        name: Process(contender, pythons.get(name, sys.executable)).wait_until_ready()
        for name, contender in track(contenders.items(), "preparing")
    }
    results = measure_interleaved(processes, rounds)
    ratios = {
        f"{ours} / {theirs}": [a[metric] / b[metric] for a, b in zip(results[ours], results[theirs], strict=True)]
        for ours, theirs in pairs
    }
    _print(title, results, ratios)
    values = {"title": title, "machine": machine(), "results": results, "ratios": ratios}
    out.write_text(json.dumps(values, indent=1) + "\n")


def measure_interleaved(processes: Mapping[str, Process], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Measure each process once per round, every other round in reverse order; then stop all processes."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    try:
        for number in track(range(rounds), "measuring"):
            for name in list(processes)[:: 1 if number % 2 == 0 else -1]:
                results[name].append(processes[name].measure())
    finally:
        for process in processes.values():
            process.close()
    return results


def _print(title: str, results: dict[str, list[dict[str, float]]], ratios: dict[str, list[float]]) -> None:
    console = Console()
    figures = Table("contender", *next(iter(results.values()))[0], title=f"{title} (medians)")
    for name, runs in results.items():
        figures.add_row(name, *(f"{statistics.median(run[key] for run in runs):.4g}" for key in runs[0]))
    console.print(figures)
    table = Table("pair", "median ratio", "lowest", "highest")
    for name, values in ratios.items():
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}")
    console.print(table)
    console.print("\n".join(f"{key}: {value}" for key, value in machine().items()))


def read_curve(run: Path, tag: str) -> dict[int, float]:
    """Read a curve from TensorBoard's files: step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def machine() -> dict[str, str]:
    """Describe the machine and the package versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"processor": f"{os.cpu_count()} x {model}", "python": platform.python_version(), **versions}


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
