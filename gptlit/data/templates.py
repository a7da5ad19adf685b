"""Templates: how the turns of a conversation become the text that a model reads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError

ASSISTANT, SYSTEM, USER = "assistant", "system", "user"
Turn = Mapping[str, str]  # role and content; of an instruction also its input


@dataclass(frozen=True)
class Template:
    """What is written before each part of a conversation. After an answer comes the end-of-text token."""

    system: str  # before the first turn, unless the conversation has a system message
    user: str  # before an instruction
    input: str  # before the input of an instruction, if it has one
    assistant: str  # before an answer

    def encode(self, tokenizer: Tokenizer, turns: Iterable[Turn]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and for each whether it belongs to an answer (with what is before it)."""
        ids: list[int] = []
        is_answer: list[bool] = []
        before = self.system
        for turn in turns:
            role = turn["role"]
            if role == SYSTEM:
                before = turn["content"]
                continue
            text = before + (self.assistant if role == ASSISTANT else self.user) + turn["content"]
            if turn.get("input"):
                text += self.input + turn["input"]
            part = tokenizer.encode_ordinary(text if ids else text.lstrip("\n"))
            part += [tokenizer.eot_token] * (role == ASSISTANT)
            ids += part
            is_answer += [role == ASSISTANT] * len(part)
            before = ""
        return ids, is_answer

    def prompt(self, tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
        """Return the ids after which the model answers."""
        return self.encode(tokenizer, turns)[0] + tokenizer.encode_ordinary(self.assistant)


TEMPLATES = {
    "alpaca": Template(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "\n\n### Instruction:\n",
        "\n\n### Input:\n",
        "\n\n### Response:\n",
    ),
    "chat": Template("", "\n\nUser:\n", "\n", "\n\nAssistant:\n"),
    "phi3": Template("", "\n<|user|>\n", "\n", "\n<|assistant|>:\n"),
}


def find_template(name: str) -> Template:
    """Return a template by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in TEMPLATES:
        raise InputError(f"no template is named {name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
