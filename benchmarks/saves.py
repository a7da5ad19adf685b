"""Cost of a checkpoint of GPT-2 small: asynchronous and synchronous writes."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.contenders import machine
from gptlit import GPTConfig, GPTModule
from gptlit.checkpoint.io import DurableCheckpointIO
from gptlit.training.callbacks.checkpoint import StepCheckpoint
from gptlit.training.environment import keep_freed_memory

EVERY = 10  # steps between two saves; the first half of them is attributed to the save


def run(saves: int = 3, rounds: int = 2, batch_size: int = 4, length: int = 256, out: str = "saves.json") -> None:
    """Measure the time that a save adds to the following steps, in interleaved processes.

    Args:
        saves: Saves per process.
        rounds: Processes of each kind.
        batch_size: Windows per step.
        length: Tokens per window.
        out: JSON file for the results.
    """
    results: dict[str, list[dict[str, Any]]] = {"asynchronous": [], "synchronous": []}
    for _ in track(range(rounds), "measuring"):
        for name, found in results.items():
            command = [sys.executable, "-m", "benchmarks.saves", name, str(saves), str(batch_size), str(length)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    table = Table("writing", "step, s", "training blocked, s", "cost of a save, s", "every 100 steps")
    for name, found in results.items():
        step = statistics.median(one["step"] for one in found)
        waits = statistics.median(value for one in found for value in one["waits"])
        cost = statistics.median(value for one in found for value in one["costs"])
        table.add_row(name, f"{step:.3f}", f"{waits:.2f}", f"{cost:.2f}", f"{cost / (100 * step):.2%}")
    Console().print(table)
    Path(out).write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


class Clock(pl.Callback):
    """Records the end time of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Record it."""
        self.ends.append(time.perf_counter())


def measure(asynchronous: bool, saves: int, batch_size: int, length: int) -> dict[str, Any]:
    """Train with a save every `EVERY` steps; return the median step time and the cost of each save in seconds."""
    keep_freed_memory()
    torch.manual_seed(0)
    config = GPTConfig(context_length=length, drop_rate=0.0, tie_weights=True, init="gpt2")
    steps = (saves + 1) * EVERY
    ids = torch.randint(config.vocab_size, (steps, batch_size, length + 1))
    loader = DataLoader([(batch[:, :-1], batch[:, 1:]) for batch in ids], batch_size=None)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        io = DurableCheckpointIO(asynchronous)
        clock, checkpoint = Clock(), StepCheckpoint(Path(folder), io, EVERY, keep_last=1)
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            precision="bf16-mixed",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[checkpoint, clock],
            plugins=[io],
        )
        waits: list[float] = []
        save = checkpoint.save

        def timed(trainer: pl.Trainer) -> None:
            before = checkpoint.seconds
            save(trainer)
            if checkpoint.seconds > before:
                waits.append(checkpoint.seconds - before)

        checkpoint.save = timed  # type: ignore[method-assign]
        trainer.fit(GPTModule(config), loader)
    times = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]  # times[i]: step i + 1
    half = EVERY // 2
    quiet = [seconds for index, seconds in enumerate(times, 1) if index % EVERY >= half]
    step = statistics.median(quiet)
    costs = [sum(times[first - 1 : first - 1 + half]) - half * step for first in range(EVERY, steps, EVERY)]
    return {"step": step, "waits": waits[:saves], "costs": costs}


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    print(json.dumps(measure(kind == "asynchronous", *map(int, numbers))))
