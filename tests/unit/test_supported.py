"""Trainer settings that are refused by name before the first step; weight averaging works."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from test_module import TINY, batches, trainer

from conftest import losses
from gptlit import TokenDataModule
from gptlit.checkpoint.io import read_checkpoint
from gptlit.checkpoint.runs import checkpoint_path, checkpoints
from gptlit.errors import InputError
from gptlit.training.distributed import FSDP2Strategy
from gptlit.training.module import GPTModule
from gptlit.training.supported import check_supported

Fit = Callable[..., None]
NAN = float("nan")
TINY_GPT2 = replace(TINY, vocab_size=50257, context_length=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_clip_val": -1.0}, "gradient_clip_val must be at least 0"),
        ({"gradient_clip_val": NAN}, "gradient_clip_val must be at least 0"),
        ({"gradient_clip_val": -1.0, "gradient_clip_algorithm": "value"}, "gradient_clip_val must be at least 0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be a positive integer, got 0"),
        ({"log_every_n_steps": -5}, "log_every_n_steps must be a positive integer, got -5"),
        ({"precision": "16-true"}, "precision 16-true is not supported"),
        ({"callbacks": GradientAccumulationScheduler({0: 4})}, "GradientAccumulationScheduler does not work"),
        ({"callbacks": LearningRateFinder()}, "LearningRateFinder does not work"),
        ({"callbacks": StochasticWeightAveraging(0.1)}, "StochasticWeightAveraging does not work"),
        ({"callbacks": ModelPruning("l1_unstructured")}, "ModelPruning does not work"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_would_train_wrongly_are_refused(options: dict[str, Any], words: str) -> None:
    module = GPTModule(TINY)
    fitter = trainer(**options)
    with pytest.raises(InputError, match=words):
        fitter.fit(module, batches(5))
    assert fitter.global_step == 0


def test_a_batch_size_finder_is_refused_by_the_command_line() -> None:
    with pytest.raises(InputError, match="BatchSizeFinder does not work here"):
        check_supported(trainer(callbacks=BatchSizeFinder()))


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0}, {"gradient_clip_val": float("inf")}, {}])
def test_no_limit_is_no_clipping(options: dict[str, Any]) -> None:
    modules = []
    for given in ({"gradient_clip_val": 1e6}, options):
        torch.manual_seed(0)
        modules.append(GPTModule(TINY))
        trainer(**given).fit(modules[-1], batches(5))
    for one, other in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(one, other)


def test_sharded_weights_are_not_averaged() -> None:
    numbers = {"world_size": 1, "accumulate_grad_batches": 1, "log_every_n_steps": 1}
    fields = {**numbers, "gradient_clip_val": None, "precision": "32-true"}
    sharded: Any = SimpleNamespace(**fields, strategy=FSDP2Strategy(), callbacks=[EMAWeightAveraging()])
    with pytest.raises(InputError, match="EMAWeightAveraging does not work with sharded weights: use .* ddp"):
        check_supported(sharded)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("order", ["vf", "fvf"])
def test_validations_and_fits_follow_each_other_in_one_process(text_file: Path, precision: str, order: str) -> None:
    torch.manual_seed(0)
    module = GPTModule(TINY_GPT2)
    datamodule = TokenDataModule(str(text_file), batch_size=4, val_fraction=0.1)
    worker = trainer(precision=precision, max_steps=3)
    for number, kind in enumerate(order):
        if kind == "v":
            found = worker.validate(module, datamodule, verbose=False)[0]["val/loss"]
            with torch.no_grad():
                losses = [module._loss(*batch, "mean") for batch in datamodule.val_dataloader()]
            assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)
        else:
            worker.fit_loop.epoch_loop.max_steps = 3 * (number + 1)
            worker.fit(module, datamodule)


# --- weight averaging

EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.8", "--model.config.drop_rate=0.2"]
EVERY = ["--trainer.max_steps=6", "--run.val_every_n_steps=3", "--run.save_every_n_steps=3", "--run.keep_last=-1"]
RUN = Path("runs/t/version_0")
AVERAGED = ("state_dict", "current_model_state", "averaging_state")


def test_the_average_and_the_weights_are_both_saved_and_resumed(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(*EVERY, *EMA[2:])
    plain = read_checkpoint(checkpoint_path(RUN, 6))
    fit(*EVERY, *EMA, "--run.name=whole")
    whole = read_checkpoint(checkpoint_path(Path("runs/whole/version_0"), 6))
    for name, value in plain["state_dict"].items():
        assert torch.equal(whole["current_model_state"][name], value), name
        assert not torch.equal(whole["state_dict"][name], value), name
    validate = GPTModule.validation_step

    def interrupted(self: GPTModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        validate(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(GPTModule, "validation_step", interrupted)  # the model holds the average there
        with pytest.raises(SystemExit):
            fit(*EVERY, *EMA, "--run.name=stopped")
    fit(*EVERY, *EMA, "--run.name=stopped", "--ckpt_path=last")
    stopped = read_checkpoint(checkpoint_path(Path("runs/stopped/version_0"), 6))
    for key in AVERAGED:
        for name, value in whole[key].items():
            assert torch.equal(stopped[key][name], value), (key, name)


def test_early_stopping_counts_on_after_a_resume(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    flags += ["--trainer.callbacks.patience=3", "--trainer.callbacks.min_delta=9"]  # the first one stays the best
    flags += ["--trainer.max_steps=20", "--run.val_every_n_steps=2", "--run.save_every_n_steps=5", "--run.keep_last=-1"]
    fit(*flags)
    assert list(losses(RUN, "val/loss")) == [2, 4, 6, 8]
    for path in checkpoints(RUN)[1:]:
        path.unlink()  # as if killed after step 5
    fit(*flags, "--ckpt_path=last")
    assert list(losses(RUN, "val/loss")) == [2, 4, 6, 8]
    assert "stopped after step 8 of 20: Monitored metric val/loss did not" in capsys.readouterr().err


def test_a_run_goes_on_without_its_average(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--run.save_every_n_steps=3", "--model.schedule=constant", "--trainer.max_steps"]
    fit(*rest, "6")
    fit(*EMA[:2], *rest, "3", "--run.name=a")
    fit(*rest, "6", "--run.name=a", "--ckpt_path=last")
    assert "the checkpoint has averaged weights too" in capsys.readouterr().err
    one, two = (read_checkpoint(checkpoint_path(Path(f"runs/{name}/version_0"), 6))["state_dict"] for name in "ta")
    assert all(torch.equal(two[name], value) for name, value in one.items())
