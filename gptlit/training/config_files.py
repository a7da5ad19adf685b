"""YAML configurations: duplicate keys are errors, removed settings are ignored, and dumped text loads as the same."""

from functools import cache
from itertools import chain
from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

from gptlit.errors import note

# Settings of earlier versions, and what became of them.
REMOVED = {"run.on_nonfinite": "non-finite steps are skipped, and run.max_nonfinite_steps of them in a row end the run"}


_load_any = get_loader("yaml")


def _load(text: str) -> Any:
    try:
        return _load_any(text)
    except TypeError as error:  # jsonargparse's own, for "null:"
        raise yaml.YAMLError(f"{text!r} is not a configuration") from error


def load(text: str) -> Any:
    """Load YAML as jsonargparse does.

    Raises:
        yaml.YAMLError: The text is not YAML, or a mapping has a duplicate key.
    """
    nodes, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    for node in nodes:
        if isinstance(node, yaml.CollectionNode) and id(node) not in seen:
            seen.add(id(node))  # an alias may lead back to it
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
            nodes.extend(chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value)
    value = _load(text)
    for name, why in REMOVED.items():
        group, key = name.split(".")
        if isinstance(value, dict) and isinstance(value.get(group), dict) and key in value[group]:
            del value[group][key]
            _note_once(f"{name} was removed and is ignored: {why}")
    return value


def _check_keys(mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if key.value in lines:
            raise yaml.YAMLError(f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}: keep one")
        lines[key.value] = line


_note_once = cache(note)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes every string that `load` would take for a number, a date or null: 3e-4 is no number in YAML 1.1."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        is_text = _load(text) == text
    except yaml.YAMLError:
        is_text = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")


_Dumper.add_representer(str, _represent)


def dump(value: Any) -> str:
    """Dump YAML that `load` reads back."""
    return str(yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


def register() -> None:
    """Let jsonargparse load and dump YAML with these functions."""
    set_loader("yaml", load, (yaml.YAMLError,))
    set_dumper("yaml", dump)
