"""Evaluation on a corpus: loss, perplexity, bits per byte, accuracy."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel


@dataclass
class Score:
    """Sums over the predicted tokens of a corpus."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # of UTF-8
    nats: float = 0.0  # sum of the losses
    correct: int = 0  # tokens that were predicted as the most likely one

    @property
    def loss(self) -> float:
        """Mean loss, in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(700.0, self.loss))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable across tokenizers."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def accuracy(self) -> float:
        """Fraction of tokens that were predicted as the most likely one."""
        return self.correct / self.tokens


@torch.no_grad()
def evaluate(
    model: GPTModel, tokenizer: Tokenizer, documents: Iterable[str], stride: int, batch_size: int = 8
) -> Score:
    """Predict every token of every document once.

    A document follows the end-of-text token. In one longer than the context, a window of `context_length` ids moves by
    `stride`, and only ids that are new in it are counted: each is predicted from at least `context_length - stride`
    ids.

    Args:
        model: In evaluation mode.
        tokenizer: The one the model was trained with.
        documents: Texts.
        stride: New ids per window, from 1 (exact and slow) to `context_length`.
        batch_size: Windows in a batch.

    Raises:
        InputError: `stride` or `batch_size` is out of range, or there is no text.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not 1 <= stride <= model.config.context_length:
        raise InputError(f"stride must be between 1 and context_length {model.config.context_length}, got {stride}")
    score = Score()
    windows = _windows(documents, tokenizer, model.config.context_length, stride, score)
    while batch := list(islice(windows, batch_size)):
        _predict(model, batch, score)
    if not score.tokens:
        raise InputError("there is no text to evaluate on")
    return score


def _windows(
    documents: Iterable[str], tokenizer: Tokenizer, length: int, stride: int, score: Score
) -> Iterator[tuple[list[int], int]]:
    """Yield windows with their numbers of new ids, and count documents, tokens and bytes."""
    for text in documents:
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]
        score.documents += len(ids) > 1
        score.tokens += len(ids) - 1
        score.text_bytes += len(text.encode())
        done = 1  # ids already predicted
        while done < len(ids):
            end = min(len(ids), done + (length if done == 1 else stride))
            yield ids[max(0, end - length - 1) : end], end - done
            done = end


def _predict(model: GPTModel, batch: list[tuple[list[int], int]], score: Score) -> None:
    """Count the losses and the correct predictions of the new ids of each window."""
    device = model.pos_emb.weight.device
    rows = [torch.tensor(ids, device=device) for ids, _ in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T + 1)
    logits = model(ids[:, :-1]).float()  # (B, T, V)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T)
    is_correct = logits.argmax(dim=-1) == ids[:, 1:]  # (B, T)
    for row, (window, new) in enumerate(batch):
        span = slice(len(window) - 1 - new, len(window) - 1)
        score.nats += float(losses[row, span].cpu().double().sum())  # a Mac's GPU has no float64
        score.correct += int(is_correct[row, span].sum())
