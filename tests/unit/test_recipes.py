"""The scripts of docs/recipes.md on made-up curves; tests/e2e/test_recipes.py runs the page's commands."""

import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from conftest import ROOT
from gptlit.commands.main import main


def write_run(folder: Path, losses: Sequence[float], **settings: Any) -> None:
    """Write what a fit leaves: validations at steps 10, 20, ..., of 1,000 tokens each, and the configuration."""
    writer = SummaryWriter(str(folder))
    for step, loss in enumerate(losses, start=1):
        writer.add_scalar("val/loss", loss, 10 * step)
        writer.add_scalar("train/tokens", 10_000 * step, 10 * step)
    writer.close()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a script of examples/ as __main__ with arguments."""

    def run(name: str, *args: str) -> dict[str, Any]:
        path = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *args])
        return runpy.run_path(str(path), run_name="__main__")

    return run


def refusal(script: Callable[..., Any], capsys: pytest.CaptureFixture[str], *args: str) -> tuple[Any, str]:
    """Return the status and the one line of a script that refuses its input."""
    with pytest.raises(SystemExit) as exit_:
        script(*args)
    (line,) = capsys.readouterr().err.splitlines()
    return exit_.value.code, line


# --- compare_seeds ---


def write_seeds(name: str, ends: Sequence[float]) -> None:
    for seed, end in enumerate(ends):
        write_run(Path(f"runs/{name}/version_{seed}"), [6.0, end], seed_everything=seed, model={"lr": 1e-3})


def test_means_spreads_and_their_difference(
    script: Callable[..., Any], capsys: pytest.CaptureFixture[str], pixels: Callable[[str], set[str]]
) -> None:
    write_seeds("a", [5.0, 5.1, 5.2])
    write_seeds("b", [4.7, 4.9])
    script("compare_seeds", "runs/a", "runs/b", "--out", "seeds.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "runs/" in line]
    assert rows[0] == "runs/a 3 5.1000 0.1000 5.0000 5.2000".split()
    error = (0.1**2 / 3 + 0.02 / 2) ** 0.5
    assert rows[1] == f"runs/b 2 4.8000 0.1414 4.7000 4.9000 -0.3000 ± {error:.4f}".split()
    assert {"C0", "C1"} <= pixels("seeds.png")


@pytest.fixture
def pixels() -> Callable[[str], set[str]]:
    """The colors of matplotlib's cycle, C0 to C3, that a picture shows."""
    colors = pytest.importorskip("matplotlib.colors")
    image = pytest.importorskip("matplotlib.image")

    def found(path: str) -> set[str]:
        rgb = image.imread(path)[..., :3].reshape(-1, 3)
        names = ("C0", "C1", "C2", "C3")
        return {name for name in names if (abs(rgb - colors.to_rgb(name)).max(1) < 0.01).sum() > 20}

    return found


@pytest.mark.parametrize(
    ("words", "args", "status"),
    [
        ("runs/nowhere has 0 runs", ["runs/nowhere", "--out", "x.png"], 1),
        ("must end in .png, .svg or .pdf", ["runs/a", "--out", "x.gif"], 1),
        ("in an existing folder", ["runs/a", "--out", "nowhere/x.png"], 1),
        ("differ in model.lr", ["runs/settings", "--out", "x.png"], 1),
        ("have the same seed_everything", ["runs/copies", "--out", "x.png"], 1),
        ("at different steps", ["runs/unfinished", "--out", "x.png"], 1),
        ("required: --out", ["runs/a"], 2),
        ("unrecognized arguments: --bins", ["runs/a", "--out", "x.png", "--bins", "3"], 2),
    ],
)
def test_runs_that_cannot_be_averaged(
    script: Callable[..., Any], capsys: pytest.CaptureFixture[str], words: str, args: list[str], status: int
) -> None:
    write_seeds("a", [5.0, 5.1])
    for version in (0, 1):
        write_run(Path(f"runs/settings/version_{version}"), [6.0], seed_everything=version, model={"lr": version})
        write_run(Path(f"runs/copies/version_{version}"), [6.0], seed_everything=1)
        write_run(Path(f"runs/unfinished/version_{version}"), [6.0] * (1 + version), seed_everything=version)
    assert refusal(script, capsys, "compare_seeds", *args)[0] == status
    assert not Path("x.png").exists()


def test_a_missing_package_is_named_before_the_work(
    script: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchmetrics  # noqa: F401  # imports matplotlib itself, where it is installed

    for package, *args in (
        ("matplotlib", "scaling_law", "--out", "x.png"),
        ("matplotlib", "compare_seeds", "runs/a", "--out", "x.png"),
        ("optuna", "sweep"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        status, line = refusal(script, capsys, *args)
        assert status == 1
        assert f"needs the package {package}: pip install {package}" in line
    assert not Path("runs").exists()


# --- sweep ---


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The flags of each `fit` that a sweep starts; the loss is lowest at the largest rate, and trial 1 diverges."""
    pytest.importorskip("optuna")
    started: list[dict[str, str]] = []

    def fit(command: list[str], **_: Any) -> SimpleNamespace:
        flags = dict(word.removeprefix("--").split("=") for word in command[4:])
        started.append(flags)
        if "model.typo" in flags:
            return SimpleNamespace(returncode=2)
        if flags["run.name"] == "trial-1":
            return SimpleNamespace(returncode=1)
        folder = Path(flags["trainer.default_root_dir"], flags["run.name"], "version_0")
        write_run(folder, [7.0, 6 - 10 * float(flags["model.lr"])])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", fit)
    return started


def test_a_sweep_goes_on_and_names_the_best(
    script: Callable[..., Any], fits: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    script("sweep", "--name=s", "--trials=3", "--trainer.max_steps=5")
    assert [flags["run.name"] for flags in fits] == ["trial-0", "trial-1", "trial-2"]
    script("sweep", "--name=s", "--trials=5", "--trainer.max_steps=5")
    assert [flags["run.name"] for flags in fits[3:]] == ["trial-3", "trial-4"]
    assert all(flags["trainer.max_steps"] == "5" for flags in fits)
    assert len({flags["model.lr"] for flags in fits}) == 5
    best = max((flags for flags in fits if flags["run.name"] != "trial-1"), key=lambda flags: float(flags["model.lr"]))
    _, first, *_, last = capsys.readouterr().out.splitlines()[-6:]  # header, four trials, the flags of the best
    assert first.split()[:2] == [f"runs/s/{best['run.name']}", f"{6 - 10 * float(best['model.lr']):.4f}"]
    assert f"--model.lr={best['model.lr']}" in last


def test_a_sweep_ends_at_once_where_fit_refuses_its_arguments(
    script: Callable[..., Any], fits: list[dict[str, str]]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        script("sweep", "--trials=3", "--model.typo=1")
    assert exit_.value.code == 2
    assert len(fits) == 1
    script("sweep", "--trials=3")
    assert len(fits) == 4, "the refused call is no trial"


# --- scaling_law ---


def test_the_law_is_recovered() -> None:
    law = runpy.run_path(str(ROOT / "examples" / "scaling_law.py"))
    flops = np.array([1e12, 1e13, 5e13, 2e14])
    exact = law["PowerLaw"].fit(flops, 50 * flops**-0.07)
    assert exact.exponent == pytest.approx(0.07)
    assert exact.error == pytest.approx(0, abs=1e-6)
    assert exact(np.array([1e15])) == pytest.approx(50 * 1e15**-0.07)
    noisy = law["PowerLaw"].fit(flops, 50 * flops**-0.07 * np.array([1.01, 0.99, 1.01, 0.99]))
    assert 0 < abs(noisy.exponent - 0.07) < 3 * noisy.error


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("'2by48' is not LAYERSxWIDTH", ["--sizes", "2by48"]),
        ("'2x40' is not LAYERSxWIDTH with a width that 16 divides", ["--sizes", "2x40"]),
        ("--sizes must name at least 3 sizes", ["--sizes", "1x16", "2x16", "1x16"]),
        ("--tokens_per_parameter must be a positive number, got nan", ["--tokens_per_parameter", "nan"]),
        ("--name must consist of letters, digits, - and _", ["--name", "a/b"]),
    ],
)
def test_wrong_values_of_a_series(
    script: Callable[..., Any], capsys: pytest.CaptureFixture[str], words: str, args: list[str]
) -> None:
    pytest.importorskip("matplotlib")
    status, line = refusal(script, capsys, "scaling_law", "--out", "x.png", *args)
    assert (status, words in line) == (2, True), line


# --- loggers ---


@pytest.mark.parametrize(
    ("logger", "package", "command"),
    [("WandbLogger", "wandb", "fit"), ("MLFlowLogger", "mlflow", "fit"), ("WandbLogger", "wandb", "plan")],
)
def test_a_logger_without_its_package(
    fit: Callable[..., None], capsys: pytest.CaptureFixture[str], logger: str, package: str, command: str
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    run = fit if command == "fit" else lambda *flags: main([command, *flags])
    with pytest.raises(SystemExit) as exit_:
        run("--trainer.max_steps=1", "--trainer.precision=32-true", f"--trainer.logger={logger}")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: lightning.pytorch.loggers.{logger} needs a package: pip install '{package}>=")
    assert not Path("runs").exists()
