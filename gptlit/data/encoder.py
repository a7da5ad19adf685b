"""Processes that turn texts into ids. `python -m gptlit.data.encoder` is one: batches in, ids out, by pipe.

It ends when its input does, so that none outlives a killed parent. It imports neither torch nor the parent's main
module, and the pipe carries what the parent itself made, never a file's content as code.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Any

import numpy as np

from gptlit.data.tokenizer import Tokenizer

Encoded = tuple[bytes, list[int]]  # ids of all texts as uint32, and how many each text has


def encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Return the ids of each text. Text that spells a special token stays ordinary text."""
    ids = [tokenizer.encode_to_numpy(text) for text in texts]
    return np.concatenate(ids).astype(np.uint32, copy=False).tobytes(), [len(part) for part in ids]


class Encoders:
    """Encodes batches in order on several processes; with none, in this one. A context manager.

    Args:
        tokenizer: From text to ids.
        num_workers: Processes.
    """

    def __init__(self, tokenizer: Tokenizer, num_workers: int) -> None:
        self._tokenizer = tokenizer
        self._num_workers = num_workers
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._stack = ExitStack()

    def __enter__(self) -> "Encoders":
        """Start the processes."""
        for _ in range(self._num_workers):
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gptlit.data.encoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's business
            )
            self._stack.callback(_end, process)
            pickle.dump(self._tokenizer, process.stdin)  # type: ignore[arg-type]
            self._idle.put(process)
        return self

    def __exit__(self, *_: Any) -> None:
        """End them."""
        self._stack.close()

    def map(self, batches: Iterable[tuple[Any, list[str]]]) -> Iterator[tuple[Any, Encoded]]:
        """Yield (tag, ids) for each (tag, texts), in order; two batches a process are read ahead."""
        if not self._num_workers:
            yield from ((tag, encode(self._tokenizer, texts)) for tag, texts in batches)
            return
        waiting: deque[tuple[Any, Future[Encoded]]] = deque()
        with ThreadPoolExecutor(self._num_workers) as threads:  # a thread only waits for its process
            try:
                for tag, texts in batches:
                    waiting.append((tag, threads.submit(self._ask, texts)))
                    while len(waiting) > 2 * self._num_workers:
                        tag, future = waiting.popleft()
                        yield tag, future.result()
                while waiting:
                    tag, future = waiting.popleft()
                    yield tag, future.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, texts: list[str]) -> Encoded:
        process = self._idle.get()
        try:
            pickle.dump(texts, process.stdin)  # type: ignore[arg-type]
            process.stdin.flush()  # type: ignore[union-attr]
            answer: Encoded = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"a process that encodes text ended with status {process.wait()}") from error
        finally:
            self._idle.put(process)
        return answer


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with suppress(BrokenPipeError):
        process.communicate()


def main() -> None:
    """Answer batches until the input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer = pickle.load(source)
        while True:
            pickle.dump(encode(tokenizer, pickle.load(source)), sink)
            sink.flush()
    except (EOFError, BrokenPipeError):  # the parent has ended
        os._exit(0)


if __name__ == "__main__":
    main()
