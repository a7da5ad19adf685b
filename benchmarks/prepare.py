"""Speed of `gptlit prepare`, compared with that of the tokenizer alone."""

import ast
import json
import os
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders import compare
from gptlit.data.prepare import prepare
from gptlit.data.sources import open_corpus
from gptlit.data.splitting import Split
from gptlit.data.tokenizer import load_tokenizer


def run(megabytes: int = 200, rounds: int = 5, out: str = "prepare.json", folder: str | None = None) -> None:
    """Compare `prepare` (reading, splitting, encoding, hashing, writing) with encoding the same documents in memory.

    Args:
        megabytes: Size of the JSON lines file in MB.
        rounds: Interleaved measurements of each contender.
        out: JSON file for the results.
        folder: Folder for the corpus; a temporary one by default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source = Path(temporary, "corpus.jsonl")
        write(source, megabytes * 10**6, docstrings())
        contenders = {
            name: (__name__, {"kind": name, "source": str(source)}) for name in ("prepare", "encode_ordinary_batch")
        }
        pairs = [("prepare", "encode_ordinary_batch")]
        compare(f"preparing {megabytes} MB of text", contenders, pairs, "MB/s", Path(out), rounds)


def docstrings() -> list[str]:
    """Return the docstrings of the installed packages, one document per module."""
    found = []
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        if text := "\n\n".join(filter(None, texts)):
            found.append(text)
    return found


def write(path: Path, size: int, documents: list[str]) -> None:
    """Write `size` characters of text by repeating the documents with shuffled paragraphs."""
    rng = random.Random(0)
    written = copy = 0
    with path.open("w") as file:
        while written < size:
            for text in documents:
                paragraphs = text.split("\n\n")
                rng.shuffle(paragraphs)
                document = f"{copy} {rng.random()}\n" + "\n\n".join(paragraphs)
                file.write(json.dumps({"text": document}) + "\n")
                written += len(document)
                if written >= size:
                    return
            copy += 1


def contender(kind: str, source: str) -> Callable[[], dict[str, float]]:
    """Return a function that times one pass."""
    corpus, tokenizer = open_corpus(source), load_tokenizer()
    size = sum(len(text.encode()) for text in corpus.documents()) / 1e6

    def write_shards() -> None:
        out = Path(f"{source}-tokens")
        shutil.rmtree(out, ignore_errors=True)
        prepare(corpus, out, tokenizer, Split())

    texts = list(corpus.documents()) if kind != "prepare" else []

    def once() -> dict[str, float]:
        start = time.perf_counter()
        if kind == "prepare":
            write_shards()
        else:
            tokenizer.encode_ordinary_batch(texts, num_threads=len(os.sched_getaffinity(0)))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "MB/s": size / seconds}

    return once
