"""Evaluation on a corpus: loss, perplexity, bits per byte, accuracy, and the documents with the highest loss."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel


@dataclass
class Score:
    """Sums over predicted tokens.

    Args:
        tokens: Number of tokens.
        text_bytes: UTF-8 bytes of their text.
        nats: Sum of their losses.
        correct: Number of tokens that were predicted as the most likely one.
        start: The beginning of the text, for a document.
    """

    tokens: int = 0
    text_bytes: int = 0
    nats: float = 0.0
    correct: int = 0
    start: str = ""

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


@dataclass
class Evaluation:
    """The score of a corpus and its documents with the highest loss, worst first."""

    total: Score = field(default_factory=Score)
    documents: int = 0
    worst: list[Score] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    model: GPTModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    stride: int,
    batch_size: int = 8,
    worst: int = 5,
    on_document: Callable[[Score], None] | None = None,
) -> Evaluation:
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
        worst: Number of documents with the highest loss to keep.
        on_document: Called with the score of each document.

    Raises:
        InputError: `stride` or `batch_size` is out of range, or there is no text.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not 1 <= stride <= model.config.context_length:
        raise InputError(f"stride must be between 1 and context_length {model.config.context_length}, got {stride}")
    result = Evaluation()
    windows = _windows(documents, tokenizer, model.config.context_length, stride)
    while batch := list(islice(windows, batch_size)):
        for (score, _, _, is_last), nats, correct in zip(batch, *_predict(model, batch), strict=True):
            score.nats += nats
            score.correct += correct
            if is_last:
                _add(result, score, worst)
                if on_document is not None:
                    on_document(score)
    if not result.total.tokens:
        raise InputError("there is no text to evaluate on")
    return result


Window = tuple[Score, list[int], int, bool]  # score of its document, ids, number of new ids, is it the last?


def _windows(documents: Iterable[str], tokenizer: Tokenizer, length: int, stride: int) -> Iterator[Window]:
    for text in documents:
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]
        score = Score(len(ids) - 1, len(text.encode()), start=" ".join(text[:200].split())[:60])
        done = 1  # ids already predicted
        while done < len(ids):
            end = min(len(ids), done + (length if done == 1 else stride))
            yield score, ids[max(0, end - length - 1) : end], end - done, end == len(ids)
            done = end


def _predict(model: GPTModel, batch: list[Window]) -> tuple[list[float], list[int]]:
    """Return the sum of losses and the number of correct predictions over the new ids of each window."""
    device = model.pos_emb.weight.device
    rows = [torch.tensor(ids) for _, ids, _, _ in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    logits: Tensor = model(ids[:, :-1]).float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    is_correct = logits.argmax(dim=-1) == ids[:, 1:]  # (B, T)
    spans = [slice(len(row) - 1 - new, len(row) - 1) for row, (_, _, new, _) in zip(rows, batch, strict=True)]
    nats = [float(losses[row, span].double().sum()) for row, span in enumerate(spans)]
    return nats, [int(is_correct[row, span].sum()) for row, span in enumerate(spans)]


def _add(result: Evaluation, score: Score, worst: int) -> None:
    result.documents += 1
    for key in ("tokens", "text_bytes", "nats", "correct"):
        setattr(result.total, key, getattr(result.total, key) + getattr(score, key))
    result.worst = sorted([*result.worst, score], key=lambda document: -document.loss)[:worst]
