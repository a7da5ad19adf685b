"""Bytes that nobody meant: each file loads or gives a one-line error; nothing hangs, crashes or is left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prepare import corpus_of

from conftest import ROOT, TINY, one_parser
from gptlit.checkpoint.io import DurableCheckpointIO, read_checkpoint
from gptlit.config import GPTConfig
from gptlit.data.prepare import prepare
from gptlit.data.splitting import Split
from gptlit.data.token_files import MANIFEST, TokenData, check_vocabulary, open_foreign, open_prepared
from gptlit.data.tokenizer import load_tokenizer
from gptlit.data.windows import Windows
from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
many = pytest.mark.parametrize("examples", [150, pytest.param(1700, marks=pytest.mark.slow)], ids=["few", "many"])


@st.composite
def mutations(draw: Any) -> Callable[[bytes], bytes]:
    """A change of a file: bytes overwritten, cut out, put in, or its end cut off."""
    kind = draw(st.sampled_from(["flip", "flip", "write", "insert", "delete", "truncate"]))
    place, length = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    data = draw(st.binary(min_size=1, max_size=40))

    def change(content: bytes) -> bytes:
        start = int(place * (len(content) - 1))
        if kind == "flip":
            return content[:start] + bytes([content[start] ^ (1 << (length % 8))]) + content[start + 1 :]
        if kind == "write":
            return content[:start] + data + content[start + len(data) :]
        if kind == "insert":
            return content[:start] + data + content[start:]
        return content[:start] + (content[start + length :] if kind == "delete" else b"")

    return change


def ok(work: Callable[[], Any]) -> bool:
    """Whether it worked; an InputError of one line is the only other thing that may happen."""
    try:
        work()
    except InputError as error:
        words = str(error)
    else:
        return True
    assert 0 < len(words) < 1000
    return False


@many
def test_mutated_checkpoints(tmp_path: Path, examples: int) -> None:
    config = GPTConfig(vocab_size=20, context_length=4, emb_dim=4, n_heads=2, n_layers=1)
    path = tmp_path / "a.ckpt"
    checkpoint = {
        "state_dict": {f"model.{name}": value for name, value in GPTModel(config).state_dict().items()},
        "hyper_parameters": {"config": {"n_layers": 1}},
        "global_step": 3,
    }
    DurableCheckpointIO().save_checkpoint(checkpoint, path)
    content, files, expected = path.read_bytes(), sorted(tmp_path.iterdir()), torch.load(path, weights_only=True)

    @settings(max_examples=examples, **QUIET)
    @given(mutations())
    def check(change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(content))

        def work() -> None:
            loaded = read_checkpoint(path)
            assert loaded.keys() == expected.keys()
            assert loaded["global_step"] == 3
            torch.testing.assert_close(loaded["state_dict"], expected["state_dict"], atol=0, rtol=0)

        ok(work)
        assert sorted(tmp_path.iterdir()) == files

    check()


@many
def test_mutated_manifests(tmp_path: Path, examples: int) -> None:
    folder = prepare(corpus_of("some text", "and more of it"), tmp_path / "a", load_tokenizer(), Split(0.3)).folder
    content = (folder / MANIFEST).read_bytes()
    files = sorted(folder.iterdir())

    @settings(max_examples=examples, **QUIET)
    @given(mutations())
    def check(change: Callable[[bytes], bytes]) -> None:
        (folder / MANIFEST).write_bytes(change(content))
        ok(lambda: read_all(open_prepared(folder)))
        assert sorted(folder.iterdir()) == files

    check()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@many
def test_manifests_with_other_values(tmp_path: Path, examples: int) -> None:
    folder = prepare(corpus_of("some text", "and more of it"), tmp_path / "a", load_tokenizer(), Split(0.3)).folder
    manifest = json.loads((folder / MANIFEST).read_bytes())

    @settings(max_examples=examples, **QUIET)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = json.loads(json.dumps(manifest))
        at: Any = changed
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
                at = at[key]
                continue
            at[key] = data.draw(VALUES)
            break
        (folder / MANIFEST).write_text(json.dumps(changed))
        ok(lambda: read_all(open_prepared(folder)))

    check()


@many
@pytest.mark.parametrize("header", [True, False], ids=["llm.c", "nanoGPT"])
def test_mutated_shards_of_others(tmp_path: Path, examples: int, header: bool) -> None:
    start = [20240520, 1, 300, *[0] * 253] if header else []
    content = b"".join(n.to_bytes(4, "little") for n in start) + bytes(600)

    @settings(max_examples=examples, **QUIET)
    @given(mutations())
    def check(change: Callable[[bytes], bytes]) -> None:
        (tmp_path / "train.bin").write_bytes(change(content))

        def work() -> None:
            data = open_foreign(tmp_path)
            check_vocabulary(data, 50257)
            read_all(data)

        ok(work)

    check()


def read_all(data: TokenData) -> None:
    windows = Windows(data.shards("train"), 4, 4, 50257)
    for index in range(min(3, len(windows))):
        windows[torch.tensor([index]).numpy()]


@pytest.mark.parametrize("examples", [6, pytest.param(100, marks=pytest.mark.slow)], ids=["few", "many"])
def test_mutated_configurations(
    tmp_path: Path, text_file: Path, examples: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to where a fit would begin."""
    from gptlit.training import cli as training

    values = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    values["data"]["source"] = str(text_file)
    content = yaml.safe_dump(values).encode()
    monkeypatch.setattr(training.TrainingCLI, "_run_subcommand", lambda *_: None)
    one_parser(monkeypatch, "fit")
    files = sorted(tmp_path.rglob("*"))

    @settings(max_examples=examples, **QUIET)
    @given(mutations())
    def check(change: Callable[[bytes], bytes]) -> None:
        (tmp_path / "a.yaml").write_bytes(change(content))
        capsys.readouterr()
        status: Any = 0
        try:
            training.main(["fit", f"--config={tmp_path / 'a.yaml'}", *TINY])
        except SystemExit as exit_:
            status = exit_.code
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (status, len(errors)) in ((0, 0), (1, 1), (2, 1))
        assert sorted(path for path in tmp_path.rglob("*") if path.name != "a.yaml") == files

    check()
