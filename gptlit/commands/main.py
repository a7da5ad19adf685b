"""The `gptlit` command. Heavy imports wait until a command needs them."""

import os
import sys
from typing import Annotated

import typer

from gptlit import __version__
from gptlit.commands.chat import chat
from gptlit.commands.classify import classify
from gptlit.commands.evaluate import evaluate
from gptlit.commands.export import export
from gptlit.commands.generate import generate
from gptlit.commands.import_weights import import_weights
from gptlit.commands.inspect import inspect
from gptlit.commands.options import Json
from gptlit.commands.plot import plot
from gptlit.commands.prepare import prepare
from gptlit.commands.tokenizer import tokenizer
from gptlit.errors import InputError, fail, set_up_streams

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
TRAINING = {
    "fit": "Train, or resume a run with --ckpt_path.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
}

app = typer.Typer(
    help="Train a GPT, and everything around it.",
    # `--top_k`, as in train.py and in Python, and `--top-k` are the same option.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def gptlit(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"gptlit {__version__}")
    elif context.invoked_subcommand is None:
        fail("a command is missing: `gptlit --help` lists them", status=2)


def train(context: typer.Context) -> None:
    """Hand all arguments to LightningCLI."""
    from gptlit.training.cli import main

    main([str(context.info_name), *context.args])


def plan(
    context: typer.Context,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a few steps on this machine and estimate when the run would end.")
    ] = False,
    json: Json = False,
) -> None:
    """Estimate the memory, time and disk that a run needs.

    Counts parameters, steps and tokens too, and warns about unusual settings. Takes the same --config files and flags
    as `train.py fit` (`--data.batch_size 256`). Nothing is trained or written, and no GPU is needed; what depends on a
    corpus that is not prepared is left open (null with --json).
    """
    from gptlit.commands.plan import run

    run(context.args, with_measure=measure, as_json=json)


for name, text in TRAINING.items():
    app.command(name, help=text, context_settings={**PASS_ON, "help_option_names": []})(train)
app.command()(prepare)
app.command()(tokenizer)
app.command()(inspect)
app.command(context_settings=PASS_ON)(plan)
app.command()(plot)
app.command()(generate)
app.command()(chat)
app.command()(classify)
app.command()(evaluate)
app.command("import")(import_weights)
app.command()(export)


def main(args: list[str] | None = None) -> None:
    """Run a command; errors that a user can fix are one line."""
    set_up_streams()
    command = typer.main.get_command(app)
    try:
        # Not `app()`, which turns a closed pipe into status 1.
        with command.make_context("gptlit", list(sys.argv[1:] if args is None else args)) as context:
            command.invoke(context)
    except typer.Exit as error:  # --help
        raise SystemExit(error.exit_code) from None
    except typer.TyperException as error:
        fail(error.format_message(), status=2)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
