"""Runs that train adapters of a frozen base: what is saved, resumed, exported and refused."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from conftest import ROOT, TINY, losses, run_script
from gptlit import GPTModule, load_pretrained, save_pretrained
from gptlit.checkpoint.io import read_checkpoint
from gptlit.checkpoint.runs import checkpoints
from gptlit.commands.main import main as gptlit
from gptlit.model.lora import LoRAConfig

Fit = Callable[..., None]
BASE = Path("runs/base/version_0/checkpoints/step-00000002.ckpt")
LORA = ["--model.lora.rank=4", "--model.init_from=runs/base", "--run.val_every_n_steps=2"]
RUN = Path("runs/t/version_0")


@pytest.fixture
def lora(fit: Fit) -> Fit:
    """A fit of adapters of rank 4 for a base of two steps."""
    fit("--trainer.max_steps=2", "--run.name=base", "--model.config.tie_weights=true")
    return lambda *args, **options: fit(*LORA, *args, **options)


def newest(run: Path = RUN) -> Path:
    return checkpoints(run)[-1]


def test_a_checkpoint_has_adapters_alone_and_names_their_base(lora: Fit) -> None:
    lora("--trainer.max_steps=3")
    checkpoint = read_checkpoint(newest())
    assert all(".lora." in name for name in checkpoint["state_dict"])
    assert len(checkpoint["state_dict"]) == 2 * (2 * (3 + 1 + 2) + 1)
    assert newest().stat().st_size < BASE.stat().st_size / 2
    assert checkpoint["hyper_parameters"]["init_from"] == str(BASE.resolve())
    trained, base = load_pretrained(newest()), load_pretrained(BASE)
    assert not trained.config.tie_weights
    for name in ("tok_emb.weight", "pos_emb.weight", "trf_blocks.1.norm1.weight", "trf_blocks.1.att.out_proj.bias"):
        assert torch.equal(trained.state_dict()[name], base.state_dict()[name]), name
    assert not torch.equal(trained.trf_blocks[1].att.qkv.weight, base.trf_blocks[1].att.qkv.weight)  # type: ignore[union-attr]
    module = GPTModule.load_from_checkpoint(newest())
    ids = torch.arange(16)[None]
    torch.testing.assert_close(module.model.eval()(ids), trained(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "flags", [[], ["--model.optimizer=muon"], ["--model.lora.targets=[out_head]", "--model.optimizer=muon"]]
)
def test_resuming_goes_on_as_if_it_had_never_stopped(lora: Fit, flags: list[str]) -> None:
    lora("--trainer.max_steps=5", "--run.name=whole", *flags)
    lora("--trainer.max_steps=5", "--run.save_every_n_steps=2", *flags)
    newest().unlink()  # as if killed after step 4
    lora("--trainer.max_steps=5", "--ckpt_path=last", *flags)
    whole = Path("runs/whole/version_0")
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert losses(RUN, tag) == losses(whole, tag), tag
    one, two = (read_checkpoint(newest(run))["state_dict"] for run in (whole, RUN))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], value) for name, value in one.items())
    assert all(value.any() for value in one.values())  # B is 0 until it is trained


def test_frozen_weights_stay_bit_for_bit(lora: Fit) -> None:
    """With weight decay, which must not reach them either."""
    module = GPTModule(load_pretrained(BASE).config, lr=0.1, init_from=str(BASE), lora=LoRAConfig(rank=4))
    ids = torch.randint(0, module.config.vocab_size, (3, 2, 17))
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(accelerator="cpu", max_steps=3, **options).fit(
        module, DataLoader(TensorDataset(ids[..., :-1], ids[..., 1:]), batch_size=None)
    )
    for name, value in load_pretrained(BASE).state_dict().items():
        assert torch.equal(module.model.get_parameter(name), value), name
    assert module.model.get_parameter("out_head.lora.0.B").any()
    assert module.model.out_head.weight is module.model.tok_emb.weight


def test_what_a_checkpoint_says_of_its_adapters_need_not_be_repeated(
    lora: Fit, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    lora("--trainer.max_steps=3")
    loss = losses(RUN, "val/loss")[3]
    fit(f"--ckpt_path={newest()}", command="validate")
    assert f"val/loss    {loss:.4f}" in capsys.readouterr().out
    fit("--trainer.max_steps=4", "--ckpt_path=last")
    assert newest().name == "step-00000004.ckpt"
    flags = ("--model.lr=0", "--model.initial_lr=0", "--run.name=merged")
    fit("--trainer.max_steps=1", f"--model.init_from={newest()}", *flags)
    for name, value in load_pretrained("runs/merged/version_0").state_dict().items():
        assert torch.equal(value, load_pretrained(newest()).state_dict()[name]), name


def test_an_average_of_adapters(lora: Fit) -> None:
    ema = "--trainer.callbacks={class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.5}}"
    lora("--trainer.max_steps=3", ema)
    lora("--trainer.max_steps=4", ema, "--ckpt_path=last")
    checkpoint = read_checkpoint(newest())
    for state in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        assert all(".lora." in name for name in state)


def test_an_exported_model_is_equal_in_transformers(lora: Fit) -> None:
    transformers = pytest.importorskip("transformers")
    lora("--trainer.max_steps=3")
    ours = load_pretrained(newest())
    gptlit(["export", "--checkpoint", str(RUN), "--out", "out"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=0)
    save_pretrained(GPTModule.load_from_checkpoint(newest()).model, "book", to="book")
    for name, value in load_pretrained("book/model.pth", n_heads=2).state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sharded", "error"),
    [([], ["--model.compile=true"], 1e-5), (["--model.optimizer=muon"], [], 2e-4)],
    ids=["compile", "muon"],
)
def test_sharded_adapters_give_the_curve_of_one_device(
    lora: Fit, flags: list[str], sharded: list[str], error: float, words_json: Path, text_file: Path, tmp_path: Path
) -> None:
    """And a run moves from one to the other. (Muon turns its updates in bf16.)"""
    common = [*flags, "--data.micro_batch_size=1", "--model.schedule=constant"]
    lora("--trainer.max_steps=4", "--run.name=whole", *common)
    lora("--trainer.max_steps=2", *common)
    two = [*LORA, *common, *sharded, "--trainer.devices=2", "--trainer.strategy=fsdp2", "--ckpt_path=last"]
    two += ["--trainer.max_steps=4", f"--data.source={text_file}", f"--data.tokenizer={words_json}"]
    result = run_script(str(ROOT / "train.py"), "fit", *TINY, *two, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for tag in ("train/loss", "val/loss"):
        assert losses(RUN, tag) == pytest.approx(losses(Path("runs/whole/version_0"), tag), abs=error), tag
    one, two_devices = (read_checkpoint(newest(run))["state_dict"] for run in (Path("runs/whole/version_0"), RUN))
    torch.testing.assert_close(two_devices, one, atol=1e-3, rtol=0)


def test_adapters_for_another_base_are_refused(lora: Fit, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    lora("--trainer.max_steps=2")
    fit("--trainer.max_steps=3", "--run.name=other", "--model.config.tie_weights=true")
    other = Path("runs/other/version_0/checkpoints/step-00000003.ckpt")
    with pytest.raises(SystemExit):
        lora("--trainer.max_steps=4", "--ckpt_path=last", f"--model.init_from={other}")
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"error: the checkpoint has adapters for .*/{BASE} with .*, but .*/{other} has .*", error)
    shutil.copy(other, BASE)
    with pytest.raises(ValueError, match=f"{newest()} has adapters for .*/{BASE} with the fingerprint .*, but .*"):
        load_pretrained(newest())
    BASE.unlink()
    with pytest.raises(ValueError, match=f"{newest()} has only adapters, and their base is missing: .*/{BASE}"):
        load_pretrained(newest())


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--model.lora.rank=4"], 2, "model.lora.rank is 4, but there are no weights to adapt: set model.init_from"),
        ([*LORA, "--model.lora.rank=33"], 2, "model.lora.rank 33 is larger than trf_blocks.0.att.qkv, which has 32"),
        ([*LORA, "--model.lora.targets=[mlp]"], 2, "no linear layer is named 'mlp', choose from att.out_proj, att.qkv"),
        ([*LORA, "--model.lora.alpha=0"], 2, "model.lora.alpha must be a positive number, got 0"),
        (["--model.lora.alpha=8"], 2, "model.lora.alpha and model.lora.targets need model.lora.rank"),
        (["--ckpt_path=runs/base", *LORA], 1, "model.lora.rank is 4, but the checkpoint was trained with 0"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(
    lora: Fit, fit: Fit, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        fit("--trainer.max_steps=4", *flags)
    assert error.value.code == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not checkpoints(RUN)
