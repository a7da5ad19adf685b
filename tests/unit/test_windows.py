"""Windows and their order."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_script
from gptlit.data.token_files import FORMAT, MANIFEST, SPLITS, Shard
from gptlit.data.windows import BLOCK, NO_TARGET, EvalSampler, TrainSampler, WeightedMixture, Windows, shuffled
from gptlit.errors import InputError


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
            TrainSampler(
                WeightedMixture([n_windows], [1.0], 3),
                batch_size=32,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
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
    whole = list(TrainSampler(WeightedMixture([10], [1.0], 1), batch_size=4, micro_batch_size=2, steps=6))
    rest = list(TrainSampler(WeightedMixture([10], [1.0], 1), batch_size=4, micro_batch_size=2, steps=2, start=16))
    assert np.array_equal(whole[8:], rest)


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 4))
def test_validation_sees_every_window_once_in_order(n_windows: int, micro: int, world_size: int) -> None:
    orders = [
        list(EvalSampler(n_windows, micro_batch_size=micro, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(order) for order in orders}) == 1
    served = np.concatenate([batch for batches in zip(*orders, strict=True) for batch in batches])
    assert served[served >= 0].tolist() == list(range(n_windows))


@settings(max_examples=40)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=4), st.sampled_from([0, BLOCK - 1000]), st.data())
def test_a_mix_serves_each_corpus_in_epochs_of_its_own(counts: list[int], start: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.05, 20), min_size=len(counts), max_size=len(counts)))
    mix = WeightedMixture(counts, weights, seed=3)
    served = mix(np.arange(start, start + 2000))
    first = 0
    for count, drawn in zip(counts, mix.drawn(start), strict=True):
        own = served[(served >= first) & (served < first + count)] - first
        own = own[-drawn % count :]  # from the beginning of an epoch
        whole = own[: len(own) // count * count].reshape(-1, count)
        assert (np.sort(whole, axis=1) == np.arange(count)).all()
        rest = own[len(whole) * count :]
        assert len(set(rest.tolist())) == len(rest)
        first += count
    assert first == sum(counts)


@settings(max_examples=20)
@given(st.integers(0, 3 * BLOCK), st.integers(1, 64))
def test_a_mix_is_a_function_of_the_position(start: int, count: int) -> None:
    positions = np.arange(start, start + count)
    mix, again = (WeightedMixture([1000, 500, 20], [5, 3, 0.5], seed=1) for _ in range(2))
    assert mix(positions).tolist() == [int(again(position[None])[0]) for position in positions[::-1]][::-1]


def test_a_mix_keeps_its_weights_and_counts_what_it_drew() -> None:
    mix = WeightedMixture([10**9, 10**9, 10**9], [7, 2, 1], seed=0)
    drawn = np.array(mix.drawn(BLOCK))
    assert drawn.sum() == BLOCK
    assert np.abs(drawn / BLOCK - [0.7, 0.2, 0.1]).max() < 1 / BLOCK
    for position in (0, 1, 999, BLOCK + 12_345):
        corpora = mix(np.arange(position)) // 10**9
        assert mix.drawn(position) == np.bincount(corpora, minlength=3).tolist()
    early = np.array(mix.drawn(5000)) / 5000
    assert np.abs(early - [0.7, 0.2, 0.1]).max() < 0.03  # shuffled, not one corpus after the other
    assert WeightedMixture([5], [0.3], seed=9).drawn(17) == [17]


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1, 0], "weight 0 .* must be a positive"), ([1, -2.0], "weight -2.0"), ([1, float("nan")], "weight nan")],
)
def test_weights_that_are_not_positive_are_refused(weights: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        WeightedMixture([10, 10], weights, 0)


def test_weights_too_far_apart_are_refused() -> None:
    with pytest.raises(InputError, match="too far apart: at most 65536 to 1"):
        WeightedMixture([10, 10], [1, 1e-9], 0)
    assert WeightedMixture([10, 10], [1e308, 1e308], 0).drawn(BLOCK) == [BLOCK // 2] * 2


def test_an_id_outside_the_vocabulary_is_named_where_it_is_served(tmp_path: Path) -> None:
    ids = np.arange(100)
    ids[57] = 60000
    windows = Windows([shard(tmp_path / "a.bin", ids)], 8, 8, vocab_size=50257)
    windows[np.array([0, 1, -1])]
    with pytest.raises(InputError, match=r"a\.bin has the id 60000 in the window at 56, outside the vocabulary of"):
        windows[np.array([0, 7])]


def test_more_shards_than_open_files_are_allowed(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    shards = [shard(tmp_path / f"{n}.bin", np.arange(n, n + 9)) for n in range(600)]
    windows = Windows(shards, 4, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        inputs, _ = windows[np.arange(len(windows))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert inputs[::2, 0].tolist() == list(range(600))


BIG = """
import json, sys
from pathlib import Path
import numpy as np
from gptlit.data.token_files import open_prepared
from gptlit.data.windows import WeightedMixture, TrainSampler, Windows
def memory():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
before = memory()
data = open_prepared(Path(sys.argv[1]))
windows = Windows(data.shards("train"), 1024, 1024)
mixture = WeightedMixture([len(windows)], [1.0], 0)
first = lambda position: next(iter(TrainSampler(
    mixture, batch_size=512, micro_batch_size=8, rank=3, world_size=8, start=position, steps=1)))
for position in (0, 10**9):
    inputs, targets = windows[first(position)]
print(json.dumps({"tokens": data.tokens("train"), "MB": memory() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_a_corpus_of_a_trillion_tokens_is_not_read(tmp_path: Path) -> None:
    shards, tokens = 1000, 10**9
    (tmp_path / "big").mkdir()
    for number in range(shards):
        with (tmp_path / "big" / f"train-{number:05d}.bin").open("wb") as file:
            file.truncate(2 * tokens)  # sparse: it takes no room
    entries = [{"file": f"train-{n:05d}.bin", "tokens": tokens, "sha256": "0" * 64} for n in range(shards)]
    splits = {name: {"documents": 0, "bytes": 0, "shards": entries if name == "train" else []} for name in SPLITS}
    manifest = {"format": FORMAT, "tokenizer": "gpt2", "tokenizer_sha256": "", "dtype": "uint16", "splits": splits}
    (tmp_path / "big" / MANIFEST).write_text(json.dumps(manifest))
    result = run_script("-c", BIG, str(tmp_path / "big"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["tokens"] == 10**12
    assert found["MB"] < 100


@settings(max_examples=20)
@given(st.sampled_from([1, 2, 8, 1024]), st.integers(0, 10**12))
def test_a_thousand_devices_share_a_step_of_a_trillion_tokens(world_size: int, start: int) -> None:
    windows = 10**12 // 1024
    mix = WeightedMixture([windows], [1.0], 5)
    orders = [
        TrainSampler(mix, batch_size=1024, micro_batch_size=1, rank=rank, world_size=world_size, start=start, steps=1)
        for rank in range(world_size)
    ]
    dealt = np.concatenate([np.concatenate(parts) for parts in zip(*orders, strict=True)])
    assert np.array_equal(dealt, mix(np.arange(start, start + 1024)))
    assert len(set(dealt.tolist())) == 1024 or start // windows != (start + 1023) // windows
