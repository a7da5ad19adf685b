"""The `gptlit` command."""

import re
from pathlib import Path

import pytest
import torch

from conftest import run_script
from gptlit.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A run of a tiny model."""
    from conftest import TINY
    from gptlit.training import main as train

    folder = tmp_path_factory.mktemp("run")
    (folder / "words.txt").write_text(text)
    train(
        [
            "fit",
            *TINY,
            f"--data.source={folder / 'words.txt'}",
            f"--data.cache_dir={folder / 'data'}",
            f"--trainer.default_root_dir={folder / 'runs'}",
            "--trainer.max_steps=3",
        ]
    )
    return folder / "runs" / "t"


def test_generate_prints_prompt_and_continuation_and_nothing_else(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    texts = []
    for checkpoint in (run, run / "version_0", run / "version_0" / "checkpoints" / "step-00000003.ckpt"):
        main(["generate", f"--checkpoint={checkpoint}", "--prompt=The model", "--max_new_tokens=30", "--seed=4"])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert texts[0].startswith("The model")
    assert len(texts[0]) > 40


def test_temperature_zero_needs_no_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        main(["generate", f"--checkpoint={run}", "--prompt=a", "--temperature=0", "--max_new_tokens=5"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt="], "--prompt is empty"),
        (["--prompt=a", "--top_k=0"], "top_k must be at least 1, got 0"),
        (["--prompt=a", "--top_p=0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--prompt=a", "--top_p=1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["--prompt=a", "--temperature=-1"], "temperature must be at least 0, got -1.0"),
        (["--prompt=a", "--max_new_tokens=-1"], "max_new_tokens -1"),
        (["--prompt=a", "--checkpoint=nowhere"], "checkpoint 'nowhere' does not exist"),
        (["--prompt=a", "--checkpoint=cut.ckpt"], "cut.ckpt is truncated or no checkpoint"),
        (["--prompt=a", "--checkpoint=other.ckpt"], "has a vocabulary of 99 ids, but its tokenizer 'gpt2' has 50257"),
        (["--prompt=a", "--checkpoint=part.ckpt"], "has no tensor 'final_norm.bias' (shape (32,))"),
        (["--prompt=a", "--topk=3"], "unrecognized arguments: --topk"),
        ([], "prompt"),
    ],
)
def test_bad_input_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    from gptlit import GPTConfig, GPTModule

    newest = next(run.rglob("*.ckpt"))
    Path("cut.ckpt").write_bytes(newest.read_bytes()[:5000])
    part = torch.load(newest, weights_only=True)
    del part["state_dict"]["model.final_norm.bias"]
    torch.save(part, "part.ckpt")
    other = GPTModule(GPTConfig(vocab_size=99, context_length=8, emb_dim=8, n_heads=1, n_layers=1))
    other.configure_model()
    torch.save({"state_dict": other.state_dict(), "hyper_parameters": dict(other.hparams)}, "other.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["generate", f"--checkpoint={run}", *flags])
    assert exit_.value.code in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nfrom gptlit.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    result = run_script("-c", code + "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"generate +Continue prompts", result.stdout)


def test_python_m_gptlit_is_the_command(tmp_path: Path) -> None:
    result = run_script("-m", "gptlit", "generate", "--checkpoint=x", "--prompt=a", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: checkpoint 'x' does not exist")
