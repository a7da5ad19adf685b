"""What a run will cost, before its first step: parameters, memory, steps, tokens, disk, and what looks wrong."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptlit.config import GPTConfig
from gptlit.model.gpt import GPTModel
from gptlit.model.loss import ROWS
from gptlit.training.optimizer import OPTIMIZERS, OptimizerName

CHINCHILLA = 20  # tokens a parameter. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models"


PROGRAM = 0.7e9  # bytes that Python, torch and Lightning take in main memory


COMPILER = 0.25e9  # and torch.compile


# 10^12 dense bf16 operations a second, by a part of the device's name. Source: NVIDIA's datasheets.
DATASHEET_PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100": 989,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 209,
}


# Bytes that a token leaves in a block for the way back, over emb_dim, by the size of an activation.
SAVED = {2: 42, 4: 68, 8: 136}


# The same where the compiler recomputes cheap operations in backward. On CUDA, 2 is measured, the others are estimated.
SAVED_COMPILED = {"cpu": {2: 24, 4: 44, 8: 88}, "cuda": {2: 30, 4: 60, 8: 120}}


@dataclass(frozen=True)
class RunSpec:
    """What a plan is made for. None: not known.

    Args:
        config: The architecture.
        optimizer: "adamw" or "muon".
        precision: Lightning's name, "bf16-mixed" for example.
        device: "cpu", "cuda" or "mps".
        devices: How many, over all nodes.
        nodes: Machines.
        shards: Whether weights, gradients and moments are split over them.
        activation_checkpointing: Whether blocks are recomputed in backward.
        compile: Whether blocks are compiled.
        batch_size: Windows in an optimizer step, over all devices.
        micro_batch_size: Windows that a device takes at once.
        steps: Optimizer steps of the run.
        epochs: Passes over the training windows, where they limit the run.
        lr: The peak of the learning rate.
        warmup_steps: Steps until it is reached.
        is_pretrained: Whether the weights come from somewhere.
        windows: Of the training part.
        val_windows: Of the validation part; 0 where none is wanted.
        train_tokens: Of the training part.
        saves: Checkpoints that are kept; None keeps all.
        folder: Where they go.
    """

    config: GPTConfig
    optimizer: OptimizerName = "adamw"
    precision: str = "32-true"
    device: str = "cpu"
    devices: int = 1
    nodes: int = 1
    shards: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    batch_size: int = 16
    micro_batch_size: int = 16
    steps: int | None = None
    epochs: int | None = None
    lr: float = 6e-4
    warmup_steps: int = 0
    is_pretrained: bool = False
    windows: int | None = None
    val_windows: int | None = None
    train_tokens: int | None = None
    saves: int | None = 3
    folder: Path = Path("runs")


def make_plan(spec: RunSpec) -> dict[str, Any]:
    """Return the plan as nested values: bytes, tokens, steps, seconds; None for what is not known."""
    parameters = count_parameters(spec.config)
    steps, per_epoch = spec.steps, None
    if spec.windows is not None:
        per_epoch = math.ceil(spec.windows / spec.batch_size)
        if spec.epochs is not None:
            limit = math.ceil(spec.epochs * spec.windows / spec.batch_size)
            steps = limit if steps is None else min(steps, limit)
    tokens_a_step = spec.batch_size * spec.config.context_length
    tokens = None if steps is None else steps * tokens_a_step
    size = bytes_per_param(spec.precision) * parameters["total"] + optimizer_bytes(spec)
    return {
        "parameters": parameters,
        "memory": memory(spec, parameters["total"]),
        "step": {
            "windows": spec.batch_size,
            "tokens": tokens_a_step,
            "devices": spec.devices,
            "micro_batch_size": spec.micro_batch_size,
            "accumulation": accumulation(spec),
        },
        "data": {
            "train_tokens": spec.train_tokens,
            "train_windows": spec.windows,
            "val_windows": spec.val_windows,
            "steps_per_epoch": per_epoch,
            "epochs": None if tokens is None or not spec.windows else steps * spec.batch_size / spec.windows,  # type: ignore[operator]
        },
        "run": {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_parameter": None if tokens is None else tokens / parameters["total"],
            "flops": None if tokens is None else tokens * flops_per_token(spec.config, parameters),
        },
        "checkpoint": {
            "bytes": size,
            "bytes_kept": None if spec.saves is None else size * spec.saves,
            "free": shutil.disk_usage(_existing(spec.folder)).free,
        },
        "time": {"seconds_a_step": None, "seconds": None, "tokens_per_second": None, "end": None},
    }


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Return the exact number of parameters by part, and in all; a tied head has none of its own."""
    with torch.device("meta"):
        model = GPTModel(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parts["out_head"] = 0 if config.tie_weights else parts["out_head"]
    return {**{name: count for name, count in parts.items() if name != "drop_emb"}, "total": sum(parts.values())}


def flops_per_token(config: GPTConfig, parameters: dict[str, int]) -> int:
    """Return the floating-point operations of training on one token. Source: Chowdhery et al. 2022, appendix B."""
    multiplied = parameters["total"] - parameters["pos_emb"] - (0 if config.tie_weights else parameters["tok_emb"])
    return 6 * multiplied + 12 * config.n_layers * config.emb_dim * config.context_length


def datasheet_peak(device_name: str, precision: str) -> float | None:
    """Return the operations a second of a GPU's datasheet, in 16-bit precision; None where they are not known here."""
    known = [name for name in DATASHEET_PEAKS if name in device_name]
    if not known or not precision.startswith(("bf16", "16")):
        return None
    return DATASHEET_PEAKS[max(known, key=len)] * 1e12


def accumulation(spec: RunSpec) -> int:
    """Return the micro-batches of a step on each device."""
    return math.ceil(spec.batch_size / (spec.micro_batch_size * spec.devices))


def bytes_per_param(precision: str) -> int:
    """Return the bytes of a weight, of its gradient and of each of its moments."""
    return {"64-true": 8, "bf16-true": 2, "16-true": 2}.get(precision, 4)


def optimizer_bytes(spec: RunSpec) -> int:
    """Return the bytes of the optimizer state."""
    entry = OPTIMIZERS[spec.optimizer]
    in_blocks = 12 * spec.config.n_layers * spec.config.emb_dim**2
    others = count_parameters(spec.config)["total"] - in_blocks
    return bytes_per_param(spec.precision) * (entry.block_matrix_state * in_blocks + entry.other_state * others)


def memory(spec: RunSpec, total: int) -> dict[str, int | None]:
    """Return what one device needs at its peak, in bytes by part, and what it has.

    The activations are reckoned: what a block keeps of a token for the way back, as in docs/scaling.md. Gradients grow
    while activations go, and are gone when the next ones come, but for other micro-batches and other devices: only
    then they need room of their own. Sharded ones are whole on each device from one micro-batch of a step to the next.
    """
    config = spec.config
    width, layers, vocabulary = config.emb_dim, config.n_layers, config.vocab_size
    tokens = spec.micro_batch_size * config.context_length
    size = {"64": 8, "32": 4}.get(spec.precision.split("-")[0], 2)
    kept = (SAVED_COMPILED.get(spec.device, SAVED) if spec.compile else SAVED)[size]
    n = spec.devices if spec.shards else 1
    saved = kept * (layers + 2)  # and what one block takes on its way back
    if config.drop_rate:
        saved += 2 * layers  # masks behind attention and feed-forward
        if spec.device == "cpu":  # torch's attention keeps its probabilities where it drops some
            saved += layers * config.n_heads * config.context_length * (2 * size + 1) // width
    activations = tokens * width * (4 * layers + 2 * kept if spec.activation_checkpointing else saved)
    casts = 2 * 12 * width**2 * layers if "mixed" in spec.precision and not spec.compile else 0
    rows = min(tokens, ROWS.get(spec.device, 1024))
    parts: dict[str, int] = {
        "weights": bytes_per_param(spec.precision) * total // n,
        "gradients": bytes_per_param(spec.precision) * total // (n if accumulation(spec) == 1 else 1),
        "optimizer": optimizer_bytes(spec) // n,
        "activations": activations + casts,
        "logits": (6 if size == 2 else 4) * vocabulary * width + size * vocabulary * rows,
        "program": int(PROGRAM + COMPILER * spec.compile) if spec.device == "cpu" else 0,
    }
    if config.tie_weights:
        parts["gradients"] += 4 * vocabulary * width  # the embedding's own, before it is added to the head's
    if spec.devices == accumulation(spec) == 1:
        parts["gradients"] = max(0, parts["gradients"] - parts["activations"])
    if n > 1:
        parts["weights"] += 8 * (vocabulary * width + 12 * width**2)  # the embedding and a block, gathered
    return {**parts, "total": sum(parts.values()), "available": available_memory(spec)}


def available_memory(spec: RunSpec) -> int | None:
    """Return the bytes that a device has; None where it is not here. Processes on CPUs share those of their machine."""
    if spec.device == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * spec.nodes // spec.devices
    if spec.device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def usual_lr(parameters: int) -> float:
    """Return the learning rate that is usual for a model trained with AdamW from scratch.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", equation D.1.
    """
    return max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))


def warnings(spec: RunSpec, plan: dict[str, Any]) -> list[str]:
    """Say in words what looks wrong."""
    found = []
    need, have = plan["memory"]["total"], plan["memory"]["available"]
    if have is not None and need > have:
        found.append(
            f"{gigabytes(need)} are needed and the device has {gigabytes(have)}: lower data.micro_batch_size (now "
            f"{spec.micro_batch_size}), or set model.activation_checkpointing"
        )
    if spec.val_windows is not None and 0 < spec.val_windows < 20:
        found.append(f"val/loss comes from {spec.val_windows} windows only: a larger data.val_fraction is less noisy")
    per_epoch, steps = plan["data"]["steps_per_epoch"], plan["run"]["steps"]
    if per_epoch is not None and per_epoch < spec.warmup_steps:
        found.append(f"the warm-up of {spec.warmup_steps} steps is longer than an epoch of {per_epoch}")
    if steps is not None and spec.warmup_steps >= steps:
        found.append(f"the warm-up of {spec.warmup_steps} steps is no shorter than the run of {steps}")
    usual = usual_lr(plan["parameters"]["total"] - plan["parameters"]["tok_emb"] - plan["parameters"]["pos_emb"])
    if spec.lr > 5 * usual or (spec.lr < usual / 10 and not spec.is_pretrained):
        found.append(f"model.lr {spec.lr:g} is far from the usual {usual:.1g} for a model of this size")
    kept, free = plan["checkpoint"]["bytes_kept"], plan["checkpoint"]["free"]
    if kept and kept + plan["checkpoint"]["bytes"] > free:  # a new one is there before the oldest goes
        need = gigabytes(kept + plan["checkpoint"]["bytes"])
        found.append(f"the checkpoints need {need} and {spec.folder} has {gigabytes(free)} left")
    return found


def describe(spec: RunSpec, plan: dict[str, Any]) -> list[str]:
    """Return the plan as lines to read."""
    parameters = plan["parameters"]
    counted = {"embeddings": parameters["tok_emb"] + parameters["pos_emb"], "blocks": parameters["trf_blocks"]}
    counted["head"] = parameters["out_head"]
    parts = ", ".join(f"{name} {count:,}" for name, count in counted.items() if count)
    lines = [
        f"model   {parameters['total']:,} parameters: {spec.config.summary}; "
        f"{spec.precision} on {spec.devices} x {spec.device}",
        f"        {parts}{', head tied' if spec.config.tie_weights else ''}",
        _memory_line(spec, plan["memory"]),
    ]
    step, run, data, saved = plan["step"], plan["run"], plan["data"], plan["checkpoint"]
    line = f"step    {step['windows']} windows = {step['tokens']:,} tokens"
    if step["devices"] > 1 or step["accumulation"] > 1:
        line += f": {step['micro_batch_size']} at once on {step['devices']} x {spec.device}"
        line += f", accumulated over {step['accumulation']} micro-batches" * (step["accumulation"] > 1)
    lines.append(line)
    if data["train_windows"] is not None:
        val = f", {data['val_windows']:,} to validate" if data["val_windows"] is not None else ""
        epoch = f"an epoch is {data['steps_per_epoch']:,} steps"
        lines.append(f"data    {data['train_tokens']:,} tokens, {data['train_windows']:,} windows{val}; {epoch}")
    else:
        lines.append("data    no corpus yet: `fit` or `gptlit prepare` makes it; windows and epochs are known then")
    if run["steps"] is not None:
        epochs = f", {data['epochs']:.2g} epochs" if data["epochs"] is not None else ""
        lines.append(
            f"run     {run['steps']:,} steps, {run['tokens']:,} tokens{epochs}: {run['tokens_per_parameter']:.2g} a "
            f"parameter (Chinchilla: {CHINCHILLA})"
        )
    if spec.saves == 0:
        return [*lines, "disk    no checkpoints"]
    kept = "all are kept" if saved["bytes_kept"] is None else f"at most {gigabytes(saved['bytes_kept'])} kept"
    lines.append(f"disk    {gigabytes(saved['bytes'])} a checkpoint, {kept}; {gigabytes(saved['free'])} free")
    return lines


def _memory_line(spec: RunSpec, memory: dict[str, int | None]) -> str:
    parts = [f"{name} {gigabytes(n)}" for name, n in memory.items() if n and name not in ("total", "available")]
    have = "" if memory["available"] is None else f" of {gigabytes(memory['available'])}"
    name = {"cpu": "CPU", "cuda": "GPU"}.get(spec.device, spec.device)
    where = f"each {name}" if spec.devices > 1 else f"the {name}"
    return f"memory  {gigabytes(memory['total'] or 0)}{have} on {where}, about: {', '.join(parts)}"


def gigabytes(size: float) -> str:
    """Write bytes with two or three digits."""
    if size < 0.1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.2g} GB" if size < 9.95e9 else f"{size / 1e9:,.0f} GB"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
