"""The check of a GPU: what the card can do, whether gptlit is right on it, how fast it trains, saves and generates.

Each phase is a process of its own with a time limit; every figure is one line of JSON, on the disk as soon as it is
measured, so that a machine that goes away takes nothing with it. `--device cpu` rehearses all of it at tiny sizes.
"""

import inspect
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.contenders import Contender, Process, machine, measure_in_turn
from benchmarks.peers import make, operations

ROOT = Path(__file__).parent.parent
Lines = Iterator[dict[str, Any]]
LIMITS = {  # seconds a phase may take
    "ceilings": 60,
    "step": 240,
    "kernels": 90,
    "syncs": 90,
    "variants": 200,
    "batches": 200,
    "larger": 150,
    "reliability": 200,
    "generation": 90,
    "transformers": 150,
}


def run(
    out: str,
    nanogpt: str | None = None,
    budget: float = 600,
    device: Literal["cuda", "cpu"] = "cuda",
    phases: tuple[str, ...] = tuple(LIMITS),
) -> None:
    """Run the phases in order until the budget is spent; write DIR/gpu.jsonl line by line and print it.

    Args:
        out: Folder for the figures.
        nanogpt: Folder of a clone of nanoGPT, to be measured beside gptlit.
        budget: Seconds; a phase does not begin after them, and is ended with them.
        device: "cpu" rehearses at tiny sizes.
        phases: Which to run.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU is visible to torch: use --device cpu to rehearse, or install a CUDA build")
    if nanogpt is not None and not Path(nanogpt, "model.py").is_file():
        raise SystemExit(f"error: --nanogpt {nanogpt} has no model.py: name the folder of a clone of nanoGPT")
    unknown = [phase for phase in phases if phase not in LIMITS]
    if unknown:
        raise SystemExit(f"error: no phase is named {unknown[0]!r}: choose from {', '.join(LIMITS)}")
    if budget < 10:
        raise SystemExit(f"error: --budget {budget:g} is too short for the first phase: give at least 10 seconds")
    Path(out).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with Path(out, "gpu.jsonl").open("a") as file:
        record(file, {"phase": "machine", **machine(), **card(device)})
        for phase in phases:
            left = budget - (time.monotonic() - began)
            if left < 10:
                record(file, {"phase": phase, "skipped": "the budget is spent"})
                continue
            run_phase(phase, {"device": device, "nanogpt": nanogpt}, min(left, LIMITS[phase]), file)


def record(file: Any, line: dict[str, Any]) -> None:
    """Write a line to the disk and to the terminal."""
    text = json.dumps(line)
    file.write(text + "\n")
    file.flush()
    os.fsync(file.fileno())
    print(text, flush=True)


def card(device: str) -> dict[str, str]:
    """Describe the GPU; its clocks are read, never set."""
    if device != "cuda":
        return {"device": "cpu"}
    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": found.splitlines()[0] if found else "cuda"}


def run_phase(phase: str, options: dict[str, Any], limit: float, file: Any) -> None:
    """Run a phase in a process group of its own, record its lines, and end it at its limit."""
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
    """Return the median seconds of a call on the device, after three calls."""
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


def gptlit(device: str, batch: int = 16, size: str = "124m", flags: Sequence[str] = (), patch: str = "") -> Contender:
    """Return `train.py fit` as a contender; tiny and not compiled on a CPU."""
    patches = [f"benchmarks.gpu:{patch}"] if patch else []
    if device == "cpu":
        flags = ["--model.compile=false", *flags, "--data.micro_batch_size=2"]
        return make("gptlit", "toy", 2, 16, device=device, warm=1, steps=2, flags=flags, patches=patches)
    return make("gptlit", size, batch, 1024, device=device, warm=8, steps=10, flags=flags, patches=patches)


def peer(name: str, device: str, batch: int = 16, folder: str = "") -> Contender:
    """Return another project's model as a contender."""
    if device == "cpu":
        return make(f"{name}, shipped", "toy", 2, 16, device=device, warm=1, steps=2, folder=folder)
    return make(name, "124m", batch, 1024, device=device, warm=8, steps=10, folder=folder)


def figures(results: dict[str, list[dict[str, float]]], tokens: dict[str, int], size: str, device: str) -> Lines:
    """Yield each contender's tokens a second, share of the peak, memory, and the ratio of its time to the first's."""
    first = next(iter(results.values()))
    for name, runs in results.items():
        rates = sorted(tokens[name] / found["seconds"] for found in runs)
        flops = operations(size, 1, 1024) / 1024
        peak = datasheet(device)
        ratios = [found["seconds"] / base["seconds"] for found, base in zip(runs, first, strict=True)]
        yield {
            "contender": name,
            "tokens/s": round(statistics.median(rates)),
            "lowest": round(rates[0]),
            "highest": round(rates[-1]),
            "MFU": round(statistics.median(rates) * flops / peak, 4) if peak else None,
            "GB": round(runs[-1]["peak GB"], 2),
            "time / first": round(statistics.median(ratios), 3),
        }


def datasheet(device: str) -> float | None:
    """Return the card's bf16 peak by its datasheet."""
    import torch

    from gptlit.costs import datasheet_peak

    return datasheet_peak(torch.cuda.get_device_name(), "bf16-mixed") if device == "cuda" else None


def compare(contenders: dict[str, Contender], tokens: dict[str, int], size: str, device: str, rounds: int = 3) -> Lines:
    """Start all at once, then measure them in turn."""
    began = time.monotonic()
    processes = {name: Process(contender) for name, contender in contenders.items()}
    ready = {}
    for name, process in processes.items():
        try:
            ready[name] = process.wait_until_ready()
            yield {"contender": name, "ready after": round(time.monotonic() - began, 1)}
        except RuntimeError as error:
            yield {"contender": name, "error": str(error)}
    if ready:
        yield from figures(measure_in_turn(ready, rounds), tokens, size, device)


# --- the phases ---------------------------------------------------------------------------------------------------


def ceilings(device: str, **_: Any) -> Lines:
    """Products, copies, the head at both widths, and the kernels of attention."""
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
    source = torch.randn(2**29 if is_gpu else 2**20, device=device)
    target = torch.empty_like(source)
    rate = 2e-9 * source.nbytes / timed(partial(target.copy_, source), device)
    yield {"what": "copy, read and written", "GB/s": rate}
    del source, target, left, right
    rows, width = (8192, 768) if is_gpu else (64, 16)
    for columns in (50257, 50304):
        states = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        head = torch.randn(columns, width, device=device, dtype=torch.bfloat16)
        logits = states @ head.t()
        total = torch.zeros(columns, width, device=device)
        products: dict[str, Callable[[], Any]] = {
            "logits": lambda a=states, b=head: a @ b.t(),
            "states' gradient": lambda a=logits, b=head: a @ b,
            "head's gradient": lambda a=logits, b=states: a.t() @ b,
        }
        if is_gpu:
            products["head's gradient, added in float32"] = lambda a=logits, b=states, c=total: torch.addmm(
                c, a.t(), b, out_dtype=torch.float32
            )
        for name, product in products.items():
            yield {"what": name, "columns": columns, "rows": rows, "ms": 1e3 * timed(product, device)}
    yield from attention_kernels(device)


def attention_kernels(device: str) -> Lines:
    """Forward and backward of each kernel of causal attention."""
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


def correctness(device: str, **_: Any) -> Lines:
    """Compare with float64 on the CPU: model, loss, clipping, a step that is not finite, generation."""
    for check in (model_against_float64, loss_against_float64, clipping_and_nan, greedy_text):
        try:
            yield {"check": check.__name__, **check(device)}
        except Exception as error:
            yield {"check": check.__name__, "error": f"{type(error).__name__}: {error}"}


def small_model(**more: Any) -> Any:
    """Return a GPTModel of four layers."""
    import torch

    from gptlit import GPTConfig, GPTModel

    torch.manual_seed(1)
    shape = {"vocab_size": 1000, "context_length": 128, "emb_dim": 256, "n_heads": 4, "n_layers": 4}
    return GPTModel(GPTConfig(**shape, drop_rate=0.0, qkv_bias=True, tie_weights=True, init="gpt2", **more))


def relative(found: Any, expected: Any) -> float:
    """Return the norm of the difference over the norm."""
    return float((found.double().cpu() - expected).norm() / expected.norm())


def model_against_float64(device: str) -> dict[str, Any]:
    """Loss and gradients in float32 on the device; at most 1e-5 off."""
    import torch

    from gptlit.loss import head_loss

    ids = torch.randint(1000, (4, 129))
    found = {}
    for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
        model = small_model().to(where, dtype)
        inputs, targets = ids[:, :-1].to(where), ids[:, 1:].to(where)
        loss = head_loss(model.hidden(inputs), model.out_head.weight, targets)
        loss.backward()
        found[dtype] = [loss.detach(), *(p.grad for p in model.parameters())]
    errors = [relative(*pair) for pair in zip(found[torch.float32], found[torch.float64], strict=True)]
    return {"loss error": errors[0], "largest gradient error": max(errors[1:]), "passed": max(errors) < 1e-5}


def loss_against_float64(device: str) -> dict[str, Any]:
    """The fused loss in each type beside the plain one in float64; several chunks of rows."""
    import torch

    from gptlit import loss as module

    rows = 3 * module.ROWS.get(device, 1024) // 2 if device == "cuda" else 64
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, rows, 64), 0.1 * torch.randn(5003, 64)
    targets = torch.randint(5003, (1, rows))
    targets[0, ::7] = -100
    errors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = [value.detach().to(device, dtype).clone().requires_grad_() for value in (hidden, weight)]
        exact = [value.detach().double().cpu().requires_grad_() for value in values]
        loss = module.head_loss(*values, targets.to(device))
        plain = module.next_token_loss(exact[0] @ exact[1].T, targets)
        (loss * 4096).backward()
        (plain * 4096).backward()
        pairs = [(loss.detach(), plain.detach()), *((v.grad, e.grad) for v, e in zip(values, exact, strict=True))]
        errors[str(dtype)] = [relative(*pair) for pair in pairs]
    limits = {"torch.float32": 1e-5, "torch.bfloat16": 1e-2, "torch.float16": 2e-3}
    return {**errors, "passed": all(max(errors[name]) < limit for name, limit in limits.items())}


def clipping_and_nan(device: str) -> dict[str, Any]:
    """Clipping inside the fused AdamW equals torch's; a NaN gradient changes nothing."""
    from types import SimpleNamespace

    import torch

    from gptlit import GPTConfig, GPTModule

    config = GPTConfig(vocab_size=100, context_length=16, emb_dim=32, n_heads=2, n_layers=2, drop_rate=0.0)
    weights = []
    for is_ours in (True, False):
        torch.manual_seed(3)
        module = GPTModule(config)
        module._trainer = SimpleNamespace(  # type: ignore[assignment]
            precision="32-true", strategy=SimpleNamespace(root_device=torch.device(device))
        )
        module._skipped = module._in_a_row = torch.zeros((), device=device)
        module.configure_model()
        module.to(device)
        optimizer = module.configure_optimizers()
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape).to(device)
        if is_ours:
            module._guard(optimizer, module._clip(optimizer, 0.5, "norm"))
        else:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        weights.append([p.detach().clone() for p in module.parameters()])
        if is_ours:
            next(module.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
            module._guard(optimizer, module._clip(optimizer, 0.5, "norm"))
            optimizer.step()
            kept = all(torch.equal(a, b) for a, b in zip(weights[0], module.parameters(), strict=True))
    largest = max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
    return {"largest difference": largest, "NaN changes nothing": kept, "passed": kept and largest < 1e-6}


def greedy_text(device: str) -> dict[str, Any]:
    """Greedy ids: with cache, without, with the fast path, and on the CPU."""
    import torch

    from gptlit.fast_linear import for_generation
    from gptlit.generate import stream

    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    found = {}
    for name, where, cached, fast in (
        ("cached", device, True, False),
        ("uncached", device, False, False),
        ("fast", device, True, device == "cuda"),
        ("cpu", "cpu", True, False),
    ):
        model = small_model().eval().to(where, torch.float64)
        if fast:
            for_generation(model, compile=True)
        steps = stream(model, prompts, 40, use_cache=cached, cuda_graph=fast)
        found[name] = [ids.tolist() for ids, _ in steps]
    return {"passed": all(ids == found["cpu"] for ids in found.values())}


def step(device: str, nanogpt: str | None) -> Lines:
    """gptlit under its Trainer and nanoGPT; what is checked for correctness runs while they compile."""
    contenders = {"gptlit": gptlit(device)}
    if nanogpt is not None:
        contenders["nanoGPT"] = peer("nanogpt", device, folder=nanogpt)
    beside = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", "correctness", json.dumps({"device": device})])
    tokens = dict.fromkeys(contenders, 16 * 1024 if device == "cuda" else 2 * 16)
    for line in compare(contenders, tokens, "124m", device):
        if "ready after" in line and line["contender"] == list(contenders)[-1]:
            beside.wait()
        yield line
    beside.wait()


def transformers(device: str, **_: Any) -> Lines:
    """Transformers' GPT-2, compiled, beside gptlit."""
    contenders = {"gptlit": gptlit(device), "Transformers": peer("transformers", device)}
    yield from compare(contenders, dict.fromkeys(contenders, 16 * 1024 if device == "cuda" else 2 * 16), "124m", device)


def variants(device: str, **_: Any) -> Lines:
    """What may be faster, beside what is, with micro-batches that fill the card."""
    batch, flags = 64, ["--data.micro_batch_size=64"]
    contenders = {"gptlit": gptlit(device, batch, flags=flags)}
    for name in ("bf16_residual", "one_graph"):
        contenders[name] = gptlit(device, batch, flags=flags, patch=name)
    yield from compare(contenders, dict.fromkeys(contenders, batch * 1024 if device == "cuda" else 32), "124m", device)


def batches(device: str, nanogpt: str | None) -> Lines:
    """Larger micro-batches, beside nanoGPT; accumulation as in configs/gpt2-124m.yaml."""
    many = ["--data.batch_size=512"] if device == "cuda" else ["--data.batch_size=8"]
    contenders, tokens = {}, {}
    for batch in (32, 64):
        flags = [f"--data.micro_batch_size={batch}"]
        contenders[f"gptlit, {batch} x 1024"] = gptlit(device, batch, flags=flags)
        tokens[f"gptlit, {batch} x 1024"] = batch * 1024
    if nanogpt is not None:
        contenders["nanoGPT, 32 x 1024"] = peer("nanogpt", device, 32, nanogpt)
        tokens["nanoGPT, 32 x 1024"] = 32 * 1024
    contenders["gptlit, 8 times 64 x 1024"] = gptlit(device, 64, flags=["--data.micro_batch_size=64", *many])
    tokens["gptlit, 8 times 64 x 1024"] = 64 * 1024
    yield from compare(contenders, tokens, "124m", device)


def larger(device: str, **_: Any) -> Lines:
    """The 355M model."""
    contenders = {}
    for batch in (16, 32):
        flags = [f"--data.micro_batch_size={batch}"]
        contenders[f"355M, {batch} x 1024"] = gptlit(device, batch, "355m", flags=flags)
    tokens = {name: int(name.split()[1]) * 1024 for name in contenders}
    yield from compare(contenders, tokens, "355m", device)


def kernels(device: str, **_: Any) -> Lines:
    """The kernels that take longest in one step."""
    yield from gate_lines("KernelGate", device)


def syncs(device: str, **_: Any) -> Lines:
    """Where the host waits for the device between two log points, and how long a save holds training up."""
    yield from gate_lines("SyncGate", device)
    yield from gate_lines("SaveGate", device)


def gate_lines(gate: str, device: str) -> Lines:
    """Train with one of the gates below; yield what it prints."""
    command = [sys.executable, "-m", "benchmarks.gpu", "train", json.dumps({"gate": gate, "device": device})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    process.wait()


def train(gate: str, device: str) -> Lines:
    """Train gptlit with a gate, which ends the process."""
    from benchmarks.peers import train_gptlit

    size, batch, length = ("124m", 16, 1024) if device == "cuda" else ("toy", 2, 16)
    more = [] if device == "cuda" else ["--model.compile=false"]
    train_gptlit(size, batch, length, "tuned", globals()[gate](), device, more)
    yield {}


class KernelGate:
    """Profiles ten steps, a log point among them; prints the kernels, and where the GPU had nothing to do."""

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> None:
        """Tell that a step is done."""
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
            for line in busy_and_idle(self._profile.events(), wall, 10):
                print(json.dumps(line), flush=True)
            os._exit(0)


def busy_and_idle(events: Any, wall: float, steps: int) -> Lines:
    """Yield the milliseconds a step of each kernel, of all of them, and of the longest gaps between two."""
    ours = [event for event in events if "CUDA" in str(event.device_type) and "#" not in event.name]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in ours)
    totals: dict[str, list[float]] = {}
    for start, end, name in spans:
        totals.setdefault(name, []).append((end - start) / 1e3)
    yield {
        "kernel": "all",
        "ms a step": sum(map(sum, totals.values())) / steps,
        "times": len(spans) / steps,
        "wall ms a step": 1e3 * wall / steps,
    }
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:40]:
        yield {"kernel": name[:110], "ms a step": round(sum(times) / steps, 3), "times": len(times) / steps}
    gaps: dict[tuple[str, str], list[float]] = {}
    busy_until, last = (spans[0][1], spans[0][2]) if spans else (0, "")
    for start, end, name in spans[1:]:
        if start > busy_until:
            gaps.setdefault((last[:60], name[:60]), []).append((start - busy_until) / 1e3)
        if end > busy_until:
            busy_until, last = end, name
    yield {"gap": "all", "ms a step": sum(map(sum, gaps.values())) / steps}
    for (before, after), times in sorted(gaps.items(), key=lambda item: -sum(item[1]))[:25]:
        ms = round(sum(times) / steps, 3)
        yield {"gap": f"{before} -> {after}", "ms a step": ms, "times": len(times) / steps, "longest": max(times)}


class SyncGate:
    """Counts the calls that make the host wait, over five steps between two log points (at 10 and 20)."""

    def __init__(self) -> None:
        self.count = 0
        self.places: dict[str, int] = {}

    def step(self) -> None:
        """Tell that a step is done."""
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
            print(json.dumps({"synchronisations in 5 steps": self.places}), flush=True)
            os._exit(0)

    @staticmethod
    def _mode(torch: Any, mode: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(mode)


class SaveGate:
    """Saves twice with the run's own callback and prints how long training waited."""

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> None:
        """Tell that a step is done."""
        import gc

        import torch

        from gptlit.callbacks import StepCheckpoint

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


# Variants: each changes gptlit in a process of its own.


def prefer_cudnn() -> None:
    """Attention by cuDNN."""
    import torch

    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def after_configure_model(change: Callable[[Any], None]) -> None:
    """Let a change follow `configure_model`."""
    from gptlit import GPTModule

    original = GPTModule.configure_model

    def configure_model(self: Any) -> None:
        is_new = not hasattr(self, "model")
        original(self)
        if is_new:
            change(self)

    GPTModule.configure_model = configure_model  # type: ignore[method-assign]


def one_graph() -> None:
    """Compile embedding, blocks and last norm as one graph."""
    import torch

    from gptlit.model import TransformerBlock

    TransformerBlock.compile = lambda self, *a, **k: None  # type: ignore[method-assign,assignment]

    def change(module: Any) -> None:
        module.model.hidden = torch.compile(module.model.hidden)

    after_configure_model(change)


def bf16_residual() -> None:
    """Keep the residual stream in bf16."""
    import torch

    def change(module: Any) -> None:
        module.model.drop_emb.register_forward_hook(lambda m, a, out: out.to(torch.bfloat16))

    after_configure_model(change)


def tune_kernels() -> None:
    """Let inductor try more configurations of its own kernels."""
    from torch._inductor import config

    config.coordinate_descent_tuning = True


def more_rows() -> None:
    """Twice the rows of logits at once."""
    from gptlit import loss

    loss.ROWS["cuda"] *= 2


# --- reliability --------------------------------------------------------------------------------------------------


def reliability(device: str, **_: Any) -> Lines:
    """Runs of train.py: resumed = uninterrupted, mixed fp16, FSDP2, a signal to the process group."""
    with tempfile.TemporaryDirectory() as folder:
        words = "the a model learns from data to write text about trees and rivers in winter , slowly .".split()
        Path(folder, "words.txt").write_text(" ".join(random.Random(0).choices(words, k=60_000)))
        runs = Runs(Path(folder), device)
        checks = (runs.quickstart, runs.resumes, runs.half_precision, runs.sharded, runs.stops)
        with ThreadPoolExecutor(len(checks) if device == "cuda" else 1) as pool:
            waiting = {pool.submit(check): check.__name__ for check in checks}
            for future in as_completed(waiting):
                name, error = waiting[future], future.exception()
                yield {"check": name, **({"error": f"{error!r}"[:600]} if error else future.result())}


class Runs:
    """Short runs in a folder."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        accelerator = "gpu" if device == "cuda" else "cpu"
        self.flags = ["--config", str(ROOT / "configs/quickstart.yaml"), "--data.source", str(folder / "words.txt")]
        self.flags += ["--trainer.default_root_dir", str(folder / "runs"), f"--trainer.accelerator={accelerator}"]
        self.flags += ["--trainer.devices=1", "--model.schedule=constant", "--run.val_every_n_steps=20"]
        self.flags += ["--model.config.drop_rate=0.1", "--trainer.enable_progress_bar=true"]
        if device == "cpu":
            self.flags += ["--model.config.n_layers=1", "--model.config.emb_dim=16", "--model.config.n_heads=2"]
            self.flags += ["--model.config.context_length=16", "--data.batch_size=4"]

    def start(self, name: str, *more: str) -> "subprocess.Popen[str]":
        """Start a run."""
        command = [sys.executable, "train.py", "fit", *self.flags, f"--run.name={name}", *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=ROOT, process_group=0)

    def fit(self, name: str, *more: str) -> str:
        """Run to the end; return what it printed."""
        process = self.start(name, *more)
        output, _ = process.communicate(timeout=100)
        if process.returncode:
            raise RuntimeError(f"{name} ended with {process.returncode}: {output[-400:]}")
        return output

    def weights(self, name: str, step: int) -> dict[str, Any]:
        """Read a checkpoint's weights."""
        from gptlit.checkpoint import checkpoint_path, read_checkpoint

        path = checkpoint_path(self.folder / "runs" / name / "version_0", step)
        return dict(read_checkpoint(path)["state_dict"])

    def quickstart(self) -> dict[str, Any]:
        """60 steps: the last line of validation."""
        output = self.fit("quick", "--trainer.max_steps=60")
        found = [line for line in output.splitlines() if "val/loss" in line]
        return {"lines": found[:4], "passed": len(found) >= 3}

    def resumes(self) -> dict[str, Any]:
        """40 steps in one go and in two: the same bits, with `trainer.deterministic` at least."""
        import torch

        same = {}
        for mode, flag in (("deterministic", "true"), ("free", "false")):
            option = f"--trainer.deterministic={flag}"
            self.fit(f"{mode}-whole", option, "--trainer.max_steps=40", "--run.save_every_n_steps=20")
            self.fit(f"{mode}-parts", option, "--trainer.max_steps=20")
            self.fit(f"{mode}-parts", option, "--trainer.max_steps=40", "--ckpt_path=last")
            whole, parts = self.weights(f"{mode}-whole", 40), self.weights(f"{mode}-parts", 40)
            same[mode] = all(torch.equal(whole[name], parts[name]) for name in whole)
        return {"the same bits": same, "passed": same["deterministic"]}

    def half_precision(self) -> dict[str, Any]:
        """Mixed fp16 learns."""
        precision = "16-mixed" if self.device == "cuda" else "32-true"
        output = self.fit("half", f"--trainer.precision={precision}", "--trainer.max_steps=40")
        found = [line for line in output.splitlines() if "val/loss" in line]
        return {"lines": found[:3], "passed": "nan" not in output}

    def sharded(self) -> dict[str, Any]:
        """FSDP2 on one device, saved and resumed."""
        option = "--trainer.strategy=fsdp2"
        self.fit("sharded", option, "--trainer.max_steps=20")
        self.fit("sharded", option, "--trainer.max_steps=40", "--ckpt_path=last")
        return {"passed": bool(self.weights("sharded", 40))}

    def stops(self) -> dict[str, Any]:
        """SIGTERM to the process group, with workers: saved, status 143."""
        process = self.start("stopped", "--trainer.max_steps=100000", "--data.num_workers=2")
        assert process.stdout is not None
        for line in process.stdout:
            if "step 20" in line or "val/loss" in line:
                break
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
        saved = list((self.folder / "runs/stopped/version_0/checkpoints").glob("step-*.ckpt"))
        return {"status": process.returncode, "saved": len(saved), "passed": process.returncode == 143 and bool(saved)}


def generation(device: str, **_: Any) -> Lines:
    """Tokens a second of the 124M model, 1 and 8 rows, beside Transformers."""
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
    for name, runs in measure_in_turn(ready, 3).items():
        yield {"contender": name, **{key: statistics.median(found[key] for found in runs) for key in runs[0]}}


def main(phase: str, options: dict[str, Any]) -> None:
    """Be a phase: print its lines."""
    function = globals()[phase]
    known = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    arguments = options if takes_all else {key: value for key, value in options.items() if key in known}
    for line in function(**arguments):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
