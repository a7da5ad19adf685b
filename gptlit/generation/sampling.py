"""Sampling the next token: temperature, top-k, top-p."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptlit.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling the next token.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Sample from the k most likely tokens; None: from all.
        top_p: Sample from the smallest set of most likely tokens with this total probability; None: from all.

    Raises:
        InputError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be at least 0, got {self.temperature} (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k} (leave it out to keep every token)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def probs(self, logits: Tensor) -> Tensor:
        """Return the distribution to sample from, float32 (B, V), for logits (B, V) and a temperature above 0.

        Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p).
        """
        logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # no overflow, however small the temperature
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept, order = torch.topk(logits, self.top_k)  # exactly k, even with ties
            logits = torch.full_like(logits, -torch.inf).scatter(-1, order, kept)
        probs = torch.softmax(logits, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = probs.sort(dim=-1, descending=True, stable=True)
            beyond = ranked.cumsum(dim=-1) - ranked >= self.top_p  # the tokens before it reach p
            ranked = ranked.masked_fill(beyond, 0.0)
            ranked = ranked / ranked.sum(dim=-1, keepdim=True)
            probs = torch.zeros_like(probs).scatter(-1, order, ranked)
        return probs

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample the next ids, int64 (B,)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial(self.probs(logits), 1, generator=generator)[:, 0]
