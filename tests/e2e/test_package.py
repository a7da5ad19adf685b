"""The wheel, without the checkout: commands, recipes by name, a fit."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT, TINY

pytest.importorskip("hatchling")


@pytest.mark.slow
def test_the_wheel_trains_and_generates_alone(tmp_path: Path, text_file: Path, words_json: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")

    def python(*args: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        command = [sys.executable, *args]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    data = [f"--data.source={text_file}", f"--data.tokenizer={words_json}", "--trainer.max_steps=3"]
    assert Path(python("-c", "import gptlit; print(gptlit.__file__)")).is_relative_to(tmp_path)
    assert "  fit  " in python("-m", "gptlit", "--help")
    python("-m", "gptlit", "fit", "--config", "quickstart", *TINY, *data, "--run.sample_prompt=")
    generated = python("-m", "gptlit", "generate", "--checkpoint=runs/t", "--prompt=the", "--max_new_tokens=3")
    assert generated.startswith("the")
