"""Sampling: probabilities against their definition, and the loop around them."""

import pytest
import torch

from gptlit.config import GPTConfig
from gptlit.errors import InputError
from gptlit.generate import Sampling, generate
from gptlit.model import GPTModel

LOGITS = torch.tensor([[4.51, 0.89, -1.9, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
CONFIG = GPTConfig(vocab_size=31, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.5)


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(CONFIG)


def test_top_k_is_the_books() -> None:
    probabilities = Sampling(temperature=1.0, top_k=3).probabilities(LOGITS)[0]
    expected = torch.zeros(9)
    expected[[0, 3, 7]] = torch.tensor([0.0615, 0.5775, 0.3610])
    torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [3]), (0.6, [3, 7]), (0.95, [3, 7, 0]), (1.0, list(range(9)))])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    full = torch.softmax(LOGITS[0], dim=-1)
    probabilities = Sampling(temperature=1.0, top_p=top_p).probabilities(LOGITS)[0]
    assert sorted(kept) == probabilities.nonzero().flatten().tolist()
    torch.testing.assert_close(probabilities[kept], full[kept] / full[kept].sum())


def test_temperature_divides_the_logits() -> None:
    torch.testing.assert_close(Sampling(temperature=2.0).probabilities(LOGITS), torch.softmax(LOGITS / 2.0, dim=-1))


def test_greedy_takes_the_likeliest_and_the_window_slides(model: GPTModel) -> None:
    prompt = torch.randint(0, 31, (2, 5))
    ids = generate(model, prompt, 10)
    assert model.training
    assert ids.shape == (2, 15)
    assert ids.dtype == torch.int64
    model.eval()
    expected = prompt
    for _ in range(10):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected[:, -8:])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, expected)


def test_a_seed_reproduces_and_top_k_one_is_greedy(model: GPTModel) -> None:
    def draw(seed: int, **settings: float | int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, torch.tensor([[1, 2]]), 20, temperature=1.5, generator=generator, **settings)[0].tolist()  # type: ignore[arg-type]

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == generate(model, torch.tensor([[1, 2]]), 20)[0].tolist()
    assert draw(1, top_k=1000) == draw(1)


def test_rows_end_at_the_end_of_text(model: GPTModel) -> None:
    greedy = generate(model, torch.tensor([[1], [2]]), 12)
    eos_id = int(greedy[0, 3])
    ids = generate(model, torch.tensor([[1], [2]]), 12, eos_id=eos_id)
    for row, free in zip(ids.tolist(), greedy.tolist(), strict=True):
        end = free.index(eos_id, 1) if eos_id in free[1:] else len(free)
        assert row[:end] == free[: min(end, len(row))]
        assert set(row[end:]) <= {eos_id}
    alone = generate(model, torch.tensor([[1]]), 12, eos_id=eos_id)
    assert alone.shape[1] == greedy[0].tolist().index(eos_id, 1) + 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ],
)
def test_settings_out_of_range_are_named(model: GPTModel, settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        generate(model, torch.tensor([[1]]), 1, **settings)  # type: ignore[arg-type]


def test_bad_prompts_are_named(model: GPTModel) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="token id 31 is outside the vocabulary"):
        generate(model, torch.tensor([[31]]), 1)
