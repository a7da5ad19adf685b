"""The command line of train.py: a LightningCLI with a `run` group, resuming, and one-line errors."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.distributed import DistError
from typing_extensions import override

from gptlit.checkpoint.io import DurableCheckpointIO
from gptlit.checkpoint.runs import (
    find_checkpoint,
    folder_to_continue,
    last_run,
    locked,
    locked_new_run,
    new_run_folder,
    newest_checkpoint,
)
from gptlit.data.compatibility import check_batch_settings, check_division
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.tokenizer import store_tokenizer
from gptlit.errors import InputError, fail, note, set_up_streams, user_path
from gptlit.training.callbacks.checkpoint import StepCheckpoint
from gptlit.training.callbacks.monitoring import NonFinite, Throughput
from gptlit.training.callbacks.progress import StepProgress, print_closing
from gptlit.training.callbacks.signals import GracefulStop
from gptlit.training.callbacks.validation import FinalValidation, SampleText
from gptlit.training.distributed import register_strategies
from gptlit.training.environment import (
    best_precision,
    check_devices,
    end_with_parent,
    is_first_process,
    keep_freed_memory,
    launched,
    silence_lightning,
)
from gptlit.training.lightning_compat import disable_path_values, starts_scripts
from gptlit.training.module import GPTModule
from gptlit.training.parser import Parser, expand_recipes
from gptlit.training.resume import complete_architecture
from gptlit.training.run_config import RunConfig, SaveRunConfig
from gptlit.training.supported import check_supported
from gptlit.training.tensorboard import StepLogger

PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's short names


class TrainingCLI(LightningCLI):
    """fit, validate and test of a GPTModule on a TokenDataModule."""

    makes_files = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoint: dict[str, Any] | None = None  # that of a resume, until it is handed to the Trainer
        with ExitStack() as self._locks:  # Lightning parses and runs in here
            super().__init__(*args, **kwargs)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Return each command with the arguments of its Trainer method that are not options."""
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only"} for name in ("fit", "validate", "test")}

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        disable_path_values(parser, "data.source")

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, "run")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and keep `args`: `_given` parses them again without defaults."""
        self._args = args = expand_recipes(sys.argv[1:] if args is None else args)
        try:
            self.config = parser.parse_args(args)
            config = self.config[self.config.subcommand]
            for group in ("model", "data", "trainer", "run", "model.config"):
                if config[group] is None:
                    raise InputError(f"{group} is empty: give it settings, or leave the line out")
            self._subcommand_parsers[self.config.subcommand].validate(config, skip_unset=False)  # an empty value
            if not isinstance(config.seed_everything, bool) and not 0 <= config.seed_everything < 2**32:
                raise InputError(f"seed_everything must be at least 0 and below 2^32, got {config.seed_everything}")
        except (ValueError, TypeError) as error:
            fail(error, status=2)

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyper-parameters override configuration and flags."""

    @override
    def before_instantiate_classes(self) -> None:
        """Resolve what depends on the machine or the disk: precision, devices, run folder, checkpoint, architecture."""
        try:
            config = self.config[self.subcommand]
            resolve_trainer(config.trainer, self.subcommand == "fit")
            self._resolve_run(config)
            self._resolve_architecture(config)
        except ValueError as error:
            fail(error, status=2)

    def _resolve_run(self, config: Any) -> None:
        """Choose the checkpoint to resume and the run folder, which is locked before its newest one is looked for."""
        root, name, is_fit = Path(config.trainer.default_root_dir), config.run.name, self.subcommand == "fit"
        is_requeued = config.ckpt_path is None and is_fit and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        if is_requeued:
            config.ckpt_path = "last"
        if config.ckpt_path is not None and config.trainer.fast_dev_run and is_fit:
            raise InputError("trainer.fast_dev_run cannot resume: leave --ckpt_path out")
        path = folder = None
        if config.ckpt_path == "last":
            folder = last_run(root, name, not is_fit, is_requeued)
        elif config.ckpt_path is not None:
            given = user_path(str(config.ckpt_path))
            path, self.checkpoint = find_checkpoint(given)
            if is_fit and "optimizer_states" not in self.checkpoint:
                raise InputError(f"{path} holds weights only, there is no run to resume: use --model.init_from {path}")
            folder = folder_to_continue(path, name, is_newest=given.is_dir())
        elif not is_fit and config.model.init_from is None:
            note("there is neither --ckpt_path nor --model.init_from: untrained weights are measured")
        self.run, self._is_new = folder or new_run_folder(root, name), folder is None
        if folder is not None and self._writes(config):
            self._locks.enter_context(locked(folder))
        if folder is not None and path is None and (newest := newest_checkpoint(folder)) is not None:
            path, self.checkpoint = newest
        config.ckpt_path = None if path is None else str(path)
        if self.checkpoint is not None:
            base = self.checkpoint["hyper_parameters"].get("init_from")  # of adapters; else all is in there
            adapts = base is not None or config.model.lora.rank
            config.model.init_from = (config.model.init_from or base) if adapts else None
            note(f"{'resuming from' if is_fit else 'checkpoint'} {path}")

    def _resolve_architecture(self, config: Any) -> None:
        complete_architecture(config, self._given("model"), self.checkpoint)
        if self._writes(config) and str(config.data.tokenizer).startswith("{"):
            config.data.tokenizer = str(store_tokenizer(config.data.tokenizer, user_path(config.data.cache_dir)))

    def _given(self, *keys: str) -> dict[str, Any]:
        """Return what files and flags set under a key, without defaults."""
        given: Any = self.parser.parse_args(self._args, defaults=False, _skip_validation=True).as_dict()
        for key in (self.subcommand, *keys):
            given = (given or {}).get(key) or {}
        return dict(given)

    def _writes(self, config: Any) -> bool:
        """Whether this process writes a run's folder."""
        return self.subcommand == "fit" and self.makes_files and not config.trainer.fast_dev_run and is_first_process()

    @override
    def instantiate_classes(self) -> None:
        with one_line_errors():
            super().instantiate_classes()
            check_supported(self.trainer)
            if self.subcommand == "fit":
                check_division(self.datamodule.batch_size, self.trainer.num_devices * self.trainer.num_nodes)
            check_devices(self.trainer)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add this project's logger, callbacks and checkpoint writer to those of the configuration."""
        config = self.config_init[self.subcommand]
        run: RunConfig = config.run
        if self._is_new and self._writes(config):
            self.run = self._locks.enter_context(locked_new_run(Path(config.trainer.default_root_dir), run.name))
        on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        io = DurableCheckpointIO(asynchronous=on_gpu if run.async_save is None else run.async_save)
        resumed_step = None
        if self.checkpoint is not None:
            resumed_step, io.preloaded[Path(config.ckpt_path)] = self.checkpoint.get("global_step"), self.checkpoint
            self.checkpoint = None  # a file that is open keeps its space on disk
        self.trainer_defaults["callbacks"] = run_callbacks(config, self.run, io)
        if config.trainer.logger is not False:
            others = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
            is_fit = self.subcommand == "fit"
            ours = [StepLogger(self.run, self.config.fit, resumed_step)] if is_fit else []
            kwargs["logger"] = [*ours, *(logger for logger in others if logger not in (None, True))]
        self.save_config_kwargs = {"run": self.run}
        kwargs["val_check_interval"], kwargs["check_val_every_n_epoch"] = run.val_every_n_steps, None
        plugins = config.trainer.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), io]
        return super().instantiate_trainer(**kwargs)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            self._broadcast_ckpt_path(subcommand)
            super()._run_subcommand(subcommand)
        except (InputError, OSError):
            if (launcher := self.trainer.strategy.launcher) is not None:
                # Child processes would report that this one has ended. Windows has no SIGKILL.
                launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
            raise

    def _broadcast_ckpt_path(self, subcommand: str) -> None:
        """Take the checkpoint that rank 0 selected: another rank may have seen another state of a shared disk."""
        strategy = self.trainer.strategy
        if self.trainer.num_devices * self.trainer.num_nodes == 1 or not starts_scripts(strategy):
            return
        strategy.connect(self.model)
        launch = strategy.launcher.launch if strategy.launcher is not None else lambda function: function()
        launch(strategy.setup_environment)  # the Trainer skips both then
        config = self.config_init[subcommand]
        config["ckpt_path"] = strategy.broadcast(config["ckpt_path"])

    def after_fit(self) -> None:
        """Print the result, the checkpoint and what to type next."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print_closing(self.trainer, self.run)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report values that a class rejects, and missing packages, in one line."""
    try:
        yield
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        if missing := re.search(r"class_path '([\w.]+)':\s+Requirement '(\S+)' not met", str(error)):
            fail(f"{missing[1]} needs a package: pip install '{missing[2]}'", status=2)
        fail(error, status=2)


def resolve_trainer(trainer: Any, is_fit: bool) -> None:
    """Check the settings that this project makes itself, and choose precision and devices where they are left open.

    Under torchrun and SLURM, the launcher determines the numbers of nodes and of devices.
    """
    trainer.default_root_dir = str(user_path(str(trainer.default_root_dir or "runs")))
    if trainer.barebones:
        raise InputError(
            "trainer.barebones cannot be true, it allows no logging: leave it out; a run with trainer.logger and "
            "trainer.enable_checkpointing false writes no files"
        )
    if trainer.val_check_interval is not None or trainer.check_val_every_n_epoch != 1:
        raise InputError(
            "trainer.val_check_interval and trainer.check_val_every_n_epoch cannot be set: "
            "use run.val_every_n_steps, in optimizer steps"
        )
    if trainer.min_epochs is not None:
        raise InputError("trainer.min_epochs cannot be set: a run is one epoch of Lightning's, use trainer.max_steps")
    if is_fit:
        check_batch_settings(trainer)
    if trainer.precision is None:
        trainer.precision, why = best_precision(trainer.accelerator)
        if is_fit:
            note(f"trainer.precision {trainer.precision}: {why}")
    trainer.precision = PRECISIONS.get(str(trainer.precision), trainer.precision)
    if (numbers := launched()) is not None:
        trainer.num_nodes, trainer.devices = numbers


def run_callbacks(config: Any, folder: Path, io: DurableCheckpointIO) -> list[Callback]:
    """Return this project's callbacks, in the order in which Lightning calls them."""
    run: RunConfig = config.run
    callbacks: list[Callback] = [FinalValidation(run.val_every_n_steps)]
    checkpoint = None
    if config.trainer.enable_checkpointing is not False:
        checkpoint = StepCheckpoint(folder, io, run.save_every_n_steps, run.keep_last, run.keep_best)
        callbacks.append(checkpoint)
    callbacks += [GracefulStop(checkpoint), NonFinite(folder, run.max_nonfinite_steps)]
    if run.sample_prompt:
        callbacks.append(SampleText(run.sample_prompt))
    if config.trainer.enable_progress_bar is not False:
        callbacks.append(StepProgress())
    return [*callbacks, Throughput(None if run.peak_tflops is None else run.peak_tflops * 1e12)]


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    command_line(TrainingCLI, args)


def command_line(cli: type[TrainingCLI], args: list[str] | None) -> TrainingCLI:
    """Set the process up, then parse and run `args`."""
    set_up_streams(drop_unwritable=True)
    silence_lightning()
    keep_freed_memory()
    end_with_parent()
    register_strategies()
    try:
        return cli(
            GPTModule,
            TokenDataModule,
            save_config_callback=SaveRunConfig,
            trainer_defaults={
                "default_root_dir": "runs",
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
            seed_everything_default=123,
            parser_kwargs={"allow_abbrev": False},
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )
    except (InputError, OSError, MisconfigurationException) as error:
        fail(error)
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            fail(error)
        if isinstance(error, DistError) or re.search("onnection (closed|reset) by peer", str(error)):  # gloo's own
            fail("the connection to another process of the run is lost: start it again with --ckpt_path last")
        if isinstance(error, torch.OutOfMemoryError):
            fail(f"lower data.micro_batch_size, or set model.activation_checkpointing: {error}")
        raise
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
