"""Fits on rows: the loss over a whole step, the book's loop, resuming."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, losses, run_script
from gptlit import GPTConfig, GPTModule, TokenDataModule
from gptlit.checkpoint.export import save_checkpoint
from gptlit.checkpoint.io import read_checkpoint
from gptlit.checkpoint.pretrained import read_weights
from gptlit.checkpoint.runs import checkpoints, newest_checkpoint
from gptlit.commands.main import main as gptlit

Fit = Callable[..., None]
RUN = Path("runs/t/version_0")
ROWS = ["--data.source=a.json", "--data.template=chat", "--model.config.context_length=96"]


@pytest.fixture(autouse=True)
def instructions(text: str) -> Path:
    """Forty instructions; their answers have from 1 to 20 words."""
    draw = random.Random(0)
    words = text.split()[:30]
    rows = [
        {
            "instruction": " ".join(draw.choices(words, k=draw.randint(1, 4))),
            "input": " ".join(draw.choices(words, k=3)) if n % 3 else "",
            "output": " ".join(draw.choices(words, k=draw.randint(1, 20))),
        }
        for n in range(40)
    ]
    path = Path("a.json")
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("masks", ["false", "true"])
def test_the_loss_is_the_same_for_any_accumulation(fit: Fit, masks: str) -> None:
    """Also the gradient: the loss of a step depends on the update of the one before."""
    common = [*ROWS, f"--data.mask_prompt={masks}", "--data.batch_size=8"]
    for micro in (8, 4, 2):
        name = f"--run.name=m{micro}"
        fit(*common, "--trainer.max_steps=5", "--run.val_every_n_steps=5", f"--data.micro_batch_size={micro}", name)
    whole = Path("runs/m8/version_0")
    for run in (Path("runs/m4/version_0"), Path("runs/m2/version_0")):
        for tag in ("train/loss", "val/loss", "train/grad_norm"):
            assert losses(run, tag) == pytest.approx(losses(whole, tag), abs=1e-5), tag
        assert losses(run, "train/tokens") == losses(whole, "train/tokens")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp"])
def test_two_devices_give_the_curve_of_one(fit: Fit, words_json: Path, tmp_path: Path, strategy: str) -> None:
    common = [*ROWS, "--data.mask_prompt=true", "--data.batch_size=8"]
    common += ["--data.micro_batch_size=2", "--trainer.max_steps=6", "--run.val_every_n_steps=3"]
    fit(*common)
    common += [f"--data.tokenizer={words_json}", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    result = run_script(str(ROOT / "train.py"), "fit", *TINY, *common, "--run.name=two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for tag, error in (("train/loss", 1e-5), ("val/loss", 1e-5), ("train/grad_norm", 2e-4), ("train/tokens", 0)):
        assert losses(Path("runs/two/version_0"), tag) == pytest.approx(losses(RUN, tag), abs=error), tag


def test_resuming_is_bitwise(fit: Fit) -> None:
    common = [*ROWS, "--model.config.drop_rate=0.1", "--model.schedule=constant"]
    fit(*common, "--trainer.max_steps=8", "--run.name=whole")
    fit(*common, "--trainer.max_steps=3")
    fit(*common, "--trainer.max_steps=8", "--ckpt_path=last", "--data.micro_batch_size=4")
    found = [newest_checkpoint(run) for run in (RUN, Path("runs/whole/version_0"))]
    ours, theirs = (checkpoint["state_dict"] for _, checkpoint in filter(None, found))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert losses(RUN) == losses(Path("runs/whole/version_0"))


@pytest.mark.parametrize("flag", ["--data.mask_prompt=true", "--data.template=alpaca", "--data.val_fraction=0.2"])
def test_other_rows_are_not_resumed(fit: Fit, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    fit(*ROWS, "--trainer.max_steps=1")
    with pytest.raises(SystemExit):
        fit(*ROWS, "--trainer.max_steps=2", "--ckpt_path=last", flag)
    assert "the corpus is " in capsys.readouterr().err


def test_twenty_steps_are_those_of_the_books_loop(monkeypatch: pytest.MonkeyPatch, instructions: Path) -> None:
    """Its model, data set, collate function and loop, on the rows in our order."""
    monkeypatch.setitem(sys.modules, "psutil", ModuleType("psutil"))  # ch07 needs it elsewhere
    from llms_from_scratch import ch05, ch07
    from llms_from_scratch.ch04 import GPTModel as BookModel

    from gptlit.checkpoint.formats import BOOK, to_format

    config = GPTConfig(context_length=96, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0)
    torch.manual_seed(123)
    module = GPTModule(config, lr=1e-3, schedule="constant", decay_all=True, beta2=0.999)
    module.configure_model()
    book = BookModel({key: getattr(config, key) for key in ("vocab_size", "context_length", "emb_dim", "n_heads")}
                     | {"n_layers": 2, "drop_rate": 0.0, "qkv_bias": False})  # fmt: skip
    book.load_state_dict(to_format(module.model.state_dict(), BOOK), strict=False)
    datamodule = TokenDataModule(str(instructions), batch_size=4, val_fraction=0.1)
    ours: list[float] = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
            ours.append(float(outputs["loss"]))

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=20, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[Record()],
    )  # fmt: skip
    trainer.fit(module, datamodule)

    dataset = ch07.InstructionDataset(json.loads(instructions.read_text())[:36], datamodule.tokenizer)
    order: Any = [batch.tolist() for batch in datamodule.train_dataloader().sampler]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=order, collate_fn=ch07.custom_collate_fn)  # type: ignore[arg-type]
    theirs: list[float] = []
    of_batch = ch05.calc_loss_batch

    def recorded(inputs: Any, targets: Any, model: Any, device: Any) -> Any:
        loss = of_batch(inputs, targets, model, device)
        theirs.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(ch05, "calc_loss_batch", recorded)
    monkeypatch.setattr(ch05, "generate_and_print_sample", lambda *_: None)
    optimizer = torch.optim.AdamW(book.parameters(), lr=1e-3, weight_decay=0.1)
    ch05.train_model_simple(book, loader, loader, optimizer, "cpu", 1, 10**6, 1, "", datamodule.tokenizer)
    assert len(ours) == 20
    del theirs[1:3]  # the evaluation after the first step
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.5


def test_the_template_is_in_the_checkpoint(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """Also after an import. What a model of forty rows answers is no matter."""
    fit(*ROWS, "--trainer.max_steps=1", "--run.sample_prompt=the model")
    save_checkpoint(read_weights(RUN), Path("weights.ckpt"))
    options = ["--temperature=0", "--max_new_tokens=4", "--json"]
    capsys.readouterr()
    for checkpoint in (str(RUN), "weights.ckpt"):
        gptlit(["generate", f"--checkpoint={checkpoint}", "--prompt=the model", *options])
        answer = json.loads(capsys.readouterr().out)
        assert answer["prompt"] == "User:\nthe model\n\nAssistant:\n"
        gptlit(["generate", f"--checkpoint={checkpoint}", f"--prompt={answer['prompt']}", "--template=none", *options])
        assert json.loads(capsys.readouterr().out)["token_ids"] == answer["token_ids"]
    rows = json.loads(Path("a.json").read_text())[:3]
    Path("test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    gptlit(["generate", f"--checkpoint={RUN}", "--prompts_file=test.jsonl", *options])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in answers] == rows
    assert all(isinstance(row["model_response"], str) for row in answers)
    with pytest.raises(SystemExit):
        gptlit(["generate", f"--checkpoint={RUN}", "--prompts_file=test.jsonl", "--template=none"])
    assert "the checkpoint no template: give --template" in capsys.readouterr().err


def test_labelled_texts_have_a_target_a_row() -> None:
    Path("a.tsv").write_text("".join(f"{'spam' if n % 2 else 'ham'}\tword {n}\n" for n in range(40)))
    datamodule = TokenDataModule("a.tsv", batch_size=4, val_fraction=0.25, balance=True, context_length=16)
    datamodule.setup()
    assert datamodule.labels == ["ham", "spam"]
    assert datamodule.targets_in_step(0) == 4
    for inputs, targets in datamodule.val_dataloader():
        assert inputs.shape == targets.shape
        assert (targets >= 0).sum() == (targets >= 0).any(dim=1).sum()
    padded = TokenDataModule("a.tsv", batch_size=4, val_fraction=0.25, label_position=-1, context_length=16)
    padded.setup()
    assert padded.run_data.splits["val"][np.arange(3)][1][:, -1].ge(0).all()


WRONG = [
    (["--data.template=llama"], 2, "no template is named 'llama': choose one of alpaca, chat, phi3"),
    (["--data.balance=true"], 1, "data.balance True has no use: data.source 'a.json' has instructions"),
    (["--data.stride=3"], 1, "data.stride 3 is for windows: 'a.json' has instructions"),
    (["--data.val_source=b.txt"], 1, "the sources 'a.json', 'b.txt' have instructions and texts: a run trains on one"),
    (["--data.source=empty.jsonl"], 1, "empty.jsonl line 2: 'output' is empty, a text is needed"),
    (["--data.source=keys.json"], 1, "keys.json item 1 has no 'output', only 'instruction', 'answer'"),
    (
        ["--data.source=c.tsv", "--data.template=alpaca"],
        1,
        "all texts to train on in c.tsv have the label 'ham': two are needed",
    ),
    (
        ["--data.source=d.tsv", "--data.val_source=e.tsv", "--data.template=alpaca"],
        1,
        "e.tsv has the label 'eggs', which no text to train on has: they have 'ham', 'spam'",
    ),
    (
        ["--model.config.context_length=3", "--data.mask_prompt=true"],
        1,
        "has no row with a target: use more rows or a larger model.config.context_length",
    ),
    (["--data.source=one.jsonl"], 1, "the train part of 'one.jsonl' has no row with a target: use more rows or"),
]


@pytest.mark.parametrize(("flags", "status", "words"), WRONG, ids=[flags[0] for flags, _, _ in WRONG])
def test_bad_rows_are_one_line(
    fit: Fit, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, words: str
) -> None:
    row = {"instruction": "x", "output": "y"}
    Path("b.txt").write_text("text")
    Path("empty.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'output': ''})}\n")
    Path("one.jsonl").write_text(json.dumps(row))
    Path("keys.json").write_text('[{"instruction": "x", "answer": "y"}]')
    Path("c.tsv").write_text("ham\tx\n" * 30)
    Path("d.tsv").write_text("ham\tx\nspam\ty\n" * 9)
    Path("e.tsv").write_text("eggs\tx\n")
    with pytest.raises(SystemExit) as exit_:
        fit(*ROWS, "--trainer.max_steps=1", *flags)
    assert exit_.value.code == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error


SLOW = """
import time
from gptlit.training.module import GPTModule
step = GPTModule.training_step
GPTModule.training_step = lambda self, *batch: (time.sleep(0.1), step(self, *batch))[1]
from gptlit.training.cli import main
main()
"""
KINDS = {
    "instructions": ROWS,
    "labels": ["--data.source=a.tsv", "--data.balance=true"],
    "adapters": [*ROWS, "--model.lora.rank=4", "--model.init_from=runs/base"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_the_middle_it_resumes_bit_for_bit(fit: Fit, kind: str, text: str, words_json: Path) -> None:
    words = text.split()[:30]
    Path("a.tsv").write_text("".join(f"{'ab'[n % 2]}\t{' '.join(words[n % 7 : n % 11 + 9])} {n}\n" for n in range(60)))
    Path("slow.py").write_text(SLOW)
    if kind == "adapters":
        fit(*ROWS, "--trainer.max_steps=2", "--run.name=base")
    flags = [*KINDS[kind], "--model.config.drop_rate=0.1", "--trainer.max_steps=16", "--run.save_every_n_steps=2"]
    fit(*flags, "--run.name=whole")
    command = [sys.executable, "slow.py", "fit", *TINY, f"--data.tokenizer={words_json}", *flags]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(checkpoints(RUN)) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert checkpoints(RUN)[-1].name < "step-00000016"
    fit(*flags, "--ckpt_path=last")
    whole, resumed = (read_checkpoint(checkpoints(Path(f"runs/{name}/version_0"))[-1]) for name in ("whole", "t"))
    assert resumed["global_step"] == 16
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert losses(RUN) == losses(Path("runs/whole/version_0"))
