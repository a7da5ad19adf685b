"""What Windows and macOS do in another way than Linux, simulated."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import run_script
from gptlit import errors
from gptlit.checkpoint.export import save_pretrained
from gptlit.checkpoint.runs import checkpoint_path, checkpoints
from gptlit.config import GPTConfig
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.prepare import prepare
from gptlit.data.sources import open_corpus
from gptlit.data.splitting import Split
from gptlit.data.tokenizer import load_tokenizer
from gptlit.model.gpt import GPTModel
from gptlit.training import environment
from gptlit.training.callbacks import monitoring
from gptlit.training.gradients import NonFiniteGuard, clip_gradients
from gptlit.training.module import GPTModule

RUN = Path("runs/t/version_0")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No links, no POSIX signals and calls, and no deletion of the first checkpoint, as if it were mapped."""
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"):
        monkeypatch.delattr(signal, name)
    for name in ("sysconf", "posix_fadvise", "sched_getaffinity", "O_DIRECTORY"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(monitoring, "resource", None)
    monkeypatch.setattr(environment, "sys", SimpleNamespace(platform="win32"))
    unlink = Path.unlink

    def refuse(path: Path, **options: Any) -> None:
        if path == checkpoint_path(RUN, 1):
            raise PermissionError(13, "The process cannot access the file because it is being used")
        unlink(path, **options)

    def forbid(*_: Any) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "symlink_to", forbid)


def test_a_run_needs_no_links_no_posix_calls_and_no_deletion(
    fit: Callable[..., None], windows: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = iter([3.0, 1.0, 2.0, 4.0])

    def log_mean(self: GPTModule) -> None:
        self.log_dict({"val/loss": next(values), "val/perplexity": 1.0})

    monkeypatch.setattr(GPTModule, "on_validation_epoch_end", log_mean)
    every = ["--run.val_every_n_steps=1", "--run.save_every_n_steps=1", "--run.keep_last=1"]
    fit("--trainer.max_steps=4", *every)
    assert checkpoints(RUN) == [checkpoint_path(RUN, step) for step in (1, 2, 4)]
    assert f"best        1.0000 at step 2: {checkpoint_path(RUN, 2)}" in capsys.readouterr().out


def test_a_signal_saves(fit: Callable[..., None], windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = GPTModule.training_step

    def stop(self: GPTModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", stop)
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=4")
    assert exit_.value.code == 128 + signal.SIGINT
    assert checkpoints(RUN) == [checkpoint_path(RUN, 2)]


def test_what_is_proposed_next_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.shell_quote("my runs/gpt") == "'my runs/gpt'"
    monkeypatch.setattr(errors, "os", SimpleNamespace(name="nt"))
    assert errors.shell_quote(r"C:\my runs\gpt", r"D:\gpt") == r'"C:\my runs\gpt" D:\gpt'


def test_configurations_are_utf8_whatever_the_locale_says(tmp_path: Path) -> None:
    script = (
        "from gptlit.training.parser import Parser\n"
        "parser = Parser()\nparser.add_argument('--config', action='config')\nparser.add_argument('--text')\n"
        "parser.save(parser.parse_args(['--config=a.yaml']), 'b.yaml')\n"
    )
    (tmp_path / "a.yaml").write_text("text: Жили-были ½\n", encoding="utf-8")
    strict = [f"-Werror::EncodingWarning:jsonargparse.{module}" for module in ("_core", "_paths")]
    result = run_script("-Xwarn_default_encoding", *strict, "-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "b.yaml").read_text(encoding="utf-8") == "text: Жили-были ½\n"


def test_an_export_into_an_empty_folder_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if target.is_dir():
            raise PermissionError(13, "Access is denied")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    (tmp_path / "out").mkdir()
    config = GPTConfig(vocab_size=50257, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    save_pretrained(GPTModel(config), tmp_path / "out", "book")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pth"]


# --- processes that are not forked


@pytest.mark.parametrize("rows", [False, True], ids=["windows", "rows"])
def test_a_loaders_worker_gets_a_copy_that_serves_the_same(text: str, rows: bool) -> None:
    Path("a.tsv" if rows else "a.txt").write_text("ham\tyes\nspam\tno\n" * 20 if rows else text)
    datamodule = TokenDataModule("a.tsv" if rows else "a.txt", context_length=16)
    datamodule.setup()
    windows = datamodule.run_data.splits["train"]
    copy = pickle.loads(pickle.dumps(windows))
    for ours, theirs in zip(windows[np.array([3, 0, -1])], copy[np.array([3, 0, -1])], strict=True):
        assert torch.equal(ours, theirs)


def test_workers_that_are_spawned_encode_the_same(text_file: Path, tmp_path: Path) -> None:
    corpus, gpt2, before = open_corpus(str(text_file)), load_tokenizer("gpt2"), multiprocessing.get_start_method()
    ours = prepare(corpus, tmp_path / "ours", gpt2, Split(0.1))
    multiprocessing.set_start_method("spawn", force=True)
    try:
        theirs = prepare(corpus, tmp_path / "theirs", gpt2, Split(0.1), num_workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert theirs.fingerprint == ours.fingerprint


# --- a Mac's GPU


@pytest.mark.parametrize("gradient", [10.0, float("nan")])
def test_clipping_and_skipping_do_without_the_fused_kernels_help(
    gradient: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metal's fused AdamW takes `grad_scale` and `found_inf`, and ignores them."""
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.full((4,), gradient)
    monkeypatch.setattr(type(parameter), "device", torch.device("mps"), raising=False)
    norm = clip_gradients(optimizer, 1.0, "norm")
    guard = NonFiniteGuard()
    guard.check(optimizer, norm)
    monkeypatch.undo()
    assert (optimizer.grad_scale, getattr(optimizer, "found_inf", None)) == (None, None)
    assert guard.in_a_row == (parameter.grad is None) == np.isnan(gradient)
    if parameter.grad is not None:
        assert parameter.grad.norm() == pytest.approx(1.0, rel=1e-5)
