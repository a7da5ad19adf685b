"""The only place that touches private attributes of Lightning and torch.

Each function says why no public API serves. tests/unit/test_lightning_compat.py checks what each one relies on, and
fails when a new release changes it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch._dynamo.config
import torch._functorch.config
from jsonargparse import ArgumentParser, _core, _paths
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.utils.tensorboard import SummaryWriter

# --- public, but awkward ------------------------------------------------------------------------------------------


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the module's Trainer; None where it has none: the public property raises then."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def is_log_step(trainer: pl.Trainer, step: int) -> bool:
    """Whether Lightning writes to the loggers after the 1-based optimizer step `step`.

    In `on_train_batch_end` that is `trainer.global_step`, in hooks before the optimizer step one more.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (step % every == 0 or trainer.should_stop)


def log_numbers(module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Log numbers of the host, which `module.log` would copy to the device: that synchronizes with a GPU."""
    module.log_dict({name: torch.tensor(float(value)) for name, value in values.items()})


def is_validation_of_fit(trainer: pl.Trainer) -> bool:
    """Whether the validation at hand is one of a fit's, and not Lightning's sanity check before it."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def uses_distributed_sampler(trainer: pl.Trainer) -> bool:
    """Whether Lightning replaces samplers by its own where there are several devices: the flag has no public form."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


# --- the Trainer --------------------------------------------------------------------------------------------------


def set_global_step(trainer: pl.Trainer, step: int) -> None:
    """Let a fit continue from `step` optimizer steps: the public `global_step` is read-only.

    Only Lightning's totals are set. Its own restart state counts micro-batches of one device, which is wrong once the
    number of devices or the accumulation changes.
    """
    loop = trainer.fit_loop.epoch_loop
    micro_batches = step * trainer.accumulate_grad_batches
    for counter in ("ready", "started", "processed", "completed"):
        setattr(loop.batch_progress.total, counter, micro_batches)
    progress = loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.ready = progress.completed = step
    loop._batches_that_stepped = step


def run_validation(trainer: pl.Trainer) -> None:
    """Validate before the first step of a fit, logged at the step that has just been made: `trainer.validate` cannot
    be called inside `trainer.fit`.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped -= 1  # Lightning counts a step after its validation
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    loop._batches_that_stepped += 1


def disable_signal_handlers(trainer: pl.Trainer) -> None:
    """Disable Lightning's SIGTERM handling, which synchronizes all devices in every batch and can deadlock under DDP.
    No public setting turns it off.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def starts_scripts(strategy: Strategy) -> bool:
    """Whether each process runs the script from its start: the launcher's class is private."""
    return strategy.launcher is None or isinstance(strategy.launcher, _SubprocessScriptLauncher)


# --- the command line ---------------------------------------------------------------------------------------------


def disable_path_values(parser: ArgumentParser, key: str) -> None:
    """Take the value of `key` as text: jsonargparse would open the file of that name where a list is allowed too."""
    action = next(action for action in parser._actions if action.dest == key)
    action._enable_path = False  # type: ignore[attr-defined]


def option_strings(parser: ArgumentParser) -> list[str]:
    """Return the options of a parser and of its subcommands: argparse offers them only as formatted help."""
    actions = list(parser._actions)
    if parser._subcommands_action is not None:
        for subparser in parser._subcommands_action.choices.values():
            actions += subparser._actions
    return sorted({option for action in actions for option in action.option_strings})


def use_utf8_configs() -> None:
    """Let jsonargparse read and write files as UTF-8: it has no option, and Windows' default is another encoding."""
    for module in (_core, _paths):
        vars(module)["open"] = partial(open, encoding="utf-8")


# --- TensorBoard --------------------------------------------------------------------------------------------------


def add_summary(writer: SummaryWriter, summary: Any) -> None:
    """Write a summary protobuf: the public `add_hparams` opens an event file of its own for each call."""
    writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]


# --- torch --------------------------------------------------------------------------------------------------------


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device is known to multiply bf16 natively. Of MPS torch does not know."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    can = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def configure_compiler(device: torch.device) -> None:
    """Set what torch.compile of the blocks needs, and has no public option for."""
    torch._dynamo.config.optimize_ddp = False  # DDP's optimizer would split each compiled block in two
    recompute_cheap_ops(device)


def recompute_cheap_ops(device: torch.device) -> None:
    """Let torch.compile on a CPU recompute attention scores, GELU and norms in backward instead of saving them.

    By default its common-subexpression elimination identifies the recomputed scores with those of the forward (twice
    the activations), and its partitioner saves whatever a matrix product in backward reads. Recomputing them costs
    about 1% of a step.
    """
    if device.type == "cpu":
        torch._functorch.config.cse = False
        torch._functorch.config.ban_recompute_materialized_backward = False
