"""The documentation that comes with Python as a corpus: technical English, offline."""

import ast
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from gptlit.errors import InputError


def python_docs() -> Iterator[str]:
    """Yield the language reference topic by topic, then the docstrings of the standard library module by module.

    A text that occurred before is left out. Sources are parsed, not imported.

    Raises:
        InputError: This Python comes without them.
    """
    try:
        from pydoc_data import topics  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError(
            f"this Python ({sys.executable}) comes without pydoc_data: give --data.source a text file or folder"
        ) from error
    seen: set[str] = set()

    def new(texts: Iterable[str]) -> str:
        fresh = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(fresh)
        return "\n\n".join(fresh)

    topics_of_the_language = ([text.strip()] for _, text in sorted(topics.topics.items()))
    yield from filter(None, map(new, chain(topics_of_the_language, map(_docstrings, _library_files()))))


def _library_files() -> list[Path]:
    """Return the sources of the standard library, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = {path.relative_to(library).parts: path for path in library.rglob("*.py")}
    return [files[parts] for parts in sorted(files) if not left_out & set(parts)]


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one source file, outermost first."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file of another Python version
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node) or "").strip()
            if docstring:
                yield docstring
