"""`gptlit import`: another project's weights -> a checkpoint."""

from typing import Annotated

import typer

from gptlit.errors import InputError, shell_quote, user_path

SOURCES = "A Hugging Face folder, hf:NAME on its hub, the book's .pth, or nanoGPT's ckpt.pt."


def import_weights(
    source: Annotated[str, typer.Argument(help=SOURCES)],
    out: Annotated[str, typer.Option(help="The .ckpt file to write; it must not exist.")],
    n_heads: Annotated[
        int | None, typer.Option(help="For the book's .pth, which does not store it; by default heads of size 64.")
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="The tokenizer of the weights, where they do not store it: name of a tiktoken encoding, or path of a "
            "Hugging Face tokenizer.json."
        ),
    ] = "",
) -> None:
    """Convert another project's weights into a checkpoint."""
    path = user_path(out)
    if path.suffix != ".ckpt":
        raise InputError(f"--out {out!r} must end in .ckpt")
    if path.exists():
        raise InputError(f"--out {out!r} exists: name a new file")
    from gptlit.checkpoint.export import save_checkpoint
    from gptlit.checkpoint.pretrained import read_weights

    found = read_weights(source, n_heads)
    if tokenizer:
        found.tokenizer = tokenizer
        if found.load_tokenizer().n_vocab > found.config.vocab_size:
            raise InputError(
                f"--tokenizer {tokenizer} has {found.load_tokenizer().n_vocab} ids, but {source} has a vocabulary of "
                f"{found.config.vocab_size}: name the one that it was trained with"
            )
    save_checkpoint(found, path)
    print(f"{path}: {found.config.summary}, vocabulary {found.config.vocab_size:,}")
    print(f"next: python -m gptlit fit --config finetune --model.init_from {shell_quote(out)} --data.source FILE.txt")
