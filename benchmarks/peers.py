"""Contenders of a training step: gptlit under `train.py`, gptlit in a bare loop, and other projects.

"Shipped" is the default of each project on a CPU: float32 (gptlit: bf16 if the CPU supports it), not compiled. "Tuned"
is bf16 (float32 on a CPU without native bf16), torch.compile, fused AdamW, and an allocator that keeps freed memory.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np

from benchmarks.contenders import Contender, StepTimer

# emb_dim, n_heads, n_layers
SIZES = {"355m": (1024, 16, 24), "124m": (768, 12, 12), "small": (384, 6, 6), "toy": (16, 2, 1)}
VOCAB_SIZE = 50257
PADDED_VOCAB_SIZE = 50304  # nanoGPT and litgpt round up to this
PEERS = {  # and the package that each needs here
    "gptlit": None,
    "nanogpt": None,
    "litgpt": "litgpt",
    "transformers": "transformers",
    "trainer": "transformers",
    "book": "llms_from_scratch",
}
WARM, STEPS = 5, 2  # steps before the first measurement, and per measurement


def check_peers(names: Iterable[str], nanogpt: str | None) -> None:
    """Exit with one line if a peer is unknown, or what it needs is missing."""
    for name in names:
        peer = name.partition(", ")[0]
        if peer not in PEERS:
            raise SystemExit(f"error: no peer is named {peer!r}: choose from {', '.join(PEERS)}")
        if peer == "nanogpt" and nanogpt is None:
            raise SystemExit("error: nanogpt needs --nanogpt FOLDER, a clone of its repository")
        if peer == "nanogpt" and not Path(nanogpt or "", "model.py").is_file():
            raise SystemExit(f"error: --nanogpt {nanogpt} has no model.py: name the folder of a clone of nanoGPT")
        if (package := PEERS[peer]) and find_spec(package) is None:
            raise SystemExit(f"error: {peer} needs the package {package}: install it, or leave {peer} out")


def make(name: str, size: str, batch_size: int, length: int, **options: Any) -> Contender:
    """Return a contender for `contenders.compare`; `name` is a peer, optionally with ", tuned" or ", shipped"."""
    peer, _, kind = name.partition(", ")
    shape = {"size": size, "batch_size": batch_size, "length": length, "kind": kind or "tuned"}
    return __name__, {"name": peer, **shape, **options}


def tuned_precision(device: str) -> str:
    """Return the precision of a tuned step: "bf16-mixed", or "32-true" on a CPU without native bf16."""
    from gptlit.training.environment import best_precision

    return "bf16-mixed" if device == "cuda" else best_precision("cpu")[0]


def step_flops(size: str, batch_size: int, length: int) -> float:
    """Return the FLOPs of a step of the tied model.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    width, _, layers = SIZES[size]
    multiplied = 12 * layers * width**2 + 13 * layers * width + VOCAB_SIZE * width + 2 * width
    return batch_size * length * (6 * multiplied + 12 * layers * width * length)


def contender(
    name: str,
    size: str,
    batch_size: int,
    length: int,
    kind: str = "tuned",
    folder: str = "",
    warm: int = WARM,
    steps: int = STEPS,
    device: str = "cpu",
    flags: Sequence[str] = (),
    accumulate: int = 1,
) -> Any:
    """Train and call the timer after each step; never returns. "matmul" returns a function to be measured.

    Args:
        name: One of the builders below, "gptlit", "bare", "trainer" or "matmul".
        size: A key of `SIZES`.
        batch_size: Windows per step.
        length: Tokens per window.
        kind: "tuned" or "shipped"; gptlit also "recompute".
        folder: Clone of the peer's repository, if it needs one.
        warm: Steps before the first measurement.
        steps: Steps per measurement.
        device: "cpu" or "cuda".
        flags: Additional flags of `train.py fit`, for gptlit.
        accumulate: Micro-batches per optimizer step of another project; the timer counts micro-batches.
    """
    import torch

    torch.manual_seed(0)
    if kind == "tuned" and device == "cpu":
        from benchmarks.contenders import keep_freed_memory

        keep_freed_memory()
    if name == "matmul":
        return partial(seconds_at_peak, step_flops(size, batch_size, length))
    timer = StepTimer(warm, steps)
    if name == "gptlit":
        return train_gptlit(size, batch_size, length, kind, timer, device, flags)
    batch = torch.randint(VOCAB_SIZE, (batch_size, length + 1), device=device)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    if name == "bare":
        return bare(*SIZES[size], inputs, targets, timer)
    if name == "trainer":
        return train_transformers(size, batch, kind == "tuned", timer)
    builders = {"nanogpt": nanogpt, "transformers": transformers, "litgpt": litgpt, "book": book}
    model, loss = builders[name](*SIZES[size], length, folder)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as nanoGPT and litgpt do
    return loop(model.to(device), loss, inputs, targets, kind == "tuned", timer, accumulate=accumulate)


def seconds_at_peak(flops: float) -> dict[str, float]:
    """Return the seconds for a number of FLOPs at peak throughput: the best of 30 square matrix products, tuned."""
    import torch

    side = 2048
    matrix = torch.randn(side, side)
    if tuned_precision("cpu") == "bf16-mixed":
        matrix = matrix.bfloat16()
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - began)
    return {"seconds": flops * best / (2 * side**3), "peak GB": 0.0}


def loop(
    model: Any,
    loss: Callable[[Any, Any, Any], Any],
    inputs: Any,
    targets: Any,
    tuned: bool,
    timer: StepTimer,
    fused: bool | None = None,
    compiled: bool | None = None,
    accumulate: int = 1,
) -> None:
    """Train in a plain loop, as each project's own does on one device."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=tuned if fused is None else fused)
    forward = torch.compile(loss) if (tuned if compiled is None else compiled) else loss
    is_bf16 = tuned and tuned_precision(inputs.device.type) == "bf16-mixed"
    for number in count(1):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=is_bf16):
            value = forward(model, inputs, targets) / accumulate
        value.backward()
        if number % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        timer.step()


def bare(emb_dim: int, n_heads: int, n_layers: int, inputs: Any, targets: Any, timer: StepTimer) -> None:
    """Train with gptlit's training step, without a Trainer."""
    import torch

    from gptlit import GPTConfig, GPTModule
    from gptlit.training.gradients import clip_gradients

    shape = {"emb_dim": emb_dim, "n_heads": n_heads, "n_layers": n_layers, "context_length": inputs.shape[1]}
    config = GPTConfig(**shape, drop_rate=0.0, qkv_bias=True, tie_weights=True, init="gpt2")
    module = GPTModule(config, compile=True)
    precision = tuned_precision("cpu")
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        precision=precision, strategy=SimpleNamespace(root_device=inputs.device)
    )
    module.configure_model()
    optimizer = module.configure_optimizers()
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module._loss(inputs, targets, "mean")
        loss.backward()
        module.guard.check(optimizer, clip_gradients(optimizer, 1.0, "norm"))
        optimizer.step()
        optimizer.zero_grad()
        timer.step()


# --- peers: (emb_dim, n_heads, n_layers, length, folder) -> (model, loss function) -------------------------------


def nanogpt(emb_dim: int, n_heads: int, n_layers: int, length: int, folder: str) -> Any:
    """Build nanoGPT's model from a clone of its repository."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    config = GPTConfig(
        block_size=length,
        vocab_size=PADDED_VOCAB_SIZE,
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=emb_dim,
        dropout=0.0,
        bias=True,
    )
    return GPT(config), lambda model, inputs, targets: model(inputs, targets)[1]


def transformers(emb_dim: int, n_heads: int, n_layers: int, length: int, folder: str) -> Any:
    """Build Transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(n_positions=length, n_embd=emb_dim, n_head=n_heads, n_layer=n_layers, use_cache=False, **rates)
    model = GPT2LMHeadModel(config).train()
    return model, lambda model, inputs, targets: model(input_ids=inputs, labels=targets, shift_labels=targets).loss


def book(emb_dim: int, n_heads: int, n_layers: int, length: int, folder: str) -> Any:
    """Build the book's model of chapter 4."""
    import torch
    from llms_from_scratch.ch04 import GPTModel  # type: ignore[import-not-found]

    config = {
        "vocab_size": VOCAB_SIZE,
        "context_length": length,
        "emb_dim": emb_dim,
        "n_heads": n_heads,
        "n_layers": n_layers,
        "drop_rate": 0.0,
        "qkv_bias": False,
    }

    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    return GPTModel(config), loss


def litgpt(emb_dim: int, n_heads: int, n_layers: int, length: int, folder: str) -> Any:
    """Build a litgpt model of the same size. litgpt has no GPT-2: rotary positions, untied head."""
    from litgpt.model import GPT, Config  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    config = Config(
        block_size=length,
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=emb_dim,
        bias=True,
        parallel_residual=False,
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
    )

    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        return chunked_cross_entropy(model(inputs), targets, chunk_size=0)

    return GPT(config), loss


def train_transformers(size: str, batch: Any, tuned: bool, timer: StepTimer) -> None:
    """Train under Transformers' Trainer."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, _ = transformers(*SIZES[size], batch.shape[1] - 1, "")

    class Step(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            timer.step()

    class Same(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            while True:
                yield from ({"input_ids": row[:-1], "labels": row[:-1]} for row in batch)

    options = {"torch_compile": True, "optim": "adamw_torch_fused"} if tuned else {}
    if tuned and tuned_precision("cpu") == "bf16-mixed":
        options["bf16"] = True
    arguments = TrainingArguments(
        "trainer",
        use_cpu=True,
        max_steps=10_000,
        per_device_train_batch_size=len(batch),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        weight_decay=0.1,
        **options,
    )
    Trainer(model, arguments, train_dataset=Same(), callbacks=[Step()]).train()


class TimerCallback(pl.Callback):
    """Calls the timer after each step of Lightning's Trainer."""

    timer: StepTimer

    def on_train_batch_end(self, *_: Any) -> None:
        """Call the timer."""
        self.timer.step()


def train_gptlit(
    size: str, batch_size: int, length: int, kind: str, timer: Any, device: str = "cpu", more: Sequence[str] = ()
) -> None:
    """Run `train.py fit` with its own Trainer, callbacks and logger; "recompute" adds activation checkpointing."""
    from tempfile import mkdtemp

    TimerCallback.timer = timer
    folder = mkdtemp()
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 2_000_000).astype("<u2")
    ids.tofile(os.path.join(folder, "train.bin"))
    emb_dim, n_heads, n_layers = SIZES[size]
    from gptlit.training.cli import main

    flags = [f"--model.config.emb_dim={emb_dim}", f"--model.config.n_heads={n_heads}", "--model.config.drop_rate=0"]
    flags += [f"--model.config.n_layers={n_layers}", f"--model.config.context_length={length}"]
    flags += ["--model.config.qkv_bias=true", "--model.config.tie_weights=true", "--model.config.init=gpt2"]
    flags += ["--model.compile=true", f"--trainer.precision={tuned_precision(device)}"] if kind != "shipped" else []
    flags += ["--model.activation_checkpointing=true"] if kind == "recompute" else []
    flags += [f"--data.source={folder}", "--data.val_fraction=0", f"--data.batch_size={batch_size}"]
    accelerator = "gpu" if device == "cuda" else device
    flags += [f"--trainer.accelerator={accelerator}", "--trainer.devices=1"]
    flags += ["--trainer.max_steps=100000", "--trainer.gradient_clip_val=1"]
    flags += [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
    flags += ["--run.save_every_n_steps=1000000", "--trainer.callbacks+=benchmarks.peers.TimerCallback"]
    main(["fit", *flags, *more])
