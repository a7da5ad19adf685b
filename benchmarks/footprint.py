"""Peak memory of a training step of GPT-2 small, and the largest batch that fits."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import Process, machine
from benchmarks.peers import check_peers, make

PARAMETERS, HEAD = 124_439_808, 50257 * 768  # the heads of the book and of litgpt are untied


def run(
    peers: tuple[str, ...] = ("gptlit, recompute", "nanogpt, tuned", "transformers, tuned", "book, shipped"),
    batch_size: int = 8,
    length: int = 1024,
    limit: float = 8.0,
    nanogpt: str | None = None,
    out: str = "footprint.json",
) -> None:
    """Print each contender's peak memory at a batch size, and the largest batch size within a limit.

    Args:
        peers: Some of nanogpt, transformers, trainer, book, with ", tuned" or ", shipped"; "gptlit, recompute" uses
            activation checkpointing.
        batch_size: Windows per step.
        length: Tokens per window.
        limit: Peak memory of the process in GB.
        nanogpt: Folder of a clone of nanoGPT.
        out: JSON file for the results.
    """
    check_peers(peers, nanogpt)
    table = Table(
        "contender", f"peak GB at {batch_size} x {length}", "above 16 bytes per parameter", f"fits {limit:g} GB"
    )
    found: dict[str, dict[str, float]] = {}
    for name in ("gptlit", *peers):
        options: dict[str, Any] = {"folder": nanogpt} if name.startswith("nanogpt") else {}
        peaks = Peaks(name, length, options)
        largest = peaks.largest(limit)
        above = peaks[batch_size] - 16 * (PARAMETERS + HEAD * name.startswith(("book", "litgpt"))) / 1e9
        found[name] = {"peak GB": peaks[batch_size], "above GB": above, "largest batch": largest}
        table.add_row(name, f"{peaks[batch_size]:.2f}", f"{above:.2f}", f"{largest} x {length}")
    Console().print(table)
    Path(out).write_text(json.dumps({"machine": machine(), "results": found}, indent=1) + "\n")


class Peaks:
    """Peak memory in GB of two steps of a contender, by batch size; each is measured once."""

    def __init__(self, name: str, length: int, options: dict[str, Any]) -> None:
        self.name, self.length, self.options = name, length, options
        self._known: dict[int, float] = {}

    def __getitem__(self, batch_size: int) -> float:
        if batch_size not in self._known:
            contender = make(self.name, "124m", batch_size, self.length, warm=1, steps=1, **self.options)
            process = Process(contender).wait_until_ready()
            self._known[batch_size] = process.measure()["peak GB"]
            process.close()
            print(f"{self.name}: {batch_size} x {self.length} tokens, {self._known[batch_size]:.2f} GB", flush=True)
        return self._known[batch_size]

    def largest(self, limit: float) -> int:
        """Return the largest batch size within a limit: double until it is exceeded, then interpolate linearly."""
        fits, over = 0, 1
        while self[over] <= limit:
            fits, over = over, 2 * over
        while over - fits > 1:
            fraction = (limit - self[fits]) / (self[over] - self[fits])
            size = min(max(fits + int(fraction * (over - fits)), fits + 1), over - 1)
            fits, over = (size, over) if self[size] <= limit else (fits, size)
        return fits
