"""Which run and checkpoint a command starts from, and what that decides and restricts.

A checkpoint holds where a run stands once for each owner: `global_step` is Lightning's, `tokens` the module's, and the
position in the data (`TokenDataModule`) the data module's.
"""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer, WeightAveraging

from gptlit.checkpoint.formats import DATA_STATE
from gptlit.checkpoint.pretrained import check_base, check_compatible, check_tokenizer, read_weights
from gptlit.config import GPTConfig
from gptlit.data.parsers import ReadOptions
from gptlit.data.run_sources import choose_tokenizer_spec, has_labels
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError, note
from gptlit.model.lora import LoRAConfig
from gptlit.training.lightning_compat import set_global_step


def complete_architecture(config: Any, given: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    """Fill in what is left open: `model.config` and `data.tokenizer` from a checkpoint or weights, `vocab_size` from
    the tokenizer, `model.lora` from a checkpoint. Given values that contradict their source are rejected here, by the
    module or the data.

    Args:
        config: The parsed configuration of a command; changed in place.
        given: The keys of `model` that files and flags set.
        checkpoint: That of a resume.
    """
    architecture, lora = given.get("config") or {}, given.get("lora") or {}
    if checkpoint is not None:
        found = checkpoint["hyper_parameters"]["config"]
        _choose_tokenizer(config, checkpoint.get(DATA_STATE, {}).get("tokenizer"))
        lora = {**checkpoint["hyper_parameters"].get("lora", {}), **lora}
    elif config.model.init_from is not None:
        found = _of_pretrained(config, architecture)
    else:
        found = {"vocab_size": load_tokenizer(choose_tokenizer_spec(config.data.source, config.data.tokenizer)).n_vocab}
    for key, value in {**found, **architecture}.items():
        config.model.config[key] = value
    for key, value in lora.items():
        config.model.lora[key] = value


def _of_pretrained(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture of `model.init_from`, and set its tokenizer if none is given."""
    source = read_weights(config.model.init_from)
    name = _choose_tokenizer(config, source.tokenizer)
    check_tokenizer(source, load_tokenizer(name))
    rows = source.config.vocab_size
    source = check_compatible({"vocab_size": load_tokenizer(name).n_vocab, **given}, source)
    if source.config.vocab_size < rows:
        note(f"the vocabulary is cut: from {rows} to {source.config.vocab_size} ids")
    found = asdict(source.config)
    if has_labels(config.data.source, ReadOptions(config.data.text_key, config.data.separator)):
        found |= {"n_classes": 0, "tie_weights": False}  # the data decide
    length, theirs = given.get("context_length", found["context_length"]), found["context_length"]
    if length != theirs:
        what = "cut" if length < theirs else "extended with untrained rows"
        note(f"the table of positions is {what}: from {theirs} to {length} tokens")
    return found


def _choose_tokenizer(config: Any, theirs: str | None) -> str:
    """Return the argument of `load_tokenizer` for the data, and set it where only `theirs` says so."""
    name = choose_tokenizer_spec(config.data.source, config.data.tokenizer, theirs or "gpt2")
    if name == theirs:
        config.data.tokenizer = name
    return name


def check_same_model(ours: Mapping[str, Any], checkpoint: dict[str, Any], is_fit: bool) -> None:
    """Check that a checkpoint is one of the model with these hyper-parameters; `drop_rate` may differ.

    Raises:
        InputError: A key differs, or one that the optimizer's state depends on (in a fit); it is named, with both
            values. Or adapters are for other weights.
    """
    theirs = {"trainable": "all", "lora": {}, **checkpoint["hyper_parameters"]}  # keys that are newer have defaults
    pairs: dict[str, tuple[Any, Any]] = {}
    for group, defaults in {"config": asdict(GPTConfig()), "lora": asdict(LoRAConfig())}.items():
        values = {**defaults, **theirs[group]}
        pairs |= {f"{group}.{key}": (value, values[key]) for key, value in ours[group].items() if key != "drop_rate"}
    pairs |= {key: (ours[key], theirs.get(key, ours[key])) for key in ("optimizer", "trainable") if is_fit}
    for key, (value, other) in pairs.items():
        if value != other:
            raise InputError(
                f"model.{key} is {value}, but the checkpoint was trained with {other}: set it to that, or start a new "
                "run, without --ckpt_path"
            )
    if ours["lora"]["rank"]:
        check_base(theirs, "the checkpoint", ours["init_from"], ours["base_fingerprint"])


def uses_fused_adamw(trainer: pl.Trainer | None) -> bool | None:
    """Whether AdamW is the fused one; None: torch chooses, as under 16-mixed, where the fused one would unscale the
    gradients after they are clipped.
    """
    return True if trainer is None or trainer.precision != "16-mixed" else None


def prepare_fit(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a fit continue at the checkpoint's step, with the callbacks and the accumulation of this configuration."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in callbacks):
        note("the checkpoint has averaged weights too: the run goes on with the others, without an average")
        checkpoint["state_dict"] = checkpoint["current_model_state"]
    for group in chain(*(state["param_groups"] for state in checkpoint["optimizer_states"])):
        if "fused" in group:  # torch would take the checkpoint's
            group["fused"] = uses_fused_adamw(trainer)
    if "loops" not in checkpoint:
        set_global_step(trainer, checkpoint["global_step"])
    for timer in (callback for callback in callbacks if isinstance(callback, Timer)):
        checkpoint.get("callbacks", {}).pop(timer.state_key, None)  # trainer.max_time counts from each start
