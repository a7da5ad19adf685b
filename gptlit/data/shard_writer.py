"""Token shards while they are written. `progress.json` lists the complete ones, so an interrupted run can resume."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptlit.data.atomic import atomic_file
from gptlit.data.splitting import Piece
from gptlit.data.token_files import MANIFEST, PROGRESS, SPLITS
from gptlit.data.tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer, Tokenizer, tokenizer_spec
from gptlit.errors import InputError


@dataclass(frozen=True)
class Boundary:
    """Where the last complete shard of a split ends in the sources."""

    position: tuple[int, int] = (0, 0)  # of the piece in which it ends
    tokens: int = 0  # of that piece that are in complete shards
    documents: int = 0  # that start before that piece
    text_bytes: int = 0  # before that piece
    shards: list[dict[str, Any]] = field(default_factory=list)  # manifest entries of the complete ones


class SplitWriter:
    """Writes the documents of a split to shards, with the end-of-text token between them, from a boundary on."""

    def __init__(
        self, folder: Path, name: str, dtype: str, eot_token: int, shard_tokens: int, boundary: Boundary
    ) -> None:
        self.folder, self.name, self.eot_token, self.shard_tokens = folder, name, eot_token, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.boundary = boundary
        self.documents, self.text_bytes, self.shards = boundary.documents, boundary.text_bytes, list(boundary.shards)
        self.shard_length = 0  # tokens of the shard that is being written
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(int(shard["tokens"]) for shard in self.shards) + self.shard_length

    def write(self, piece: Piece, ids: np.ndarray) -> None:
        """Append the tokens of a piece."""
        if piece.starts_document and self.documents:
            ids = np.concatenate([np.array([self.eot_token], dtype=ids.dtype), ids])
        before = self.documents, self.text_bytes
        written = self.boundary.tokens if piece.position == self.boundary.position else 0
        while written < len(ids):
            data = ids[written : written + self.shard_tokens - self.shard_length]
            self._append(data)
            written += len(data)
            if self.shard_length == self.shard_tokens:
                self.finish_shard()
                self.boundary = Boundary(piece.position, written, *before, list(self.shards))
        self.documents += piece.starts_document
        self.text_bytes += len(piece.text.encode())

    def _append(self, ids: np.ndarray) -> None:
        if self._file is None:
            self._file = (self.folder / self._file_name).open("wb")
            self._digest = hashlib.sha256()
        data = ids.astype(self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.shard_length += len(ids)

    @property
    def _file_name(self) -> str:
        return f"{self.name}-{len(self.shards):05d}.bin"

    def finish_shard(self) -> None:
        """Complete the shard that is being written, if there is one."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            entry = {"file": self._file_name, "tokens": self.shard_length, "sha256": self._digest.hexdigest()}
            self.shards.append(entry)
            self._file, self.shard_length = None, 0

    def close(self) -> None:
        """Close the shard that is being written, incomplete."""
        if self._file is not None:
            self._file.close()


class FolderWriter:
    """Writes the shards of all splits, and the manifest once they are complete.

    Args:
        folder: Folder of the shards.
        tokenizer: For the manifest.
        settings: Everything that the bytes depend on.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        self.folder, self.tokenizer, self.settings = folder, tokenizer, settings
        self.dtype = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
        boundaries = {name: Boundary() for name in SPLITS}
        if (folder / PROGRESS).is_file():
            splits = json.loads((folder / PROGRESS).read_bytes())["splits"]
            for name in SPLITS:
                file, piece, *_ = splits[name].pop("position")
                boundaries[name] = Boundary((file, piece), **splits[name])
        self.splits = {
            name: SplitWriter(folder, name, self.dtype, tokenizer.eot_token, settings["shard_tokens"], boundary)
            for name, boundary in boundaries.items()
        }
        self._save()

    def _save(self) -> None:
        self._saved = self._complete_shards
        boundaries = {name: asdict(writer.boundary) for name, writer in self.splits.items()}
        write_json(self.folder / PROGRESS, {**self.settings, "splits": boundaries})

    @property
    def _complete_shards(self) -> int:
        return sum(len(writer.shards) for writer in self.splits.values())

    def needs(self, piece: Piece) -> bool:
        """Whether a piece has tokens that are in no complete shard."""
        return piece.position >= self.splits[piece.split].boundary.position

    def write(self, pieces: list[Piece], ids: list[np.ndarray]) -> None:
        """Append a batch; record the progress if that completes a shard."""
        for piece, piece_ids in zip(pieces, ids, strict=True):
            self.splits[piece.split].write(piece, piece_ids)
        if self._complete_shards > self._saved:
            self._save()

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(writer.tokens for writer in self.splits.values())

    def finish(self, skipped: int) -> None:
        """Complete the last shards and write the manifest; `skipped` documents could not be read.

        Raises:
            InputError: There is no text.
        """
        for writer in self.splits.values():
            writer.finish_shard()
        if not self._complete_shards:
            (self.folder / PROGRESS).unlink()
            raise InputError(f"there is no text in the sources of {self.folder} ({skipped} documents were left out)")
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            with atomic_file(self.folder / TOKENIZER_JSON) as file:
                file.write(tokenizer_spec(self.tokenizer).encode())
        splits = {
            name: {"documents": writer.documents, "bytes": writer.text_bytes, "shards": writer.shards}
            for name, writer in self.splits.items()
        }
        values = {"vocab_size": self.tokenizer.n_vocab, "dtype": self.dtype, "skipped": skipped, "splits": splits}
        write_json(self.folder / MANIFEST, {**self.settings, **values})
        (self.folder / PROGRESS).unlink()

    def close(self) -> None:
        """Close all files, complete or not."""
        for writer in self.splits.values():
            writer.close()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")
