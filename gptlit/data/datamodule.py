"""TokenDataModule: corpora -> batches of windows or rows, the same on any number of devices."""

import math
import os
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from gptlit.data.compatibility import (
    Identity,
    check_batch_settings,
    check_classes,
    check_division,
    check_model,
    check_position,
    micro_batch_size,
)
from gptlit.data.loaders import make_loader
from gptlit.data.parsers import ReadOptions
from gptlit.data.rows import RowOptions, Rows
from gptlit.data.run_data import RunData
from gptlit.data.run_sources import RunSources, WeightedSource, as_list, choose_tokenizer_spec
from gptlit.data.splitting import Split
from gptlit.data.tokenizer import load_tokenizer, tokenizer_spec
from gptlit.data.windows import EvalSampler, TrainSampler
from gptlit.errors import InputError, user_path

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

    run_data: RunData
    labels: list[str]

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
        arguments = locals()
        super().__init__()
        _check(arguments)
        self.source, self.batch_size, self.micro_batch_size = source, batch_size, micro_batch_size
        self.context_length, self.stride, self.num_workers = context_length, stride, num_workers
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.resume_despite = resume_despite or []
        self.tokenizer = load_tokenizer(choose_tokenizer_spec(source, tokenizer))
        self.sources = RunSources(
            as_list(source),
            {"val": val_source, "test": test_source},
            Split(0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction),
            ReadOptions(text_key, separator),
            RowOptions(template, mask_prompt, balance, label_position),
            self.tokenizer,
            dtype,
            user_path(cache_dir),
        )
        self.micro_batch_size_used = micro_batch_size or batch_size
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
        return self.sources.rows.template if self.sources.kind == "instructions" else None

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
        if config is not None:
            check_model(config, self.context_length, self.tokenizer)
        length = self.context_length if config is None else config.context_length
        if length is None:
            raise InputError("data.context_length is needed where there is no model to take it from")
        if not hasattr(self, "run_data") or self.run_data.context_length != length:  # rank 0 has prepared it
            pin_memory = self._pin_memory and self.num_workers == 0  # with workers, the loader pins
            self.run_data = RunData(self.sources, length, self.stride, self.seed, pin_memory)
            self.labels = self.run_data.labels.names
        if config is not None:
            check_classes(config, self.labels, self.source)
        self.run_data.check(stage)

    @property
    def _pin_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    @property
    def _attached_trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("this needs a Trainer: pass the TokenDataModule to trainer.fit")
        return self.trainer

    def _configure(self, trainer: pl.Trainer) -> None:
        """Set the Trainer's accumulation, length and validation interval, which it counts in micro-batches."""
        check_batch_settings(trainer)
        check_division(self.batch_size, trainer.world_size)
        self.micro_batch_size_used = micro_batch_size(self.batch_size, trainer.world_size, self.micro_batch_size)
        self._limits = trainer.max_steps, trainer.max_epochs
        self._start_at(0, 0)
        accumulation = self.batch_size // (trainer.world_size * self.micro_batch_size_used)
        trainer.accumulate_grad_batches = accumulation
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.limit_train_batches = int(trainer.limit_train_batches) * accumulation
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= accumulation
        self._configured = trainer

    def _start_at(self, step: int, position: int) -> None:
        """Begin after `step` optimizer steps, which took `position` windows; set the steps in all, counted from 0."""
        self.start, self.start_step = position, step
        max_steps, max_epochs = self._limits
        limits = [max_steps] if max_steps != -1 else []
        if max_epochs is not None and max_epochs != -1:
            windows = max_epochs * len(self.run_data.splits["train"]) - position
            limits.append(step + max(0, math.ceil(windows / self.batch_size)))
        self.max_steps = self._attached_trainer.fit_loop.epoch_loop.max_steps = min(limits)

    @override
    def train_dataloader(self) -> Loader:
        trainer = self._attached_trainer
        sampler = TrainSampler(
            self.run_data.mixture,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size_used,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=self.start,
            steps=max(0, self.max_steps - self.start_step),
        )
        return make_loader(self.run_data.splits["train"], sampler, self.num_workers, self._pin_memory)

    @override
    def val_dataloader(self) -> Any:
        return self._eval_dataloader("val") if len(self.run_data.splits["val"]) else []

    @override
    def test_dataloader(self) -> Loader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, name: str) -> Loader:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        size = self.micro_batch_size or max(1, self.batch_size // world_size)
        windows = self.run_data.splits[name]
        sampler = EvalSampler(len(windows), micro_batch_size=size, rank=rank, world_size=world_size)
        return make_loader(windows, sampler, self.num_workers, self._pin_memory)

    def _position_after(self, step: int) -> int:
        """Return the position of the next window after `step` optimizer steps, over all devices."""
        return self.start + (step - self.start_step) * self.batch_size

    def _indices(self, step: int) -> np.ndarray:
        """Return the windows of the optimizer step after `step` steps, over all devices, int64 (B,)."""
        return self.run_data.mixture(self._position_after(step) + np.arange(self.batch_size))

    def addresses(self, step: int) -> list[dict[str, Any]]:
        """Return where the windows of the optimizer step after `step` steps are: file and offset in tokens, or row."""
        windows = self.run_data.splits["train"]
        found = [windows.address(int(index)) for index in self._indices(step)]
        return [{"step": step + 1, "shard": str(windows.shards[s].path), "offset": offset} for s, offset in found]

    def targets_in_step(self, step: int) -> int | None:
        """Return how many targets the optimizer step after `step` steps has, over all devices; None: in every
        micro-batch there are as many.
        """
        windows = self.run_data.splits["train"]
        return windows.count_targets(self._indices(step)) if isinstance(windows, Rows) else None

    def describe_mixture(self) -> list[str]:
        """Return a line on each source, if there are several."""
        return self.run_data.mixture.describe(self.sources.names, self._position_after(self.max_steps))

    @override
    def state_dict(self) -> dict[str, Any]:
        step, sources = self._attached_trainer.global_step, [asdict(source) for source in self.sources.divided]
        return {
            "step": step,
            "windows": self._position_after(step),
            "source": self.source if isinstance(self.source, str) else sources,
            "tokenizer": tokenizer_spec(self.tokenizer),
            **({"labels": asdict(self.run_data.labels)} if self.labels else {}),
            **({"template": self.template} if self.template is not None else {}),
            **self.run_data.identity,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        ours, theirs = asdict(self.run_data.labels), state.get("labels")
        if self.labels and theirs != ours:
            raise InputError(
                f"the labels are {ours}, but the checkpoint was trained with {theirs}: use the same texts and the same "
                "data.label_position"
            )
        if self._attached_trainer.state.fn != "fit":
            return
        names = {
            "corpus": f"{self.source!r}, the checkpoint's {state['source']!r}",
            "tokenizer": f"this one is {self.tokenizer.name!r}",
        }
        check_position(state, self.run_data.identity, names, self.resume_despite)
        self._start_at(state["step"], state["windows"])
        if self.start_step >= self.max_steps:
            raise InputError(
                f"the run has made its {self.start_step} steps already (trainer.max_steps {self.max_steps}): raise "
                "trainer.max_steps or trainer.max_epochs, which count from its beginning"
            )


def _check(arguments: dict[str, Any]) -> None:
    for key in ("batch_size", "micro_batch_size", "context_length", "stride"):
        if arguments[key] is not None and arguments[key] < 1:
            raise ValueError(f"data.{key} must be a positive integer, got {arguments[key]}")
    if arguments["num_workers"] < 0:
        raise ValueError(f"data.num_workers must be at least 0, got {arguments['num_workers']}")
    if not arguments["source"]:
        raise ValueError("data.source is empty: name a file, a folder, or a list of {path, weight}")
