"""Fair comparisons: a process for each contender, only one active at a time, interleaved rounds, paired ratios."""

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

Contender = tuple[str, dict[str, Any]]  # a module with a function `contender`, and that function's arguments
PACKAGES = ("torch", "lightning", "transformers")


class Process:
    """A contender in a process of its own: it prepares and warms up once, then measures when it is asked to."""

    def __init__(self, contender: Contender, python: str = sys.executable) -> None:
        module, arguments = contender
        command = [python, "-m", "benchmarks.contenders", module, json.dumps(arguments)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_until_ready(self) -> "Process":
        """Wait until it is warm."""
        self._read()
        return self

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError("the contender ended without a result; what it printed is above")

    def measure(self) -> dict[str, float]:
        """Let it run once."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Gate:
    """For a contender that runs a training loop: lets `steps` steps pass at a time, and measures them.

    Args:
        warm: Steps before the first measurement.
        steps: In one measurement.
    """

    def __init__(self, warm: int, steps: int) -> None:
        self.warm, self.steps = warm, steps
        self.count = 0

    def step(self) -> None:
        """Tell that a step is done."""
        self.count += 1
        if self.count < self.warm or (self.count - self.warm) % self.steps:
            return
        synchronize()
        found = {}
        if self.count > self.warm:
            found = {"seconds": (time.perf_counter() - self._began) / self.steps, "peak GB": memory_peak()}
        print(json.dumps(found), flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._began = time.perf_counter()


def synchronize() -> None:
    """Wait for the GPU, where this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory_peak() -> float:
    """Return the most memory, in GB, that this process has held: on the GPU where it uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / 1e9)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(module: str, arguments: dict[str, Any]) -> None:
    """Be a contender: warm up twice, then measure once for each line on standard input."""
    from importlib import import_module

    once = import_module(module).contender(**arguments)  # one that trains goes through its gate, and never returns
    for _ in range(2):
        once()
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


def compare(
    title: str,
    contenders: dict[str, Contender],
    pairs: Sequence[tuple[str, str]],
    figure: str,
    out: Path,
    rounds: int,
    pythons: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Measure all contenders in interleaved rounds; print and write each one's figures and the paired ratios.

    They are written as JSON, and beside it as a Markdown table (.md) and a picture (.png).

    Args:
        title: What is measured.
        contenders: By name.
        pairs: Which to divide by which.
        figure: The key that is divided.
        out: JSON file.
        rounds: How often each is measured; every other round goes backwards.
        pythons: The Python of those that need an environment of their own.
    """
    processes = {
        name: Process(contender, pythons.get(name, sys.executable)).wait_until_ready()
        for name, contender in track(contenders.items(), "preparing")
    }
    results = measure_in_turn(processes, rounds)
    ratios = {
        f"{ours} / {theirs}": [a[figure] / b[figure] for a, b in zip(results[ours], results[theirs], strict=True)]
        for ours, theirs in pairs
    }
    _print(title, results, ratios)
    values = {"title": title, "machine": machine(), "results": results, "ratios": ratios}
    out.write_text(json.dumps(values, indent=1) + "\n")
    out.with_suffix(".md").write_text(_markdown(title, results, ratios))
    _draw(title, ratios, out.with_suffix(".png"))


def measure_in_turn(processes: Mapping[str, Process], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Measure each process once a round, every other round in reverse order; end the processes."""
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


def _markdown(title: str, results: dict[str, list[dict[str, float]]], ratios: dict[str, list[float]]) -> str:
    keys = list(next(iter(results.values()))[0])
    lines = [f"{title} (medians; {', '.join(machine().values())})", "", f"| contender | {' | '.join(keys)} |"]
    lines.append("| --- |" + " --- |" * len(keys))
    for name, runs in results.items():
        cells = (f"{statistics.median(run[key] for run in runs):.4g}" for key in keys)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| pair | median ratio | lowest | highest |", "| --- | --- | --- | --- |"]
    lines += [f"| {n} | {statistics.median(v):.2f} | {min(v):.2f} | {max(v):.2f} |" for n, v in ratios.items()]
    return "\n".join(lines) + "\n"


def _draw(title: str, ratios: dict[str, list[float]], path: Path) -> None:
    """Draw the ratios: a bar from 1 to the median, and every round's as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.5 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(ratios.values()):
        axes.barh(row, statistics.median(values) - 1, left=1, height=0.5, color="#4477aa", alpha=0.6)
        axes.plot(values, [row] * len(values), ".", color="#223344")
        axes.annotate(f"{statistics.median(values):.2f}", (max(*values, 1), row), (6, -3), textcoords="offset points")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(len(ratios)), yticklabels=list(ratios), title=title)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def machine() -> dict[str, str]:
    """Describe what the figures were measured on."""
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
