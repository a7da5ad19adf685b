"""`gptlit prepare` compared with the tokenizer alone: speed on one file, and peak memory on files of two sizes."""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.progress import track

from benchmarks.contenders import compare
from gptlit.data.prepare import prepare
from gptlit.data.sources import open_corpus
from gptlit.data.splitting import Split
from gptlit.data.tokenizer import load_tokenizer


def run(
    megabytes: int = 200,
    small: int = 20,
    large: int = 1000,
    rounds: int = 5,
    out: str = "prepare.json",
    folder: str | None = None,
) -> None:
    """Compare `prepare` (reading, splitting, encoding, hashing, writing) with encoding the same documents in memory.

    Args:
        megabytes: Size of the JSON lines file in MB.
        small: Size of the smaller file of the memory measurement in MB.
        large: Size of the larger file of the memory measurement in MB.
        rounds: Interleaved measurements of each contender.
        out: JSON file for the results.
        folder: Folder for the corpora; a temporary one by default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        files = {size: Path(temporary, f"{size}.jsonl") for size in (megabytes, small, large)}
        documents = docstrings()
        for size, path in track(files.items(), "writing the corpora"):
            write(path, size * 10**6, documents)
        contenders = {
            "gptlit prepare": ("benchmarks.prepare", {"kind": "prepare", "source": str(files[megabytes])}),
            "encode_ordinary_batch": ("benchmarks.prepare", {"kind": "encode", "source": str(files[megabytes])}),
        }
        pairs = [("gptlit prepare", "encode_ordinary_batch")]
        compare(f"preparing {megabytes} MB of text", contenders, pairs, "MB/s", Path(out), rounds)
        peaks = {size: peak_memory(files[size]) for size in (small, large)}
    for size, peak in peaks.items():
        print(f"peak memory, {size} MB of text: {peak:.0f} MB, with two workers")
    print(f"ratio: {peaks[large] / peaks[small]:.2f}")


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

    texts = list(corpus.documents()) if kind == "encode" else []

    def encode() -> None:
        tokenizer.encode_ordinary_batch(texts, num_threads=len(os.sched_getaffinity(0)))

    work = encode if kind == "encode" else write_shards

    def once() -> dict[str, float]:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "MB/s": size / seconds}

    return once


def peak_memory(source: Path) -> float:
    """Return the peak memory in MB of `gptlit prepare` with its workers, sampled 20 times per second."""
    command = [sys.executable, "-m", "gptlit", "prepare", str(source), "--out", f"{source}-out", "--num_workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(resident, [process.pid, *children(process.pid)])))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with status {process.returncode}")
    return peak


def children(pid: int) -> list[int]:
    """Return the child processes of a process (Linux)."""
    try:
        files = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(word) for text in files for word in text.split()]


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB (Linux)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))
