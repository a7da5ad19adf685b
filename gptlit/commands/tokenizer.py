"""`gptlit tokenizer`: texts -> a `tokenizer.json` with a vocabulary of their own."""

import json
import shlex
from typing import Annotated

import typer

from gptlit.commands.options import Separator, TextKey
from gptlit.commands.prepare import SOURCES
from gptlit.errors import InputError, note, user_path


def tokenizer(
    source: Annotated[list[str], typer.Argument(help=f"One or several of: {SOURCES}")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids: 256 bytes, the end of text, and merges.")],
    out: Annotated[str, typer.Option(help="File to write, for data.tokenizer and `prepare --tokenizer`.")],
    text_key: TextKey = "text",
    separator: Separator = "",
) -> None:
    """Train a byte-level BPE tokenizer, of GPT-2's kind, on texts."""
    from gptlit.data.parsers import ReadOptions, text_or_raise
    from gptlit.data.shard_writer import write_json
    from gptlit.data.sources import open_corpus
    from gptlit.data.tokenizer import train_tokenizer

    path = user_path(out)
    if path.suffix != ".json" or not path.parent.is_dir():
        raise InputError(f"--out {out} must be a .json file in an existing folder")
    if path.exists():
        raise InputError(f"--out {out} exists: name another file, or delete it first")
    corpus = open_corpus(source, ReadOptions(text_key, separator))
    content = train_tokenizer((text_or_raise(piece) for file in corpus.files for piece in file.read()), vocab_size)
    settings = json.loads(content)
    if (found := len(settings["model"]["vocab"])) < vocab_size:
        note(f"the texts give no more than {found:,} ids")
    write_json(path, settings)
    print(f"{path}: {found:,} ids")
    print(f"\nnext: python -m gptlit prepare {shlex.join(source)} --tokenizer {shlex.quote(out)} --out data/own")
