"""Folders of token files: which they are, which part a file belongs to, which vocabulary made them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlit import TokenDataModule
from gptlit.data.prepare import prepare
from gptlit.data.sources import open_corpus
from gptlit.data.splitting import Split
from gptlit.data.token_files import MANIFEST, check_vocabulary, holds_tokens, open_foreign
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError


def write(path: Path, ids: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    np.asarray(ids, dtype="<u2").tofile(path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train", "train"),
        ("val", "val"),
        ("validation", "val"),
        ("test", "test"),
        ("train-00000", "train"),
        ("train07", "train"),
        ("fineweb_train_000001", "train"),
        ("tiny_shakespeare_val", "val"),
        ("test_train_000001", "train"),
        ("data.train", "train"),
        ("constraint", None),
        ("constraint_val_0", "val"),
        ("evaluation", None),
        ("latest", None),
        ("pytorch_model", None),
        ("training_args", None),
        ("interval-3", None),
    ],
)
def test_a_part_is_a_word_of_the_files_name(tmp_path: Path, name: str, part: str | None) -> None:
    write(tmp_path / f"{name}.bin", range(10))
    assert holds_tokens(tmp_path) == (part is not None)
    if part is not None:
        assert {split for split, shards in open_foreign(tmp_path).splits.items() if shards} == {part}


def test_a_folder_of_texts_with_other_files_is_one_of_texts(tmp_path: Path, text: str) -> None:
    (tmp_path / "words.txt").write_text(text)
    write(tmp_path / "constraint.bin", range(10))
    (tmp_path / MANIFEST).write_text('{"icons": []}')  # a web page's
    datamodule = TokenDataModule(str(tmp_path), context_length=16, cache_dir="cache")
    datamodule.setup()
    prepared = prepare(open_corpus(str(tmp_path)), Path("out"), load_tokenizer(), Split(0.05))
    assert datamodule.run_data.on_disk.fingerprint == prepared.fingerprint


def test_a_vocabulary_of_its_own_is_noticed(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    write(tmp_path / "train.bin", draw.integers(0, 65, 1000))
    check_vocabulary(open_foreign(tmp_path), 65)
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    with pytest.raises(InputError, match=r"no id above 64 .* set data\.tokenizer .* or prepare the text itself"):
        TokenDataModule(str(tmp_path), context_length=16).setup()
    write(tmp_path / "train.bin", draw.integers(0, 50257, 1000))
    check_vocabulary(open_foreign(tmp_path), 50257)


@pytest.mark.skipif(os.name != "posix", reason="names are text there")
def test_names_that_are_not_utf8_are_read_in_a_folder_and_refused_alone(tmp_path: Path) -> None:
    Path(os.fsdecode(b"caf\xe9.txt")).write_text("some words")
    assert list(open_corpus("caf*.txt").documents()) == list(open_corpus(".").documents()) == ["some words"]
    write(tmp_path / "tokens" / os.fsdecode(b"train_caf\xe9.bin"), range(10))
    assert open_foreign(tmp_path / "tokens").tokens("train") == 10
    with pytest.raises(InputError, match=r"'caf\\udce9.txt' cannot be used .*: rename it"):
        open_corpus(os.fsdecode(b"caf\xe9.txt"))
