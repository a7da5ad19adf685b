"""What a run leaves for the eye: scalars, charts, hyper-parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import losses
from gptlit import GPTModule
from gptlit.checkpoint.io import DurableCheckpointIO
from gptlit.data.tokenizer import load_tokenizer
from gptlit.training.callbacks import checkpoint, monitoring

Fit = Callable[..., None]
RUN = Path("runs/t/version_0")


def test_the_page_has_charts_and_settings(fit: Fit) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit("--trainer.max_steps=4", "--run.val_every_n_steps=2")
    events = EventAccumulator(str(RUN))
    events.Reload()
    metadata = events.summary_metadata
    plugins = {value.plugin_data.plugin_name for value in metadata.values()}
    assert {"custom_scalars", "hparams"} <= plugins
    experiment = metadata["_hparams_/session_start_info"].plugin_data.content
    for word in (b"model.lr", b"model.config.emb_dim", b"data.batch_size"):
        assert word in experiment


def test_a_resume_continues_the_curves(fit: Fit) -> None:
    flags = ["--run.val_every_n_steps=5", "--model.schedule=constant"]
    fit("--trainer.max_steps=5", "--run.save_every_n_steps=3", *flags)
    before = losses(RUN)
    for path in RUN.glob("checkpoints/step-00000005.*"):
        path.unlink()
    fit("--trainer.max_steps=6", "--ckpt_path=last", *flags)
    after = losses(RUN)
    assert list(after) == [1, 2, 3, 4, 5, 6]
    assert {step: after[step] for step in before} == before
    assert losses(RUN, "train/tokens") == {step: 64 * step for step in range(1, 7)}


def test_throughput_leaves_out_validations_and_checkpoints(
    fit: Fit, words_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on only while a part works, by a number of seconds of its own."""
    now = 0.0

    def takes(seconds: float, owner: type, name: str) -> None:
        work = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return work(*args, **options)

        monkeypatch.setattr(owner, name, timed)

    for module in (monitoring, checkpoint):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    takes(3, GPTModule, "training_step")
    takes(5, GPTModule, "on_before_optimizer_step")
    takes(7, GPTModule, "on_validation_epoch_end")
    takes(11, DurableCheckpointIO, "save_checkpoint")
    fit("--trainer.max_steps=4", "--data.micro_batch_size=2", "--run.val_every_n_steps=2", "--run.save_every_n_steps=2")
    for step, seconds in ((2, (0, 0, 0)), (3, (0, 7, 11)), (4, (0, 0, 0))):
        found = [losses(RUN, f"time/{part}")[step] for part in ("data", "validation", "checkpoint")]
        assert found == pytest.approx([second / (11 + sum(seconds)) for second in seconds])
    assert losses(RUN, "perf/tokens_per_second")[3] == pytest.approx(64 / 11)
    vocab_size = load_tokenizer(str(words_json)).n_vocab
    work = 6 * (12 * 2 * 32**2 + 2 * 10 * 32 + 2 * 32 + vocab_size * 32) + 12 * 2 * 32 * 16
    assert losses(RUN, "perf/mfu")[3] == pytest.approx(64 / 11 * work / 1e10)
    assert losses(RUN, "perf/memory_gb")[4] * 2**30 > 4 * vocab_size * 32


@pytest.mark.parametrize("flag", ["--data.source=a.tsv", "--data.source=a.json", "--model.trainable=head"])
def test_there_is_no_mfu_where_not_all_learns_from_every_token(fit: Fit, flag: str) -> None:
    Path("a.tsv").write_text("".join(f"{'ab'[n % 2]}\tthe text {n}\n" for n in range(40)))
    Path("a.json").write_text(json.dumps([{"instruction": "write", "output": f"text {n}"} for n in range(40)]))
    fit("--trainer.max_steps=1", "--run.sample_prompt=", flag)
    assert losses(RUN, "perf/tokens_per_second")
    with pytest.raises(KeyError):
        losses(RUN, "perf/mfu")


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
    often = ["--run.val_every_n_steps=1", "--run.save_every_n_steps=1"]
    fit("--trainer.max_steps=4", "--model.lr=9", "--model.schedule=constant", *often)
    out = capsys.readouterr().out
    found = losses(RUN, "val/loss")
    best = min(found, key=found.__getitem__)
    assert best < 4, "a rate of 9 spoils this model"
    assert f"best        {found[best]:.4f} at step {best}: runs/t/version_0/checkpoints/best.ckpt" in out
    assert "gptlit plot runs/t/version_0 --out curves.png" in out
