"""A prompt loop: what you type is put behind the text so far, and the model goes on from there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError
from gptlit.generation.generate import complete
from gptlit.generation.sampling import Sampling
from gptlit.model.gpt import GPTModel

HELP = """What you type is added to the text, and the model continues it. Ctrl-C stops an answer, Ctrl-D ends.
  /temperature 0.7   /top_k 50   /top_p 0.9   /max_new_tokens 200   (a word alone shows its value)
  /reset  forgets the text   /history  shows it   /help   /quit"""


class Chat:
    """The state of a conversation, and what a line typed does to it.

    Args:
        model: In evaluation mode.
        tokenizer: The one it was trained with.
        sampling: How to draw.
        max_new_tokens: Longest answer.
        seed: Of the first answer; None: a random one each time.
        write: Where text goes.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        sampling: Sampling,
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

    def say(self, line: str) -> bool:
        """Obey a command or answer a line; return whether the conversation goes on."""
        if line.startswith("/"):
            return self._obey(*line[1:].split(maxsplit=1))
        if line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        """Continue the text; what came before a Ctrl-C stays in it."""
        self.history += ("\n" if self.history else "") + line

        def show(_: int, text: str) -> None:
            self.history += text
            self.write(text)

        try:
            complete(
                self.model,
                self.tokenizer,
                [self.history],
                self.max_new_tokens,
                self.sampling,
                seed=self.seed,
                on_text=show,
            )
        except KeyboardInterrupt:
            self.write(" [stopped]")
        self.write("\n")
        self.seed = None if self.seed is None else self.seed + 1

    def _obey(self, command: str = "help", value: str | None = None) -> bool:
        if command in ("quit", "exit"):
            return False
        if command == "reset":
            self.history = ""
        elif command == "history":
            self.write(self.history + "\n")
        elif command in ("temperature", "top_k", "top_p", "max_new_tokens"):
            self._set(command, value)
        else:
            self.write(HELP + "\n" if command == "help" else f"no command is named /{command}: try /help\n")
        return True

    def _set(self, key: str, value: str | None) -> None:
        """Change a setting, or show it; a wrong value changes nothing."""
        try:
            if value is not None and key == "max_new_tokens":
                if int(value) < 1:
                    raise InputError(f"max_new_tokens must be at least 1, got {value}")
                self.max_new_tokens = int(value)
            elif value is not None:
                changed: Any = {key: int(value) if key == "top_k" else float(value)}
                self.sampling = replace(self.sampling, **changed)
        except ValueError as error:
            self.write(f"{error}\n")
        else:
            now = self.max_new_tokens if key == "max_new_tokens" else getattr(self.sampling, key)
            self.write(f"{key} is {now}\n")
