"""TokenDataModule: a corpus by name -> batches of windows, the same whatever the number of devices."""

import atexit
import math
import multiprocessing.util  # registers at exit what waits for all children, before `kill_workers`
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from gptlit.config import GPTConfig
from gptlit.data.parsers import ReadOptions
from gptlit.data.prepare import cache_folder, prepare_cached
from gptlit.data.progress import preparing
from gptlit.data.sources import open_corpus
from gptlit.data.splitting import Split
from gptlit.data.token_files import (
    MANIFEST,
    SPLITS,
    TokenData,
    concatenate,
    folder_tokenizer,
    holds_tokens,
    is_prepared,
    open_folder,
)
from gptlit.data.tokenizer import fingerprint, load_tokenizer, tokenizer_spec
from gptlit.data.windows import EvalSampler, TrainSampler, WeightedMixture, Windows
from gptlit.errors import InputError, user_path

Identity = Literal["corpus", "tokenizer", "seed", "stride", "weights"]


@dataclass
class WeightedSource:
    """One of several corpora.

    Args:
        path: As `data.source`.
        weight: Its part of the windows that train, in proportion to the weights of the others.
    """

    path: str
    weight: float = 1.0


def tokenizer_for(source: str | Sequence[WeightedSource], tokenizer: str | None, default: str = "gpt2") -> str:
    """Return what `load_tokenizer` makes the tokenizer of: the one that is named, else that of the first prepared
    folder, else the default.
    """
    paths = [source] if isinstance(source, str) else [part.path for part in source]
    found = (folder_tokenizer(user_path(path)) for path in paths)
    return tokenizer or next(filter(None, found), default)


def micro_batch_size(batch_size: int, devices: int, most: int | None) -> int:
    """Return how many of `batch_size` windows each of `devices` takes at once, at most `most`, without a remainder."""
    share = max(1, batch_size // devices)
    return next(size for size in range(min(most or share, share), 0, -1) if share % size == 0)


def check_division(batch_size: int, devices: int) -> None:
    """Insist that every device gets as many windows.

    Raises:
        InputError: It is not so.
    """
    if batch_size % devices:
        raise InputError(
            f"data.batch_size {batch_size} is that of all devices together, and not divisible by {devices} of them: "
            f"set it to a multiple of {devices}"
        )


def check_trainer_settings(settings: Any) -> None:
    """Refuse what a Trainer, or its configuration, would decide about batches.

    Raises:
        InputError: It is set; the remedy is named.
    """
    for key in ("max_steps", "max_epochs"):
        if getattr(settings, key) == 0 and not settings.fast_dev_run:
            raise InputError(f"trainer.{key} 0 trains nothing: set it to a positive number")
    if settings.accumulate_grad_batches != 1:
        raise InputError(
            f"trainer.accumulate_grad_batches {settings.accumulate_grad_batches} is not for setting: it follows from "
            "data.batch_size, data.micro_batch_size and the number of devices"
        )
    for key, default in {"limit_train_batches": 1.0, "overfit_batches": 0.0}.items():
        value = getattr(settings, key)
        if value not in (None, default) and not settings.fast_dev_run:
            raise InputError(f"trainer.{key} {value} cannot be used here: shorten a run with trainer.max_steps")


def ignore_signals(_: int) -> None:
    """Let a loader's worker go on when its whole process group is signalled: the training process ends it.

    A worker that ignored no signal would die by Ctrl-C, or by SLURM's or systemd's SIGTERM, before the training
    process has saved. One whose parent has gone ends by itself.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers() -> None:
    """End what Python would end at exit by SIGTERM, and wait for: workers of a loader that is still in use."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class TokenDataModule(pl.LightningDataModule):
    """Serves (inputs, targets), int64 (B, T) each, targets one token to the right.

    Args:
        source: "python-docs" (the documentation that comes with Python); a text, .jsonl or .parquet file, a folder or a
            glob of them; hf:OWNER/NAME; a name of the catalogue; or a folder of tokens: one that was prepared here,
            nanoGPT's `train.bin` and `val.bin`, llm.c's shards. Or a list of {path, weight}.
        batch_size: Windows in one optimizer step, over all devices.
        micro_batch_size: Windows that one device takes at once, at most; None: as many as one step needs. What is
            missing to `batch_size` is accumulated.
        tokenizer: Name of a tiktoken encoding or path of a Hugging Face `tokenizer.json`; None: the one that made a
            prepared folder, else gpt2.
        context_length: Window length in tokens; None: the model's.
        stride: Tokens between the starts of two windows; None: `context_length`.
        val_fraction: Share of the corpus that validates: of the documents, or of the characters of a single text.
        test_fraction: Share that tests.
        val_source: Another source that validates, whole, instead of a share.
        test_source: Another source that tests.
        text_key: Key or column of the text in .jsonl and .parquet.
        separator: What stands between two documents of a text file; empty: a file is one document.
        dtype: Number type of token files without a header (nanoGPT's).
        seed: Of the order of windows; None: that of `seed_everything`.
        resume_despite: What may differ from the checkpoint on a resume: corpus, tokenizer, seed, stride or weights. The
            position is then one in another order.
        num_workers: Processes that read ahead; 0 reads in the training process.
        cache_dir: Folder for tokenised corpora.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        source: str | list[WeightedSource] = "python-docs",
        batch_size: int = 16,
        micro_batch_size: int | None = None,
        tokenizer: str | None = None,
        context_length: int | None = None,
        stride: int | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        val_source: str | None = None,
        test_source: str | None = None,
        text_key: str = "text",
        separator: str = "",
        dtype: Literal["uint16", "uint32"] = "uint16",
        seed: int | None = None,
        resume_despite: list[Identity] | None = None,
        num_workers: int = 0,
        cache_dir: str = "data",
    ) -> None:
        super().__init__()
        for key, value in {
            "batch_size": batch_size,
            "micro_batch_size": micro_batch_size,
            "context_length": context_length,
            "stride": stride,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key} must be a positive integer, got {value}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {num_workers}")
        if not source:
            raise ValueError("data.source is empty: name a file, a folder, or a list of {path, weight}")
        self.source = source
        self.sources = [WeightedSource(source)] if isinstance(source, str) else list(source)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.tokenizer = load_tokenizer(tokenizer_for(source, tokenizer))
        self.context_length = context_length
        self.stride = stride
        self.split = Split(0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction)
        self.other_sources = {"val": val_source, "test": test_source}
        self.reading = ReadOptions(text_key, separator)
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.dtype = dtype
        self.resume_despite = resume_despite or []
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir)
        self.accumulation = 1
        self.micro_batch_size_used = micro_batch_size or batch_size
        self._limits: tuple[int, int | None] = (-1, None)
        self.start = 0  # position of the first window of this fit, over all devices
        self.start_step = 0
        self.max_steps = -1
        self._configured: pl.Trainer | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return self.tokenizer.n_vocab

    def prepare_data(self) -> None:
        """Tokenise the corpus unless that is done already, and find what is wrong before anything is written.

        Raises:
            InputError: As in `setup`.
        """
        stage = self.trainer.state.fn if self.trainer is not None else None
        self.load(stage)
        if stage == "fit":
            self._plan(self._trainer())

    def setup(self, stage: str | None = None) -> None:
        """Open the windows of each split; before a fit, set the Trainer's accumulation and number of steps.

        Raises:
            InputError: Data and model or data and Trainer do not fit together, or a split is too short.
        """
        self.load(stage)
        if stage == "fit" and self._trainer() is not self._configured:
            self._configure(self._trainer())

    def load(self, stage: str | None) -> None:
        """Open the windows of each split; tokenise first what is not tokenised.

        Raises:
            InputError: A split that the stage needs is too short.
        """
        length = self._length()
        if not hasattr(self, "data"):  # `setup` comes after `prepare_data` on the first device, alone on the others
            corpora = [self._open(part.path, self.split) for part in self.sources]
            self.data = concatenate(corpora)
            for name, source in self.other_sources.items():
                if source is not None:
                    other = self._open(source, Split(0.0))
                    shards = [shard for split in SPLITS for shard in other.shards(split)]
                    self.data = replace(self.data, splits={**self.data.splits, name: shards})
            counts = [len(self._windows(corpus, "train", length)) for corpus in corpora]
            self.mixture = WeightedMixture(counts, [part.weight for part in self.sources], self.seed)
        self.windows = {name: self._windows(self.data, name, length) for name in SPLITS}
        needed = {"fit": ["train"] + ["val"] * self._is_val_wanted, "validate": ["val"], "test": ["test"]}
        for name in needed.get(stage or "", []):
            self._require(name)

    @property
    def is_prepared(self) -> bool:
        """Whether everything that is needed is there, as tokens: nothing would be downloaded or tokenised."""
        used = [(part.path, self.split) for part in self.sources]
        used += [(path, Split(0.0)) for path in self.other_sources.values() if path is not None]
        return all(self._is_prepared(path, split) for path, split in used)

    def _is_prepared(self, path: str, split: Split) -> bool:
        folder = user_path(path)
        if holds_tokens(folder) or not (path == "python-docs" or folder.exists()):
            return holds_tokens(folder)
        corpus = open_corpus(path, self.reading, self.cache_dir / "downloads")
        return (cache_folder(corpus, self.cache_dir, self.tokenizer, split) / MANIFEST).is_file()

    @property
    def _is_val_wanted(self) -> bool:
        return self.split.val_fraction > 0 or self.other_sources["val"] is not None

    def _windows(self, data: TokenData, name: str, length: int) -> Windows:
        pin = self.num_workers == 0 and torch.cuda.is_available()  # workers leave it to the loader
        return Windows(data.shards(name), length, self.stride or length, self.vocab_size, pin)

    def _open(self, path: str, split: Split) -> TokenData:
        """Open a folder of token files, or tokenise a corpus unless that is done already."""
        folder = user_path(path)
        if holds_tokens(folder):
            return open_folder(folder, self.tokenizer, self.dtype)
        corpus = open_corpus(path, self.reading, self.cache_dir / "downloads")
        with preparing(corpus.name) as report:
            return prepare_cached(corpus, self.cache_dir, self.tokenizer, split, report)

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("this needs a Trainer: pass the TokenDataModule to trainer.fit")
        return self.trainer

    def _length(self) -> int:
        """Return the context length."""
        config = getattr(getattr(self.trainer, "lightning_module", None), "config", None)
        if config is not None:
            return self.check_compatible(config)
        if self.context_length is None:
            raise InputError("data.context_length is needed where there is no model to take it from")
        return self.context_length

    def check_compatible(self, config: GPTConfig) -> int:
        """Return the context length of a model that reads these data.

        Raises:
            InputError: The model contradicts `data.context_length` or the tokenizer.
        """
        if self.context_length not in (None, config.context_length):
            raise InputError(
                f"data.context_length {self.context_length} contradicts model.config.context_length "
                f"{config.context_length}: leave data.context_length out"
            )
        if config.vocab_size != self.vocab_size:
            raise InputError(
                f"model.config.vocab_size {config.vocab_size} contradicts the tokenizer {self.tokenizer.name!r} with "
                f"{self.vocab_size} ids: leave model.config.vocab_size out, or set it to {self.vocab_size}"
            )
        return config.context_length

    def _require(self, name: str) -> None:
        """Insist on at least one window in a split."""
        windows = self.windows[name]
        if name == "train" and len(self.sources) > 1 and 0 in self.mixture.n_windows:
            path = self.sources[self.mixture.n_windows.index(0)].path
            raise InputError(
                f"the train part of {path!r} is too short for one window of {windows.context_length} + 1: use a longer "
                "text or a smaller model.config.context_length"
            )
        longest = max((shard.tokens for shard in windows.shards), default=0)
        if not len(windows) and self.data.tokens(name) > windows.context_length:
            raise InputError(
                f"the longest shard of the {name} part of {self.source!r} has {longest} tokens, too few for a window "
                f"of {windows.context_length} + 1: prepare it again with a larger --shard_tokens"
            )
        if not len(windows):
            raise InputError(
                f"the {name} part of {self.source!r} has {self.data.tokens(name)} tokens, too few for one window of "
                f"{windows.context_length} + 1: use {self._remedies(name)}"
            )

    def _remedies(self, name: str) -> str:
        """Return what gives a part a window, or does without."""
        remedies = []
        if name != "train" and self.other_sources[name] is None:
            folder = user_path(self.sources[0].path)
            if is_prepared(folder):
                remedies.append(f"a folder prepared with a larger --{name}_fraction")
            elif not holds_tokens(folder):
                remedies.append(f"a larger data.{name}_fraction")
            remedies.append(f"data.{name}_source")
            if name == "val":
                remedies.append("data.val_fraction 0, which trains without")
        if self.data.tokens(name) or not remedies:
            remedies += ["a longer text", "a smaller model.config.context_length"]
        return ", ".join(remedies[:-1]) + " or " + remedies[-1]

    def _plan(self, trainer: pl.Trainer) -> tuple[int, int]:
        """Return (micro-batch size, accumulation), and remember what limits the run."""
        if trainer is self._configured:
            return self.micro_batch_size_used, self.accumulation
        self._limits = trainer.max_steps, trainer.max_epochs
        self._steps()
        check_trainer_settings(trainer)
        devices = trainer.world_size
        check_division(self.batch_size, devices)
        size = micro_batch_size(self.batch_size, devices, self.micro_batch_size)
        if devices > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError("trainer.use_distributed_sampler must be false: windows are dealt out to the devices here")
        return size, self.batch_size // (devices * size)

    def _set_steps(self, trainer: pl.Trainer) -> None:
        self.max_steps = trainer.fit_loop.epoch_loop.max_steps = self._steps()

    def _configure(self, trainer: pl.Trainer) -> None:
        """Tell the Trainer; it counts accumulation and the interval of validation in micro-batches."""
        self.start = self.start_step = 0
        self.micro_batch_size_used, self.accumulation = self._plan(trainer)
        self._set_steps(trainer)
        trainer.accumulate_grad_batches = self.accumulation
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.limit_train_batches = int(trainer.limit_train_batches) * self.accumulation
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= self.accumulation
        self._configured = trainer

    def _steps(self) -> int:
        """Return the optimizer steps of the whole run, counted from its beginning."""
        max_steps, max_epochs = self._limits
        limits = [max_steps] if max_steps != -1 else []
        if max_epochs is not None and max_epochs != -1:
            left = max_epochs * len(self.windows["train"]) - self.start
            limits.append(self.start_step + max(0, math.ceil(left / self.batch_size)))
        if not limits:
            raise InputError("a run needs an end: set trainer.max_steps or trainer.max_epochs")
        return min(limits)

    def _loader(self, name: str, order: Sampler[np.ndarray]) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        return DataLoader(
            self.windows[name],
            sampler=order,
            batch_size=None,  # the order gives whole batches of indices
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
            generator=torch.Generator(),  # a loader must not draw from the global stream, which dropout uses
        )

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Serve what is left of the run, from the position where it stands."""
        trainer = self._trainer()
        order = TrainSampler(
            self.mixture,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size_used,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=self.start,
            steps=max(0, self.max_steps - self.start_step),
        )
        return self._loader("train", order)

    def _eval_dataloader(self, name: str) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        size = self.micro_batch_size or max(1, self.batch_size // world_size)
        windows = len(self.windows[name])
        return self._loader(name, EvalSampler(windows, micro_batch_size=size, rank=rank, world_size=world_size))

    def val_dataloader(self) -> Any:
        """Serve every window of the validation part once, in order; nothing where there is no such part."""
        return self._eval_dataloader("val") if len(self.windows["val"]) else []

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Serve every window of the test part once, in order."""
        return self._eval_dataloader("test")

    def _position_after(self, step: int) -> int:
        """Return the position of the first window after `step` optimizer steps, over all devices."""
        return self.start + (step - self.start_step) * self.batch_size

    @property
    def position(self) -> int:
        """Position of the next window, over all devices, after the last optimizer step."""
        return self._position_after(self._trainer().global_step)

    def addresses(self, step: int) -> list[dict[str, Any]]:
        """Return where the windows of the optimizer step after `step` steps are: file and offset in tokens."""
        windows = self.windows["train"]
        positions = self._position_after(step) + np.arange(self.batch_size)
        found = [windows.address(int(window)) for window in self.mixture(positions)]
        return [{"step": step + 1, "shard": str(windows.shards[s].path), "offset": offset} for s, offset in found]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data: the position, and what it is a position in."""
        return {
            "step": self._trainer().global_step,
            "windows": self.position,
            "source": self.source if isinstance(self.source, str) else [asdict(part) for part in self.sources],
            "tokenizer": tokenizer_spec(self.tokenizer),
            "tokenizer_sha256": fingerprint(self.tokenizer),
            "corpus": self.data.fingerprint,
            **self._order,
        }

    @property
    def _order(self) -> dict[str, Any]:
        """What the order of windows depends on beside the corpus."""
        weights = [part.weight for part in self.sources]
        return {"seed": self.seed, "stride": self.windows["train"].stride, "weights": weights}

    def bytes_per_token(self) -> dict[str, float]:
        """Return how many bytes of text a token of a split stands for, where that is known."""
        parts = self.data.manifest.get("splits", {})
        own = [name for name in parts if not self.other_sources.get(name) and self.data.tokens(name)]
        return {name: parts[name]["bytes"] / self.data.tokens(name) for name in own}

    @property
    def names(self) -> list[str]:
        """A name for each corpus."""
        names = [Path(part.path).name for part in self.sources]
        return names if len(set(names)) == len(names) else [f"{index}-{name}" for index, name in enumerate(names)]

    def drawn(self) -> dict[str, int]:
        """Return how many windows of each corpus were served up to the last optimizer step."""
        return dict(zip(self.names, self.mixture.drawn(self.position), strict=True))

    def describe_mixture(self) -> list[str]:
        """Return a line on each corpus, where there are several."""
        if len(self.sources) == 1:
            return []
        end = self.mixture.drawn(self.start + (self.max_steps - self.start_step) * self.batch_size)
        shares = self.mixture.shares / self.mixture.shares.sum()
        return [
            f"{name}: {share:.1%} of the windows; {count / windows:.2f} of its epochs by the end of the run"
            for name, share, count, windows in zip(self.names, shares, end, self.mixture.n_windows, strict=True)
        ]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the position of a checkpoint.

        Raises:
            InputError: The checkpoint is of another corpus.
        """
        if self._trainer().state.fn != "fit":
            return
        source = f" ({self.source!r}, the checkpoint's {state['source']!r})"
        name = f" (this one is {self.tokenizer.name!r})"
        now = {
            "tokenizer": (fingerprint(self.tokenizer)[:12], state.get("tokenizer_sha256", "")[:12], name),
            "corpus": (self.data.fingerprint[:12], state["corpus"][:12], source),
            **{key: (value, state.get(key, value), "") for key, value in self._order.items()},
        }
        for key, (ours, theirs, what) in now.items():
            if theirs not in (ours, "") and key not in self.resume_despite:
                label = {"seed": "data.seed", "stride": "data.stride", "weights": "list of weights"}.get(key, key)
                raise InputError(
                    f"the {label} is {ours}, but the checkpoint was trained with {theirs}{what}: "
                    f"resume with that, start a new run with --model.init_from, or set data.resume_despite to [{key}]"
                )
        if any(first >= state["windows"] for first, _ in state.get("passed_over", [])):  # gptlit 0.1 could do that
            raise InputError(
                "the checkpoint leaves out windows that are still to come (its passed_over), which is not supported "
                "any more: resume from another checkpoint, or start a new run with --model.init_from"
            )
        self.start, self.start_step = state["windows"], state["step"]
        self._set_steps(self._trainer())
        if self.start_step >= self.max_steps:
            raise InputError(
                f"the run has made its {self.start_step} steps already (trainer.max_steps {self.max_steps}): raise "
                "trainer.max_steps or trainer.max_epochs, which count from its beginning"
            )
