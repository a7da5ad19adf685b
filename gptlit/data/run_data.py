"""What a run reads: the windows or rows of each split, and the order in which those to train on are drawn."""

from functools import cached_property
from typing import Any

from gptlit.data.rows import Labels, Rows, label_names, longest_row
from gptlit.data.run_sources import RunSources
from gptlit.data.token_files import SPLITS, TokenData
from gptlit.data.tokenizer import fingerprint
from gptlit.data.windows import WeightedMixture, Windows
from gptlit.errors import InputError, note


class RunData:
    """The windows or rows of each split. What is not yet on disk as tokens is tokenized.

    Raises:
        InputError: A source cannot be used, or rows are given a stride.
    """

    def __init__(
        self, sources: RunSources, context_length: int, stride: int | None, seed: int, pin_memory: bool
    ) -> None:
        self.sources, self.context_length, self.seed, self.pin_memory = sources, context_length, seed, pin_memory
        self.stride = stride or context_length
        if sources.kind is not None and stride is not None:
            raise InputError(f"data.stride {stride} is for windows: {sources.divided[0].path!r} has {sources.kind}")
        each, self.on_disk = sources.tokenize()
        train = self.on_disk.shards("train")
        position = sources.rows.label_position
        row_length = None if sources.kind is None or position is None else min(context_length, longest_row(train))
        self.labels = Labels(label_names(train), position, row_length)
        if sources.kind == "labels" and not self.labels.names:
            raise InputError(self._too_short("train", repr(sources.divided[0].path)))
        self.splits = {name: self._windows(self.on_disk, name) for name in SPLITS}
        trained_on = [self._windows(data, "train") for data in each] if len(each) > 1 else [self.splits["train"]]
        counts = [len(windows) for windows in trained_on]
        self.mixture = WeightedMixture(counts, [source.weight for source in sources.divided], seed)
        for name, rows in self.splits.items():
            if isinstance(rows, Rows) and rows.cut:
                lost = f"{rows.left_out} of them have nothing left to learn and are left out"
                note(f"{name}: {rows.cut} rows are cut at {context_length} tokens; {lost}")

    def _windows(self, data: TokenData, name: str) -> Windows | Rows:
        shards, tokenizer = data.shards(name), self.sources.tokenizer
        if self.sources.kind is None:
            return Windows(shards, self.context_length, self.stride, tokenizer.n_vocab, self.pin_memory)
        return Rows(shards, self.context_length, tokenizer.eot_token, self.labels, self.pin_memory)

    def check(self, stage: str | None) -> None:
        """Check that each split that a stage (None: fit) needs has a window or row, and each source one to train on."""
        has_val = self.sources.split.val_fraction > 0 or self.sources.held_out["val"] is not None
        needed = {"fit": ["train"] + ["val"] * has_val, "validate": ["val"], "test": ["test"]}
        for name in needed.get(stage or "fit", []):
            short = self.sources.divided if not len(self.splits[name]) else []
            if name == "train" and not short:
                counts = zip(self.sources.divided, self.mixture.n_windows, strict=True)
                short = [source for source, count in counts if not count][:1]
            if short:
                raise InputError(self._too_short(name, ", ".join(repr(source.path) for source in short)))

    def _too_short(self, name: str, sources: str) -> str:
        lacks = f"is too short for one window of {self.context_length} + 1 tokens"
        remedies = ["a longer text", "a smaller model.config.context_length"]
        if self.sources.kind is not None:
            lacks, remedies = "has no row with a target", ["more rows", "a larger model.config.context_length"]
        if name != "train":
            fraction = f"a larger data.{name}_fraction (of a prepared folder: prepare it again)"
            remedies += [f"data.{name}_source", fraction]
        if name == "val":
            remedies.append("data.val_fraction 0, which trains without validation")
        return f"the {name} part of {sources} {lacks}: use {', '.join(remedies[:-1])} or {remedies[-1]}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the order of windows depends on, as in a checkpoint."""
        return {
            "tokenizer_sha256": fingerprint(self.sources.tokenizer),
            "corpus": self.on_disk.fingerprint,
            "held_out": self.on_disk.held_out,
            "seed": self.seed,
            "stride": self.splits["train"].stride,
            "weights": [source.weight for source in self.sources.divided],
        }

    def bytes_per_token(self) -> dict[str, float]:
        """Return the bytes of text per token of each split for which that is known."""
        splits = self.on_disk.manifest.get("splits", {})
        own = [name for name in splits if not self.sources.held_out.get(name) and self.on_disk.tokens(name)]
        return {name: splits[name]["bytes"] / self.on_disk.tokens(name) for name in own}
