"""docs/recipes.md: the blocks of each section run in a shell, at toy size, and print and draw what they should."""

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT, code_blocks, losses
from gptlit import GPTConfig, GPTModel

pytestmark = pytest.mark.nightly
image = pytest.importorskip("matplotlib.image")

TOY = {
    "model": {"config": {"context_length": 16, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "tie_weights": True}},
    "data": {"batch_size": 4, "val_fraction": 0.1},
    "trainer": {"max_steps": 8, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 3},
    "run": {"name": "quickstart", "val_every_n_steps": 4, "sample_prompt": ""},
}
SMALLER = {  # flags of the page that decide how long it takes
    r"--trials 20": "--trials 3",
    r"--trainer.max_steps 200": "--trainer.max_steps 6",
    r"--name scaling": "--name scaling --sizes 1x16 1x32 2x32 --tokens_per_parameter 0.2",
}


@pytest.fixture
def recipe(text_file: Path, words_json: Path) -> Callable[[str], str]:
    """Run the blocks of a section in a checkout whose quickstart is a toy; return what they print."""
    for name in ("train.py", "examples"):
        Path(name).symlink_to(ROOT / name)
    toy = {**TOY, "data": {**TOY["data"], "source": str(text_file), "tokenizer": str(words_json)}}
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text(yaml.safe_dump(toy))
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("the page is written for a POSIX shell")

    def run(section: str) -> str:
        (text,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", (ROOT / "docs/recipes.md").read_text(), re.M | re.S)
        commands = "\n".join(block for kind, block in code_blocks(text) if not kind)
        for flag, smaller in SMALLER.items():
            commands = commands.replace(flag, smaller)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([shell, "-euc", commands], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    return run


def rows(printed: str, start: str) -> list[list[str]]:
    """Return the cells of a table's rows that begin with `start`."""
    return [line.split() for line in printed.splitlines() if line.split()[:1] and line.split()[0].startswith(start)]


def is_drawn(path: str) -> bool:
    """Whether a picture is neither blank nor a single color."""
    pixels = image.imread(path)[..., :3]
    inked = (pixels.min(-1) < 0.9).mean()
    colors = len({tuple(pixel) for pixel in (pixels[::3, ::3] * 8).round().reshape(-1, 3).tolist()})
    return 0.005 < inked < 0.5 and colors > 5


def test_two_settings_over_three_seeds(recipe: Callable[[str], str]) -> None:
    printed = recipe("Compare two settings over three seeds")
    for (name, seeds, mean, spread, *_), run in zip(rows(printed, "runs/"), ("muon", "adamw"), strict=True):
        ends = [losses(Path(f"runs/{run}/version_{n}"), "val/loss")[8] for n in range(3)]
        assert (name, seeds) == (f"runs/{run}", "3")
        assert len(set(ends)) == 3, "the seed changes the weights"
        assert float(mean) == pytest.approx(statistics.mean(ends), abs=1e-4)
        assert float(spread) == pytest.approx(statistics.stdev(ends), abs=1e-4)
    assert is_drawn("seeds.png")


def test_a_sweep(recipe: Callable[[str], str]) -> None:
    pytest.importorskip("optuna")
    printed = recipe("Search settings with Optuna")
    ends = {f"runs/sweep/trial-{n}": losses(Path(f"runs/sweep/trial-{n}/version_0"), "val/loss")[6] for n in range(3)}
    table = rows(printed, "runs/sweep/")
    assert [row[0] for row in table] == sorted(ends, key=ends.__getitem__)
    assert float(table[0][1]) == pytest.approx(min(ends.values()), abs=1e-4)
    assert "test/loss" in printed


def test_a_scaling_law(recipe: Callable[[str], str]) -> None:
    printed = recipe("Fit a scaling law")
    points = []
    for layers, width in ((1, 16), (1, 32), (2, 32)):
        (row,) = rows(printed, f"{layers}x{width}")
        run = Path(f"runs/scaling/{layers}x{width}/version_0")
        curve = losses(run, "val/loss")
        steps = math.ceil(0.2 * int(row[1].replace(",", "")) / 64)
        assert max(curve) == steps
        config = yaml.safe_load((run / "config.yaml").read_text())["model"]["config"]
        with torch.device("meta"):
            model = GPTModel(GPTConfig(**{**config, "vocab_size": 1024}))
        n = sum(p.numel() for p in model.parameters()) - 16 * width  # positions are no matrix product
        flops = 64 * steps * (6 * n + 12 * layers * width * 16)
        assert float(row[3]) == pytest.approx(flops, rel=0.01)
        assert float(row[4]) == pytest.approx(curve[steps], abs=1e-4)
        points.append((math.log(flops), math.log(curve[steps])))
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    assert float(rows(printed, "exponent")[0][1]) == pytest.approx(-slope, abs=2e-4)
    assert is_drawn("scaling.png")
    Path("tokenizer.json").unlink()
    assert recipe("Fit a scaling law").splitlines()[-6:] == printed.splitlines()[-6:], "finished runs are kept"


def test_another_block(recipe: Callable[[str], str]) -> None:
    printed = recipe("Swap the block")
    assert "Return the" in printed
    assert losses(Path("runs/gpt2-block/version_0")) != losses(Path("runs/modern/version_0"))
    assert is_drawn("blocks.png")
