"""`gptlit generate`: prompts -> texts."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptlit.commands.options import (
    Checkpoint,
    Compile,
    Json,
    Precision,
    Quantize,
    Temperature,
    TopK,
    TopP,
    load_for_generation,
    print_json,
)
from gptlit.errors import InputError, user_path


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prompts_file: Annotated[str, typer.Option(help="A file with one prompt per line instead.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Maximum length of a continuation.")] = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a continuation; may be repeated.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same texts.")] = None,
    json: Json = False,
    precision: Precision = "32",
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Continue prompts with a trained model; text is printed as it is generated."""
    if bool(prompt) == bool(prompts_file):
        raise InputError("give either --prompt TEXT, of at least one character, or --prompts_file FILE")
    from gptlit.generation.generate import complete
    from gptlit.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    prompts = [prompt] if prompt else _read_prompts(user_path(prompts_file))
    rows = [text for text in prompts for _ in range(num_samples)]
    model, tokenizer = load_for_generation(checkpoint, precision, quantize, compile)
    is_streamed = len(rows) == 1 and not json

    def show(_: int, text: str) -> None:
        if is_streamed:
            print(text, end="", flush=True)

    show(0, rows[0])
    results = complete(model, tokenizer, rows, max_new_tokens, sampling, stop=stop or (), seed=seed, on_text=show)
    for number, result in enumerate(results, 1):
        if json:
            print_json(asdict(result))
        elif is_streamed:
            print()
        else:
            print(f"--- {number} of {len(results)} ---\n{result.prompt}{result.text}")


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text("utf-8-sig").split("\n") if line]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: position {error.start}") from error
    if not prompts:
        raise InputError(f"--prompts_file {path} has no prompt: write one per line")
    return prompts
