"""`gptlit plan`: what `train.py fit` would cost with the same files and flags; nothing is trained or written."""

import json
import sys
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from gptlit.checkpoint.formats import PretrainedWeights
from gptlit.checkpoint.pretrained import check_compatible
from gptlit.config import PRESETS
from gptlit.data.compatibility import check_classes, check_division, check_model, micro_batch_size
from gptlit.data.parsers import ReadOptions
from gptlit.data.run_sources import has_labels
from gptlit.errors import InputError, fail
from gptlit.training.cli import TrainingCLI, command_line, one_line_errors
from gptlit.training.distributed import FSDP2Strategy
from gptlit.training.estimate import RunSpec, describe, gigabytes, make_plan, warnings
from gptlit.training.measure import measure

HUB_NAMES = {"gpt2": "gpt2-small", **{name: name for name in ("gpt2-medium", "gpt2-large", "gpt2-xl")}}


class PlanCLI(TrainingCLI):
    """Parses what `fit` parses, and stops before anything is instantiated."""

    makes_files = False

    @override
    def _resolve_architecture(self, config: Any) -> None:
        name = str(config.model.init_from).removeprefix("hf:").removeprefix("openai-community/")
        if not str(config.model.init_from).startswith("hf:") or name not in HUB_NAMES:
            return super()._resolve_architecture(config)
        classifies = has_labels(config.data.source, ReadOptions(config.data.text_key, config.data.separator))
        preset = replace(PRESETS[HUB_NAMES[name]], qkv_bias=True, tie_weights=not classifies)  # without a download
        given = self._given("model", "config")
        check_compatible(given, PretrainedWeights(Path(config.model.init_from), preset, {}))
        for key, value in (asdict(preset) | given).items():
            config.model.config[key] = value

    @override
    def instantiate_classes(self) -> None:
        pass

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def run(args: list[str], with_measure: bool, as_json: bool) -> None:
    """Print the plan of `train.py fit` with these arguments, its warnings last.

    Args:
        args: Files and flags of `fit`.
        with_measure: Time a micro-batch and a step on this machine, and estimate when the run would end.
        as_json: Print one JSON object.
    """
    cli = command_line(PlanCLI, ["fit", *args])
    with one_line_errors():
        config = cli.parser.instantiate(cli.config)["fit"]
    try:
        spec = run_spec(config, cli.run)
        plan = make_plan(spec)
        if not as_json:
            print("\n".join(describe(spec, plan)), flush=True)
        if with_measure:
            done = 0 if cli.checkpoint is None else cli.checkpoint["global_step"]
            plan["time"] = time_of(spec, plan, done)
    except (ValueError, TypeError, RuntimeError) as error:
        fail(error, status=2)
    if as_json:
        print(json.dumps({**plan, "warnings": warnings(spec, plan)}, indent=1))
        return
    if with_measure:
        rate = f"{plan['time']['seconds_a_step']:.3g} s a step, {plan['time']['tokens_per_second']:,.0f} tokens/s"
        left = f": {timedelta(seconds=round(plan['time']['seconds']))} to the end" if plan["time"]["seconds"] else ""
        print(f"time    {rate}{left}, validations and checkpoints not counted")
    for line in warnings(spec, plan):
        print(f"warning: {line}")


def run_spec(config: Any, run: Path) -> RunSpec:
    """Return the spec of an instantiated configuration of `fit`."""
    data, trainer = config.data, config.trainer
    device = device_of(trainer.accelerator)
    devices = count_devices(trainer.devices, device) * int(trainer.num_nodes)
    if devices < 1:
        raise InputError(
            f"trainer.devices {trainer.devices}, trainer.num_nodes {trainer.num_nodes}: each must be at least 1"
        )
    check_division(data.batch_size, devices)
    check_model(config.model.config, data.context_length, data.tokenizer)
    data.context_length = config.model.config.context_length
    if data.sources.is_prepared():
        data.load("fit")
        check_classes(config.model.config, data.labels, data.source)
        config.model.config = replace(config.model.config, n_classes=len(data.labels))
    return RunSpec.of(
        config.model,
        data,
        precision=str(trainer.precision),
        device=device,
        devices=devices,
        nodes=int(trainer.num_nodes),
        shards=count_shards(trainer.strategy, devices, devices // int(trainer.num_nodes)),
        micro_batch_size=micro_batch_size(data.batch_size, devices, data.micro_batch_size),
        steps=None if trainer.max_steps == -1 else trainer.max_steps,
        epochs=None if trainer.max_epochs in (None, -1) else trainer.max_epochs,
        keep_last=0 if trainer.enable_checkpointing is False else config.run.keep_last,
        keep_best=config.run.keep_best,
        folder=run.parent.parent,
    )


def device_of(accelerator: Any) -> str:
    """Return the device type of one of Lightning's accelerator names.

    Raises:
        InputError: This project does not train on it.
    """
    if accelerator in ("gpu", "cuda"):
        return "cuda"
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if accelerator not in ("cpu", "mps"):
        raise InputError(f"trainer.accelerator {accelerator!r} cannot be planned: use auto, cpu, gpu or mps")
    return str(accelerator)


def count_devices(devices: Any, device: str) -> int:
    """Return the number of devices per node; 1 for "auto" without a GPU."""
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    if isinstance(devices, str) and "," in devices:  # indices
        devices = [index for index in devices.split(",") if index.strip()]
    return len(devices) if isinstance(devices, list) else int(devices)


def count_shards(strategy: Any, devices: int, devices_per_node: int) -> int:
    """Return over how many devices a strategy, or one of its names, shards parameters."""
    if isinstance(strategy, FSDP2Strategy):
        return getattr(strategy, "shard_size", devices) or devices_per_node
    return {"fsdp2": devices, "hsdp": devices_per_node}.get(str(strategy), 1)


def time_of(spec: RunSpec, plan: dict[str, Any], done: int) -> dict[str, Any]:
    """Measure the time that the run takes from step `done`, if all devices are like the one here.

    Raises:
        InputError: The device of the configuration is missing here, or too small.
    """
    need, have = plan["memory"]["total"], plan["memory"]["available"]
    if have is not None and need > have:
        raise InputError(f"--measure: {gigabytes(need)} are needed and the device has {gigabytes(have)}")
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--measure: there is no GPU here; add --trainer.accelerator cpu to measure the CPU")
    print("measuring: a few micro-batches and steps with random weights", file=sys.stderr)
    seconds = measure(spec)
    steps = plan["run"]["steps"]
    total = None if steps is None else seconds * max(0, steps - done)
    end = None if total is None else (datetime.now() + timedelta(seconds=total)).isoformat(timespec="seconds")
    rate = plan["step"]["tokens"] / seconds
    return {"seconds_a_step": seconds, "seconds": total, "tokens_per_second": rate, "end": end}
