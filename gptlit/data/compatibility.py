"""What data, model, Trainer and checkpoint have to agree on."""

from collections.abc import Sequence
from typing import Any, Literal

from gptlit.config import GPTConfig
from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError

Identity = Literal["corpus", "tokenizer", "seed", "stride", "weights"]
KEYS: dict[str, Any] = {"tokenizer_sha256": "tokenizer", "held_out": "corpus"}  # of the state, if another word
SETTINGS = {"seed": "data.seed", "stride": "data.stride", "weights": "list of weights"}


def micro_batch_size(batch_size: int, devices: int, limit: int | None) -> int:
    """Return the largest micro-batch, in windows and at most `limit`, that divides a device's share of a batch."""
    share = max(1, batch_size // devices)
    return next(size for size in range(min(limit or share, share), 0, -1) if share % size == 0)


def check_division(batch_size: int, devices: int) -> None:
    """Check that every device gets the same number of windows."""
    if batch_size % devices:
        raise InputError(
            f"data.batch_size {batch_size} is that of all devices together, and not divisible by {devices} of them: "
            f"set it to a multiple of {devices}"
        )


def check_batch_settings(settings: Any) -> None:
    """Check what a Trainer, or its configuration, would decide about batches, and that a run has an end."""
    for key in ("max_steps", "max_epochs"):
        if getattr(settings, key) == 0 and not settings.fast_dev_run:
            raise InputError(f"trainer.{key} 0 trains nothing: set it to a positive number")
    if settings.max_steps == -1 and settings.max_epochs in (None, -1) and not settings.fast_dev_run:
        raise InputError("a run needs an end: set trainer.max_steps or trainer.max_epochs")
    if settings.accumulate_grad_batches != 1:
        raise InputError(
            f"trainer.accumulate_grad_batches {settings.accumulate_grad_batches} cannot be set: it follows from "
            "data.batch_size, data.micro_batch_size and the number of devices"
        )
    for key, default in {"limit_train_batches": 1.0, "overfit_batches": 0.0}.items():
        value = getattr(settings, key)
        if value not in (None, default) and not settings.fast_dev_run:
            raise InputError(f"trainer.{key} {value} cannot be used here: shorten a run with trainer.max_steps")


def check_model(config: GPTConfig, context_length: int | None, tokenizer: Tokenizer) -> None:
    """Check that a model can read the data."""
    if context_length not in (None, config.context_length):
        raise InputError(
            f"data.context_length {context_length} contradicts model.config.context_length "
            f"{config.context_length}: leave data.context_length out"
        )
    if config.vocab_size != tokenizer.n_vocab:
        raise InputError(
            f"model.config.vocab_size {config.vocab_size} contradicts the tokenizer {tokenizer.name!r} with "
            f"{tokenizer.n_vocab} ids: leave model.config.vocab_size out, or set it to {tokenizer.n_vocab}"
        )


def check_classes(config: GPTConfig, labels: Sequence[str], source: object) -> None:
    """Check that a model can have one class for each label of the data."""
    has = f"data.source {source!r} has {len(labels) or 'no'} labels"
    if config.n_classes not in (0, len(labels)):
        raise InputError(f"model.config.n_classes is {config.n_classes}, but {has}")
    if labels and config.tie_weights:
        raise InputError(f"model.config.tie_weights must be false: {has}, whose head is no token embedding")


def check_position(
    state: dict[str, Any], current: dict[str, Any], names: dict[str, str], allowed: list[Identity]
) -> None:
    """Check that a position of a checkpoint means the same windows now.

    Args:
        state: The data module's state in the checkpoint.
        current: What the order of windows depends on, by key of the state.
        names: Now and then, of what has a digest: the corpus and the tokenizer.
        allowed: What may differ.
    """
    for key, ours in current.items():
        name, theirs = KEYS.get(key, key), state.get(key, ours)
        if theirs not in (ours, "") and name not in allowed:
            if name in names:
                ours, theirs = ours[:12], f"{theirs[:12]} ({names[name]})"
            raise InputError(
                f"the {SETTINGS.get(name, name)} is {ours}, but the checkpoint was trained with {theirs}: resume with "
                f"that, start a new run with --model.init_from, or set data.resume_despite to [{name}]"
            )
