"""Shared by the tests: a text, a tiny model's flags, the command line run in this process, the commands of a page."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tensorboard.summary.writer import event_file_writer

os.environ["OMP_NUM_THREADS"] = "1"  # here and in processes of tests: threads of tiny models only wait for each other
if hasattr(signal, "SIGHUP"):  # ignored under nohup, which a fit respects
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_speed")
# TensorBoard reads event files in the order of their names, which end in a count: within a second, 9 would follow 10.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10_000)

ROOT = Path(__file__).parent.parent

TINY = [
    "--model.config.context_length=16",
    "--model.config.emb_dim=32",
    "--model.config.n_heads=2",
    "--model.config.n_layers=2",
    "--model.config.drop_rate=0",
    "--model.config.init=gpt2",
    "--model.lr=3e-3",
    "--data.batch_size=4",
    "--data.val_fraction=0.1",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--run.name=t",
    "--run.peak_tflops=0.01",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and prepared data of a test stay in its own folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def text() -> str:
    """A few thousand words, drawn from a small vocabulary."""
    words = "the a model learns from data to write text about trees and rivers in winter , slowly .".split()
    return " ".join(random.Random(0).choices(words, k=4000))


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> Path:
    """The text as a file."""
    path = tmp_path / "words.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 ids, trained here."""
    return train_tokenizer(["the model learns to write text about trees and rivers"] * 20, tmp_path_factory)


@pytest.fixture(scope="session")
def words_json(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with an id for each word of the text and for " dragon": tiny fits spend most of their time on GPT-2's ids."""
    return train_tokenizer([text, " dragon" * 50], tmp_path_factory)


def train_tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the `tokenizer.json` of a byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def fit(text_file: Path, words_json: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`train.py fit` of a tiny model on the text, in this process; samples are short, the vocabulary is small."""
    from gptlit.training.callbacks.validation import SampleText
    from gptlit.training.cli import main

    monkeypatch.setattr(SampleText.__init__, "__defaults__", (8, 0))

    def run(*args: str, command: str = "fit") -> None:
        tiny = TINY if command == "fit" else [flag for flag in TINY if "log_every" not in flag]
        one_parser(monkeypatch, command)
        main([command, *tiny, f"--data.source={text_file}", f"--data.tokenizer={words_json}", *args])

    return run


def one_parser(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Build the parser of one command of train.py only: those of the others take most of the start."""
    from gptlit.training.cli import TrainingCLI

    arguments = _subcommands()[command]
    monkeypatch.setattr(TrainingCLI, "subcommands", staticmethod(lambda: {command: arguments}))


@cache
def _subcommands() -> dict[str, set[str]]:
    from gptlit.training.cli import TrainingCLI

    return TrainingCLI.subcommands()


def run_script(*args: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python on a script of the project in a process of its own, as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def losses(run: Path, tag: str = "train/loss") -> dict[int, float]:
    """Read a curve of a run from TensorBoard's files: step -> value. A step may be there once.

    TensorBoard reads files of the same second in the order of the process numbers, so a resume may come first.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars(tag)
    curve = {event.step: event.value for event in found}
    assert len(curve) == len(found)
    return curve


def text_of(page: Path) -> str:
    """Return the text of a page; of a notebook, that of its text cells."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the text of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in a page: in its blocks, and in backticks."""
    text = text_of(page)
    blocks = "\n".join(block for kind, block in code_blocks(text) if not kind).replace("\\\n", " ")
    inline = re.findall(r"`((?:python |gptlit )[^`\n]+)`", text)
    for line in [*blocks.splitlines(), *inline]:
        line = re.sub(r"^\.venv/bin/", "", line.strip()).replace("$seed", "1")  # in a loop of the shell
        if re.match(r"(python (-m gptlit|-m benchmarks|train.py|examples/\w+.py) |gptlit |torchrun |sbatch )", line):
            yield shlex.split(line, comments=True)
