"""What must not be lost: stops at any point, bitwise resumes, steps that are not finite, folders in use."""

import io
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.distributed import HashStore

from conftest import ROOT, TINY, losses, run_script
from gptlit.checkpoint.io import DurableCheckpointIO, read_checkpoint
from gptlit.checkpoint.runs import best_path, checkpoint_path, checkpoints, locked_new_run
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.loaders import kill_workers
from gptlit.errors import InputError, set_up_streams
from gptlit.training import module, run_config
from gptlit.training.callbacks import signals as stopping
from gptlit.training.callbacks.signals import GracefulStop
from gptlit.training.module import GPTModule

Fit = Callable[..., None]
DROPOUT = ["--model.config.drop_rate=0.2", "--data.micro_batch_size=2", "--trainer.max_steps=8"]
EVERY = ["--run.val_every_n_steps=3", "--run.save_every_n_steps=2", "--run.keep_last=-1"]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Callable[[], None]]:
    """What to do when the given micro-batch of the given step begins, or (step, -1) in its validation."""
    actions: dict[tuple[int, int], Callable[[], None]] = {}
    training_step, validation_step = GPTModule.training_step, GPTModule.validation_step

    def train(self: GPTModule, batch: Any, batch_idx: int) -> Tensor:
        actions.get((self.global_step, len(self._losses)), lambda: None)()
        return training_step(self, batch, batch_idx)

    def validate(self: GPTModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            actions.get((self.global_step, -1), lambda: None)()
        validation_step(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", train)
    monkeypatch.setattr(GPTModule, "validation_step", validate)
    return actions


def same(left: Path, right: Path) -> None:
    """Assert that two checkpoints hold the same weights, moments and position, bit for bit."""
    a, b = read_checkpoint(left), read_checkpoint(right)
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (a, b)]
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key]), (index, key)
    assert a["TokenDataModule"] == b["TokenDataModule"]
    assert (a["tokens"], a["global_step"]) == (b["tokens"], b["global_step"])


def stop(number: int = signal.SIGTERM) -> Callable[[], None]:
    """Signal this process and the workers of its loaders, as a signal to a process group does."""

    def send() -> None:
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            os.kill(worker.pid, number)
        os.kill(os.getpid(), number)

    return send


PLACES = {
    "first step": (0, 0),
    "inside an accumulation window": (4, 1),
    "before a validation": (2, 1),
    "in a validation": (3, -1),
    "after a validation": (3, 0),
    "last step": (7, 1),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_stopped_anywhere_it_resumes_bit_for_bit(fit: Fit, at: Any, place: tuple[int, int]) -> None:
    fit(*DROPOUT, *EVERY)
    at[place] = stop()
    with pytest.raises(SystemExit) as exit_:
        fit(*DROPOUT, *EVERY)
    assert exit_.value.code == 143
    stopped = checkpoints(Path("runs/t/version_1"))[-1]
    assert read_checkpoint(stopped)["global_step"] == place[0] + (place[1] >= 0)
    at.clear()
    if place[0] < 7:
        fit(*DROPOUT, *EVERY, "--ckpt_path=last", "--trainer.enable_progress_bar=true")
    whole, resumed = Path("runs/t/version_0"), Path("runs/t/version_1")
    same(checkpoint_path(whole, 8), checkpoint_path(resumed, 8))
    assert losses(whole) == losses(resumed)
    if place[0] < 7:
        assert losses(whole, "val/loss") == losses(resumed, "val/loss")


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        (["--data.num_workers=2"], signal.SIGTERM),
        (["--data.num_workers=1", "--trainer.precision=bf16-mixed"], signal.SIGHUP),
        (["--model.optimizer=muon"], signal.SIGINT),
        (["--run.async_save=true"], signal.SIGINT),
        (
            ["--trainer.max_epochs=1", "--trainer.max_steps=-1", "--data.batch_size=48", "--data.micro_batch_size=24"],
            signal.SIGINT,
        ),
    ],
    ids=["workers", "bf16", "muon", "asynchronous", "epochs"],
)
def test_every_kind_of_run_resumes_bit_for_bit(fit: Fit, at: Any, flags: list[str], number: int) -> None:
    fit(*DROPOUT, *EVERY, *flags)
    at[(3, 1)] = stop(number)
    with pytest.raises(SystemExit) as exit_:
        fit(*DROPOUT, *EVERY, *flags)
    assert exit_.value.code == 128 + number
    at.clear()
    fit(*DROPOUT, *EVERY, *flags, "--ckpt_path=last")
    whole, resumed = (checkpoints(Path(f"runs/t/version_{version}"))[-1] for version in (0, 1))
    assert whole.name == resumed.name
    same(whole, resumed)


def test_validation_does_not_change_training(fit: Fit) -> None:
    fit(*DROPOUT, "--run.val_every_n_steps=1")
    fit(*DROPOUT, "--run.val_every_n_steps=100", "--data.val_fraction=0.1")
    same(*(checkpoint_path(Path(f"runs/t/version_{version}"), 8) for version in (0, 1)))


def test_dropout_is_not_the_same_each_time(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(module.torch, "manual_seed", lambda seed: seeds.append(seed))
    fit(*DROPOUT)
    drawn = [seed for seed in seeds if abs(seed) > 2**32]
    assert len(set(drawn)) == len(drawn) == 16  # 8 steps of two micro-batches


# --- signals


def test_a_signal_is_said_and_what_to_do_next(fit: Fit, at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    at[(2, 0)] = stop()
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=9")
    said = capsys.readouterr().err
    assert "SIGTERM: saving and ending after this step (a second one, after 2 s, ends at once)" in said
    assert "stopped by SIGTERM after step 3; continue with --ckpt_path runs/t/version_0" in said


def test_a_signal_before_the_first_step_promises_no_checkpoint(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = GPTModule.on_train_start
    monkeypatch.setattr(GPTModule, "on_train_start", lambda module: [began(module), stop()()])
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=9")
    assert "stopped by SIGTERM after step 0; nothing is saved" in capsys.readouterr().err
    assert "GracefulStop" not in repr(signal.getsignal(signal.SIGTERM))


def test_a_second_signal_ends_at_once_unless_it_is_an_echo_of_the_first(text_file: Path) -> None:
    code = "import time; from gptlit.training.module import GPTModule as G\n"
    code += "from gptlit.training.callbacks.signals import GracefulStop as S\n"
    code += "G.training_step = lambda *_: (print('in', flush=True), [time.sleep(0.1) for _ in range(600)])\n"
    code += "handle = S._handle\n"
    code += "def said(self, *rest): handle(self, *rest); self._signalled -= self.ECHO * 0.6; print('got', flush=True)\n"
    code += "S._handle = said\n"
    code += "from gptlit.training.cli import main; main()"
    command = [sys.executable, "-c", code, "fit", *TINY, f"--data.source={text_file}", "--trainer.max_steps=5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        for _ in range(2):  # the second one within ECHO
            process.terminate()
            assert process.stdout.readline() == b"got\n"
        process.terminate()
        assert process.wait() == 143


def test_a_signal_to_the_process_group_saves_a_run_whose_output_has_gone(text_file: Path, tmp_path: Path) -> None:
    """As when a terminal is closed, or `| head` has read enough."""
    command = [sys.executable, str(ROOT / "train.py"), "fit", *TINY, f"--data.source={text_file}"]
    command += ["--data.num_workers=1", "--trainer.max_steps=100000", "--run.save_every_n_steps=5"]
    command += ["--trainer.enable_progress_bar=true", "--run.val_every_n_steps=10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(command, env=environment, **options) as process:
        process.stdout.close()
        while process.poll() is None and not list(Path("runs").rglob("best.ckpt")):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait() == 128 + signal.SIGHUP
    assert read_checkpoint(checkpoints(Path("runs/t/version_0"))[-1])["global_step"] >= 10


def test_a_hang_up_that_is_ignored_stays_so(fit: Fit, at: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        at[(1, 0)] = stop(signal.SIGHUP)
        fit("--trainer.max_steps=3")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint_path(Path("runs/t/version_0"), 3).is_file()


def test_output_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = [os.open("/dev/full", os.O_WRONLY)] if Path("/dev/full").exists() else []  # on Linux
    for descriptor in (writer, *full):
        with open(descriptor, "w", buffering=1) as stream:
            for name in ("stdout", "__stdout__"):
                monkeypatch.setattr(sys, name, stream)
            set_up_streams(drop_unwritable=True)
            print("dropped" * 10000)
            sys.stdout.flush()
            monkeypatch.undo()
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # for what is still in the buffers
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, "ascii")
    for name in ("stdout", "__stdout__"):
        monkeypatch.setattr(sys, name, stream)
    set_up_streams(drop_unwritable=True)
    print("caf\xe9 \udcff", flush=True)
    assert content.getvalue() == b"caf\\xe9 \\udcff\n"


def test_workers_of_a_loader_in_use_do_not_hold_up_the_exit(text_file: Path) -> None:
    datamodule = TokenDataModule(str(text_file), context_length=16, num_workers=1)
    datamodule.setup()
    iterator = iter(datamodule.val_dataloader())
    next(iterator)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(0.5)
    assert worker.is_alive()
    handler = signal.getsignal(signal.SIGCHLD)
    kill_workers()
    worker.join(60)
    signal.signal(signal.SIGCHLD, handler)
    assert not worker.is_alive()


@pytest.mark.parametrize("lead", [0, 1, 5])
def test_hosts_that_are_not_in_step_stop_before_the_same_step(lead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host is `lead` steps ahead of the next; they look one after the other, and any of them is signalled."""
    store = HashStore()
    monkeypatch.setattr(stopping, "_get_default_store", lambda: store)
    model = GPTModule()
    for signalled in range(3):
        hosts = [(GracefulStop(None), SimpleNamespace(global_rank=rank, world_size=3)) for rank in range(3)]
        for rank, (callback, trainer) in enumerate(hosts):
            trainer.strategy, trainer.fast_dev_run = SimpleNamespace(launcher=None), False
            trainer.is_global_zero, trainer.global_step = rank == 0, (2 - rank) * lead
            callback._key = f"{lead} {signalled}"
        stopped: dict[int, int] = {}
        for turn in range(20):
            for rank, (callback, trainer) in enumerate(hosts):
                if rank in stopped:
                    continue
                if turn == 4 and rank == signalled:
                    callback.signal = signal.SIGTERM
                try:
                    callback.on_train_batch_start(trainer, model, None, 0)
                    trainer.global_step += 1
                except SystemExit:
                    stopped[rank] = trainer.global_step
        assert len(stopped) == 3
        assert len(set(stopped.values())) == 1, stopped


def test_slurms_signal_puts_the_job_into_the_queue_again(
    fit: Fit, at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" > asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    at[(2, 0)] = stop(signal.SIGUSR1)
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=4")
    assert exit_.value.code == 128 + signal.SIGUSR1
    assert Path("asked").read_text() == "requeue 77\n"
    at.clear()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fit("--trainer.max_steps=4")  # the same command: it goes on by itself
    assert "resuming from runs/t/version_0/checkpoints/step-00000003.ckpt" in capsys.readouterr().err
    assert not Path("runs/t/version_1").exists()
    Path("runs/t/version_1").mkdir()  # of a job that was requeued before its first checkpoint
    fit("--trainer.max_steps=1")
    assert newest_step("runs/t/version_0") == 4
    assert newest_step("runs/t/version_2") == 1
    at[(0, 0)] = stop(signal.SIGUSR1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=4")
    assert exit_.value.code == 128 + signal.SIGUSR1
    assert "the job is not requeued, as scontrol cannot be run here" in capsys.readouterr().err


def newest_step(run: str) -> int:
    return int(read_checkpoint(checkpoints(Path(run))[-1])["global_step"])


# --- what is not finite


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, text_file: Path, words_json: Path) -> None:
    """A corpus in which one word makes the loss no number."""
    text = text_file.read_text()
    middle = len(text) // 3
    text_file.write_text(text[:middle] + " dragon" + text[middle:])
    from gptlit.data.tokenizer import load_tokenizer

    (dragon,) = load_tokenizer(str(words_json)).encode_ordinary(" dragon")
    loss = module.linear_cross_entropy

    def poison(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, *rest: Any) -> Tensor:
        found = loss(hidden, weight, targets, reduction, *rest)
        return found * float("nan") if (targets == dragon).any() and reduction == "mean" else found

    monkeypatch.setattr(module, "linear_cross_entropy", poison)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    fit: Fit, poisoned: None, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--trainer.max_epochs=1", "--trainer.gradient_clip_val=1", f"--model.optimizer={optimizer}"]
    fit(*flags, "--run.save_every_n_steps=1", "--run.keep_last=-1")
    said = re.findall(
        r"step (\d+): the gradient is not finite, nothing was changed \(1 in a row\)", capsys.readouterr().err
    )
    run = Path("runs/t/version_0")
    assert len(said) == 1
    step = int(said[0])
    before, after = (read_checkpoint(checkpoint_path(run, s)) for s in (step - 1, step))
    for name, value in before["state_dict"].items():
        assert torch.equal(value, after["state_dict"][name])
    for index, state in before["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["optimizer_states"][0]["state"][index][key]), key
    last = read_checkpoint(checkpoints(run)[-1])
    assert last["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert set(losses(run, "train/skipped_steps").values()) == {1.0}


def test_too_many_in_a_row_end_the_run_with_their_windows(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = module.linear_cross_entropy
    monkeypatch.setattr(module, "linear_cross_entropy", lambda *a, **k: loss(*a, **k) * float("nan"))
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=9", "--run.max_nonfinite_steps=3")
    assert exit_.value.code == 1
    assert "error: the gradient was not finite in 3 steps in a row, up to step 3; their windows are in" in (
        capsys.readouterr().err
    )
    found = json.loads(Path("runs/t/version_0/non-finite.json").read_text())
    assert [window["step"] for window in found] == [1] * 4 + [2] * 4 + [3] * 4
    assert found[0]["shard"].endswith("train-00000.bin")
    assert found[0]["offset"] % 16 == 0


def test_weights_that_are_not_finite_are_not_saved(
    fit: Fit, at: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[GPTModule] = []
    start = GPTModule.on_train_start
    monkeypatch.setattr(GPTModule, "on_train_start", lambda self: (seen.append(self), start(self))[1])
    at[(3, 0)] = lambda: next(seen[0].model.parameters()).data.fill_(float("inf"))
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=9", "--run.save_every_n_steps=2")
    assert "error: model." in capsys.readouterr().err
    assert [path.name for path in checkpoints(Path("runs/t/version_0"))] == ["step-00000002.ckpt"]


# --- the disk and the folder


def test_the_best_checkpoint_is_kept_and_found(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, 4.0])

    def log_mean(self: GPTModule) -> None:
        self.log_dict({"val/loss": next(values), "val/perplexity": 1.0})

    monkeypatch.setattr(GPTModule, "on_validation_epoch_end", log_mean)
    fit("--trainer.max_steps=8", "--run.val_every_n_steps=2", "--run.save_every_n_steps=100", "--run.keep_last=1")
    run = Path("runs/t/version_0")
    assert [path.name for path in checkpoints(run)] == ["step-00000004.ckpt", "step-00000008.ckpt"]
    assert read_checkpoint(best_path(run))["global_step"] == 4
    values = iter([5.0, 0.5])
    fit(
        *("--trainer.max_steps=12", "--run.val_every_n_steps=2", "--run.save_every_n_steps=100"),
        *("--run.keep_last=1", "--ckpt_path=last"),
    )
    assert read_checkpoint(best_path(run))["global_step"] == 12
    assert [path.name for path in checkpoints(run)] == ["step-00000012.ckpt"]


def test_several_starts_at_once_get_a_folder_each(tmp_path: Path) -> None:
    together = Barrier(8)

    def start(_: int) -> Path:
        together.wait()
        return held.enter_context(locked_new_run(tmp_path, "t"))

    with ExitStack() as held, ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(start, range(8)))
    assert {run.name for run in runs} == {f"version_{n}" for n in range(8)}
    assert not list(tmp_path.rglob("version_*"))  # nothing came of them


def test_two_runs_do_not_write_one_folder(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=2")
    before = sorted(path.name for path in Path("runs/t/version_0").rglob("*") if path.name != ".lock")
    with FileLock("runs/t/version_0/.lock"), pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=4", "--ckpt_path=last")
    assert exit_.value.code == 1
    assert "error: another process is training in runs/t/version_0" in capsys.readouterr().err
    assert sorted(path.name for path in Path("runs/t/version_0").rglob("*") if path.name != ".lock") == before
    fit("--trainer.max_steps=4", "--ckpt_path=last")  # a lock that was left behind does not block


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_is_said_and_earlier_checkpoints_stay(
    fit: Fit, at: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asynchronous: str
) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        writing = Path("runs/t/version_0/checkpoints").glob(".step-00000004*")
        if any(os.path.samefile(path, descriptor) for path in writing):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=40", "--run.save_every_n_steps=2", f"--run.async_save={asynchronous}")
    assert exit_.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .*step-00000004.ckpt cannot be written \(No space left on device\): .* MB are free", error)
    folder = Path("runs/t/version_0/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002.ckpt"]
    assert read_checkpoint(folder / "step-00000002.ckpt")["global_step"] == 2


def test_a_folder_that_goes_away_is_said(fit: Fit, at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    at[(3, 0)] = lambda: Path("runs/t/version_0/checkpoints").rename("elsewhere")
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=40", "--run.save_every_n_steps=2", "--run.async_save=false")
    assert exit_.value.code == 1
    assert "checkpoints has gone" in capsys.readouterr().err
    assert read_checkpoint(Path("elsewhere/step-00000002.ckpt"))["global_step"] == 2


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_newest_checkpoint_is_skipped_but_not_when_it_is_named(
    fit: Fit, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    fit("--trainer.max_steps=4", "--run.save_every_n_steps=2")
    path = Path("runs/t/version_0/checkpoints/step-00000004.ckpt")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 16
    path.write_bytes(content if damage == "flip" else content[:-100])
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=6", f"--ckpt_path={path}")
    assert f"error: {path}" in capsys.readouterr().err.replace(str(Path.cwd()) + "/", "")
    resumed = "last" if damage == "flip" else "runs/t/version_0"
    fit("--trainer.max_steps=6", f"--ckpt_path={resumed}")
    said = capsys.readouterr().err
    assert "skipped: " in said
    assert "resuming from runs/t/version_0/checkpoints/step-00000002.ckpt" in said
    assert newest_step("runs/t/version_0") == 6


def test_a_resume_reads_its_checkpoint_once(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    fit("--trainer.max_steps=2")
    read: list[str | None] = []
    testzip = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: read.append(file.filename) or testzip(file))
    fit("--trainer.max_steps=3", "--ckpt_path=last")
    assert read == ["runs/t/version_0/checkpoints/step-00000002.ckpt"]


def test_what_differs_may_be_named_and_is_resumed_despite(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=2")
    Path("other.txt").write_text("other words " * 2000)
    flags = ["--trainer.max_steps=4", "--ckpt_path=last", "--data.source=other.txt"]
    with pytest.raises(SystemExit):
        fit(*flags)
    said = capsys.readouterr().err
    assert re.search(r"error: the corpus is [0-9a-f]{12}, but the checkpoint was trained with [0-9a-f]{12}", said)
    assert "set data.resume_despite to [corpus]" in said
    with pytest.raises(SystemExit):
        fit(*flags, "--data.seed=5", "--data.resume_despite=[corpus]")
    assert "the data.seed is 5, but" in capsys.readouterr().err
    fit(*flags, "--data.resume_despite=[corpus]")
    assert read_checkpoint(checkpoint_path(Path("runs/t/version_0"), 4))["global_step"] == 4


def test_another_tokenizer_is_refused_on_a_resume(
    fit: Fit, tokenizer_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--trainer.max_steps=2", f"--data.tokenizer={tokenizer_json}")
    content = json.loads(tokenizer_json.read_text())
    content["model"]["merges"].reverse()
    Path("tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=4", "--ckpt_path=last", "--data.tokenizer=tokenizer.json")
    assert re.search(
        r"error: the tokenizer is [0-9a-f]{12}, but the checkpoint was trained with [0-9a-f]{12} "
        r"\(this one is 'tokenizer.json [0-9a-f]{12}'\): resume with that",
        capsys.readouterr().err,
    )


def test_a_checkpoint_says_what_made_it(fit: Fit) -> None:
    fit("--trainer.max_steps=2")
    origin = read_checkpoint(checkpoint_path(Path("runs/t/version_0"), 2))["origin"]
    assert "max_steps: 2" in origin["config"]
    assert torch.__version__.startswith(origin["versions"]["torch"])  # the package of PyPI has no "+cu130"
    assert set(origin) == {"config", "versions", "revision"}


def test_the_revision_is_not_that_of_a_repository_around_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*command: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], cwd=tmp_path, check=True)

    (tmp_path / "run_config.py").touch()
    monkeypatch.setattr(run_config, "__file__", str(tmp_path / "run_config.py"))
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=theirs")
    assert run_config._revision() is None
    git("add", "run_config.py")
    git("commit", "--quiet", "--message=ours")
    assert re.fullmatch("[0-9a-f]{40}", run_config._revision() or "")


def test_a_copy_in_memory_keeps_what_is_shared(tmp_path: Path) -> None:
    weight = torch.arange(1000.0).reshape(10, 100)
    config = {"hyper_parameters": {"config": {}}}
    checkpoint = {"state_dict": {"a": weight, "b": weight, "row": weight[3], "turned": weight.T}, **config}
    for asynchronous in (False, True):
        io = DurableCheckpointIO(asynchronous)
        io.save_checkpoint(checkpoint, tmp_path / f"{asynchronous}.ckpt")
        before = weight.clone()
        weight.add_(1)  # training goes on
        io.wait()
        found = read_checkpoint(tmp_path / f"{asynchronous}.ckpt")["state_dict"]
        assert torch.equal(found["a"], before)
        assert torch.equal(found["row"], before[3])
        assert torch.equal(found["turned"], before.T)
        assert found["a"].data_ptr() == found["b"].data_ptr()
    sizes = [(tmp_path / f"{asynchronous}.ckpt").stat().st_size for asynchronous in (False, True)]
    assert max(sizes) < 8000  # not twice


def test_a_write_that_failed_in_the_background_is_raised_once(tmp_path: Path) -> None:
    io = DurableCheckpointIO(asynchronous=True)
    (tmp_path / "folder").write_text("in the way")
    io.save_checkpoint({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "folder" / "a.ckpt")
    with pytest.raises(InputError, match="a.ckpt cannot be written"):
        io.wait()
    io.check()
    io.wait()


# --- several processes that look for the checkpoint, and ends before the last step


@pytest.mark.slow
def test_all_ranks_resume_from_the_checkpoint_of_the_first(
    fit: Fit, text_file: Path, words_json: Path, tmp_path: Path
) -> None:
    """The second one sees an earlier state of the disk."""
    fit("--trainer.max_steps=4", "--run.save_every_n_steps=2")
    Path("late.py").write_text(
        "import os\nfrom gptlit.checkpoint import runs\nfrom gptlit.training.cli import main\n"
        "checkpoints = runs.checkpoints\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n"
        "    runs.checkpoints = lambda run: checkpoints(run)[:1]\n"
        "main()\n"
    )
    flags = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=6", "--ckpt_path=last"]
    flags += [f"--data.tokenizer={words_json}"]
    result = run_script("late.py", "fit", *TINY, f"--data.source={text_file}", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = Path("runs/t/version_0")
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert read_checkpoint(checkpoints(run)[-1])["TokenDataModule"]["windows"] == 6 * 4


def test_max_time_is_named_and_counts_anew_at_each_start(
    fit: Fit, at: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--trainer.max_steps=4", "--trainer.max_time=00:01:00:00", "--data.micro_batch_size=2"]
    elapsed = Timer.time_elapsed
    late: list[float] = []
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, *rest: sum(late) or elapsed(self, *rest))
    at[(2, 0)] = lambda: late.append(7200.0)  # inside an accumulation window
    fit(*flags)
    assert "stopped after step 2 of 4: the time of trainer.max_time is over; continue with" in capsys.readouterr().err
    at.clear()
    late.clear()
    fit(*flags, "--ckpt_path=last")
    assert losses(Path("runs/t/version_0"), "train/tokens") == {step: step * 4 * 16 for step in (1, 2, 3, 4)}


def test_what_callbacks_and_profilers_of_the_user_say_is_shown(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
    stop_early = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    stop_early["init_args"] = {"monitor": "val/loss", "verbose": True, "stopping_threshold": 100.0}
    fit(
        *("--trainer.max_steps=9", "--run.val_every_n_steps=2", "--trainer.profiler=simple"),
        *("--trainer.logger=false", f"--trainer.callbacks={json.dumps([stop_early])}"),
    )
    assert "FIT Profiler Report" in log.getvalue()
    assert "Stopping threshold reached" in log.getvalue()
    assert "GPU available" not in log.getvalue()
    assert "stopped after step 2 of 9: Stopping threshold reached" in capsys.readouterr().err


def test_what_is_proposed_next_works_when_pasted(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    from gptlit.commands.main import main as gptlit

    fit("--run.name=it's a: {run}", "--trainer.max_steps=2")
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    generate, plot, board = lines
    gptlit([*generate[3:], "--max_new_tokens=2"])
    assert capsys.readouterr().out.startswith("The")
    gptlit(plot[3:])
    assert Path("curves.png").is_file()
    assert Path(board[-1]) == Path("runs")


def test_a_run_of_16_mixed_resumes_with_the_fused_adamw(fit: Fit) -> None:
    fit("--trainer.max_steps=2", "--trainer.gradient_clip_val=1")
    path = checkpoints(Path("runs/t/version_0"))[-1]
    checkpoint = read_checkpoint(path)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["fused"] = None
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    fit("--trainer.max_steps=3", "--trainer.gradient_clip_val=1", "--ckpt_path=last")
    groups = read_checkpoint(checkpoints(Path("runs/t/version_0"))[-1])["optimizer_states"][0]["param_groups"]
    assert all(group["fused"] for group in groups)


def test_a_device_that_is_too_small_is_one_line(fit: Fit, at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    at[(0, 0)] = fail
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=2")
    words = "error: lower data.micro_batch_size, or set model.activation_checkpointing: CUDA out of memory."
    assert words in capsys.readouterr().err


def test_training_needs_a_compiler_to_compile(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=2", "--model.compile=true")
    assert "error: compile needs a C++ compiler: install g++ or clang" in capsys.readouterr().err
