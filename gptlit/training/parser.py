"""The parser of train.py: recipes by name, one-line errors that name the nearest setting, no duplicate keys in YAML."""

import difflib
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gptlit.errors import fail
from gptlit.training.lightning_compat import option_strings, use_utf8_configs

# What other projects call an option: keys are the last parts of the names.
SYNONYMS = {
    "learning_rate": "model.lr",
    "dropout": "model.config.drop_rate",
    "n_embd": "model.config.emb_dim",
    "block_size": "model.config.context_length",
    "epochs": "trainer.max_epochs",
}


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line, without the usage, and say what was probably meant."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if match := re.search(r"unrecognized arguments: --([^\s=]+)|does not accept option '(.+)'", message):
            known = [option.removeprefix("--") for option in option_strings(self)]
            name = match[1] or match[2]
            synonym = SYNONYMS.get(name.rpartition(".")[2])
            if near := [synonym] if synonym in known else difflib.get_close_matches(name, known, 1):
                message += f": did you mean {'--' * bool(match[1])}{near[0]}?"
        fail(ex if ex is not None and os.environ.get("GPTLIT_TRACEBACK") else message, status=2)


def expand_recipes(args: list[str]) -> list[str]:
    """Replace the name of a recipe, as in `--config quickstart`, by its file; a file of that name comes first.

    The folder of recipes is part of an installed package, and beside the package in a checkout.
    """
    package = Path(__file__).parents[1]
    recipes = folder if (folder := package / "configs").is_dir() else package.parent / "configs"

    def found(value: str) -> str:
        path = recipes / f"{value}.yaml"
        return str(path) if Path(value).name == value and path.is_file() and not Path(value).is_file() else value

    pairs = pairwise(["", *args])
    args = [found(value) if option in ("-c", "--config") else value for option, value in pairs]
    return [f"--config={found(arg[9:])}" if arg.startswith("--config=") else arg for arg in args]


class _UniqueKeys(yaml.BaseLoader):  # type: ignore[misc]
    """Refuses a mapping with a duplicate key, of which YAML would silently take the last."""

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}: keep one")
            lines[key.value] = line
        return dict(super().construct_mapping(node, deep))


_load_any = get_loader("yaml")


def _load(text: str) -> Any:
    yaml.load(text, _UniqueKeys)
    return _load_any(text)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes texts that the loader would take for numbers, such as 3e-4: in YAML 1.1 that is none."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)?\.?\d*[eE][-+]?\d+$"), list("-+.0123456789")
)


def _dump(value: Any) -> str:
    return str(yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


use_utf8_configs()
set_dumper("yaml", _dump)
set_loader("yaml", _load, (yaml.YAMLError,))
