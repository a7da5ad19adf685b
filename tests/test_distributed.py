"""Several devices: the same numbers as on one, and the same safety."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY, losses, run_script
from gptlit.checkpoint import checkpoints, read_checkpoint

RUN = Path("runs/t/version_0")
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
# train.py, but the loss is no number where a certain word is among the targets
POISONED = """
from gptlit import module
from gptlit.data.tokenizer import load_tokenizer
from gptlit.training import main

(dragon,) = load_tokenizer().encode_ordinary(" dragon")
loss = module.next_token_loss

def poisoned(logits, targets, reduction="mean"):
    found = loss(logits, targets, reduction)
    return found * float("nan") if reduction == "mean" and (targets == dragon).any() else found

module.next_token_loss = poisoned
main()
"""


@pytest.mark.slow
def test_several_devices_go_back_together(text: str, tmp_path: Path) -> None:
    Path("words.txt").write_text(text[:4000] + " dragon " + text[4000:8000])
    Path("poisoned.py").write_text(POISONED)
    flags = ["--run.max_nonfinite_steps=1", "--run.on_nonfinite=go_back", "--run.save_every_n_steps=4"]
    fit = ["poisoned.py", "fit", *TINY, *TWO, *flags, "--data.source=words.txt", "--trainer.max_epochs=1"]
    result = run_script(*fit, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"going back to .*: windows \d+ to \d+ are passed over", result.stderr), result.stderr
    last = read_checkpoint(checkpoints(RUN)[-1])
    assert len(last["TokenDataModule"]["passed_over"]) == 1
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert json.loads((RUN / "non-finite.json").read_text())["steps"][0] in losses(RUN)


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    files = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in files for word in text.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the second process in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_either_device_stops_both_and_the_resume_is_bitwise(text_file: Path, rank: int) -> None:
    flags = ["--model.config.drop_rate=0.2", "--trainer.max_steps=60", "--run.save_every_n_steps=5", "--data.seed=3"]
    fit = [sys.executable, str(ROOT / "train.py"), "fit", *TINY, *TWO, *flags, f"--data.source={text_file}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*fit, "--run.name=whole"], env=environment, check=True, capture_output=True)
    process = subprocess.Popen(fit, env=environment, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not checkpoints(RUN) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill([process.pid, *children(process.pid)][rank], signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM after step" in said
    assert 0 < read_checkpoint(checkpoints(RUN)[-1])["global_step"] < 60
    subprocess.run([*fit, "--ckpt_path=last"], env=environment, check=True, capture_output=True)
    ours, whole = (read_checkpoint(checkpoints(Path("runs", name, "version_0"))[-1]) for name in ("t", "whole"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, ours["state_dict"][name]), name
