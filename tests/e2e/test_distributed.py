"""Several devices: the same numbers as on one, and the same safety."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from conftest import ROOT, TINY, losses, run_script
from gptlit.checkpoint.io import read_checkpoint
from gptlit.checkpoint.runs import checkpoints
from gptlit.config import PRESETS
from gptlit.model.lora import LoRAConfig
from gptlit.model.sharding import local
from gptlit.training.distributed import sharded_meta_model

RUN = Path("runs/t/version_0")
FIT = [str(ROOT / "train.py"), "fit", *TINY]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FSDP2 = ["--trainer.devices=2", "--trainer.strategy=fsdp2"]
HSDP = [  # two replicas, each in two shards
    "--trainer.devices=4",
    "--trainer.strategy=gptlit.training.distributed.HSDPStrategy",
    "--trainer.strategy.shard_size=2",
]
# train.py, but the loss is no number where a certain word is among the targets
POISONED = """
from gptlit.training import module
from gptlit.data.tokenizer import load_tokenizer
from gptlit.training.cli import main

(dragon,) = load_tokenizer().encode_ordinary(" dragon")
loss = module.linear_cross_entropy

def poisoned(hidden, weight, targets, reduction, *rest):
    found = loss(hidden, weight, targets, reduction, *rest)
    return found * float("nan") if reduction == "mean" and (targets == dragon).any() else found

module.linear_cross_entropy = poisoned
main()
"""


# train.py, but a run in shards fails unless every parameter is one
ALL_SHARDED = """
from torch.distributed.tensor import DTensor
from gptlit.training.cli import main
from gptlit.training.module import GPTModule

start = GPTModule.on_train_start
def sharded(self):
    assert all(isinstance(parameter, DTensor) for parameter in self.parameters())
    start(self)
if any("fsdp2" in word for word in __import__("sys").argv):
    GPTModule.on_train_start = sharded
main()
"""


def test_two_devices_give_the_curve_of_one(
    fit: Callable[..., None], words_json: Path, text_file: Path, tmp_path: Path
) -> None:
    """An odd number of validation windows, so that one device gets padding."""
    Path("fit.py").write_text(ALL_SHARDED)
    common = ["--trainer.max_steps=8", "--run.val_every_n_steps=4", "--data.micro_batch_size=2", "--data.batch_size=8"]
    common += ["--trainer.gradient_clip_val=0.5"]
    fit(*common)
    common += [f"--data.source={text_file}", f"--data.tokenizer={words_json}"]
    for name, flags in {"ddp": TWO, "fsdp2": FSDP2}.items():
        result = run_script("fit.py", "fit", *TINY, *common, *flags, f"--run.name={name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    for name in ("ddp", "fsdp2"):
        run = Path("runs", name, "version_0")
        for tag, error in (("train/loss", 1e-5), ("val/loss", 1e-5), ("train/grad_norm", 2e-4)):
            assert losses(run, tag) == pytest.approx(losses(RUN, tag), abs=error), (name, tag)
        assert losses(run, "train/tokens") == losses(RUN, "train/tokens")


def test_an_error_of_the_user_is_said_once(tmp_path: Path) -> None:
    result = run_script(*FIT, *TWO, "--data.source=nowhere.txt", "--trainer.max_steps=1", cwd=tmp_path)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line]
    assert len(errors) == 1
    assert errors[0].startswith("error: data.source 'nowhere.txt' does not exist")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "error", "moves"),
    [
        ("--model.config.tie_weights=true", 1e-5, ("one", "fsdp2", "ddp", "hsdp", "one")),
        ("--model.optimizer=muon", 2e-5, ("one", "hsdp", "fsdp2", "one")),
    ],
)
def test_a_run_moves_from_any_devices_to_any_others(
    fit: Callable[..., None],
    words_json: Path,
    text_file: Path,
    tmp_path: Path,
    flag: str,
    error: float,
    moves: tuple[str, ...],
) -> None:
    """One run is resumed on each kind of devices after each other, with the losses of a run that never moved. (Muon's
    iterations, in bf16 where it is native, make differences in the last digit larger.)
    """
    common = [flag, "--run.val_every_n_steps=2", "--data.micro_batch_size=1", "--model.schedule=constant"]
    common += ["--trainer.gradient_clip_val=0.5", "--data.batch_size=8"]  # 8, 4 and 2 micro-batches a step
    fit(*common, f"--trainer.max_steps={2 * len(moves)}", "--run.name=whole")
    places = {"ddp": TWO, "fsdp2": FSDP2, "hsdp": HSDP}
    for leg, place in enumerate(moves, 1):
        flags = [*common, f"--trainer.max_steps={2 * leg}", *(["--ckpt_path=last"] if leg > 1 else [])]
        if place == "one":
            fit(*flags)
            continue
        flags += [f"--data.source={text_file}", f"--data.tokenizer={words_json}", *places[place]]
        result = run_script(*FIT, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    for tag, factor in (("train/loss", 1), ("val/loss", 1), ("train/grad_norm", 20)):
        expected = losses(Path("runs/whole/version_0"), tag)
        assert losses(RUN, tag) == pytest.approx(expected, abs=factor * error), tag


@pytest.mark.slow
def test_two_nodes_are_two_replicas(
    fit: Callable[..., None], words_json: Path, text_file: Path, tmp_path: Path
) -> None:
    """With bf16, by `--trainer.strategy=hsdp`, on two torchrun agents with two devices each."""
    common = ["--trainer.max_steps=3", "--data.micro_batch_size=1", "--trainer.precision=bf16-mixed"]
    fit(*common)
    common += [f"--data.source={text_file}", f"--data.tokenizer={words_json}"]
    common += ["--trainer.strategy=hsdp", "--run.name=hsdp"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    nodes = []
    for node in ("0", "1"):
        agent = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2", *address]
        command = [sys.executable, *agent, f"--local-addr=127.0.0.{int(node) + 1}", *FIT, *common]
        nodes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert losses(Path("runs/hsdp/version_0")) == pytest.approx(losses(RUN), abs=3e-3)


@pytest.mark.slow
def test_a_device_that_fails_ends_the_other(text_file: Path, tmp_path: Path) -> None:
    Path("fails.py").write_text(
        "from gptlit.training.cli import main\nfrom gptlit.training.module import GPTModule\n"
        "step = GPTModule.training_step\n"
        "def fail(self, batch, batch_idx):\n"
        "    assert not (self.global_rank == 1 and self.global_step == 3), 'a bug'\n"
        "    return step(self, batch, batch_idx)\n"
        "GPTModule.training_step = fail\nmain()\n"
    )
    result = run_script("fails.py", *FIT[1:], *TWO, f"--data.source={text_file}", "--trainer.max_steps=9", cwd=tmp_path)
    assert result.returncode in (1, -signal.SIGKILL)
    assert "AssertionError: a bug" in result.stderr


def test_shards_of_the_largest_model_are_as_the_formula_says() -> None:
    """Counted on the meta device, in a group of processes that are not there."""
    config = replace(PRESETS["gpt2-xl"], tie_weights=True, qkv_bias=True)
    for rank in (0, 7):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            model = sharded_meta_model(config, LoRAConfig(), init_device_mesh("cpu", (8,)))
        finally:
            torch.distributed.destroy_process_group()
        assert sum(parameter.numel() for parameter in model.parameters()) == 1_557_611_200
        held = sum(local(parameter).numel() for parameter in model.parameters())
        assert held == pytest.approx(1_557_611_200 / 8, rel=1e-4)


@pytest.mark.slow
def test_several_devices_skip_a_step_together(text: str, tmp_path: Path) -> None:
    Path("words.txt").write_text(text[:4000] + " dragon " + text[4000:8000])
    Path("poisoned.py").write_text(POISONED)
    fit = ["poisoned.py", "fit", *TINY, *TWO, "--data.source=words.txt", "--trainer.max_epochs=1"]
    result = run_script(*fit, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    last = read_checkpoint(checkpoints(RUN)[-1])
    assert last["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def start(*flags: str) -> "subprocess.Popen[str]":
    """Start a fit on two devices."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *FIT, *TWO, *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_a_checkpoint(process: "subprocess.Popen[str]") -> None:
    """Wait until the first one is there."""
    while not checkpoints(RUN) and process.poll() is None:
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    files = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in files for word in text.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the second process in /proc")
@pytest.mark.parametrize("rank", [1])
def test_a_signal_to_a_device_stops_both_and_the_resume_is_bitwise(text_file: Path, rank: int) -> None:
    flags = ["--model.config.drop_rate=0.2", "--trainer.max_steps=60", "--run.save_every_n_steps=5", "--data.seed=3"]
    flags.append(f"--data.source={text_file}")
    assert start(*flags, "--run.name=whole").wait(300) == 0
    process = start(*flags)
    wait_for_a_checkpoint(process)
    os.kill([process.pid, *children(process.pid)][rank], signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM after step" in said
    assert 0 < read_checkpoint(checkpoints(RUN)[-1])["global_step"] < 60
    assert start(*flags, "--ckpt_path=last").wait(300) == 0
    ours, whole = (read_checkpoint(checkpoints(Path("runs", name, "version_0"))[-1]) for name in ("t", "whole"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, ours["state_dict"][name]), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the second process in /proc")
@pytest.mark.parametrize(("rank", "strategy"), [(0, "fsdp2"), (1, "ddp")])
def test_a_killed_process_ends_the_other_and_the_run_resumes(text_file: Path, rank: int, strategy: str) -> None:
    flags = ["--trainer.max_steps=100000", "--run.save_every_n_steps=5", "--run.val_every_n_steps=100000"]
    process = start(*flags, f"--trainer.strategy={strategy}", f"--data.source={text_file}")
    wait_for_a_checkpoint(process)
    ranks = [process.pid, *children(process.pid)]
    os.kill(ranks[rank], signal.SIGKILL)
    _, said = process.communicate(timeout=300)  # until the last one has closed its standard error
    assert process.returncode in (1, -signal.SIGKILL), said
    assert "Traceback" not in said
    step = read_checkpoint(checkpoints(RUN)[-1])["global_step"]
    again = run_script(
        *FIT, "--ckpt_path=last", f"--trainer.max_steps={step + 2}", f"--data.source={text_file}", cwd=Path.cwd()
    )
    assert again.returncode == 0, again.stderr
