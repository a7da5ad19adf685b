"""Windows over token shards, and the samplers that decide their order.

A window is L+1 consecutive ids of one shard: L inputs, and the L targets one token to the right. The order is a pure
function of (seed, position). A position counts windows over all devices since the run began, so it is independent of
the number of devices, workers and accumulation steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gptlit.data.token_files import Shard
from gptlit.errors import InputError

NO_TARGET = -100  # ignore_index of torch's cross_entropy


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """All windows of a list of shards. An array of indices (B,) gives inputs and targets, int64 (B, L) each.

    The index -1 is padding: its targets are ignored by the loss. Ids are copied once, from the memory map to the
    batch.

    Args:
        shards: Files of token ids.
        context_length: L, in tokens.
        stride: Distance between the starts of two windows, in tokens.
        vocab_size: Larger ids raise an error.
        pin_memory: Allocate batches in pinned memory.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        context_length: int,
        stride: int,
        vocab_size: int = 2**32,
        pin_memory: bool = False,
    ) -> None:
        self.shards, self.context_length, self.stride = list(shards), context_length, stride
        self.vocab_size, self.pin_memory = vocab_size, pin_memory
        counts = [len(range(0, shard.tokens - context_length, stride)) for shard in self.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._firsts = np.concatenate([np.zeros(1, dtype=np.int64), self._ends])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def address(self, index: int) -> tuple[int, int]:
        """Return (shard, offset in tokens) of a window."""
        (shard,), (offset,) = self._addresses(np.array([index]))
        return shard, offset

    def _addresses(self, indices: np.ndarray) -> tuple[list[int], list[int]]:
        """Return the shards and the offsets in them; the offset of padding is negative."""
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards.tolist(), ((indices - self._firsts[shards]) * self.stride).tolist()

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        pair = torch.empty((2, len(indices), self.context_length), dtype=torch.int64, pin_memory=self.pin_memory)
        inputs, targets = pair.numpy()
        for row, (shard, offset) in enumerate(zip(*self._addresses(indices), strict=True)):
            if offset < 0:
                inputs[row], targets[row] = 0, NO_TARGET
                continue
            ids = self.shards[shard].ids[offset : offset + self.context_length + 1]
            inputs[row], targets[row] = ids[:-1], ids[1:]
        if (largest := int(pair.max())) >= self.vocab_size:
            shard, offset = self.address(int(indices[int(pair.amax(dim=(0, 2)).argmax())]))
            raise InputError(
                f"{self.shards[shard].path} has the id {largest} in the window at {offset}, outside the vocabulary of "
                f"{self.vocab_size}: set data.tokenizer to the one that made it, or data.dtype"
            )
        return pair[0], pair[1]


def shuffled(positions: np.ndarray, n_windows: int, seed: int) -> np.ndarray:
    """Return the window at each position: every epoch of `n_windows` positions is another permutation of all windows.

    Nothing is stored: the permutation is a keyed Feistel network over the next power of four, applied until the result
    is in range, so any position is computed in constant time.

    Args:
        positions: int64 (B,), each at least 0.
        n_windows: Windows in an epoch.
        seed: The key, any integer.

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle walking).
    """
    epochs, index = np.divmod(positions.astype(np.uint64), np.uint64(n_windows))
    half = np.uint64(max(1, -(-(n_windows - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _mix(epochs + _mix(np.full_like(epochs, seed % 2**64)))
    outside = np.ones(len(index), dtype=bool)
    while outside.any():
        left, right = index[outside] >> half, index[outside] & mask
        for turn in range(4):
            turn_key = keys[outside] + np.uint64(turn * 0x9E3779B97F4A7C15 % 2**64)
            left, right = right, left ^ (_mix(right + turn_key) & mask)
        index[outside] = left << half | right
        outside = index >= np.uint64(n_windows)
    return index.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit integers. Source: Steele et al. 2014, SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


CHUNK = 64  # micro-batches whose windows are computed at once
BLOCK = 2**16  # positions in which every corpus gets its exact share


class WeightedMixture:
    """The window at each position, drawn from several corpora by weight; each corpus is shuffled separately.

    Of every `BLOCK` positions a corpus gets its share, rounded to an integer, at shuffled places. Any position is
    reached by computing one block.

    Args:
        n_windows: Windows in each corpus; indices continue from one corpus to the next.
        weights: Positive numbers, one per corpus.
        seed: Seed of the order.

    Raises:
        InputError: A weight is not positive, or so small that its corpus would never be drawn.
    """

    def __init__(self, n_windows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.n_windows = list(n_windows)
        self.seed = seed
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise InputError(f"the weight {weight} in data.source must be a positive number")
        relative = np.array(weights) / max(weights)
        exact = relative / relative.sum() * BLOCK
        self.shares = np.floor(exact).astype(np.int64)
        self.shares[np.argsort(self.shares - exact, kind="stable")[: BLOCK - self.shares.sum()]] += 1
        if not self.shares.all():
            raise InputError(f"the weights {list(weights)} in data.source are too far apart: at most {BLOCK} to 1")
        self._firsts = np.cumsum([0, *self.n_windows[:-1]])
        self._block = lru_cache(maxsize=2)(self._assign)

    def _assign(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each position of a block, the corpus and how many windows of it came before in the block."""
        places = shuffled(np.arange(BLOCK) + block * BLOCK, BLOCK, self.seed + 1)
        corpora = np.searchsorted(np.cumsum(self.shares), places, side="right")
        before = np.empty(BLOCK, dtype=np.int64)
        for corpus, share in enumerate(self.shares):
            before[corpora == corpus] = np.arange(share)
        return corpora, before

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the windows at positions, int64 (B,)."""
        if len(self.n_windows) == 1:
            return shuffled(positions, self.n_windows[0], self.seed)
        windows = np.empty_like(positions)
        blocks, places = np.divmod(positions, BLOCK)
        for block in np.unique(blocks).tolist():
            corpora, before = self._block(block)
            for corpus, (count, first) in enumerate(zip(self.n_windows, self._firsts, strict=True)):
                chosen = (blocks == block) & (corpora[places] == corpus)
                draws = before[places[chosen]] + block * self.shares[corpus]
                windows[chosen] = first + shuffled(draws, count, self.seed + 2 + corpus)
        return windows

    def drawn(self, position: int) -> list[int]:
        """Return how many windows of each corpus are served before a position."""
        block, place = divmod(position, BLOCK)
        corpora, _ = self._block(block)
        counts: list[int] = (np.bincount(corpora[:place], minlength=len(self.shares)) + block * self.shares).tolist()
        return counts

    def describe(self, names: Sequence[str], position: int) -> list[str]:
        """Return a line on each of several corpora: its share of the windows, and its epochs up to a position."""
        if len(names) == 1:
            return []
        shares = self.shares / self.shares.sum()
        return [
            f"{name}: {share:.1%} of the windows; {count / windows:.2f} of its epochs by the end of the run"
            for name, share, count, windows in zip(names, shares, self.drawn(position), self.n_windows, strict=True)
        ]


@dataclass(eq=False)
class TrainSampler(Sampler[np.ndarray]):
    """One device's micro-batches of window indices, shuffled without replacement, for `steps` optimizer steps.

    An optimizer step takes the next `batch_size` positions; its micro-batches are assigned to the devices in turn. It
    may cross the boundary between two epochs, so every step is complete.
    """

    mixture: WeightedMixture
    _: KW_ONLY
    batch_size: int  # over all devices
    micro_batch_size: int  # of one device
    rank: int = 0
    world_size: int = 1
    start: int = 0  # position of the first window, over all devices
    steps: int

    def __len__(self) -> int:
        return self.steps * (self.batch_size // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        stride = self.micro_batch_size * self.world_size
        first = self.start + self.rank * self.micro_batch_size
        for done in range(0, len(self), CHUNK):
            micro_batches = np.arange(done, min(done + CHUNK, len(self)))[:, None]
            positions = first + micro_batches * stride + np.arange(self.micro_batch_size)
            windows = self.mixture(positions.ravel())
            yield from windows.reshape(positions.shape)


@dataclass(eq=False)
class EvalSampler(Sampler[np.ndarray]):
    """One device's batches of all windows, once, in order. Every device gets the same number of full batches: the last
    ones are padded with -1.
    """

    n_windows: int
    _: KW_ONLY
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return -(-self.n_windows // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.micro_batch_size
            indices = np.arange(first, first + self.micro_batch_size)
            yield np.where(indices < self.n_windows, indices, -1)
