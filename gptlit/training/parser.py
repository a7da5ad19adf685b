"""The parser of train.py: one-line errors that name the nearest known command, setting or file."""

import difflib
import re
from pathlib import Path
from typing import NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gptlit.errors import OneLineErrors, fail
from gptlit.training.lightning_compat import option_strings


class Parser(OneLineErrors, LightningArgumentParser):
    """LightningArgumentParser whose errors are one line and say what was probably meant."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(message + self._hint(message), ex)

    def _hint(self, message: str) -> str:
        if match := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
            name, known = match[1], option_strings(self)
        elif match := re.search(r"does not accept option '(.+)'", message):
            name, known = match[1], [option.removeprefix("--") for option in option_strings(self)]
        elif match := re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message):
            name, known = match[1], re.findall(r"\w+", match[2])
        elif match := re.search(r"File does not exist: '(.+)'", message):
            files = {path.stem: path for path in Path(match[1]).parent.glob("*.yaml")}
            near = difflib.get_close_matches(Path(match[1]).stem, files, 1)
            return f": did you mean {files[near[0]]}?" if near else ""
        else:
            return ""
        near = difflib.get_close_matches(name, known, 1)
        return f": did you mean {near[0]}?" if near else ""


def check_values(parser: LightningArgumentParser, config: Namespace) -> None:
    """Exit with status 2 for what parsing leaves unchecked: empty values that need one, and the seed."""
    for group in ("model", "data", "trainer", "run", "model.config"):
        if config[group] is None:
            fail(f"{group} is empty: give it settings, or leave the line out", status=2)
    try:
        parser.validate(config, skip_unset=False)
    except TypeError as error:
        key = str(error).split('"')[1]  # 'Parser key "model.lr": ...'
        is_empty = config.get(key) is None
        fail(f"{key} is empty: give it a value, or leave the line out" if is_empty else error, status=2)
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        fail(f"seed_everything must be at least 0 and below 2^32, got {seed}", status=2)
