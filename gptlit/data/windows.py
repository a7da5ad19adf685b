"""Windows over token shards, and the order in which they are served.

A window is L+1 consecutive ids of one shard: L inputs and the L targets, one to the right. The order is a pure
function of (seed, position): a position is a number of windows served over all devices since the run began, so that
it means the same after a change of devices, workers or accumulation.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gptlit.data.tokens import Shard

NO_TARGET = -100  # what torch's cross_entropy leaves out


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """All windows of a list of shards. Indexed with an array (B,) it gives inputs and targets, int64 (B, L) each.

    The index -1 stands for no window: it gives targets that the loss ignores.

    Args:
        shards: Files of token ids.
        context_length: L, in tokens.
        stride: Distance between the starts of two windows, in tokens.
    """

    def __init__(self, shards: Sequence[Shard], context_length: int, stride: int) -> None:
        self.shards = list(shards)
        self.context_length = context_length
        self.stride = stride
        counts = [len(range(0, shard.tokens - context_length, stride)) for shard in self.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def address(self, index: int) -> tuple[int, int]:
        """Return (shard, offset in tokens) of a window."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return shard, (index - first) * self.stride

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        inputs = np.zeros((len(indices), self.context_length), dtype=np.int64)
        targets = np.full_like(inputs, NO_TARGET)
        for row, index in enumerate(indices.tolist()):
            if index >= 0:
                shard, offset = self.address(index)
                ids = self.shards[shard].ids[offset : offset + self.context_length + 1]
                inputs[row] = ids[:-1]
                targets[row] = ids[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def shuffled(positions: np.ndarray, n_windows: int, seed: int) -> np.ndarray:
    """Return the window at each position: every epoch of `n_windows` positions is another permutation of all windows.

    Nothing is stored: a permutation is a keyed Feistel network over the next power of four, walked until it falls
    into range, so any position is reached at once.

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
    """Scramble 64 bits. Source: Steele et al. 2014, SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class TrainOrder(Sampler[np.ndarray]):
    """One device's micro-batches of window indices, shuffled without replacement, for `steps` optimizer steps.

    An optimizer step takes the next `batch_size` positions; its micro-batches are dealt out to the devices in turn.
    The order goes on from one epoch into the next, so every step is whole.

    Args:
        n_windows: Windows in an epoch.
        batch_size: Windows in an optimizer step, over all devices.
        micro_batch_size: Windows that one device takes at once.
        rank: This device.
        world_size: All devices.
        seed: Of the shuffle.
        start: Position of the first window, over all devices.
        steps: Optimizer steps to serve.
    """

    def __init__(
        self,
        n_windows: int,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
        steps: int,
    ) -> None:
        self.n_windows = n_windows
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = start
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * (self.batch_size // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        stride = self.micro_batch_size * self.world_size
        for micro_batch in range(len(self)):
            first = self.start + micro_batch * stride + self.rank * self.micro_batch_size
            positions = np.arange(first, first + self.micro_batch_size)
            yield shuffled(positions, self.n_windows, self.seed)


class EvalOrder(Sampler[np.ndarray]):
    """One device's batches of all windows, once, in order. Every device gets the same number of whole batches: the
    last ones are filled up with -1, "no window".
    """

    def __init__(self, n_windows: int, *, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.n_windows = n_windows
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.n_windows // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.micro_batch_size
            indices = np.arange(first, first + self.micro_batch_size)
            yield np.where(indices < self.n_windows, indices, -1)
