"""The command line of train.py: a LightningCLI with a `run` group, resuming, and one-line errors."""

import logging
import os
import shlex
import socket
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed import DistNetworkError

from gptlit.checkpoint.io import DurableCheckpointIO, read_checkpoint
from gptlit.checkpoint.pretrained import check_compatible, check_tokenizer, read_weights
from gptlit.checkpoint.runs import (
    best_path,
    checkpoint_path,
    find_checkpoint,
    folder_to_continue,
    last_run,
    locked,
    locked_new_run,
    new_run_folder,
    newest_checkpoint,
)
from gptlit.data.compatibility import check_division, check_trainer_settings
from gptlit.data.corpora import tokenizer_for
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError, OneLineErrors, fail, make_output_lossy, note
from gptlit.training import config_files
from gptlit.training.callbacks.checkpoint import StepCheckpoint
from gptlit.training.callbacks.monitoring import DrawnWindows, Throughput
from gptlit.training.callbacks.nonfinite import NonFinite
from gptlit.training.callbacks.peers import PeerWatch
from gptlit.training.callbacks.progress import StepProgress
from gptlit.training.callbacks.signals import GracefulStop, children, early_end
from gptlit.training.callbacks.validation import FinalValidation, SampleText
from gptlit.training.distributed import register_strategies
from gptlit.training.environment import best_precision, keep_freed_memory, launched
from gptlit.training.module import GPTModule
from gptlit.training.run_config import RunConfig, SaveRunConfig
from gptlit.training.supported import check_precision, check_trainer
from gptlit.training.tensorboard import CsvLogger, StepLogger


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


class TrainingCLI(LightningCLI):
    """fit, validate and test of a GPTModule on a TokenDataModule."""

    makes_files = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self._locks:  # Lightning does everything in here: it parses and runs
            super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Each command with the arguments that it does not take from the command line."""
        loaders = {"model", "datamodule", "weights_only"}
        return {
            "fit": loaders | {"train_dataloaders", "val_dataloaders"},
            "validate": loaders | {"dataloaders", "verbose"},
            "test": loaders | {"dataloaders", "verbose"},
        }

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of Trainer, model and data. `data.source` is a name: as it may be a list too, jsonargparse
        would read the file of that name in search of the list.
        """
        super().add_core_arguments_to_parser(parser)
        source = next(action for action in parser._actions if action.dest == "data.source")
        source._enable_path = False  # type: ignore[attr-defined]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the `run` group."""
        parser.add_class_arguments(RunConfig, "run")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Remember the words: `_given` reads them again without the defaults."""
        self._args = args
        try:
            self.config = parser.parse_args(args)
        except UnicodeDecodeError as error:
            fail(f"a configuration file is not UTF-8 ({error}): save it as that", status=2)
        command = self.config.subcommand
        _check_values(self._subcommand_parsers[command], self.config[command])

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters override configuration and flags: not here."""

    def before_instantiate_classes(self) -> None:
        """Settle what depends on the machine or the disk: precision, run folder, checkpoint, architecture."""
        try:
            config = self.config[self.subcommand]
            self._settle_trainer(config)
            self._settle_run(config)
            self._settle_architecture(config)
        except ValueError as error:
            fail(error, status=2)

    def _settle_trainer(self, config: Any) -> None:
        trainer = config.trainer
        trainer.default_root_dir = trainer.default_root_dir or "runs"
        if trainer.val_check_interval is not None or trainer.check_val_every_n_epoch != 1:
            raise InputError(
                "trainer.val_check_interval and trainer.check_val_every_n_epoch are not for setting: "
                "use run.val_every_n_steps, in optimizer steps"
            )
        endless = trainer.max_steps == -1 and trainer.max_epochs in (None, -1) and not trainer.fast_dev_run
        if self.subcommand == "fit":
            check_trainer_settings(trainer)
        if endless and self.subcommand == "fit":
            raise InputError("a run needs an end: set trainer.max_steps or trainer.max_epochs")
        if trainer.precision is None:
            trainer.precision, why = best_precision(trainer.accelerator)
            if self.subcommand == "fit":
                note(f"trainer.precision {trainer.precision}: {why}")
        check_precision(trainer.precision)  # before Lightning asks for a package
        self._settle_devices(trainer)

    def _settle_devices(self, trainer: Any) -> None:
        """Take the number of nodes and of devices on each from torchrun or SLURM, where they are not given."""
        nodes, devices = launched()
        if nodes is None or devices is None:
            return
        given = self._given("trainer")
        for key, ours in {"num_nodes": nodes, "devices": devices}.items():
            if key not in given or given[key] in ("auto", -1, "-1"):
                trainer[key] = ours
            elif str(given[key]) != str(ours):
                raise InputError(
                    f"trainer.{key} is {given[key]}, but this process was started for {nodes} "
                    f"node{'s' * (nodes != 1)} with {devices} device{'s' * (devices != 1)} each: leave it out"
                )

    def _given(self, *keys: str) -> dict[str, Any]:
        """Return what files and flags say under a key, defaults left out."""
        given: Any = self.parser.parse_args(self._args, defaults=False, _skip_validation=True).as_dict()
        for key in (self.subcommand, *keys):
            given = (given or {}).get(key) or {}
        return dict(given)

    def _settle_architecture(self, config: Any) -> None:
        """What is not given of the architecture comes from the checkpoint, from `init_from`, or the tokenizer.

        What is given and contradicts them is refused: here, by the module or by the datamodule.
        """
        given = self._given("model", "config")
        if config.ckpt_path is not None:
            found = read_checkpoint(Path(config.ckpt_path))["hyper_parameters"]["config"]
        elif config.model.init_from is not None:
            source = read_weights(config.model.init_from)
            name = tokenizer_for(config.data.source, config.data.tokenizer, source.tokenizer_name or "gpt2")
            if name == source.tokenizer_name:
                config.data.tokenizer = name  # what trained the weights, unless the data say otherwise
            check_tokenizer(source, load_tokenizer(name))
            rows = source.config.vocab_size
            source = check_compatible({"vocab_size": load_tokenizer(name).n_vocab, **given}, source)
            if source.config.vocab_size < rows:
                note(f"the vocabulary is cut: from {rows} to {source.config.vocab_size} ids")
            found = asdict(source.config)
            length, theirs = given.get("context_length", found["context_length"]), found["context_length"]
            if length != theirs:
                what = "cut" if length < theirs else "extended with untrained rows"
                note(f"the table of positions is {what}: from {theirs} to {length} tokens")
        else:
            found = {"vocab_size": load_tokenizer(tokenizer_for(config.data.source, config.data.tokenizer)).n_vocab}
        for key, value in {**found, **given}.items():
            config.model.config[key] = value

    def _settle_run(self, config: Any) -> None:
        """Choose the checkpoint to go on from and the folder to write to; lock it before its newest is looked for."""
        root, name, is_fit = Path(config.trainer.default_root_dir), config.run.name, self.subcommand == "fit"
        if config.ckpt_path is None and is_fit and int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            config.ckpt_path = "last"  # SLURM has put the job into the queue again
        found = folder = None
        if config.ckpt_path == "last":
            folder = last_run(root, name, must_exist=not is_fit)
        elif config.ckpt_path is not None:
            found = find_checkpoint(Path(config.ckpt_path))
            if is_fit and "optimizer_states" not in read_checkpoint(found):
                raise InputError(
                    f"{found} holds weights only, there is no run to resume: use --model.init_from {found}"
                )
            folder = folder_to_continue(found, name)
        elif not is_fit and config.model.init_from is None:
            note("there is neither --ckpt_path nor --model.init_from: untrained weights are measured")
        self.run, self._is_new = folder or new_run_folder(root, name), folder is None
        if folder is not None and self._writes(config):
            self._locks.enter_context(locked(folder))
        if config.ckpt_path == "last" and folder is not None:
            found = newest_checkpoint(folder)
        config.ckpt_path = None if found is None else str(found)
        if found is not None:
            config.model.init_from = None  # the weights are the checkpoint's
            note(f"{'resuming from' if is_fit else 'checkpoint'} {found}")

    def _writes(self, config: Any) -> bool:
        """Whether this process writes a run's folder."""
        return self.subcommand == "fit" and self.makes_files and not config.trainer.fast_dev_run and is_first_process()

    def instantiate_classes(self) -> None:
        """A value that a class refuses is the user's to mend; a package that is missing, theirs to install."""
        try:
            super().instantiate_classes()
            check_trainer(self.trainer)
            self._check_devices()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            fail(error, status=2)

    def _check_devices(self) -> None:
        """Check that all devices get work, before a process is started for each.

        Raises:
            InputError: The batch or the CPU cannot be divided among so many.
        """
        devices = self.trainer.num_devices * self.trainer.num_nodes
        if self.subcommand == "fit":
            check_division(self.datamodule.batch_size, devices)
        most = max(8, os.cpu_count() or 1)
        if isinstance(self.trainer.accelerator, CPUAccelerator) and self.trainer.num_devices > most:
            raise InputError(
                f"trainer.devices {self.trainer.num_devices} would start as many processes on this CPU of "
                f"{os.cpu_count()} cores: use at most {most}"
            )
        starts_others = launched() == (None, None) and not {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys()
        if devices > 1 and starts_others and (port := os.environ.get("MASTER_PORT")):
            _check_port(port)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add this project's logger, callbacks and durable writer to what the configuration asks for."""
        config = self.config_init[self.subcommand]
        run: RunConfig = config.run
        if self._is_new and self._writes(config):
            self.run = self._locks.enter_context(locked_new_run(Path(config.trainer.default_root_dir), run.name))
        on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        io = DurableCheckpointIO(asynchronous=on_gpu if run.async_save is None else run.async_save)
        checkpoint = None
        callbacks: list[Any] = [PeerWatch(), FinalValidation(run.val_every_n_steps)]
        if config.trainer.enable_checkpointing is not False:
            checkpoint = StepCheckpoint(self.run, io, run.save_every_n_steps, run.keep_last, run.keep_best)
            callbacks.append(checkpoint)
        callbacks.append(GracefulStop(checkpoint))
        callbacks.append(NonFinite(self.run, run.max_nonfinite_steps))
        if run.sample_prompt:
            callbacks.append(SampleText(run.sample_prompt))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(StepProgress())
        if isinstance(self.config[self.subcommand].data.source, list):
            callbacks.append(DrawnWindows())
        callbacks.append(Throughput(None if run.peak_tflops is None else run.peak_tflops * 1e12))
        if config.trainer.logger is not False:
            others = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
            kwargs["logger"] = [*self._loggers(config), *(logger for logger in others if logger not in (None, True))]
        self.trainer_defaults["callbacks"] = callbacks
        self.save_config_kwargs = {"run": self.run}
        kwargs["val_check_interval"], kwargs["check_val_every_n_epoch"] = run.val_every_n_steps, None
        kwargs["plugins"] = [*(config.trainer.plugins or []), io]
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it from the checkpoint of the first process."""
        self._take_the_checkpoint_of_rank_0(subcommand)
        super()._run_subcommand(subcommand)

    def _take_the_checkpoint_of_rank_0(self, subcommand: str) -> None:
        """Each process has looked for the checkpoint itself, and may have seen another state of a shared disk."""
        strategy = self.trainer.strategy
        starts_scripts = strategy.launcher is None or isinstance(strategy.launcher, _SubprocessScriptLauncher)
        if self.trainer.num_devices * self.trainer.num_nodes == 1 or not starts_scripts:
            return
        strategy.connect(self.model)
        launch = strategy.launcher.launch if strategy.launcher is not None else lambda function: function()
        try:
            launch(strategy.setup_environment)  # the Trainer finds both done
            config = self.config_init[subcommand]
            config["ckpt_path"] = strategy.broadcast(config["ckpt_path"])
        except BaseException:
            for process in children(self.trainer):
                process.kill()
            raise

    def _loggers(self, config: Any) -> list[Any]:
        """Curves go to the run's folder; after a resume they go on where the checkpoint was made."""
        if self.subcommand != "fit":
            return []
        step = tokens = None
        if config.ckpt_path is not None:
            checkpoint = read_checkpoint(Path(config.ckpt_path))
            step, tokens = checkpoint["global_step"], checkpoint.get("tokens")
        tensorboard = StepLogger(
            self.run.parent.parent,
            name=self.run.parent.name,
            version=self.run.name,
            default_hp_metric=False,
            purge_step=None if step is None else step + 1,
            purge_tokens=tokens,
            settings=_flat(self.config[self.subcommand]),
        )
        return [tensorboard, CsvLogger(self.run, step)]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lightning's table of results is replaced by a line."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs if subcommand == "fit" else {**kwargs, "verbose": False}

    def after_validate(self) -> None:
        """Print val/loss and perplexity."""
        self._print_result("val")

    def after_test(self) -> None:
        """Print test/loss and perplexity."""
        self._print_result("test")

    def _print_result(self, name: str) -> None:
        metrics = self.trainer.callback_metrics
        if self.trainer.is_global_zero and f"{name}/loss" in metrics:
            loss, perplexity = float(metrics[f"{name}/loss"]), float(metrics[f"{name}/perplexity"])
            print(f"{name + '/loss':<10}  {loss:.4f}   perplexity {perplexity:.1f}")

    def after_fit(self) -> None:
        """Close with the result, the checkpoint and what to type next."""
        newest = checkpoint_path(self.run, self.trainer.global_step)
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        print()
        self._print_result("val")
        saver = self.trainer.checkpoint_callback
        if isinstance(saver, StepCheckpoint) and 0 <= saver.best_step < self.trainer.global_step:
            print(f"best        {saver.best_loss:.4f} at step {saver.best_step}: {best_path(self.run)}")
        if (why := early_end(self.trainer)) is not None:
            saved = f"; --ckpt_path {shlex.quote(str(self.run))} goes on there" if newest.is_file() else ""
            note(f"stopped after step {self.trainer.global_step} of {self.trainer.max_steps}: {why}{saved}")
        if newest.is_file():
            print(f"checkpoint  {newest}\n\nwhat next:")
            for command in self._what_next():
                print(f"  {shlex.join(command)}")

    def _what_next(self) -> list[list[str]]:
        """Return the commands that a user may want after a fit, for this very run."""
        config = self.config[self.subcommand]
        run, file = str(self.run), max(self.run.glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
        active = os.environ.get("VIRTUAL_ENV") == sys.prefix
        python = "python" if active else os.path.relpath(sys.executable)
        script = os.path.relpath(Path(__file__).parent.parent / "train.py")
        more: list[str] = []
        if self.trainer.global_step >= self.trainer.max_steps:  # raise each limit: one of them has ended the run
            for key in ("max_steps", "max_epochs"):
                if (limit := config.trainer[key]) not in (None, -1):
                    more += [f"--trainer.{key}", str(2 * limit)]
        commands = [
            [python, "-m", "gptlit", "generate", "--checkpoint", run, f"--prompt={config.run.sample_prompt or 'The'}"],
            [python, script, "fit", "--config", str(file), "--ckpt_path", run, *more],
        ]
        if (self.run / "metrics.csv").is_file():
            commands.append([python, "-m", "gptlit", "plot", run, "--out", "curves.png"])
            commands.append([python, "-m", "tensorboard.main", "--logdir", str(self.run.parent.parent)])
        return commands


def _check_port(port: str) -> None:
    """Check that the processes can meet at a port of this machine.

    Raises:
        InputError: They cannot.
    """
    try:
        socket.create_server(("", int(port))).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"MASTER_PORT {port} cannot be used ({error}): set another, or none to have one found"
        ) from error


def _check_values(parser: LightningArgumentParser, config: Namespace) -> None:
    """Check what parsing leaves out: that nothing is empty that needs a value, and the seed."""
    for group in ("model", "data", "trainer", "run", "model.config"):
        if config[group] is None:
            fail(f"{group} is empty: give it settings, or leave the line out", status=2)
    try:
        parser.validate(config, skip_unset=False)
    except TypeError as error:
        key = str(error).split('"')[1]  # 'Parser key "model.lr": ...'
        is_empty = config.get(key) is None
        fail(f"{key} is empty: give it a value, or leave the line out" if is_empty else error, status=2)
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        fail(f"seed_everything must be at least 0 and below 2^32, got {seed}", status=2)


def _flat(config: Namespace) -> dict[str, bool | int | float | str]:
    """Return the settings of model, data and run, and some of the Trainer's, by their dotted names."""
    found = {}
    for key, value in config.clone().items():
        of_trainer = key.removeprefix("trainer.") in ("max_steps", "max_epochs", "precision", "gradient_clip_val")
        if (key.split(".")[0] in ("model", "data", "run", "seed_everything") or of_trainer) and value is not None:
            found[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def is_first_process() -> bool:
    """Whether this is the first process of a run, whoever started it."""
    return not any(int(os.environ.get(key) or 0) for key in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _silence_lightning() -> None:
    """Seeds, devices and tips are not news; warnings are, and what a callback or profiler of the user's says."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True")  # they are means
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("callbacks", "profilers", "tuner", "utilities.rank_zero"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's shared logger is a warning, or comes from a callback or the tuner."""
    return record.levelno > logging.INFO or Path(record.pathname).parent.name in ("callbacks", "tuner")


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors that a user can mend are one line."""
    command_line(TrainingCLI, args)


def command_line(cli: type[TrainingCLI], args: list[str] | None) -> TrainingCLI:
    """Set the process up, then parse and run `args`."""
    make_output_lossy()
    _silence_lightning()
    keep_freed_memory()
    register_strategies()
    config_files.register()
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
    except DistNetworkError as error:
        fail(f"the processes of the run cannot reach each other: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            fail(error)
        raise
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
