"""What is in a folder of tokens: counts, the lengths of its documents, a window as text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gptlit.data.token_files import SPLITS, TokenData
from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError

SCAN = 2**24  # ids looked at at once


SCAN_LIMIT = 2**30  # ids of a split in which documents are measured


@dataclass(frozen=True)
class SplitSummary:
    """A split in numbers.

    Args:
        tokens: In all shards.
        shards: Files.
        documents: Between end-of-text tokens; among the first `measured` tokens.
        median: Tokens of a document.
        longest: Tokens of the longest one.
        text_bytes: Of the text they were made of; None where the files do not say.
        measured: Tokens that were looked at for documents.
    """

    tokens: int
    shards: int
    documents: int
    median: int
    longest: int
    text_bytes: int | None
    measured: int


def summarize(data: TokenData, split: str, end: int) -> SplitSummary:
    """Count the documents of a split and measure them; `end` is the end-of-text token."""
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *_lengths(data, split, end)])
    manifest = data.manifest.get("splits", {}).get(split, {})
    tokens = data.tokens(split)
    return SplitSummary(
        tokens=tokens,
        shards=len(data.shards(split)),
        documents=len(lengths),
        median=int(np.median(lengths)) if len(lengths) else 0,
        longest=int(lengths.max(initial=0)),
        text_bytes=manifest.get("bytes"),
        measured=min(tokens, SCAN_LIMIT),
    )


def _lengths(data: TokenData, split: str, end: int) -> Iterator[np.ndarray]:
    """Yield the lengths of documents; one may go on over the end of a shard."""
    open_length, left = 0, SCAN_LIMIT
    for shard in data.shards(split):
        for start in range(0, min(shard.tokens, left), SCAN):
            ids = shard.ids[start : min(start + SCAN, left)]
            ends = np.flatnonzero(ids == end)
            if len(ends):
                lengths = np.diff(ends, prepend=-1) - 1
                lengths[0] += open_length
                yield lengths[lengths > 0]
                open_length = len(ids) - 1 - int(ends[-1])
            else:
                open_length += len(ids)
        left = max(0, left - shard.tokens)
    if open_length:
        yield np.array([open_length])


def window_text(data: TokenData, split: str, tokenizer: Tokenizer, position: int, length: int) -> str:
    """Return the text of `length` ids from a position of a split.

    Raises:
        InputError: The split ends before it.
    """
    ids: list[int] = []
    for shard in data.shards(split):
        if position < shard.tokens:
            ids += shard.ids[position : position + length - len(ids)].tolist()
        position = max(0, position - shard.tokens)
        if len(ids) == length:
            break
    if not ids:
        raise InputError(f"the {split} part of {data.folder} ends before there: it has {data.tokens(split)} tokens")
    return tokenizer.decode(ids)


def summaries(data: TokenData, end: int) -> dict[str, SplitSummary]:
    """Return every split that has tokens."""
    return {name: summarize(data, name, end) for name in SPLITS if data.tokens(name)}
