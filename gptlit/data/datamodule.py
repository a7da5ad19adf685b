"""TokenDataModule: corpora -> batches of windows or rows, the same on any number of devices."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from gptlit.config import GPTConfig
from gptlit.data.compatibility import (
    Identity,
    check_classes,
    check_division,
    check_model,
    check_resume,
    check_trainer_settings,
    micro_batch_size,
)
from gptlit.data.corpora import Corpora, WeightedSource, tokenizer_for
from gptlit.data.loaders import make_loader
from gptlit.data.parsers import ReadOptions
from gptlit.data.rows import Labels, RowOptions, Rows, label_names, longest_row
from gptlit.data.splitting import Split
from gptlit.data.token_files import SPLITS, TokenData
from gptlit.data.tokenizer import fingerprint, load_tokenizer, tokenizer_spec
from gptlit.data.windows import EvalSampler, TrainSampler, WeightedMixture, Windows
from gptlit.errors import InputError, note

Loader = DataLoader[tuple[Tensor, Tensor]]


class TokenDataModule(pl.LightningDataModule):
    """Serves (inputs, targets), int64 (B, T) each: windows, with targets one token to the right, or `Rows`.

    Args:
        source: "python-docs" (the documentation that comes with Python); a text, .jsonl or .parquet file, a folder or a
            glob of them; hf:OWNER/NAME; a name of the catalogue; or a folder of tokens: one that was prepared here,
            nanoGPT's `train.bin` and `val.bin`, llm.c's shards. Or rows: a .json or .jsonl file of {instruction, input,
            output} or {messages: [{role, content}]}; a .tsv file (label, tab, text), a .csv, .json or .jsonl file of
            texts and labels. Or a list of {path, weight}.
        batch_size: Windows or rows in one optimizer step, over all devices.
        micro_batch_size: Limit on the windows that one device takes at once; None: no limit. Gradients are accumulated
            up to `batch_size`.
        tokenizer: Name of a tiktoken encoding or path of a Hugging Face `tokenizer.json`; None: the one that made a
            prepared folder, else gpt2.
        context_length: Window length in tokens; None: the model's.
        stride: Tokens between the starts of two windows; None: `context_length`.
        val_fraction: Validation fraction of the documents, or of the characters of a single text.
        test_fraction: Test fraction.
        val_source: Another source for validation, taken in full, instead of a fraction.
        test_source: Another source for testing.
        text_key: Key or column of the text in .jsonl and .parquet.
        separator: What stands between two documents of a text file; empty: a file is one document.
        dtype: Number type of token files without a header (nanoGPT's).
        template: How instructions are written: alpaca, chat or phi3.
        mask_prompt: Learn the answers to instructions only. In conversations that is always so.
        balance: Keep as many texts of each label as the rarest has.
        label_position: Where the label is predicted, in texts padded to the longest one to train on: 0, or -1 as in the
            book; None: at the last token of each text.
        seed: Seed of the order of windows; None: that of `seed_everything`.
        resume_despite: What may differ from the checkpoint on a resume: corpus, tokenizer, seed, stride or weights. The
            position is then one in another order.
        num_workers: Worker processes of the loader; 0 reads in the training process.
        cache_dir: Folder for tokenized corpora.

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
        template: str = "alpaca",
        mask_prompt: bool = False,
        balance: bool = False,
        label_position: Literal[0, -1] | None = None,
        seed: int | None = None,
        resume_despite: list[Identity] | None = None,
        num_workers: int = 0,
        cache_dir: str = "data",
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "stride": stride}
        for key, value in {**sizes, "context_length": context_length}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key} must be a positive integer, got {value}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {num_workers}")
        if not source:
            raise ValueError("data.source is empty: name a file, a folder, or a list of {path, weight}")
        self.source = source
        self.sources = [WeightedSource(source)] if isinstance(source, str) else list(source)
        self.tokenizer = load_tokenizer(tokenizer_for(source, tokenizer))
        self.corpora = Corpora(
            self.sources,
            {"val": val_source, "test": test_source},
            Split(0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction),
            ReadOptions(text_key, separator),
            RowOptions(template, mask_prompt, balance, label_position),
            self.tokenizer,
            dtype,
            Path(cache_dir),
        )
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.context_length, self.stride = context_length, stride
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.resume_despite = resume_despite or []
        self.num_workers = num_workers
        self.accumulation, self.micro_batch_size_used = 1, micro_batch_size or batch_size
        self.start = self.start_step = 0  # windows over all devices, and optimizer steps, before this fit
        self.max_steps = -1
        self._limits: tuple[int, int | None] = (-1, None)  # the Trainer's own max_steps and max_epochs
        self._configured: pl.Trainer | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the tokenizer."""
        return self.tokenizer.n_vocab

    @property
    def template(self) -> str | None:
        """Name of the template of instructions; None: the data are something else."""
        return self.corpora.rows.template if self.corpora.kind == "instructions" else None

    @override
    def prepare_data(self) -> None:
        self.setup(self.trainer.state.fn if self.trainer is not None else None)  # fails before anything is written

    @override
    def setup(self, stage: str | None = None) -> None:
        self.load(stage)
        if stage == "fit" and self._attached_trainer is not self._configured:
            self._configure(self._attached_trainer)

    def load(self, stage: str | None) -> None:
        """Open the windows of each split; tokenize first what is not yet.

        Raises:
            InputError: A split that the stage needs is too short, or the model cannot read the data.
        """
        config = getattr(getattr(self.trainer, "lightning_module", None), "config", None)
        length = self.check_compatible(config) if config is not None else self.context_length
        if length is None:
            raise InputError("data.context_length is needed where there is no model to take it from")
        if is_first := not hasattr(self, "data"):  # rank 0 calls this in `prepare_data` and in `setup`
            each, self.data = self.corpora.open()
            self.labels = label_names(self.data.shards("train"))
            if config is not None:
                check_classes(config, self.labels, self.source)
            counts = [len(self._windows(data, "train", length)) for data in each]
            self.mixture = WeightedMixture(counts, [source.weight for source in self.sources], self.seed)
        self.windows = {name: self._windows(self.data, name, length) for name in SPLITS}
        for name, windows in self.windows.items():
            if is_first and isinstance(windows, Rows) and windows.cut:
                lost = f"{windows.left_out} of them have nothing left to learn and are left out"
                note(f"{name}: {windows.cut} rows are cut at {length} tokens; {lost}")
        needed = {"fit": ["train"] + ["val"] * self.corpora.has_val, "validate": ["val"], "test": ["test"]}
        for name in needed.get(stage or "", []):
            self.corpora.check_windows(name, self.windows[name], self.mixture.n_windows)

    def _windows(self, data: TokenData, name: str, length: int) -> Windows | Rows:
        pin = self.num_workers == 0 and torch.cuda.is_available()  # with workers, the loader pins
        if self.corpora.kind is not None:
            if self.stride is not None:
                raise InputError(f"data.stride {self.stride} is for windows: {self.source!r} has {self.corpora.kind}")
            position = self.corpora.rows.label_position
            row_length = None if position is None else min(length, longest_row(self.data.shards("train")))
            eot = self.tokenizer.eot_token
            return Rows(data.shards(name), length, eot, self.labels, position, row_length, pin)
        return Windows(data.shards(name), length, self.stride or length, self.vocab_size, pin)

    def check_compatible(self, config: GPTConfig) -> int:
        """Return the context length of a model, checked against the data."""
        check_model(config, self.context_length, self.tokenizer)
        return config.context_length

    @property
    def _attached_trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("this needs a Trainer: pass the TokenDataModule to trainer.fit")
        return self.trainer

    def _configure(self, trainer: pl.Trainer) -> None:
        """Set the Trainer's accumulation, length and validation interval, which it counts in micro-batches."""
        check_trainer_settings(trainer)
        check_division(self.batch_size, trainer.world_size)
        self.micro_batch_size_used = micro_batch_size(self.batch_size, trainer.world_size, self.micro_batch_size)
        self.accumulation = self.batch_size // (trainer.world_size * self.micro_batch_size_used)
        self._limits = trainer.max_steps, trainer.max_epochs
        self._start_at(0, 0)
        trainer.accumulate_grad_batches = self.accumulation
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.limit_train_batches = int(trainer.limit_train_batches) * self.accumulation
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= self.accumulation
        self._configured = trainer

    def _start_at(self, step: int, position: int) -> None:
        """Begin after `step` optimizer steps, which took `position` windows; set the steps in all, counted from 0."""
        self.start, self.start_step = position, step
        max_steps, max_epochs = self._limits
        limits = [max_steps] if max_steps != -1 else []
        if max_epochs is not None and max_epochs != -1:
            windows = max_epochs * len(self.windows["train"]) - position
            limits.append(step + max(0, math.ceil(windows / self.batch_size)))
        if not limits:
            raise InputError("a run needs an end: set trainer.max_steps or trainer.max_epochs")
        self.max_steps = self._attached_trainer.fit_loop.epoch_loop.max_steps = min(limits)

    @override
    def train_dataloader(self) -> Loader:
        trainer = self._attached_trainer
        sampler = TrainSampler(
            self.mixture,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size_used,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=self.start,
            steps=max(0, self.max_steps - self.start_step),
        )
        return make_loader(self.windows["train"], sampler, self.num_workers)

    @override
    def val_dataloader(self) -> Any:
        return self._eval_dataloader("val") if len(self.windows["val"]) else []

    @override
    def test_dataloader(self) -> Loader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, name: str) -> Loader:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        size = self.micro_batch_size or max(1, self.batch_size // world_size)
        windows = self.windows[name]
        sampler = EvalSampler(len(windows), micro_batch_size=size, rank=rank, world_size=world_size)
        return make_loader(windows, sampler, self.num_workers)

    def _position_after(self, step: int) -> int:
        return self.start + (step - self.start_step) * self.batch_size

    @property
    def position(self) -> int:
        """Position of the next window, over all devices, after the last optimizer step."""
        return self._position_after(self._attached_trainer.global_step)

    def addresses(self, step: int) -> list[dict[str, Any]]:
        """Return where the windows of the optimizer step after `step` steps are: file and offset in tokens, or row."""
        windows = self.windows["train"]
        indices = self.mixture(self._position_after(step) + np.arange(self.batch_size))
        found = [windows.address(int(index)) for index in indices]
        return [{"step": step + 1, "shard": str(windows.shards[s].path), "offset": offset} for s, offset in found]

    def targets_in_step(self, step: int) -> int | None:
        """Return how many targets the optimizer step after `step` steps has, over all devices; None: in every
        micro-batch there are as many.
        """
        windows = self.windows["train"]
        positions = self._position_after(step) + np.arange(self.batch_size)
        return windows.count_targets(self.mixture(positions)) if isinstance(windows, Rows) else None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._attached_trainer.global_step,
            "windows": self.position,
            "source": self.source if isinstance(self.source, str) else [asdict(source) for source in self.sources],
            "tokenizer": tokenizer_spec(self.tokenizer),
            **({"labels": self._labels_state()} if self.labels else {}),
            **({"template": self.template} if self.template is not None else {}),
            **self._identity(),
        }

    def _labels_state(self) -> dict[str, Any]:
        rows = self.windows["train"]
        return asdict(Labels(self.labels, self.corpora.rows.label_position, getattr(rows, "row_length", None)))

    def _identity(self) -> dict[str, Any]:
        """Return what the order of windows depends on."""
        return {
            "tokenizer_sha256": fingerprint(self.tokenizer),
            "corpus": self.data.fingerprint,
            "seed": self.seed,
            "stride": self.windows["train"].stride,
            "weights": [source.weight for source in self.sources],
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.labels and (theirs := state.get("labels")) != (ours := self._labels_state()):
            raise InputError(f"the labels are {ours}, but the checkpoint was trained with {theirs}: use the same texts")
        if self._attached_trainer.state.fn != "fit":
            return
        names = {
            "corpus": f"{self.source!r}, the checkpoint's {state['source']!r}",
            "tokenizer": f"this one is {self.tokenizer.name!r}",
        }
        check_resume(state, self._identity(), names, self.resume_despite)
        self._start_at(state["step"], state["windows"])
        if self.start_step >= self.max_steps:
            raise InputError(
                f"the run has made its {self.start_step} steps already (trainer.max_steps {self.max_steps}): raise "
                "trainer.max_steps or trainer.max_epochs, which count from its beginning"
            )

    def bytes_per_token(self) -> dict[str, float]:
        """Return the bytes of text per token of each split for which that is known."""
        splits = self.data.manifest.get("splits", {})
        own = [name for name in splits if not self.corpora.held_out.get(name) and self.data.tokens(name)]
        return {name: splits[name]["bytes"] / self.data.tokens(name) for name in own}

    def describe_mixture(self) -> list[str]:
        """Return a line on each corpus, if there are several."""
        return self.mixture.describe(self.corpora.names, self._position_after(self.max_steps))
