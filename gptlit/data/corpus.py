"""Where documents come from: a corpus is a name, a fingerprint and an iterator of texts in a fixed order."""

import ast
import glob
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from gptlit.errors import InputError

PYTHON_DOCS = "python-docs"


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Args:
        name: Short, fit for a folder's name.
        fingerprint: Hexadecimal digest that changes when the documents may have changed.
        documents: Returns a fresh iterator over the texts.
    """

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[str]]


def open_corpus(source: str) -> Corpus:
    """Find a corpus: "python-docs", a UTF-8 text file, a folder of `.txt` files, or a glob.

    Raises:
        InputError: There is nothing of that name, or nothing in it.
    """
    if source == PYTHON_DOCS:
        return Corpus(PYTHON_DOCS, hashlib.sha256(sys.version.encode()).hexdigest(), python_docs)
    paths = _text_files(source)
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    words = [paths[0].stem] if len(paths) == 1 else [part for part in Path(source).parts if not set(part) & set("*?[]")]
    name = re.sub(r"[^\w-]+", "_", words[-1]).strip("_") if words else ""
    return Corpus(name or "text", digest.hexdigest(), partial(_read_texts, paths))


def _text_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(path.rglob("*.txt"))
        if not paths:
            raise InputError(f"data.source {source!r} has no .txt file in it")
    else:
        paths = sorted(p for match in glob.glob(str(path), recursive=True) if (p := Path(match)).is_file())
        if not paths:
            raise InputError(
                f"data.source {source!r} does not exist: give {PYTHON_DOCS!r}, a text file, a folder of .txt files "
                "or a glob"
            )
    for path in paths:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty: there is no text to train on")
    return paths


def _read_texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}; "
                "convert it, for instance with iconv"
            ) from error
        yield text.replace("\r\n", "\n")


def python_docs() -> Iterator[str]:
    """Yield the language reference topic by topic, then the docstrings of the standard library module by module.

    A text that came before is left out. Nothing is imported but `pydoc_data`: sources are parsed, not run.

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
    """Return the sources of the standard library, but for its tests."""
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
