"""`gptlit export`: a checkpoint -> another project's format."""

from typing import Annotated, Literal

import typer

from gptlit.commands.options import Checkpoint
from gptlit.errors import user_path


def export(
    checkpoint: Checkpoint,
    out: Annotated[str, typer.Option(help="The folder to write; it must not exist, or be empty.")],
    to: Annotated[Literal["huggingface", "book"], typer.Option(help="The format.")] = "huggingface",
) -> None:
    """Write a model for Transformers, or for the book's code (.pth)."""
    from gptlit.checkpoint.export import save_pretrained
    from gptlit.checkpoint.pretrained import build, read_weights

    folder, found = user_path(out), read_weights(checkpoint)
    save_pretrained(build(found), folder, to, found.tokenizer)
    print(f"{folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
