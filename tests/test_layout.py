"""Who may import whom: the house has stairs, and they go one way."""

import ast
from pathlib import Path

from conftest import ROOT, run_script

PACKAGE = ROOT / "gptlit"

# Each module with the ones of this project that it may import.
BASE = {"errors"}
MODEL = {"config", "attention", "model", *BASE}
DATA = [
    "data.tokenizer",
    "data.download",
    "data.python_docs",
    "data.corpus",
    "data.encoder",
    "data.tokens",
    "data.inspection",
    "data.prepare",
    "data.progress",
    "data.windows",
    "data.datamodule",
]
ALLOWED = {
    "errors": set(),
    "config": set(),
    "flags": BASE,
    "attention": set(),
    "model": {"attention", "config"},
    "loss": set(),
    "generate": {*MODEL, "data.tokenizer"},
    "checkpoint": BASE,
    "fast_linear": MODEL,
    "evaluate": {*MODEL, "data.tokenizer"},
    "chat": {*MODEL, "generate", "data.tokenizer"},
    "sharding": {"config", "model"},
    "weights": {*MODEL, "__init__", "checkpoint", "sharding", "data.tokenizer"},
    "optimizer": set(),
    "module": {*MODEL, "loss", "optimizer", "sharding", "weights"},
    "strategies": {"sharding"},
    "plot": BASE,
    "logs": set(),
    "callbacks": {*MODEL, "checkpoint", "costs", "generate", "logs", "module", "sharding", "data.datamodule"},
    "stopping": {*MODEL, "callbacks", "module"},
    "training": {
        *MODEL,
        "__init__",
        "callbacks",
        "checkpoint",
        "logs",
        "module",
        "stopping",
        "strategies",
        "weights",
        "data.datamodule",
        "data.tokenizer",
    },
    "costs": {*MODEL, "loss", "optimizer"},
    "plan": {*MODEL, "checkpoint", "costs", "module", "training", "weights", "data.datamodule"},
    "cli": {
        *MODEL,
        "__init__",
        "flags",
        "generate",
        "weights",
        "evaluate",
        "chat",
        "fast_linear",
        "plan",
        "plot",
        *DATA,
    },
    "__main__": {"cli"},
    "__init__": {"config", "model", "module", "data.datamodule"},
    "data.__init__": set(),
    **{name: {*BASE, *DATA[:index]} for index, name in enumerate(DATA)},
    "data.datamodule": {"config", *BASE, *DATA},
}


def imports(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gptlit":
            found.add(node.module.removeprefix("gptlit").removeprefix(".") or "__init__")
        assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: imports are absolute"
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in ("gptlit", "train") for alias in node.names), path
    return found


def test_imports_go_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        assert imports(path) <= ALLOWED[name], name


def test_the_model_is_plain_torch() -> None:
    source = (PACKAGE / "model.py").read_text()
    assert "lightning" not in source
    assert "open(" not in source


def test_importing_the_package_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    code = "import sys, gptlit; assert not {'torch', 'lightning'} & set(sys.modules); gptlit.GPTConfig"
    assert run_script("-c", code, cwd=tmp_path).returncode == 0
