"""Compare settings over several seeds: mean and spread of the last val/loss, as a table and a picture.

    python examples/compare_seeds.py runs/muon runs/adamw --out seeds.png

Each folder holds the runs of one setting, version_0, version_1, ..., which differ in nothing but their seed.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gptlit.checkpoint.runs import run_folders
from gptlit.commands.plot import Run, differences, picture_path, read_run
from gptlit.errors import InputError, fail, user_path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Mean and spread of val/loss over seeds.", allow_abbrev=False)
    found.error = partial(fail, status=2)
    found.add_argument("folders", nargs="+", metavar="RUN", help="a folder runs/<name>, with a run for each seed")
    found.add_argument("--out", required=True, help="the picture to write: .png, .svg or .pdf")
    return found


def read_seeds(folder: str) -> list[Run]:
    """Read the runs of one setting.

    Raises:
        InputError: There are fewer than two, or they cannot be averaged.
    """
    path = user_path(folder)
    versions = run_folders(path.parent, path.name)
    if len(versions) < 2:
        raise InputError(f"{folder} has {len(versions)} runs: train at least 2, with different --seed_everything")
    runs = [read_run(str(version)) for version in versions]
    differing = differences(runs)
    if others := sorted(set(differing) - {"seed_everything"}):
        raise InputError(f"the runs of {folder} differ in {', '.join(others)}: only seed_everything may differ")
    if len(set(differing.get("seed_everything", []))) < len(runs):
        raise InputError(f"two runs of {folder} have the same seed_everything: they are one run, delete the copy")
    if any("val" not in run.curves for run in runs):
        raise InputError(f"a run of {folder} has no val/loss yet: let it go on")
    if len({tuple(run.curves["val"].steps) for run in runs}) > 1:
        raise InputError(f"the runs of {folder} have val/loss at different steps: let all of them reach their end")
    return runs


def losses(runs: list[Run]) -> np.ndarray:
    """Return the validation losses (seeds, validations)."""
    return np.array([run.curves["val"].values for run in runs])


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and sample standard deviation over the seeds."""
    return values.mean(0), values.std(0, ddof=1)


def table(settings: dict[str, list[Run]]) -> Table:
    """Return a row for each setting; differences are those of the means, with their standard error."""
    columns = ("run", "seeds", "val/loss, mean", "standard deviation", "lowest", "highest", "difference to the first")
    found = Table(*columns, box=None)
    ends = {name: losses(runs)[:, -1] for name, runs in settings.items()}
    first = next(iter(ends.values()))
    for name, last in ends.items():
        mean, spread = mean_and_spread(last)
        cells = [f"{value:.4f}" for value in (mean, spread, last.min(), last.max())]
        if last is not first:
            error = (last.var(ddof=1) / len(last) + first.var(ddof=1) / len(first)) ** 0.5
            cells.append(f"{mean - first.mean():+.4f} ± {error:.4f}")
        found.add_row(name, str(len(last)), *cells)
    return found


def draw(settings: dict[str, list[Run]], path: Path) -> None:
    """Draw mean and standard deviation by tokens, and the last loss of each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(2, 1))
    for number, (name, runs) in enumerate(settings.items()):
        color, tokens, values = f"C{number}", runs[0].curves["val"].tokens / 1e6, losses(runs)
        mean, spread = mean_and_spread(values)
        curves.plot(tokens, mean, "-o", color=color, markersize=3, label=f"{name}, {len(runs)} seeds")
        curves.fill_between(tokens, mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0)
        ends.plot(np.full(len(runs), number), values[:, -1], "o", color=color, alpha=0.5)
        ends.errorbar(number + 0.2, mean[-1], spread[-1], fmt="_", color=color, capsize=4, markersize=12)
    curves.set(xlabel="million tokens", ylabel="val/loss, nats per token: mean, standard deviation")
    curves.legend(frameon=False)
    ends.set(xticks=range(len(settings)), xticklabels=settings, xlim=(-0.5, len(settings)))
    ends.set_ylabel("last val/loss of each seed")
    for axes in (curves, ends):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parser().parse_args()
    path = picture_path(args.out)
    settings = {str(Path(folder)): read_seeds(folder) for folder in args.folders}
    Console(width=None if Console().is_terminal else 160).print(table(settings))
    draw(settings, path)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        fail(error)
