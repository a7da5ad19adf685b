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
    **{f"data.{key}": "corpus" for key in ("val_fraction", "test_fraction", "text_key", "separator")},
    **{f"data.{key}": "corpus" for key in ("template", "mask_prompt", "balance", "label_position")},
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


def test_a_resume_may_lift_what_is_fixed_in_the_data() -> None:
    words = {word for key, value in FIXED.items() if key.startswith("data.") for word in value.split(", ")}
    assert words - {"fixed"} == set(get_args(Identity))


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
