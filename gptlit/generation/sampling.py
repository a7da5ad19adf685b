"""How the next token is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlit.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: 0 always takes the likeliest token; above, logits are divided by it.
        top_k: Draw from the k likeliest tokens; None: from all.
        top_p: Draw from the smallest set of likeliest tokens that together have this probability; None: from all.

    Raises:
        InputError: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be at least 0, got {self.temperature} (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k} (leave it out to keep every token)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution to draw from, float32 (B, V), for logits (B, V) and a temperature above 0.

        Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p).
        """
        logits = logits.float()
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature  # however small, nothing overflows
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept, order = torch.topk(logits, self.top_k)  # exactly k, also where logits are equal
            logits = torch.full_like(logits, -torch.inf).scatter(-1, order, kept)
        probabilities = torch.softmax(logits, dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
            beyond = ranked.cumsum(dim=-1) - ranked >= self.top_p  # what stands before a token reaches p already
            ranked = ranked.masked_fill(beyond, 0.0)
            ranked = ranked / ranked.sum(dim=-1, keepdim=True)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
        return probabilities

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
        """Return the next ids (B,), each row drawn with its own generator, or all with the only one."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        chances = self.probabilities(logits)
        if len(generators) == 1:
            return torch.multinomial(chances, 1, generator=generators[0])[:, 0]
        rows = [torch.multinomial(row, 1, generator=g) for row, g in zip(chances, generators, strict=True)]
        return torch.cat(rows)
