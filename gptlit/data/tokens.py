"""Documents -> token shards and a manifest on disk, and back as memory maps.

A prepared folder holds one or more shards a split (raw little-endian ids) and `manifest.json`. It is written under a
temporary name and renamed when it is whole, so a folder with a manifest is always complete.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gptlit.data.corpus import Corpus
from gptlit.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val", "test")
VERIFY_LIMIT = 2**31  # bytes: shards up to this total are hashed again each time a run starts
BATCH = 2**24  # characters handed to the tokenizer's threads at once
FEW = 10  # a corpus is small when its smallest split would get fewer documents than that


@dataclass(frozen=True)
class Split:
    """How a corpus is divided: the shares of the validation and the test part, each at least 0, together below 1.

    Raises:
        ValueError: A share is out of its range.
    """

    val_fraction: float = 0.05
    test_fraction: float = 0.0

    def __post_init__(self) -> None:
        for key in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, got {getattr(self, key)!r}")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} leave nothing to train on"
            )

    def divide(self, documents: Callable[[], Iterator[str]]) -> Iterator[tuple[str, str]]:
        """Yield (split, text): whole documents where there are several, shares of characters where there is one.

        A document's split follows from its own text, so that it keeps it when the corpus grows. Of few documents the
        ones with the lowest numbers are taken, so that every split gets some.
        """
        few = math.ceil(FEW / min(f for f in (self.val_fraction, self.test_fraction, 1.0) if f))
        numbers = sorted(map(_number, islice(documents(), few)))
        if len(numbers) == 1:
            yield from self._cut(next(documents()))
            return
        val, test = self.val_fraction, self.val_fraction + self.test_fraction
        if 1 < len(numbers) < few:
            val, test = self._thresholds(numbers)
        for text in documents():
            number = _number(text)
            yield "val" if number < val else "test" if number < test else "train", text

    def _thresholds(self, numbers: list[float]) -> tuple[float, float]:
        """Return the numbers below which a document validates and tests; one at least is left to train on."""
        vals, tests = (max(1, round(len(numbers) * f)) if f else 0 for f in (self.val_fraction, self.test_fraction))
        vals = min(vals, len(numbers) - 1)
        tests = min(tests, len(numbers) - 1 - vals)
        return numbers[vals], numbers[vals + tests]

    def _cut(self, text: str) -> Iterator[tuple[str, str]]:
        """The first characters train, the next validate, the last test."""
        train = int(len(text) * (1 - self.val_fraction - self.test_fraction))
        val = int(len(text) * (1 - self.test_fraction))
        yield from (("train", text[:train]), ("val", text[train:val]), ("test", text[val:]))


def _number(text: str) -> float:
    """Return a document's own number, from 0 to 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@dataclass(frozen=True)
class Shard:
    """A file of token ids.

    Args:
        path: The file.
        dtype: "uint16" or "uint32", little-endian on disk.
        tokens: How many ids it holds.
        header: Bytes before the first id.
    """

    path: Path
    dtype: str
    tokens: int
    header: int = 0

    @cached_property
    def ids(self) -> np.ndarray:
        """The ids as a read-only memory map, opened on first use in each process."""
        order = np.dtype(self.dtype).newbyteorder("<")
        return np.memmap(self.path, dtype=order, mode="r", offset=self.header, shape=(self.tokens,))

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens the map anew rather than get a copy of it
        return {key: value for key, value in self.__dict__.items() if key != "ids"}


@dataclass(frozen=True)
class TokenData:
    """Token ids on disk, by split.

    Args:
        folder: Where they are.
        splits: The shards of each split, in order.
        fingerprint: Hexadecimal digest that changes when the tokens do.
        tokenizer: Name of the tokenizer that made them; None where the files do not say.
        manifest: What `manifest.json` says; empty for files of other projects.
    """

    folder: Path
    splits: dict[str, list[Shard]]
    fingerprint: str
    tokenizer: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split, in order."""
        return self.splits.get(split, [])

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(shard.tokens for shard in self.shards(split))

    def verify(self) -> None:
        """Check every shard against its SHA-256, where there is a manifest.

        Raises:
            InputError: A shard was changed after it was written.
        """
        for split in self.manifest.get("splits", {}).values():
            for entry in split["shards"]:
                with (self.folder / entry["file"]).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        raise InputError(
                            f"{self.folder / entry['file']} does not match the SHA-256 in its {MANIFEST}: "
                            f"delete the folder {self.folder}, it is made again"
                        )


def open_tokens(folder: Path) -> TokenData:
    """Open a prepared folder and check that each shard is there in its full length.

    Raises:
        InputError: The manifest cannot be read or a shard is missing, truncated or too long.
    """
    again = f"delete the folder {folder}, it is made again"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        dtype = manifest["dtype"]
        if manifest["format"] != FORMAT or dtype not in ("uint16", "uint32"):
            raise ValueError(f"format {manifest['format']} of {dtype}")
        entries = {split: manifest["splits"][split]["shards"] for split in SPLITS}
        splits = {
            split: [Shard(folder / entry["file"], dtype, int(entry["tokens"])) for entry in entries[split]]
            for split in SPLITS
        }
        if any(shard.path.parent != folder for shards in splits.values() for shard in shards):
            raise ValueError("a shard outside the folder")
        hashes = "".join(entry["sha256"] for split in SPLITS for entry in entries[split])
        data = TokenData(
            folder, splits, hashlib.sha256(hashes.encode()).hexdigest(), str(manifest["tokenizer"]), manifest
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be used ({type(error).__name__}: {error}): {again}") from error
    for shard in chain(*splits.values()):
        size = shard.tokens * np.dtype(dtype).itemsize
        found = shard.path.stat().st_size if shard.path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"{shard.path} {state}, its {MANIFEST} says {size}: {again}")
    return data


LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER = 20240520, 1, 1024  # of llm.c's token files: 256 int32 before the ids


def open_foreign(folder: Path, dtype: str = "uint16") -> TokenData:
    """Open token files of other projects in place: nanoGPT's `train.bin`, llm.c's `*_train_*.bin` with a header.

    A file belongs to the split that its name contains: train, val or test.

    Args:
        folder: Where the `.bin` files are.
        dtype: Number type of files without a header.

    Raises:
        InputError: There is no such file, or one is truncated or of another version.
    """
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for path in sorted(folder.glob("*.bin")):
        for split in SPLITS:
            if split in path.stem:
                splits[split].append(_foreign_shard(path, dtype))
                break
    if not splits["train"]:
        raise InputError(f"{folder} has no .bin file with 'train' in its name, and no {MANIFEST}")
    digest = hashlib.sha256()
    for shard in chain(*splits.values()):
        with shard.path.open("rb") as file:
            digest.update(f"{shard.path.name} {shard.tokens}".encode() + file.read(2**20))
            file.seek(max(0, shard.path.stat().st_size - 2**20))
            digest.update(file.read())
    return TokenData(folder, splits, digest.hexdigest())


def _foreign_shard(path: Path, dtype: str) -> Shard:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = np.frombuffer(file.read(12), dtype="<i4")
    if len(start) == 3 and start[0] == LLMC_MAGIC:
        if start[1] != LLMC_VERSION:
            raise InputError(f"{path} is an llm.c file of version {start[1]}: only version {LLMC_VERSION} can be read")
        if size != LLMC_HEADER + 2 * int(start[2]):
            raise InputError(
                f"{path} has {size} bytes, its header says {LLMC_HEADER + 2 * int(start[2])}: it is truncated"
            )
        return Shard(path, "uint16", int(start[2]), LLMC_HEADER)
    width = np.dtype(dtype).itemsize
    if size % width:
        raise InputError(
            f"{path} has {size} bytes, no multiple of the {width} of {dtype}: it is truncated, or set data.dtype"
        )
    return Shard(path, dtype, size // width)


def check_vocabulary(data: TokenData, vocab_size: int) -> None:
    """Insist that the ids of foreign files are in the vocabulary: all of them, or the ends of very large files.

    Raises:
        InputError: An id is not; the file is named.
    """
    for shard in chain(*data.splits.values()):
        parts = [shard.ids] if shard.tokens <= VERIFY_LIMIT // 4 else [shard.ids[: 2**24], shard.ids[-(2**24) :]]
        for part in parts:
            if len(part) and int(part.max()) >= vocab_size:
                raise InputError(
                    f"{shard.path} has the id {int(part.max())}, outside the vocabulary of {vocab_size}: "
                    "set data.tokenizer to the one that made it, or data.dtype"
                )


def prepare(corpus: Corpus, root: Path, tokenizer: tiktoken.Encoding, split: Split) -> TokenData:
    """Tokenise a corpus into a folder under `root`, or open the folder that an earlier call left there.

    Raises:
        InputError: A document cannot be read, or the folder that is there is damaged.
    """
    settings = {"format": FORMAT, "tokenizer": tokenizer.name, "corpus": corpus.fingerprint, **asdict(split)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = root / f"{corpus.name}-{key[:12]}"
    if not (folder / MANIFEST).is_file():
        _write_folder(corpus, folder, tokenizer, split, settings)
    data = open_tokens(folder)
    if sum(data.tokens(name) for name in SPLITS) * np.dtype(data.manifest["dtype"]).itemsize <= VERIFY_LIMIT:
        data.verify()
    return data


def _write_folder(
    corpus: Corpus, folder: Path, tokenizer: tiktoken.Encoding, split: Split, settings: dict[str, Any]
) -> None:
    """Write shards and manifest under a temporary name; what is there under the final name is always whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        dtype = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
        writers = {name: _ShardWriter(temporary / f"{name}-00000.bin", dtype, tokenizer.eot_token) for name in SPLITS}
        for name, ids, size in _encode(split.divide(corpus.documents), tokenizer):
            writers[name].add(ids, size)
        manifest = {
            **settings,
            "vocab_size": tokenizer.n_vocab,
            "dtype": dtype,
            "splits": {name: writer.close() for name, writer in writers.items()},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        temporary.chmod(0o755)
        if not (folder / MANIFEST).is_file():  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted deletion left
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(texts: Iterator[tuple[str, str]], tokenizer: tiktoken.Encoding) -> Iterator[tuple[str, list[int], int]]:
    """Yield (split, ids, bytes of text). Text that spells a special token stays ordinary text."""
    for batch in _batches(texts):
        encoded = tokenizer.encode_ordinary_batch([text for _, text in batch], num_threads=os.cpu_count() or 1)
        for (name, text), ids in zip(batch, encoded, strict=True):
            yield name, ids, len(text.encode())


def _batches(texts: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Collect documents until they have `BATCH` characters."""
    batch: list[tuple[str, str]] = []
    size = 0
    for name, text in texts:
        batch.append((name, text))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class _ShardWriter:
    """Writes documents to one file, with the end-of-text token between them."""

    path: Path
    dtype: str
    separator: int
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self._file = self.path.open("wb")

    def add(self, ids: list[int], text_bytes: int) -> None:
        if not ids:
            return
        if self.documents:
            ids = [self.separator, *ids]
        data = np.asarray(ids, dtype=np.dtype(self.dtype).newbyteorder("<")).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)
        self.documents += 1
        self.text_bytes += text_bytes

    def close(self) -> dict[str, Any]:
        """Close the file durably; return what the manifest says of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        shard = {"file": self.path.name, "tokens": self.tokens, "sha256": self._digest.hexdigest()}
        return {"documents": self.documents, "bytes": self.text_bytes, "shards": [shard]}
