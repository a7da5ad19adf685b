"""`gptlit plot`: the losses of one or several runs as a picture, and how their settings differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptlit.errors import InputError, needs, user_path

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

NOT_SETTINGS = ("run.name", "ckpt_path", "trainer.default_root_dir", "trainer.logger", "trainer.callbacks")


def plot(
    run: Annotated[list[str], typer.Argument(help="Folders: runs/<name>/version_<n>, or runs/<name> for its newest.")],
    out: Annotated[str, typer.Option(help="The picture to write: .png, .svg or .pdf.")],
) -> None:
    """Draw the losses of runs by tokens and by time. Prints how their settings differ."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    path = picture_path(out)
    runs = [read_run(folder) for folder in run]
    draw(runs).savefig(path, dpi=150)
    console = Console(width=None if Console().is_terminal else 160)
    table = Table("run", "best val/loss", "at step", "train/loss, smoothed", "tokens", "minutes", box=None)
    for one in runs:
        table.add_row(*summary(one))
    console.print(table)
    if differing := differences(runs):
        table = Table("setting", *(one.name for one in runs), box=None)
        for name, values in differing.items():
            table.add_row(name, *(Text(str(value)) for value in values))
        console.print(table)
    print(out)


def picture_path(out: str) -> Path:
    """Return the path of a picture to write.

    Raises:
        InputError: No picture can be written there, or matplotlib is missing.
    """
    path = user_path(out)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise InputError(f"--out {out!r} must end in .png, .svg or .pdf, in an existing folder")
    with needs("matplotlib", "a picture"):
        import matplotlib  # noqa: F401
    return path


@dataclass
class Curve:
    """Points of a loss: optimizer steps, tokens and seconds of training since the run began, and values."""

    steps: "np.ndarray"
    tokens: "np.ndarray"
    seconds: "np.ndarray"
    values: "np.ndarray"

    @property
    def best(self) -> int:
        """Index of the lowest finite value."""
        import numpy as np

        return int(np.where(np.isfinite(self.values), self.values, np.inf).argmin())


@dataclass
class Run:
    """A run's folder, its curves ("train", "val"), and the settings of its newest configuration by dotted name."""

    folder: Path
    curves: dict[str, Curve]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """<name>/version_<n>."""
        return "/".join(self.folder.resolve().parts[-2:])


def read_run(folder: str) -> Run:
    """Read a run: .../version_<n>, or the folder above it for its newest.

    Raises:
        InputError: There are no curves.
    """
    from gptlit.checkpoint.runs import run_folders

    path = user_path(folder)
    if not _has_events(path):
        path = next(filter(_has_events, reversed(run_folders(path.parent, path.name))), path)
    if not _has_events(path):
        raise InputError(f"{folder} has no event files: name a run's folder, runs/quickstart for example")
    curves = dict(_curves(path))
    if not curves:
        raise InputError(f"{path} has no train/loss and no val/loss yet: let the run go on")
    return Run(path, curves, _settings(path))


def _has_events(folder: Path) -> bool:
    return any(folder.glob("events.out.tfevents.*"))


def _curves(run: Path) -> Iterator[tuple[str, Curve]]:
    """Read the losses, and the tokens seen at their steps from train/tokens."""
    import numpy as np

    scalars = _scalars(run)
    seen = {0: 0.0, **{event.step: event.value for event in scalars.get("train/tokens", [])}}
    last, end = max(seen), max((events[-1].step for events in scalars.values()), default=0)
    seen[end] = seen[last] * end / max(1, last)  # the last steps may come after the last log point
    # Each fit of a run has an event file of its own; the time between two fits is not training.
    starts = sorted({float(path.name.split(".")[3]) for path in run.glob("events.out.tfevents.*")})
    times = sorted(event.wall_time for tag in ("train/loss", "val/loss") for event in scalars.get(tag, []))
    pauses = [start - max((time for time in times if time < start), default=0.0) for start in starts]
    for name in ("train", "val"):
        if events := scalars.get(f"{name}/loss", []):
            steps = [event.step for event in events]
            tokens = np.interp(steps, list(seen), list(seen.values()))
            seconds = [e.wall_time - sum(pauses[: np.searchsorted(starts, e.wall_time, "right")]) for e in events]
            yield name, Curve(*map(np.array, (steps, tokens, seconds, [event.value for event in events])))


def _scalars(folder: Path) -> dict[str, list[Any]]:
    """Return the points of each scalar; TensorBoard's reader leaves out what a resume has purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def _settings(folder: Path) -> dict[str, Any]:
    import yaml

    found = sorted(folder.glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
    return _flat(yaml.safe_load(found[-1].read_text(encoding="utf-8"))) if found else {}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {name: value for key in values for name, value in _flat(values[key], f"{prefix}.{key}".strip(".")).items()}


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, each with a value for every run."""
    names = {name: None for run in runs for name in run.settings if not name.startswith(NOT_SETTINGS)}
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def smooth(values: "np.ndarray") -> "np.ndarray":
    """Return the exponential moving average over about a 25th of the curve, bias-corrected; NaN and Inf are skipped."""
    import numpy as np

    weight = max(0.0, 1 - 25 / len(values))
    found, total, correction = [], 0.0, 0.0
    for value in values:
        if np.isfinite(value):
            total, correction = weight * total + (1 - weight) * value, weight * correction + (1 - weight)
        found.append(total / correction if correction else np.nan)
    return np.array(found)


def draw(runs: list[Run]) -> "Figure":
    """Draw the losses by tokens and by time; the best validations are marked."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    parts = figure.subplots(1, 2, sharey=True)
    for axes, along, size in zip(parts, ("tokens", "seconds"), (1e6, 60), strict=True):
        for number, run in enumerate(runs):
            _draw_run(axes, run, f"C{number}", along, size)
        axes.grid(alpha=0.25)
    parts[0].set(xlabel="million tokens", ylabel="loss, nats per token")
    parts[1].set(xlabel="minutes of training")
    # The steep beginning of a run may leave the picture.
    late = np.concatenate([curve.values[len(curve.values) // 10 :] for run in runs for curve in run.curves.values()])
    if len(late := late[np.isfinite(late)]):
        margin = 0.08 * np.ptp(late) or 0.5
        parts[0].set_ylim(late.min() - margin, late.max() + margin)
    parts[0].legend(frameon=False)
    return figure


def _draw_run(axes: Any, run: Run, color: str, along: str, size: float) -> None:
    if (train := run.curves.get("train")) is not None:
        x = getattr(train, along) / size
        axes.plot(x, train.values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(x, smooth(train.values), color=color, label=f"{run.name}, train")
    if (val := run.curves.get("val")) is not None:
        x, best = getattr(val, along) / size, val.best
        label = f"{run.name}, val, best {val.values[best]:.3f}"
        axes.plot(x, val.values, "--o", color=color, markersize=3, linewidth=1, label=label)
        axes.plot(x[best], val.values[best], "*", color=color, markersize=13)


def summary(run: Run) -> list[str]:
    """Return the name, best val/loss and its step, last train/loss (smoothed), tokens and minutes."""
    val, train = run.curves.get("val"), run.curves.get("train")
    best = ["", ""] if val is None else [f"{val.values[val.best]:.4f}", f"{val.steps[val.best]:,}"]
    last = "" if train is None else f"{smooth(train.values)[-1]:.4f}"
    tokens, seconds = (max(getattr(curve, key)[-1] for curve in run.curves.values()) for key in ("tokens", "seconds"))
    return [run.name, *best, last, f"{tokens:,.0f}", f"{seconds / 60:.1f}"]
