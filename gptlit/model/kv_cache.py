"""Keys and values of previous tokens, for generation."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gptlit.model.gpt import GPTModel


class KVCache:
    """Keys and values of previous tokens, for rows of different lengths.

    Args:
        model: The model.
        rows: B.
        capacity: S, the most tokens of a row; at most `context_length`.
    """

    def __init__(self, model: "GPTModel", rows: int, capacity: int) -> None:
        device = model.pos_emb.weight.device
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens in each row
        self.rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self.slots = torch.arange(capacity, device=device)
        self.layers = [LayerCache(self) for _ in range(model.config.n_layers)]

    def positions(self, count: int) -> Tensor:
        """Return the positions (B, T) of the next `count` tokens, and let the layers write there."""
        self.write_positions = (self.lengths[:, None] + self.slots[:count]).clamp(max=len(self.slots) - 1)  # (B, T)
        self.mask = self.slots <= self.write_positions[:, None, :, None]  # (B, 1, T, S)
        return self.write_positions

    def advance(self, counts: Tensor | int) -> None:
        """Add to the length of each row: the tokens that were real, without the padding on the right."""
        self.lengths += counts  # in place: a CUDA graph reads this tensor


class LayerCache:
    """Keys and values of one block, (B, H, S, D) each."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """The positions (B, T) of the tokens that come next."""
        return self.cache.write_positions

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write (B, H, T, D) keys and values; return all (B, H, S, D) and the attention mask (B, 1, T, S)."""
        if self.keys is None or self.values is None:
            B, H, _, D = key.shape  # noqa: N806
            self.keys = key.new_zeros(B, H, len(self.cache.slots), D)
            self.values = torch.zeros_like(self.keys)
        where = self.cache.rows, slice(None), self.cache.write_positions
        self.keys[where] = key.transpose(1, 2)  # (B, T, H, D)
        self.values[where] = value.transpose(1, 2)
        return self.keys, self.values, self.cache.mask
