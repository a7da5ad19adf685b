"""`gptlit chat`: a prompt loop. Each line is appended to the text so far, and the model continues it."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from gptlit.commands.options import (
    Checkpoint,
    Compile,
    Precision,
    Quantize,
    Temperature,
    TopK,
    TopP,
    load_for_generation,
)
from gptlit.errors import InputError

if TYPE_CHECKING:
    from gptlit.data.tokenizer import Tokenizer
    from gptlit.generation.sampling import Sampling
    from gptlit.model.gpt import GPTModel

HELP = """What you type is appended to the text, and the model continues it. Ctrl-C stops an answer, Ctrl-D ends.
  /temperature 0.7  sets it   /reset  clears the text   /help"""


def chat(
    checkpoint: Checkpoint,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer.")] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = None,
    seed: Annotated[int | None, typer.Option(help="The same seed and lines give the same answers.")] = None,
    precision: Precision = "32",
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Type a text, let the model continue it, type again; /help lists the commands."""
    from gptlit.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    if None in (sys.stdin, sys.stdout):
        raise InputError("chat reads standard input and writes standard output: one of them is closed")
    model, tokenizer = load_for_generation(checkpoint, precision, quantize, compile)
    talk = Chat(model, tokenizer, sampling, max_new_tokens, seed, lambda text: print(text, end="", flush=True))
    print(HELP)
    while True:
        try:
            talk.say(input("> "))
        except EOFError:
            print()
            return


class Chat:
    """The state of a conversation.

    Args:
        model: In evaluation mode.
        tokenizer: The one the model was trained with.
        sampling: How to sample.
        max_new_tokens: Maximum length of an answer.
        seed: Of the first answer, incremented for each one; None: random.
        write: Receives all text.
    """

    def __init__(
        self,
        model: "GPTModel",
        tokenizer: "Tokenizer",
        sampling: "Sampling",
        max_new_tokens: int,
        seed: int | None,
        write: Callable[[str], None],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.write = write
        self.history = ""

    def say(self, line: str) -> None:
        """Run a slash command, or answer a line."""
        command, _, value = line.partition(" ")
        if command == "/reset":
            self.history = ""
        elif command == "/temperature":
            self._set_temperature(value)
        elif command.startswith("/"):
            self.write(HELP + "\n" if command == "/help" else f"unknown command {command}: try /help\n")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        """Continue the text; what was generated before a Ctrl-C stays in it."""
        from gptlit.generation.generate import complete

        self.history += ("\n" if self.history else "") + line

        def show(_: int, text: str) -> None:
            self.history += text
            self.write(text)

        model, prompts, length = self.model, [self.history], self.max_new_tokens
        try:
            complete(model, self.tokenizer, prompts, length, self.sampling, seed=self.seed, on_text=show)
        except KeyboardInterrupt:
            self.write(" [stopped]")
        self.write("\n")
        self.seed = None if self.seed is None else self.seed + 1

    def _set_temperature(self, value: str) -> None:
        try:
            self.sampling = replace(self.sampling, temperature=float(value))
        except ValueError as error:
            self.write(f"{error}\n")
        self.write(f"temperature is {self.sampling.temperature}\n")
