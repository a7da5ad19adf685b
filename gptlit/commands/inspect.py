"""`gptlit inspect`: what is in a folder of tokens: counts, document lengths, a window as text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gptlit.commands.options import Json, print_json
from gptlit.errors import InputError, user_path

if TYPE_CHECKING:
    import numpy as np

    from gptlit.data.token_files import TokenData
    from gptlit.data.tokenizer import Tokenizer

SCAN = 2**24  # ids in memory at once
SCAN_LIMIT = 2**30  # ids of a split in which documents are measured


def inspect(
    folder: Annotated[str, typer.Argument(help="Folder with .bin files, written by `prepare`, nanoGPT or llm.c.")],
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Split to show a window of.")] = "train",
    position: Annotated[int, typer.Option(help="Start of the window, in tokens.")] = 0,
    length: Annotated[int, typer.Option(help="Length of the window, in tokens.")] = 100,
    tokenizer: Annotated[str, typer.Option(help="For files that do not name it; gpt2 by default.")] = "",
    dtype: Annotated[Literal["uint16", "uint32"], typer.Option(help="dtype of files without a header.")] = "uint16",
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and check its SHA-256.")] = False,
    json: Json = False,
) -> None:
    """Show what is in a folder of tokens."""
    from gptlit.data.token_files import folder_tokenizer, open_folder
    from gptlit.data.tokenizer import load_tokenizer

    if position < 0 or length < 1:
        raise InputError(f"position {position} and length {length}: at least 0 and 1 are needed")
    path = user_path(folder)
    if not path.is_dir():
        raise InputError(f"{folder} is no folder of tokens")
    encoding = load_tokenizer(tokenizer or folder_tokenizer(path) or "gpt2")
    data = open_folder(path, encoding, dtype)
    if verify:
        _verify(data)
    found = summaries(data, encoding.eot_token)
    text = window_text(data, split, encoding, position, length)
    if json:
        splits = {name: asdict(summary) for name, summary in found.items()}
        values = {"tokenizer": encoding.name, "fingerprint": data.fingerprint, "verified": verify, "splits": splits}
        print_json({**values, "window": text})
        return
    print(f"{folder}: tokenizer {encoding.name}, {encoding.n_vocab:,} ids, fingerprint {data.fingerprint[:12]}")
    _print_table(found)
    if verify:
        shards = sum(summary.shards for summary in found.values())
        print(f"\nverified: the SHA-256 of {shards:,} shard{'s' * (shards != 1)}")
    print(f"\n{split}, tokens {position:,} to {position + length:,}:\n{text}")


def _verify(data: "TokenData") -> None:
    if not data.manifest:
        raise InputError(f"{data.folder} has no manifest.json, there are no hashes to verify")
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=sum(map(data.tokens, data.splits)))
        data.verify(lambda shard: progress.update(task, advance=shard.tokens))


def _print_table(found: "dict[str, SplitSummary]") -> None:
    print(f"\n{'':8}{'documents':>14}{'tokens':>18}{'text bytes':>18}{'median':>10}{'longest':>12}{'shards':>8}")
    for name, summary in found.items():
        size = f"{summary.text_bytes:,}" if summary.text_bytes is not None else "unknown"
        print(f"{name:8}{summary.documents:>14,}{summary.tokens:>18,}{size:>18}", end="")
        print(f"{summary.median:>10,}{summary.longest:>12,}{summary.shards:>8,}")
        if summary.measured < summary.tokens:
            print(f"{'':8}(documents counted and measured in the first {summary.measured:,} tokens)")


@dataclass(frozen=True)
class SplitSummary:
    """Statistics of a split.

    Args:
        tokens: In all shards.
        shards: Number of files.
        documents: Number of documents among the first `measured` tokens.
        median: Median document length, in tokens.
        longest: Longest document, in tokens.
        text_bytes: Size of the text before tokenization; None where the files do not store it.
        measured: Tokens that were searched for documents.
    """

    tokens: int
    shards: int
    documents: int
    median: int
    longest: int
    text_bytes: int | None
    measured: int


def summarize(data: "TokenData", split: str, end: int) -> SplitSummary:
    """Count the documents of a split and measure them; `end` is the end-of-text token."""
    import numpy as np

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


def _lengths(data: "TokenData", split: str, end: int) -> "Iterator[np.ndarray]":
    """Yield the lengths of documents, which may span shards."""
    import numpy as np

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


def window_text(data: "TokenData", split: str, tokenizer: "Tokenizer", position: int, length: int) -> str:
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


def summaries(data: "TokenData", end: int) -> dict[str, SplitSummary]:
    """Summarize every split that has tokens."""
    from gptlit.data.token_files import SPLITS

    return {name: summarize(data, name, end) for name in SPLITS if data.tokens(name)}
