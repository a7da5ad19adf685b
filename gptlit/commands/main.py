"""The `gptlit` command: all that is not training. Heavy imports wait until a command needs them."""

import inspect as introspection
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse import ArgumentParser, auto_cli, get_loader, set_loader

from gptlit import __version__
from gptlit.errors import InputError, OneLineErrors, fail, note, set_up_streams, user_path

if TYPE_CHECKING:
    from gptlit.data.tokenizer import Tokenizer
    from gptlit.model.gpt import GPTModel


def prepare(
    source: list[str],
    out: str,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.05,
    test_fraction: float = 0.0,
    val_source: list[str] | None = None,
    test_source: list[str] | None = None,
    text_key: str = "text",
    separator: str = "",
    shard_tokens: int = 100_000_000,
    num_workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> None:
    """Turn texts into token shards to train on. Killed at any moment, the same command goes on where it was.

    Args:
        source: One or several of: python-docs; the-verdict, tiny-shakespeare, tinystories, fineweb-edu-sample (they
            are downloaded); files, folders or globs of .txt, .jsonl (.gz, .zst) and .parquet; hf:OWNER/NAME[/PATH].
        out: The folder for shards and manifest.json, to be named as data.source.
        tokenizer: Name of a tiktoken encoding, or the path of a Hugging Face tokenizer.json.
        val_fraction: Share that validates: of the documents, or of the characters of a single text.
        test_fraction: Share that tests.
        val_source: Other sources that validate, whole, instead of a share.
        test_source: Other sources that test.
        text_key: Key or column of the text in .jsonl and .parquet.
        separator: What stands between two documents of a text file; without it a file is one document.
        shard_tokens: Length of a shard, in tokens.
        num_workers: Processes that encode; the default is one a core.
        skip_bad: Leave out what cannot be read, and count it, rather than stop.
        overwrite: Replace what another source, tokenizer or setting made in that folder.
    """
    from gptlit.data.parsers import ReadOptions
    from gptlit.data.prepare import prepare as run
    from gptlit.data.progress import preparing
    from gptlit.data.sources import open_corpus
    from gptlit.data.splitting import Split
    from gptlit.data.tokenizer import load_tokenizer

    if not source:
        raise InputError("no source is given: name a file, a folder, a data set or a corpus")
    split = Split(0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction)
    encoding = load_tokenizer(tokenizer)
    corpora = {}
    for name, sources in {"train": source, "val": val_source, "test": test_source}.items():
        if sources:
            corpora[name] = open_corpus(sources, ReadOptions(text_key, separator))
    folder = user_path(out)
    inside = [file.name for corpus in corpora.values() for file in corpus.files if _is_in(file.name, folder)]
    if inside:
        raise InputError(f"the source {inside[0]} is in --out {out}: choose another folder for the tokens")
    with preparing(out) as report:
        data = run(
            corpora,
            folder,
            encoding,
            split,
            shard_tokens=shard_tokens,
            num_workers=num_workers,
            skip_bad=skip_bad,
            overwrite=overwrite,
            report=report,
        )
    parts = data.manifest["splits"]
    print(f"{'':8}{'documents':>14}{'tokens':>18}{'text bytes':>18}{'bytes/token':>13}{'shards':>8}")
    for name, part in parts.items():
        if tokens := data.tokens(name):
            ratio = part["bytes"] / tokens
            print(f"{name:8}{part['documents']:>14,}{tokens:>18,}{part['bytes']:>18,}{ratio:>13.2f}", end="")
            print(f"{len(part['shards']):>8,}")
    if data.manifest["skipped"]:
        print(f"left out, for they could not be read: {data.manifest['skipped']:,} documents")
    print(f"\nnext: python train.py fit --config configs/quickstart.yaml --data.source {shlex.quote(out)}")


def _is_in(name: str, folder: Path) -> bool:
    return folder.is_dir() and Path(name).is_file() and Path(name).resolve().is_relative_to(folder.resolve())


def inspect(
    folder: str,
    split: Literal["train", "val", "test"] = "train",
    position: int = 0,
    length: int = 100,
    tokenizer: str = "",
    dtype: Literal["uint16", "uint32"] = "uint16",
    verify: bool = False,
    json: bool = False,
) -> None:
    """Show what is in a folder of tokens, prepared here or by nanoGPT or llm.c.

    Args:
        folder: With the .bin files.
        split: Of which to show a window.
        position: Where the window begins, in tokens.
        length: Of the window, in tokens.
        tokenizer: For files that do not say it; gpt2 by default.
        dtype: Number type of files without a header.
        verify: Read every shard and check its SHA-256.
        json: Print one JSON object instead of a table.
    """
    from gptlit.commands.inspect import summaries, window_text
    from gptlit.data.token_files import folder_tokenizer, open_folder
    from gptlit.data.tokenizer import load_tokenizer

    if position < 0 or length < 1:
        raise InputError(f"position {position} and length {length}: at least 0 and 1 are needed")
    path = user_path(folder)
    if not path.is_dir():
        raise InputError(f"{folder} is no folder of tokens")
    encoding = load_tokenizer(tokenizer or folder_tokenizer(path) or "gpt2")
    data = open_folder(path, encoding, dtype)
    if verify and not data.manifest:
        raise InputError(f"{folder} has no manifest.json, there are no hashes to verify")
    if verify:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("verifying", total=sum(map(data.tokens, data.splits)))
            data.verify(lambda shard: progress.update(task, advance=shard.tokens))
    found = summaries(data, encoding.eot_token)
    text = window_text(data, split, encoding, position, length)
    shards = sum(summary.shards for summary in found.values())
    if json:
        from dataclasses import asdict

        splits = {name: asdict(summary) for name, summary in found.items()}
        values = {"tokenizer": encoding.name, "fingerprint": data.fingerprint, "verified": verify, "splits": splits}
        _print_json({**values, "window": text})
        return
    print(f"{folder}: tokenizer {encoding.name}, {encoding.n_vocab:,} ids, fingerprint {data.fingerprint[:12]}")
    print(f"\n{'':8}{'documents':>14}{'tokens':>18}{'text bytes':>18}{'median':>10}{'longest':>12}{'shards':>8}")
    for name, summary in found.items():
        size = f"{summary.text_bytes:,}" if summary.text_bytes is not None else "unknown"
        print(f"{name:8}{summary.documents:>14,}{summary.tokens:>18,}{size:>18}", end="")
        print(f"{summary.median:>10,}{summary.longest:>12,}{summary.shards:>8,}")
        if summary.measured < summary.tokens:
            print(f"{'':8}(documents counted and measured in the first {summary.measured:,} tokens)")
    if verify:
        print(f"\nverified: {shards:,} shard{'s' * (shards != 1)} as they were written")
    print(f"\n{split}, tokens {position:,} to {position + length:,}:\n{text}")


def generate(
    checkpoint: str,
    prompt: str = "",
    prompts_file: str = "",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: list[str] | None = None,
    num_samples: int = 1,
    seed: int | None = None,
    json: bool = False,
    precision: Literal["32", "bf16"] = "32",
    quantize: Literal["int8"] | None = None,
    compile: bool = False,
) -> None:
    """Continue prompts with a trained model; texts go to standard output as they are made.

    Args:
        checkpoint: A .ckpt file or a run's folder (its newest checkpoint), or anything that `import` reads.
        prompt: Text to continue.
        prompts_file: A file with a prompt a line, instead.
        max_new_tokens: Length of a continuation, in tokens; it ends earlier at the end of a document.
        temperature: 0 always takes the likeliest token; the higher, the more varied.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens that together have this probability.
        stop: Texts that end a continuation, as a list: '["Q:", "The end"]'.
        num_samples: Continuations of each prompt.
        seed: The same seed gives the same texts.
        json: Print one JSON object a text, with its token ids and log-probabilities.
        precision: Of weights and arithmetic.
        quantize: Keep the matrices in 8 bits: half the memory of bf16, and faster on a CPU.
        compile: Compile the blocks first: seconds at the start, twice the speed from then on.
    """
    if bool(prompt) == bool(prompts_file):
        raise InputError("give either --prompt TEXT, of at least one character, or --prompts_file FILE")
    prompts = [prompt] if prompt else _read_prompts(user_path(prompts_file))
    stop = stop or []
    from gptlit.generation.generate import complete
    from gptlit.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 0 or num_samples < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} and num_samples {num_samples}: at least 0 and 1 are needed")
    model, tokenizer = _load(checkpoint, precision, quantize, compile)
    _note_long_prompts(prompts, model, tokenizer)
    rows = [text for text in prompts for _ in range(num_samples)]
    live = len(rows) == 1 and not json
    if live:
        print(rows[0], end="", flush=True)
    show = (lambda _, text: print(text, end="", flush=True)) if live else None
    results = complete(model, tokenizer, rows, max_new_tokens, sampling, stop=stop, seed=seed, on_text=show)
    if live:
        print()
    elif json:
        from dataclasses import asdict

        for result in results:
            _print_json(asdict(result))
    else:
        for number, result in enumerate(results, 1):
            print(f"--- {number} of {len(results)} ---\n{result.prompt}{result.text}")
    if stop and (unmet := sum(result.reason != "stop" for result in results)):
        note(f"no stop string was met in {unmet} of {len(results)} texts")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: position {error.start}") from error
    if not any(lines):
        raise InputError(f"--prompts_file {path} has no prompt: write one a line")
    return list(filter(None, lines))


def _print_json(values: Any) -> None:
    from json import dumps

    print(dumps(values))  # in ASCII, so that it is JSON in any encoding


def _load(checkpoint: str, precision: str, quantize: str | None, compile: bool = False) -> "tuple[GPTModel, Tokenizer]":
    import torch

    from gptlit.checkpoint.pretrained import load_model_and_tokenizer
    from gptlit.generation.fast_linear import for_generation

    model, tokenizer = load_model_and_tokenizer(checkpoint)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    if compile and torch.cuda.is_available():
        note("--compile is left out: on a GPU each step is a CUDA graph without it")
    return for_generation(model, quantize, compile), tokenizer


def _note_long_prompts(prompts: list[str], model: "GPTModel", tokenizer: "Tokenizer") -> None:
    length = model.config.context_length
    longest = max(len(tokenizer.encode_ordinary(prompt)) for prompt in prompts)
    if longest > length:
        note(f"a prompt has {longest} tokens, the model reads the last {length} of them")


def chat(
    checkpoint: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int | None = None,
    precision: Literal["32", "bf16"] = "32",
    quantize: Literal["int8"] | None = None,
    compile: bool = False,
) -> None:
    """Type a text, let the model go on, type again; /help lists the commands.

    Args:
        checkpoint: As for `generate`, like everything else.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: The same seed and lines give the same answers.
        precision: Of weights and arithmetic.
        quantize: Keep the matrices in 8 bits.
        compile: Compile the blocks first.
    """
    from gptlit.commands.chat import HELP, Chat
    from gptlit.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    if None in (sys.stdin, sys.stdout):
        raise InputError("chat reads standard input and writes standard output: one of them is closed")
    model, tokenizer = _load(checkpoint, precision, quantize, compile)
    talk = Chat(model, tokenizer, sampling, max_new_tokens, seed, lambda text: print(text, end="", flush=True))
    print(HELP)
    while True:
        try:
            if not talk.say(input("> ")):
                return
        except EOFError:
            print()
            return


def evaluate(
    checkpoint: str,
    data: str,
    text_key: str = "text",
    separator: str = "",
    stride: int | None = None,
    batch_size: int = 8,
    worst: int = 5,
    json: bool = False,
    precision: Literal["32", "bf16"] = "32",
    quantize: Literal["int8"] | None = None,
) -> None:
    """Measure how well a model predicts a corpus: loss, perplexity, bits per byte, accuracy.

    Args:
        checkpoint: As for `generate`.
        data: As `data.source` in training: a text file, a folder, a glob, or python-docs.
        text_key: Key or column of the text in .jsonl and .parquet.
        separator: What stands between two documents of a text file; without it a file is one document.
        stride: New tokens in each window of a long document; the default is half the context.
        batch_size: Windows at once.
        worst: How many of the documents with the highest loss to show.
        json: Print one JSON object instead of a table.
        precision: Of weights and arithmetic.
        quantize: Keep the matrices in 8 bits.
    """
    from gptlit.data.parsers import ReadOptions
    from gptlit.data.sources import open_corpus

    corpus = open_corpus(data, ReadOptions(text_key, separator))
    from rich.progress import Progress, TextColumn

    from gptlit.generation.evaluate import evaluate as run

    model, tokenizer = _load(checkpoint, precision, quantize)
    if stride is None:
        stride = max(1, model.config.context_length // 2)
    columns = (TextColumn("{task.completed} documents, {task.fields[tokens]:,} tokens"),)
    seen = 0
    from rich.console import Console

    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, tokens=0)

        def show(score: object) -> None:
            nonlocal seen
            seen += score.tokens  # type: ignore[attr-defined]
            progress.update(task, advance=1, tokens=seen)

        result = run(model, tokenizer, corpus.documents(), stride, batch_size, worst, show)
    total = result.total
    values = {
        "documents": result.documents,
        "tokens": total.tokens,
        "stride": stride,
        "context_length": model.config.context_length,
        "loss": total.loss,
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "accuracy": total.accuracy,
    }
    if json:
        documents = [{"start": s.start, "tokens": s.tokens, "loss": s.loss} for s in result.worst]
        _print_json({**values, "worst": documents})
        return
    for key, value in values.items():
        print(f"{key:<16}{value:,.4f}" if isinstance(value, float) else f"{key:<16}{value:,}")
    if result.worst:
        print("\nhighest loss")
    for score in result.worst:
        print(f"  {score.loss:7.4f}  {score.tokens:>8,} tokens  {score.start}")


def import_(source: str, out: str, n_heads: int | None = None, tokenizer: str = "") -> None:
    """Turn another project's weights into a checkpoint.

    Args:
        source: A Hugging Face folder, hf:NAME on its hub, the book's .pth, nanoGPT's ckpt.pt, or a .safetensors file
            that `export` wrote.
        out: The .ckpt file to write; it must not exist.
        n_heads: For the book's .pth, which does not say it; heads of 64 by default, as in every GPT-2.
        tokenizer: The one that the weights were trained with, where they do not say it: the name of a tiktoken
            encoding, or the path of a Hugging Face tokenizer.json.
    """
    path = Path(out)
    if path.suffix != ".ckpt":
        raise InputError(f"--out {out!r} must end in .ckpt")
    if path.exists():
        raise InputError(f"--out {out!r} exists: name a new file")
    from gptlit.checkpoint.export import save_checkpoint
    from gptlit.checkpoint.pretrained import read_source

    found = read_source(source, n_heads)
    if tokenizer:
        found.tokenizer = tokenizer
        if found.load_tokenizer().n_vocab > found.config.vocab_size:
            raise InputError(
                f"--tokenizer {tokenizer} has {found.load_tokenizer().n_vocab} ids, but {source} has a vocabulary of "
                f"{found.config.vocab_size}: name the one that it was trained with"
            )
    save_checkpoint(found, path)
    print(f"{path}: {found.config.summary}, vocabulary {found.config.vocab_size:,}")
    flags = ["--model.init_from", out]
    if found.tokenizer_name not in (None, "gpt2"):
        flags += ["--data.tokenizer", str(found.tokenizer_name)]
    print(f"next: python train.py fit --config configs/finetune.yaml {shlex.join(flags)} --data.source FILE.txt")


def export(checkpoint: str, out: str, to: Literal["huggingface", "book", "safetensors"] = "huggingface") -> None:
    """Write a model for others: a Hugging Face folder, the book's .pth, or plain safetensors.

    Args:
        checkpoint: A .ckpt file or a run's folder (its newest checkpoint).
        out: The folder to write; it must not exist or be empty.
        to: The format.
    """
    from gptlit.checkpoint.export import save_pretrained
    from gptlit.checkpoint.pretrained import build, read_source

    found = read_source(checkpoint)
    save_pretrained(build(found), out, to, found.tokenizer)
    print(f"{out}: " + ", ".join(sorted(path.name for path in Path(out).iterdir())))


def plan(config: list[str], measure: bool = False, json: bool = False) -> None:
    """Say what a run will cost before it starts: parameters, memory, steps, tokens, disk, and what looks wrong.

    Every flag of `train.py fit` may follow (`--data.batch_size 256`). Nothing is trained or written, and no GPU is
    needed; what depends on a corpus that is not prepared here is left open.

    Args:
        config: One or several YAML files, as for `train.py fit`.
        measure: Time some steps on this machine, and reckon when the run would end.
        json: Print one JSON object; what is not known is null.
    """
    raise AssertionError("`main` hands this command over before its flags are read: they are those of train.py")


def plot(run: list[str], out: str) -> None:
    """Draw the losses of one or many runs, by tokens and by time, and print what differs in their settings.

    Args:
        run: Folders of runs: runs/<name>/version_<n>, or runs/<name> for its newest.
        out: The picture to write: .png, .svg or .pdf.
    """
    from gptlit.commands.plot import run as draw

    draw(run, out)


def schema(out: str) -> None:
    """Write a JSON schema of the YAML files, with which an editor completes and checks them.

    Args:
        out: The .json file to write. A YAML file names it in its first line: # yaml-language-server: $schema=FILE
    """
    path = user_path(out)
    if path.suffix != ".json":
        raise InputError(f"--out {out!r} must end in .json")
    from json import dumps

    from gptlit.commands.plan import json_schema

    path.write_text(dumps(json_schema(), indent=1) + "\n")
    print(f"{out}\nfirst line of a YAML file: # yaml-language-server: $schema={out}")


def _plan(words: list[str]) -> None:
    """Take out the two flags of `plan`; all others belong to `train.py fit`."""
    found = {"--measure": False, "--json": False}
    rest = []
    while words:
        word = words.pop(0)
        key, _, value = word.partition("=")
        if key not in found:
            rest.append(word)
            continue
        if not value and words and words[0].lower() in ("true", "false"):
            value = words.pop(0)
        if value.lower() not in ("", "true", "false"):
            fail(f"{key} is true or false, got {value!r}", status=2)
        found[key] = value.lower() != "false"
    if not any(word.partition("=")[0] in ("--config", "-c") for word in rest):
        fail("--config is needed: gptlit plan --config configs/quickstart.yaml", status=2)
    from gptlit.commands.plan import run

    run(rest, with_measure=found["--measure"], as_json=found["--json"])


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "inspect": inspect,
    "plan": plan,
    "plot": plot,
    "schema": schema,
    "generate": generate,
    "chat": chat,
    "evaluate": evaluate,
    "import": import_,
    "export": export,
}


POSITIONAL = {
    "prepare": "source",
    "inspect": "folder",
    "plot": "run",
    "import": "source",
}  # `gptlit inspect FOLDER` reads better


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse with one-line errors; a file that is named is a source, not a value to be read from it."""

    def add_argument(self, *args: Any, sub_configs: bool = False, **kwargs: Any) -> Any:
        """Add an argument whose value is what is typed."""
        return super().add_argument(*args, sub_configs=False, **kwargs)


def _as_list(values: list[str]) -> str:
    """Return JSON for the items of a list, or for a list that is JSON already."""
    from json import dumps, loads

    try:
        items = loads(values[0]) if len(values) == 1 else None
    except (ValueError, RecursionError):
        items = None
    is_json = isinstance(items, list) and all(isinstance(item, str) for item in items)
    return values[0] if is_json else dumps(values)


def _spelt_out(args: list[str]) -> list[str]:
    """Write in full what may be written shorter: the first words without their key, `--verify` for `--verify true`,
    the items of a list one after the other.
    """
    command, words = args[:1], args[1:]
    if not command or command[0] not in COMMANDS:
        return args
    parameters = introspection.signature(COMMANDS[command[0]]).parameters
    if words and not words[0].startswith("-") and command[0] in POSITIONAL:
        words.insert(0, f"--{POSITIONAL[command[0]]}")
    found = list(command)
    while words:
        key, is_joined, value = words.pop(0).partition("=")
        kind = str(getattr(parameters.get(key.removeprefix("--")), "annotation", ""))
        count = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
        if count == 0 and kind and kind != str(bool) and words and words[0].removeprefix("--") not in parameters:
            count = 1  # `--separator ---`: it needs a value
        values = [value] if is_joined else [words.pop(0) for _ in range(count)]
        if kind == str(bool) and not values:
            values = ["true"]
        if kind.startswith("list") and values:
            values = [_as_list(values)]
        found += [f"{key}={values[0]}", *values[1:]] if values else [key]
    return found


def main(args: list[str] | None = None) -> None:
    """Run a command; errors that a user can mend are one line."""
    args = list(sys.argv[1:] if args is None else args)
    set_up_streams()
    set_loader("yaml", get_loader("yaml"), (yaml.YAMLError,), json_superset=False)  # lists are JSON first
    try:
        if args[:1] == ["plan"] and not {"-h", "--help"} & set(args):
            return _plan(args[1:])
        auto_cli(
            COMMANDS,  # type: ignore[arg-type]
            args=_spelt_out(args),
            as_positional=False,
            prog="gptlit",
            version=__version__,
            parser_class=Parser,
            allow_abbrev=False,
            description="Everything around training a GPT; training itself is `python train.py fit --help`.",
        )
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
