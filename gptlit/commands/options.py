"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptlit.errors import InputError

if TYPE_CHECKING:
    from gptlit.data.templates import Template
    from gptlit.data.tokenizer import Tokenizer
    from gptlit.model.gpt import GPTModel

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[
    str,
    typer.Option(help="A .ckpt file or a run's folder (its newest checkpoint), or anything that `import` reads."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy; the higher, the more varied.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens only.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the most likely tokens of this total probability.")]
Precision = Annotated[Literal["32", "bf16"], typer.Option(help="Precision of weights and activations.")]
Quantize = Annotated[
    Literal["int8"] | None,
    typer.Option(help="Store the matrices in 8 bits: half the memory of bf16, and faster on a CPU."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="On a CPU, compile the blocks: a slower start, then twice the speed.")
]
TemplateName = Annotated[
    str | None,
    typer.Option("--template", help="How instructions are written: alpaca, chat, phi3 or none; by default as trained."),
]
TextKey = Annotated[str, typer.Option(help="Key or column of the text in .jsonl and .parquet files.")]
Separator = Annotated[
    str, typer.Option(help="Text between two documents of a text file; by default a file is one document.")
]


def load_for_generation(
    checkpoint: str, precision: str, quantize: str | None, compile: bool = False, template: str | None = None
) -> "tuple[GPTModel, Tokenizer, Template | None]":
    """Load a model, on the GPU if there is one, with its tokenizer and the template of its prompts, if any."""
    import torch

    from gptlit.checkpoint.pretrained import load_model_and_tokenizer, read_weights
    from gptlit.data.templates import find_template
    from gptlit.generation.fast_linear import for_generation

    source = read_weights(checkpoint)
    name = template or source.template or "none"
    found = None if name == "none" else find_template(name)
    model, tokenizer = load_model_and_tokenizer(source)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    return for_generation(model, quantize, compile), tokenizer, found


def read_lines(path: Path, option: str, what: str) -> list[str]:
    """Return the lines of a file that are not empty."""
    try:
        lines = [line for line in path.read_text("utf-8-sig").split("\n") if line]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: position {error.start}") from error
    if not lines:
        raise InputError(f"{option} {path} has no {what}: write one per line")
    return lines


def print_json(values: Any) -> None:
    """Print one line of JSON, in ASCII so that it survives any encoding of the output."""
    from json import dumps

    print(dumps(values))
