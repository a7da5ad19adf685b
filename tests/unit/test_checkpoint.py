"""Checkpoints: whole or absent, safe to read, and the newest good one is found."""

import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlit.checkpoint.io import DurableCheckpointIO, load_plain, read_checkpoint
from gptlit.checkpoint.runs import (
    checkpoint_path,
    checkpoints,
    find_checkpoint,
    new_run_folder,
    newest_checkpoint,
    run_folders,
)
from gptlit.errors import InputError

PLAIN = {"state_dict": {"model.a": torch.arange(3)}, "hyper_parameters": {"config": {"n_layers": 1}}, "global_step": 7}


def save(path: Path) -> Path:
    DurableCheckpointIO().save_checkpoint(PLAIN, path)
    return path


def test_a_round_trip_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = save(tmp_path / "deep" / "a.ckpt")
    assert torch.equal(read_checkpoint(path)["state_dict"]["model.a"], torch.arange(3))
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.ckpt")
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        InputError, match=r"a.ckpt cannot be written \(No space left on device\): [\d,]+ MB are free in"
    ):
        save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'nowhere\.ckpt' does not exist"):
        read_checkpoint(Path("nowhere.ckpt"))
    truncated = save(tmp_path / "t.ckpt")
    truncated.write_bytes(truncated.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"t\.ckpt is damaged, truncated or no checkpoint"):
        read_checkpoint(truncated)
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(InputError, match=r"z\.ckpt is damaged, truncated or no checkpoint"):
        read_checkpoint(tmp_path / "z.ckpt")
    torch.save({"weights": 1}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert load_plain(tmp_path / "old.ckpt") == {"weights": 1}
    torch.save({"weights": 1}, tmp_path / "k.ckpt")
    with pytest.raises(InputError, match=r"k\.ckpt is a checkpoint of another kind"):
        read_checkpoint(tmp_path / "k.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=r"m\.ckpt is a checkpoint of another kind"):
        read_checkpoint(tmp_path / "m.ckpt")


def is_same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same types, keys and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("flips", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_no_flipped_bit_changes_what_is_loaded(tmp_path: Path, flips: int) -> None:
    """Torch's zip: local headers, pickle, alignment padding, tensor data, data descriptors, directory, end records.

    What CRC-32 does not cover (headers, padding) is either redundant or makes the load fail.
    """
    layer = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"state_dict": layer.state_dict(), "optimizer_states": [optimizer.state_dict()], "loss": 1.5}
    path = tmp_path / "a.ckpt"
    DurableCheckpointIO().save_checkpoint({**PLAIN, **state}, path)
    content, expected = path.read_bytes(), torch.load(path, weights_only=True)
    with zipfile.ZipFile(path) as file:
        starts = [info.header_offset for info in file.infolist()] + [file.start_dir]
    ends = [*starts[1:], len(content)]
    rng = random.Random(0)
    refused = 0
    for start, end in zip(starts, ends, strict=True):  # each record, and the directory
        for _ in range(flips):
            position = rng.randrange(start, min(end, start + 80) if rng.random() < 0.3 else end)
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                loaded = read_checkpoint(path)
            except InputError:
                refused += 1
            else:
                assert is_same(loaded, expected), position
    assert 0 < refused < flips * len(starts)


class Malicious:
    def __reduce__(self) -> object:
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    torch.save({**PLAIN, "extra": Malicious()}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="holds more than tensors and plain values: it is not opened"):
        read_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError):
        read_checkpoint(tmp_path / "b.ckpt")
    assert not Path("executed").exists()


def test_the_newest_that_loads_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "name" / "version_10"
    assert newest_checkpoint(run) is None
    for step in (90, 100, 1000):
        save(checkpoint_path(run, step))
    assert newest_checkpoint(run)[0] == checkpoint_path(run, 1000)  # type: ignore[index]
    content = checkpoint_path(run, 1000).read_bytes()
    place = content.index(torch.arange(3).numpy().tobytes())
    checkpoint_path(run, 1000).write_bytes(content[:place] + b"\1" + content[place + 1 :])
    assert newest_checkpoint(run)[0] == checkpoint_path(run, 100)  # type: ignore[index]
    assert "step-00001000.ckpt is damaged" in capsys.readouterr().err
    for path in checkpoints(run):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 3 checkpoints"):
        newest_checkpoint(run)


def test_runs_are_numbered_not_spelt(tmp_path: Path) -> None:
    for version in (2, 10, 9):
        save(checkpoint_path(tmp_path / "name" / f"version_{version}", 5))
    assert [folder.name for folder in run_folders(tmp_path, "name")] == ["version_2", "version_9", "version_10"]
    assert new_run_folder(tmp_path, "name").name == "version_11"
    assert find_checkpoint(tmp_path / "name")[0].parent.parent.name == "version_10"
    assert find_checkpoint(tmp_path / "name" / "version_2")[0].parent.parent.name == "version_2"
    with pytest.raises(InputError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
