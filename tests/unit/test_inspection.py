"""What is in a folder of tokens."""

from pathlib import Path

import numpy as np
import pytest
from test_prepare import corpus_of

from gptlit.commands import inspect as inspection
from gptlit.commands.inspect import summaries, window_text
from gptlit.data.prepare import prepare
from gptlit.data.splitting import Split
from gptlit.data.token_files import open_folder
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError

GPT2 = load_tokenizer()


def test_documents_are_counted_and_measured_over_the_ends_of_shards(tmp_path: Path) -> None:
    documents = [" tree" * n for n in (3, 10, 1, 7, 25)]  # of as many tokens
    for shard_tokens in (4, 1000):
        folder = tmp_path / f"{shard_tokens}"
        prepare(corpus_of(*documents), folder, GPT2, Split(0.0), shard_tokens=shard_tokens)
        data = open_folder(folder, GPT2)
        summary = summaries(data, GPT2.eot_token)["train"]
        assert (summary.documents, summary.median, summary.longest) == (5, 7, 25)
        assert (summary.tokens, summary.measured) == (46 + 4, 50)
        assert summary.text_bytes == sum(map(len, documents))
        assert window_text(data, "train", GPT2, 3, 3) == "<|endoftext|> tree tree"


def test_only_the_beginning_of_a_very_large_split_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(corpus_of(*[" tree" * 9] * 10), tmp_path / "a", GPT2, Split(0.0), shard_tokens=25)
    monkeypatch.setattr(inspection, "SCAN_LIMIT", 40)
    monkeypatch.setattr(inspection, "SCAN", 7)
    data = open_folder(tmp_path / "a", GPT2)
    summary = summaries(data, GPT2.eot_token)["train"]
    assert (summary.tokens, summary.measured, summary.documents, summary.longest) == (99, 40, 4, 9)


def test_files_of_nanogpt_end_their_documents_with_the_token(tmp_path: Path) -> None:
    ids = np.array([5, 6, 7, 50256, 8, 50256], dtype="<u2")
    ids.tofile(tmp_path / "train.bin")
    data = open_folder(tmp_path, GPT2)
    summary = summaries(data, GPT2.eot_token)["train"]
    assert (summary.documents, summary.longest, summary.text_bytes) == (2, 3, None)


def test_what_cannot_be_inspected_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere has no .bin file"):
        open_folder(Path("nowhere"), GPT2)
    with pytest.raises(InputError, match="has no .bin file with 'train' in its name, and no manifest"):
        open_folder(tmp_path, GPT2)
    prepare(corpus_of("some text"), tmp_path / "a", GPT2, Split(0.0))
    data = open_folder(tmp_path / "a", GPT2)
    with pytest.raises(InputError, match="the val part of .* ends before there: it has 0 tokens"):
        window_text(data, "val", GPT2, 0, 5)
