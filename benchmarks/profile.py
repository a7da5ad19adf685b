"""Profile of a training step, by part."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import Process, machine
from benchmarks.peers import seconds_at_peak, step_flops, train_gptlit

PARTS = {  # an operation belongs to the first part whose pattern matches its name
    "matrix products of layers and head": r"aten::(mm|addmm)$",
    "matrix products inside attention": r"aten::bmm",
    "copies for the products inside attention": r"aten::(copy_|clone)",
    "AdamW": r"adamw|AdamW",
    "gradient norm": r"linalg_vector_norm",
    "softmax of the loss": r"cpp_fused.*copy__.*logsumexp",
    "GELU, fused with the following norm": r"cpp_fused.*(sigmoid|gelu)",
    "attention in torch's kernel": r"flash_attention",
    "attention: masks, softmax, sums": r"cpp_fused.*(masked_fill|exp_|_mul_slice_sub)",
    "norms, residual connections, casts of weights": r"cpp_fused",
    "gradients: accumulation, scaling, zeroing": r"aten::(add_|mul_|fill_|zero_)",
    "everything else": r"",
}


def run(size: str = "124m", batch_size: int = 1, length: int = 1024, out: str = "profile.json") -> None:
    """Print the time of each part of a step under `train.py`, and that of all matrix products at peak throughput.

    Args:
        size: "124m", or "small" (6 layers, width 384).
        batch_size: Windows per step.
        length: Tokens per window.
        out: JSON file for the results.
    """
    process = Process((__name__, {"size": size, "batch_size": batch_size, "length": length})).wait_until_ready()
    parts = process.measure()
    process.close()
    total = parts.pop("total")
    peak = seconds_at_peak(step_flops(size, batch_size, length))["seconds"]
    table = Table("part", "ms", "fraction", title=f"a step of {batch_size} x {length} tokens: {1e3 * total:.0f} ms")
    for name, seconds in parts.items():
        table.add_row(name, f"{1e3 * seconds:.0f}", f"{seconds / total:.1%}")
    table.add_row("all matrix products at peak throughput", f"{1e3 * peak:.0f}", f"{peak / total:.1%}")
    Console().print(table)
    values = {"machine": machine(), "seconds": total, "parts": parts, "at the peak": peak}
    Path(out).write_text(json.dumps(values, indent=1) + "\n")


class StepProfiler:
    """Profiles one step after a warm-up and prints the seconds of its parts."""

    def __init__(self, warm: int) -> None:
        self.left = warm

    def step(self) -> None:
        """Call after each step."""
        from torch.profiler import profile

        self.left -= 1
        if self.left == 0:
            print("{}", flush=True)
            self._profile = profile()
            self._profile.__enter__()
            self._began = time.perf_counter()
        elif self.left < 0:
            total = time.perf_counter() - self._began
            self._profile.__exit__(None, None, None)
            print(json.dumps({**by_part(self._profile.key_averages(), total), "total": total}), flush=True)
            os._exit(0)


def by_part(events: Any, total: float) -> dict[str, float]:
    """Sum the self time of operations by part; "everything else" is the remainder."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        part = next(name for name, pattern in PARTS.items() if re.search(pattern, event.key))
        seconds[part] += event.self_cpu_time_total / 1e6
    seconds["everything else"] = 0.0
    return {**seconds, "everything else": total - sum(seconds.values())}


def contender(size: str, batch_size: int, length: int) -> None:
    """Train under `train.py` with descriptive kernel names, and profile a step; never returns."""
    from torch._inductor import config

    from benchmarks.contenders import keep_freed_memory

    keep_freed_memory()
    config.cpp.enable_kernel_profile = True
    config.cpp.descriptive_names = "original_aten"
    train_gptlit(size, batch_size, length, "tuned", StepProfiler(warm=8))
