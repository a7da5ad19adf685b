"""TokenDataModule: a corpus by name -> batches of windows, the same whatever the number of devices."""

import math
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from gptlit.data.corpus import open_corpus
from gptlit.data.tokenizer import load_tokenizer
from gptlit.data.tokens import MANIFEST, SPLITS, Split, TokenData, check_vocabulary, open_foreign, open_tokens, prepare
from gptlit.data.windows import EvalOrder, TrainOrder, Windows
from gptlit.errors import InputError


class TokenDataModule(pl.LightningDataModule):
    """Serves (inputs, targets), int64 (B, T) each, targets one token to the right.

    Args:
        source: "python-docs" (the documentation that comes with Python), a UTF-8 text file, a folder of .txt files,
            or a glob; or a folder of tokens: one that was prepared here, nanoGPT's `train.bin` and `val.bin`, llm.c's
            shards.
        batch_size: Windows in one optimizer step, over all devices.
        micro_batch_size: Windows that one device takes at once; None: as many as one step needs. What is missing to
            `batch_size` is accumulated.
        tokenizer: Name of a tiktoken encoding.
        context_length: Window length in tokens; None: the model's.
        stride: Tokens between the starts of two windows; None: `context_length`.
        val_fraction: Share of the corpus that validates: of the documents, or of the characters of a single text.
        test_fraction: Share that tests.
        dtype: Number type of token files without a header (nanoGPT's).
        seed: Of the order of windows; None: that of `seed_everything`.
        num_workers: Processes that read ahead; 0 reads in the training process.
        cache_dir: Folder for tokenised corpora.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        source: str = "python-docs",
        batch_size: int = 16,
        micro_batch_size: int | None = None,
        tokenizer: str = "gpt2",
        context_length: int | None = None,
        stride: int | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        dtype: Literal["uint16", "uint32"] = "uint16",
        seed: int | None = None,
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
        self.source = source
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.tokenizer = load_tokenizer(tokenizer)
        self.context_length = context_length
        self.stride = stride
        self.split = Split(val_fraction, test_fraction)
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.dtype = dtype
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir)
        self.accumulation = 1
        self._micro_batch_size = micro_batch_size or batch_size
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
        self._load(stage)
        if stage == "fit":
            self._plan(self._trainer())

    def setup(self, stage: str | None = None) -> None:
        """Open the windows of each split; before a fit, set the Trainer's accumulation and number of steps.

        Raises:
            InputError: Data and model or data and Trainer do not fit together, or a split is too short.
        """
        self._load(stage)
        if stage == "fit" and self._trainer() is not self._configured:
            self._configure(self._trainer())

    def _load(self, stage: str | None) -> None:
        if not hasattr(self, "data"):  # `setup` comes after `prepare_data` on the first device, alone on the others
            self.data = self._open()
        length = self._agree_with_model()
        self.windows = {name: Windows(self.data.shards(name), length, self.stride or length) for name in SPLITS}
        needed = {"fit": ["train"] + ["val"] * (self.split.val_fraction > 0), "validate": ["val"], "test": ["test"]}
        for name in needed.get(stage or "", []):
            self._require(name)

    def _open(self) -> TokenData:
        """Open a folder of token files, or tokenise a corpus unless that is done already."""
        folder = Path(self.source).expanduser()
        if (folder / MANIFEST).is_file():
            data = open_tokens(folder)
            if data.tokenizer != self.tokenizer.name:
                raise InputError(
                    f"data.tokenizer {self.tokenizer.name!r} contradicts {folder}, which {data.tokenizer!r} made: "
                    f"set data.tokenizer to {data.tokenizer!r}"
                )
            return data
        if folder.is_dir() and any(folder.glob("*.bin")):
            data = open_foreign(folder, self.dtype)
            check_vocabulary(data, self.vocab_size)
            return data
        return prepare(open_corpus(self.source), self.cache_dir, self.tokenizer, self.split)

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("this needs a Trainer: pass the TokenDataModule to trainer.fit")
        return self.trainer

    def _agree_with_model(self) -> int:
        """Return the context length; model and data must not contradict each other."""
        config = getattr(getattr(self.trainer, "lightning_module", None), "config", None)
        if config is None:
            if self.context_length is None:
                raise InputError("data.context_length is needed where there is no model to take it from")
            return self.context_length
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
        return int(config.context_length)

    def _require(self, name: str) -> None:
        """Insist on at least one window in a split."""
        windows = self.windows[name]
        if not len(windows):
            is_cut_here = name != "train" and self.data.folder.parent == self.cache_dir
            share = f"a larger data.{name}_fraction, " if is_cut_here else ""
            raise InputError(
                f"the {name} part of {self.source!r} has {self.data.tokens(name)} tokens, too few for one window of "
                f"{windows.context_length} + 1: use {share}a longer text or a smaller model.config.context_length"
            )

    def _plan(self, trainer: pl.Trainer) -> tuple[int, int]:
        """Return (micro-batch size, accumulation), and remember what limits the run."""
        if trainer is self._configured:
            return self._micro_batch_size, self.accumulation
        self._limits = trainer.max_steps, trainer.max_epochs
        self._steps()
        if trainer.accumulate_grad_batches != 1:
            raise InputError(
                f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} is not for setting: it follows "
                "from data.batch_size, data.micro_batch_size and the number of devices"
            )
        for key, default in {"limit_train_batches": 1.0, "overfit_batches": 0.0}.items():
            value = getattr(trainer, key)
            if value != default and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise InputError(f"trainer.{key} {value} cannot be used here: shorten a run with trainer.max_steps")
        devices = trainer.world_size
        micro_batch_size = self.micro_batch_size or max(1, self.batch_size // devices)
        at_once = micro_batch_size * devices
        if self.batch_size % at_once:
            raise InputError(
                f"data.batch_size {self.batch_size} is not divisible by data.micro_batch_size {micro_batch_size} x "
                f"{devices} device{'s' if devices > 1 else ''}: set it to a multiple of {at_once}"
            )
        if devices > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError("trainer.use_distributed_sampler must be false: windows are dealt out to the devices here")
        return micro_batch_size, self.batch_size // at_once

    def _set_steps(self, trainer: pl.Trainer) -> None:
        self.max_steps = trainer.fit_loop.epoch_loop.max_steps = self._steps()

    def _configure(self, trainer: pl.Trainer) -> None:
        """Tell the Trainer; it counts accumulation and the interval of validation in micro-batches."""
        self.start = self.start_step = 0
        self._micro_batch_size, self.accumulation = self._plan(trainer)
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
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # a loader must not draw from the global stream, which dropout uses
        )

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Serve what is left of the run, from the position where it stands."""
        trainer = self._trainer()
        order = TrainOrder(
            len(self.windows["train"]),
            batch_size=self.batch_size,
            micro_batch_size=self._micro_batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=self.seed,
            start=self.start,
            steps=max(0, self.max_steps - self.start_step),
        )
        return self._loader("train", order)

    def _eval_dataloader(self, name: str) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        size = self.micro_batch_size or max(1, self.batch_size // world_size)
        windows = len(self.windows[name])
        return self._loader(name, EvalOrder(windows, micro_batch_size=size, rank=rank, world_size=world_size))

    def val_dataloader(self) -> Any:
        """Serve every window of the validation part once, in order; nothing where there is no such part."""
        return self._eval_dataloader("val") if len(self.windows["val"]) else []

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Serve every window of the test part once, in order."""
        return self._eval_dataloader("test")

    @property
    def position(self) -> int:
        """Windows served over all devices up to the last optimizer step."""
        return self.start + (self._trainer().global_step - self.start_step) * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data: the position, and what it is a position in."""
        return {
            "step": self._trainer().global_step,
            "windows": self.position,
            "source": self.source,
            "tokenizer": self.tokenizer.name,
            "corpus": self.data.fingerprint,
            "seed": self.seed,
            "stride": self.windows["train"].stride,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the position of a checkpoint.

        Raises:
            InputError: The checkpoint is of another corpus.
        """
        if self._trainer().state.fn != "fit":
            return
        if state["corpus"] != self.data.fingerprint:
            raise InputError(
                f"data.source {self.source!r} gives other tokens ({self.data.fingerprint[:12]}) than the checkpoint's "
                f"{state['source']!r} ({state['corpus'][:12]}): resume with that corpus and the same shares and "
                "tokenizer, or start a new run with --model.init_from"
            )
        now = {"seed": self.seed, "stride": self.windows["train"].stride}
        for key, value in now.items():
            if state.get(key, value) != value:
                raise InputError(
                    f"data.{key} is {value}, but the checkpoint was trained with {state[key]}: its position would be "
                    "one in another order; set it to that, or start a new run with --model.init_from"
                )
        self.start, self.start_step = state["windows"], state["step"]
        self._set_steps(self._trainer())
        if self.start_step >= self.max_steps:
            raise InputError(
                f"the run has made its {self.start_step} steps already (trainer.max_steps {self.max_steps}): raise "
                "trainer.max_steps or trainer.max_epochs, which count from its beginning"
            )
