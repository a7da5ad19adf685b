"""Benchmark of a GPU: peak throughput, correctness, and the speed of training, checkpoints and generation.

Each phase is a separate process with a time limit. Each result is a line of JSON, synced to disk as soon as it is
measured, so that nothing is lost with the machine. `--device cpu` is a dry run of all phases at tiny sizes.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.contenders import Contender, Process, machine, measure_interleaved
from benchmarks.gpu_checks import correctness, reliability
from benchmarks.gpu_probes import probe_lines
from benchmarks.peers import check_peers, make, step_flops

ROOT = Path(__file__).parent.parent
Lines = Iterator[dict[str, Any]]
LIMITS = {  # time limits of the phases, in seconds
    "ceilings": 60,
    "step": 240,
    "kernels": 90,
    "syncs": 90,
    "batches": 220,
    "larger": 300,
    "generation": 90,
    "reliability": 200,
}


def run(
    out: str,
    nanogpt: str | None = None,
    budget: float = 1200,
    device: Literal["cuda", "cpu"] = "cuda",
    phases: tuple[str, ...] = tuple(LIMITS),
) -> None:
    """Run the phases in order within a time budget; append each result to OUT/gpu.jsonl and print it.

    Args:
        out: Folder for the results.
        nanogpt: Folder of a clone of nanoGPT, to be measured too.
        budget: Time budget in seconds; phases are not started after it, and are killed at its end.
        device: "cpu" is a dry run at tiny sizes.
        phases: Phases to run.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU is visible to torch: use --device cpu for a dry run, or install a CUDA build")
    unknown = [phase for phase in phases if phase not in LIMITS]
    if unknown:
        raise SystemExit(f"error: no phase is named {unknown[0]!r}: choose from {', '.join(LIMITS)}")
    if budget < 10:
        raise SystemExit(f"error: --budget {budget:g} is too short for the first phase: give at least 10 seconds")
    peers = ["nanogpt"] if nanogpt is not None else []
    check_peers([*peers, "transformers"] if {"step", "generation"} & set(phases) else peers, nanogpt)
    Path(out).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with Path(out, "gpu.jsonl").open("a") as file:
        record(file, {"phase": "machine", **machine(), **card(device)})
        for phase in phases:
            left = budget - (time.monotonic() - began)
            if left < 10:
                record(file, {"phase": phase, "skipped": "out of budget"})
                continue
            run_phase(phase, {"device": device, "nanogpt": nanogpt}, min(left, LIMITS[phase]), file)


def record(file: Any, line: dict[str, Any]) -> None:
    """Write a line to disk and to stdout."""
    text = json.dumps(line)
    file.write(text + "\n")
    file.flush()
    os.fsync(file.fileno())
    print(text, flush=True)


def card(device: str) -> dict[str, str]:
    """Describe the GPU with nvidia-smi."""
    if device != "cuda":
        return {"device": "cpu"}
    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": found.splitlines()[0] if found else "cuda"}


def run_phase(phase: str, options: dict[str, Any], limit: float, file: Any) -> None:
    """Run a phase in its own process group, record its lines, and kill it at its time limit."""
    command = [sys.executable, "-m", "benchmarks.gpu", phase, json.dumps(options)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("{"):
            record(file, {"phase": phase, **json.loads(text)})
    status = process.wait()
    timer.cancel()
    record(file, {"phase": phase, "status": status, "seconds": round(time.monotonic() - began, 1)})


# --- helpers of the phases ----------------------------------------------------------------------------------------


def timed(function: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Return the median time of a call on the device in seconds, after three warm-up calls."""
    import torch

    wait = getattr(torch, device).synchronize
    times = []
    for _ in range(3):
        function()
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def gptlit(device: str, batch: int = 16, flags: Sequence[str] = (), size: str = "124m") -> Contender:
    """Return `train.py fit` as a contender, set up as in configs/gpt2-124m.yaml; on a CPU tiny and not compiled."""
    if device == "cpu":
        flags = ["--model.compile=false", *flags, "--data.micro_batch_size=2"]
        return make("gptlit", "toy", 2, 16, device=device, warm=1, steps=2, flags=flags)
    flags = [f"--data.micro_batch_size={batch}", "--model.residual_in_fp32=false", *flags]
    return make("gptlit", size, batch, 1024, device=device, warm=8, steps=8, flags=flags)


def peer(
    name: str, device: str, batch: int = 16, folder: str = "", size: str = "124m", accumulate: int = 1
) -> Contender:
    """Return another project's model as a contender; on a CPU tiny and not compiled."""
    options = {"device": device, "folder": folder, "accumulate": accumulate}
    if device == "cpu":
        return make(f"{name}, shipped", "toy", 2, 16, warm=1, steps=2, **options)
    return make(name, size, batch, 1024, warm=8, steps=8, **options)


def summaries(results: dict[str, list[dict[str, float]]], contenders: dict[str, Contender], device: str) -> Lines:
    """Yield tokens per second, MFU, memory and the ratio to gptlit's time; all have the same batch."""
    ours = next((runs for name, runs in results.items() if name.startswith("gptlit")), None)
    peak = datasheet(device)
    for name, runs in results.items():
        size, batch, length = (contenders[name][1][key] for key in ("size", "batch_size", "length"))
        rates = sorted(batch * length / found["seconds"] for found in runs)
        flops = step_flops(size, 1, length) / length
        ratios = [found["seconds"] / base["seconds"] for found, base in zip(runs, ours or [], strict=bool(ours))]
        yield {
            "contender": name,
            "tokens/s": round(statistics.median(rates)),
            "lowest": round(rates[0]),
            "highest": round(rates[-1]),
            "MFU": round(statistics.median(rates) * flops / peak, 4) if peak else None,
            "GB": round(runs[-1]["peak GB"], 2),
            "time / gptlit's": round(statistics.median(ratios), 3) if ratios else None,
        }


def datasheet(device: str) -> float | None:
    """Return the peak bf16 FLOP/s of the card's datasheet."""
    import torch

    from gptlit.training.estimate import datasheet_peak

    return datasheet_peak(torch.cuda.get_device_name(), "bf16-mixed") if device == "cuda" else None


def compare(contenders: dict[str, Contender], device: str, rounds: int = 3) -> Lines:
    """Start all contenders at once, then measure them in interleaved rounds."""
    began = time.monotonic()
    processes = {name: Process(contender) for name, contender in contenders.items()}
    ready = {}
    for name, process in processes.items():
        try:
            ready[name] = process.wait_until_ready()
            yield {"contender": name, "ready after": round(time.monotonic() - began, 1)}
        except RuntimeError as error:
            yield {"contender": name, "error": str(error)}
    try:
        yield from summaries(measure_interleaved(ready, rounds), contenders, device)
    except RuntimeError as error:
        yield {"contenders": list(ready), "error": str(error)}


# --- the phases ---------------------------------------------------------------------------------------------------


def ceilings(device: str, nanogpt: str | None) -> Lines:
    """A matrix product, those of the head at two vocabulary sizes, and attention kernels."""
    import torch

    is_gpu = device == "cuda"
    torch.manual_seed(0)
    side = 8192 if is_gpu else 256
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield {
        "what": "bf16 product",
        "side": side,
        "TFLOP/s": 2e-12 * side**3 / timed(partial(torch.mm, left, right), device),
    }
    rows, width = (8192, 768) if is_gpu else (64, 16)
    for columns in (50257, 50304):
        states = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        head = torch.randn(columns, width, device=device, dtype=torch.bfloat16)
        logits = states @ head.t()
        products: dict[str, Callable[[], Any]] = {
            "logits": lambda a=states, b=head: a @ b.t(),
            "states' gradient": lambda a=logits, b=head: a @ b,
            "head's gradient": lambda a=logits, b=states: a.t() @ b,
        }
        for name, product in products.items():
            yield {"what": name, "columns": columns, "rows": rows, "ms": 1e3 * timed(product, device)}
    yield from attention_kernels(device)


def attention_kernels(device: str) -> Lines:
    """Forward and backward of each causal attention kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (16, 12, 1024, 64) if device == "cuda" else (1, 2, 16, 8)
    parts = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def both() -> None:
            output = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
            torch.autograd.grad(output, parts, gradient)

        try:
            with sdpa_kernel(backend):
                yield {"what": "attention", "kernel": backend.name, "ms": 1e3 * timed(both, device)}
        except RuntimeError as error:
            yield {"what": "attention", "kernel": backend.name, "error": str(error).splitlines()[0]}


def step(device: str, nanogpt: str | None) -> Lines:
    """gptlit under its Trainer, nanoGPT and Transformers; the correctness checks run while they compile."""
    contenders = {"gptlit": gptlit(device), "Transformers": peer("transformers", device)}
    if nanogpt is not None:
        contenders["nanoGPT"] = peer("nanogpt", device, 16, nanogpt)
    checks = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "correctness", json.dumps({"device": device, "nanogpt": nanogpt})]
    )
    for line in compare(contenders, device):
        if line.get("contender") == list(contenders)[-1]:  # ready, or failed
            checks.wait()
        yield line
    checks.wait()


def batches(device: str, nanogpt: str | None) -> Lines:
    """Larger micro-batches; accumulation as in configs/gpt2-124m.yaml; a float32 residual stream."""
    for batch, accumulate in ((64, 1), (64, 8), (32, 1)):
        whole = [f"--data.batch_size={accumulate * (batch if device == 'cuda' else 2)}"]
        contenders = {"gptlit": gptlit(device, batch, whole)}
        if batch == 32:
            contenders["gptlit, float32 residual"] = gptlit(device, batch, ["--model.residual_in_fp32=true"])
        if nanogpt is not None:
            contenders["nanoGPT"] = peer("nanogpt", device, batch, nanogpt, accumulate=accumulate)
        shape = f"{batch} x 1024" + (f", accumulated {accumulate} times" if accumulate > 1 else "")
        yield from compare({f"{name}, {shape}": contender for name, contender in contenders.items()}, device)


def larger(device: str, nanogpt: str | None) -> Lines:
    """The 355M model; 64 windows one project after the other, as 80 GB do not hold both."""
    for together, batch in ((True, 32), (False, 64)):
        contenders = {f"gptlit 355M, {batch} x 1024": gptlit(device, batch, size="355m")}
        if nanogpt is not None:
            contenders[f"nanoGPT 355M, {batch} x 1024"] = peer("nanogpt", device, batch, nanogpt, "355m")
        groups = [contenders] if together else [{name: contender} for name, contender in contenders.items()]
        for group in groups:
            yield from compare(group, device)


def kernels(device: str, nanogpt: str | None) -> Lines:
    """The slowest kernels of a step."""
    yield from probe_lines("KernelProfiler", device)


def syncs(device: str, nanogpt: str | None) -> Lines:
    """Host-device synchronizations between two log points, and the time for which a save blocks training."""
    yield from probe_lines("SyncCounter", device)
    yield from probe_lines("SaveTimer", device)


def generation(device: str, nanogpt: str | None) -> Lines:
    """Tokens per second of the 124M model with batch sizes 1 and 8, gptlit and Transformers."""
    size = {} if device == "cuda" else {"toy": True}
    processes = {
        f"{name}, {rows} rows": Process(
            ("benchmarks.generate", {"name": name, "size": rows, "new_tokens": 128, "device": device, **size})
        )
        for rows in (1, 8)
        for name in ("gptlit bf16", "transformers bf16")
    }
    ready = {}
    for name, process in processes.items():
        try:
            ready[name] = process.wait_until_ready()
        except RuntimeError as error:
            yield {"contender": name, "error": str(error)}
    for name, runs in measure_interleaved(ready, 3).items():
        yield {"contender": name, **{key: statistics.median(found[key] for found in runs) for key in runs[0]}}


PHASES = {
    "ceilings": ceilings,
    "step": step,
    "kernels": kernels,
    "syncs": syncs,
    "batches": batches,
    "larger": larger,
    "generation": generation,
    "reliability": reliability,
    "correctness": correctness,
}

if __name__ == "__main__":
    for found in PHASES[sys.argv[1]](**json.loads(sys.argv[2])):
        print(json.dumps(found), flush=True)
