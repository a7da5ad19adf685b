"""Is each setting's name known? Asked before torch and Lightning are imported: a misspelt one is answered at once."""

import ast
import difflib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from gptlit.errors import InputError, check_utf8, fail

COMMANDS = ("fit", "validate", "test")


OF_THE_COMMAND = {"config", "print_config", "help", "seed_everything", "ckpt_path"}


# Where the settings of a group are declared: a class's attributes, or the parameters of its __init__.
DECLARED = {
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
    "model": ("gptlit", "training/module.py", "GPTModule"),
    "model.config": ("gptlit", "config.py", "GPTConfig"),
    "data": ("gptlit", "data/datamodule.py", "TokenDataModule"),
    "run": ("gptlit", "training/run_config.py", "RunConfig"),
}


REMOVED = {"run.on_nonfinite": "a step that is not finite is skipped, and run.max_nonfinite_steps of them end the run"}


def check_names(args: list[str]) -> None:
    """Exit with status 2 and one line where a command, a flag or a key of a --config file is not one of train.py's.

    The values are for the real parser to judge, and all else that is no plain `COMMAND --name value`.
    """
    check_encoding(args)
    if not args or args[0].startswith("-"):
        return
    if args[0] not in COMMANDS:
        fail(f"there is no command {args[0]!r}: train.py has {', '.join(COMMANDS)}", status=2)
    names = setting_names()
    for word in args[1:]:
        flag = word.partition("=")[0]
        if flag.startswith("--") and " " not in flag:  # with a blank it is the value of the flag before
            _check(flag[2:].rstrip("+"), names)
    for file in _config_files(args):
        if not file.is_file():
            near = difflib.get_close_matches(file.stem, [other.stem for other in file.parent.glob("*.yaml")], 1)
            hint = f": did you mean {file.with_name(near[0])}.yaml?" if near else ""
            fail(f"--config {file}: there is no such file{hint}", status=2)
        for key in _keys(file):
            if key not in REMOVED:
                _check(key, names, f" in {file}")


def check_encoding(args: list[str]) -> None:
    """Exit with status 2 and one line where an argument is not UTF-8."""
    try:
        for word in args:
            check_utf8(word)
    except InputError as error:
        fail(error, status=2)


def setting_names() -> dict[str, set[str]]:
    """Return the names in each group, read from the sources; "" is the group of what has no dot."""
    names = {"": OF_THE_COMMAND | {group for group in DECLARED if "." not in group}}
    for group, (package, file, class_name) in DECLARED.items():
        folder = Path(find_spec(package).submodule_search_locations[0])  # type: ignore[union-attr,index]
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name).body
        init = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
        if init is not None:
            names[group] = {argument.arg for argument in (*init.args.args[1:], *init.args.kwonlyargs)}
        else:
            fields = (node.target for node in body if isinstance(node, ast.AnnAssign))
            names[group] = {field.id for field in fields if isinstance(field, ast.Name)}
    return names


def _check(name: str, names: dict[str, set[str]], where: str = "") -> None:
    """Follow a dotted name as far as its groups are known; what is inside a class of the user's choice is not."""
    group = ""
    for part in name.split("."):
        if group not in names:
            return
        full = f"{group}.{part}".lstrip(".")
        if part not in names[group]:
            known = [f"{outer}.{one}".lstrip(".") for outer, all_ in names.items() for one in sorted(all_)]
            near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(full, known, 1)
            hint = f"did you mean {near[0]}?" if near else "`python train.py fit --help` lists all"
            fail(f"there is no setting {name}{where}: {hint}", status=2)
        group = full


def _config_files(args: list[str]) -> Iterator[Path]:
    for word, following in zip(args, [*args[1:], ""], strict=True):
        key, is_joined, value = word.partition("=")
        text = value if is_joined else following
        is_yaml = bool({"{", ":", "\n"} & set(text[2:]))  # the text itself may be given; C: is a drive
        if key in ("--config", "-c") and text and not is_yaml:
            yield Path(text)


def _keys(file: Path) -> Iterator[str]:
    """Yield the dotted keys of a YAML file, of groups that are mappings; none of one that does not load."""
    try:
        values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        return
    stack = [("", values)]
    while stack:
        group, value = stack.pop()
        for key, inner in value.items() if isinstance(value, dict) else ():
            name = f"{group}.{key}".lstrip(".")
            yield name
            if name in DECLARED:
                stack.append((name, inner))
