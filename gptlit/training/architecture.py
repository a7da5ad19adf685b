"""The architecture of a run: what the configuration leaves open comes from a checkpoint, weights or the tokenizer."""

from dataclasses import asdict
from typing import Any

from gptlit.checkpoint.pretrained import check_compatible, check_tokenizer, read_weights
from gptlit.data.corpora import tokenizer_for
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import note


def complete_architecture(config: Any, given: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    """Fill in `model.config`. Given values that contradict their source are rejected here, by the module or the data.

    Args:
        config: The parsed configuration of a command; changed in place.
        given: The keys of `model.config` that files and flags set.
        checkpoint: That of a resume.
    """
    if checkpoint is not None:
        found = checkpoint["hyper_parameters"]["config"]
    elif config.model.init_from is not None:
        found = _of_pretrained(config, given)
    else:
        found = {"vocab_size": load_tokenizer(tokenizer_for(config.data.source, config.data.tokenizer)).n_vocab}
    for key, value in {**found, **given}.items():
        config.model.config[key] = value


def _of_pretrained(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture of `model.init_from`, and set the tokenizer it was trained with if none is given."""
    source = read_weights(config.model.init_from)
    name = tokenizer_for(config.data.source, config.data.tokenizer, source.tokenizer_name or "gpt2")
    if name == source.tokenizer_name:
        config.data.tokenizer = name
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
    return found
