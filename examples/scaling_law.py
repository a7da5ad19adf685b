"""A scaling law: train models of several sizes, each on tokens in proportion to its parameters, and fit the power law
loss = a * compute^-b to their last val/loss.

    python examples/scaling_law.py --name scaling --out scaling.png --config configs/quickstart.yaml

Options that are not listed by --help go to `fit`, the same for all sizes. The same command continues an interrupted
series in runs/<name>.
Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models" (the power law); Hoffmann et al. 2022, "Training
Compute-Optimal Large Language Models" (Chinchilla: 20 tokens per parameter, a schedule that ends with the run).
"""

import argparse
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gptlit.checkpoint.runs import checkpoint_path, run_folders
from gptlit.commands.plot import Curve, picture_path, read_run
from gptlit.errors import InputError, fail, note

HEAD_SIZE = 16
SIZES = ("1x32", "2x32", "2x48", "3x64")


@dataclass
class Model:
    """A trained size: parameters of the blocks, tokens and FLOPs of a step, and the validation losses of its run."""

    name: str
    parameters: int
    step_tokens: int
    step_flops: float
    val: Curve

    @property
    def flops(self) -> "np.ndarray":
        """Training compute so far, at each validation."""
        return self.val.steps * self.step_flops


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Fit a scaling law over sizes of a model.", allow_abbrev=False)
    found.error = partial(fail, status=2)
    found.add_argument("--name", default="scaling", help="folder below runs/")
    found.add_argument("--out", required=True, help="the picture to write: .png, .svg or .pdf")
    found.add_argument("--sizes", nargs="+", type=size, default=[size(text) for text in SIZES], metavar="LAYERSxWIDTH")
    found.add_argument("--tokens_per_parameter", type=float, default=20.0, help="of the blocks, without embeddings")
    return found


def size(text: str) -> tuple[int, int]:
    """Parse "2x48": 2 layers of width 48."""
    layers, cross, width = text.partition("x")
    if (
        not (cross and layers.isdecimal() and width.isdecimal() and int(layers) and int(width))
        or int(width) % HEAD_SIZE
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYERSxWIDTH with a width that {HEAD_SIZE} divides")
    return int(layers), int(width)


def run_gptlit(*args: str, capture: bool = False) -> str:
    """Run a command, which reports its own errors; return what it prints, if captured."""
    done = subprocess.run(
        [sys.executable, "-m", "gptlit", *args], stdout=subprocess.PIPE if capture else None, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def train(layers: int, width: int, args: argparse.Namespace, fit_args: list[str]) -> Model:
    """Train one size, or continue its run."""
    name, folder = f"{layers}x{width}", Path("runs") / args.name
    sizes = {"n_layers": layers, "emb_dim": width, "n_heads": width // HEAD_SIZE}
    flags = [*fit_args, *(f"--model.config.{key}={value}" for key, value in sizes.items())]
    plan = json.loads(run_gptlit("plan", *flags, "--trainer.max_steps=1", "--json", capture=True))
    parameters, per_step = plan["parameters"]["trf_blocks"], plan["step"]["tokens"]
    steps = math.ceil(args.tokens_per_parameter * parameters / per_step)
    note(f"{name}: {parameters:,} parameters in the blocks, {steps:,} steps of {per_step:,} tokens")
    own = {
        "trainer.max_steps": steps,
        "trainer.default_root_dir": folder,
        "run.name": name,
        "run.val_every_n_steps": math.ceil(steps / 10),
        "ckpt_path": "last",
    }
    if not any(checkpoint_path(run, steps).is_file() for run in run_folders(folder, name)):
        run_gptlit("fit", *flags, *(f"--{key}={value}" for key, value in own.items()))
    val = read_run(str(folder / name)).curves.get("val")
    if val is None or not np.isfinite(val.values[-1]):
        raise InputError(f"{name} has no finite val/loss: raise data.val_fraction, or lower model.lr")
    return Model(name, parameters, per_step, plan["run"]["flops"], val)


@dataclass
class PowerLaw:
    """loss = exp(log_a) * compute^-exponent, and the standard error of the exponent."""

    log_a: float
    exponent: float
    error: float

    @classmethod
    def fit(cls, flops: "np.ndarray", losses: "np.ndarray") -> "PowerLaw":
        """Fit by least squares of the logarithms."""
        (slope, log_a), covariance = np.polyfit(np.log(flops), np.log(losses), 1, cov=True)
        return cls(float(log_a), -float(slope), float(covariance[0, 0] ** 0.5))

    def __call__(self, flops: "np.ndarray") -> "np.ndarray":
        return np.exp(self.log_a - self.exponent * np.log(flops))


def draw(models: list[Model], law: PowerLaw, path: Path) -> None:
    """Draw loss against compute: the curve of each run, its end, and the law up to ten times the largest compute."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, model in enumerate(models):
        color, label = f"C{number}", f"{model.name}, {model.parameters:,} parameters in the blocks"
        axes.plot(model.flops, model.val.values, "-", color=color, linewidth=1, alpha=0.6)
        axes.plot(model.flops[-1], model.val.values[-1], "o", color=color, label=label)
    ends = np.array([model.flops[-1] for model in models])
    line = np.geomspace(ends.min(), 10 * ends.max(), 50)
    label = f"loss = {math.exp(law.log_a):.3g} $C^{{-{law.exponent:.3f}}}$"
    axes.plot(line, law(line), "--", color="black", linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="training compute C, FLOPs", ylabel="val/loss, nats per token")
    lowest, highest = law(line).min(), max(model.val.values.max() for model in models)
    axes.set_yticks(np.round(np.geomspace(lowest, highest, 6), 1))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    args, fit_args = parser().parse_known_args()
    path = picture_path(args.out)
    if len(set(args.sizes)) < 3:
        fail(f"--sizes must name at least 3 sizes for a line and its error, got {len(set(args.sizes))}", status=2)
    if not 0 < args.tokens_per_parameter < math.inf:
        fail(f"--tokens_per_parameter must be a positive number, got {args.tokens_per_parameter}", status=2)
    if not re.fullmatch(r"[\w-]+", args.name):
        fail(f"--name must consist of letters, digits, - and _, got {args.name!r}", status=2)
    models = [train(*one, args, fit_args) for one in dict.fromkeys(args.sizes)]
    flops, losses = np.array([(model.flops[-1], model.val.values[-1]) for model in models]).T
    law = PowerLaw.fit(flops, losses)
    table = Table("size", "parameters", "tokens", "FLOPs", "val/loss", "fitted", box=None)
    for model, fitted in zip(models, law(flops), strict=True):
        tokens, compute = f"{model.val.steps[-1] * model.step_tokens:,}", f"{model.flops[-1]:.2e}"
        table.add_row(
            model.name, f"{model.parameters:,}", tokens, compute, f"{model.val.values[-1]:.4f}", f"{fitted:.4f}"
        )
    Console(width=None if Console().is_terminal else 160).print(table)
    print(f"exponent    {law.exponent:.4f} ± {law.error:.4f} (standard error)")
    print(f"forecast    {law(10 * flops.max()):.4f} at 10 times the largest compute")
    draw(models, law, path)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
