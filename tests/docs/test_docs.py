"""Every command in the README and in docs/ is read by the parser that it is for; those of the README run, in order."""

import ast
import inspect
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import gptlit
from conftest import ROOT, code_blocks, commands, one_parser, run_script, text_of
from gptlit.commands.main import TRAINING, app

DOCS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "notebook.ipynb"]
PAGES = [ROOT / "README.md", *DOCS, ROOT / "benchmarks" / "RESULTS.md"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def all_commands(start: str) -> list[Any]:
    found = {" ".join(words): words for page in PAGES for words in commands(page) if " ".join(words).startswith(start)}
    return [pytest.param(words, id=name) for name, words in found.items()]


def arguments_of_fit() -> list[Any]:
    """Return the words after `train.py` of each command, those of launchers too."""
    found = []
    for start in ("python train.py ", "torchrun ", "sbatch "):
        for case in all_commands(start):
            words = case.values[0]
            at = next(i for i, word in enumerate(words) if word.endswith(("train.py", "train.sbatch")))
            rest = words[at + 1 :] if start != "sbatch " else ["fit", *words[at + 1 :]]
            if not {"...", "X.yaml"} & set(rest) and len(rest) > 1:
                found.append(pytest.param(rest, id=case.id))
    return found


@pytest.mark.parametrize("words", arguments_of_fit())
def test_flags_of_training_are_known(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gptlit.training.cli import main

    monkeypatch.chdir(ROOT)
    one_parser(monkeypatch, words[0])
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--print_config"])
    assert exit_.value.code == 0


@pytest.mark.parametrize("words", [*all_commands("python -m gptlit "), *all_commands("gptlit ")])
def test_flags_of_the_command_are_known(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = words[1:] if words[0] == "gptlit" else words[3:]
    words = [word for word in words if not re.fullmatch(r"\[.*\]|\.\.\.", word)]
    words = [word.split("|")[0] for word in words]  # --to huggingface|book|safetensors
    if words == ["--help"]:
        return
    if words[0] in TRAINING:
        return test_flags_of_training_are_known(words, monkeypatch) if len(words) > 1 else None
    group = get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    parent = group.make_context("gptlit", words)
    is_partial = len(words) == 1 or words[0] in ("import", "export")  # named in a sentence, without what is required
    context = command.make_context(words[0], words[1:], parent=parent, resilient_parsing=is_partial)
    if words[0] == "plan" and not is_partial:
        test_flags_of_training_are_known(["fit", *context.args], monkeypatch)


@pytest.mark.parametrize("words", all_commands("python examples/"))
def test_flags_of_the_examples_are_known(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An example has a parser of its own, and hands what it does not know to `fit`; or it takes gptlit's commands."""
    parser = runpy.run_path(str(ROOT / words[1])).get("parser")
    if parser is None:
        return test_flags_of_the_command_are_known(["gptlit", *words[2:]], monkeypatch)
    if rest := parser().parse_known_args(words[2:])[1]:
        test_flags_of_training_are_known(["fit", *rest], monkeypatch)


@pytest.mark.parametrize("words", all_commands("python -m benchmarks "))
def test_flags_of_the_benchmarks_are_known(words: list[str]) -> None:
    from benchmarks.__main__ import RUNS

    assert {word[2:] for word in words[4:] if word.startswith("--")} <= set(
        inspect.signature(RUNS[words[3]]).parameters
    )


def test_python_in_the_docs_imports_from_gptlit_itself() -> None:
    imports = []
    for page in PAGES:
        for kind, block in code_blocks(text_of(page)):
            if kind == "python":
                imports += [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if str(node.module).startswith("gptlit")]
    assert {node.module for node in ours} == {"gptlit"}
    assert {alias.name for node in ours for alias in node.names} == set(gptlit.__all__)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", text_of(page)):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_tests_that_are_named_exist() -> None:
    names = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", text_of(page)):
            assert any(known.startswith(name) for known in names), f"{page.name}: {name}"


# --- as a new user ---

TINY = """
model: {config: {context_length: 16, emb_dim: 32, n_heads: 2, n_layers: 2}, warmup_steps: 1}
data: {batch_size: 4, source: FILE.txt}
trainer: {max_steps: 6, accelerator: cpu, log_every_n_steps: 1}
run: {name: quickstart, val_every_n_steps: 3}
"""


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param("README.md", 11, marks=pytest.mark.slow),
        pytest.param("docs/start.md", 9, marks=pytest.mark.nightly),
    ],
)
def test_the_commands_run_in_their_order(page: str, number: int, text: str) -> None:
    """The recipe is a tiny one under the same name. The first run of one's own ends early, as by Ctrl-C, for the
    resuming one to go on from; chat reads an empty input; TensorBoard is not started.
    """
    Path("FILE.txt").write_text(text)
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text(TINY)
    shutil.copy(ROOT / "train.py", "train.py")
    section = (ROOT / page).read_text().split("## What you can do")[-1]
    ran = 0
    for line in "".join(block for kind, block in code_blocks(section) if not kind).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"]:
            if words[-2:] == ["--run.name", "mine"]:
                words.append("--trainer.max_steps=3")
            elif "--ckpt_path" in words:
                words.append("--trainer.max_steps=6")
            done = run_script(*words[1:], cwd=Path(), timeout=1200)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            assert "Traceback" not in done.stderr
            ran += 1
    assert ran == number
    assert Path("curves.png").is_file()
    assert Path("my-gpt/model.safetensors").is_file()
