"""GPTConfig: the defaults are the book's, and a wrong value is named."""

from dataclasses import asdict

import pytest

from gptlit.config import GPT_CONFIG_124M, GPTConfig


def test_defaults_are_the_books() -> None:
    assert {key: asdict(GPTConfig())[key] for key in GPT_CONFIG_124M} == GPT_CONFIG_124M


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"emb_dim": 65, "n_heads": 2}, "emb_dim 65 is not divisible by n_heads 2"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"n_layers": -1}, "n_layers must be a positive integer, got -1"),
        ({"context_length": 1.5}, "context_length must be a positive integer, got 1.5"),
        ({"n_heads": True}, "n_heads must be a positive integer, got True"),
        ({"drop_rate": 1.0}, "drop_rate must be at least 0 and below 1, got 1.0"),
        ({"init": "xavier"}, "init must be 'torch' or 'gpt2', got 'xavier'"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTConfig(**wrong)  # type: ignore[arg-type]
