"""`gptlit classify`: texts -> labels."""

from typing import Annotated

import typer

from gptlit.commands.options import Checkpoint, Json, print_json, read_lines
from gptlit.errors import InputError, user_path


def classify(
    checkpoint: Checkpoint,
    text: Annotated[list[str] | None, typer.Option(help="A text to classify; may be repeated.")] = None,
    file: Annotated[str, typer.Option(help="A file with one text per line instead.")] = "",
    pad_to: Annotated[
        int | None,
        typer.Option(help="Cut and pad texts to this many tokens and decide at the last one, as the book's code does."),
    ] = None,
    json: Json = False,
) -> None:
    """Print the likeliest label of each text. A tab and its probability follow."""
    if bool(text) == bool(file):
        raise InputError("give either --text TEXT or --file FILE")
    texts = list(text or read_lines(user_path(file), "--file", "text"))
    if empty := [number for number, line in enumerate(texts, 1) if not line.strip()]:
        raise InputError(f"text {empty[0]} is empty")
    import torch

    from gptlit.checkpoint.pretrained import load_model_and_tokenizer, read_weights
    from gptlit.data.rows import Labels
    from gptlit.generation.classify import classify as run

    source = read_weights(checkpoint)
    model, tokenizer = load_model_and_tokenizer(source, classifies=True)
    labels = source.classes
    if pad_to is not None:
        if not 1 <= pad_to <= model.config.context_length:
            raise InputError(f"--pad_to {pad_to} is not between 1 and the context of {model.config.context_length}")
        labels = Labels(labels.names, -1, pad_to)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for line, probs in zip(texts, run(model, tokenizer, texts, labels).tolist(), strict=True):
        by_label = dict(sorted(zip(labels.names, probs, strict=True), key=lambda pair: -pair[1]))
        label, prob = next(iter(by_label.items()))
        if json:
            print_json({"text": line, "label": label, "probs": by_label})
        else:
            print(f"{label}\t{prob:.4f}")
