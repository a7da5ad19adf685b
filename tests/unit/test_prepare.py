"""Documents -> shards: what is written, that it does not depend on workers or kills, and what is refused."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from conftest import ROOT, run_script
from gptlit.data import prepare as module
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.parsers import UnreadableDocument
from gptlit.data.prepare import LOCK, prepare, prepare_cached
from gptlit.data.shard_writer import FolderWriter
from gptlit.data.sources import Corpus, SourceFile, open_corpus
from gptlit.data.splitting import Split
from gptlit.data.token_files import MANIFEST, PROGRESS, TokenData, open_prepared
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError

GPT2 = load_tokenizer("gpt2")
WRITE = FolderWriter.write


def corpus_of(*documents: str | UnreadableDocument, name: str = "c", read: Callable[[], None] | None = None) -> Corpus:
    """A corpus in memory; `read` is called each time it is read."""

    def parse(_: Any) -> Iterator[str | UnreadableDocument]:
        if read is not None:
            read()
        return iter(documents)

    return Corpus(name, [SourceFile(name, 0, str(documents), io.BytesIO, parse)])


def ids_of(data: TokenData, split: str) -> list[int]:
    return np.concatenate([shard.ids for shard in data.shards(split)]).tolist() if data.tokens(split) else []


def documents_of(data: TokenData, split: str) -> list[str]:
    return GPT2.decode(ids_of(data, split)).split("<|endoftext|>")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}


def write_jsonl(path: Path, documents: int, seed: int = 0) -> Path:
    """Write a file of documents of very different lengths."""
    draw = random.Random(seed)
    words = "the a model learns from data to write text about trees and rivers in winter , slowly .\n".split(" ")
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(draw.choices(words, k=draw.choice([3, 30, 300]))) + f" {number}"
            file.write(json.dumps({"text": text}) + "\n")
    return path


class Killed(BaseException):
    """A preparation ends."""


def kill_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """End a preparation once it has written more than so many batches."""

    def counted(*args: Any) -> None:
        nonlocal batches
        WRITE(*args)
        batches -= 1
        if batches < 0:
            raise Killed

    monkeypatch.setattr(FolderWriter, "write", counted)


# --- splits


def test_one_text_is_cut_by_characters(tmp_path: Path) -> None:
    text = "abcdefghij" * 10
    data = prepare(corpus_of(text), tmp_path / "out", GPT2, Split(0.1, 0.2))
    parts = [GPT2.decode(ids_of(data, split)) for split in ("train", "val", "test")]
    assert parts == [text[:70], text[70:80], text[80:]]


def test_several_texts_stay_whole_and_keep_their_split_when_the_corpus_grows(tmp_path: Path) -> None:
    documents = [f"document {n} says {n * n}" for n in range(400)]
    small = prepare(corpus_of(*documents[:200]), tmp_path / "small", GPT2, Split(0.2))
    large = prepare(corpus_of(*documents), tmp_path / "large", GPT2, Split(0.2))
    for data, count in ((small, 200), (large, 400)):
        parts = {split: documents_of(data, split) for split in ("train", "val")}
        assert sorted(parts["train"] + parts["val"]) == sorted(documents[:count])
        assert 0.1 * count < len(parts["val"]) < 0.3 * count
    old, new = (set(documents_of(data, "val")) for data in (small, large))
    assert old < new


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_few_texts_leave_no_split_empty(tmp_path: Path, count: int) -> None:
    texts = [f"text {n}" for n in range(count)]
    data = prepare(corpus_of(*texts), tmp_path / "out", GPT2, Split(0.05))
    assert len(documents_of(data, "val")) == 1
    assert sorted(documents_of(data, "train") + documents_of(data, "val")) == sorted(texts)


def test_a_folder_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    for text in ("old text", "new text"):
        data = prepare(corpus_of(text), tmp_path / "out", GPT2, Split(0.0), overwrite=True)
        assert documents_of(data, "train") == [text]


def test_a_document_that_is_there_twice_does_not_empty_a_split(tmp_path: Path) -> None:
    data = prepare(corpus_of("one", "one", "two"), tmp_path / "out", GPT2, Split(0.3))
    assert data.tokens("val")
    assert data.tokens("train")


def test_whole_files_are_divided_too(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}")
    data = prepare(open_corpus("texts"), tmp_path / "out", GPT2, Split(0.2, 0.1))
    parts = {split: documents_of(data, split) for split in ("train", "val", "test")}
    assert sorted(text for part in parts.values() for text in part) == sorted(f"text {number}" for number in range(40))
    assert [len(part) for part in parts.values()] == [28, 8, 4]


def test_separate_sources_are_not_divided(tmp_path: Path) -> None:
    corpora = {"train": corpus_of("one", "two"), "val": corpus_of("three", "four"), "test": corpus_of("five")}
    data = prepare(corpora, tmp_path / "out", GPT2, Split(0.0))
    parts = [documents_of(data, split) for split in ("train", "val", "test")]
    assert parts == [["one", "two"], ["three", "four"], ["five"]]


def test_a_text_file_longer_than_a_piece_is_one_document_with_the_ids_of_the_whole(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = [" tree", "\nA", " 12", "'s", "  ", " über", "ing", ".", " x"]
    text = "".join(draw.choices(words, k=900_000))
    assert len(text) > 2 * 2**20
    (tmp_path / "long.txt").write_text(text)
    data = prepare(open_corpus(str(tmp_path / "long.txt")), tmp_path / "out", GPT2, Split(0.1))
    assert ids_of(data, "train") == GPT2.encode_ordinary(text[: int(len(text) * 0.9)])
    assert ids_of(data, "val") == GPT2.encode_ordinary(text[int(len(text) * 0.9) :])
    assert [part["documents"] for part in data.manifest["splits"].values()] == [1, 1, 0]
    (tmp_path / "short.txt").write_text("short")
    both = prepare(open_corpus([str(tmp_path / "long.txt"), "short.txt"]), tmp_path / "both", GPT2, Split(0.0))
    assert ids_of(both, "train") == [*GPT2.encode_ordinary(text), GPT2.eot_token, *GPT2.encode_ordinary("short")]


@pytest.mark.parametrize("shares", [(-0.1, 0), (1, 0), (0, 1.5), (0.6, 0.4)])
def test_impossible_shares_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="_fraction"):
        Split(*shares)


# --- what is on disk


def test_the_manifest_says_what_was_written(tmp_path: Path) -> None:
    documents = ["first one", "", "naïve", "the third document"]
    data = prepare(corpus_of(*documents), tmp_path / "out", GPT2, Split(0.0), shard_tokens=4)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    train = manifest["splits"]["train"]
    assert (train["documents"], train["bytes"]) == (3, len("first onenaïvethe third document".encode()))
    ids = ids_of(data, "train")
    assert documents_of(data, "train") == ["first one", "naïve", "the third document"]
    assert [shard["tokens"] for shard in train["shards"]] == [4] * (len(ids) // 4) + [len(ids) % 4] * (len(ids) % 4 > 0)
    assert manifest["tokenizer"] == "gpt2"
    assert manifest["vocab_size"] == 50257
    assert (manifest["dtype"], manifest["skipped"]) == ("uint16", 0)
    assert not (tmp_path / "out" / PROGRESS).exists()
    data.verify()


def test_text_that_spells_a_special_token_is_ordinary(tmp_path: Path) -> None:
    data = prepare(corpus_of("a <|endoftext|> b"), tmp_path / "out", GPT2, Split(0.0))
    assert GPT2.eot_token not in ids_of(data, "train")
    assert GPT2.decode(ids_of(data, "train")) == "a <|endoftext|> b"


def test_a_large_vocabulary_takes_wider_numbers(tmp_path: Path) -> None:
    class Wide:
        name, n_vocab, eot_token = "wide", 100_000, 99_999

        def encode_to_numpy(self, text: str) -> np.ndarray:
            return np.array([70_000 + ord(c) for c in text], dtype=np.uint32)

    data = prepare(corpus_of("ab", "cd", "ef"), tmp_path / "out", Wide(), Split(0.0))  # type: ignore[arg-type]
    assert data.manifest["dtype"] == "uint32"
    assert ids_of(data, "train")[:3] == [70_097, 70_098, 99_999]


def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    corpus = open_corpus(str(write_jsonl(tmp_path / "a.jsonl", 6000)))
    for workers in (0, 3):
        prepare(corpus, tmp_path / f"{workers}", GPT2, Split(0.05, 0.05), shard_tokens=10_000, num_workers=workers)
    written = [bytes_of(tmp_path / f"{workers}") for workers in (0, 3)]
    assert len(written[0]) > 50
    assert written[0] == written[1]


KILLED = """
import os, signal, sys
from pathlib import Path
from gptlit.data import prepare as module
from gptlit.data.sources import open_corpus
from gptlit.data.tokenizer import load_tokenizer

left = int(sys.argv[3])
write = module.FolderWriter.write
def write_and_count(*args):
    global left
    write(*args)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

module.FolderWriter.write = write_and_count
module.BATCH_CHARACTERS, split = 10_000, module.Split(0.05, 0.05)
corpus, options = open_corpus(sys.argv[1]), {"shard_tokens": 2000, "num_workers": 2}
module.prepare(corpus, Path(sys.argv[2]), load_tokenizer(), split, **options)
"""


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 3000)
    prepare(open_corpus(str(source)), tmp_path / "whole", GPT2, Split(0.05, 0.05), shard_tokens=2000)
    for batches, status in ((5, -signal.SIGKILL), (30, -signal.SIGKILL), (10**6, 0)):
        done = run_script("-c", KILLED, str(source), str(tmp_path / "killed"), str(batches), cwd=tmp_path)
        assert done.returncode == status, done.stderr
        if status:
            (tmp_path / "killed" / f".{PROGRESS}-0.partial").touch()  # as if killed while it was written
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", 100_000), tmp_path / "killed"
    prepare(open_corpus(str(source)), tmp_path / "whole", GPT2, Split(0.05, 0.05), shard_tokens=2000)
    draw = random.Random(0)
    command = [sys.executable, "-m", "gptlit", "prepare", str(source), f"--out={out}", "--shard_tokens=2000"]
    command += ["--num_workers=2", "--test_fraction=0.05"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def noted() -> bytes:
        return (out / PROGRESS).read_bytes() if (out / PROGRESS).exists() else b""

    for ends_file in [False] * 10 + [True]:
        begun = noted()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while not ends_file and noted() == begun and process.poll() is None:  # until it goes on
                time.sleep(0.001)
            if not ends_file:
                time.sleep(draw.uniform(0, 0.2))
                process.kill()
            _, errors = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_ctrl_c_ends_the_workers_too(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole process group."""
    source = write_jsonl(tmp_path / "a.jsonl", 50_000)
    command = [sys.executable, "-m", "gptlit", "prepare", str(source), "--out=out", "--shard_tokens=2000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--num_workers=2"],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in background
    ) as process:
        while not (tmp_path / "out" / "train-00001.bin").exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # the workers hold the pipe too
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_kill_between_any_two_batches_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place where it can go on is tried, with bad documents and several parts before it."""
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 50)
    texts = [corpus_of("first document", UnreadableDocument("bad"), "second", name="a")]
    texts.append(corpus_of(*(f"text number {n}" for n in range(30)), UnreadableDocument("worse"), name="b"))
    corpus = Corpus("both", [part for text in texts for part in text.files])

    def run(out: Path, batches: int) -> None:
        kill_after(monkeypatch, batches)
        prepare(corpus, out, GPT2, Split(0.2, 0.2), shard_tokens=7, skip_bad=True)

    run(tmp_path / "whole", 10**9)
    expected = bytes_of(tmp_path / "whole")
    assert json.loads(expected[MANIFEST])["skipped"] == 2
    for batches in range(8):
        out = tmp_path / f"{batches}"
        with pytest.raises(Killed):
            run(out, batches)
        shards = json.loads((out / PROGRESS).read_text())["splits"]["train"]["shards"]
        with (out / f"train-{len(shards):05d}.bin").open("ab") as file:
            file.write(b"what was not noted before the kill")
        more = 0  # and killed again, a batch later each time
        while True:
            try:
                run(out, more := more + 1)
                break
            except Killed:
                continue
        assert bytes_of(out) == expected


# --- the folder


def test_the_same_command_again_does_nothing(tmp_path: Path) -> None:
    read: list[int] = []
    corpus = corpus_of("one", "two", read=lambda: read.append(1))
    prepare(corpus, tmp_path / "out", GPT2, Split(0.1))
    count, before = len(read), bytes_of(tmp_path / "out")
    prepare(corpus, tmp_path / "out", GPT2, Split(0.1))
    assert len(read) <= count + 1
    assert bytes_of(tmp_path / "out") == before


def test_a_cached_corpus_has_a_folder_for_each_setting(tmp_path: Path) -> None:
    read: list[int] = []
    corpus = corpus_of("some text", read=lambda: read.append(1))
    first = prepare_cached(corpus, tmp_path, GPT2, Split(0.1))
    count = len(read)
    assert prepare_cached(corpus, tmp_path, GPT2, Split(0.1)).folder == first.folder
    assert len(read) == count
    others = [prepare_cached(corpus_of("other text"), tmp_path, GPT2, Split(0.1)).folder]
    others.append(prepare_cached(corpus, tmp_path, GPT2, Split(0.2)).folder)
    assert len({first.folder, *others}) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corpora": corpus_of("other")}, "another sources"),
        ({"split": Split(0.2)}, r"another val_fraction \(0.1, now 0.2\)"),
        ({"shard_tokens": 5}, "another shard_tokens"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_replaced_if_told(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    values: dict[str, Any] = {"corpora": corpus_of("one two three"), "split": Split(0.1), "shard_tokens": 1}
    out = tmp_path / "out"
    prepare(values["corpora"], out, GPT2, values["split"], shard_tokens=1)
    (out / "notes.txt").write_text("the user's own")
    before = bytes_of(out)
    new = {**values, **change}
    with pytest.raises(InputError, match=f"out was made with {words}.*--overwrite"):
        prepare(new["corpora"], out, GPT2, new["split"], shard_tokens=new["shard_tokens"])
    assert bytes_of(out) == before
    prepare(new["corpora"], out, GPT2, new["split"], shard_tokens=new["shard_tokens"], overwrite=True)
    prepare(new["corpora"], tmp_path / "fresh", GPT2, new["split"], shard_tokens=new["shard_tokens"])
    assert (out / "notes.txt").read_text() == "the user's own"
    (out / "notes.txt").unlink()
    assert bytes_of(out) == bytes_of(tmp_path / "fresh")


def test_a_folder_in_use_for_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match=r"is not empty \(thesis.tex\) and holds no tokens of ours"):
        prepare(corpus_of("one"), tmp_path, GPT2, Split(0.0), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("content", ["", "{}"])
def test_a_damaged_progress_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    kill_after(monkeypatch, 0)
    with pytest.raises(Killed):
        prepare(corpus_of("one", "two"), tmp_path / "out", GPT2, Split(0.0))
    (tmp_path / "out" / PROGRESS).write_text(content)
    with pytest.raises(InputError, match=r"out was made with another format .*--overwrite"):
        prepare(corpus_of("one", "two"), tmp_path / "out", GPT2, Split(0.0))


def test_two_at_once_are_refused_or_wait(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / LOCK),
        pytest.raises(InputError, match="another process is preparing .*out: wait for it"),
    ):
        prepare(corpus_of("one"), tmp_path / "out", GPT2, Split(0.0))
    code = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
    code += "print('in', flush=True); time.sleep(1); open(sys.argv[2], 'w')"
    command = [sys.executable, "-c", code, str(tmp_path / "out" / LOCK), str(tmp_path / "released")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        prepare(corpus_of("one"), tmp_path / "out", GPT2, Split(0.0), wait=True)
        assert (tmp_path / "released").exists()
        assert other.wait() == 0


def test_what_a_kill_leaves_in_the_first_moment_does_not_block(tmp_path: Path) -> None:
    (tmp_path / ".progress.json-1.partial").write_text("{")
    assert documents_of(prepare(corpus_of("one"), tmp_path, GPT2, Split(0.0)), "train") == ["one"]


def test_a_million_spaces_are_encoded(tmp_path: Path) -> None:
    data = prepare(corpus_of("a" + " " * 1_000_000 + "b"), tmp_path / "out", GPT2, Split(0.0))
    assert len(documents_of(data, "train")[0]) == 1_000_002


def test_tiny_documents_do_not_fill_a_batch_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    batches = module._batches
    monkeypatch.setattr(module, "_batches", lambda pieces: (sizes.append(len(b)) or b for b in batches(pieces)))
    prepare(corpus_of(*["x"] * 20_000), tmp_path / "out", GPT2, Split(0.0))
    assert max(sizes) == module.BATCH_PIECES


def test_a_full_disk_is_said_and_the_next_call_goes_on(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    source = write_jsonl(tmp_path / "a.jsonl", 2000)
    command = [sys.executable, "-m", "gptlit", "prepare", str(source), "--out=out", "--shard_tokens=200000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    full = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1
    assert full.stderr.startswith("error: there is no space left for out (File too large): free some")
    assert full.stderr.count("\n") == 1
    assert (tmp_path / "out" / PROGRESS).exists()
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    whole = prepare(open_corpus(str(source)), tmp_path / "whole", GPT2, Split(0.05), shard_tokens=200_000)
    assert bytes_of(tmp_path / "out") == bytes_of(whole.folder)


# --- bad documents


def test_what_cannot_be_read_stops_it_or_is_counted(tmp_path: Path) -> None:
    corpus = corpus_of("one", UnreadableDocument("a.jsonl line 2 is not JSON"), "three")
    with pytest.raises(InputError, match="a.jsonl line 2 is not JSON .*--skip_bad"):
        prepare(corpus, tmp_path / "out", GPT2, Split(0.0))
    data = prepare(corpus, tmp_path / "out", GPT2, Split(0.0), skip_bad=True)
    assert documents_of(data, "train") == ["one", "three"]
    assert data.manifest["skipped"] == 1


def test_what_damage_costs_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [f"document {n} " + random.Random(n).randbytes(200).hex() for n in range(500)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-30_000])
    data = prepare(open_corpus("a.jsonl.gz"), tmp_path / "out", GPT2, Split(0.1), skip_bad=True)
    kept = sorted(documents_of(data, "train") + documents_of(data, "val"))
    assert kept == sorted(documents[: len(kept)])
    assert len(kept) > 300
    said = capsys.readouterr().err
    assert said.count("left out") == 1
    assert f"a.jsonl.gz is damaged after {len(kept)} documents" in said


def test_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no text in the sources of .*out \(2 documents were left out\)"):
        prepare(
            corpus_of("", UnreadableDocument("x"), UnreadableDocument("y")),
            tmp_path / "out",
            GPT2,
            Split(0.1),
            skip_bad=True,
        )
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_worker_that_dies_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    class Deadly:
        name, n_vocab, eot_token = "deadly", 10, 9

        def encode_to_numpy(self, text: str) -> np.ndarray:
            os._exit(3)

    source = write_jsonl(tmp_path / "a.jsonl", 100)
    with pytest.raises(InputError, match=r"a worker process died, .* a smaller --num_workers \(now 1; 0: no workers\)"):
        prepare(open_corpus(str(source)), tmp_path / "out", Deadly(), Split(0.1), num_workers=1)  # type: ignore[arg-type]


def test_what_is_not_complete_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderWriter, "finish", stop)
    source, out = write_jsonl(tmp_path / "a.jsonl", 300), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(open_corpus(str(source)), out, GPT2, Split(0.1), shard_tokens=500)
    assert list(out.glob("train-*.bin"))
    with pytest.raises(InputError, match="out is not complete: wait for `gptlit prepare`, or give its command again"):
        TokenDataModule(str(out), context_length=8).setup()
    monkeypatch.undo()
    prepare(open_corpus(str(source)), out, GPT2, Split(0.1), shard_tokens=500)
    TokenDataModule(str(out), context_length=8).setup()


# --- damage after the preparation


def damaged(tmp_path: Path) -> Path:
    return prepare_cached(corpus_of("some text to damage"), tmp_path, GPT2, Split(0.0)).folder


def test_a_truncated_shard_is_found(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    shard = folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train-00000\.bin has 7 bytes, its manifest\.json says 8: delete"):
        open_prepared(folder)
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00000\.bin is missing"):
        open_prepared(folder)


def test_a_changed_shard_is_found_before_it_is_used_again(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    shard = folder / "train-00000.bin"
    shard.write_bytes(b"\x01" + shard.read_bytes()[1:])
    with pytest.raises(InputError, match="does not match the SHA-256 in its manifest"):
        damaged(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.clear(),
        lambda manifest: manifest.update(format=99),
        lambda manifest: manifest.update(dtype="object"),
        lambda manifest: manifest["splits"].update(train=None),
        lambda manifest: manifest.pop("tokenizer_sha256"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, change: Any) -> None:
    folder = damaged(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json cannot be used"):
        open_prepared(folder)


def test_progress_is_shown_line_by_line_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY", -1.0)
    (tmp_path / "a.txt").write_text("some text")
    prepare(open_corpus("a.txt"), tmp_path / "out", GPT2, Split(0.0))
    assert capsys.readouterr().err == "preparing out: 9 of 9 bytes, 2 tokens\n"
