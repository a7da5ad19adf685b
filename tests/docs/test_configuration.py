"""docs/configuration.md: its tables are made of signatures, docstrings and what a resume refuses.

`python tests/docs/test_configuration.py` writes them anew.
"""

import inspect
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import docstring_parser
import pytest
import torch
import yaml

from gptlit.config import GPTConfig
from gptlit.data.compatibility import Identity
from gptlit.data.datamodule import TokenDataModule
from gptlit.errors import InputError
from gptlit.model.lora import LoRAConfig
from gptlit.training import module as training_module
from gptlit.training.module import GPTModule
from gptlit.training.run_config import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
GROUPS = {
    "run": RunConfig,
    "model": GPTModule,
    "model.config": GPTConfig,
    "model.lora": LoRAConfig,
    "data": TokenDataModule,
}
# What must stay on a resume: "fixed", or under the name by which data.resume_despite lifts it.
FIXED = {
    **{f"model.config.{key}": "fixed" for key in asdict(GPTConfig()) if key != "drop_rate"},
    **{f"model.lora.{key}": "fixed" for key in asdict(LoRAConfig())},
    **{f"model.{key}": "fixed" for key in ("optimizer", "trainable")},
    **{f"data.{key}": key for key in ("tokenizer", "seed", "stride")},
    "data.source": "corpus, weights",
    "data.context_length": "fixed",
    **{f"data.{key}": "corpus" for key in ("val_fraction", "test_fraction", "val_source", "test_source")},
    **{f"data.{key}": "corpus" for key in ("text_key", "separator", "template", "mask_prompt", "balance")},
    "data.label_position": "fixed",
}


def table(group: str) -> str:
    """Return the Markdown table of a group's keys."""
    owner = GROUPS[group]
    meanings = {arg.arg_name: arg.description for arg in docstring_parser.parse(inspect.getdoc(owner) or "").params}
    lines = ["| key | default | on a resume | |", "| --- | --- | --- | --- |"]
    for key, parameter in inspect.signature(owner).parameters.items():
        if f"{group}.{key}" not in GROUPS:  # a table of its own
            meaning = " ".join(str(meanings[key]).split()).replace("<", "&lt;").replace("None:", "null:")
            default = yaml.safe_dump(parameter.default).splitlines()[0]
            lines.append(f"| `{group}.{key}` | `{default}` | {FIXED.get(f'{group}.{key}', '')} | {meaning} |")
    return "\n".join(lines) + "\n"


def rewritten(page: str) -> str:
    """Return the page with the tables of the code."""
    for group in GROUPS:
        between = rf"(?<=<!-- {re.escape(group)} -->\n).*?(?=<!-- end -->)"
        found = re.search(between, page, re.DOTALL)
        assert found, group
        page = page[: found.start()] + table(group) + page[found.end() :]
    return page


def test_the_tables_are_those_of_the_code() -> None:
    page = PAGE.read_text()
    assert page == rewritten(page), "run: python tests/docs/test_configuration.py"


@pytest.mark.parametrize("group", ["model", "model.config", "model.lora"])
def test_a_resume_refuses_what_is_fixed_in_the_model(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    monkeypatch.setattr(training_module, "attached_trainer", lambda _: trainer)
    monkeypatch.setattr(training_module, "prepare_fit", lambda *_: None)
    module = GPTModule(GPTConfig(emb_dim=2, n_heads=1, n_layers=1))
    refused = set()
    for key in set(inspect.signature(GROUPS[group]).parameters) - {"config", "lora"}:
        then: dict[str, Any] = {**module.hparams, "config": asdict(module.config), "lora": asdict(module.lora)}
        (then if group == "model" else then[group.removeprefix("model.")])[key] = "another"
        try:
            module.on_load_checkpoint({"hyper_parameters": then})
        except InputError:
            refused.add(f"{group}.{key}")
    assert refused == {key for key in FIXED if key.rpartition(".")[0] == group}


def refusals(changes: dict[str, Any], source: str) -> dict[str, str]:
    """Change one key of the data after the other on a resume; return by which word a refusal can be lifted."""

    def resumed(state: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
        datamodule = TokenDataModule(**{"source": source, "context_length": 8, "test_fraction": 0.1, **options})
        state_, strategy = SimpleNamespace(fn="fit"), SimpleNamespace(root_device=torch.device("cpu"))
        datamodule.trainer = SimpleNamespace(global_step=1, state=state_, strategy=strategy)  # type: ignore[assignment]
        datamodule.setup()
        datamodule.max_steps = 9
        datamodule._start_at = lambda *_: None  # type: ignore[method-assign]
        if state is not None:
            datamodule.load_state_dict(state)
        return datamodule.state_dict()

    state, found = resumed(None, {}), {}
    for key, value in changes.items():
        for word in ("", *get_args(Identity)):
            allowed = [word] if word else []
            try:
                resumed(state, {key: value, "resume_despite": allowed})
            except InputError:
                continue
            found[f"data.{key}"] = word
            break
        else:
            found[f"data.{key}"] = "fixed"
    return found


def test_a_resume_refuses_what_is_fixed_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text("".join(f"{name} word {n} of a text\n" for n in range(200)))
        Path(f"{name}.tsv").write_text("".join(f"{'xy'[n % 2]}\t{name} text number {n}\n" for n in range(60)))
    texts = {"seed": 9, "stride": 3, "val_fraction": 0.2, "test_fraction": 0.2, "separator": "\n", "num_workers": 1}
    texts |= {"val_source": "b.txt", "test_source": "b.txt", "batch_size": 4, "micro_batch_size": 1, "cache_dir": "c"}
    assert refusals(texts, "a.txt") == {f"data.{key}": FIXED.get(f"data.{key}", "") for key in texts}
    rows = {"label_position": -1, "balance": True}
    assert refusals(rows, "a.tsv") == {f"data.{key}": FIXED[f"data.{key}"] for key in rows}


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
