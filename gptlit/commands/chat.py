"""`gptlit chat`: a prompt loop. Each line is appended to the text so far, and the model continues it."""

from dataclasses import dataclass, replace
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
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Maximum length of an answer.")] = 200,
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
    chat = Chat(*load_for_generation(checkpoint, precision, quantize, compile), sampling, max_new_tokens, seed)
    print(HELP)
    while True:
        try:
            chat.say(input("> "))
        except EOFError:
            print()
            return
        except RuntimeError as error:
            if "lost sys.std" not in str(error):
                raise
            raise InputError(f"chat reads standard input and writes standard output ({error})") from error


@dataclass
class Chat:
    """A conversation. Its `seed` is incremented for each answer."""

    model: "GPTModel"
    tokenizer: "Tokenizer"
    sampling: "Sampling"
    max_new_tokens: int
    seed: int | None
    history: str = ""

    def say(self, line: str) -> None:
        """Run a slash command, or answer a line."""
        command, _, value = line.partition(" ")
        if command == "/reset":
            self.history = ""
        elif command == "/temperature":
            try:
                self.sampling = replace(self.sampling, temperature=float(value))
            except ValueError as error:
                print(error)
            print(f"temperature is {self.sampling.temperature}")
        elif command.startswith("/"):
            print(HELP if command == "/help" else f"unknown command {command}: try /help")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        """Continue the text; what was generated before a Ctrl-C stays in it."""
        from gptlit.generation.generate import complete

        self.history += ("\n" if self.history else "") + line
        prompts = [self.history]

        def show(_: int, text: str) -> None:
            self.history += text
            print(text, end="", flush=True)

        try:
            complete(
                self.model, self.tokenizer, prompts, self.max_new_tokens, self.sampling, seed=self.seed, on_text=show
            )
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()
        self.seed = None if self.seed is None else self.seed + 1
