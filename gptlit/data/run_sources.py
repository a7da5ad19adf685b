"""The sources of a run: texts, rows or tokens, which become tokens on disk."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gptlit.data.parsers import ReadOptions
from gptlit.data.prepare import cache_folder, prepare_cached
from gptlit.data.rows import RowKind, RowOptions, prepare_rows, row_kind, rows_path
from gptlit.data.sources import PYTHON_DOCS, open_corpus
from gptlit.data.splitting import Split
from gptlit.data.token_files import (
    MANIFEST,
    SPLITS,
    TokenData,
    concatenate,
    holds_tokens,
    open_tokens,
    prepared_tokenizer_spec,
)
from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError, user_path


@dataclass
class WeightedSource:
    """One of several sources.

    Args:
        path: As `data.source`.
        weight: Proportional to its share of the training windows.
    """

    path: str
    weight: float = 1.0


def as_list(source: str | Sequence[WeightedSource]) -> list[WeightedSource]:
    """Return `data.source` as a list, which it is if there are several."""
    return [WeightedSource(source)] if isinstance(source, str) else list(source)


def choose_tokenizer_spec(source: str | Sequence[WeightedSource], tokenizer: str | None, default: str = "gpt2") -> str:
    """Return the argument of `load_tokenizer`: the tokenizer that is named, else that of the first prepared folder,
    else the default.
    """
    found = (prepared_tokenizer_spec(user_path(part.path)) for part in as_list(source))
    return tokenizer or next(filter(None, found), default)


def has_labels(source: str | Sequence[WeightedSource], options: ReadOptions) -> bool:
    """Return whether the sources are texts with labels."""
    return any(row_kind(user_path(part.path), options) == "labels" for part in as_list(source))


@dataclass
class RunSources:
    """The sources of a run, and how they are read, divided and tokenized."""

    divided: list[WeightedSource]  # into train, val and test
    held_out: dict[str, str | None]  # other sources for val and test, each taken in full; None: a part of `divided`
    split: Split
    options: ReadOptions
    rows: RowOptions
    tokenizer: Tokenizer
    dtype: str  # of token files without a header
    cache_dir: Path  # of tokenized corpora

    @property
    def names(self) -> list[str]:
        """A name for each source."""
        names = [Path(source.path).name for source in self.divided]
        return names if len(set(names)) == len(names) else [f"{index}-{name}" for index, name in enumerate(names)]

    @cached_property
    def kind(self) -> RowKind | None:
        """What rows the sources have; None: they are texts or tokens, for windows.

        Raises:
            InputError: They differ in that, or an option has no use for it.
        """
        paths = [source.path for source in self.divided] + [path for path in self.held_out.values() if path]
        kinds = {row_kind(user_path(path), self.options) for path in paths}
        if len(kinds) > 1:
            has = " and ".join(sorted(kind or "texts" for kind in kinds))
            raise InputError(f"the sources {', '.join(map(repr, paths))} have {has}: a run trains on one of them")
        (kind,) = kinds
        self.rows.check(kind, paths[0])
        return kind

    def is_prepared(self) -> bool:
        """Return whether everything is on disk as tokens: nothing would be downloaded or tokenized."""
        used = [(source.path, self.split) for source in self.divided]
        used += [(path, Split(0.0)) for path in self.held_out.values() if path is not None]
        return all(self._is_prepared(path, split) for path, split in used)

    def _is_prepared(self, path: str, split: Split) -> bool:
        folder = user_path(path)
        is_here = path == PYTHON_DOCS or folder.exists() or any(glob.iglob(str(folder), recursive=True))
        if holds_tokens(folder) or not is_here:
            return holds_tokens(folder)
        if self.kind is not None:
            return rows_path(folder, self.kind, self.cache_dir, self.tokenizer, self._row_options(split)).is_file()
        corpus = open_corpus(path, self.options, self.cache_dir / "downloads")
        return (cache_folder(corpus, self.cache_dir, self.tokenizer, split) / MANIFEST).is_file()

    def tokenize(self) -> tuple[list[TokenData], TokenData]:
        """Return the tokens of each source, and all of them with the held-out ones; make those that are not on disk."""
        each = [self._tokenize(source.path, self.split) for source in self.divided]
        data = concatenate(each)
        for name, path in self.held_out.items():
            if path is not None:
                other = self._tokenize(path, Split(0.0))
                shards = [shard for split in SPLITS for shard in other.shards(split)]
                held_out = data.held_out + name + other.fingerprint
                data = replace(data, splits={**data.splits, name: shards}, held_out=held_out)
        return each, data

    def _tokenize(self, path: str, split: Split) -> TokenData:
        folder = user_path(path)
        if holds_tokens(folder):
            return open_tokens(folder, self.tokenizer, self.dtype)
        if self.kind is not None:
            options = self._row_options(split)
            return prepare_rows(folder, self.kind, self.cache_dir, self.tokenizer, split, options)
        corpus = open_corpus(path, self.options, self.cache_dir / "downloads")
        return prepare_cached(corpus, self.cache_dir, self.tokenizer, split)

    def _row_options(self, split: Split) -> RowOptions:
        """Return how rows are made; a source that is held out is taken in full."""
        return self.rows if split is self.split else replace(self.rows, balance=False)
