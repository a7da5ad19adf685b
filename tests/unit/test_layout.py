"""The layers of the package: a layer imports only those below it."""

import ast
from pathlib import Path

from conftest import ROOT, run_script

PACKAGE = ROOT / "gptlit"
LAYERS = ["errors", "config", "model", "data", "generation", "checkpoint", "training", "commands"]


def imports(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {node.module.split(".")[1] for node in nodes if node.module and node.module.startswith("gptlit.")}


def test_a_layer_imports_only_those_below_it() -> None:
    for layer in LAYERS:
        for path in [*PACKAGE.glob(f"{layer}.py"), *PACKAGE.glob(f"{layer}/**/*.py")]:
            above = set(LAYERS[LAYERS.index(layer) + 1 :]) | ({"model"} if layer == "data" else set())
            assert not imports(path) & above, path


def test_importing_the_package_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    code = "import sys, gptlit; assert not {'torch', 'lightning'} & set(sys.modules); gptlit.GPTConfig"
    assert run_script("-c", code, cwd=tmp_path).returncode == 0
