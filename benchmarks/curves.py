"""Training curves: the time to a given loss, and whether the optimizations change the losses."""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.contenders import machine, read_curve
from benchmarks.peers import PADDED_VOCAB_SIZE, check_peers, tuned_precision

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 6, 128, 8  # as in the quickstart


# --- time to a loss ---------------------------------------------------------------------------------------------------


def time_to_loss(
    nanogpt: str, steps: int = 1600, our_steps: int = 1000, seeds: int = 3, out: str = "time_to_loss.json"
) -> None:
    """Compare the time of nanoGPT's recipe with the time that the quickstart's needs for the same validation loss.

    Same corpus, model, tokens per step and validation split; both compiled, in bf16 if it is native. nanoGPT's recipe
    is that of its small models (fused AdamW, betas 0.9 and 0.99, 100 warmup steps, cosine decay to a tenth), at the
    better one of two learning rates. Only training steps are timed, without the first one, which compiles.

    Args:
        nanogpt: Folder of a clone of nanoGPT.
        steps: Steps of nanoGPT's run.
        our_steps: Steps of gptlit's run.
        seeds: Runs of each; the median of the paired ratios is printed.
        out: JSON file for the results.
    """
    check_peers(["nanogpt"], nanogpt)
    rates = {lr: train("nanogpt", folder=nanogpt, steps=steps, lr=lr, seed=0) for lr in (1e-3, 3e-3)}
    lr = min(rates, key=lambda rate: rates[rate][-1][1])
    runs = []
    table = Table("seed", "nanoGPT's last loss", "its seconds", "seconds to the same loss", "ratio", "last loss")
    for seed in track(range(seeds), "seeds"):
        theirs, target = (train("nanogpt", folder=nanogpt, steps=steps, lr=lr, seed=seed) if seed else rates[lr])[-1]
        points = train("gptlit", steps=our_steps, seed=seed)
        ours = next((seconds for seconds, loss in points if loss <= target), math.inf)
        runs.append({"loss": target, "nanogpt": theirs, "gptlit": ours, "ratio": ours / theirs, "points": points})
        table.add_row(
            f"{seed}", f"{target:.4f}", f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}", f"{points[-1][1]:.4f}"
        )
    Console().print(table)
    ratio = statistics.median(run["ratio"] for run in runs)
    found = {f"{rate:g}": points[-1][1] for rate, points in rates.items()}
    missed = sum(math.isinf(run["gptlit"]) for run in runs)
    print(f"median ratio {ratio:.2f}, {missed} not reached; nanoGPT's last loss by learning rate: {found}")
    values = {"machine": machine(), "learning rates": found, "runs": runs, "median ratio": ratio}
    Path(out).write_text(json.dumps(values, indent=1) + "\n")


def train(name: str, **options: Any) -> list[tuple[float, float]]:
    """Train in a separate process; return the seconds and the loss of each validation."""
    command = [sys.executable, "-m", "benchmarks.curves", name, json.dumps(options)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    return [tuple(json.loads(line)) for line in output.splitlines() if line.startswith("[")]


class Clock(pl.Callback):
    """Prints the training seconds since the first step, and val/loss, after each validation."""

    def __init__(self) -> None:
        self.seconds, self.began = 0.0, math.inf

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start after the first step, which compiles."""
        if trainer.global_step == 1:
            self.began = time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        """Pause."""
        self.seconds += time.perf_counter() - self.began

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Print and continue."""
        print(json.dumps([self.seconds, float(trainer.callback_metrics["val/loss"])]), flush=True)
        self.began = time.perf_counter()


def train_gptlit(steps: int, seed: int) -> None:
    """Train the quickstart, compiled, without text samples and checkpoints."""
    from gptlit.training.cli import main

    flags = [f"--seed_everything={seed}", f"--trainer.max_steps={steps}", "--run.val_every_n_steps=50"]
    flags += ["--run.sample_prompt=", "--model.compile=true", f"--trainer.precision={tuned_precision('cpu')}"]
    flags += ["--trainer.enable_checkpointing=false", "--trainer.callbacks+=benchmarks.curves.Clock"]
    with tempfile.TemporaryDirectory() as folder:
        main(["fit", f"--config={QUICKSTART}", f"--trainer.default_root_dir={folder}", *flags])


def train_nanogpt(folder: str, steps: int, lr: float, seed: int) -> None:
    """Train nanoGPT's model with its recipe, sampling windows with replacement."""
    import torch

    from benchmarks.contenders import keep_freed_memory
    from gptlit.data.datamodule import TokenDataModule
    from gptlit.training.optimizer import Schedule

    keep_freed_memory()
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    datamodule = TokenDataModule("python-docs", batch_size=BATCH, val_fraction=0.05)
    datamodule.context_length = LENGTH
    datamodule.load("fit")
    ids = torch.from_numpy(
        np.concatenate([s.ids for s in datamodule.run_data.on_disk.shards("train")]).astype(np.int64)
    )
    torch.manual_seed(seed)
    model = GPT(GPTConfig(LENGTH, PADDED_VOCAB_SIZE, LAYERS, HEADS, WIDTH, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, lr, (0.9, 0.99), "cuda" if torch.cuda.is_available() else "cpu")
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    schedule = Schedule("cosine", lr / 100, lr, lr / 10, 100)
    compiled = torch.compile(model)
    seconds = 0.0
    for step in range(steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step, steps)
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        inputs = torch.stack([ids[start : start + LENGTH] for start in starts])
        targets = torch.stack([ids[start + 1 : start + 1 + LENGTH] for start in starts])
        with autocast():
            _, loss = compiled(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began if step else 0
    print(json.dumps([seconds, mean_loss(model, datamodule.val_dataloader())]), flush=True)


def autocast() -> Any:
    """Return the autocast of a tuned step: bf16 where it is native."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=tuned_precision("cpu") == "bf16-mixed")


def mean_loss(model: Any, batches: Any) -> float:
    """Return nanoGPT's mean loss per token over all validation windows."""
    import torch
    import torch.nn.functional as F

    total, count = 0.0, 0
    with torch.no_grad(), autocast():
        for inputs, targets in batches:
            logits, _ = model(inputs, targets.clamp(min=0))
            total += float(F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum"))
            count += int((targets >= 0).sum())
    return total / count


# --- numerical agreement ---------------------------------------------------------------------------------------------

# Without optimizations: float32, not compiled, torch's cross-entropy on the full logits.
PLAIN = """
from gptlit.model.loss import next_token_loss
from gptlit.training import cli
from gptlit.training.module import GPTModule

GPTModule._loss = lambda self, inputs, targets, reduction: next_token_loss(self.model(inputs), targets, reduction)
cli.main()
"""
OPTIMIZED = "from gptlit.training.cli import main; main()"


def numerics(steps: int = 200, out: str = "numerics.json") -> None:
    """Compare the losses with all optimizations and in plain float32, for the same seed and data.

    The optimizations are the fused loss, torch.compile, and bf16 where it is native.

    Args:
        steps: Steps of both runs: 6 layers, width 384, 4 x 256 tokens of Python's documentation, AdamW.
        out: JSON file for the curves.
    """
    curves = {}
    plain = ["--trainer.precision=32-true", "--model.compile=false"]
    optimized = [f"--trainer.precision={tuned_precision('cpu')}", "--model.compile=true"]
    for name, script, flags in (("plain", PLAIN, plain), ("optimized", OPTIMIZED, optimized)):
        curves[name] = losses(script, steps, flags)
    both = list(zip(curves["plain"], curves["optimized"], strict=True))
    differences = [abs(b / a - 1) for a, b in both]
    last = [statistics.mean(curve[-20:]) for curve in curves.values()]
    table = Table("step", *curves, "difference")
    for step in sorted({1, steps // 4, steps // 2, 3 * steps // 4, steps}):
        table.add_row(
            f"{step}", *(f"{curve[step - 1]:.4f}" for curve in curves.values()), f"{differences[step - 1]:.3%}"
        )
    table.add_row("mean of the last 20", *(f"{loss:.4f}" for loss in last), f"{abs(last[1] / last[0] - 1):.3%}")
    table.add_row("largest", "", "", f"{max(differences):.3%}")
    Console().print(table)
    Path(out).write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n")


def losses(script: str, steps: int, flags: list[str]) -> list[float]:
    """Return train/loss of each step."""
    shape = {"emb_dim": 384, "n_heads": 6, "n_layers": 6, "context_length": 256}
    words = [f"--model.config.{key}={value}" for key, value in shape.items()]
    words += ["--model.optimizer=adamw", "--model.lr=1e-3", "--data.batch_size=4", "--trainer.log_every_n_steps=1"]
    words += [f"--trainer.max_steps={steps}", f"--run.val_every_n_steps={steps}", "--run.sample_prompt="]
    with tempfile.TemporaryDirectory() as folder:
        words += [f"--trainer.default_root_dir={folder}", "--trainer.enable_checkpointing=false"]
        command = [sys.executable, "-c", script, "fit", f"--config={QUICKSTART}", *words, *flags]
        subprocess.run(command, check=True, cwd=ROOT)
        return list(read_curve(next(Path(folder).glob("*/version_0")), "train/loss").values())


if __name__ == "__main__":
    {"gptlit": train_gptlit, "nanogpt": train_nanogpt}[sys.argv[1]](**json.loads(sys.argv[2]))
