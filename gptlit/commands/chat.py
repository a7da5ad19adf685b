"""`gptlit chat`: a prompt loop. Each line is appended to the text so far, and the model continues it; with a template,
each line is a turn, and the model answers it.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import typer

from gptlit.commands.options import (
    Checkpoint,
    Compile,
    Precision,
    Quantize,
    Temperature,
    TemplateName,
    TopK,
    TopP,
    load_for_generation,
)
from gptlit.errors import InputError
from gptlit.generation import TEMPERATURE, TOP_K

if TYPE_CHECKING:
    from gptlit.data.templates import Template, Turn
    from gptlit.data.tokenizer import Tokenizer
    from gptlit.generation.sampling import Sampling
    from gptlit.model.gpt import GPTModel

HELP = """What you type is appended to the text, and the model continues it. Ctrl-C stops an answer, Ctrl-D ends.
  /temperature 0.7  sets it   /reset  clears the text   /help"""


def chat(
    checkpoint: Checkpoint,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Maximum length of an answer.")] = 200,
    temperature: Temperature = TEMPERATURE,
    top_k: TopK = TOP_K,
    top_p: TopP = None,
    template: TemplateName = None,
    seed: Annotated[int | None, typer.Option(help="The same seed and lines give the same answers.")] = None,
    precision: Precision = "32",
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Let a model continue what you type, or answer it. /help lists the commands in the chat."""
    from gptlit.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    loaded = load_for_generation(checkpoint, precision, quantize, compile, template)
    conversation = Chat(*loaded, sampling, max_new_tokens, seed)
    print(HELP)
    while True:
        try:
            conversation.say(input("> "))
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
    template: "Template | None"
    sampling: "Sampling"
    max_new_tokens: int
    seed: int | None
    history: str = ""
    turns: "list[Turn]" = field(default_factory=list)

    def say(self, line: str) -> None:
        """Run a slash command, or answer a line."""
        command, _, value = line.partition(" ")
        if command == "/reset":
            self.history, self.turns = "", []
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
        self.turns.append({"role": "user", "content": line})
        start = len(self.history)
        prompt: str | list[int] = self.history
        if self.template is not None:
            prompt = self.template.prompt(self.tokenizer, self.turns)

        def show(_: int, text: str) -> None:
            self.history += text
            print(text, end="", flush=True)

        try:
            complete(
                self.model, self.tokenizer, [prompt], self.max_new_tokens, self.sampling, seed=self.seed, on_text=show
            )
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        self.turns.append({"role": "assistant", "content": self.history[start:]})
        print()
        self.seed = None if self.seed is None else self.seed + 1
