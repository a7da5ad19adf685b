"""docs/reproduce-gpt2.md: the figures of `plan`, and the whole way from text to Transformers at toy size."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import ROOT, commands, losses, run_script
from gptlit import load_pretrained
from gptlit.commands.main import main

PAGE = ROOT / "docs" / "reproduce-gpt2.md"
RECIPE = Path("configs/gpt2-124m.yaml")
TOY: dict[str, dict[str, Any]] = {
    "model": {"compile": False, "warmup_steps": 1},
    "data": {"batch_size": 8, "micro_batch_size": 4},
    "trainer": {"accelerator": "cpu", "log_every_n_steps": 1},
    "run": {"val_every_n_steps": 2, "save_every_n_steps": 2},
}
ARCHITECTURE = {"context_length": 16, "emb_dim": 32, "n_heads": 2, "n_layers": 2}
HERE = {  # instead of what would be downloaded, and of 8 GPUs
    "fineweb-edu-sample": "texts",
    "hf:HuggingFaceFW/fineweb/sample/10BT": "texts",
    "hf:gpt2": "rehearsal",
    "--nproc_per_node 8": "--nproc_per_node 2",
}


def test_the_figures_are_those_of_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    plans = [words[3:] for words in commands(PAGE) if words[3:4] == ["plan"] and "--measure" not in words]
    assert [words[-1] for words in plans] == ["1", "8"]
    for words in plans:
        main(words)
    shown = re.sub(r" of [\d.,]+ GB(?= on each)|; [\d.,]+ GB free", "", capsys.readouterr().out)  # of this machine
    one, eight = re.split(r"(?=model )", shown)[1:]
    for line in one.splitlines():
        assert line.startswith("data ") or line in PAGE.read_text(), line
    assert eight == one.replace("1 x cuda", "8 x cuda").replace("over 16 micro-batches", "over 2 micro-batches")


@pytest.mark.nightly
def test_the_pages_commands_run_in_their_order(text: str) -> None:
    """The fit ends early, for the next one to resume it, and that one for two processes."""
    _write_inputs(text)
    steps = iter([2, 4, 6])
    ran = 0
    for words in commands(PAGE):
        line = shlex.join(words)
        for there, here in HERE.items():
            line = line.replace(there, here)
        _, *args = shlex.split(line)
        if words[0] == "torchrun":
            args = ["-m", "torch.distributed.run", *args]
        if "fit" in args:
            args.append(f"--trainer.max_steps={2 if 'rehearsal' in args else next(steps)}")
        done = run_script(*args, cwd=Path(), timeout=1200)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        ran += 1
    assert ran == 16
    assert list(losses(Path("runs/gpt2-124m/version_0"))) == [1, 2, 3, 4, 5, 6]
    _check_export()


def _write_inputs(text: str) -> None:
    """Write texts, train.py, and the recipe with toy values."""
    words = text.split()
    Path("texts").mkdir()
    for n in range(20):
        Path(f"texts/{n}.txt").write_text(" ".join(words[200 * n : 200 * (n + 1)]))
    Path("train.py").write_text((ROOT / "train.py").read_text())
    recipe = yaml.safe_load((ROOT / RECIPE).read_text())
    for group, values in TOY.items():
        recipe[group] |= values
    recipe["model"]["config"] |= ARCHITECTURE
    RECIPE.parent.mkdir()
    RECIPE.write_text(yaml.dump(recipe))


def _check_export() -> None:
    """The exported folder is what Transformers loads, with the run's weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained("my-gpt2")("the model learns", return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained("my-gpt2").eval()
    ours = load_pretrained("runs/gpt2-124m").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)
