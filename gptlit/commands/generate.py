"""`gptlit generate`: prompts -> texts."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptlit.commands.options import (
    Checkpoint,
    Compile,
    Json,
    Precision,
    Quantize,
    Temperature,
    TemplateName,
    TopK,
    TopP,
    load_for_generation,
    print_json,
    read_lines,
)
from gptlit.errors import InputError, user_path
from gptlit.generation import TEMPERATURE

if TYPE_CHECKING:
    from gptlit.data.templates import Template
    from gptlit.data.tokenizer import Tokenizer
    from gptlit.generation.generate import Completion

Entry = str | dict[str, Any]  # a prompt, or a row of a file of instructions


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prompts_file: Annotated[str, typer.Option(help="A file with one prompt per line, or of instructions.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Maximum length of a continuation.")] = 100,
    temperature: Temperature = TEMPERATURE,
    top_k: TopK = None,
    top_p: TopP = None,
    template: TemplateName = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a continuation; may be repeated.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Continuations in a batch.")] = 8,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same texts, in batches of the same size.")
    ] = None,
    json: Json = False,
    precision: Precision = "32",
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Continue prompts, or answer instructions, with a trained model. Text is printed as it is generated.

    With --json, a .json or .jsonl file of instructions is answered by a line for each row: its keys and model_response.
    """
    if bool(prompt) == bool(prompts_file):
        raise InputError("give either --prompt TEXT, of at least one character, or --prompts_file FILE")
    from gptlit.generation.generate import complete
    from gptlit.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    entries = [prompt] if prompt else _read_prompts(user_path(prompts_file))
    entries = [entry for entry in entries for _ in range(num_samples)]
    model, tokenizer, found = load_for_generation(checkpoint, precision, quantize, compile, template)
    rows = [_prompt(entry, found, tokenizer) for entry in entries]
    is_streamed = len(rows) == 1 and not json

    def show(_: int, text: str) -> None:
        if is_streamed:
            print(text, end="", flush=True)

    show(0, rows[0] if isinstance(rows[0], str) else "")
    for first in range(0, len(rows), batch_size):
        batch, batch_seed = rows[first : first + batch_size], None if seed is None else seed + first
        results = complete(model, tokenizer, batch, max_new_tokens, sampling, stop or (), batch_seed, show)
        for number, result in enumerate(results, first):
            if json:
                _print_json(entries[number], result)
            else:
                title = f"--- {number + 1} of {len(rows)} ---\n{result.prompt}{result.text}"
                print("" if is_streamed else title, flush=True)


def _print_json(entry: Entry, result: "Completion") -> None:
    print_json({**entry, "model_response": result.text.strip()} if isinstance(entry, dict) else asdict(result))


def _prompt(entry: Entry, template: "Template | None", tokenizer: "Tokenizer") -> str | list[int]:
    """Return what the model continues: the prompt as it is, or ids with the template."""
    from gptlit.data.rows import conversation

    if template is not None:
        row = {"instruction": entry} if isinstance(entry, str) else entry
        return template.prompt(tokenizer, conversation(row, "the prompt", needs_answer=False))
    if isinstance(entry, dict):
        raise InputError("--prompts_file has instructions, and the checkpoint no template: give --template")
    return entry


def _read_prompts(path: Path) -> list[Entry]:
    """Return the rows of a file of instructions, or the lines of a text."""
    from gptlit.data.rows import conversation, read_rows, row_kind

    if row_kind(path) == "instructions":
        return [row for location, row in read_rows(path) if conversation(row, location, needs_answer=False)]
    return [*read_lines(path, "--prompts_file", "prompt")]
