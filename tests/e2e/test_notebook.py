"""The notebook: what its committed file holds, and a run of it."""

import ast
import json
import re
from pathlib import Path

import pytest

import gptlit
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_cells_parse_and_import_only_public_names_of_gptlit() -> None:
    nodes = [node for cell in CODE for node in ast.walk(ast.parse("".join(cell["source"])))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gptlit")]
    assert not any(module.startswith("gptlit") for module in modules)
    assert {node.module for node in ours} == {"gptlit"}
    assert {alias.name for node in ours for alias in node.names} <= set(gptlit.__all__)


def test_committed_outputs_are_pictures_and_text_without_traces_of_a_machine() -> None:
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output.get("name", output["output_type"]) for output in outputs} == {"stdout", "display_data"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert NOTEBOOK.stat().st_size < 150_000
    assert not any(cell["metadata"] for cell in CELLS)  # such as the times of execution
    text = "\n".join("".join(part) for part in [*(c["source"] for c in CELLS), *(o.get("text", "") for o in outputs)])
    assert not re.findall(r"(?<![\w.:/])/\w[\w.-]*/|\b[A-Z]:\\", text)  # absolute paths


@pytest.mark.nightly
def test_the_notebook_trains_samples_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(tmp_path / "kernels" / "python3")  # of this interpreter; it is found before those of the system
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, startup_timeout=600, resources=where).execute()  # or raises

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    losses = [float(loss) for loss in re.findall(r"validation loss (\d+\.\d+)", printed)]
    assert losses[-1] < losses[0] - 3
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "tiny.ckpt").is_file()
