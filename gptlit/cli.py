"""The `gptlit` command: all that is not training. Heavy imports wait until a command needs them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, auto_cli

from gptlit import __version__
from gptlit.errors import InputError, OneLineErrors, fail, note

if TYPE_CHECKING:
    import tiktoken

    from gptlit.model import GPTModel


def generate(
    checkpoint: str,
    prompt: str | None = None,
    prompts_file: str | None = None,
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
    prompts = _prompts(prompt, prompts_file)
    stop = stop or []
    from gptlit.generate import Sampling, complete

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
        from json import dumps

        for result in results:
            print(dumps(asdict(result), ensure_ascii=False))
    else:
        for number, result in enumerate(results, 1):
            print(f"--- {number} of {len(results)} ---\n{result.prompt}{result.text}")
    if stop and (unmet := sum(result.reason != "stop" for result in results)):
        note(f"no stop string was met in {unmet} of {len(results)} texts")


def _prompts(prompt: str | None, prompts_file: str | None) -> list[str]:
    if (prompt is None) == (prompts_file is None):
        raise InputError("give either --prompt TEXT or --prompts_file FILE")
    if prompts_file is None:
        prompts = [prompt or ""]
    else:
        try:
            prompts = [line for line in Path(prompts_file).read_text(encoding="utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise InputError(f"{prompts_file} is not UTF-8: position {error.start}") from error
    if not prompts or not all(prompts):
        raise InputError("--prompt is empty: give at least one character")
    return prompts


def _load(
    checkpoint: str, precision: str, quantize: str | None, compile: bool = False
) -> "tuple[GPTModel, tiktoken.Encoding]":
    import torch

    from gptlit.fast_linear import for_generation
    from gptlit.weights import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(checkpoint)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    if compile and torch.cuda.is_available():
        note("--compile is left out: it pays on a CPU only")
    return for_generation(model, quantize, compile), tokenizer


def _note_long_prompts(prompts: list[str], model: "GPTModel", tokenizer: "tiktoken.Encoding") -> None:
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
    from gptlit.chat import HELP, Chat
    from gptlit.generate import Sampling

    sampling = Sampling(temperature, top_k, top_p)
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
        stride: New tokens in each window of a long document; the default is half the context.
        batch_size: Windows at once.
        worst: How many of the documents with the highest loss to show.
        json: Print one JSON object instead of a table.
        precision: Of weights and arithmetic.
        quantize: Keep the matrices in 8 bits.
    """
    from gptlit.data.corpus import open_corpus

    corpus = open_corpus(data)
    from rich.progress import Progress, TextColumn

    from gptlit.evaluate import evaluate as run

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
        from json import dumps

        documents = [{"start": s.start, "tokens": s.tokens, "loss": s.loss} for s in result.worst]
        print(dumps({**values, "worst": documents}, ensure_ascii=False))
        return
    for key, value in values.items():
        print(f"{key:<16}{value:,.4f}" if isinstance(value, float) else f"{key:<16}{value:,}")
    if result.worst:
        print("\nhighest loss")
    for score in result.worst:
        print(f"  {score.loss:7.4f}  {score.tokens:>8,} tokens  {score.start}")


def import_(source: str, out: str, n_heads: int | None = None) -> None:
    """Turn another project's weights into a checkpoint.

    Args:
        source: A Hugging Face folder, hf:NAME on its hub, the book's .pth, nanoGPT's ckpt.pt, or a .safetensors file
            that `export` wrote.
        out: The .ckpt file to write; it must not exist.
        n_heads: For the book's .pth, which does not say it; heads of 64 by default, as in every GPT-2.
    """
    path = Path(out)
    if path.suffix != ".ckpt":
        raise InputError(f"--out {out!r} must end in .ckpt")
    if path.exists():
        raise InputError(f"--out {out!r} exists: name a new file")
    from gptlit.weights import read_source, save_checkpoint

    found = read_source(source, n_heads)
    save_checkpoint(found, path)
    config = found.config
    print(
        f"{path}: {config.n_layers} layers, {config.n_heads} heads, {config.emb_dim} wide, "
        f"context {config.context_length}, vocabulary {config.vocab_size:,}"
    )
    print(f"next: python train.py fit --config configs/finetune.yaml --model.init_from {path} --data.source FILE.txt")


def export(checkpoint: str, out: str, to: Literal["huggingface", "book", "safetensors"] = "huggingface") -> None:
    """Write a model for others: a Hugging Face folder, the book's .pth, or plain safetensors.

    Args:
        checkpoint: A .ckpt file or a run's folder (its newest checkpoint).
        out: The folder to write; it must not exist or be empty.
        to: The format.
    """
    from gptlit.weights import build, read_source, save_pretrained

    found = read_source(checkpoint)
    save_pretrained(build(found), out, to, found.tokenizer)
    print(f"{out}: " + ", ".join(sorted(path.name for path in Path(out).iterdir())))


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "chat": chat,
    "evaluate": evaluate,
    "import": import_,
    "export": export,
}


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse with one-line errors."""


def main(args: list[str] | None = None) -> None:
    """Run a command; errors that a user can mend are one line."""
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["import"] and args[1:] and not args[1].startswith("-"):
        args.insert(1, "--source")  # `gptlit import SOURCE --out FILE` reads better
    try:
        auto_cli(
            COMMANDS,  # type: ignore[arg-type]
            args=args,
            as_positional=False,
            prog="gptlit",
            version=__version__,
            parser_class=Parser,
            allow_abbrev=False,
            description="Everything around training a GPT; training itself is `python train.py fit --help`.",
        )
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
