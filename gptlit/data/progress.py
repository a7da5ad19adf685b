"""The bars of long preparations: on a terminal they move, elsewhere a line is written now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gptlit.data.prepare import Report

LINE_EVERY = 30.0  # seconds between two lines where there is no terminal


@contextmanager
def downloading(name: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows (bytes so far, bytes in all)."""
    text = TextColumn("fetching {task.fields[name]}", markup=False)
    with _bar(name, text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as show:
        yield lambda done, size: show(done, size, f"fetching {name}: {done:,} of {size:,} bytes", {})


@contextmanager
def preparing(name: str) -> Iterator[Callable[[Report], None]]:
    """Give a function that shows a `Report`."""
    begun, before = time.monotonic(), -1  # what an earlier process did counts for nothing
    text = TextColumn("preparing {task.fields[name]}", markup=False)
    rate = TextColumn("{task.fields[tokens]:,} tokens{task.fields[speed]}")
    with _bar(name, text, BarColumn(), DownloadColumn(), rate, TimeRemainingColumn()) as show:

        def report(now: Report) -> None:
            nonlocal begun, before
            if before < 0:
                begun, before = time.monotonic(), now.text_bytes
            read = now.text_bytes - before
            speed = f", {read / 1e6 / max(1e-9, time.monotonic() - begun):.1f} MB/s" if read else ""
            fields: dict[str, int | str] = {"tokens": now.tokens, "speed": speed}
            of = f" of {now.size:,}" if now.size else ""
            line = f"preparing {name}: {now.read:,}{of} bytes, {now.tokens:,} tokens{speed}"
            show(now.read, now.size or None, line, fields)

        yield report


Show = Callable[[int, int | None, str, dict[str, int | str]], None]


@contextmanager
def _bar(name: str, *columns: ProgressColumn) -> Iterator[Show]:
    console = Console(stderr=True)
    last = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, visible=False, name=name, tokens=0, speed="")

        def show(done: int, total: int | None, line: str, fields: dict[str, int | str]) -> None:
            nonlocal last
            progress.update(task, completed=done, total=total, visible=True, **fields)  # type: ignore[arg-type]
            if not console.is_terminal and time.monotonic() - last > LINE_EVERY:
                console.print(line, soft_wrap=True, highlight=False, markup=False)
                last = time.monotonic()

        yield show
