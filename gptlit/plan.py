"""`gptlit plan`: what `train.py fit` would cost with the same files and flags; nothing is trained or written."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from gptlit.config import PRESETS, GPTConfig
from gptlit.costs import Work, describe, make_plan, measure, warnings
from gptlit.data.datamodule import TokenDataModule, micro_batch_size
from gptlit.errors import InputError, fail
from gptlit.module import GPTModule
from gptlit.training import TrainingCLI, command_line

HUB_NAMES = {"gpt2": "small", "gpt2-medium": "medium", "gpt2-large": "large", "gpt2-xl": "xl"}


class PlanCLI(TrainingCLI):
    """Reads what `fit` reads, and stops before anything is made of it."""

    def before_instantiate_classes(self) -> None:
        """Settle what depends on the machine; what is not here stays open."""
        self.open: list[str] = []
        super().before_instantiate_classes()

    def _settle_architecture(self, config: Any) -> None:
        preset = HUB_NAMES.get(str(config.model.init_from).removeprefix("hf:").removeprefix("openai-community/"))
        try:
            if preset is None:
                return super()._settle_architecture(config)
            known = {"qkv_bias": True, "tie_weights": True}  # no need to fetch half a gigabyte for its shape
            known |= {key: getattr(PRESETS[f"gpt2-{preset}"], key) for key in ("emb_dim", "n_layers", "n_heads")}
            for key, value in {**known, **self._given("model", "config")}.items():
                config.model.config[key] = value
        except InputError as error:
            self.open.append(f"{error}; the architecture is that of the configuration")

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def run(args: list[str], with_measure: bool, as_json: bool) -> None:
    """Print the plan of `train.py fit` with these arguments, its warnings last.

    Args:
        args: Files and flags of `fit`.
        with_measure: Time a micro-batch and a step on this machine, and reckon when the run would end.
        as_json: Print one JSON object.
    """
    cli = command_line(PlanCLI, ["fit", *args])
    assert isinstance(cli, PlanCLI)
    try:
        work = work_of(cli.config["fit"], cli.run)
        plan = make_plan(work)
        found = [*cli.open, *warnings(work, plan)]
        if with_measure:
            plan["time"] = time_of(work, plan)
    except (ValueError, TypeError) as error:
        fail(error, status=2)
    if as_json:
        print(json.dumps({**plan, "warnings": found}, indent=1))
        return
    print("\n".join(describe(work, plan)))
    if (seconds := plan["time"]["seconds_a_step"]) is not None:
        rate = f"{seconds:.3g} s a step, {plan['time']['tokens_per_second']:,.0f} tokens/s"
        left = f": {timedelta(seconds=round(plan['time']['seconds']))} to the end" if plan["time"]["seconds"] else ""
        print(f"time    {rate}{left}, validations and checkpoints not counted")
    for line in found:
        print(f"warning: {line}")


def work_of(config: Any, run: Path) -> Work:
    """Return what is to be planned, from a parsed configuration of `fit`."""
    model, data, trainer = config.model, config.data, config.trainer
    values = model.as_dict()
    module = GPTModule(**{**values, "config": GPTConfig(**values["config"]), "init_from": None})  # checks the values
    device = device_of(trainer.accelerator)
    devices = count_devices(trainer.devices, device) * int(trainer.num_nodes)
    datamodule = TokenDataModule(**config.data.as_dict() if isinstance(data.source, str) else _with_sources(data))
    datamodule.context_length = datamodule.context_length or module.config.context_length
    windows = val_windows = tokens = None
    if datamodule.is_prepared:
        datamodule.prepare_data()
        windows, val_windows = (len(datamodule.windows[name]) for name in ("train", "val"))
        tokens = datamodule.data.tokens("train")
    saves = config.run.keep_last
    return Work(
        config=module.config,
        optimizer=model.optimizer,
        precision=str(trainer.precision),
        device=device,
        devices=devices,
        shards=trainer.strategy == "fsdp2",
        recompute=model.activation_checkpointing,
        compile=model.compile,
        batch_size=data.batch_size,
        micro_batch_size=micro_batch_size(data.batch_size, devices, data.micro_batch_size),
        steps=None if trainer.max_steps == -1 else trainer.max_steps,
        epochs=None if trainer.max_epochs in (None, -1) else trainer.max_epochs,
        lr=model.lr,
        warmup_steps=model.warmup_steps,
        is_pretrained=model.init_from is not None,
        windows=windows,
        val_windows=val_windows,
        train_tokens=tokens,
        saves=None if saves == -1 else saves + config.run.keep_best,
        folder=run.parent.parent,
    )


def _with_sources(data: Any) -> dict[str, Any]:
    from gptlit.data.datamodule import Weighted

    sources = [part if isinstance(part, Weighted) else Weighted(**vars(part)) for part in data.source]
    return {**data.as_dict(), "source": sources}


def device_of(accelerator: Any) -> str:
    """Return the kind of device that Lightning's name stands for."""
    if accelerator in ("gpu", "cuda"):
        return "cuda"
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return str(accelerator)


def count_devices(devices: Any, device: str) -> int:
    """Return how many devices of a machine are used; 1 for all GPUs of a machine without any."""
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return int(text) if text.isdigit() else len([part for part in text.split(",") if part])


def time_of(work: Work, plan: dict[str, Any]) -> dict[str, Any]:
    """Return what the run would take if all devices were like the one here.

    Raises:
        InputError: The device of the configuration is not here.
    """
    if work.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--measure: there is no GPU here; add --trainer.accelerator cpu to measure the CPU")
    print("measuring: a few micro-batches and steps with random weights", file=sys.stderr)
    seconds = measure(work)
    steps = plan["run"]["steps"]
    total = None if steps is None else seconds * steps
    end = None if total is None else (datetime.now() + timedelta(seconds=total)).isoformat(timespec="seconds")
    rate = plan["step"]["tokens"] / seconds
    return {"seconds_a_step": seconds, "seconds": total, "tokens_per_second": rate, "end": end}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the YAML files of `train.py fit`; jsonargparse makes it."""
    from jsonargparse._completions_jsonschema import ParserJsonschema

    class Schema(ParserJsonschema):  # type: ignore[misc,unused-ignore]
        def action_type_schema(self, action: Any, consts: Any) -> Any:
            try:
                return super().action_type_schema(action, consts)  # type: ignore[no-untyped-call,unused-ignore]
            except TypeError:  # one of Lightning's plugins takes a metaclass, whose subclasses cannot be listed
                return {}

    cli = command_line(PlanCLI, ["fit", "--trainer.max_steps=1", "--trainer.precision=32-true"])
    return dict(Schema().generate(cli._parser("fit")))  # type: ignore[no-untyped-call,unused-ignore]
