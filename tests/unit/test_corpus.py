"""Where documents come from."""

import gzip
import io
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import regex
from backports import zstd
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gptlit.data import parsers as module
from gptlit.data import sources
from gptlit.data.parsers import CUT, ReadOptions, UnreadableDocument
from gptlit.data.sources import open_corpus
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError

GPT2 = load_tokenizer()


def newer_patterns() -> list[str]:
    """The patterns of cl100k_base and o200k_base, without their vocabularies."""
    found = []
    for build in (openai_public.cl100k_base, openai_public.o200k_base):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
            found.append(build()["pat_str"])
    return found


NEWER_PATTERNS = newer_patterns()


def test_python_docs_are_technical_english_in_a_fixed_order() -> None:
    corpus = open_corpus("python-docs")
    documents = list(corpus.documents())
    assert documents[:50] == list(islice(corpus.documents(), 50))
    assert len(set(documents)) == len(documents) > 500
    assert 1_500_000 < sum(map(len, documents)) < 4_000_000
    assert any("Assert statements are a convenient way" in document for document in documents)  # the reference
    assert any("Encode bytes-like object" in document for document in documents)  # a docstring, of base64


def test_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_bytes("\ufefffirst\r\nline".encode())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("third")
    (tmp_path / "d.md").write_text("not text")
    assert list(open_corpus(str(tmp_path / "b.txt")).documents()) == ["second"]
    assert list(open_corpus(str(tmp_path)).documents()) == ["first\nline", "second", "third"]
    assert list(open_corpus(str(tmp_path / "[ab].txt")).documents()) == ["first\nline", "second"]


def test_the_name_is_fit_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "my texts").mkdir()
    for name in ("a b.txt", "c.txt"):
        (tmp_path / "my texts" / name).write_text("words")
    names = [open_corpus(str(tmp_path / source)).name for source in ("my texts", "my texts/*.txt", "my texts/a b.txt")]
    assert names == ["my_texts", "my_texts", "a_b"]


def test_the_fingerprint_follows_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = open_corpus(str(path)).fingerprint
    assert open_corpus(str(path)).fingerprint == before
    path.write_text("two")
    assert open_corpus(str(path)).fingerprint != before


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nowhere.txt' does not exist"):
        open_corpus("nowhere.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"empty\.txt is empty"):
        open_corpus("empty.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"'folder' has no \.txt, \.jsonl, \.parquet file"):
        open_corpus("folder")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8: it has the byte 0xe9; if"):
        list(open_corpus("latin.txt").documents())


# --- JSON lines, Parquet, packed files

TEXTS = ["first text", "second\r\ntext", "naïve 🙂", ""]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": n, key: text}).encode() + b"\n" for n, text in enumerate(texts))


def write_parquet(path: Path, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


@pytest.mark.parametrize(
    ("name", "pack"), [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd.compress)]
)
def test_json_lines_plain_and_packed(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(jsonl(TEXTS) + b"\n"))
    corpus = open_corpus(name)
    assert list(corpus.documents()) == TEXTS
    assert corpus.name == "a"
    assert corpus.files[0].size == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONLINES.gz", "a.json", "a.json.gz", "a.json.zst"])
def test_json_lines_under_other_names(name: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstd.compress}.get(name.rpartition(".")[2], bytes)
    Path(name).write_bytes(pack(jsonl(TEXTS, key="body")))
    assert list(open_corpus(name, ReadOptions(text_key="body")).documents()) == TEXTS
    with pytest.raises(InputError, match=f"{name} line 1 has no 'text', only 'id', 'body': set text_key"):
        list(open_corpus(name).documents())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps([{"text": text} for text in TEXTS]), TEXTS),
        ("\ufeff" + json.dumps([{"text": text} for text in TEXTS], indent=2), TEXTS),
        ('{"text": "one"}\n{"text": ', ["one", "a.json line 2 is not JSON"]),
        ('\n{"tex\n{"text": "two"}\n', ["a.json line 2 is not JSON", "two"]),
        ('[{"text": "one"}, 5]', ["one", "a.json item 2 has no 'text', only int"]),
        ('[{"text": "one"},\n{"text": "tw', ["a.json is not a JSON array (Unterminated string"]),
        ('{"data": [{"text": "one"}]}', ["a.json line 1 has no 'text', only 'data': set text_key"]),
    ],
)
def test_a_json_file_is_lines_or_an_array_of_objects(content: str, expected: list[str]) -> None:
    Path("a.json").write_text(content)
    found = [
        text.reason if isinstance(text, UnreadableDocument) else text for text in open_corpus("a.json").files[0].read()
    ]
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"id,text\n1,one\n", "is a table: save it as .jsonl or .parquet"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n"), "is a table"),
        ("a.docx", b"PK\x03\x04rest", "is a zip archive, as .docx"),
        ("a.pdf", b"%PDF-1.7 only ASCII follows", "is a PDF: save its text as .txt, for instance with pdftotext"),
        ("a.txt", gzip.compress(b"text"), "is compressed with gzip: let its name end in .gz"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16: convert it with iconv -f UTF-16"),
        ("a.txt", b'{"id": 0, "text": "one"}\n', "holds JSON, not plain text: let its name end in .jsonl"),
        ("a", b'\xef\xbb\xbf[\n {"x": 1}]', "holds JSON"),
        ("train.bin", b"\x01\x00\x40\x00" * 99, "is binary, not text"),
    ],
)
@pytest.mark.parametrize("separator", ["", "<|end|>"])
def test_what_is_no_plain_text_is_refused_by_name(name: str, content: bytes, words: str, separator: str) -> None:
    Path(name).write_bytes(content)
    found = list(open_corpus(name, ReadOptions(separator=separator)).files[0].read())
    if separator and "table" in words:
        assert all(isinstance(text, str) for text in found)  # whoever sets a separator wants it as it is
    else:
        (bad,) = found
        assert isinstance(bad, UnreadableDocument)
        assert bad.reason.startswith(f"{name} {words}")
        assert "\n" not in bad.reason


def test_packed_text_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("déjà\r\nvu".encode()))
    write_parquet(tmp_path / "b.parquet", text=TEXTS, id=[1, 2, 3, 4])
    assert list(open_corpus("a.txt.gz").documents()) == ["déjà\nvu"]
    assert list(open_corpus("b.parquet").documents()) == TEXTS
    assert list(open_corpus(".").documents()) == ["déjà\nvu", *TEXTS]


def test_another_key_and_several_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one"], key="content"))
    write_parquet(tmp_path / "b.parquet", content=["two"])
    corpus = open_corpus(["a.jsonl", "b.parquet"], ReadOptions(text_key="content"))
    assert list(corpus.documents()) == ["one", "two"]
    assert corpus.name == "a-b"
    assert corpus.fingerprint != open_corpus(["a.jsonl", "b.parquet"]).fingerprint


@given(st.lists(st.text(alphabet="ab <|en", max_size=12), max_size=8), st.integers(1, 9))
def test_a_separator_divides_a_file(texts: list[str], block: int) -> None:
    expected = [text.strip() for text in "<|end|>".join(texts).split("<|end|>")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = list(module._separated("a", "<|end|>", io.BytesIO("<|end|>".join(texts).encode())))
    assert found == expected


@given(st.text(max_size=60), st.integers(1, 7))
def test_a_text_does_not_depend_on_how_it_is_read(text: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = "".join(module._decoded("a", io.BytesIO(text.encode())))
    assert found == text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["a", "B", "é", "²", "5", " ", "  ", "\n", "\t", "'s", "!", "_", "日", "/", "\u0301"])))
def test_pieces_are_cut_where_the_tokenizer_cuts(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = list(module.pieces(iter(parts), size=2))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in GPT2.encode_ordinary(piece)] == GPT2.encode_ordinary(text)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["a", "B", "é", "²", "5", " ", "  ", "\n", "\r", "'s", "!", "_", "日", "/", "\u0301"])))
def test_pieces_are_cut_where_newer_patterns_cut_too(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = list(module.pieces(iter(parts), size=2))
    for pattern in NEWER_PATTERNS:
        assert [t for piece in pieces for t in regex.findall(pattern, piece)] == regex.findall(pattern, text)


@pytest.mark.parametrize("unit", ["1 2.5\n", "日", "aB+/9", " ", "\n", "5 a ", "a"])
def test_a_text_is_searched_once_for_cuts_whatever_is_in_it(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = 0

    class Counted:
        def search(self, text: str, start: int) -> Any:
            nonlocal searched
            found = CUT.search(text, start)
            searched += (found.end() if found else len(text)) - start
            return found

    monkeypatch.setattr(module, "CUT", Counted())
    text = unit * (40_000 // len(unit))
    assert "".join(module.pieces((text[n : n + 100] for n in range(0, len(text), 100)), size=100)) == text
    assert searched < 1.1 * len(text)


def test_a_text_without_words_is_cut_somewhere() -> None:
    pieces = list(module.pieces(iter(["=" * 10] * 10), size=5, longest=25))
    assert pieces == ["=" * 30, "=" * 30, "=" * 30, "=" * 10]


BAD = [
    ("a.jsonl", b'{"text": "ok"}\nnot json\n{"text": "more"}\n', ["ok", "more"], "a.jsonl line 2 is not JSON"),
    ("a.jsonl", b'{"text": "ok"}\n\xff\xfe\n', ["ok"], "a.jsonl line 2 is not JSON"),
    ("a.jsonl", b'{"text": 5}\n{"text": "ok"}\n', ["ok"], "a.jsonl line 1: 'text' is int, not text"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', [], "a.jsonl line 1 has no 'text', only 'body', 'id': set text_key"),
    ("a.jsonl", b"[1]\n", [], "a.jsonl item 1 has no 'text', only int"),
    ("a.jsonl.gz", gzip.compress(jsonl(["x" * 99] * 999))[:200], None, "a.jsonl.gz is damaged after"),
    ("a.jsonl.gz", b"not gzip at all", [], "a.jsonl.gz is damaged after 0 documents"),
    ("a.jsonl.zst", zstd.compress(jsonl(["y" * 99] * 999))[:-5], None, "a.jsonl.zst is damaged after"),
    ("a.jsonl.zst", b"not zstd at all", [], "a.jsonl.zst is damaged after 0 documents"),
    ("a.parquet", b"PAR1 not parquet", [], "a.parquet is damaged after row 0"),
    ("a.txt", "déjà".encode("latin-1"), [], "a.txt is not UTF-8: it has the byte 0xe9"),
]


@pytest.mark.parametrize(("name", "content", "good", "words"), BAD, ids=[f"{n}-{w[-20:]}" for n, _, _, w in BAD])
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, good: list[str] | None, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = open_corpus(name)
    with pytest.raises(InputError, match=words):
        list(corpus.documents())
    found = list(corpus.files[0].read())
    assert sum(isinstance(text, UnreadableDocument) for text in found) == 1
    assert good is None or [text for text in found if isinstance(text, str)] == good


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst"])
def test_what_can_be_read_of_a_truncated_file_is_kept(name: str) -> None:
    draw = random.Random(0)
    texts = [f"{n} " + "".join(draw.choices("abcdefgé ", k=500)) for n in range(2000)]
    packed = zstd.compress(jsonl(texts)) if name.endswith("zst") else gzip.compress(jsonl(texts))
    Path(name).write_bytes(packed[: len(packed) * 4 // 5])
    *found, bad = open_corpus(name).files[0].read()
    assert isinstance(bad, UnreadableDocument)
    assert bad.ends_file
    assert bad.reason.startswith(f"{name} is damaged after {len(found)} documents")
    assert found == texts[: len(found)]
    assert len(found) > 0.6 * len(texts)


def test_a_damaged_parquet_file_keeps_what_came_before(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"{n} " + "words " * 500 for n in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression=None)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 2 : len(content) * 3 // 4] = b"\xff" * (len(content) * 3 // 4 - len(content) // 2)
    (tmp_path / "a.parquet").write_bytes(content)
    found = list(open_corpus("a.parquet").files[0].read())
    assert isinstance(found[-1], UnreadableDocument)
    assert "a.parquet is damaged after row" in found[-1].reason
    assert found[-1].ends_file
    assert 200 < len(found) <= 501


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", body=["x"], url=["y"])
    with pytest.raises(InputError, match="a.parquet has no column 'text', only 'body', 'url': set text_key"):
        list(open_corpus("a.parquet").documents())


def test_half_characters_in_json_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "a \uD83d b \ud83d\ude42"}' + b'\n{"text": "\xed\xa0\x80"}')
    first, second = open_corpus("a.jsonl").documents()
    assert first == "a \ufffd b 🙂"
    assert second.encode()


def test_empty_files_are_left_out(tmp_path: Path) -> None:
    for name, text in (("a", ""), ("b", "text"), ("c", "")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert list(open_corpus(str(tmp_path)).documents()) == ["text"]


def test_a_text_in_several_formats_is_taken_once_from_the_hub(hub: Path) -> None:
    (hub / "train.txt").write_text("the same as text")
    assert list(open_corpus("hf:someone/stories").documents()) == ["one", "two", "three"]
    assert list(open_corpus("hf:someone/stories/train.txt").documents()) == ["the same as text"]


def test_reading_reports_the_bytes_of_the_packed_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl([str(n) * 50 for n in range(5000)])))
    part = open_corpus("a.jsonl.gz").files[0]
    told: list[int] = []
    assert len(list(part.read(told.append))) == 5000
    assert told == sorted(told)
    assert told[-1] == part.size


def test_two_large_files_are_told_apart_by_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DIGEST_LIMIT", 100)
    prints = []
    for text in ("a" * 200, "a" * 199 + "b", "b" + "a" * 199, "a" * 201):
        (tmp_path / "a.txt").write_text(text)
        prints.append(open_corpus("a.txt").fingerprint)
    assert len(set(prints)) == 4


# --- the hub, with a folder in its place


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set on a file system that answers as the hub's does."""
    root = tmp_path / "hub"
    data = root / "datasets" / "someone" / "stories"
    (data / "data").mkdir(parents=True)
    write_parquet(data / "data" / "train-00000-of-00002.parquet", text=["one", "two"])
    write_parquet(data / "data" / "train-00001-of-00002.parquet", text=["three"])
    write_parquet(data / "data" / "validation-00000-of-00001.parquet", text=["held out"])
    (data / "README.md").write_text("about")
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: DirFileSystem(str(root), LocalFileSystem()))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, path, repo_type: str(root / f"{repo_type}s" / repo / path)
    )
    return data


def test_a_data_set_of_the_hub_gives_what_is_for_training(hub: Path) -> None:
    corpus = open_corpus("hf:someone/stories")
    assert list(corpus.documents()) == ["one", "two", "three"]
    assert corpus.name == "stories"
    assert sum(file.size for file in corpus.files) == sum(path.stat().st_size for path in hub.glob("data/train*"))


def test_a_path_in_a_data_set_gives_what_it_names(hub: Path) -> None:
    assert list(open_corpus("hf:someone/stories/data/validation-*.parquet").documents()) == ["held out"]
    assert list(open_corpus("hf:someone/stories/data/train-00001-of-00002.parquet").documents()) == ["three"]
    assert list(open_corpus("hf:someone/stories/data/train-*").documents()) == ["one", "two", "three"]
    assert list(open_corpus("hf:someone/stories/data").documents()) == ["one", "two", "three", "held out"]
    (hub / "data" / "c4-train.00000.json.gz").write_bytes(gzip.compress(jsonl(["four"])))
    assert list(open_corpus("hf:someone/stories/data/c4-*.json.gz").documents()) == ["four"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:gpt2", "'hf:gpt2' is no data set: write hf:OWNER/NAME"),
        ("hf:someone/else", "'hf:someone/else' has no .txt, .jsonl, .parquet file for training"),
    ],
)
def test_what_is_not_on_the_hub_is_named(hub: Path, source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_corpus(source)


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def glob(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Closed)
    with pytest.raises(InputError, match=r"'hf:a/b' cannot be listed \(ConnectionError: no route\)"):
        open_corpus("hf:a/b")


def test_a_folder_of_tokens_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"ab")
    with pytest.raises(InputError, match="holds tokens, not text: name the text that they were made of"):
        open_corpus(str(tmp_path))
