"""Where documents come from."""

from pathlib import Path

import pytest

from gptlit.data.corpus import open_corpus
from gptlit.errors import InputError


def test_python_docs_are_technical_english_in_a_fixed_order() -> None:
    corpus = open_corpus("python-docs")
    documents = list(corpus.documents())
    assert documents == list(corpus.documents())
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
    with pytest.raises(InputError, match=r"'folder' has no \.txt file"):
        open_corpus("folder")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8: byte 0xe9 at position 1;"):
        list(open_corpus("latin.txt").documents())
