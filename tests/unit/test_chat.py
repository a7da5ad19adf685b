"""The prompt loop: what a line typed does."""

from typing import Any

import pytest
import torch

from gptlit.commands.chat import Chat
from gptlit.config import GPTConfig
from gptlit.data.templates import find_template
from gptlit.data.tokenizer import Tokenizer, load_tokenizer
from gptlit.generation.generate import complete
from gptlit.generation.sampling import Sampling
from gptlit.model.gpt import GPTModel


@pytest.fixture
def chat() -> Chat:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(context_length=32, emb_dim=16, n_heads=2, n_layers=1)).eval()
    return Chat(model, load_tokenizer("gpt2"), None, Sampling(1.0), 6, 1)


def test_an_answer_continues_all_that_was_said(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.say("Hello")
    first = complete(chat.model, chat.tokenizer, ["Hello"], 6, Sampling(1.0), seed=1)[0].text
    assert capsys.readouterr().out == first + "\n"
    assert chat.history == "Hello" + first
    chat.say("More")
    second = complete(chat.model, chat.tokenizer, ["Hello" + first + "\nMore"], 6, Sampling(1.0), seed=2)[0].text
    assert chat.history == "Hello" + first + "\nMore" + second
    chat.say("/reset")
    assert chat.history == ""


def test_the_temperature_changes_and_a_wrong_value_changes_nothing(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.say("/temperature 0.5")
    assert chat.sampling == Sampling(0.5)
    for line in ("/temperature -1", "/temperature two", "/temperature", "/tmeperature 1"):
        chat.say(line)
    assert chat.sampling == Sampling(0.5)
    text = capsys.readouterr().out
    for words in ("temperature must be at least 0", "two", "temperature is 0.5", "unknown command /tmeperature"):
        assert words in text


def test_ctrl_c_stops_one_answer_only(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, on_text: object, **__: object) -> None:
        on_text(0, " part")  # type: ignore[operator]
        raise KeyboardInterrupt

    monkeypatch.setattr("gptlit.generation.generate.complete", interrupted)
    chat.say("Hello")
    assert chat.history == "Hello part"
    assert capsys.readouterr().out == " part [stopped]\n"


def test_with_a_template_lines_and_answers_are_turns(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []

    def answered(model: object, tokenizer: Tokenizer, prompt: list[list[int]], *_: object, **options: Any) -> None:
        prompts.append(tokenizer.decode(prompt[0]))
        options["on_text"](0, "Fine.")

    monkeypatch.setattr("gptlit.generation.generate.complete", answered)
    chat.template = find_template("chat")
    chat.say("Hello")
    chat.say("More")
    first = "User:\nHello\n\nAssistant:\n"
    assert prompts == [first, f"{first}Fine.<|endoftext|>\n\nUser:\nMore\n\nAssistant:\n"]
    chat.say("/reset")
    chat.say("Hello")
    assert prompts[-1] == first
