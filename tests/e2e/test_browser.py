"""TensorBoard's page of a run, in a real browser. With SCREENSHOT=FILE.png in the environment the charts are kept."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)"),
]


@pytest.fixture
def page(fit: Callable[..., None]) -> Iterator[Any]:
    """A browser's page, and TensorBoard on a run as its base address."""
    from playwright.sync_api import sync_playwright

    fit("--trainer.max_steps=30", "--run.val_every_n_steps=10", "--run.sample_prompt=Return the")
    logdir = os.environ.get("LOGDIR", "runs")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--port", str(port), "--load_fast=false"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as board:
        try:
            base = f"http://127.0.0.1:{port}/"
            wait_for(base)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
                page = browser.new_page(base_url=base, viewport={"width": 1500, "height": 950})
                page.set_default_timeout(60_000)
                yield page
                browser.close()
        finally:
            board.terminate()


def wait_for(address: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"nothing answers at {address}")


def test_the_page_has_curves_charts_samples_and_settings(page: Any) -> None:
    page.goto("/#timeseries")
    for group in ("train", "val", "perf"):
        page.get_by_text(group, exact=True).first.wait_for()
    tags = page.request.get("/data/plugin/scalars/tags").json()
    served = {tag for run in tags.values() for tag in run}
    assert {"train/loss", "val/loss", "val/bits_per_byte", "perf/tokens_per_second", "time/data"} <= served
    if name := os.environ.get("SCREENSHOT"):
        time.sleep(5)
        page.screenshot(path=name)
    page.goto("/#custom_scalars")
    page.reload()
    page.get_by_text("train and val", exact=True).first.wait_for()
    if name:
        time.sleep(5)
        page.screenshot(path=str(Path(name).with_stem(Path(name).stem + "-losses")))
    page.goto("/#text")
    page.reload()
    page.get_by_text("samples", exact=False).first.wait_for()
    page.get_by_text("Return the", exact=False).first.wait_for()
    page.goto("/#hparams")
    page.reload()
    for words in ("model.lr", "val/loss"):
        page.get_by_text(words, exact=False).first.wait_for()
