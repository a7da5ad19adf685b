"""Windows and their order."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlit.data.tokens import Shard
from gptlit.data.windows import NO_TARGET, EvalOrder, TrainOrder, Windows, shuffled


def shard(path: Path, ids: np.ndarray) -> Shard:
    ids.astype("<u2").tofile(path)
    return Shard(path, "uint16", len(ids))


@pytest.mark.parametrize(
    ("length", "stride", "count"), [(4, 1, 5141), (4, 4, 1286), (8, 2, 2569), (256, 256, 20), (1024, 1024, 5)]
)
def test_number_of_windows_is_the_books(tmp_path: Path, length: int, stride: int, count: int) -> None:
    assert len(Windows([shard(tmp_path / "a", np.arange(5145))], length, stride)) == count


def test_windows_are_slices_and_targets_one_to_the_right(tmp_path: Path) -> None:
    shards = [shard(tmp_path / "a", np.arange(100, 111)), shard(tmp_path / "b", np.arange(200, 209))]
    windows = Windows(shards, 4, 3)
    inputs, targets = windows[np.arange(len(windows))]
    assert inputs[:, 0].tolist() == [100, 103, 106, 200, 203]
    assert inputs[3].tolist() == [200, 201, 202, 203]
    assert (targets == inputs + 1).all()
    assert windows.address(4) == (1, 3)


def test_no_window_is_padding_without_targets(tmp_path: Path) -> None:
    _, targets = Windows([shard(tmp_path / "a", np.arange(50))], 4, 4)[np.array([0, -1])]
    assert (targets[1] == NO_TARGET).all()
    assert (targets[0] >= 0).all()


@given(st.integers(1, 500), st.integers(-(2**70), 2**70), st.integers(0, 10**6))
def test_every_epoch_serves_each_window_once(n_windows: int, seed: int, epoch: int) -> None:
    served = shuffled(np.arange(epoch * n_windows, (epoch + 1) * n_windows), n_windows, seed)
    assert sorted(served.tolist()) == list(range(n_windows))


def test_epochs_and_seeds_differ() -> None:
    first = shuffled(np.arange(1000), 1000, 1)
    assert not np.array_equal(first, shuffled(np.arange(1000, 2000), 1000, 1))
    assert not np.array_equal(first, shuffled(np.arange(1000), 1000, 2))


def test_the_order_looks_random() -> None:
    """A permutation that kept neighbours together would show here."""
    n_windows = 4096
    served = np.concatenate([shuffled(np.arange(e * n_windows, (e + 1) * n_windows), n_windows, 7) for e in range(40)])
    blocks = served.reshape(40 * 16, -1) // 256  # which sixteenth of the corpus, in each sixteenth of an epoch
    counts = np.stack([np.bincount(block, minlength=16) for block in blocks])
    chi_square = float(((counts - 16) ** 2 / 16).sum(axis=1).mean())
    assert chi_square == pytest.approx(15 * (1 - 1 / 16), rel=0.1)  # drawn without replacement
    steps = np.diff(served.astype(float))
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.02  # -1/2 for independent draws


@given(st.integers(1, 60), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(0, 300))
def test_any_number_of_devices_gives_the_same_steps(n_windows: int, world_size: int, micro: int, start: int) -> None:
    def steps(world_size: int, micro: int) -> list[list[int]]:
        orders = [
            TrainOrder(
                n_windows,
                batch_size=32,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
                seed=3,
                start=start,
                steps=3,
            )
            for rank in range(world_size)
        ]
        assert {len(order) for order in orders} == {3 * 32 // (micro * world_size)}
        dealt = [np.concatenate(parts) for parts in zip(*orders, strict=True)]  # by micro-batch
        return np.concatenate(dealt).reshape(3, 32).tolist()

    assert steps(world_size, micro) == steps(1, 32)


def test_the_order_goes_on_where_it_stopped() -> None:
    whole = list(TrainOrder(10, batch_size=4, micro_batch_size=2, steps=6, seed=1))
    rest = list(TrainOrder(10, batch_size=4, micro_batch_size=2, steps=2, seed=1, start=16))
    assert np.array_equal(whole[8:], rest)


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 4))
def test_validation_sees_every_window_once_in_order(n_windows: int, micro: int, world_size: int) -> None:
    orders = [
        list(EvalOrder(n_windows, micro_batch_size=micro, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(order) for order in orders}) == 1
    served = np.concatenate([batch for batches in zip(*orders, strict=True) for batch in batches])
    assert served[served >= 0].tolist() == list(range(n_windows))
