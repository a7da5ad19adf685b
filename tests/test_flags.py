"""Names of settings: those of the real parser are known, all others are answered in a line, and at once."""

from pathlib import Path

import pytest

from conftest import ROOT, run_script
from gptlit.training import flags
from gptlit.training.flags import check_names, setting_names


def test_what_the_parser_takes_is_known() -> None:
    """Walk the real parser's options: each passes, and no group knows a name that the parser does not."""
    from gptlit.commands.plan import PlanCLI
    from gptlit.training.cli import command_line

    cli = command_line(PlanCLI, ["fit", "--trainer.max_steps=1", "--trainer.precision=32-true"])
    options = {option for action in cli._parser("fit")._actions for option in action.option_strings}
    assert len(options) > 60
    check_names(["fit", *(f"{option}=" for option in options)])
    for group, names in setting_names().items():
        for name in names - {"limit_predict_batches", "barebones"}:
            assert f"--{group}.{name}".replace("--.", "--") in options | {"--model", "--data", "--trainer", "--run"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ft"], "there is no command 'ft': train.py has fit, validate, test"),
        (["fit", "--trainer.devics", "2"], "there is no setting trainer.devics: did you mean trainer.devices?"),
        (["fit", "--model.config.n_layer=4"], "setting model.config.n_layer: did you mean model.config.n_layers?"),
        (["fit", "--modle.lr=4"], "there is no setting modle.lr: did you mean model.lr?"),
        (["validate", "--ckptpath", "last"], "there is no setting ckptpath: did you mean ckpt_path?"),
        (["fit", "--optimizer=SGD"], "no setting optimizer: "),
        (["fit", "--zzz"], "there is no setting zzz: `python train.py fit --help` lists all"),
        (["fit", "--config", "none.yaml"], "--config none.yaml: there is no such file\n"),
        (["fit", "--config", "nowhere/a.yaml"], "--config nowhere/a.yaml: there is no such file\n"),
        (["fit", "--config", f"{ROOT}/configs/quikstart.yml"], "/configs/quickstart.yaml?\n"),
        (["fit", "-c", "a.yaml"], "no setting data.batchsize in a.yaml: did you mean data.batch_size?"),
    ],
)
def test_others_are_answered(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("data: {batchsize: 3}")
    with pytest.raises(SystemExit) as exit_:
        check_names(args)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--help"],
        ["fit", "-h"],
        ["fit", "--print_config=skip_default", "--run.name", "x"],
        ["fit", "--trainer.logger.save_dir=x", "--trainer.callbacks+=LearningRateMonitor", "--data.source+=a"],
        ["fit", "--run.sample_prompt", "--- and on"],
        ["fit", "--config", "{model: {lr: 1}}", "--config"],
        ["fit", "--config=broken.yaml"],
        *(["fit", "--config", str(path)] for path in sorted((ROOT / "configs").glob("*.yaml"))),
    ],
)
def test_these_are_for_the_parser(args: list[str]) -> None:
    Path("broken.yaml").write_bytes(b"a: [\xff")
    check_names(args)


def test_a_misspelt_flag_imports_nothing_heavy() -> None:
    code = "import sys, gptlit.training.flags as f; f.setting_names(); "
    code += "assert not {'torch', 'lightning'} & set(sys.modules)"
    assert run_script("-c", code, cwd=Path()).returncode == 0
    done = run_script(str(ROOT / "train.py"), "fit", "--model.confg.lr=1", cwd=Path())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no setting model.confg.lr: did you mean model.config?\n"


def test_commands_are_those_of_the_parser() -> None:
    from gptlit.training.cli import TrainingCLI

    assert set(flags.COMMANDS) == set(TrainingCLI.subcommands())
