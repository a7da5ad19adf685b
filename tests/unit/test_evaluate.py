"""Evaluation against its definition, token by token."""

import math

import pytest
import torch

from gptlit.config import GPTConfig
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError
from gptlit.generation.evaluate import evaluate
from gptlit.model.gpt import GPTModel

TOKENIZER = load_tokenizer("gpt2")
DOCUMENTS = ["The first document is short.", "naïve 🙂 " + "A long one goes on and on, " * 6, "", "x"]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(0)
    config = GPTConfig(context_length=16, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)
    return GPTModel(config).eval()


def by_definition(model: GPTModel, text: str, stride: int) -> tuple[float, int]:
    """Predict each token alone: from the start while the first window lasts, then from where its window begins."""
    ids = [TOKENIZER.eot_token, *TOKENIZER.encode_ordinary(text)]
    nats, correct = 0.0, 0
    for position in range(1, len(ids)):
        end = min(len(ids), 17 if position <= 16 else 17 + math.ceil((position - 16) / stride) * stride)
        with torch.no_grad():
            logits = model(torch.tensor([ids[max(0, end - 17) : position]]))[0, -1]
        nats -= float(logits.log_softmax(-1)[ids[position]])
        correct += int(logits.argmax() == ids[position])
    return nats, correct


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_is_predicted_once_from_its_window(model: GPTModel, stride: int, batch_size: int) -> None:
    total = evaluate(model, TOKENIZER, DOCUMENTS, stride, batch_size)
    expected = [by_definition(model, text, stride) for text in DOCUMENTS]
    assert total.tokens == sum(len(TOKENIZER.encode_ordinary(text)) for text in DOCUMENTS)
    assert total.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-5)
    assert total.correct == sum(correct for _, correct in expected)
    assert total.perplexity == pytest.approx(math.exp(total.nats / total.tokens))
    text_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert total.bits_per_byte == pytest.approx(total.nats / math.log(2) / text_bytes)
    assert total.documents == 3  # the empty one is none


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_out_of_range_is_named(model: GPTModel, stride: int) -> None:
    with pytest.raises(InputError, match=f"stride must be between 1 and context_length 16, got {stride}"):
        evaluate(model, TOKENIZER, DOCUMENTS, stride)


def test_a_batch_size_out_of_range_is_named(model: GPTModel) -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        evaluate(model, TOKENIZER, DOCUMENTS, 8, batch_size=0)


def test_no_text_is_named(model: GPTModel) -> None:
    with pytest.raises(InputError, match="there is no text"):
        evaluate(model, TOKENIZER, [], 8)
