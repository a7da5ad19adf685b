"""Throughput of the DataLoader, compared with nanoGPT's sampling and with a training step."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.contenders import compare
from gptlit import GPT_CONFIG_124M, GPTConfig, GPTModel
from gptlit.data.token_files import open_foreign
from gptlit.data.windows import TrainSampler, WeightedMixture, Windows
from gptlit.model.loss import next_token_loss
from gptlit.training.environment import keep_freed_memory

LENGTH = 1024
BATCH = 8


def run(tokens: int = 100_000_000, rounds: int = 7, steps: int = 5, out: str = "loader.json") -> None:
    """Measure tokens per second of the DataLoader, and its fraction of a training step of GPT-2 small.

    Args:
        tokens: Tokens in the file.
        rounds: Interleaved measurements of each contender.
        steps: Timed training steps of 1 x 1024 tokens in bf16.
        out: JSON file for the results.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(0, 50257, tokens, dtype=np.uint16).tofile(Path(folder, "train.bin"))
        contenders = {
            name: ("benchmarks.loader", {"kind": name, "folder": folder}) for name in ("gptlit", "nanoGPT's sampling")
        }
        title = f"batches of {BATCH} x {LENGTH} from {tokens:,} tokens"
        compare(title, contenders, [("gptlit", "nanoGPT's sampling")], "tokens/s", Path(out), rounds)
        rate = statistics.median(contender("gptlit", folder)()["tokens/s"] for _ in range(rounds))
    step = step_seconds(steps)
    print(
        f"one step of 124M, 1 x {LENGTH} tokens, bf16: {step:.3f} s; its batch: {LENGTH / rate * 1e6:.1f} us, ", end=""
    )
    print(f"{LENGTH / rate / step:.6%} of it")


def contender(kind: str, folder: str) -> Callable[[], dict[str, float]]:
    """Return a function that times a number of batches."""
    next_batch = ours(folder) if kind == "gptlit" else nanogpts(folder)

    def once(batches: int = 500) -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(batches):
            next_batch()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens/s": batches * BATCH * LENGTH / seconds}

    return once


def ours(folder: str) -> Callable[[], object]:
    """Sampler, windows and DataLoader as in `fit`."""
    windows = Windows(open_foreign(Path(folder)).shards("train"), LENGTH, LENGTH, 50257)
    mixture = WeightedMixture([len(windows)], [1.0], 0)
    sampler = TrainSampler(mixture, batch_size=BATCH, micro_batch_size=BATCH, steps=10**9)
    loader = torch.utils.data.DataLoader(windows, sampler=sampler, batch_size=None)
    return iter(loader).__next__


def nanogpts(folder: str) -> Callable[[], object]:
    """Reimplements nanoGPT's get_batch: with replacement, a new memory map per batch, one tensor per window."""

    def next_batch() -> object:
        data = np.memmap(Path(folder, "train.bin"), dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - LENGTH, (BATCH,)).tolist()
        inputs = [torch.from_numpy(data[start : start + LENGTH].astype(np.int64)) for start in starts]
        targets = [torch.from_numpy(data[start + 1 : start + 1 + LENGTH].astype(np.int64)) for start in starts]
        return torch.stack(inputs), torch.stack(targets)

    return next_batch


def step_seconds(steps: int) -> float:
    """Return the median time of forward, loss, backward and AdamW of GPT-2 small in seconds."""
    keep_freed_memory()
    model = GPTModel(GPTConfig(**GPT_CONFIG_124M))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(50257, (1, LENGTH + 1))
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
