"""TokenDataModule: without a Trainer, and what it refuses. What it does in a fit is in test_training.py."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from gptlit import GPTConfig, GPTModule, TokenDataModule
from gptlit.data import token_files as tokens
from gptlit.data.compatibility import check_position
from gptlit.data.prepare import prepare
from gptlit.data.run_sources import WeightedSource
from gptlit.data.sources import open_corpus
from gptlit.data.splitting import Split
from gptlit.data.token_files import MANIFEST, SPLITS
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError


def fit(datamodule: TokenDataModule, config: GPTConfig | None = None, **trainer: Any) -> pl.Trainer:
    """Fit a tiny model in this process."""
    tiny = GPTConfig(context_length=16, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)
    options = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **trainer}
    trainer_ = pl.Trainer(accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, **options)
    trainer_.fit(GPTModule(config or tiny), datamodule)
    return trainer_


def test_batches_without_a_trainer(text_file: Path) -> None:
    datamodule = TokenDataModule(str(text_file), context_length=32, batch_size=3, val_fraction=0.2)
    datamodule.prepare_data()
    datamodule.setup()
    batches = list(datamodule.val_dataloader())
    inputs, targets = batches[0]
    assert inputs.shape == targets.shape == (3, 32)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = text_file.read_text()
    assert text[int(len(text) * 0.8) :].startswith(datamodule.tokenizer.decode(inputs[0].tolist()))
    seen = sum(int((targets >= 0).any(dim=1).sum()) for _, targets in batches)
    assert seen == len(datamodule.run_data.splits["val"]) > 3


def test_workers_serve_the_same_batches(text_file: Path) -> None:
    served = []
    for num_workers in (0, 2):
        datamodule = TokenDataModule(
            str(text_file), context_length=16, batch_size=4, val_fraction=0.2, num_workers=num_workers
        )
        datamodule.setup()
        served.append(torch.cat([inputs for inputs, _ in datamodule.val_dataloader()]))
    assert torch.equal(*served)


def test_training_serves_every_window_once_a_pass(text_file: Path) -> None:
    datamodule = TokenDataModule(str(text_file), batch_size=4, micro_batch_size=2)
    trainer = fit(datamodule, max_epochs=2, max_steps=-1)
    windows = len(datamodule.run_data.splits["train"])
    assert trainer.global_step == -(-2 * windows // 4)
    served = np.concatenate(list(datamodule.train_dataloader().sampler))
    assert sorted(served[:windows].tolist()) == list(range(windows))
    assert trainer.accumulate_grad_batches == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "data.batch_size must be a positive integer, got 0"),
        ({"micro_batch_size": -1}, "data.micro_batch_size must be a positive integer, got -1"),
        ({"stride": 0}, "data.stride must be a positive integer, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"val_fraction": 1.0}, "val_fraction 1.0 and test_fraction 0.0 must be at least 0, and their"),
        ({"tokenizer": "nope"}, "no tokenizer is named 'nope'"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenDataModule("python-docs", **arguments)


@pytest.mark.parametrize(("most", "used"), [(4, 3), (3, 3), (6, 6), (7, 6), (None, 6), (1, 1)])
def test_a_micro_batch_is_the_largest_that_fits_evenly(text_file: Path, most: int | None, used: int) -> None:
    data = TokenDataModule(str(text_file), batch_size=6, micro_batch_size=most)
    trainer = fit(data, max_steps=1)
    assert (data.micro_batch_size_used, trainer.accumulate_grad_batches) == (used, 6 // used)


@pytest.mark.parametrize(
    ("arguments", "trainer", "words"),
    [
        ({"context_length": 8}, {}, "data.context_length 8 contradicts model.config.context_length 16"),
        ({}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches 2 cannot be set"),
        ({}, {"limit_train_batches": 5}, "trainer.limit_train_batches 5 cannot be used here"),
        ({}, {"max_steps": -1, "max_epochs": -1}, "a run needs an end"),
    ],
)
def test_what_does_not_fit_together_is_named(
    text_file: Path, arguments: dict[str, Any], trainer: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        fit(TokenDataModule(str(text_file), **{"batch_size": 4, **arguments}), **trainer)


def test_another_vocabulary_is_named(text_file: Path) -> None:
    with pytest.raises(InputError, match="vocab_size 99 contradicts the tokenizer 'gpt2' with 50257 ids"):
        fit(
            TokenDataModule(str(text_file)),
            GPTConfig(vocab_size=99, context_length=16, emb_dim=16, n_heads=2, n_layers=1),
        )


@pytest.mark.parametrize(("words", "split"), [(5, "train"), (40, "val")])
def test_a_text_too_short_for_one_window_is_named(tmp_path: Path, words: int, split: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text("word " * words)
    with pytest.raises(InputError, match=f"the {split} part of .* too short for one window of 16 \\+ 1"):
        fit(TokenDataModule(str(path), batch_size=1))


def write_nanogpt(folder: Path, ids: np.ndarray) -> None:
    """Write files as nanoGPT's prepare.py does: raw uint16, no header."""
    folder.mkdir()
    for name, part in (("train", ids[:900]), ("val", ids[900:])):
        (folder / f"{name}.bin").write_bytes(b"".join(int(i).to_bytes(2, "little") for i in part))
    (folder / "meta.pkl").write_bytes(b"never opened")


def write_llmc(folder: Path, ids: np.ndarray) -> None:
    """Write files as llm.c does: 256 int32 of header, then uint16."""
    folder.mkdir()
    for name, part in (("x_train_000001", ids[:500]), ("x_train_000002", ids[500:900]), ("x_val_000000", ids[900:])):
        header = [20240520, 1, len(part), *[0] * 253]
        numbers = b"".join(n.to_bytes(4, "little") for n in header)
        (folder / f"{name}.bin").write_bytes(numbers + b"".join(int(i).to_bytes(2, "little") for i in part))


@pytest.mark.parametrize("write", [write_nanogpt, write_llmc])
def test_token_files_of_others_are_trained_on_in_place(tmp_path: Path, write: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 50257, 1200)
    write(tmp_path / "tokens", ids)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    datamodule = TokenDataModule(str(tmp_path / "tokens"), batch_size=4)
    assert fit(datamodule).global_step == 2
    assert datamodule.run_data.on_disk.tokens("train") == 900
    assert datamodule.run_data.splits["val"][np.array([0])][0][0].tolist() == ids[900:916].tolist()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()} == before


def test_a_prepared_folder_is_a_source(text_file: Path) -> None:
    first = TokenDataModule(str(text_file), context_length=16, val_fraction=0.1)
    first.setup()
    second = TokenDataModule(str(first.run_data.on_disk.folder), context_length=16)
    second.setup()
    assert second.run_data.on_disk.fingerprint == first.run_data.on_disk.fingerprint
    manifest = first.run_data.on_disk.folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "f'))
    with pytest.raises(InputError, match="tokenizer 'gpt2' contradicts .*, which 'gpt2' made: leave"):
        TokenDataModule(str(first.run_data.on_disk.folder), context_length=16).setup()


def test_damaged_token_files_of_others_are_named(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50257, 1200)
    write_llmc(tmp_path / "cut", ids)
    path = tmp_path / "cut" / "x_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        InputError, match=r"x_train_000002.bin has 1822 bytes, its header \(version 1\) says 1824: it is truncated"
    ):
        fit(TokenDataModule(str(tmp_path / "cut")))
    write_llmc(tmp_path / "new", ids)
    path = tmp_path / "new" / "x_train_000001.bin"
    path.write_bytes(path.read_bytes()[:4] + b"\x07" + path.read_bytes()[5:])
    with pytest.raises(InputError, match=r"header \(version 7\) says .* or not of version 1"):
        fit(TokenDataModule(str(tmp_path / "new")))
    write_nanogpt(tmp_path / "odd", ids)
    (tmp_path / "odd" / "train.bin").write_bytes(b"x" * 2001)
    with pytest.raises(InputError, match="train.bin has 2001 bytes, no multiple of the 2 of uint16"):
        fit(TokenDataModule(str(tmp_path / "odd")))
    write_nanogpt(tmp_path / "wide", np.full(1200, 60000))
    with pytest.raises(InputError, match="train.bin has the id 60000, outside the vocabulary of 50257"):
        fit(TokenDataModule(str(tmp_path / "wide")))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "other.bin").touch()
    with pytest.raises(InputError, match="has no .bin file with 'train' in its name"):
        fit(TokenDataModule(str(tmp_path / "none")))


def test_separate_sources_validate_and_test(tmp_path: Path) -> None:
    for name, word in (("a", " tree"), ("b", " river"), ("c", " winter")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": word * 100}) + "\n")
    datamodule = TokenDataModule(
        "a.jsonl", val_source="b.jsonl", test_source="c.jsonl", text_key="body", context_length=16, batch_size=2
    )
    datamodule.setup("test")
    texts = [
        datamodule.tokenizer.decode(datamodule.run_data.splits[name][np.array([0])][0][0].tolist()) for name in SPLITS
    ]
    assert texts == [" tree" * 16, " river" * 16, " winter" * 16]
    prepared = TokenDataModule(
        str(datamodule.run_data.on_disk.folder), val_source="b.jsonl", text_key="body", context_length=16, batch_size=2
    )
    prepared.setup()
    assert prepared.run_data.on_disk.tokens("val") == 100
    both = [WeightedSource("a.jsonl"), WeightedSource("c.jsonl")]
    mixed = TokenDataModule(both, val_source="b.jsonl", text_key="body", context_length=16)
    mixed.setup()
    assert mixed.run_data.on_disk.tokens("val") == 100  # once, not once for each


def test_several_corpora_are_mixed_by_weight(tmp_path: Path) -> None:
    for name, word in (("trees", " tree"), ("rivers", " river")):
        (tmp_path / f"{name}.txt").write_text(word * 2000)
    sources = [WeightedSource("trees.txt", 3.0), WeightedSource("rivers.txt", 1.0)]
    datamodule = TokenDataModule(sources, batch_size=16, seed=1, val_fraction=0.1)
    trainer = fit(datamodule, max_steps=50)
    tree = datamodule.tokenizer.encode_ordinary(" tree")[0]
    served = np.concatenate(list(datamodule.train_dataloader().sampler))
    starts = datamodule.run_data.splits["train"][served][0][:, 0]
    assert int((starts == tree).sum()) == pytest.approx(600, abs=60)
    assert len(datamodule.run_data.splits["val"]) == 2 * (200 // 16)
    state = datamodule.state_dict()
    torch.save(state, tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["source"][0] == {"path": "trees.txt", "weight": 3.0}
    other = TokenDataModule([WeightedSource("trees.txt", 1.0), sources[1]], batch_size=16, seed=1, val_fraction=0.1)
    fit(other, max_steps=1)
    with pytest.raises(InputError, match=r"the list of weights is \[1.0, 1.0\], but the checkpoint .* \[3.0, 1.0\]"):
        other.load_state_dict({**state, "corpus": other.run_data.on_disk.fingerprint})
    assert trainer.global_step == 50


def test_a_corpus_of_a_mix_that_is_too_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 500)
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(InputError, match="the train part of 'b.txt' is too short for one window of 16"):
        fit(TokenDataModule([WeightedSource("a.txt"), WeightedSource("b.txt")], batch_size=2))
    with pytest.raises(InputError, match="the weight -1.0 in data.source must be a positive number"):
        fit(TokenDataModule([WeightedSource("a.txt"), WeightedSource("a.txt", -1.0)], batch_size=2))
    with pytest.raises(ValueError, match="data.source is empty"):
        TokenDataModule([])


def test_the_tokenizer_of_a_prepared_folder_comes_by_itself(tmp_path: Path, text: str, tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    (tmp_path / "a.txt").write_text(text)
    folder = prepare(open_corpus("a.txt"), tmp_path / "out", tokenizer, Split(0.1)).folder
    datamodule = TokenDataModule(str(folder), batch_size=2)
    assert datamodule.vocab_size == tokenizer.n_vocab
    config = GPTConfig(tokenizer.n_vocab, 16, 16, 2, 1, 0.0)
    fit(datamodule, config)
    assert load_tokenizer(datamodule.state_dict()["tokenizer"]).n_vocab == tokenizer.n_vocab
    inputs, _ = datamodule.run_data.splits["train"][np.array([0])]
    assert text.startswith(datamodule.tokenizer.decode(inputs[0].tolist()))


def test_an_id_outside_the_vocabulary_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file too large to be looked through before the run."""
    monkeypatch.setattr(tokens, "SAMPLE", 2)
    ids = np.zeros(1000, dtype="<u2")
    ids[500] = 60000
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(InputError, match=r"train.bin has the id 60000 in the window at 496"):
        fit(TokenDataModule(str(tmp_path), batch_size=2, val_fraction=0.0), max_steps=-1, max_epochs=1)


def test_a_test_part_is_needed_to_test(text_file: Path) -> None:
    datamodule = TokenDataModule(str(text_file), context_length=16)
    with pytest.raises(InputError, match="a larger data.test_fraction"):
        datamodule.setup("test")


def test_without_a_stage_there_must_be_windows_too(text_file: Path) -> None:
    with pytest.raises(InputError, match="the val part of .* is too short"):
        TokenDataModule(str(text_file), context_length=500).setup()


def test_another_text_to_validate_on_is_another_corpus(text: str) -> None:
    for name in "abc":
        Path(f"{name}.txt").write_text(f"{name} {text}")
    told_apart = set()
    for val in "bc":
        data = TokenDataModule("a.txt", context_length=8, val_source=f"{val}.txt")
        data.setup()
        told_apart.add(data.run_data.identity["held_out"])
    assert len(told_apart) == 2
    then = {**data.run_data.identity, "held_out": "another"}
    with pytest.raises(InputError, match=r"the corpus is .* set data.resume_despite to \[corpus\]"):
        check_position({**then, "windows": 0}, data.run_data.identity, {"corpus": "a.txt"}, [])
    check_position({**then, "windows": 0}, data.run_data.identity, {"corpus": "a.txt"}, ["corpus"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_cpu_beside_a_gpu_pins_nothing(text: str, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Path("a.txt").write_text(text)
    data = TokenDataModule("a.txt", context_length=8, num_workers=num_workers)
    data.trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False)
    data.setup()
    assert not data.run_data.pin_memory
    assert not data.train_dataloader().pin_memory
