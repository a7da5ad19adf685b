"""Documents -> token shards and a manifest on disk, and back as memory maps.

A prepared folder holds one or more shards a split (raw little-endian ids) and `manifest.json`. It is written under a
temporary name and renamed when it is whole, so a folder with a manifest is always complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
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
BATCH = 512  # documents handed to the tokenizer's threads at once


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

    def divide(self, documents: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield (split, text): whole documents where there are several, shares of characters where there is one."""
        documents = iter(documents)
        first = list(islice(documents, 2))
        if len(first) == 1:
            yield from self._cut(first[0])
            return
        for text in first:
            yield self._of(text), text
        for text in documents:
            yield self._of(text), text

    def _cut(self, text: str) -> Iterator[tuple[str, str]]:
        """The first characters train, the next validate, the last test."""
        train = int(len(text) * (1 - self.val_fraction - self.test_fraction))
        val = int(len(text) * (1 - self.test_fraction))
        yield from (("train", text[:train]), ("val", text[train:val]), ("test", text[val:]))

    def _of(self, text: str) -> str:
        """A document's split follows from its own text, so that it keeps it when the corpus grows."""
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        if share < self.val_fraction:
            return "val"
        return "test" if share < self.val_fraction + self.test_fraction else "train"


@dataclass(frozen=True)
class Shard:
    """A file of token ids.

    Args:
        path: The file.
        dtype: "uint16" or "uint32", little-endian on disk.
        tokens: How many ids it holds.
    """

    path: Path
    dtype: str
    tokens: int

    @cached_property
    def ids(self) -> np.ndarray:
        """The ids as a read-only memory map, opened on first use in each process."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens the map anew rather than get a copy of it
        return {key: value for key, value in self.__dict__.items() if key != "ids"}


@dataclass
class TokenData:
    """A prepared folder, as its manifest describes it."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def tokenizer(self) -> str:
        return str(self.manifest["tokenizer"])

    @property
    def fingerprint(self) -> str:
        """Changes when any token of any split does."""
        hashes = [entry["sha256"] for split in SPLITS for entry in self.manifest["splits"][split]["shards"]]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(shard.tokens for shard in self.shards(split))

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split, in order."""
        entries = self.manifest["splits"][split]["shards"]
        return [Shard(self.folder / entry["file"], self.manifest["dtype"], entry["tokens"]) for entry in entries]

    def verify(self) -> None:
        """Check every shard against its SHA-256.

        Raises:
            InputError: A shard was changed after it was written.
        """
        for split in SPLITS:
            for entry in self.manifest["splits"][split]["shards"]:
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
        data = TokenData(folder, manifest)
        width = np.dtype(manifest["dtype"]).itemsize
        expected = {shard.path: shard.tokens * width for split in SPLITS for shard in data.shards(split)}
        if manifest["format"] != FORMAT or manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"format {manifest['format']} of {manifest['dtype']}")
        if any(path.parent != folder for path in expected):
            raise ValueError("a shard outside the folder")
        assert isinstance(data.fingerprint + data.tokenizer, str)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be used ({type(error).__name__}: {error}): {again}") from error
    for path, size in expected.items():
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"{path} {state}, its {MANIFEST} says {size}: {again}")
    return data


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
        for name, ids, size in _encode(split.divide(corpus.documents()), tokenizer):
            writers[name].add(ids, size)
        manifest = {
            **settings,
            "vocab_size": tokenizer.n_vocab,
            "dtype": dtype,
            "splits": {name: writer.close() for name, writer in writers.items()},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        temporary.chmod(0o755)
        if folder.exists():  # an interrupted deletion, or another process was faster
            shutil.rmtree(folder) if not (folder / MANIFEST).is_file() else None
        if not folder.exists():
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(texts: Iterator[tuple[str, str]], tokenizer: tiktoken.Encoding) -> Iterator[tuple[str, list[int], int]]:
    """Yield (split, ids, bytes of text). Text that spells a special token stays ordinary text."""
    while batch := list(islice(texts, BATCH)):
        encoded = tokenizer.encode_ordinary_batch([text for _, text in batch], num_threads=os.cpu_count() or 1)
        for (name, text), ids in zip(batch, encoded, strict=True):
            yield name, ids, len(text.encode())


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
