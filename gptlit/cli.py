"""The `gptlit` command: all that is not training. Heavy imports wait until a command needs them."""

from jsonargparse import ArgumentParser, auto_cli

from gptlit import __version__
from gptlit.errors import InputError, OneLineErrors, fail


def generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> None:
    """Continue a prompt with a trained model; prompt and continuation go to standard output.

    Args:
        checkpoint: A .ckpt file, or a run's folder: then its newest checkpoint.
        prompt: Text to continue.
        max_new_tokens: Length of the continuation, in tokens; it ends earlier at the end of a document.
        temperature: 0 always takes the likeliest token; the higher, the more varied.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: The same seed gives the same text.
    """
    if not prompt:
        raise InputError("--prompt is empty: give at least one character")
    import torch

    from gptlit.generate import check_sampling
    from gptlit.generate import generate as generate_ids
    from gptlit.weights import load_model_and_tokenizer

    check_sampling(temperature, top_k, top_p, max_new_tokens)
    model, tokenizer = load_model_and_tokenizer(checkpoint)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    prompt_ids = torch.tensor([tokenizer.encode_ordinary(prompt)])
    ids = generate_ids(
        model,
        prompt_ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=tokenizer.eot_token,
        generator=generator,
    )
    print(tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.eot_token]))


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse with one-line errors."""


def main(args: list[str] | None = None) -> None:
    """Run a command; errors that a user can mend are one line."""
    try:
        auto_cli(
            {"generate": generate},
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
