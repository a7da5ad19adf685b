"""The progress bar of a preparation; without a terminal, a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from gptlit.data.prepare import Report

LINE_EVERY = 30.0  # seconds between two lines without a terminal


@contextmanager
def preparing(name: str) -> Iterator[Callable[[Report], None]]:
    """Yield a function that displays a `Report`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("preparing {task.fields[name]}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]:,} tokens{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    first: Report | None = None  # what an earlier process did does not count for the rate
    begun = last = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, visible=False, name=name, tokens=0, speed="")

        def show(now: Report) -> None:
            nonlocal first, begun, last
            if first is None:
                first, begun = now, time.monotonic()
            encoded = (now.text_bytes - first.text_bytes) / 1e6
            speed = f", {encoded / max(1e-9, time.monotonic() - begun):.1f} MB/s" if encoded else ""
            size = now.size or None
            progress.update(task, completed=now.read, total=size, visible=True, tokens=now.tokens, speed=speed)
            if not console.is_terminal and time.monotonic() - last > LINE_EVERY:
                of = f" of {now.size:,}" if now.size else ""
                line = f"preparing {name}: {now.read:,}{of} bytes, {now.tokens:,} tokens{speed}"
                console.print(line, soft_wrap=True, highlight=False, markup=False)
                last = time.monotonic()

        yield show
