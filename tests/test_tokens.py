"""Token shards on disk: what is written can be trusted, and what was damaged is found."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptlit.data.corpus import Corpus
from gptlit.data.tokenizer import load_tokenizer
from gptlit.data.tokens import MANIFEST, Split, TokenData, open_tokens, prepare
from gptlit.errors import InputError

GPT2 = load_tokenizer("gpt2")


def corpus_of(*documents: str, name: str = "c") -> Corpus:
    return Corpus(name, str(hash(documents)), lambda: iter(documents))


def ids_of(data: TokenData, split: str) -> list[int]:
    return np.concatenate([shard.ids for shard in data.shards(split)]).tolist() if data.tokens(split) else []


def test_one_text_is_cut_by_characters(tmp_path: Path) -> None:
    text = "abcdefghij" * 10
    data = prepare(corpus_of(text), tmp_path, GPT2, Split(0.1, 0.2))
    assert [GPT2.decode(ids_of(data, split)) for split in ("train", "val", "test")] == [
        text[:70],
        text[70:80],
        text[80:],
    ]


def test_several_texts_stay_whole_and_keep_their_split_when_the_corpus_grows(tmp_path: Path) -> None:
    documents = [f"document {n} says {n * n}" for n in range(400)]
    small = prepare(corpus_of(*documents[:200]), tmp_path, GPT2, Split(0.2))
    large = prepare(corpus_of(*documents), tmp_path, GPT2, Split(0.2))
    for data, count in ((small, 200), (large, 400)):
        parts = {split: GPT2.decode(ids_of(data, split)).split("<|endoftext|>") for split in ("train", "val")}
        assert sorted(parts["train"] + parts["val"]) == sorted(documents[:count])
        assert 0.1 * count < len(parts["val"]) < 0.3 * count
    old, new = (set(GPT2.decode(ids_of(data, "val")).split("<|endoftext|>")) for data in (small, large))
    assert old < new


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_few_texts_leave_no_split_empty(tmp_path: Path, count: int) -> None:
    data = prepare(corpus_of(*(f"text {n}" for n in range(count))), tmp_path, GPT2, Split(0.05))
    parts = {split: GPT2.decode(ids_of(data, split)).split("<|endoftext|>") for split in ("train", "val")}
    assert len(parts["val"]) == 1
    assert sorted(parts["train"] + parts["val"]) == sorted(f"text {n}" for n in range(count))


def test_text_that_spells_a_special_token_is_ordinary(tmp_path: Path) -> None:
    data = prepare(corpus_of("a <|endoftext|> b"), tmp_path, GPT2, Split(0.0))
    assert GPT2.eot_token not in ids_of(data, "train")
    assert GPT2.decode(ids_of(data, "train")) == "a <|endoftext|> b"


def test_the_same_corpus_is_tokenised_once(tmp_path: Path) -> None:
    calls = []

    def documents() -> Iterator[str]:
        calls.append(1)
        return iter(["some text"])

    first = prepare(Corpus("c", "1", documents), tmp_path, GPT2, Split(0.1))
    read = len(calls)
    again = prepare(Corpus("c", "1", documents), tmp_path, GPT2, Split(0.1))
    assert len(calls) == read
    assert first.folder == again.folder
    other = [prepare(Corpus("c", "2", documents), tmp_path, GPT2, Split(0.1)).folder]
    other.append(prepare(Corpus("c", "1", documents), tmp_path, GPT2, Split(0.2)).folder)
    assert len({first.folder, *other}) == 3


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def documents() -> Iterator[str]:
        yield from ["one", "two"]
        raise InputError("unreadable")

    with pytest.raises(InputError, match="unreadable"):
        prepare(Corpus("c", "1", documents), tmp_path / "data", GPT2, Split(0.1))
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("shares", [(-0.1, 0), (1, 0), (0, 1.5), (0.6, 0.4)])
def test_impossible_shares_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="_fraction"):
        Split(*shares)


def damaged(tmp_path: Path) -> Path:
    return prepare(corpus_of("some text to damage"), tmp_path, GPT2, Split(0.0)).folder


def test_a_truncated_shard_is_found(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    shard = folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train-00000\.bin has 7 bytes, its manifest\.json says 8: delete"):
        open_tokens(folder)
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00000\.bin is missing"):
        open_tokens(folder)


def test_a_changed_shard_is_found_before_it_is_used_again(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    shard = folder / "train-00000.bin"
    shard.write_bytes(b"\x01" + shard.read_bytes()[1:])
    with pytest.raises(InputError, match="does not match the SHA-256 in its manifest"):
        prepare(corpus_of("some text to damage"), tmp_path, GPT2, Split(0.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.clear(),
        lambda manifest: manifest.update(format=99),
        lambda manifest: manifest.update(dtype="object"),
        lambda manifest: manifest["splits"]["train"]["shards"][0].update(file="../train-00000.bin"),
        lambda manifest: manifest["splits"].update(train=None),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, change: object) -> None:
    folder = damaged(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)  # type: ignore[operator]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json cannot be used"):
        open_tokens(folder)


def test_a_large_vocabulary_takes_wider_numbers(tmp_path: Path) -> None:
    class Wide:
        name, n_vocab, eot_token = "wide", 100_000, 99_999

        def encode_ordinary_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
            return [[70_000 + ord(c) for c in text] for text in texts]

    data = prepare(corpus_of("ab", "cd", "ef"), tmp_path, Wide(), Split(0.0))  # type: ignore[arg-type]
    assert data.manifest["dtype"] == "uint32"
    assert ids_of(data, "train")[:3] == [70_097, 70_098, 99_999]
