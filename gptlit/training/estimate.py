"""Estimates of a run before its first step: parameters, memory, steps, tokens, disk; and warnings."""

import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptlit.config import GPTConfig
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.rows import Rows
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig, build_model
from gptlit.model.loss import ROWS
from gptlit.training.module import GPTModule
from gptlit.training.optimizer import OPTIMIZERS, OptimizerName
from gptlit.training.trainable import Trainable, freeze

CHINCHILLA = 20  # tokens a parameter. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models"
PROGRAM = 0.7e9  # bytes of main memory that Python, torch and Lightning take
COMPILER = 0.25e9  # and torch.compile
# Dense bf16 TFLOPS, by a part of the device's name. Source: NVIDIA's datasheets.
DATASHEET_PEAKS = {
    "B200": 2250,
    "GB200": 2500,
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
# Bytes of activations that a block saves for backward, per token and emb_dim, by the size of an activation.
SAVED = {2: 42, 4: 68, 8: 136}
# The same with torch.compile, which recomputes cheap operations. On CUDA, 2 is measured, the others are estimated.
SAVED_COMPILED = {"cpu": {2: 24, 4: 44, 8: 88}, "cuda": {2: 30, 4: 60, 8: 120}}


@dataclass(frozen=True)
class RunSpec:
    """What the estimates depend on. None: not known yet."""

    config: GPTConfig
    optimizer: OptimizerName = "adamw"
    precision: str = "32-true"  # Lightning's name
    device: str = "cpu"  # "cpu", "cuda" or "mps"
    devices: int = 1  # over all nodes
    nodes: int = 1
    shards: int = 1  # devices over which parameters, gradients and optimizer state are sharded
    residual_in_fp32: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    batch_size: int = 16  # windows in an optimizer step, over all devices
    micro_batch_size: int = 16  # windows in a micro-batch of one device
    steps: int | None = None  # optimizer steps
    epochs: int | None = None  # over the training windows, if they limit the run
    lr: float = 6e-4  # the peak
    warmup_steps: int = 0
    is_pretrained: bool = False
    windows: int | None = None  # to train on, or rows
    row_lengths: tuple[int, float] | None = None  # longest and mean, in tokens; None: windows of context_length
    val_windows: int | None = None  # 0 for no validation
    train_tokens: int | None = None
    saves: int | None = 3  # checkpoints that are kept; None for all
    folder: Path = Path("runs")  # where checkpoints go
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    trainable: Trainable = "all"

    @property
    def length(self) -> int:
        """Tokens in a window, or in the longest row."""
        return self.config.context_length if self.row_lengths is None else self.row_lengths[0]

    @property
    def noun(self) -> str:
        """What a batch consists of."""
        return "windows" if self.row_lengths is None else "rows"

    @classmethod
    def of(
        cls, module: GPTModule, datamodule: TokenDataModule, *, keep_last: int, keep_best: bool, **of_trainer: Any
    ) -> "RunSpec":
        """Describe a run: `of_trainer` are the fields that depend on the Trainer."""
        is_loaded = hasattr(datamodule, "run_data")
        train = datamodule.run_data.splits["train"] if is_loaded else None
        return cls(
            config=module.config,
            lora=module.lora,
            trainable=module.trainable,
            optimizer=module.optimizer_name,
            residual_in_fp32=module.residual_in_fp32,
            activation_checkpointing=module.activation_checkpointing,
            compile=module.compile_model,
            batch_size=datamodule.batch_size,
            lr=module.schedule.peak,
            warmup_steps=module.schedule.warmup_steps,
            is_pretrained=module.init_from is not None,
            windows=None if train is None else len(train),
            row_lengths=(int(train.lengths.max()), float(train.lengths.mean())) if isinstance(train, Rows) else None,
            val_windows=len(datamodule.run_data.splits["val"]) if is_loaded else None,
            train_tokens=datamodule.run_data.on_disk.tokens("train") if is_loaded else None,
            saves=None if keep_last == -1 else keep_last + (keep_best and keep_last > 0),
            **of_trainer,
        )


def make_plan(spec: RunSpec) -> dict[str, Any]:
    """Return the estimates as nested values: bytes, tokens, steps, seconds; None for what is not known."""
    parameters = count_parameters(spec.config)
    size = bytes_per_param(spec.precision) * trainable_parameters(spec)[1] + optimizer_bytes(spec)
    return {
        "parameters": parameters,
        "memory": memory(spec, parameters["total"]),
        **_steps(spec, parameters),
        "checkpoint": {
            "bytes": size,
            "bytes_kept": None if spec.saves is None else size * spec.saves,
            "free": _free_bytes(spec.folder),
        },
        "time": {"seconds_a_step": None, "seconds": None, "tokens_per_second": None, "end": None},
    }


def _steps(spec: RunSpec, parameters: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return what a step, the data and the run amount to."""
    steps, per_epoch, epochs, tokens = spec.steps, None, None, None
    if spec.windows is not None:
        per_epoch = math.ceil(spec.windows / spec.batch_size)
        if spec.epochs is not None:
            limit = math.ceil(spec.epochs * spec.windows / spec.batch_size)
            steps = limit if steps is None else min(steps, limit)
        epochs = None if steps is None or not spec.windows else steps * spec.batch_size / spec.windows
    per_step = round(spec.batch_size * (spec.length if spec.row_lengths is None else spec.row_lengths[1]))
    if steps is not None:
        tokens = steps * per_step
    return {
        "step": {
            "windows": spec.batch_size,
            "tokens": per_step,
            "devices": spec.devices,
            "micro_batch_size": spec.micro_batch_size,
            "accumulation": accumulation(spec),
        },
        "data": {
            "train_tokens": spec.train_tokens,
            "train_windows": spec.windows,
            "val_windows": spec.val_windows,
            "steps_per_epoch": per_epoch,
            "epochs": epochs,
        },
        "run": {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_parameter": None if tokens is None else tokens / parameters["total"],
            "flops": None if tokens is None else tokens * flops_per_token(spec.config, parameters),
        },
    }


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Return the exact number of parameters by module, and the total; a tied head counts as 0."""
    with torch.device("meta"):
        model = GPTModel(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parts["out_head"] = 0 if config.tie_weights else parts["out_head"]
    return {**{name: count for name, count in parts.items() if name != "drop_emb"}, "total": sum(parts.values())}


def trainable_parameters(spec: RunSpec) -> tuple[int, int]:
    """Return the numbers of parameters that have a gradient: in the blocks' matrices, and in all."""
    with torch.device("meta"):
        model = build_model(spec.config, spec.lora)
    freeze(model, spec.trainable)
    in_blocks = sum(p.numel() for p in model.trf_blocks.parameters() if p.requires_grad and p.dim() >= 2)
    return in_blocks, sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops_per_token(config: GPTConfig, parameters: dict[str, int]) -> int:
    """Return the FLOPs of training on one token. Source: Chowdhery et al. 2022, "PaLM", appendix B."""
    in_matmuls = parameters["total"] - parameters["pos_emb"] - (0 if config.tie_weights else parameters["tok_emb"])
    return 6 * in_matmuls + 12 * config.n_layers * config.emb_dim * config.context_length


def datasheet_peak(device_name: str, precision: str) -> float | None:
    """Return the peak FLOPS of a GPU's datasheet in 16-bit precision; None if unknown."""
    known = [name for name in DATASHEET_PEAKS if re.search(rf"\b{name}\b", device_name)]
    if not known or not precision.startswith(("bf16", "16")):
        return None
    return DATASHEET_PEAKS[max(known, key=len)] * 1e12


def accumulation(spec: RunSpec) -> int:
    """Return the micro-batches per optimizer step on each device."""
    return math.ceil(spec.batch_size / (spec.micro_batch_size * spec.devices))


def bytes_per_param(precision: str) -> int:
    """Return the bytes of a parameter, its gradient, and each value of optimizer state."""
    return {"64-true": 8, "bf16-true": 2, "16-true": 2}.get(precision, 4)


def optimizer_bytes(spec: RunSpec) -> int:
    """Return the bytes of the optimizer state."""
    entry = OPTIMIZERS[spec.optimizer]
    in_blocks, trained = trainable_parameters(spec)
    values = entry.block_matrix_state * in_blocks + entry.other_state * (trained - in_blocks)
    return bytes_per_param(spec.precision) * values


def memory(spec: RunSpec, total: int) -> dict[str, int | None]:
    """Return the peak memory of one device in bytes, by part, and what is available.

    Activations are estimated as in docs/scaling.md. During backward gradients replace activations, and they are zeroed
    right after the step: they need memory of their own only under accumulation or on several devices. With FSDP2 they
    are unsharded between the micro-batches of a step.
    """
    config = spec.config
    width, layers, vocabulary = config.emb_dim, config.n_layers, config.vocab_size
    tokens = spec.micro_batch_size * spec.length
    size = {"64": 8, "32": 4}.get(spec.precision.split("-")[0], 2)
    per_block = (SAVED_COMPILED.get(spec.device, SAVED) if spec.compile else SAVED)[size]
    n = spec.shards
    saved = per_block * (layers + 2)  # and what one block takes in backward
    if config.drop_rate:
        saved += 2 * layers  # masks behind attention and feed-forward
        if spec.device == "cpu":  # with dropout torch's attention saves its probabilities
            saved += layers * config.n_heads * spec.length * (2 * size + 1) // width
    activations = tokens * width * (4 * layers + 2 * per_block if spec.activation_checkpointing else saved)
    casts = 2 * 12 * width**2 * layers if "mixed" in spec.precision and not spec.compile else 0
    rows, trained = min(tokens, ROWS.get(spec.device, 1024)), trainable_parameters(spec)[1]
    logits = config.n_classes or vocabulary
    parts: dict[str, int] = {
        "weights": bytes_per_param(spec.precision) * total // n,
        "gradients": bytes_per_param(spec.precision) * trained // (n if accumulation(spec) == 1 else 1),
        "optimizer": optimizer_bytes(spec) // n,
        "activations": activations + casts,
        "logits": (6 if size == 2 else 4) * logits * width + size * logits * rows,
        "program": int(PROGRAM + COMPILER * spec.compile) if spec.device == "cpu" else 0,
    }
    if config.tie_weights or spec.lora.rank:  # the embedding's own, before it is added; or of the merged head
        parts["gradients"] += 4 * vocabulary * width
    if spec.devices == accumulation(spec) == 1:
        parts["gradients"] = max(0, parts["gradients"] - parts["activations"])
    if n > 1:
        gathered = 2 * (2 if spec.precision == "bf16-mixed" else 4)  # bytes of a parameter and its gradient
        parts["weights"] += gathered * (vocabulary * width + 12 * width**2)  # the embedding and a block
    return {**parts, "total": sum(parts.values()), "available": available_memory(spec)}


def available_memory(spec: RunSpec) -> int | None:
    """Return the memory of a device; None if it is not here. CPU processes share that of their machine."""
    if spec.device == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * spec.nodes // spec.devices
    if spec.device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def usual_lr(parameters: int) -> float:
    """Return the usual peak learning rate for training from scratch with AdamW.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", equation D.1.
    """
    return max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))


def warnings(spec: RunSpec, plan: dict[str, Any]) -> list[str]:
    """Return a line for each setting that looks wrong."""
    found = []
    need, have = plan["memory"]["total"], plan["memory"]["available"]
    if have is not None and need > have:
        found.append(
            f"{gigabytes(need)} are needed and the device has {gigabytes(have)}: lower data.micro_batch_size (now "
            f"{spec.micro_batch_size}), or set model.activation_checkpointing"
        )
    if spec.val_windows is not None and 0 < spec.val_windows < 20:
        found.append(
            f"val/loss comes from {spec.val_windows} {spec.noun} only: a larger data.val_fraction is less noisy"
        )
    if (steps := plan["run"]["steps"]) is not None and spec.warmup_steps >= steps:
        found.append(f"the warm-up of {spec.warmup_steps} steps is no shorter than the run of {steps}")
    usual = usual_lr(plan["parameters"]["total"] - plan["parameters"]["tok_emb"] - plan["parameters"]["pos_emb"])
    most = usual * (10 if spec.optimizer == "muon" else 5)
    if spec.lr > most or (spec.lr < usual / 10 and not spec.is_pretrained):
        found.append(f"model.lr {spec.lr:g} is far from the usual {usual:.1g} for a model of this size")
    kept, free = plan["checkpoint"]["bytes_kept"], plan["checkpoint"]["free"]
    if kept and kept + plan["checkpoint"]["bytes"] > free:  # the oldest is deleted after the newest is written
        need = gigabytes(kept + plan["checkpoint"]["bytes"])
        found.append(f"the checkpoints need {need} and {spec.folder} has {gigabytes(free)} left")
    return found


def describe(spec: RunSpec, plan: dict[str, Any]) -> list[str]:
    """Return the plan as lines of text."""
    parameters, memory = plan["parameters"], plan["memory"]
    step, run, data, saved = plan["step"], plan["run"], plan["data"], plan["checkpoint"]
    where = f"{spec.devices} x {spec.device}"
    trained = trainable_parameters(spec)[1]
    part = f" and {trained:,} of adapters" if spec.lora.rank else ""
    if trained < parameters["total"] and not part:
        part = f", {trained:,} of them trained"
    parts = [f"{name} {gigabytes(n)}" for name, n in memory.items() if n and name not in ("total", "available")]
    have = "" if memory["available"] is None else f" of {gigabytes(memory['available'])}"
    lines = [
        f"model   {parameters['total']:,} parameters{part}: {spec.config.summary}; {spec.precision} on {where}",
        f"memory  {gigabytes(memory['total'])}{have} on each device, about: {', '.join(parts)}",
        f"step    {step['windows']} {spec.noun} = {step['tokens']:,} tokens: "
        + f"{step['micro_batch_size']} at once on {where}"
        + f", accumulated over {step['accumulation']} micro-batches" * (step["accumulation"] > 1),
    ]
    if data["train_windows"] is None:
        lines.append("data    no corpus yet: `fit` or `gptlit prepare` makes it; windows and epochs are known then")
    else:
        lines.append(
            f"data    {data['train_tokens']:,} tokens, {data['train_windows']:,} {spec.noun}, "
            f"{data['val_windows']:,} to validate; an epoch is {data['steps_per_epoch']:,} steps"
        )
    if run["steps"] is not None:
        epochs = f", {data['epochs']:.2g} epochs" if data["epochs"] is not None else ""
        lines.append(
            f"run     {run['steps']:,} steps, {run['tokens']:,} tokens{epochs}: {run['tokens_per_parameter']:.2g} a "
            f"parameter (Chinchilla: {CHINCHILLA})"
        )
    kept = "all are kept" if saved["bytes_kept"] is None else f"at most {gigabytes(saved['bytes_kept'])} kept"
    lines.append(f"disk    {gigabytes(saved['bytes'])} a checkpoint, {kept}; {gigabytes(saved['free'])} free")
    return lines


def gigabytes(size: float) -> str:
    """Format bytes with two or three digits."""
    if size < 0.1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.2g} GB" if size < 9.95e9 else f"{size / 1e9:,.0f} GB"


def _free_bytes(folder: Path) -> int:
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
