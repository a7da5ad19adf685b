"""Contracts with Lightning, jsonargparse and torch: what lightning_compat relies on."""

import signal
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gptlit.training import lightning_compat


class Boring(BoringModel):
    """Logs a metric in training and in validation."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(batch, batch_idx)["loss"]
        self.log("train", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val", self.layer(batch).sum())


class Points(pl.loggers.logger.DummyLogger):
    """Remembers at which steps each metric was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[str, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.points += [(name, step) for name in metrics if name != "epoch"]


def trainer(**options: object) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 4}
    values = {**defaults, "limit_val_batches": 0, "log_every_n_steps": 1, **options}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **values)  # type: ignore[arg-type]


def test_a_module_without_a_trainer_has_none() -> None:
    module = BoringModel()
    assert lightning_compat.attached_trainer(module) is None
    fitter = trainer(max_steps=1)
    fitter.fit(module)
    assert lightning_compat.attached_trainer(module) is fitter


def test_numbers_are_logged_without_a_copy_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(BoringModel, "device", torch.device("meta"))  # whose numbers cannot be read
                lightning_compat.log_numbers(module, {"number": 3})

    fitter = trainer(max_steps=1, callbacks=[Log()])
    fitter.fit(BoringModel())
    assert fitter.logged_metrics["number"] == 3


@pytest.mark.parametrize("accumulation", [1, 3])
def test_log_steps_are_lightnings(accumulation: int) -> None:
    seen = []

    class Compare(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: object) -> None:
            rule = trainer._logger_connector.should_update_logs
            seen.append(lightning_compat.is_log_step(trainer, trainer.global_step + 1) == rule)

        def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
            if not trainer.fit_loop._should_accumulate():
                rule = trainer._logger_connector.should_update_logs
                seen.append(lightning_compat.is_log_step(trainer, trainer.global_step) == rule)
            trainer.should_stop = trainer.global_step >= 5

    trainer(max_steps=7, log_every_n_steps=2, accumulate_grad_batches=accumulation, callbacks=Compare()).fit(Boring())
    assert len(seen) == 10
    assert all(seen)


def test_a_fit_continues_from_the_step_that_was_set() -> None:
    class Continue(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: object) -> None:
            lightning_compat.set_global_step(trainer, 7)
            assert trainer.global_step == 7

    logger = Points()
    fitter = trainer(max_steps=9, accumulate_grad_batches=2, callbacks=Continue(), logger=logger)
    fitter.fit(Boring())
    assert fitter.global_step == 9
    assert logger.points == [("train", 7), ("train", 8)]


def test_a_validation_before_the_first_step_is_logged_at_the_step_before() -> None:
    class Validate(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: object) -> None:
            lightning_compat.set_global_step(trainer, 7)
            lightning_compat.run_validation(trainer)

    logger = Points()
    options = {"max_steps": 8, "limit_val_batches": 1, "val_check_interval": 100, "check_val_every_n_epoch": None}
    trainer(callbacks=Validate(), logger=logger, num_sanity_val_steps=0, **options).fit(Boring())
    assert logger.points[:2] == [("val", 6), ("train", 7)]


def test_lightning_leaves_the_signal_handlers_alone() -> None:
    found = []

    class Look(pl.Callback):
        def on_train_start(self, *_: object) -> None:
            found.append(signal.getsignal(signal.SIGTERM))

    handlers = signal.getsignal(signal.SIGTERM)
    trainer(max_steps=1, callbacks=Look()).fit(Boring())
    fitter = trainer(max_steps=1, callbacks=Look())
    assert callable(fitter.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    lightning_compat.disable_signal_handlers(fitter)
    fitter.fit(Boring())
    assert found[0] is not handlers  # if this fails, Lightning handles signals in another place
    assert found[1] is handlers


@pytest.mark.parametrize(("strategy", "expected"), [("ddp", True), ("ddp_spawn", False), ("auto", True)])
def test_launchers_that_start_scripts(strategy: str, expected: bool) -> None:
    devices = 1 if strategy == "auto" else 2
    assert lightning_compat.starts_scripts(trainer(strategy=strategy, devices=devices).strategy) is expected


@dataclass
class Part:
    """An element of a list of settings."""

    name: str


@pytest.mark.parametrize("is_disabled", [False, True])
def test_a_value_is_not_read_as_a_file(is_disabled: bool) -> None:
    Path("words").write_text("- name: from the file\n")
    parser = LightningArgumentParser()
    parser.add_argument("--source", type=list[Part] | str, sub_configs=True)
    if is_disabled:
        lightning_compat.disable_path_values(parser, "source")
    found = parser.parse_args(["--source=words"]).source
    assert (found == "words") is is_disabled


def test_options_of_a_parser_and_its_subcommands() -> None:
    inner, outer = LightningArgumentParser(), LightningArgumentParser()
    inner.add_argument("--model.lr", type=float)
    outer.add_argument("--verbose")
    outer.add_subcommands().add_subcommand("fit", inner)
    assert {"--model.lr", "--verbose"} <= set(lightning_compat.option_strings(outer))


def test_a_summary_goes_to_the_writers_own_file(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for summary in hparams({"lr": 0.1}, {"val/loss": 0.0}):
        lightning_compat.add_summary(writer, summary)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "_hparams_/experiment" in events.summary_metadata


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "avx512_f"])
def test_two_sets_of_instructions_multiply_bf16(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cpu.get_capabilities()["architecture"]  # the names of x86's are in torch's documentation
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    assert lightning_compat.has_native_bf16(torch.device("cpu")) is instructions.endswith("bf16")
    assert not lightning_compat.has_native_bf16(torch.device("mps"))


def test_torch_has_the_settings() -> None:
    with torch._dynamo.config.patch(optimize_ddp=True):
        before = torch._functorch.config.cse, torch._functorch.config.ban_recompute_materialized_backward
        try:
            lightning_compat.configure_compiler(torch.device("cpu"))  # an unknown name raises
            assert torch._dynamo.config.optimize_ddp is False
            assert torch._functorch.config.cse is False
        finally:
            torch._functorch.config.cse, torch._functorch.config.ban_recompute_materialized_backward = before


@pytest.mark.parametrize("value", [True, False])
def test_the_distributed_sampler_is_the_trainers_flag(value: bool) -> None:
    assert lightning_compat.uses_distributed_sampler(trainer(use_distributed_sampler=value)) is value
