"""Options that several commands share."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
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
TextKey = Annotated[str, typer.Option(help="Key or column of the text in .jsonl and .parquet files.")]
Separator = Annotated[
    str, typer.Option(help="Text between two documents of a text file; by default a file is one document.")
]


def load_for_generation(
    checkpoint: str, precision: str, quantize: str | None, compile: bool = False
) -> "tuple[GPTModel, Tokenizer]":
    """Load a model with its tokenizer, on the GPU if there is one."""
    import torch

    from gptlit.checkpoint.pretrained import load_model_and_tokenizer
    from gptlit.generation.fast_linear import for_generation

    model, tokenizer = load_model_and_tokenizer(checkpoint)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    return for_generation(model, quantize, compile), tokenizer


def print_json(values: Any) -> None:
    """Print one line of JSON, in ASCII so that it survives any encoding of the output."""
    from json import dumps

    print(dumps(values))
