"""What a run leaves for the eye: scalars, charts, hyper-parameters, metrics.csv."""

import csv
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import losses
from gptlit.callbacks import matmul_peak
from gptlit.checkpoint import DurableCheckpointIO

Fit = Callable[..., None]
RUN = Path("runs/t/version_0")


def rows(name: str) -> list[dict[str, str]]:
    with (RUN / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["name"] == name]


def test_the_csv_has_what_tensorboard_has(fit: Fit) -> None:
    fit("--trainer.max_steps=4", "--run.val_every_n_steps=2")
    for tag in ("train/loss", "val/loss", "val/bits_per_byte", "lr", "perf/mfu"):
        curve = losses(RUN, tag)
        assert [int(row["step"]) for row in rows(tag)] == list(curve)
        assert [float(row["value"]) for row in rows(tag)] == pytest.approx(list(curve.values()), rel=1e-6)
    assert [int(row["tokens"]) for row in rows("train/loss")] == [64, 128, 192, 256]
    seconds = [float(row["seconds"]) for row in rows("train/loss")]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_a_resume_goes_on_in_the_same_csv(fit: Fit) -> None:
    flags = ["--run.val_every_n_steps=5", "--model.schedule=constant"]
    fit("--trainer.max_steps=5", "--run.save_every_n_steps=3", *flags)
    before = rows("train/loss")
    for path in RUN.glob("checkpoints/step-00000005.*"):
        path.unlink()
    fit("--trainer.max_steps=6", "--ckpt_path=last", *flags)
    after = rows("train/loss")
    assert [row["step"] for row in after] == ["1", "2", "3", "4", "5", "6"]
    assert after[:3] == before[:3]
    assert [row["value"] for row in after[:5]] == [row["value"] for row in before]
    assert float(after[3]["seconds"]) > float(after[2]["seconds"])
    assert list(losses(RUN / "tokens", "loss_by_tokens/train")) == [64 * step for step in range(1, 7)]


def test_a_validation_that_a_resume_makes_up_for_has_its_tokens(fit: Fit) -> None:
    flags = ["--model.schedule=constant", "--run.save_every_n_steps=2"]
    fit("--trainer.max_steps=4", "--run.val_every_n_steps=100", *flags)
    for path in RUN.glob("checkpoints/step-00000004.*"):
        path.unlink()
    fit("--trainer.max_steps=4", "--run.val_every_n_steps=2", "--ckpt_path=last", *flags)
    assert [(row["step"], row["tokens"]) for row in rows("val/loss")] == [("2", "128"), ("4", "256")]
    assert list(losses(RUN / "tokens", "loss_by_tokens/val")) == [128, 256]


def test_losses_by_tokens_layout_and_settings_are_on_the_page(fit: Fit) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit("--trainer.max_steps=2", "--run.val_every_n_steps=1")
    assert list(losses(RUN / "tokens", "loss_by_tokens/val")) == [64, 128]
    assert losses(RUN / "tokens", "loss_by_tokens/val")[128] == losses(RUN, "val/loss")[2]
    events = EventAccumulator(str(RUN))
    events.Reload()
    metadata = events.summary_metadata
    plugins = {value.plugin_data.plugin_name for value in metadata.values()}
    assert {"custom_scalars", "hparams"} <= plugins
    experiment = metadata["_hparams_/session_start_info"].plugin_data.content
    for word in (b"model.lr", b"model.config.emb_dim", b"data.batch_size"):
        assert word in experiment


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_shares_and_memory_are_logged(fit: Fit, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = DurableCheckpointIO.save_checkpoint
    slow = lambda *args, **options: (time.sleep(0.3), save(*args, **options))  # noqa: E731
    monkeypatch.setattr(DurableCheckpointIO, "save_checkpoint", slow)
    flags = ["--run.val_every_n_steps=2", "--run.save_every_n_steps=2", "--run.peak_tflops=0.001"]
    fit("--trainer.max_steps=4", f"--data.micro_batch_size={micro_batch_size}", *flags)
    parts = [losses(RUN, f"share/{part}") for part in ("data", "model", "optimizer", "validation", "checkpoint")]
    for step in (2, 3, 4):
        assert 0.3 < sum(part[step] for part in parts) <= 1.01
        assert min(part[step] for part in parts) >= 0
    assert parts[3][3] > 0  # the step after a validation
    assert parts[4][3] > 0.3  # and after a save
    assert parts[4][2] == parts[4][4] == 0
    assert 0.1 < losses(RUN, "perf/memory_gb")[4] < 50
    rate = losses(RUN, "perf/tokens_per_second")[4]
    config = dict.fromkeys(["blocks"], 12 * 2 * 32**2 + 2 * 10 * 32)
    work = 6 * (config["blocks"] + 2 * 32 + 50257 * 32) + 12 * 2 * 32 * 16
    assert losses(RUN, "perf/mfu")[4] == pytest.approx(rate * work / 1e9, rel=1e-3)


def test_the_peak_is_above_a_plain_loop() -> None:
    assert matmul_peak(torch.device("cpu"), "32-true") > 1e9


def test_a_logger_of_ones_own_is_added(fit: Fit) -> None:
    fit(
        "--trainer.max_steps=2", "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=own"
    )
    assert list(losses(RUN)) == [1, 2]
    assert list(Path("own").rglob("metrics.csv"))


def test_a_peak_that_is_none_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=1", "--run.peak_tflops=0")
    assert exit_.value.code == 2
    assert "run.peak_tflops must be a positive number, got 0" in capsys.readouterr().err


def test_the_closing_names_the_best(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit(
        "--trainer.max_steps=4",
        "--run.val_every_n_steps=1",
        "--model.lr=9",
        "--model.schedule=constant",
        "--run.save_every_n_steps=1",
    )
    out = capsys.readouterr().out
    found = losses(RUN, "val/loss")
    best = min(found, key=found.__getitem__)
    assert best < 4, "a rate of 1 spoils this model"
    assert f"best        {found[best]:.4f} at step {best}: runs/t/version_0/checkpoints/best.ckpt" in out
    assert "gptlit plot runs/t/version_0 --out curves.png" in out
