"""Rows of instructions and labelled texts: files, templates, what is learnt, batches."""

import csv
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gptlit.data.rows import (
    Labels,
    RowOptions,
    Rows,
    label_names,
    longest_row,
    prepare_rows,
    read_rows,
    row_kind,
    split_sizes,
)
from gptlit.data.splitting import Split
from gptlit.data.templates import TEMPLATES, find_template
from gptlit.data.token_files import SPLITS
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError

with pytest.MonkeyPatch.context() as _patch:
    _patch.setitem(sys.modules, "psutil", ModuleType("psutil"))  # ch07 needs it elsewhere
    from llms_from_scratch.ch07 import InstructionDataset, custom_collate_fn, format_input

EOT = 50256
TOKENIZER = load_tokenizer("gpt2")


def entries(count: int) -> list[dict[str, str]]:
    """Instructions of many lengths, every other one with an input."""
    draw = random.Random(0)
    words = "the model learns, writes. Text (about) trees 12 and \n rivers!".split(" ")
    texts = ["x" + " ".join(draw.choices(words, k=draw.randint(1, 30))).rstrip() for _ in range(3 * count)]
    return [
        {"instruction": texts[n], "input": texts[count + n] * (n % 2), "output": texts[2 * count + n]}
        for n in range(count)
    ]


def write(name: str, rows: Any) -> Path:
    path = Path(name)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path, length: int = 1024, split: Split = Split(0.0), **options: Any) -> dict[str, Rows]:  # noqa: B008
    kind = row_kind(path)
    assert kind is not None
    data = prepare_rows(path, kind, Path("data"), TOKENIZER, split, RowOptions(**options))
    names = label_names(data.shards("train"))
    return {name: Rows(data.shards(name), length, EOT, Labels(names)) for name in SPLITS}


def ids_of(batch: torch.Tensor) -> list[str]:
    return [TOKENIZER.decode(row.tolist()) for row in batch]


# --- instructions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("masks", "limit"), [(False, 1024), (True, 1024), (False, 60)])
def test_batches_are_those_of_the_books_package(masks: bool, limit: int) -> None:
    """Order, lengths and ids of its DataLoader, with seed 123; the mask as in its exercise 7.2."""
    found = entries(40)
    rows = rows_of(write("a.json", found), limit, mask_prompt=masks)["train"]
    dataset = InstructionDataset(found, TOKENIZER)
    prompts = [len(TOKENIZER.encode(format_input(entry))) for entry in found]

    def both(batch: list[int]) -> tuple[Any, Any]:
        inputs, targets = custom_collate_fn([dataset[n] for n in batch], allowed_max_length=limit)
        for row, n in enumerate(batch):
            targets[row, : (prompts[n] - 1) * masks] = -100
        return (inputs, targets), rows[np.array(batch)]

    assert len(rows) == 40
    torch.manual_seed(123)
    loader = torch.utils.data.DataLoader(range(40), batch_size=8, shuffle=True, collate_fn=both)  # type: ignore[arg-type]
    for theirs, ours in loader:
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_the_books_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three rows of section 7.3: ids that no text has, so they stand in for what a template gives."""
    toy = iter([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])

    def encode(*_: Any) -> tuple[list[int], list[bool]]:
        ids = [*next(toy), EOT]
        return ids, [True] * len(ids)

    monkeypatch.setattr("gptlit.data.templates.Template.encode", encode)
    rows = rows_of(write("a.json", entries(3)))["train"]
    inputs, targets = rows[np.arange(3)]
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, EOT, EOT, EOT], [7, 8, 9, EOT, EOT]]
    assert targets.tolist() == [[1, 2, 3, 4, EOT], [6, EOT, -100, -100, -100], [8, 9, EOT, -100, -100]]


def test_splits_are_the_books() -> None:
    """Sizes of its 1,100 instructions and of its 1,494 balanced messages; instructions stay in the file's order."""
    assert split_sizes(1100, Split(0.05, 0.1), "instructions") == {"train": 935, "test": 110, "val": 55}
    assert split_sizes(1494, Split(0.1, 0.2), "labels") == {"train": 1045, "val": 149, "test": 300}
    assert split_sizes(7, Split(0.1, 0.0), "labels") == {"train": 6, "val": 1, "test": 0}
    assert split_sizes(7, Split(0.0, 0.1), "labels") == {"train": 6, "val": 0, "test": 1}
    found = entries(20)
    rows = rows_of(write("a.jsonl", found), split=Split(0.05, 0.1))
    for name, first in (("train", 0), ("test", 17), ("val", 19)):
        assert found[first]["instruction"] in ids_of(rows[name][np.array([0])][0])[0]


def test_only_answers_of_a_conversation_are_learnt() -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "So."),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = rows_of(write("a.jsonl", [row]), template="chat")["train"]
    inputs, targets = rows[np.array([0])]
    full = "Be brief.\n\nUser:\nHi\n\nAssistant:\nHello.<|endoftext|>\n\nUser:\nBye\n\nAssistant:\nSo."
    assert ids_of(inputs) == [full]
    learnt = targets[targets >= 0]
    assert TOKENIZER.decode(learnt.tolist()) == "\n\nAssistant:\nHello.<|endoftext|>\n\nAssistant:\nSo.<|endoftext|>"
    assert rows.count_targets(np.array([0])) == len(learnt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_how_a_row_begins(name: str) -> None:
    template = find_template(name)
    turns = [{"role": "user", "content": "Spell it.", "input": "Ocassion"}]
    answer = TOKENIZER.encode_ordinary("It is 'Occasion'.")
    whole, _ = template.encode(TOKENIZER, [*turns, {"role": "assistant", "content": "It is 'Occasion'."}])
    assert whole == [*template.prompt(TOKENIZER, turns), *answer, EOT]


def test_what_is_too_long_is_cut_and_left_out_if_nothing_is_learnt() -> None:
    row = {"instruction": "word " * 40, "input": "", "output": "answer"}
    path = write("a.jsonl", [row, {**row, "instruction": "word"}])
    rows = rows_of(path, 50, mask_prompt=True)["train"]
    assert (len(rows), rows.cut, rows.left_out) == (1, 1, 1)
    assert rows[np.array([0])][0].shape == (1, 32)  # the short one
    rows = rows_of(path, 50)["train"]
    assert (len(rows), rows.cut, rows.left_out) == (2, 1, 0)
    assert [tensor.shape for tensor in rows[np.array([0])]] == [(1, 50)] * 2


def test_padding_has_no_targets() -> None:
    rows = rows_of(write("a.jsonl", entries(2)))["train"]
    inputs, targets = rows[np.array([0, -1])]
    assert inputs.shape == targets.shape == rows[np.array([0])][0].expand(2, -1).shape
    assert targets[1].eq(-100).all()
    assert rows[np.array([-1])][1].tolist() == [[-100]]


def test_a_file_is_tokenized_once_for_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.json", entries(5))
    first = rows_of(path)["train"][np.arange(5)]
    (stored,) = Path("data").iterdir()
    with monkeypatch.context() as patch:
        patch.delattr("gptlit.data.templates.Template.encode")
        again = rows_of(path)["train"][np.arange(5)]
    assert torch.equal(first[0], again[0])
    rows_of(path, template="phi3")
    assert len(list(Path("data").iterdir())) == 2
    stored.write_bytes(stored.read_bytes()[:-200])  # damaged: made again
    assert torch.equal(rows_of(path)["train"][np.arange(5)][0], first[0])
    assert len(list(Path("data").iterdir())) == 2


# --- labelled texts ---------------------------------------------------------------------------------------------

MESSAGES = [("ham", "See you at nine"), ("spam", "Win a prize, now"), ("ham", 'He said "yes"'), ("ham", "Ok")]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.json", "messages"])
def test_labelled_texts_have_one_target(name: str) -> None:
    rows: list[Any] = [{"text": text, "label": label} for label, text in MESSAGES]
    if name == "a.csv":
        quoted = [text.replace('"', '""') for _, text in MESSAGES]
        lines = [f'"{text}",{label}' for text, (label, _) in zip(quoted, MESSAGES, strict=True)]
        Path(name).write_text("\n".join(["Text,Label", *lines]))
    elif name.startswith("a.j"):
        write(name, rows)
    else:
        Path(name).write_text("".join(f"{label}\t{text}\n" for label, text in MESSAGES))
    found = rows_of(Path(name))["train"]
    inputs, targets = found[np.arange(4)]
    assert (targets >= 0).sum(dim=1).tolist() == [1] * 4
    served = set()
    for ids, row in zip(inputs, targets, strict=True):
        last = int((row >= 0).nonzero())
        assert ids[last + 1 :].eq(EOT).all()
        served.add((["ham", "spam"][int(row[last])], TOKENIZER.decode(ids[: last + 1].tolist())))
    assert served == set(MESSAGES)
    assert found.count_targets(np.arange(4)) == 4


def test_a_quoted_field_may_hold_several_lines() -> None:
    """pandas, with which the book reads its messages, joins two pairs of lines in that way."""
    Path("a.tsv").write_text('ham\t"one\nham\ttwo"\nspam\tthree\n')
    rows = rows_of(Path("a.tsv"))["train"]
    assert len(rows) == 2


def test_quotes_within_a_text_belong_to_it() -> None:
    """Neither a quote inside a field nor text after a quoted one is refused; the messages of the book have both."""
    lines = ['ham\tI said "hi', 'ham\t"Happy day" I know', "", 'spam\t"""Free"" entry"']
    Path("a.tsv").write_text("\n".join(lines))
    texts = [row["text"] for _, row in read_rows(Path("a.tsv"))]
    assert texts == ['I said "hi', "Happy day I know", '"Free" entry']


def test_only_line_feeds_and_carriage_returns_end_a_row() -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
    content = f"ham\t{text}\r\nspam\t{text}\rham\t{text}\n".encode()
    for name in ("a.tsv", "messages"):
        Path(name).write_bytes(content)
        assert row_kind(Path(name)) == "labels", name
        assert [row["text"] for _, row in read_rows(Path(name))] == [text] * 3, name
    Path("a.csv").write_bytes(b"\ntext,label\n" + f'"{text}",ham\n{text},spam'.encode())
    assert [row["text"] for _, row in read_rows(Path("a.csv"))] == [text] * 2


@pytest.mark.parametrize(
    ("name", "content"), [("a.tsv", "ham\t{}\nspam\tx\n"), ("a.csv", "label,text\nham,{}\nspam,x\n")]
)
def test_a_text_has_any_length(name: str, content: str) -> None:
    limit = csv.field_size_limit()
    text = "word " * (limit // 4)
    Path(name).write_text(content.format(text))
    rows = read_rows(Path(name))
    assert next(rows)[1]["text"] == text
    assert csv.field_size_limit() == limit  # for other readers of the process
    assert len(list(rows)) == 1


def test_balanced_parts_share_no_text() -> None:
    lines = [f"ham\tham {n % 40}" for n in range(80)] + [f"spam\tspam {n % 15}" for n in range(30)]
    Path("a.tsv").write_text("\n".join(lines))
    rows = rows_of(Path("a.tsv"), split=Split(0.1, 0.2), balance=True)
    assert [len(rows[name]) for name in SPLITS] == [42, 6, 12]
    served = {name: ids_of(rows[name][np.arange(len(rows[name]))][0]) for name in SPLITS}
    labels = [text.split()[0] for texts in served.values() for text in texts]
    assert (labels.count("ham"), labels.count("spam")) == (30, 30)
    assert 12 < sum("ham" in text for text in served["train"]) < 30  # shuffled
    twice = [set(served["train"]) & set(served["test"]), set(served["val"]) & set(served["test"])]
    assert all(len(texts) <= 1 for texts in twice)  # where one part ends and the next begins


@pytest.mark.parametrize("position", [0, -1])
def test_a_label_may_stand_at_one_position(position: int) -> None:
    Path("a.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in MESSAGES))
    shards = prepare_rows(Path("a.tsv"), "labels", Path("data"), TOKENIZER, Split(0.0), RowOptions()).shards("train")
    rows = Rows(shards, 64, EOT, Labels(["ham", "spam"], position, row_length=5))
    _, targets = rows[np.array([0, 1, -1])]
    assert targets.shape == (3, 5)
    assert targets[:2, position].ge(0).all()
    assert int(targets.ge(0).sum()) == 2
    assert longest_row(shards) == 5


def test_a_long_text_keeps_its_label() -> None:
    Path("a.tsv").write_text("ham\t" + "word " * 50 + "\nspam\tx\n")
    rows = rows_of(Path("a.tsv"), 16)["train"]
    assert (len(rows), rows.cut) == (2, 1)
    assert rows[np.arange(2)][1].shape == (2, 16)
    assert int(rows[np.arange(2)][1].ge(0).sum()) == 2


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.json",
            '[{"instruction": "x", "answer": "y"}]',
            "a.json item 1 has no 'output', only 'instruction', 'ans",
        ),
        (
            "a.jsonl",
            '{"instruction": "x", "output": "y"}\n\n{"output": "y"}',
            "line 3 has no 'instruction', only 'output'",
        ),
        ("a.jsonl", '{"instruction": "x", "output": " "}', "a.jsonl line 1: 'output' is ' ', a text is needed"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{"inst', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n[]', "a.jsonl line 2 is no object, but list"),
        ("a.json", '{"messages": [{"role": "user", "content": "x"}]}', "line 1 has no message of the role assistant"),
        (
            "a.json",
            '{"messages": [{"role": "bot", "content": "x"}]}',
            "the role of a message is 'bot', not assistant",
        ),
        ("a.json", '{"messages": [{"role": "user"}]}', "a.json line 1, user has no 'content', only 'role'"),
        ("a.tsv", "ham\tx\nspam", "a.tsv line 2: 'text' is empty, a text is needed"),
        (
            "a.tsv",
            "ham\tx\n" * 30 + 'spam\t"Free entry\n' + "spam\ty\n" * 30,
            "a.tsv line 31: a quote opens a field and is",
        ),
        ("a.tsv", 'ham\tx\nspam\t"', "a.tsv line 2: a quote opens a field and is not closed: close it, or quote the"),
        ("a.csv", 'label,text\n"a\nb",x\n"ham\nc","x\ny', "a.csv line 5: a quote opens a field"),
        ("a.csv", 'text,"label\n1,one\n', "a.csv line 1: a quote opens a field and is not closed"),
        ("a.csv", "id,text\n1,one\n", "a.csv line 2 has no 'label', only 'id', 'text'"),
        ("a.jsonl", '{"text": "x", "label": ""}', "a.jsonl line 1: 'label' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(name: str, content: str, words: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(InputError, match="^[^\n]*$") as error:
        rows_of(Path(name))
    assert words in str(error.value)
    assert not Path("data").exists()


def test_what_is_text_is_no_file_of_rows() -> None:
    for name, content in {
        "a.txt": "ham\tx\n",
        "a.jsonl": '{"text": "x"}\n',
        "b.json": '[{"text": "x"}]',
        "c.json": "[1]",
        "notes": "a line\twith a tab\n",
        "a.bin": "ham\tx\n",
    }.items():
        Path(name).write_text(content)
        assert row_kind(Path(name)) is None, name
    assert row_kind(Path("nowhere.json")) is None


def test_a_label_that_is_not_learnt_is_named() -> None:
    Path("a.tsv").write_text("ham\tx\neggs\ty\n")
    shards = prepare_rows(Path("a.tsv"), "labels", Path("data"), TOKENIZER, Split(0.0), RowOptions()).shards("train")
    with pytest.raises(InputError, match="a.tsv has the label 'eggs', which no text to train on has: they have 'ham'"):
        Rows(shards, 64, EOT, Labels(["ham"]))


def test_one_label_is_too_few() -> None:
    Path("a.tsv").write_text("ham\tx\nham\ty\n")
    with pytest.raises(InputError, match="all texts to train on in a.tsv have the label 'ham': two are needed"):
        rows_of(Path("a.tsv"))


def test_templates_and_options_are_checked() -> None:
    with pytest.raises(InputError, match="no template is named 'llama': choose one of alpaca, chat, phi3"):
        RowOptions(template="llama")
    with pytest.raises(InputError, match=r"data.balance True has no use: data.source 'a.json' has instructions"):
        RowOptions(balance=True).check("instructions", "a.json")
    with pytest.raises(InputError, match=r"data.mask_prompt True has no use: data.source 'a.txt' has texts"):
        RowOptions(mask_prompt=True).check(None, "a.txt")
