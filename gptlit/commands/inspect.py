"""`gptlit inspect`: what is in a folder of tokens: counts, document lengths, a window as text."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptlit.commands.options import Json, print_json
from gptlit.errors import InputError, user_path

if TYPE_CHECKING:
    from gptlit.data.token_files import TokenData
    from gptlit.data.tokenizer import Tokenizer

SCAN = 2**24  # ids in memory at once


def inspect(
    folder: Annotated[str, typer.Argument(help="Folder with .bin files, written by `prepare`, nanoGPT or llm.c.")],
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Split to show a window of.")] = "train",
    position: Annotated[int, typer.Option(min=0, help="Start of the window, in tokens.")] = 0,
    length: Annotated[int, typer.Option(min=1, help="Length of the window, in tokens.")] = 100,
    tokenizer: Annotated[str, typer.Option(help="For files that do not name it; gpt2 by default.")] = "",
    dtype: Annotated[Literal["uint16", "uint32"], typer.Option(help="dtype of files without a header.")] = "uint16",
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and check its SHA-256.")] = False,
    json: Json = False,
) -> None:
    """Show what is in a folder of tokens."""
    from gptlit.data.token_files import SPLITS, open_tokens, prepared_tokenizer_spec
    from gptlit.data.tokenizer import load_tokenizer

    path = user_path(folder)
    if not path.is_dir():
        raise InputError(f"{folder} is no folder of tokens")
    encoding = load_tokenizer(tokenizer or prepared_tokenizer_spec(path) or "gpt2")
    data = open_tokens(path, encoding, dtype)
    if verify and not data.manifest:
        raise InputError(f"{folder} has no manifest.json, there are no hashes to verify")
    if verify:
        data.verify()
    splits = {name: summarize(data, name, encoding.eot_token) for name in SPLITS if data.tokens(name)}
    text = window_text(data, split, encoding, position, length)
    if json:
        values = {"tokenizer": encoding.name, "fingerprint": data.fingerprint, "verified": verify, "splits": splits}
        print_json({**values, "window": text})
        return
    print(f"{folder}: tokenizer {encoding.name}, {encoding.n_vocab:,} ids, fingerprint {data.fingerprint[:12]}\n")
    print(f"{'':8}{'documents':>14}{'tokens':>18}{'text bytes':>18}{'median':>10}{'longest':>12}{'shards':>8}")
    for name, found in splits.items():
        size = f"{found['text_bytes']:,}" if found["text_bytes"] is not None else "unknown"
        print(f"{name:8}{found['documents']:>14,}{found['tokens']:>18,}{size:>18}", end="")
        print(f"{found['median']:>10,}{found['longest']:>12,}{found['shards']:>8,}")
    if verify:
        print("\nverified: the SHA-256 of every shard")
    print(f"\n{split}, tokens {position:,} to {position + length:,}:\n{text}")


def summarize(data: "TokenData", split: str, eot_token: int) -> dict[str, Any]:
    """Count the documents of a split, and measure them in tokens. `text_bytes` is None where no manifest stores it."""
    import numpy as np

    tokens = data.tokens(split)
    ends, offset = [], 0  # positions of end-of-text tokens: a document may span shards
    for shard in data.shards(split):
        for start in range(0, shard.tokens, SCAN):
            ends.append(offset + start + np.flatnonzero(shard.ids[start : start + SCAN] == eot_token))
        offset += shard.tokens
    lengths = np.diff(np.concatenate([*ends, [tokens]]), prepend=-1) - 1
    lengths = lengths[lengths > 0]
    return {
        "tokens": tokens,
        "shards": len(data.shards(split)),
        "documents": len(lengths),
        "median": int(np.median(lengths)) if len(lengths) else 0,
        "longest": int(lengths.max(initial=0)),
        "text_bytes": data.manifest.get("splits", {}).get(split, {}).get("bytes"),
    }


def window_text(data: "TokenData", split: str, tokenizer: "Tokenizer", position: int, length: int) -> str:
    """Return the text of `length` ids from a position of a split.

    Raises:
        InputError: The split ends before it.
    """
    ids: list[int] = []
    for shard in data.shards(split):
        ids += shard.ids[position : position + length - len(ids)].tolist()
        position = max(0, position - shard.tokens)
        if len(ids) == length:
            break
    if not ids:
        raise InputError(f"the {split} part of {data.folder} ends before there: it has {data.tokens(split)} tokens")
    return tokenizer.decode(ids)
