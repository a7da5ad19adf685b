"""Weights in: from a checkpoint to a model."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import tiktoken
from torch import Tensor

from gptlit.checkpoint import find_checkpoint, read_checkpoint
from gptlit.config import GPTConfig
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError
from gptlit.model import GPTModel

PREFIX = "model."  # the GPTModel inside a GPTModule


def load_model(path: str | Path) -> GPTModel:
    """Build the model of a checkpoint, in evaluation mode on the CPU.

    Args:
        path: A `.ckpt` file, or a run's folder: then its newest checkpoint.

    Raises:
        InputError: The file cannot be read or does not hold such a model.
    """
    path = find_checkpoint(Path(path))
    checkpoint = read_checkpoint(path)
    model = GPTModel(config_of(checkpoint, path))
    load_weights(model, checkpoint, path)
    return model.eval()


def load_model_and_tokenizer(path: str | Path) -> tuple[GPTModel, tiktoken.Encoding]:
    """Like `load_model`, with the tokenizer that the checkpoint was trained with.

    Raises:
        InputError: As in `load_model`, or the vocabularies do not fit together.
    """
    path = find_checkpoint(Path(path))
    model = load_model(path)
    name = read_checkpoint(path).get("TokenDataModule", {}).get("tokenizer", "gpt2")
    tokenizer = load_tokenizer(name)
    if model.config.vocab_size != tokenizer.n_vocab:
        raise InputError(
            f"{path} has a vocabulary of {model.config.vocab_size} ids, but its tokenizer {name!r} has "
            f"{tokenizer.n_vocab}: its text cannot be read"
        )
    return model, tokenizer


def config_of(checkpoint: dict[str, Any], path: Path) -> GPTConfig:
    """Return the architecture that a checkpoint was trained with."""
    values = checkpoint["hyper_parameters"]["config"]
    try:
        return GPTConfig(**{field.name: values[field.name] for field in fields(GPTConfig)})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} has no usable architecture ({type(error).__name__}: {error})") from error


def load_weights(model: GPTModel, checkpoint: dict[str, Any], path: Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Raises:
        InputError: A weight is missing, left over or of another shape; it is named, with both shapes.
    """
    state: dict[str, Tensor] = {
        key.removeprefix(PREFIX): value for key, value in checkpoint["state_dict"].items() if key.startswith(PREFIX)
    }
    own = model.state_dict()
    if difference := sorted(state.keys() ^ own.keys()):
        key = difference[0]
        raise InputError(f"{path} {'has no' if key in own else 'has the unknown'} weight {key!r}")
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise InputError(
                f"{path} has {key} of shape {tuple(state[key].shape)}, the model {tuple(value.shape)}: "
                "make model.config the same as the checkpoint's"
            )
    model.load_state_dict(state)
