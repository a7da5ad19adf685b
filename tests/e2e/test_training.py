"""train.py end to end: what a user types, what lands on disk, and what a wrong word answers."""

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from conftest import ROOT, TINY, losses
from gptlit.checkpoint.io import DurableCheckpointIO, read_checkpoint
from gptlit.checkpoint.runs import checkpoints
from gptlit.data.datamodule import TokenDataModule
from gptlit.training.cli import main

Fit = Callable[..., None]
RUN = Path("runs/t/version_0")


def shown(capsys: pytest.CaptureFixture[str]) -> float:
    """Return val/loss of Lightning's table of results."""
    return float(re.findall(r"val/loss\W+(\d+\.\d+)", capsys.readouterr().out)[-1])


def test_a_fit_leaves_curves_configuration_and_checkpoints(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=7", "--run.val_every_n_steps=3", "--run.save_every_n_steps=2", "--run.keep_last=2")
    assert [path.name for path in checkpoints(RUN)] == ["step-00000006.ckpt", "step-00000007.ckpt"]
    assert list(losses(RUN, "val/loss")) == [3, 6, 7]
    assert list(losses(RUN)) == list(range(1, 8))
    for tag in ("val/perplexity", "train/grad_norm", "train/tokens", "lr", "perf/tokens_per_second"):
        assert losses(RUN, tag)[7 if tag != "lr" else 1] > 0, tag
    assert losses(RUN, "train/tokens")[7] == 7 * 4 * 16
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["model"]["config"]["emb_dim"] == 32
    assert config["run"]["val_every_n_steps"] == 3
    out = capsys.readouterr().out
    value = losses(RUN, "val/loss")[7]
    assert f"val/loss    {value:.4f}" in out
    assert "runs/t/version_0/checkpoints/step-00000007.ckpt" in out
    assert "generate --checkpoint" in out


def test_the_log_of_a_fit_without_a_terminal(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=2", "--trainer.enable_progress_bar=true", "--data.micro_batch_size=1")
    err = capsys.readouterr().err
    assert re.search(r"model   [\d,]+ parameters: 2 layers, 2 heads, 32 wide, context 16; 32-true on 1 x cpu", err)
    assert re.search(r"corpus  .*words.txt", err)
    assert re.search(r"data    [\d,]+ tokens, [\d,]+ windows, [\d,]+ to validate; an epoch is [\d,]+ steps", err)
    assert "step    4 windows = 64 tokens: 1 at once on 1 x cpu, accumulated over 4 micro-batches" in err
    assert re.search(r"run     2 steps, 128 tokens, .* epochs: .* a parameter", err)
    assert re.search(r"step 2/2  loss \d+\.\d+  tokens/s [\d,]+  0:00:00 left", err)
    assert f"step 2: val/loss {losses(RUN, 'val/loss')[2]:.4f}, perplexity" in err
    assert "sample" in err


def test_the_bar_on_a_terminal(fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    fit("--trainer.max_steps=4", "--trainer.enable_progress_bar=true", "--run.val_every_n_steps=2")
    err = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"training .* 4/4 loss \d+\.\d+  val \d+\.\d+  tokens/s [\d,]+ +0:00:00", err)
    assert "step 4: val/loss" in err
    assert "step 4/4  loss" not in err  # the lines are for logs only


def test_samples_are_in_tensorboards_text_tab(fit: Fit) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit("--trainer.max_steps=2", "--run.val_every_n_steps=1", "--run.sample_prompt=the model")
    events = EventAccumulator(str(RUN))
    events.Reload()
    samples = events.Tensors("samples/text_summary")
    assert [event.step for event in samples] == [1, 2]
    assert b"the model" in samples[0].tensor_proto.string_val[0]


def test_a_second_fit_touches_nothing_of_the_first(fit: Fit) -> None:
    fit("--trainer.max_steps=2")
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    fit("--trainer.max_steps=3")
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before
    assert checkpoints(Path("runs/t/version_1"))[-1].name == "step-00000003.ckpt"


def test_resuming_goes_on_as_if_it_had_never_stopped(fit: Fit) -> None:
    """Accumulation, batch order across a pass over the data, learning rate and optimizer state."""
    micro = ("--data.micro_batch_size=2", "--data.batch_size=32", "--model.warmup_steps=4", "--run.val_every_n_steps=4")
    fit("--trainer.max_steps=14", "--run.name=whole", *micro)
    fit("--trainer.max_steps=14", "--run.name=stop", "--run.save_every_n_steps=5", "--run.keep_last=-1", *micro)
    stopped = Path("runs/stop/version_0")
    checkpoints(stopped)[-1].unlink()  # as if killed after step 10
    fit("--trainer.max_steps=14", "--run.name=stop", "--ckpt_path=last", *micro)
    whole = Path("runs/whole/version_0")
    for tag in ("train/loss", "train/grad_norm", "lr", "val/loss", "train/tokens"):
        assert losses(stopped, tag) == losses(whole, tag), tag
    assert sorted(path.name for path in stopped.glob("config*.yaml")) == ["config.yaml", "config_1.yaml"]
    one, two = (read_checkpoint(checkpoints(run)[-1]) for run in (whole, stopped))
    assert one["TokenDataModule"] == two["TokenDataModule"]
    assert all(torch.equal(two["state_dict"][key], value) for key, value in one["state_dict"].items())


def test_a_changed_configuration_is_honoured_on_resume(fit: Fit) -> None:
    fit("--trainer.max_steps=3", "--model.schedule=constant")
    changed = ("--model.schedule=constant", "--model.lr=1e-5", "--model.weight_decay=0.25", "--model.beta1=0.5")
    fit("--trainer.max_steps=5", "--ckpt_path=last", *changed, "--data.batch_size=8", "--data.micro_batch_size=2")
    assert losses(RUN, "lr") == pytest.approx({1: 3e-3, 2: 3e-3, 3: 3e-3, 4: 1e-5, 5: 1e-5})
    state = read_checkpoint(checkpoints(RUN)[-1])
    assert state["TokenDataModule"]["windows"] == 3 * 4 + 2 * 8
    group = state["optimizer_states"][0]["param_groups"][0]
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.95))


def test_an_earlier_checkpoint_branches_off_into_a_new_run(fit: Fit) -> None:
    fit("--trainer.max_steps=4", "--run.save_every_n_steps=2")
    first, newest = checkpoints(RUN)
    fit("--trainer.max_steps=5", f"--ckpt_path={first}")
    assert checkpoints(RUN) == [first, newest]
    assert list(losses(Path("runs/t/version_1"))) == [3, 4, 5]
    fit("--trainer.max_steps=5", f"--ckpt_path={newest}")
    assert list(losses(RUN)) == [1, 2, 3, 4, 5]


def test_last_without_a_run_says_so_and_starts(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=1", "--ckpt_path=last")
    assert "there is no run to resume in runs/t yet: starting a new one" in capsys.readouterr().err
    assert checkpoints(RUN)


def test_the_saved_configuration_goes_on_with_the_run(fit: Fit) -> None:
    """The whole configuration, architecture and corpus included."""
    fit("--trainer.max_steps=2", "--data.micro_batch_size=2")
    main(["fit", f"--config={RUN / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=4"])
    assert list(losses(RUN)) == [1, 2, 3, 4]
    main(["fit", f"--config={RUN / 'config.yaml'}"])
    assert losses(Path("runs/t/version_1")) == {step: loss for step, loss in losses(RUN).items() if step <= 2}


def test_what_is_not_given_of_the_architecture_comes_from_the_checkpoint(text_file: Path, fit: Fit) -> None:
    fit("--trainer.max_steps=1", "--data.tokenizer=gpt2")
    rest = [flag for flag in TINY if "model.config" not in flag]
    main(["fit", *rest, f"--data.source={text_file}", "--ckpt_path=last", "--trainer.max_steps=2"])
    assert list(losses(RUN)) == [1, 2]


def test_weights_alone_are_not_resumed(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=1")
    checkpoint = read_checkpoint(checkpoints(RUN)[-1])
    torch.save({key: checkpoint[key] for key in ("state_dict", "hyper_parameters", "global_step")}, "weights.ckpt")
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=2", "--ckpt_path=weights.ckpt")
    assert "weights.ckpt holds weights only, there is no run to resume" in capsys.readouterr().err


def test_init_from_takes_weights_only(fit: Fit) -> None:
    fit("--trainer.max_steps=3")
    fit("--trainer.max_steps=1", "--model.init_from=runs/t/version_0", "--model.lr=0", "--model.initial_lr=0")
    first, second = (read_checkpoint(checkpoints(Path(f"runs/t/version_{n}"))[-1]) for n in (0, 1))
    assert second["global_step"] == 1
    assert second["TokenDataModule"]["windows"] == 4
    assert all(torch.equal(second["state_dict"][key], value) for key, value in first["state_dict"].items())


def test_validate_gives_the_loss_of_the_fit(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=2")
    capsys.readouterr()
    fit("--ckpt_path=last", command="validate")
    assert shown(capsys) == pytest.approx(losses(RUN, "val/loss")[2])
    assert not Path("runs/t/version_1").exists()
    with pytest.raises(SystemExit):
        fit("--ckpt_path=last", command="test")
    fit("--ckpt_path=last", "--data.test_fraction=0.1", command="test")
    assert "test/loss" in capsys.readouterr().out


def test_later_configuration_files_and_flags_win(text_file: Path) -> None:
    Path("a.yaml").write_text("model: {config: {emb_dim: 32, n_heads: 2, n_layers: 1, context_length: 16}}\n")
    Path("b.yaml").write_text("model: {config: {n_layers: 2}}\nrun: {name: t}\n")
    flags = [flag for flag in TINY if "n_layers" not in flag and "emb_dim" not in flag]
    main(["fit", "--config=a.yaml", "--config=b.yaml", *flags, f"--data.source={text_file}", "--trainer.max_steps=1"])
    config = read_checkpoint(checkpoints(RUN)[-1])["hyper_parameters"]["config"]
    assert (config["emb_dim"], config["n_layers"]) == (32, 2)


def test_fast_dev_run_leaves_nothing_behind(fit: Fit) -> None:
    fit("--trainer.fast_dev_run=true", "--data.micro_batch_size=2")
    assert not list(Path("runs").rglob("*.ckpt"))


def test_fast_dev_run_names_what_went_wrong(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.fast_dev_run=3", "--run.max_nonfinite_steps=1", "--model.lr=1e38", "--model.schedule=constant"]
    with pytest.raises(SystemExit):
        fit(*flags)
    assert "the gradient was not finite in 1 steps in a row" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.fast_dev_run=1", "--ckpt_path=last")
    assert exit_.value.code == 2
    assert "trainer.fast_dev_run cannot resume" in capsys.readouterr().err


def test_the_sanity_check_says_and_keeps_nothing(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.num_sanity_val_steps=1", "--trainer.max_steps=2", "--trainer.enable_progress_bar=true")
    said = capsys.readouterr().err
    assert "step 0: val/loss" not in said
    assert "step 2: val/loss" in said


def test_the_end_promises_only_checkpoints_that_are_there(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=90", "--trainer.enable_checkpointing=false", "--trainer.max_time=00:00:00:00")
    said = capsys.readouterr().err
    assert "the time of trainer.max_time is over" in said
    assert "--ckpt_path" not in said


def test_a_run_that_branches_off_has_no_best_checkpoint_before_its_own(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--trainer.max_steps=3", "--run.val_every_n_steps=100", "--run.keep_best=false")
    first = checkpoints(RUN)[-1]
    saved = torch.load(first, weights_only=True)
    for name, state in saved["callbacks"].items():
        if "FinalValidation" in name:
            state["last_step"] = 0  # as after a signal before the validation
    DurableCheckpointIO().save_checkpoint(saved, first)
    capsys.readouterr()
    flags = ["--run.val_every_n_steps=3", "--trainer.max_steps=4", "--model.lr=100", "--model.schedule=constant"]
    fit(f"--ckpt_path={first}", "--run.name=branch", "--trainer.enable_progress_bar=true", *flags)
    said = capsys.readouterr()
    assert "step 3: val/loss" in said.err
    assert "best " not in said.out


def test_muon_resumes_with_its_state_and_its_values(fit: Fit) -> None:
    muon = ("--model.optimizer=muon", "--trainer.max_steps=6", "--run.save_every_n_steps=3")
    fit(*muon, "--run.name=whole")
    fit(*muon, "--run.name=stop")
    checkpoints(Path("runs/stop/version_0"))[-1].unlink()
    fit(*muon, "--run.name=stop", "--ckpt_path=last")
    assert losses(Path("runs/stop/version_0")) == losses(Path("runs/whole/version_0"))
    state = read_checkpoint(checkpoints(Path("runs/stop/version_0"))[-1])["optimizer_states"][0]
    assert "momentum_buffer" in state["state"][0]
    fit("--trainer.max_steps=6", "--run.name=stop", "--ckpt_path=last", command="validate")


def test_a_damaged_newest_checkpoint_is_passed_over(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=4", "--run.save_every_n_steps=2")
    first, newest = checkpoints(RUN)
    newest.write_bytes(newest.read_bytes()[:1000])
    fit("--trainer.max_steps=5", "--ckpt_path=last", "--run.keep_last=1")
    assert "step-00000004.ckpt is damaged, truncated" in capsys.readouterr().err
    assert list(losses(RUN)) == [1, 2, 3, 4, 5]
    assert [path.name for path in checkpoints(RUN)] == ["step-00000005.ckpt"]
    assert not first.exists()


def test_a_run_that_died_before_its_first_checkpoint_does_not_hide_the_one_before(fit: Fit) -> None:
    fit("--trainer.max_steps=1")
    Path("runs/t/version_1").mkdir()
    fit("--trainer.max_steps=2", "--ckpt_path=last")
    assert list(losses(RUN)) == [1, 2]


def test_a_checkpoint_under_another_name_branches_off(fit: Fit) -> None:
    fit("--trainer.max_steps=1")
    fit("--trainer.max_steps=2", "--ckpt_path=runs/t", "--run.name=other")
    assert list(losses(RUN)) == [1]
    assert list(losses(Path("runs/other/version_0"))) == [2]


def test_a_run_in_epochs_resumes_at_its_position(fit: Fit, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_epochs=1")
    steps = len(losses(RUN))
    fit("--trainer.max_epochs=2", "--ckpt_path=last", "--data.batch_size=8")
    windows = read_checkpoint(checkpoints(RUN)[-1])["TokenDataModule"]["windows"]
    assert len(losses(RUN)) == steps + -(-(windows - 4 * steps) // 8)
    datamodule = TokenDataModule(str(text_file), context_length=16, val_fraction=0.1)
    datamodule.setup()
    assert 0 <= windows - 2 * len(datamodule.run_data.splits["train"]) < 8  # two passes, and what fills the last step
    steps = len(losses(RUN))
    with pytest.raises(SystemExit):
        fit("--trainer.max_epochs=2", "--ckpt_path=last", "--data.batch_size=8")
    assert f"the run has made its {steps} steps already" in capsys.readouterr().err


def test_a_run_goes_on_without_what_it_was_started_from(fit: Fit) -> None:
    fit("--trainer.max_steps=1")
    source = checkpoints(RUN)[-1]
    fit("--trainer.max_steps=1", f"--model.init_from={source}", "--run.name=b")
    source.unlink()
    fit("--trainer.max_steps=2", f"--model.init_from={source}", "--run.name=b", "--ckpt_path=last")
    assert list(losses(Path("runs/b/version_0"))) == [1, 2]


def test_imported_weights_can_be_validated(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    from gptlit.checkpoint.export import save_checkpoint
    from gptlit.checkpoint.pretrained import read_weights

    fit("--trainer.max_steps=1")
    save_checkpoint(read_weights(RUN), Path("weights.ckpt"))
    fit("--ckpt_path=weights.ckpt", command="validate")
    assert shown(capsys) == pytest.approx(losses(RUN, "val/loss")[1])
    fit(command="validate")
    assert "untrained weights are measured" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data.seed=9", "--data.stride=3", "--model.optimizer=muon"])
def test_another_order_or_optimizer_is_not_resumed(fit: Fit, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    fit("--trainer.max_steps=1")
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=2", "--ckpt_path=last", flag)
    assert flag.strip("-").split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_complete(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", f"--config={file}", "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["run"]["name"] == file.stem
    header = file.read_text().split("\n\n")[0]
    for word in ("python train.py fit --config", "Hardware", "Time", "Loss"):
        assert word in header


WRONG = [
    (["--model.config.n_head=4"], 2, r"unrecognized arguments: --model\.config\.n_head"),
    (["--model.config.n_layer=4"], 2, r"unrecognized arguments: --model\.config\.n_layer=4"),
    (["--optimizer=SGD"], 2, r"unrecognized arguments: --optimizer"),
    (["--weights_only=false"], 2, r"unrecognized arguments: --weights_only"),
    (["--model.config.n_heads=5"], 2, r"emb_dim 32 is not divisible by n_heads 5"),
    (["--model.config.emb_dim=-32"], 2, r"emb_dim must be a positive integer, got -32"),
    (["--model.config.n_layers=many"], 2, r"n_layers.*many"),
    (["--model.config.vocab_size=100"], 1, r"model\.config\.vocab_size 100 contradicts the tokenizer 'tokenizer"),
    (["--data.context_length=8"], 1, r"data\.context_length 8 contradicts model\.config\.context_length 16"),
    (["--data.source=nowhere.txt"], 1, r"data\.source 'nowhere\.txt' does not exist"),
    (["--data.batch_size=0"], 2, r"data\.batch_size must be a positive integer, got 0"),
    (["--trainer.accumulate_grad_batches=2"], 2, r"trainer\.accumulate_grad_batches 2 cannot be set"),
    (["--trainer.max_steps=0"], 2, r"trainer\.max_steps 0 trains nothing"),
    (["--trainer.max_epochs=0"], 2, r"trainer\.max_epochs 0 trains nothing"),
    (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], 2, r"a run needs an end"),
    (["--trainer.val_check_interval=5"], 2, r"use run\.val_every_n_steps"),
    (["--trainer.min_epochs=2"], 2, r"trainer\.min_epochs cannot be set: .* use trainer\.max_steps"),
    (["--run.name=../x"], 2, r"run\.name must be a plain folder name without \$, got '\.\./x'"),
    (["--run.name=$HOME"], 2, r"run\.name must be a plain folder name without \$, got '\$HOME'"),
    (["--trainer.barebones=true"], 2, r"trainer\.barebones cannot be true"),
    (["--trainer.default_root_dir=~nobody-here/x"], 2, r"the path '~nobody-here/x' cannot be used"),
    (["--data.cache_dir=~nobody-here/x"], 2, r"the path '~nobody-here/x' cannot be used"),
    (["--ckpt_path=~nobody-here/x"], 2, r"the path '~nobody-here/x' cannot be used"),
    (["--model.init_from=~nobody-here/x"], 2, r"the path '~nobody-here/x' cannot be used"),
    (["--run.save_every_n_steps=0"], 2, r"run\.save_every_n_steps must be a positive integer, got 0"),
    (["--ckpt_path=nowhere.ckpt"], 2, r"checkpoint 'nowhere\.ckpt' does not exist"),
    (["--ckpt_path=text.ckpt"], 2, r"text\.ckpt is damaged, truncated or no checkpoint"),
    (["--model.init_from=nowhere"], 2, r"checkpoint 'nowhere' does not exist"),
    (["--model.lr=-1"], 2, r"model\.lr must be a number of at least 0, got -1"),
    (["--config=typo.yaml"], 2, r"learning_rate"),
    (["--config=nowhere.yaml"], 2, r"nowhere\.yaml"),
    (["--trainer.devices=many"], 2, r"devices|many"),
    (["--trainer.gradient_clip_val=-1"], 2, r"trainer\.gradient_clip_val must be at least 0 .*, got -1"),
    (["--trainer.precision=16-true"], 2, r"trainer\.precision 16-true is not supported"),
    (["--seed_everything=-1"], 2, r"seed_everything must be at least 0 and below 2\^32, got -1"),
    (["--config=twice.yaml"], 2, r".*'model' is given twice, in lines 1 and 2: keep one"),
    (["--config=twice-inside.yaml"], 2, r".*'lr' is given twice, in lines 2 and 4: keep one"),
    (["--config=empty.yaml"], 2, r"model\.lr"),
    (["--config=empty-group.yaml"], 2, r"data is empty: give it settings"),
]


@pytest.mark.parametrize(("flags", "status", "words"), WRONG, ids=[flags[0] for flags, _, _ in WRONG])
def test_bad_input_is_one_line(
    fit: Fit, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, words: str
) -> None:
    Path("text.ckpt").write_text("hello")
    Path("typo.yaml").write_text("model: {learning_rate: 0.1}\n")
    Path("twice.yaml").write_text("model: {lr: 0.1}\nmodel: {min_lr: 0.1}\n")
    Path("twice-inside.yaml").write_text("model:\n  lr: 0.1\n  min_lr: 0.0\n  lr: 0.2\n")
    Path("empty.yaml").write_text("model:\n  lr:\n")
    Path("empty-group.yaml").write_text("data:\ntrainer: {max_steps: 1}\n")
    with pytest.raises(SystemExit) as exit_:
        fit("--trainer.max_steps=1", *flags)
    assert exit_.value.code == status
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert len(lines) == 1, lines
    assert re.match(r"error: .*" + words, lines[0])
    assert not Path("runs").exists()


def test_a_home_that_no_shell_has_expanded_is_one_folder(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("home").absolute()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))  # of Windows
    Path("paths.yaml").write_text("trainer: {default_root_dir: ~/runs}\ndata: {cache_dir: ~/cache}\n")
    fit("--config=paths.yaml", "--trainer.max_steps=1")
    fit("--config=paths.yaml", "--trainer.max_steps=2", "--ckpt_path=~/runs/t")
    assert len(checkpoints(home / RUN)) == len(losses(home / RUN)) == 2
    assert any((home / "cache").iterdir())
    assert not Path("~").exists()


def test_a_run_without_an_end_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit()
    assert "error: a run needs an end: set trainer.max_steps or trainer.max_epochs" in capsys.readouterr().err


def test_another_corpus_or_architecture_is_not_resumed(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=1")
    Path("other.txt").write_text("other words " * 2000)
    for flags, words in (
        (["--data.source=other.txt"], "but the checkpoint was trained with"),
        (["--model.config.n_layers=3"], "model.config.n_layers is 3, but the checkpoint was trained with 2"),
    ):
        with pytest.raises(SystemExit):
            fit("--trainer.max_steps=2", "--ckpt_path=last", *flags)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=1", "--model.init_from=runs/t", "--model.config.emb_dim=64")
    err = capsys.readouterr().err
    assert "model.config.emb_dim is 64, but runs/t/version_0/checkpoints/step-00000001.ckpt has 32" in err


def test_a_bug_keeps_its_traceback(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptlit.training import module

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(module, "linear_cross_entropy", broken)
    with pytest.raises(ValueError, match="a bug"):
        fit("--trainer.max_steps=1")


def test_the_traceback_of_an_error_can_be_had(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTLIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        fit("--trainer.max_steps=1", "--data.source=nowhere.txt")


@pytest.mark.parametrize(
    ("native", "words"),
    [
        (True, "trainer.precision bf16-mixed: this CPU multiplies bf16 natively"),
        (False, "trainer.precision 32-true: this CPU does not multiply bf16 natively"),
    ],
)
def test_the_precision_that_was_picked_is_said(
    fit: Fit, native: bool, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    fit("--trainer.max_steps=1", "--trainer.precision=null")
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trainer.devices=1000"], "data.batch_size 4 is that of all devices together, and not divisible by 1000"),
        (["--trainer.devices=1000", "--data.batch_size=1000"], "trainer.devices 1000 would start as many processes"),
        (["--trainer.devices=2"], "MASTER_PORT {port} cannot be used"),
    ],
)
def test_no_process_is_started_for_what_cannot_run(
    fit: Fit, flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", lambda *_, **__: pytest.fail("processes are started"))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(SystemExit) as exit_:
            fit("--trainer.max_steps=1", *flags)
    assert exit_.value.code == 2
    assert f"error: {words.format(port=port)}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_whose_name_looks_like_a_number_resumes_from_its_own_configuration(fit: Fit) -> None:
    fit("--trainer.max_steps=1", "--run.name=3e-4")
    run = Path("runs/3e-4/version_0")
    main(["fit", f"--config={run / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=2"])
    assert list(losses(run)) == [1, 2]
