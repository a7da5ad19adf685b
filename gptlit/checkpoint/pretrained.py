"""Load pretrained weights: checkpoints, Hugging Face, nanoGPT, the book's `.pth`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptlit.checkpoint.formats import (
    BOOK,
    DATA_STATE,
    HUGGINGFACE,
    HUGGINGFACE_FIXED,
    HUGGINGFACE_KEYS,
    NANOGPT,
    NANOGPT_KEYS,
    OWN,
    PREFIX,
    PretrainedWeights,
    from_format,
    openai_names,
    strip_wrapper_prefixes,
)
from gptlit.checkpoint.io import SUFFIX, load_plain, read_checkpoint
from gptlit.checkpoint.runs import find_checkpoint
from gptlit.config import PRESETS, GPTConfig
from gptlit.data.rows import Labels
from gptlit.data.tokenizer import Tokenizer, huggingface_tokenizer_spec, same_ids
from gptlit.errors import InputError, needs, note, user_path
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig, build_model, merged
from gptlit.model.sharding import gathered, shard_like

HUB = "hf:"
ROUNDING = 128  # vocabularies are padded to a multiple of it
MAY_DIFFER = ("context_length", "drop_rate", "init")  # keys that need not match those of pretrained weights


# --- reading ----------------------------------------------------------------------------------------------------


def read_weights(source: str | Path, n_heads: int | None = None) -> PretrainedWeights:
    """Detect the format of a file or folder and read it; tensors stay memory-mapped.

    Args:
        source: A `.ckpt` of this project or a run's folder; a Hugging Face folder, or `hf:NAME` on the hub; the
            book's `.pth`; nanoGPT's `ckpt.pt`.
        n_heads: For the book's `.pth`, which does not store it; None: heads of size 64, as in every GPT-2.

    Raises:
        InputError: It does not exist, is of an unknown format, damaged or incomplete.
    """
    is_hub = str(source).startswith(HUB)
    path = _download(str(source).removeprefix(HUB)) if is_hub else user_path(str(source))
    try:
        found = _read(path, n_heads)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a GPT-2 ({type(error).__name__}: {error})") from error
    if n_heads is not None and found.config.n_heads != n_heads:
        raise InputError(f"n_heads is {n_heads}, but {path} says {found.config.n_heads}: leave it out")
    return found


def _read(path: Path, n_heads: int | None) -> PretrainedWeights:
    if (path / "config.json").is_file():
        return _read_huggingface(path)
    if path.suffix == SUFFIX or not path.is_file():
        path, checkpoint = find_checkpoint(path)
        return _read_own(checkpoint, path)
    content = load_plain(path)
    if "hyper_parameters" in content:
        return _read_own(read_checkpoint(path), path)
    if "model_args" in content:
        return _read_nanogpt(content, path)
    return _read_book(strip_wrapper_prefixes(content.get("model_state_dict", content)), path, n_heads)


def _read_own(checkpoint: dict[str, Any], path: Path) -> PretrainedWeights:
    found = strip_wrapper_prefixes(checkpoint["state_dict"])
    weights = {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}
    data = checkpoint.get(DATA_STATE, {})
    labels = Labels(**data["labels"]) if "labels" in data else None
    config = GPTConfig(**checkpoint["hyper_parameters"]["config"])
    if "base_fingerprint" in checkpoint["hyper_parameters"]:
        names = labels.names if labels is not None else []
        config, weights = _merge_adapters(checkpoint["hyper_parameters"], config, names, weights, path)
    source = from_format(weights, OWN, config, path, data.get("tokenizer"))
    return replace(source, template=data.get("template"), labels=labels)


def _merge_adapters(
    adapters: dict[str, Any], config: GPTConfig, names: Sequence[str], weights: dict[str, Tensor], path: Path
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Merge adapters with these hyper-parameters into their base."""
    try:
        base = read_weights(adapters["init_from"])
    except InputError as error:
        raise InputError(f"{path} has only adapters, and their base is missing: {error}") from error
    check_base(adapters, path, base.path, base.fingerprint)
    with torch.device("meta"):
        model = build_model(config, LoRAConfig(**adapters["lora"]))
    base = adapt_head(base, config.n_classes, names)
    model.load_state_dict({**check_compatible(asdict(config), base).state, **weights}, assign=True)
    return merged(model)


def check_base(adapters: dict[str, Any], path: str | Path, base: str | Path, fingerprint: str) -> None:
    """Check that adapters at `path`, with these hyper-parameters, are for `base`."""
    theirs = adapters["base_fingerprint"]
    if theirs != fingerprint:
        raise InputError(
            f"{path} has adapters for {adapters['init_from']} with the fingerprint {theirs[:12]}, but {base} has "
            f"{fingerprint[:12]}: adapters only work with the weights that they were trained with"
        )


def _read_huggingface(folder: Path) -> PretrainedWeights:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fixed = {**HUGGINGFACE_FIXED, "n_inner": 4 * values.get("n_embd", 0)}
    for key, needed in fixed.items():
        if values.get(key) not in (None, needed):
            raise InputError(
                f"{folder} has {key} {values[key]!r}: a GPT-2 has {needed!r}, nothing else can be imported"
            )
    values = {"resid_pdrop": 0.1, "tie_word_embeddings": True, "gptlit": {}, **values}
    qkv_bias = values["gptlit"].get("qkv_bias", True)
    given = {ours: values[theirs] for ours, theirs in HUGGINGFACE_KEYS.items()}
    config = GPTConfig(**given, qkv_bias=qkv_bias, init="gpt2")
    tokenizer = huggingface_tokenizer_spec(folder, config.vocab_size) or values["gptlit"].get("tokenizer")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        for name, value in strip_wrapper_prefixes(_load_file(file)).items():
            weights[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = value
    if not qkv_bias:  # exported from a model without them, as zeros
        weights = {name: value for name, value in weights.items() if not name.endswith("attn.c_attn.bias")}
    return from_format(weights, HUGGINGFACE, config, folder, tokenizer)


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise InputError(f"{folder} has a config.json but neither model.safetensors nor pytorch_model.bin")


def _load_file(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return load_plain(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: it is damaged or downloaded in part ({error})") from error


def _download(name: str) -> Path:
    """Download a model from the Hugging Face hub, or find it in its cache."""
    with needs("huggingface-hub", f"hf:{name}", '"gptlit[hub]"'):
        from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns="pytorch_model*.bin"))
        return folder
    except Exception as error:  # the hub's client raises a dozen types
        raise InputError(
            f"hf:{name} could not be downloaded from the hub ({type(error).__name__}): check the name and the network, "
            "or download the folder elsewhere and name it"
        ) from error


def _read_nanogpt(content: dict[str, Any], path: Path) -> PretrainedWeights:
    args = {"dropout": 0.0, "bias": True, **content["model_args"]}
    given = {ours: args[theirs] for ours, theirs in NANOGPT_KEYS.items()}
    config = GPTConfig(**given, tie_weights=True, init="gpt2")
    weights = strip_wrapper_prefixes(content["model"])
    if not config.qkv_bias:  # nanoGPT then has no biases at all; the others are zeros here
        with torch.device("meta"):
            shapes = {openai_names(name)[0]: value.shape for name, value in GPTModel(config).state_dict().items()}
        weights = {name: torch.zeros(shape) for name, shape in shapes.items() if name.endswith("bias")} | weights
    note(f"{path}: nanoGPT uses the exact GELU, GPT-2 a tanh approximation: logits differ in the third digit")
    return from_format(weights, NANOGPT, config, path)


def _read_book(weights: dict[str, Any], path: Path, n_heads: int | None) -> PretrainedWeights:
    if not {"tok_emb.weight", "pos_emb.weight"} <= weights.keys():
        raise InputError(f"{path} is of an unknown format: no hyper_parameters, model_args or tok_emb.weight")
    vocab_size, emb_dim = weights["tok_emb.weight"].shape
    if n_heads is None and emb_dim % 64:
        raise InputError(
            f"{path} does not say its number of heads, and its emb_dim {emb_dim} is no multiple of 64: give n_heads "
            "(`gptlit import --n_heads`)"
        )
    if n_heads is None and emb_dim not in {preset.emb_dim for preset in PRESETS.values()}:
        note(f"{path}: n_heads is taken as {emb_dim // 64}, heads of 64; if not: `gptlit import --n_heads`")
    config = GPTConfig(
        vocab_size=vocab_size,
        context_length=len(weights["pos_emb.weight"]),
        emb_dim=emb_dim,
        n_heads=emb_dim // 64 if n_heads is None else n_heads,
        n_layers=len({name.split(".")[1] for name in weights if name.startswith("trf_blocks.")}),
        qkv_bias="trf_blocks.0.att.W_query.bias" in weights,
        n_classes=len(weights.get("out_head.bias", ())),
    )
    return from_format(weights, BOOK, config, path)


# --- into a model -----------------------------------------------------------------------------------------------


def load_pretrained(source: str | Path, n_heads: int | None = None) -> GPTModel:
    """Build the model of `source` (as in `read_weights`), in evaluation mode on the CPU.

    Raises:
        InputError: As in `read_weights`.
    """
    return build(read_weights(source, n_heads))


def build(source: PretrainedWeights) -> GPTModel:
    """Build the model of weights that were read, in evaluation mode on the CPU."""
    with torch.device("meta"):
        model = GPTModel(source.config)
    model.to_empty(device="cpu")
    if source.config.tie_weights:
        model.out_head.weight = model.tok_emb.weight
    model.load_state_dict(source.state)
    return model.eval()


def load_model_and_tokenizer(
    path: str | Path | PretrainedWeights, classifies: bool = False
) -> tuple[GPTModel, Tokenizer]:
    """Like `load_pretrained`, also from weights that were read, with the tokenizer of the model.

    Raises:
        InputError: As in `read_weights`, or the vocabularies do not match, or the model is for the other task.
    """
    source = path if isinstance(path, PretrainedWeights) else read_weights(path)
    if classifies and not source.config.n_classes:
        raise InputError(f"{source.path} is a language model, not a classifier: train one with configs/classify.yaml")
    if source.config.n_classes and not classifies:
        raise InputError(
            f"{source.path} is a classifier (of {', '.join(source.classes.names)}), not a language model: use "
            "`gptlit classify`, or `train.py test` for its accuracy"
        )
    tokenizer = source.load_tokenizer()
    rows = source.config.vocab_size
    if not fits_vocabulary(source, tokenizer.n_vocab):
        whose = "its" if source.tokenizer else "the default"
        raise InputError(
            f"{source.path} has a vocabulary of {rows} ids, but {whose} tokenizer {tokenizer.name!r} has "
            f"{tokenizer.n_vocab}: set the right one with `gptlit import --tokenizer`"
        )
    if rows > tokenizer.n_vocab:
        note(f"{source.path}: the ids from {tokenizer.n_vocab} to {rows - 1} are not in the tokenizer and are dropped")
    return build(truncate_vocabulary(source, tokenizer.n_vocab)), tokenizer


def fits_vocabulary(source: PretrainedWeights, n_vocab: int) -> bool:
    """Whether the weights have `n_vocab` ids, not counting unused rows at the end: padding, or added tokens."""
    beyond = source.config.vocab_size - n_vocab
    if beyond < ROUNDING or source.tokenizer is None:
        return 0 <= beyond < ROUNDING
    return source.load_tokenizer().n_vocab == n_vocab


def truncate_vocabulary(source: PretrainedWeights, n_vocab: int) -> PretrainedWeights:
    """Drop the rows of embedding and head beyond `n_vocab`."""
    rows = {"tok_emb.weight", "out_head.weight" if not source.config.n_classes else ""}
    state = {name: value[:n_vocab] if name in rows else value for name, value in source.state.items()}
    return replace(source, config=replace(source.config, vocab_size=n_vocab), state=state)


def check_tokenizer(source: PretrainedWeights, tokenizer: Tokenizer) -> None:
    """Check that the data have the tokenizer that the weights were trained with, if it is known."""
    theirs = source.load_tokenizer()
    is_known = source.tokenizer is not None and theirs.n_vocab <= source.config.vocab_size
    if is_known and not same_ids(theirs, tokenizer):
        raise InputError(
            f"{source.path} was trained with the tokenizer {theirs.name!r}, the data have {tokenizer.name!r}: leave "
            "data.tokenizer out, and prepare data that are tokens again with that tokenizer"
        )


def check_compatible(ours: dict[str, Any], source: PretrainedWeights) -> PretrainedWeights:
    """Check the given keys of an architecture against pretrained weights; return these cut to the given vocabulary.

    Raises:
        InputError: A key not in `MAY_DIFFER` differs; it is named, with both values.
    """
    n_vocab = ours.get("vocab_size", source.config.vocab_size)
    if fits_vocabulary(source, n_vocab):
        source = truncate_vocabulary(source, n_vocab)
    for key, value in ours.items():
        theirs = getattr(source.config, key)
        if key not in MAY_DIFFER and value != theirs:
            remedy = "leave it out or set it so, the architecture comes from there"
            if key == "vocab_size":
                remedy = "set data.tokenizer to the one that it was trained with"
            raise InputError(f"model.config.{key} is {value}, but {source.path} has {theirs}: {remedy}")
    return source


def adapt_head(source: PretrainedWeights, n_classes: int, names: Sequence[str]) -> PretrainedWeights:
    """Drop the head of weights for a model with `n_classes`, unless it has the same labels; no `names`: as many."""
    theirs = source.classes.names
    if not n_classes or (source.config.n_classes == n_classes and theirs == list(names or theirs)):
        return source
    if theirs:
        note(f"{source.path}: its head is dropped, it is for the labels {', '.join(theirs)}")
    state = {name: value for name, value in source.state.items() if not name.startswith("out_head.")}
    return replace(source, config=replace(source.config, n_classes=n_classes, tie_weights=False), state=state)


def copy_weights(model: GPTModel, source: PretrainedWeights) -> None:
    """Copy weights into a model of the same architecture; position embeddings are cut, or keep their additional rows.

    A head that `adapt_head` has dropped stays as it is in the model.

    Raises:
        InputError: The architectures differ.
    """
    source = check_compatible(asdict(model.config), source)
    positions = gathered(model.pos_emb.weight).detach().clone()
    common = min(len(positions), source.config.context_length)
    positions[:common] = source.state["pos_emb.weight"][:common]
    state, own = {**source.state, "pos_emb.weight": positions}, model.state_dict()
    model.load_state_dict({**own, **{name: shard_like(value, own[name]) for name, value in state.items()}})
