"""`gptlit evaluate`: loss, perplexity, bits per byte and accuracy on a corpus."""

from typing import TYPE_CHECKING, Annotated

import typer

from gptlit.commands.options import (
    Checkpoint,
    Json,
    Precision,
    Quantize,
    Separator,
    TextKey,
    load_for_generation,
    print_json,
)

if TYPE_CHECKING:
    from gptlit.generation.evaluate import Score


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="As data.source in training: a file, folder, glob, or python-docs.")],
    text_key: TextKey = "text",
    separator: Separator = "",
    stride: Annotated[
        int | None, typer.Option(help="New tokens in each window of a long document; by default half the context.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a batch.")] = 8,
    json: Json = False,
    precision: Precision = "32",
    quantize: Quantize = None,
) -> None:
    """Measure how well a model predicts a text. Prints loss, perplexity, bits per byte and accuracy."""
    from rich.console import Console
    from rich.progress import track

    from gptlit.data.parsers import ReadOptions
    from gptlit.data.sources import open_corpus
    from gptlit.generation.evaluate import evaluate as run

    corpus = open_corpus(data, ReadOptions(text_key, separator))
    model, tokenizer, _ = load_for_generation(checkpoint, precision, quantize)
    stride = max(1, model.config.context_length // 2) if stride is None else stride
    documents = track(corpus.documents(), "evaluating", console=Console(stderr=True), transient=True)
    result = run(model, tokenizer, documents, stride, batch_size)
    _print_result(result, {"stride": stride, "context_length": model.config.context_length}, json)


def _print_result(score: "Score", settings: dict[str, int], json: bool) -> None:
    means = {key: getattr(score, key) for key in ("loss", "perplexity", "bits_per_byte", "accuracy")}
    values = {"documents": score.documents, "tokens": score.tokens, **settings, **means}
    if json:
        print_json(values)
        return
    for key, value in values.items():
        print(f"{key:<16}{value:,.4f}" if isinstance(value, float) else f"{key:<16}{value:,}")
