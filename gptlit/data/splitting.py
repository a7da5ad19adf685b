"""Documents -> pieces of text, each assigned to train, val or test."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from gptlit.data.parsers import UnreadableDocument
from gptlit.data.sources import Corpus, SourceFile
from gptlit.data.token_files import SPLITS
from gptlit.errors import InputError, note

LARGE_CORPUS = 100_000  # documents above which hashes are taken as evenly spread, whatever the fractions
MIN_EXPECTED = 10  # a corpus is small if its smallest split can expect fewer documents than this


@dataclass(frozen=True)
class Split:
    """How a corpus is divided: validation and test fractions, each at least 0, with a sum below 1.

    A corpus of several documents is divided by document. The split of a document follows from the hash of its text,
    so it stays the same when the corpus grows. In a small corpus the documents with the lowest hashes are taken
    instead, so that no split is empty. A single document is divided by characters: train first, then val, then test.

    Raises:
        InputError: A fraction is out of range.
    """

    val_fraction: float = 0.05
    test_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not (self.val_fraction >= 0 and self.test_fraction >= 0 and self.val_fraction + self.test_fraction < 1):
            raise InputError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} must be at least 0, and "
                "their sum below 1"
            )

    @property
    def small_corpus(self) -> int:
        """Number of documents below which a corpus is small."""
        smallest = min(f for f in (self.val_fraction, self.test_fraction, 1.0) if f)
        return math.ceil(MIN_EXPECTED / max(smallest, MIN_EXPECTED / LARGE_CORPUS))

    def thresholds(self, hashes: list[float]) -> tuple[float, float]:
        """Return (val, test): a hash below val belongs to val, one below test to test, any other to train.

        Args:
            hashes: Hashes of the first `small_corpus` documents.
        """
        if len(hashes) >= self.small_corpus:
            return self.val_fraction, self.val_fraction + self.test_fraction
        hashes = sorted(set(hashes))  # a document may occur twice
        vals, tests = (max(1, round(len(hashes) * f)) if f else 0 for f in (self.val_fraction, self.test_fraction))
        vals = max(0, min(vals, len(hashes) - 1))
        tests = max(0, min(tests, len(hashes) - 1 - vals))
        hashes = [*hashes, 1.0]
        return hashes[vals], hashes[vals + tests]


def document_hash(pieces: Iterable[str]) -> float:
    """Return the hash of a document as a number in [0, 1]."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode())
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a piece of a long one."""

    text: str
    split: str
    starts_document: bool
    position: tuple[int, int] = (0, 0)  # the file, and the piece of it; unreadable documents count


class SplitReader:
    """Reads all corpora and assigns each piece to a split.

    Args:
        corpora: By split; only what is under "train" is divided.
        split: The fractions.
        skip_bad: Count what cannot be read, and continue.
    """

    def __init__(self, corpora: Mapping[str, Corpus], split: Split, skip_bad: bool) -> None:
        self.files = [(name, file) for name in SPLITS if name in corpora for file in corpora[name].files]
        self.bytes_read = 0  # of the files on disk, compressed or not
        self.unreadable = 0
        self._split, self._skip_bad = split, skip_bad
        self._hashes: dict[str, float] = {}  # of files that are one document
        self._reported: set[str] = set()  # files whose end cannot be read
        train = [file for name, file in self.files if name == "train"]
        if len(train) == 1 and train[0].is_single_document:
            hashes = [0.0]
        else:
            hashes = list(islice(self._document_hashes(train), split.small_corpus))
        self._divides_text = len(hashes) == 1 and (split.val_fraction > 0 or split.test_fraction > 0)
        self._val, self._test = split.thresholds(hashes)

    @property
    def size(self) -> int:
        """Bytes of all files; 0 if one of them has no known size."""
        sizes = [file.size for _, file in self.files]
        return sum(sizes) if all(sizes) else 0

    def read(self) -> Iterator[Piece]:
        """Yield all pieces."""
        before = 0
        for index, (name, file) in enumerate(self.files):
            for number, piece in enumerate(self._pieces(name, file, before)):
                if piece is None:
                    self.unreadable += 1
                else:
                    yield replace(piece, position=(index, number))
            before += file.size

    def _document_hashes(self, files: list[SourceFile]) -> Iterator[float]:
        for file in files:
            if file.is_single_document:
                yield self._file_hash(file)
            else:
                yield from (document_hash([text]) for text in self._texts(file) if text)

    def _file_hash(self, file: SourceFile) -> float:
        if file.name not in self._hashes:
            self._hashes[file.name] = document_hash(filter(None, self._texts(file)))
        return self._hashes[file.name]

    def _texts(self, file: SourceFile, report: Callable[[int], None] | None = None) -> Iterator[str | None]:
        """Yield the texts of a file, without empty ones; None for a document that cannot be read.

        Raises:
            InputError: A document cannot be read, and `skip_bad` is not set.
        """
        for text in file.read(report):
            if isinstance(text, UnreadableDocument):
                if not self._skip_bad:
                    raise InputError(f"{text.reason} (gptlit prepare --skip_bad leaves out what cannot be read)")
                if text.ends_file and file.name not in self._reported:
                    self._reported.add(file.name)
                    note(f"left out, with all that follows in that file: {text.reason}")
                yield None
            elif text:
                yield text

    def _pieces(self, name: str, file: SourceFile, bytes_before: int) -> Iterator[Piece | None]:
        """Yield the pieces of a file, without positions; None for a document that cannot be read."""

        def report(count: int) -> None:
            self.bytes_read = bytes_before + count

        texts = self._texts(file, report)
        if name == "train" and self._divides_text:
            yield from self._divided(texts, sum(len(text or "") for text in self._texts(file)))
        elif file.is_single_document:
            split = self._split_of(self._file_hash(file)) if name == "train" else name
            yield from (Piece(text, split, index == 0) if text else None for index, text in enumerate(texts))
        else:
            for text in texts:
                split = self._split_of(document_hash([text])) if text and name == "train" else name
                yield Piece(text, split, True) if text else None

    def _split_of(self, hash_: float) -> str:
        return "val" if hash_ < self._val else "test" if hash_ < self._test else "train"

    def _divided(self, texts: Iterator[str | None], length: int) -> Iterator[Piece | None]:
        """Divide a single document by characters."""
        val_start = int(length * (1 - self._split.val_fraction - self._split.test_fraction))
        test_start = int(length * (1 - self._split.test_fraction))
        bounds = (("train", 0, val_start), ("val", val_start, test_start), ("test", test_start, length))
        done = 0
        for text in texts:
            if text is None:
                yield None
                continue
            for name, start, end in bounds:
                if piece := text[max(0, start - done) : max(0, end - done)]:
                    yield Piece(piece, name, starts_document=start >= done)
            done += len(text)
