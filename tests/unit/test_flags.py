"""Misspelt commands, flags, keys and files: one line that names the nearest known one."""

from pathlib import Path

import pytest
import yaml

from conftest import one_parser
from gptlit.commands.main import main as command
from gptlit.errors import InputError, user_path
from gptlit.training.cli import main
from gptlit.training.parser import Parser, expand_recipes
from gptlit.training.run_config import RunConfig


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trainer.devics", "2"], "unrecognized arguments: --trainer.devics 2: did you mean --trainer.devices?"),
        (["--model.config.n_layer=4"], "--model.config.n_layer=4: did you mean --model.config.n_layers?"),
        (["--modle.lr=4"], "--modle.lr=4: did you mean --model.lr?"),
        (["--ckptpath", "last"], "--ckptpath last: did you mean --ckpt_path?"),
        (["--model.learning_rate=1"], "--model.learning_rate=1: did you mean --model.lr?"),
        (["--zzz"], "unrecognized arguments: --zzz\n"),
        (["--config", "nowhere/a.yaml"], "nowhere/a.yaml'\n"),
        (["--config", "a.yaml"], "'data.batchsize': did you mean data.batch_size?"),
        (["--config", "broken.yaml"], "can't decode byte 0xff"),
    ],
)
def test_what_is_misspelt_is_named(
    args: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_parser(monkeypatch, "fit")
    Path("a.yaml").write_text("data: {batchsize: 3}")
    Path("broken.yaml").write_bytes(b"a: [\xff")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *args])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["3e-4", "1e5", ".5", "null", "true", "on", "2024-01-01", "0x1f", "-", "1.5E+3"])
def test_a_text_stays_a_text_in_a_saved_configuration(name: str, tmp_path: Path) -> None:
    parser = Parser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig, "run")
    config = parser.parse_args([f"--run.name={name}"])
    (tmp_path / "config.yaml").write_text(parser.dump(config, skip_unset=False))
    assert parser.parse_args([f"--config={tmp_path / 'config.yaml'}"]).run.name == name


@pytest.mark.parametrize("path", ["", "~nobody-here/x", "\udcff.txt"])
def test_a_path_that_cannot_be_used_is_one_line(path: str) -> None:
    with pytest.raises(InputError, match="path"):
        user_path(path)


@pytest.mark.parametrize("words", [["--config", "quickstart"], ["--config=quickstart"], ["-c", "quickstart"]])
def test_gptlit_fit_takes_a_recipe_by_name(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--data.batch_size` stays a flag of fit, and is not read by the command around it."""
    one_parser(monkeypatch, "fit")
    with pytest.raises(SystemExit) as exit_:
        command(["fit", *words, "--data.batch_size=8", "--print_config"])
    assert exit_.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["run"]["name"], config["data"]["batch_size"]) == ("quickstart", 8)


def test_a_file_comes_before_a_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one_parser(monkeypatch, "fit")
    Path("quickstart").mkdir()  # no file
    assert expand_recipes(["--config", "quickstart"])[1].endswith("quickstart.yaml")
    Path("quickstart").rmdir()
    Path("quickstart").write_text("run: {name: mine}")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["run"]["name"] == "mine"
