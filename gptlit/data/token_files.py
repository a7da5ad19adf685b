"""Memory-mapped token shards: those that `prepare` writes, and those of other projects.

A prepared folder holds shards for each split (raw little-endian ids) and `manifest.json`, which is written last: a
folder that has one is complete.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gptlit.data.tokenizer import TOKENIZER_JSON, Tokenizer, fingerprint
from gptlit.errors import InputError

FORMAT = 2
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # is there until the manifest is
SPLITS = ("train", "val", "test")
AGAIN = "delete the folder and prepare it again"
VERIFY_LIMIT = 2**31  # bytes: shards up to this total are hashed again each time a run starts
OPEN_MAPS = 256  # files mapped at once in a process; each holds a file descriptor
SAMPLE = 2**16  # ids at either end of a file that are checked against the vocabulary


@dataclass(frozen=True)
class Shard:
    """A file of token ids."""

    path: Path
    dtype: str  # "uint16" or "uint32", little-endian on disk
    tokens: int
    header: int = 0  # bytes before the first id

    @property
    def ids(self) -> np.ndarray:
        """The ids as a read-only memory map."""
        return _map(self)


@lru_cache(maxsize=OPEN_MAPS)
def _map(shard: Shard) -> np.ndarray:
    if not shard.tokens:
        return np.zeros(0, dtype=shard.dtype)  # an empty file cannot be mapped
    order = np.dtype(shard.dtype).newbyteorder("<")
    ids = np.memmap(shard.path, dtype=order, mode="r", offset=shard.header, shape=(shard.tokens,))
    return ids.view(np.ndarray)  # slices of the subclass are several times slower


@dataclass(frozen=True)
class TokenData:
    """Token ids on disk, by split."""

    folder: Path
    splits: dict[str, list[Shard]]  # in order
    fingerprint: str  # hexadecimal digest that changes when the tokens do
    manifest: dict[str, Any] = field(default_factory=dict)  # empty for files of other projects
    held_out: str = ""  # fingerprints of the sources that are validation and test splits in full

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split, in order."""
        return self.splits.get(split, [])

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(shard.tokens for shard in self.shards(split))

    def verify(self) -> None:
        """Check every shard against its SHA-256, if there is a manifest.

        Raises:
            InputError: A shard was changed after it was written.
        """
        for name in SPLITS if self.manifest else ():
            for shard, entry in zip(self.shards(name), self.manifest["splits"][name]["shards"], strict=True):
                with shard.path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        raise InputError(f"{shard.path} does not match the SHA-256 in its {MANIFEST}: {AGAIN}")


def _read_manifest(folder: Path) -> TokenData:
    """Return what the manifest lists; the shards may not exist."""
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
        hashes = "".join(entry["sha256"] for split in SPLITS for entry in entries[split])
        manifest.update({key: str(manifest[key]) for key in ("tokenizer", "tokenizer_sha256")})
        return TokenData(folder, splits, hashlib.sha256(hashes.encode()).hexdigest(), manifest)
    except Exception as error:  # anything may be in a damaged file
        raise InputError(f"{folder / MANIFEST} cannot be used ({type(error).__name__}: {error}): {AGAIN}") from error


def open_prepared(folder: Path) -> TokenData:
    """Open a prepared folder and check that each shard is there in its full length.

    Raises:
        InputError: The manifest cannot be read or a shard is missing, truncated or too long.
    """
    data = _read_manifest(folder)
    _map.cache_clear()  # another file may have been mapped under the same name
    for shard in chain(*data.splits.values()):
        size = shard.tokens * np.dtype(shard.dtype).itemsize
        found = shard.path.stat().st_size if shard.path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"{shard.path} {state}, its {MANIFEST} says {size}: {AGAIN}")
    return data


def prepared_tokenizer_spec(folder: Path) -> str | None:
    """Return the `load_tokenizer` argument for a prepared folder; None if it is not prepared.

    Raises:
        InputError: Its manifest cannot be read.
    """
    if not is_prepared(folder):
        return None
    name = str(_read_manifest(folder).manifest["tokenizer"])
    return str(folder / TOKENIZER_JSON) if name == TOKENIZER_JSON else name


LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER = 20240520, 1, 1024  # of llm.c's token files: 256 int32 before the ids

# A file belongs to the last split that its name contains as a word: "fineweb_train_000001", but not "constraint".
SPLIT_WORD = re.compile(r"(?:^|[_.-])(?:(train)|(val|valid|validation)|(test))\d*(?=[_.-]|$)", re.IGNORECASE)
META = "meta.pkl"  # lies next to nanoGPT's data if they have a vocabulary of their own; it is never opened


def _token_files(folder: Path) -> dict[str, list[Path]]:
    """Return the `.bin` files of each split, in order."""
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in sorted(folder.glob("*.bin")):
        names = list(SPLIT_WORD.finditer(path.stem))
        if names and path.is_file():
            found[SPLITS[(names[-1].lastindex or 1) - 1]].append(path)
    return found


def open_foreign(folder: Path, dtype: str = "uint16") -> TokenData:
    """Open token files of other projects in place: nanoGPT's `train.bin`, llm.c's `*_train_*.bin` with a header.

    A file belongs to the split that its name contains as a word: train, val or test. Those without a header are of
    `dtype`.

    Raises:
        InputError: There is no such file, or one is truncated or of another version.
    """
    _map.cache_clear()
    splits = {split: [_foreign_shard(path, dtype) for path in paths] for split, paths in _token_files(folder).items()}
    if not any(splits.values()):
        raise InputError(f"{folder} has no .bin file with 'train' in its name, and no {MANIFEST}")
    digest = hashlib.sha256()
    for shard in chain(*splits.values()):
        with shard.path.open("rb") as file:
            digest.update(os.fsencode(f"{shard.path.name} {shard.tokens}") + file.read(2**20))
            file.seek(max(0, shard.path.stat().st_size - 2**20))
            digest.update(file.read())
    return TokenData(folder, splits, digest.hexdigest())


def holds_tokens(folder: Path) -> bool:
    """Return whether a folder holds token files, prepared here or by another project; otherwise it holds texts.

    Raises:
        InputError: `prepare` has not finished it.
    """
    if (folder / PROGRESS).is_file() and not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is not complete: wait for `gptlit prepare`, or give its command again to resume it")
    return any(_token_files(folder).values())


def is_prepared(folder: Path) -> bool:
    """Return whether `prepare` made a folder."""
    return (folder / MANIFEST).is_file() and holds_tokens(folder)


def open_tokens(folder: Path, tokenizer: Tokenizer, dtype: str = "uint16") -> TokenData:
    """Open a folder of token files, prepared here or by another project, and check them against a tokenizer.

    Raises:
        InputError: It is no such folder, it is damaged, or another tokenizer made it.
    """
    if not is_prepared(folder):
        data = open_foreign(folder, dtype)
        check_vocabulary(data, tokenizer.n_vocab)
        return data
    data = open_prepared(folder)
    if data.manifest["tokenizer_sha256"] != fingerprint(tokenizer):
        raise InputError(
            f"tokenizer {tokenizer.name!r} contradicts {folder}, which {data.manifest['tokenizer']!r} made: leave "
            "data.tokenizer out, or prepare the folder again"
        )
    return data


def concatenate(parts: Sequence[TokenData]) -> TokenData:
    """Return the shards of all, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    splits = {name: [shard for part in parts for shard in part.shards(name)] for name in SPLITS}
    digest = hashlib.sha256("".join(part.fingerprint for part in parts).encode())
    return TokenData(parts[0].folder, splits, digest.hexdigest())


def _foreign_shard(path: Path, dtype: str) -> Shard:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    if start[0] == LLMC_MAGIC:
        if (start[1], size) != (LLMC_VERSION, LLMC_HEADER + 2 * start[2]):
            raise InputError(
                f"{path} has {size} bytes, its header (version {start[1]}) says {LLMC_HEADER + 2 * start[2]}: it is "
                f"truncated, or not of version {LLMC_VERSION}"
            )
        return Shard(path, "uint16", int(start[2]), LLMC_HEADER)
    width = np.dtype(dtype).itemsize
    if size % width:
        raise InputError(
            f"{path} has {size} bytes, no multiple of the {width} of {dtype}: it is truncated, or set data.dtype"
        )
    return Shard(path, dtype, size // width)


def check_vocabulary(data: TokenData, vocab_size: int) -> None:
    """Check that the ids at both ends of foreign files are in the vocabulary; `Windows` checks all as they are served.

    Raises:
        InputError: An id is outside the vocabulary, or all are so low that a `meta.pkl` defines another one.
    """
    largest = -1
    for shard in filter(lambda shard: shard.tokens, chain(*data.splits.values())):
        largest = max(largest, int(shard.ids[:SAMPLE].max()), int(shard.ids[-SAMPLE:].max()))
        if largest >= vocab_size:
            raise InputError(
                f"{shard.path} has the id {largest}, outside the vocabulary of {vocab_size}: "
                "set data.tokenizer to the one that made it, or data.dtype"
            )
    if 0 <= largest < vocab_size // 2 and (data.folder / META).is_file():
        raise InputError(
            f"{data.folder} has no id above {largest} of a vocabulary of {vocab_size}: these are characters or bytes, "
            "set data.tokenizer to the tokenizer.json that made them, or prepare the text itself with gptlit prepare"
        )
