"""Statistics of a folder of tokens."""

from pathlib import Path

import numpy as np
import pytest
from test_prepare import corpus_of

from gptlit.commands import inspect as inspection
from gptlit.commands.inspect import summarize, window_text
from gptlit.data.prepare import prepare
from gptlit.data.splitting import Split
from gptlit.data.token_files import open_tokens
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError

GPT2 = load_tokenizer()


@pytest.mark.parametrize("shard_tokens", [4, 1000])
@pytest.mark.parametrize("scan", [3, 1000])
def test_documents_are_measured_across_shards(
    shard_tokens: int, scan: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "SCAN", scan)
    documents = [" tree" * n for n in (3, 10, 1, 7, 25)]  # of as many tokens
    prepare(corpus_of(*documents), tmp_path / "a", GPT2, Split(0.0), shard_tokens=shard_tokens)
    data = open_tokens(tmp_path / "a", GPT2)
    found = summarize(data, "train", GPT2.eot_token)
    assert (found["documents"], found["median"], found["longest"]) == (5, 7, 25)
    assert (found["tokens"], found["text_bytes"]) == (46 + 4, sum(map(len, documents)))
    assert window_text(data, "train", GPT2, 3, 3) == "<|endoftext|> tree tree"
    with pytest.raises(InputError, match="the val part of .* ends before there: it has 0 tokens"):
        window_text(data, "val", GPT2, 0, 5)


def test_files_of_nanogpt_end_their_documents_with_the_token(tmp_path: Path) -> None:
    ids = np.array([5, 6, 7, 50256, 8, 50256], dtype="<u2")
    ids.tofile(tmp_path / "train.bin")
    found = summarize(open_tokens(tmp_path, GPT2), "train", GPT2.eot_token)
    assert (found["documents"], found["longest"], found["text_bytes"]) == (2, 3, None)
