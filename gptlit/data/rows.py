"""Rows to fine-tune on: instructions with their answers, and texts with a label. Each row has a length of its own."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from gptlit.data.atomic import atomic_file
from gptlit.data.parsers import ReadOptions, UnreadableDocument, file_kind, json_rows
from gptlit.data.splitting import Split
from gptlit.data.templates import ASSISTANT, SYSTEM, USER, Turn, find_template
from gptlit.data.token_files import Shard, TokenData
from gptlit.data.tokenizer import Tokenizer, fingerprint, without_surrogates
from gptlit.data.windows import NO_TARGET
from gptlit.errors import InputError

RowKind = Literal["instructions", "labels"]
FORMAT = 1
HEAD = 2**20  # bytes in which the first row of a file is looked for
LABELLED_LINE = re.compile(r"\S{1,40}\t[^\t]+")


@dataclass(frozen=True)
class RowOptions:
    """How rows are made, as `TokenDataModule` describes it: two options of instructions, two of labelled texts.

    Raises:
        InputError: There is no such template.
    """

    template: str = "alpaca"
    mask_prompt: bool = False
    balance: bool = False
    label_position: int | None = None

    def __post_init__(self) -> None:
        find_template(self.template)

    def check(self, kind: RowKind | None, source: object) -> None:
        """Check that the data have a use for what is set."""
        used = {"instructions": ("template", "mask_prompt"), "labels": ("balance", "label_position"), None: ()}[kind]
        for option in fields(self):
            if (value := getattr(self, option.name)) != option.default and option.name not in used:
                has = kind or "texts"
                raise InputError(f"data.{option.name} {value!r} has no use: data.source {source!r} has {has}")


# --- files ------------------------------------------------------------------------------------------------------


def row_kind(path: Path, options: ReadOptions = ReadOptions()) -> RowKind | None:  # noqa: B008  (frozen)
    """Return what the rows of a file are, from its name and its first row; None: it is text, or no file.

    Args:
        path: The file.
        options: If they are not the defaults, the file is to be read as text.
    """
    kind, compression = file_kind(path.name)
    if options != ReadOptions() or compression or not path.is_file():
        return None
    if kind in (".tsv", ".csv"):
        return "labels"
    with path.open("rb") as file:
        head = file.read(HEAD).decode("utf-8-sig", errors="replace").lstrip()
    if not kind:
        lines = [line.rstrip("\r\n") for line in _lines(head)[:20]]
        return "labels" if lines and all(map(LABELLED_LINE.fullmatch, lines)) else None
    try:
        first = json.JSONDecoder().raw_decode(head.removeprefix("[").lstrip())[0] if kind in (".json", ".jsonl") else ""
    except (ValueError, RecursionError):
        return None
    keys = set(first) if isinstance(first, dict) else set()
    return "instructions" if {"instruction", "messages"} & keys else "labels" if {"text", "label"} <= keys else None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each row for messages, and its values.

    Raises:
        InputError: The file is not UTF-8, or a row is no JSON object.
    """
    if file_kind(path.name)[0] in (".json", ".jsonl"):
        with path.open("rb") as file:
            for location, row in json_rows(str(path), file):
                if not isinstance(row, dict):
                    is_bad = isinstance(row, UnreadableDocument)
                    raise InputError(row.reason if is_bad else f"{location} is no object, but {type(row).__name__}")
                yield location, row
        return
    is_csv = path.suffix.lower() == ".csv"  # with a header; otherwise label, tab, text
    rows = _table(path, "," if is_csv else "\t")
    header = next(rows, (0, []))[1] if is_csv else ["label", "text"]
    for number, row in rows:
        yield f"{path} line {number}", {key.lower(): value for key, value in zip_longest(header, row) if key}


def _lines(text: str) -> list[str]:
    """Return the lines of a table with their ends: LF, CR or both. `str.splitlines` knows others, which texts have."""
    return list(io.StringIO(text, newline=""))


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line of each row, and its fields; blank lines are no rows.

    Raises:
        InputError: The file is not UTF-8, or a quote is not closed.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: position {error.start}") from error
    lines = [*_lines(text), ""]  # the last one is blank, and so no part of a row, unless a quote is still open
    table = csv.reader(lines, delimiter=delimiter)  # not strict, which would refuse a field like "Hi" he said
    limit = csv.field_size_limit()
    try:
        csv.field_size_limit(max(limit, len(text)))  # of the whole process: all rows are read before it is set back
        rows = [(table.line_num, row) for row in table]
    finally:
        csv.field_size_limit(limit)
    if rows[-1][1]:
        opened = len(lines) - max(1, len(_lines(rows[-1][1][-1])))
        remedy = "close it, or quote the field and double the quote in it"
        raise InputError(f"{path} line {opened}: a quote opens a field and is not closed: {remedy}")
    yield from ((number, row) for number, row in rows if row)


def _text(row: Mapping[str, Any], key: str, location: str) -> str:
    value = str(row[key]) if isinstance(row.get(key), int) else row.get(key)
    if key not in row:
        raise InputError(f"{location} has no {key!r}, only {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{location}: {key!r} is {'empty' if value in ('', None) else repr(value)}, a text is needed")
    return without_surrogates(value)


def conversation(row: Mapping[str, Any], location: str, needs_answer: bool = True) -> Sequence[Turn]:
    """Return the turns of a row: {instruction, input, output} or {messages: [{role, content}]}.

    Args:
        row: The row.
        location: Of the row, for messages.
        needs_answer: Otherwise an answer at its end is left out.

    Raises:
        InputError: A key is missing, of the wrong type or empty.
    """
    if "messages" not in row:
        inputs = {"input": _text(row, "input", location)} if str(row.get("input") or "").strip() else {}
        turns = [{"role": USER, "content": _text(row, "instruction", location), **inputs}]
        return [*turns, {"role": ASSISTANT, "content": _text(row, "output", location)}] if needs_answer else turns
    turns = []
    for message in row["messages"] if isinstance(row["messages"], list) else []:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in (ASSISTANT, SYSTEM, USER):
            raise InputError(f"{location}: the role of a message is {role!r}, not {ASSISTANT}, {SYSTEM} or {USER}")
        turns.append({"role": role, "content": _text(message, "content", f"{location}, {role}")})
    while turns and turns[-1]["role"] == ASSISTANT and not needs_answer:
        turns.pop()
    needed = ASSISTANT if needs_answer else USER
    if not any(turn["role"] == needed for turn in turns):
        raise InputError(f"{location} has no message of the role {needed}")
    return turns


# --- tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFile:
    """The rows of a file, one after another, in the order in which they are divided."""

    ids: np.ndarray  # (tokens,)
    is_target: np.ndarray  # bool (tokens,): which ids of instructions are in the loss; (0,) for labelled texts
    ends: np.ndarray  # int64 (N + 1,): row n has the ids from ends[n] to ends[n + 1]
    labels: np.ndarray  # str (N,): "" for instructions


@dataclass(frozen=True, kw_only=True)
class RowShard(Shard):
    """A range of the rows of a file, in memory; `path` is the file that was tokenized."""

    rows: slice = field(compare=False)
    file: RowFile = field(compare=False)

    @property
    @override
    def ids(self) -> np.ndarray:
        return self.file.ids[self.file.ends[self.rows.start] : self.file.ends[self.rows.stop]]


Row = tuple[np.ndarray, np.ndarray, str]  # ids (T,), is_target (T,) or (0,), label


def _instructions(path: Path, tokenizer: Tokenizer, options: RowOptions) -> Iterator[Row]:
    template = find_template(options.template)
    for location, row in read_rows(path):
        ids, is_answer = template.encode(tokenizer, conversation(row, location))
        is_all_target = "messages" not in row and not options.mask_prompt
        yield np.array(ids), np.array(is_answer) | is_all_target, ""


def _labelled(path: Path, tokenizer: Tokenizer, options: RowOptions) -> Iterator[Row]:
    """Yield the rows in an order that follows from their texts, so that equal texts do not leak into other splits."""
    found = []
    for location, row in read_rows(path):
        text, label = _text(row, "text", location), _text(row, "label", location)
        found.append((hashlib.sha256(text.encode()).hexdigest(), text, label))
    if options.balance and found:
        labels = Counter(row[-1] for row in found)
        each = (sorted(row for row in found if row[-1] == label) for label in labels)
        found = [row for rows in each for row in rows[: min(labels.values())]]
    for _, text, label in sorted(found, key=lambda row: (row[0][::-1], row)):
        yield tokenizer.encode_to_numpy(text), np.empty(0, dtype=bool), label


def split_sizes(rows: int, split: Split, kind: RowKind) -> dict[str, int]:
    """Return the number of rows of each split, in the book's order; the remainder is in the last one that has any."""
    fractions = {"val": split.val_fraction, "test": split.test_fraction}
    middle, last = ("test", "val") if kind == "instructions" else ("val", "test")
    train = int(rows * (1 - split.val_fraction - split.test_fraction) + 1e-6)
    size = int(rows * fractions[middle] + 1e-6) if fractions[last] else rows - train
    return {"train": train, middle: size, last: rows - train - size}


def rows_path(path: Path, kind: RowKind, root: Path, tokenizer: Tokenizer, options: RowOptions) -> Path:
    """Return the file in `root` for the tokens of a file, named after everything that they depend on."""
    settings = json.dumps([FORMAT, kind, fingerprint(tokenizer), asdict(options)])
    digest = hashlib.sha256(settings.encode() + path.read_bytes()).hexdigest()
    name = re.sub(r"[^\w-]+", "_", path.stem)
    return root / f"{name}-{digest[:12]}.npz"


def prepare_rows(
    path: Path, kind: RowKind, root: Path, tokenizer: Tokenizer, split: Split, options: RowOptions
) -> TokenData:
    """Tokenize a file and store the result in `root`, or open what an earlier call stored; divide its rows.

    Raises:
        InputError: A row cannot be used; it is named.
    """
    stored = rows_path(path, kind, root, tokenizer, options)
    if (file := _load(stored)) is None:
        rows = list((_instructions if kind == "instructions" else _labelled)(path, tokenizer, options))
        file = _join(rows, "uint16" if tokenizer.n_vocab <= 2**16 else "uint32")
        with atomic_file(stored) as storage:
            np.savez(storage, **vars(file))
    splits: dict[str, list[Shard]] = {}
    first = 0
    for name, size in split_sizes(len(file.labels), split, kind).items():
        chosen = slice(first, first + size)
        tokens = int(file.ends[chosen.stop] - file.ends[chosen.start])
        splits[name] = [RowShard(path, str(file.ids.dtype), tokens, rows=chosen, file=file)]
        first = chosen.stop
    digest = hashlib.sha256(f"{stored.stem.rpartition('-')[2]} {split}".encode())
    return TokenData(root, splits, digest.hexdigest())


def _join(rows: Sequence[Row], dtype: str) -> RowFile:
    ids, is_target, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return RowFile(
        np.concatenate([np.empty(0, dtype), *ids], dtype=dtype, casting="unsafe"),
        np.concatenate([np.empty(0, dtype=bool), *is_target]),
        np.cumsum([0, *map(len, ids)]),
        np.array(labels, dtype=str),
    )


def _load(path: Path) -> RowFile | None:
    """Return what is stored; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return RowFile(**arrays)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile):
        return None


@dataclass(frozen=True)
class Labels:
    """What a classifier predicts, and where."""

    names: list[str]  # in the order of their numbers; none for instructions
    position: int | None = None  # as `label_position` of `RowOptions`
    row_length: int | None = None  # what texts are padded to, in tokens, and cut; None: a text is not padded


def label_names(shards: Sequence[Shard]) -> list[str]:
    """Return the labels of the texts to train on, sorted; none for instructions.

    Raises:
        InputError: There is one only.
    """
    labels = [shard.file.labels[shard.rows].tolist() for shard in shards if isinstance(shard, RowShard)]
    names = sorted(set().union(*labels) - {""})
    if len(names) == 1:
        raise InputError(f"all texts to train on in {shards[0].path} have the label {names[0]!r}: two are needed")
    return names


def longest_row(shards: Sequence[Shard]) -> int:
    """Return the number of ids of the longest row, at least 1."""
    lengths = [np.diff(shard.file.ends)[shard.rows].max(initial=1) for shard in shards if isinstance(shard, RowShard)]
    return int(max(lengths))


# --- batches ----------------------------------------------------------------------------------------------------


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """All rows of a list of shards. An array of indices (B,) gives inputs and targets, int64 (B, T) each.

    T is the length of the longest of them. Inputs are padded with the end-of-text token; a target of -100 is ignored by
    the loss: padding, masked parts, the index -1. The targets of instructions are one to the right; of a labelled
    text only one target is not -100, its label. Rows longer than `context_length` are cut; one without a target after
    that is left out.

    Args:
        shards: Shards of a split.
        context_length: Limit on T, in tokens.
        eot_token: The end-of-text token.
        labels: The labels to learn; none for instructions.
        pin_memory: Allocate batches in pinned memory.

    Raises:
        InputError: A text has another label.
    """

    stride = None  # rows do not overlap

    def __init__(
        self,
        shards: Sequence[Shard],
        context_length: int,
        eot_token: int,
        labels: Labels,
        pin_memory: bool = False,
    ) -> None:
        self.shards = [shard for shard in shards if isinstance(shard, RowShard)]
        self.context_length, self.eot_token = context_length, eot_token
        self.labels, self.pin_memory = labels, pin_memory
        self.cut = self.left_out = 0
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._places: list[tuple[int, int]] = []
        for number, shard in enumerate(self.shards):
            for row in range(shard.rows.start, shard.rows.stop):
                inputs, targets = self._pair(shard, row)
                self.cut += len(inputs) > context_length
                if (targets[:context_length] >= 0).any():
                    self._rows.append((inputs[:context_length], targets[:context_length]))
                    self._places.append((number, row))
                else:
                    self.left_out += 1
        self._counts = np.array([(targets >= 0).sum() for _, targets in self._rows], dtype=np.int64)

    def _pair(self, shard: RowShard, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a row, int32 (T,) each."""
        file = shard.file
        span = slice(*file.ends[row : row + 2])
        ids = file.ids[span].astype(np.int32)
        if self.labels.names:
            return self._labelled(ids, str(file.labels[row]), shard.path)
        return ids[:-1], np.where(file.is_target[span], ids, NO_TARGET)[1:]

    def _labelled(self, ids: np.ndarray, label: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
        names, label_position, row_length = self.labels.names, self.labels.position, self.labels.row_length
        if label not in names:
            known = ", ".join(map(repr, names))
            raise InputError(f"{path} has the label {label!r}, which no text to train on has: they have {known}")
        position = min(len(ids), self.context_length) - 1
        if label_position is not None and row_length is not None:
            padding = np.full(row_length, self.eot_token, dtype=np.int32)
            ids, position = np.concatenate([ids, padding])[:row_length], label_position
        targets = np.full_like(ids, NO_TARGET)
        targets[position] = names.index(label)
        return ids, targets

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row in tokens, int64 (N,)."""
        return np.array([len(inputs) for inputs, _ in self._rows], dtype=np.int64)

    def address(self, index: int) -> tuple[int, int]:
        """Return (shard, number among the stored rows) of a row."""
        return self._places[index]

    def count_targets(self, indices: np.ndarray) -> int:
        """Return the number of targets of rows (B,) that are not ignored."""
        return int(self._counts[indices].sum())

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = [self._rows[index] if index >= 0 else ((), ()) for index in indices.tolist()]
        length = max(1, *(len(ids) for ids, _ in rows))
        pair = torch.empty((2, len(rows), length), dtype=torch.int64, pin_memory=self.pin_memory)
        inputs, targets = pair.numpy()
        inputs[:], targets[:] = self.eot_token, NO_TARGET
        for row, (ids, row_targets) in enumerate(rows):
            inputs[row, : len(ids)], targets[row, : len(ids)] = ids, row_targets
        return pair[0], pair[1]
