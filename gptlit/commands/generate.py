"""`gptlit generate`: prompts -> texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from gptlit.errors import InputError, note, user_path

if TYPE_CHECKING:
    from gptlit.data.tokenizer import Tokenizer
    from gptlit.generation.generate import Completion
    from gptlit.model.gpt import GPTModel


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prompts_file: Annotated[str, typer.Option(help="A file with one prompt per line instead.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of a continuation.")] = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a continuation; may be repeated.")] = None,
    num_samples: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same texts.")] = None,
    json: Json = False,
    precision: Precision = "32",
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Continue prompts with a trained model; text is printed as it is generated."""
    if bool(prompt) == bool(prompts_file):
        raise InputError("give either --prompt TEXT, of at least one character, or --prompts_file FILE")
    prompts = [prompt] if prompt else _read_prompts(user_path(prompts_file))
    from gptlit.generation.generate import complete
    from gptlit.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 0 or num_samples < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} and num_samples {num_samples}: at least 0 and 1 are needed")
    model, tokenizer = load_for_generation(checkpoint, precision, quantize, compile)
    _note_long_prompts(prompts, model, tokenizer)
    rows = [text for text in prompts for _ in range(num_samples)]
    is_streamed = len(rows) == 1 and not json
    if is_streamed:
        print(rows[0], end="", flush=True)
    show = (lambda _, text: print(text, end="", flush=True)) if is_streamed else None
    results = complete(model, tokenizer, rows, max_new_tokens, sampling, stop=stop or (), seed=seed, on_text=show)
    if is_streamed:
        print()
    else:
        _print_results(results, json)
    if stop and (unmet := sum(result.reason != "stop" for result in results)):
        note(f"no stop string was met in {unmet} of {len(results)} texts")


def _print_results(results: "list[Completion]", json: bool) -> None:
    from dataclasses import asdict

    for number, result in enumerate(results, 1):
        if json:
            print_json(asdict(result))
        else:
            print(f"--- {number} of {len(results)} ---\n{result.prompt}{result.text}")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: position {error.start}") from error
    if not any(lines):
        raise InputError(f"--prompts_file {path} has no prompt: write one per line")
    return list(filter(None, lines))


def _note_long_prompts(prompts: list[str], model: "GPTModel", tokenizer: "Tokenizer") -> None:
    length = model.config.context_length
    longest = max(len(tokenizer.encode_ordinary(prompt)) for prompt in prompts)
    if longest > length:
        note(f"a prompt has {longest} tokens, the model reads the last {length} of them")
