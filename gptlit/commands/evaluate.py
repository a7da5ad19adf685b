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
    from gptlit.generation.evaluate import Evaluation, Score


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="As data.source in training: a file, folder, glob, or python-docs.")],
    text_key: TextKey = "text",
    separator: Separator = "",
    stride: Annotated[
        int | None, typer.Option(help="New tokens in each window of a long document; by default half the context.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a batch.")] = 8,
    worst: Annotated[int, typer.Option(help="Number of documents with the highest loss to show.")] = 5,
    json: Json = False,
    precision: Precision = "32",
    quantize: Quantize = None,
) -> None:
    """Measure how well a model predicts a corpus: loss, perplexity, bits per byte, accuracy."""
    from gptlit.data.parsers import ReadOptions
    from gptlit.data.sources import open_corpus

    corpus = open_corpus(data, ReadOptions(text_key, separator))
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    from gptlit.generation.evaluate import evaluate as run

    model, tokenizer = load_for_generation(checkpoint, precision, quantize)
    if stride is None:
        stride = max(1, model.config.context_length // 2)
    column = TextColumn("{task.completed} documents, {task.fields[tokens]:,} tokens")
    with Progress(column, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, tokens=0)

        def show(score: "Score") -> None:
            progress.update(task, advance=1, tokens=progress.tasks[0].fields["tokens"] + score.tokens)

        result = run(model, tokenizer, corpus.documents(), stride, batch_size, worst, show)
    _print_result(result, {"stride": stride, "context_length": model.config.context_length}, json)


def _print_result(result: "Evaluation", settings: dict[str, int], json: bool) -> None:
    total = result.total
    values = {
        "documents": result.documents,
        "tokens": total.tokens,
        **settings,
        "loss": total.loss,
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "accuracy": total.accuracy,
    }
    if json:
        documents = [{"start": s.start, "tokens": s.tokens, "loss": s.loss} for s in result.worst]
        print_json({**values, "worst": documents})
        return
    for key, value in values.items():
        print(f"{key:<16}{value:,.4f}" if isinstance(value, float) else f"{key:<16}{value:,}")
    if result.worst:
        print("\nhighest loss")
    for score in result.worst:
        print(f"  {score.loss:7.4f}  {score.tokens:>8,} tokens  {score.start}")
