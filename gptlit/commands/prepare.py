"""`gptlit prepare`: texts -> token shards."""

from typing import TYPE_CHECKING, Annotated

import typer

from gptlit.commands.options import Separator, TextKey
from gptlit.errors import shell_quote, user_path

if TYPE_CHECKING:
    from gptlit.data.token_files import TokenData

SOURCES = (
    "python-docs; the-verdict, tiny-shakespeare, tinystories, fineweb-edu-sample (downloaded); files, folders or globs "
    "of .txt, .jsonl (.gz, .zst) and .parquet; hf:OWNER/NAME[/PATH]."
)


def prepare(
    source: Annotated[list[str], typer.Argument(help=f"One or several of: {SOURCES}")],
    out: Annotated[str, typer.Option(help="Folder for shards and manifest.json, for data.source.")],
    tokenizer: Annotated[
        str, typer.Option(help="Name of a tiktoken encoding, or path of a Hugging Face tokenizer.json.")
    ] = "gpt2",
    val_fraction: Annotated[
        float, typer.Option(help="Fraction for validation: of the documents, or of the characters of a single text.")
    ] = 0.05,
    test_fraction: Annotated[float, typer.Option(help="Fraction for testing.")] = 0.0,
    val_source: Annotated[
        list[str] | None, typer.Option(help="Validate on this source instead of a fraction; may be repeated.")
    ] = None,
    test_source: Annotated[
        list[str] | None, typer.Option(help="Test on this source instead of a fraction; may be repeated.")
    ] = None,
    text_key: TextKey = "text",
    separator: Separator = "",
    shard_tokens: Annotated[int, typer.Option(help="Tokens in a shard.")] = 100_000_000,
    num_workers: Annotated[int | None, typer.Option(help="Encoding processes; by default one per core.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip_bad", help="Skip and count unreadable documents instead of stopping.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what another source, tokenizer or setting wrote there.")
    ] = False,
) -> None:
    """Tokenize texts into shards to train on. After an interruption the same command resumes."""
    from gptlit.data.parsers import ReadOptions
    from gptlit.data.prepare import prepare as run
    from gptlit.data.sources import open_corpus
    from gptlit.data.splitting import Split
    from gptlit.data.tokenizer import load_tokenizer

    split = Split(0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction)
    encoding = load_tokenizer(tokenizer)
    given = {"train": source, "val": val_source, "test": test_source}
    corpora = {name: open_corpus(one, ReadOptions(text_key, separator)) for name, one in given.items() if one}
    data = run(
        corpora,
        user_path(out),
        encoding,
        split,
        shard_tokens=shard_tokens,
        num_workers=num_workers,
        skip_bad=skip_bad,
        overwrite=overwrite,
    )
    _print_table(data)
    print(f"\nnext: python -m gptlit fit --config quickstart --data.source {shell_quote(out)}")


def _print_table(data: "TokenData") -> None:
    print(f"{'':8}{'documents':>14}{'tokens':>18}{'text bytes':>18}{'bytes/token':>13}{'shards':>8}")
    for name, part in data.manifest["splits"].items():
        if tokens := data.tokens(name):
            ratio = part["bytes"] / tokens
            print(f"{name:8}{part['documents']:>14,}{tokens:>18,}{part['bytes']:>18,}{ratio:>13.2f}", end="")
            print(f"{len(part['shards']):>8,}")
    if data.manifest["skipped"]:
        print(f"skipped, unreadable: {data.manifest['skipped']:,} documents")
