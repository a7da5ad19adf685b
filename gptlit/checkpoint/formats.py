"""Parameter names and layouts of other projects.

A format maps each parameter to one of theirs, or to several stacked along dimension 0, possibly transposed.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlit.checkpoint.io import check_finite
from gptlit.config import GPTConfig
from gptlit.data.rows import Labels
from gptlit.data.tokenizer import Tokenizer, load_tokenizer
from gptlit.errors import InputError, note
from gptlit.model.gpt import GPTModel


@dataclass
class PretrainedWeights:
    """An architecture and its weights, under this project's names."""

    path: Path  # the file or folder they were read from
    config: GPTConfig
    state: dict[str, Tensor]  # of a GPTModel
    tokenizer: str | None = None  # argument of `load_tokenizer`; None if unknown
    template: str | None = None  # its name, where they were trained on instructions
    labels: Labels | None = None  # of a classifier; None: its classes are named by their numbers

    @property
    def classes(self) -> Labels:
        """The labels of a classifier."""
        return self.labels or Labels([str(number) for number in range(self.config.n_classes)])

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; GPT-2's if it is unknown."""
        return load_tokenizer(self.tokenizer or "gpt2")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state.items()):
            digest.update(name.encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


PREFIX = "model."  # the GPTModel in the state dict of a GPTModule
DATA_STATE = "TokenDataModule"  # the data module's state in a checkpoint: Lightning names it after the class
WRAPPERS = r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # compile, DDP, FSDP


# --- the name maps ----------------------------------------------------------------------------------------------

OPENAI_MODULES = {
    "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "out_head": "lm_head",
    "trf_blocks": "transformer.h",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "att.qkv": "attn.c_attn",
    "att.out_proj": "attn.c_proj",
    "ff.0": "mlp.c_fc",
    "ff.2": "mlp.c_proj",
}


def openai_names(name: str) -> list[str]:
    """Return the name used by OpenAI, Hugging Face and nanoGPT."""
    for ours, theirs in OPENAI_MODULES.items():
        name = name.replace(ours, theirs)
    return [name]


def book_names(name: str) -> list[str]:
    """Return the names used by the book, where query, key and value are separate."""
    if ".att.qkv." in name:
        return [name.replace("qkv", part) for part in ("W_query", "W_key", "W_value")]
    if "norm" in name:
        return [name.replace(".weight", ".scale").replace(".bias", ".shift")]
    return [name.replace(".ff.", ".ff.layers.")]


@dataclass(frozen=True)
class Format:
    """How another project stores the weights."""

    names: Callable[[str], list[str]]  # of a parameter, ours to theirs; several are stacked along dimension 0
    transposed: bool = False  # whether linear weights are stored as (in, out)
    ignored: str = ""  # pattern of the names of buffers


# Keys of the architecture, ours to theirs, and what a GPT-2 of Hugging Face has besides.
OPENAI_KEYS = {"vocab_size": "vocab_size", "emb_dim": "n_embd", "n_heads": "n_head", "n_layers": "n_layer"}
HUGGINGFACE_KEYS = OPENAI_KEYS | {
    "context_length": "n_positions",
    "drop_rate": "resid_pdrop",
    "tie_weights": "tie_word_embeddings",
}
NANOGPT_KEYS = OPENAI_KEYS | {"context_length": "block_size", "drop_rate": "dropout", "qkv_bias": "bias"}
HUGGINGFACE_FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

OWN = Format(lambda name: [name])
HUGGINGFACE = Format(openai_names, transposed=True, ignored=r".*\.attn\.(masked_)?bias")
NANOGPT = Format(openai_names, ignored=r".*\.attn\.bias")
BOOK = Format(book_names, ignored=r".*\.att\.mask")


def strip_wrapper_prefixes(theirs: dict[str, Any]) -> dict[str, Any]:
    """Remove the prefixes that compiling and wrapping a model add to parameter names."""
    return {re.sub(WRAPPERS, "", str(name)): value for name, value in theirs.items()}


def from_format(
    theirs: dict[str, Tensor], form: Format, config: GPTConfig, path: Path, tokenizer: str | None = None
) -> PretrainedWeights:
    """Convert another project's state dict: rename, stack and transpose.

    A tied head may be missing; one that differs from the embedding is read as untied.

    Raises:
        InputError: A tensor is missing, unexpected, of another shape or not finite; it is named.
    """
    theirs = {name: value for name, value in theirs.items() if not re.fullmatch(form.ignored, name)}
    (head,), (embedding,) = form.names("out_head.weight"), form.names("tok_emb.weight")
    if config.tie_weights and embedding in theirs:
        theirs.setdefault(head, theirs[embedding])
        if not torch.equal(theirs[head], theirs[embedding]):
            note(f"{path}: {head} differs from {embedding}: they are read as two matrices, not tied")
            config = replace(config, tie_weights=False)
    with torch.device("meta"):
        expected = GPTModel(config).state_dict()
    state: dict[str, Tensor] = {}
    for name, value in expected.items():
        names = form.names(name)
        shape = [len(value) // len(names), *value.shape[1:]]
        is_transposed = _is_transposed(form, name, value)
        parts = [_take(theirs, part, shape[::-1] if is_transposed else shape, path) for part in names]
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
        state[name] = stacked.t() if is_transposed else stacked
    if theirs:
        raise InputError(f"{path} has the unknown tensor {min(theirs)!r}: it is no GPT-2 of {config.n_layers} layers")
    return PretrainedWeights(path, config, state, tokenizer)


def _take(theirs: dict[str, Tensor], name: str, shape: list[int], path: Path) -> Tensor:
    if not isinstance(value := theirs.pop(name, None), Tensor):
        raise InputError(f"{path} has no tensor {name!r} (shape {tuple(shape)})")
    if list(value.shape) != shape:
        raise InputError(f"{path} has {name!r} of shape {tuple(value.shape)}, the architecture needs {tuple(shape)}")
    check_finite({name: value}, path)
    return value


def to_format(state: dict[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Convert a state dict to another project's format; the tensors are copies."""
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        names = form.names(name)
        for part_name, part in zip(names, value.chunk(len(names)), strict=True):
            stored = part.t() if _is_transposed(form, name, value) else part
            theirs[part_name] = stored.detach().clone(memory_format=torch.contiguous_format)
    return theirs


def _is_transposed(form: Format, name: str, value: Tensor) -> bool:
    return form.transposed and value.dim() == 2 and name.startswith("trf_blocks")
