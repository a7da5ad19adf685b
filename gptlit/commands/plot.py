"""`gptlit plot`: the losses of one or many runs as a picture, by tokens and by time, and what differs between them."""

import math
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gptlit.errors import InputError, user_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colours that people with colour blindness tell apart. Source: Okabe and Ito 2008, "Color Universal Design".
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


SHOWN = 12  # settings that differ, in the picture


NOT_SETTINGS = ("run.name", "ckpt_path", "trainer.default_root_dir", "trainer.logger", "trainer.callbacks")


@dataclass
class Curve:
    """Points of one scalar: steps, tokens and seconds of training since the run began, and values."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Index of the lowest value that is a number."""
        return min(range(len(self.values)), key=lambda i: (not math.isfinite(self.values[i]), self.values[i]))


@dataclass
class Run:
    """A run's folder, its curves by name, and the settings of its newest configuration, by dotted name."""

    folder: Path
    curves: dict[str, Curve]
    settings: dict[str, Any]


def read_run(folder: str) -> Run:
    """Read a run: .../version_<n>, or the folder above it for its newest.

    Raises:
        InputError: There are no curves.
    """
    path = user_path(folder)
    if not _has_events(path) and path.is_dir():
        versions = [part for part in path.glob("version_*") if part.name[8:].isdigit() and _has_events(part)]
        path = max(versions, key=lambda part: int(part.name[8:]), default=path)
    if not _has_events(path):
        raise InputError(f"{folder} has no event files: name a run's folder, runs/quickstart for example")
    curves = _curves(path)
    if not curves:
        raise InputError(f"{path} has no train/loss and no val/loss yet: let the run go on")
    return Run(path, curves, _settings(path))


def _has_events(folder: Path) -> bool:
    return any(folder.glob("events.out.tfevents.*"))


def _curves(run: Path) -> dict[str, Curve]:
    """Read the losses: the logger writes each by step and, in the folder `tokens`, by tokens."""
    scalars, tokens = _scalars(run), _scalars(run / "tokens")
    names = [name for name in ("train", "val") if f"{name}/loss" in scalars]
    pauses = _pauses(run, [event.wall_time for name in names for event in scalars[f"{name}/loss"]])
    curves = {}
    for name in names:
        curve = curves[f"{name}/loss"] = Curve()
        for event, by_tokens in zip(scalars[f"{name}/loss"], tokens.get(f"loss_by_tokens/{name}", []), strict=False):
            curve.steps.append(event.step)
            curve.tokens.append(by_tokens.step)
            curve.seconds.append(event.wall_time - sum(pause for start, pause in pauses if start <= event.wall_time))
            curve.values.append(event.value)
    return {name: curve for name, curve in curves.items() if curve.values}


def _pauses(run: Path, times: list[float]) -> list[tuple[float, float]]:
    """Return when each fit of a run began, and the seconds since the last point before it (since 0 for the first)."""
    starts = sorted({float(path.name.split(".")[3]) for path in run.glob("events.out.tfevents.*")})
    return [(start, start - max((time for time in times if time < start), default=0.0)) for start in starts]


def _scalars(folder: Path) -> dict[str, list[Any]]:
    """Return the points of each scalar; TensorBoard's reader leaves out what a resume has purged."""
    if not _has_events(folder):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def _settings(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
    try:
        return _flat(yaml.safe_load(found[-1].read_text(encoding="utf-8"))) if found else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}  # the curves are worth a picture without it


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {name: value for key in values for name, value in _flat(values[key], f"{prefix}.{key}".strip(".")).items()}


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, each with a value for every run."""
    names = {name: None for run in runs for name in run.settings if not name.startswith(NOT_SETTINGS)}
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def smooth(values: list[float], weight: float | None = None) -> list[float]:
    """Return the exponential moving average, corrected for its beginning at zero; what is not finite is passed over.

    Args:
        values: The curve.
        weight: Of what came before; None: so that about a 25th of the curve is seen at once.
    """
    weight = max(0.0, 1 - 25 / len(values)) if weight is None else weight
    found, total, correction = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, correction = weight * total + (1 - weight) * value, weight * correction + (1 - weight)
        found.append(total / correction if correction else math.nan)
    return found


def draw(runs: list[Run]) -> "Figure":
    """Draw the losses by tokens and by time, the best validations marked; below them what differs.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plot needs matplotlib: pip install -c constraints.txt -e '.[plot]'") from error
    differing = differences(runs)
    rows = min(len(differing), SHOWN)
    figure = Figure(figsize=(11, 4.6 + 0.26 * (rows + 2) * (len(runs) > 1 and rows > 0)), layout="constrained")
    if len(runs) > 1 and rows:
        heights = [4.6, 0.26 * (rows + 2)]
        axes = figure.subplot_mosaic([["tokens", "seconds"], ["table", "table"]], height_ratios=heights)
        _draw_table(axes["table"], differing, runs)
    else:
        axes = figure.subplot_mosaic([["tokens", "seconds"]])
    unit, size = ("hours", 3600) if max(max(_last(run, "seconds")) for run in runs) > 7200 else ("minutes", 60)
    for run, name, colour in zip(runs, labels(runs), cycle(COLOURS), strict=False):
        _draw_run(axes["tokens"], run, name, colour, "tokens", 1e6)
        _draw_run(axes["seconds"], run, name, colour, "seconds", size)
    axes["tokens"].set(xlabel="million tokens", ylabel="loss, nats a token")
    axes["seconds"].set(xlabel=f"{unit} of training")
    for part in (axes["tokens"], axes["seconds"]):
        part.grid(alpha=0.25)
        part.spines[["top", "right"]].set_visible(False)
        part.set_ylim(*_limits(runs))
    axes["tokens"].legend(frameon=False)
    return figure


def _last(run: Run, key: str) -> list[float]:
    return [getattr(curve, key)[-1] for name, curve in run.curves.items() if name in ("train/loss", "val/loss")]


def _limits(runs: list[Run]) -> tuple[float, float]:
    """Return the range of the losses; what lies before the first tenth of a run may leave it."""
    values = [v for run in runs for name in ("train/loss", "val/loss") if name in run.curves for v in _late(run, name)]
    values = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    margin = 0.08 * (max(values) - min(values)) or 0.5
    return min(values) - margin, max(values) + margin


def _late(run: Run, name: str) -> list[float]:
    values = run.curves[name].values
    return values[len(values) // 10 :] if name == "train/loss" else values


def labels(runs: list[Run]) -> list[str]:
    """Return a short name for each run: <name>/version_<n>."""
    return [f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}" for run in runs]


def _draw_run(axes: "Axes", run: Run, name: str, colour: str, along: str, size: float) -> None:
    if (train := run.curves.get("train/loss")) is not None:
        where = [x / size for x in getattr(train, along)]
        axes.plot(where, train.values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(where, smooth(train.values), color=colour, linewidth=1.4, label=f"{name}, train")
    if (val := run.curves.get("val/loss")) is not None:
        where = [x / size for x in getattr(val, along)]
        axes.plot(where, val.values, "--o", color=colour, markersize=3, linewidth=1, label=f"{name}, val")
        best = val.best
        axes.plot(where[best], val.values[best], "*", color=colour, markersize=13, markeredgecolor="white")
        axes.annotate(
            f"{val.values[best]:.3f}",
            (where[best], val.values[best]),
            (0, -14),
            textcoords="offset points",
            ha="center",
        )


def _draw_table(axes: "Axes", differing: dict[str, list[Any]], runs: list[Run]) -> None:
    axes.axis("off")
    rows = [[name, *map(_short, values)] for name, values in list(differing.items())[:SHOWN]]
    if len(differing) > SHOWN:
        axes.set_title(f"{len(differing) - SHOWN} more settings differ", fontsize=8, loc="right")
    table = axes.table(rows, colLabels=["differs", *labels(runs)], loc="center", cellLoc="left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 32 else text[:29] + "..."


def summary(runs: list[Run]) -> list[list[str]]:
    """Return a row for each run: its name, best val/loss and where, last train/loss, minutes."""
    rows = []
    for run, name in zip(runs, labels(runs), strict=True):
        val, train = run.curves.get("val/loss"), run.curves.get("train/loss")
        best = ["", ""] if val is None else [f"{val.values[val.best]:.4f}", f"{val.steps[val.best]:,}"]
        last = "" if train is None else f"{smooth(train.values)[-1]:.4f}"
        rows.append([name, *best, last, f"{max(_last(run, 'tokens')):,}", f"{max(_last(run, 'seconds')) / 60:.1f}"])
    return rows


def run(folders: list[str], out: str) -> None:
    """Write the picture; print best losses, and the settings that differ.

    Raises:
        InputError: A folder has no curves, or `out` is no picture's name.
    """
    path = user_path(out)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {out!r} must end in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {out!r}: there is no folder {path.absolute().parent}")
    if not folders:
        raise InputError("no run is given: gptlit plot runs/quickstart --out curves.png")
    runs = [read_run(folder) for folder in folders]
    figure = draw(runs)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 160)
    table = Table("run", "best val/loss", "at step", "train/loss, smoothed", "tokens", "minutes", box=None)
    for row in summary(runs):
        table.add_row(*row)
    console.print(table)
    if differing := differences(runs) if len(runs) > 1 else {}:
        table = Table("differs", *labels(runs), box=None)
        for name, values in differing.items():
            table.add_row(name, *(Text(_short(value)) for value in values))
        console.print(table)
    print(out)
