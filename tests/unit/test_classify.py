"""Classification: the book's chapter 6, what is trained, heads, metrics, labels of texts, and what is refused."""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from llms_from_scratch.ch04 import GPTModel as BookModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conftest import ROOT, TINY, losses, run_script
from gptlit.checkpoint.export import save_checkpoint, save_pretrained
from gptlit.checkpoint.formats import BOOK, PretrainedWeights, to_format
from gptlit.checkpoint.io import read_checkpoint
from gptlit.checkpoint.pretrained import read_weights
from gptlit.checkpoint.runs import checkpoint_path
from gptlit.commands.main import main
from gptlit.config import PRESETS, GPTConfig
from gptlit.data.datamodule import TokenDataModule
from gptlit.data.tokenizer import load_tokenizer
from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig
from gptlit.model.loss import at_labels
from gptlit.training.module import GPTModule
from gptlit.training.trainable import freeze

with pytest.MonkeyPatch.context() as _patch:
    _patch.setitem(sys.modules, "pandas", ModuleType("pandas"))  # it reads the book's file elsewhere
    from llms_from_scratch.ch06 import calc_loss_loader, classify_review, train_classifier_simple

Fit = Callable[..., None]
RUN = Path("runs/t/version_0")
BOOKS_TINY = {"vocab_size": 50257, "context_length": 120, "emb_dim": 12, "n_layers": 1, "n_heads": 2}
BOOKS_TINY |= {"drop_rate": 0.0, "qkv_bias": False}
SMALL = GPTConfig(vocab_size=61, context_length=8, emb_dim=16, n_heads=2, n_layers=3, drop_rate=0.0, n_classes=3)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trainer(**options: Any) -> pl.Trainer:
    defaults = {"max_steps": 4, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**defaults, **options})


def batches(config: GPTConfig, count: int, position: int = -1) -> list[tuple[Tensor, Tensor]]:
    """Texts with labels at a position."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        inputs = torch.randint(0, config.vocab_size, (4, config.context_length), generator=generator)
        targets = torch.full_like(inputs, -100)
        targets[:, position] = torch.randint(0, config.n_classes, (4,), generator=generator)
        found.append((inputs, targets))
    return found


def loader(rows: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


# --- the book -----------------------------------------------------------------------------------------------------


def test_the_books_numbers_of_parameters() -> None:
    with torch.device("meta"):
        model = GPTModel(replace(PRESETS["gpt2-small"], qkv_bias=True, n_classes=2))
    assert trainable(model) == 124_441_346
    freeze(model, "last_block")
    assert trainable(model) == 7_090_946


def test_the_losses_of_an_untrained_model_and_four_steps_are_the_books() -> None:
    """Its training loop, with its settings: the last block, AdamW with decay on all, the last padded position."""
    config = GPTConfig(**BOOKS_TINY, n_classes=2)
    rows = batches(config, 4)
    theirs = [(inputs, targets[:, -1]) for inputs, targets in rows]
    torch.manual_seed(123)
    book = BookModel(BOOKS_TINY)
    book.requires_grad_(False)
    torch.manual_seed(123)
    book.out_head = nn.Linear(12, 2)
    book.trf_blocks[-1].requires_grad_()
    book.final_norm.requires_grad_()
    torch.manual_seed(123)
    module = GPTModule(
        config, trainable="last_block", lr=5e-5, schedule="constant", weight_decay=0.1, decay_all=True, beta2=0.999
    )
    module.configure_model()
    torch.manual_seed(123)
    module.model.out_head.reset_parameters()
    (found,) = trainer().validate(module, loader(rows), verbose=False)
    assert found["val/loss"] == pytest.approx(calc_loss_loader(theirs, book.eval(), "cpu"), abs=1e-6)
    optimizer = torch.optim.AdamW((p for p in book.parameters() if p.requires_grad), lr=5e-5, weight_decay=0.1)
    train_classifier_simple(book, theirs, theirs, optimizer, "cpu", num_epochs=1, eval_freq=9, eval_iter=1)
    trainer().fit(module, loader(rows))
    for name, value in to_format(module.model.state_dict(), BOOK).items():
        torch.testing.assert_close(value, book.state_dict()[name], atol=1e-7, rtol=1e-5, msg=name)


def test_the_books_classifier_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    book = BookModel({**BOOKS_TINY, "emb_dim": 64, "qkv_bias": True})
    book.out_head = nn.Linear(64, 2)
    torch.save(book.state_dict(), tmp_path / "review_classifier.pth")
    texts = ["You are a winner you have been specially selected", "Hey, just wanted to check"]
    main(["classify", f"--checkpoint={tmp_path}/review_classifier.pth", "--pad_to=30", *(f"--text={t}" for t in texts)])
    heads = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    encoding = load_tokenizer("gpt2")
    words = [classify_review(text, book, encoding, "cpu", max_length=30) for text in texts]
    assert heads == ["1" if word == "spam" else "0" for word in words]


# --- the model and what is trained ----------------------------------------------------------------------------------


def test_the_label_is_predicted_at_its_own_position() -> None:
    hidden = torch.randn(3, 5, 4)
    targets = torch.full((3, 5), -100)
    targets[0, 4], targets[1, 2] = 1, 0
    found, labels = at_labels(hidden, targets)
    assert labels.tolist() == [[1], [0], [-100]]
    assert torch.equal(found[:2, 0], torch.stack([hidden[0, 4], hidden[1, 2]]))


@pytest.mark.parametrize(
    ("part", "moving"),
    [
        ("head", ["out_head."]),
        ("last_block", ["trf_blocks.2.", "final_norm.", "out_head."]),
        (2, ["trf_blocks.1.", "trf_blocks.2.", "final_norm.", "out_head."]),
        ("all", [""]),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_stays_bit_identical(part: Any, moving: list[str], optimizer: Any) -> None:
    module = GPTModule(SMALL, lr=1e-2, trainable=part, optimizer=optimizer)
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    fitter = trainer()
    fitter.fit(module, loader(batches(SMALL, 4)))
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(tuple(moving)), name
    optimizer = fitter.optimizers[0]
    trained = {name for name in before if name.startswith(tuple(moving))}
    for held in (optimizer.state, {p for group in optimizer.param_groups for p in group["params"]}):
        assert {name for name, p in module.model.named_parameters() if p in held} == trained


def test_another_part_is_not_resumed(tmp_path: Path) -> None:
    """The optimizer has no state for it."""
    fitter = trainer()
    fitter.fit(GPTModule(SMALL, trainable="head"), loader(batches(SMALL, 4)))
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"model\.trainable is all, but the checkpoint was trained with head"):
        trainer().fit(GPTModule(SMALL), loader(batches(SMALL, 4)), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_one_batch_of_three_classes_can_be_overfitted() -> None:
    torch.manual_seed(0)
    rows = batches(SMALL, 1, position=3)
    module = GPTModule(SMALL, lr=1e-2, schedule="constant")
    fitter = trainer(max_steps=60, log_every_n_steps=60)
    fitter.fit(module, loader(rows * 60))
    assert fitter.callback_metrics["train/loss"] < 0.05
    assert fitter.callback_metrics["train/accuracy"] == 1
    (found,) = fitter.validate(module, loader(rows), verbose=False)
    assert found["val/accuracy"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"trainable": "first"},
            "model.trainable must be all, last_block, head, or a number of blocks up to 3, got",
        ),
        ({"trainable": 4}, "got 4"),
        ({"trainable": "head", "config": replace(SMALL, n_classes=0, tie_weights=True)}, "tie_weights false"),
        ({"trainable": 1, "lora": LoRAConfig(rank=2), "init_from": "x"}, "model.lora.rank 2 exclude each other"),
    ],
)
def test_a_part_that_is_not_there_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTModule(**{"config": SMALL, **options})


@pytest.mark.parametrize(
    ("wrong", "words"), [({"n_classes": 1}, "n_classes must be 0"), ({"tie_weights": True}, "tie")]
)
def test_classes_are_checked(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **wrong)


# --- from a file of labelled texts ----------------------------------------------------------------------------------

THEMES = {"learning": "the model learns from data", "nature": "trees and rivers in winter", "style": "to write slowly"}


@pytest.fixture
def labelled(fit: Fit) -> Fit:
    """`fit` on 120 texts with three labels."""
    draw = random.Random(0)
    lines = []
    for _ in range(120):
        label = draw.choice(list(THEMES))
        words = draw.choices("a , . about".split(), k=2) + draw.choices(THEMES[label].split(), k=draw.randint(2, 8))
        lines.append(f"{label}\t{' '.join(words)}\n")
    Path("texts.tsv").write_text("".join(lines))
    flags = ["--data.source=texts.tsv", "--data.batch_size=8", "--data.test_fraction=0.2"]

    def run(*args: str, command: str = "fit") -> None:
        fit(*flags, *args, command=command)

    return run


def test_no_text_to_train_on_is_one_line(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.tsv").write_text("ham\tthe model\n")
    with pytest.raises(SystemExit):
        fit("--data.source=one.tsv", "--trainer.max_steps=1")
    assert "the train part of 'one.tsv' has no row with a target: use more rows" in capsys.readouterr().err


def test_a_classifier_is_trained_tested_and_used(labelled: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    labelled("--trainer.max_steps=30", "--run.val_every_n_steps=15", "--model.lr=1e-2")
    assert losses(RUN, "val/accuracy")[30] > 0.8
    assert losses(RUN, "train/accuracy").keys() == losses(RUN).keys()
    events = EventAccumulator(str(RUN))
    events.Reload()
    assert "val/perplexity" not in events.Tags()["scalars"]
    assert "samples/text_summary" not in events.Tags()["tensors"]
    table = events.Tensors("val/confusion/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0] == "| true, predicted | learning | nature | style |"
    counts = [[int(cell) for cell in line.strip("| ").split(" | ")[1:]] for line in table.splitlines()[2:]]
    assert sum(map(sum, counts)) == 12
    assert sum(counts[n][n] for n in range(3)) / 12 == pytest.approx(losses(RUN, "val/accuracy")[30])
    out = capsys.readouterr().out
    assert f"accuracy {losses(RUN, 'val/accuracy')[30]:.4f}" in out
    assert "classify --checkpoint" in out
    labelled(f"--ckpt_path={RUN}", command="test")
    accuracy = float(re.findall(r"test/accuracy\s+\S\s+([\d.]+)", capsys.readouterr().out)[0])
    test = Path("test.txt")
    lines = [line.split("\t") for line in Path("texts.tsv").read_text().splitlines()]
    test.write_text("\n".join(text for _, text in lines))
    main(["classify", f"--checkpoint={RUN}", f"--file={test}"])
    answers = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    right = sum(label == answer for (label, _), (answer, _) in zip(lines, answers, strict=True))
    assert right / len(lines) > 0.8
    assert accuracy > 0.6
    assert all(1 / 3 < float(prob) <= 1 for _, prob in answers)
    main(["classify", f"--checkpoint={RUN}", "--text=trees and rivers", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["label"] == "nature" == next(iter(found["probs"]))
    assert sum(found["probs"].values()) == pytest.approx(1)


def test_the_command_predicts_as_the_validation_does(labelled: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """At each position of the label: texts are cut and padded as in training."""
    for position in (None, 0, -1):
        flags = [] if position is None else [f"--data.label_position={position}"]
        labelled("--trainer.max_steps=6", "--run.name=p", *flags)
        run = sorted(Path("runs/p").iterdir())[-1]
        accuracy = losses(run, "val/accuracy")[6]
        module = GPTModule.load_from_checkpoint(checkpoint_path(run, 6), weights_only=True)
        config = read_checkpoint(checkpoint_path(run, 6))
        data = TokenDataModule(
            "texts.tsv",
            8,
            context_length=16,
            val_fraction=0.1,
            test_fraction=0.2,
            label_position=position,
            tokenizer=config["TokenDataModule"]["tokenizer"],
        )
        data.load("validate")
        rows, eot = data.run_data.splits["val"], data.tokenizer.eot_token
        batches = [rows[np.array([index])] for index in range(len(rows))]
        names = [data.labels[int(targets.max())] for _, targets in batches]
        texts = [data.tokenizer.decode(inputs[inputs != eot].tolist()) for inputs, _ in batches]
        Path("val.txt").write_text("\n".join(texts))
        capsys.readouterr()
        main(["classify", f"--checkpoint={run}", "--file=val.txt"])
        answers = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
        assert sum(map(str.__eq__, answers, names)) / len(names) == pytest.approx(accuracy)
        assert module.config.n_classes == 3


def test_a_classifier_resumes_bitwise(labelled: Fit) -> None:
    flags = ["--trainer.max_steps=8", "--model.trainable=last_block", "--model.config.drop_rate=0.1"]
    flags += ["--data.micro_batch_size=2", "--run.val_every_n_steps=4"]
    labelled(*flags, "--run.name=whole")
    labelled(*flags, "--run.name=stop", "--run.save_every_n_steps=5", "--run.keep_last=-1")
    whole, stopped = Path("runs/whole/version_0"), Path("runs/stop/version_0")
    checkpoint_path(stopped, 8).unlink()
    labelled(*flags, "--run.name=stop", "--ckpt_path=last")
    for tag in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert losses(stopped, tag) == losses(whole, tag), tag
    one, two = (read_checkpoint(checkpoint_path(run, 8)) for run in (whole, stopped))
    assert one["TokenDataModule"] == two["TokenDataModule"]
    assert all(torch.equal(two["state_dict"][key], value) for key, value in one["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2"])
def test_two_devices_give_the_curves_of_one(labelled: Fit, words_json: Path, tmp_path: Path, strategy: str) -> None:
    """An odd number of texts to validate, so that one device gets padding."""
    flags = [
        "--trainer.max_steps=8",
        "--run.val_every_n_steps=4",
        "--data.micro_batch_size=2",
        "--data.val_fraction=.11",
    ]
    flags += ["--model.trainable=last_block"]
    labelled(*flags)
    flags += ["--data.source=texts.tsv", f"--data.tokenizer={words_json}", "--data.batch_size=8", "--run.name=two"]
    flags += ["--data.test_fraction=0.2", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    result = run_script(str(ROOT / "train.py"), "fit", *TINY, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    two = Path("runs/two/version_0")
    for tag in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        assert losses(two, tag) == pytest.approx(losses(RUN, tag), abs=1e-5), tag
    one, other = (read_checkpoint(checkpoint_path(run, 8))["state_dict"] for run in (RUN, two))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0, msg=name)


def test_adapters_of_a_classifier(fit: Fit, labelled: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """The base has no head: it is saved with the adapters, which are merged into both."""
    fit("--trainer.max_steps=1", "--run.name=lm", "--model.config.tie_weights=true")
    flags = ["--model.init_from=runs/lm", "--model.lora.rank=4", "--model.lr=1e-2"]
    labelled("--trainer.max_steps=30", "--run.save_every_n_steps=20", "--run.keep_last=-1", *flags)
    whole = read_checkpoint(checkpoint_path(RUN, 30))["state_dict"]
    assert {name for name in whole if ".lora." not in name} == {"model.out_head.weight", "model.out_head.bias"}
    accuracy = losses(RUN, "val/accuracy")[30]
    assert accuracy > 0.6
    checkpoint_path(RUN, 30).unlink()
    labelled("--trainer.max_steps=30", "--ckpt_path=last", "--model.lora.rank=4", "--model.lr=1e-2")
    again = read_checkpoint(checkpoint_path(RUN, 30))["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    capsys.readouterr()
    main(["classify", f"--checkpoint={RUN}", "--text=trees and rivers"])
    assert capsys.readouterr().out.startswith("nature\t")


def test_which_weights_keep_their_head(fit: Fit, labelled: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """A language model's is dropped, also a tied one; a classifier's is kept for the same labels."""
    fit("--trainer.max_steps=1", "--run.name=lm", "--model.config.tie_weights=true")
    labelled(
        "--trainer.max_steps=1",
        "--run.name=a",
        "--model.init_from=runs/lm",
        "--model.lr=0",
        "--model.min_lr=0",
        "--model.initial_lr=0",
    )
    zero = ["--trainer.max_steps=1", "--model.lr=0", "--model.min_lr=0", "--model.initial_lr=0"]
    labelled(*zero, "--run.name=b", "--model.init_from=runs/a", "--seed_everything=7")
    assert "its head is dropped" not in capsys.readouterr().err
    text = Path("texts.tsv").read_text()
    Path("texts.tsv").write_text(text.replace("style\t", "form\t"))
    labelled(*zero, "--run.name=c", "--model.init_from=runs/a", "--seed_everything=7")
    assert "its head is dropped, it is for the labels learning, nature, style" in capsys.readouterr().err
    lm, a, b, c = (read_weights(f"runs/{name}").state for name in ("lm", "a", "b", "c"))
    for name, value in lm.items():
        for other in (a, b, c):
            assert torch.equal(value, other[name]) or "out_head" in name, name
    assert torch.equal(a["out_head.weight"], b["out_head.weight"])
    assert not torch.equal(a["out_head.weight"], c["out_head.weight"])


# --- exports --------------------------------------------------------------------------------------------------------


def test_a_classifier_is_exported_to_the_books_format(labelled: Fit) -> None:
    """It has no names of labels."""
    labelled("--trainer.max_steps=1", "--model.config.emb_dim=64", "--model.config.n_heads=1")
    main(["export", f"--checkpoint={RUN}", "--out=out", "--to=book"])
    main(["import", "out/model.pth", "--out=back.ckpt"])
    back, first = read_weights("back.ckpt"), read_weights(RUN)
    assert (back.classes.names, first.classes.names) == (["0", "1", "2"], list(THEMES))
    assert all(torch.equal(back.state[name], value) for name, value in first.state.items())


def test_transformers_has_no_such_classifier(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no classifier with a bias: export this one with --to book"):
        save_pretrained(GPTModel(SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], run: Callable[..., None], *args: Any) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*args)
    assert exit_.value.code in (1, 2)
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.count("Traceback") == 0
    return line


def test_a_model_for_another_task_is_refused(fit: Fit, labelled: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=1", "--run.name=lm")
    labelled("--trainer.max_steps=1", "--run.name=c")
    for command in (["generate", "--prompt=x"], ["chat"], ["evaluate", "--data=texts.tsv"]):
        line = refused(capsys, main, [command[0], "--checkpoint=runs/c", *command[1:]])
        assert "is a classifier (of learning, nature, style), not a language model: use `gptlit classify`" in line
    line = refused(capsys, main, ["classify", "--checkpoint=runs/lm", "--text=x"])
    assert "is a language model, not a classifier: train one with configs/classify.yaml" in line
    line = refused(capsys, fit, "--trainer.max_steps=1", "--model.init_from=runs/c")
    assert "model.config.n_classes is 3, but data.source" in line
    assert "has no labels" in line
    line = refused(capsys, fit, "--trainer.max_steps=2", "--ckpt_path=runs/c/version_0")
    assert "has no labels" in line
    line = refused(capsys, labelled, "--trainer.max_steps=1", "--model.config.n_classes=2")
    assert "model.config.n_classes is 2, but data.source 'texts.tsv' has 3 labels" in line
    line = refused(capsys, labelled, "--trainer.max_steps=1", "--model.config.tie_weights=true")
    assert "model.config.tie_weights must be false: data.source 'texts.tsv' has 3 labels" in line
    text = Path("texts.tsv").read_text()
    Path("texts.tsv").write_text(text.replace("style\t", "form\t"))
    line = refused(capsys, lambda: labelled("--ckpt_path=runs/c/version_0", command="test"))
    assert "the labels are" in line
    assert not Path("runs/t").exists()  # nothing is written
    line = refused(capsys, labelled, "--trainer.max_steps=2", "--ckpt_path=runs/lm/version_0")
    assert "model.config.n_classes is 3, but the checkpoint was trained with 0" in line


def test_texts_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(SMALL, vocab_size=50257)
    save_checkpoint(PretrainedWeights(tmp_path, config, GPTModel(config).state_dict()), tmp_path / "c.ckpt")
    classify = ["classify", f"--checkpoint={tmp_path}/c.ckpt"]
    assert "give either --text TEXT or --file FILE" in refused(capsys, main, classify)
    assert "text 2 is empty" in refused(capsys, main, [*classify, "--text=x", "--text= "])
    assert "--pad_to 9 is not between 1 and the context of 8" in refused(
        capsys, main, [*classify, "--text=x", "--pad_to=9"]
    )
    Path("none.txt").write_text("\n\n")
    assert "--file none.txt has no text" in refused(capsys, main, [*classify, "--file=none.txt"])
