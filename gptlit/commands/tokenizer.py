"""`gptlit tokenizer`: texts -> a `tokenizer.json` with a vocabulary of their own."""

import json
from typing import Annotated

import typer

from gptlit.commands.options import Separator, TextKey
from gptlit.commands.prepare import SOURCES
from gptlit.errors import InputError, needs, shell_quote, user_path


def tokenizer(
    source: Annotated[list[str], typer.Argument(help=f"One or several of: {SOURCES}")],
    vocab_size: Annotated[int, typer.Option(help="Most ids: 256 bytes, the end of text, and merges.")],
    out: Annotated[str, typer.Option(help="File to write, for data.tokenizer and `prepare --tokenizer`.")],
    text_key: TextKey = "text",
    separator: Separator = "",
) -> None:
    """Train a byte-level BPE tokenizer, of GPT-2's kind, on texts."""
    from gptlit.data.parsers import ReadOptions, text_or_raise
    from gptlit.data.shard_writer import write_json
    from gptlit.data.sources import open_corpus
    from gptlit.data.tokenizer import END_TOKENS, without_surrogates

    with needs("tokenizers", "training a tokenizer"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    path = user_path(out)
    if path.suffix != ".json" or not path.parent.is_dir():
        raise InputError(f"--out {out} must be a .json file in an existing folder")
    if path.exists():
        raise InputError(f"--out {out} exists: name another file, or delete it first")
    if vocab_size < 257:
        raise InputError(f"--vocab_size must be at least 257 (256 bytes and the end of text), got {vocab_size}")
    corpus = open_corpus(source, ReadOptions(text_key, separator))
    texts = (without_surrogates(text_or_raise(piece)) for file in corpus.files for piece in file.read())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_TOKENS[0]], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    write_json(path, json.loads(bpe.to_str()))
    print(f"{path}: {bpe.get_vocab_size():,} ids")
    options = ["--text_key", text_key] * (text_key != "text") + ["--separator", separator] * bool(separator)
    command = shell_quote(*source, *options, "--tokenizer", out, "--out", "data/own")
    print(f"\nnext: python -m gptlit prepare {command}")
