"""Keys and values of the tokens that were read, for generation."""

import torch
from torch import Tensor

from gptlit.config import GPTConfig


class KVCache:
    """Keys and values of the tokens that were read, for rows of different lengths.

    Args:
        config: The model's architecture.
        rows: B.
        capacity: S, tokens that a row can hold; at most `context_length`.
        device: Of the model.
        dtype: Of the model's activations.
    """

    def __init__(
        self, config: GPTConfig, rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens in each row
        shape = (rows, config.n_heads, capacity, config.emb_dim // config.n_heads)
        self.layers = [LayerCache(self, shape, device, dtype) for _ in range(config.n_layers)]
        self._steps = torch.arange(capacity, device=device)

    def positions(self, count: int) -> Tensor:
        """Return the positions (B, count) of the next tokens, and point the layers at them."""
        self.write = (self.lengths[:, None] + self._steps[:count]).clamp(max=len(self._steps) - 1)
        self.seen = self._steps <= self.write[:, None, :, None]  # (B, 1, T, S)
        return self.write

    def advance(self, counts: Tensor | int) -> None:
        """Count tokens in: as many for each row as were real, and not padding on its right."""
        self.lengths += counts  # in place: a CUDA graph reads this tensor


class LayerCache:
    """The part of a KVCache that belongs to one block: keys and values, (B, H, S, D) each."""

    def __init__(
        self, cache: KVCache, shape: tuple[int, int, int, int], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.cache = cache
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._rows = torch.arange(shape[0], device=device)[:, None]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write (B, H, T, D) where it belongs; return all keys and values so far and which a token may see."""
        cache = self.cache
        self.keys[self._rows, :, cache.write] = key.transpose(1, 2).to(self.keys.dtype)
        self.values[self._rows, :, cache.write] = value.transpose(1, 2).to(self.values.dtype)
        return self.keys, self.values, cache.seen
