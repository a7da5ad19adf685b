"""Export weights: checkpoints, Hugging Face folders, the book's `.pth`."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from gptlit import __version__
from gptlit.checkpoint.formats import (
    BOOK,
    DATA_STATE,
    HUGGINGFACE,
    HUGGINGFACE_FIXED,
    HUGGINGFACE_KEYS,
    PREFIX,
    PretrainedWeights,
    to_format,
)
from gptlit.checkpoint.io import DurableCheckpointIO
from gptlit.checkpoint.pretrained import fits_vocabulary
from gptlit.data.tokenizer import HuggingFaceTokenizer, save_huggingface, tokenizer_spec
from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel, TransformerBlock
from gptlit.model.lora import merged


def save_checkpoint(source: PretrainedWeights, path: Path) -> None:
    """Write weights as a checkpoint for `--model.init_from`, generate, export and evaluate; it cannot be resumed."""
    tokenizer = None if source.tokenizer is None else tokenizer_spec(source.load_tokenizer())  # needs no other file
    labels = {"labels": asdict(source.classes)} if source.config.n_classes else {}
    checkpoint = {
        "state_dict": {PREFIX + name: value.contiguous() for name, value in source.state.items()},
        "hyper_parameters": {"config": asdict(source.config)},
        "global_step": 0,
        DATA_STATE: {"tokenizer": tokenizer, "template": source.template, **labels},
    }
    DurableCheckpointIO().save_checkpoint(checkpoint, path)


def save_pretrained(
    model: GPTModel, folder: str | Path, to: str = "huggingface", tokenizer: str | None = "gpt2"
) -> None:
    """Write a model to a new folder, atomically.

    Args:
        model: The model; adapters are merged.
        folder: Must not exist, or be empty.
        to: "huggingface" (a folder that Transformers loads, with the tokenizer) or "book" (`model.pth`, a state dict
            under the book's names).
        tokenizer: Argument of `load_tokenizer`, to save the tokenizer too; None if it is unknown.

    Raises:
        InputError: The folder is not empty, or the format is unknown, or has no classifiers or no such block.
    """
    writers = {"huggingface": _write_huggingface, "book": _write_book}
    if to not in writers:
        raise InputError(f"no format is named {to!r}: choose one of {', '.join(writers)}")
    if model.config.n_classes and to == "huggingface":
        raise InputError("Transformers' GPT-2 has no classifier with a bias: export this one with --to book")
    if any(type(block) is not TransformerBlock for block in model.trf_blocks):
        raise InputError("both formats are GPT-2's: they have no place for another block than TransformerBlock")
    folder = Path(folder)
    if folder.suffix in (".pth", ".safetensors"):
        raise InputError(f"{folder} is the name of a file: name a folder, the weights get their names there")
    if not folder.name:
        raise InputError(f"{folder} is the current folder: name a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: name a new folder")
    config, weights = merged(model)
    state = {name: value.cpu() for name, value in weights.items()}
    source = PretrainedWeights(folder, config, state, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        content = Path(temporary, folder.name)
        content.mkdir()
        writers[to](source, content)
        if folder.exists():
            folder.rmdir()  # Windows does not replace a folder, even an empty one
        content.replace(folder)


def _write_book(source: PretrainedWeights, folder: Path) -> None:
    torch.save(to_format(source.state, BOOK), folder / "model.pth")


def _write_huggingface(source: PretrainedWeights, folder: Path) -> None:
    config, tokenizer = source.config, source.load_tokenizer()
    is_known = fits_vocabulary(source, tokenizer.n_vocab)
    is_written = is_known and (tokenizer.name == "gpt2" or isinstance(tokenizer, HuggingFaceTokenizer))
    weights = to_format(source.state, HUGGINGFACE)
    for block in range(0 if config.qkv_bias else config.n_layers):
        weights[f"transformer.h.{block}.attn.c_attn.bias"] = torch.zeros(3 * config.emb_dim)
    if config.tie_weights:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    end = tokenizer.eot_token if is_known else None
    own = {"version": __version__, "qkv_bias": config.qkv_bias}
    if is_known and not is_written:
        own["tokenizer"] = tokenizer.name
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        **HUGGINGFACE_FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in HUGGINGFACE_KEYS.items()},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.drop_rate),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        "torch_dtype": "float32",
        "gptlit": own,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if is_written:
        save_huggingface(tokenizer, config.context_length, folder)
