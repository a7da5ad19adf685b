"""Keys and values of previous tokens, for generation."""

import torch
from torch import Tensor

from gptlit.config import GPTConfig


class KVCache:
    """Keys and values of previous tokens, for rows of different lengths.

    Args:
        config: The model's architecture.
        rows: B.
        capacity: S, the most tokens of a row; at most `context_length`.
        device: The model's device.
        dtype: Of the model's activations.
    """

    def __init__(
        self, config: GPTConfig, rows: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens in each row
        shape = (rows, config.n_heads, capacity, config.emb_dim // config.n_heads)
        self.layers = [LayerCache(self, shape, device, dtype) for _ in range(config.n_layers)]
        self._slots = torch.arange(capacity, device=device)

    def positions(self, count: int) -> Tensor:
        """Return the positions (B, T) of the next `count` tokens, and let the layers write there."""
        self.write_positions = (self.lengths[:, None] + self._slots[:count]).clamp(max=len(self._slots) - 1)  # (B, T)
        self.mask = self._slots <= self.write_positions[:, None, :, None]  # (B, 1, T, S)
        return self.write_positions

    def advance(self, counts: Tensor | int) -> None:
        """Add to the length of each row: the tokens that were real, without the padding on the right."""
        self.lengths += counts  # in place: a CUDA graph reads this tensor


class LayerCache:
    """Keys and values of one block, (B, H, S, D) each."""

    def __init__(
        self, cache: KVCache, shape: tuple[int, int, int, int], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.cache = cache
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._rows = torch.arange(shape[0], device=device)[:, None]  # (B, 1)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write (B, H, T, D) keys and values; return all (B, H, S, D) and the attention mask (B, 1, T, S)."""
        where = self._rows, slice(None), self.cache.write_positions
        self.keys[where] = key.transpose(1, 2).to(self.keys.dtype)  # (B, T, H, D)
        self.values[where] = value.transpose(1, 2).to(self.values.dtype)
        return self.keys, self.values, self.cache.mask
