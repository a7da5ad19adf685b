"""`gptlit plan`, and the same summary at the start of `fit`."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, TINY, run_script
from gptlit.commands.main import main
from gptlit.config import PRESETS, GPTConfig
from gptlit.data.datamodule import TokenDataModule
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig
from gptlit.training.estimate import (
    RunSpec,
    count_parameters,
    datasheet_peak,
    describe,
    flops_per_token,
    make_plan,
    usual_lr,
    warnings,
)
from gptlit.training.lightning_compat import has_native_bf16
from gptlit.training.measure import measure

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    main(["plan", "--json", *flags])
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_parameters_of_every_config_are_exact(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, f"--config={file}")
    import yaml

    given = yaml.safe_load(file.read_text())["model"]["config"]
    pretrained = {"qkv_bias": True, "tie_weights": True} if file.stem == "finetune" else {}
    with torch.device("meta"):
        model = GPTModel(GPTConfig(**{**pretrained, **given}))
    assert plan["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert plan["memory"]["total"] > 16 * plan["parameters"]["total"] * 0.7
    assert not list(Path().iterdir())  # nothing was written


def test_devices_and_shards_are_counted_in_each_of_their_forms(capsys: pytest.CaptureFixture[str]) -> None:
    def weights(*flags: str) -> int:
        plan = planned(capsys, f"--config={ROOT / 'configs/gpt2-124m.yaml'}", *(f"--trainer.{flag}" for flag in flags))
        return int(plan["memory"]["weights"])

    two = weights("devices=2", "strategy=fsdp2")
    assert weights("devices=0,1", "strategy=fsdp2") == two < weights("devices=2")
    assert weights("devices=2", "num_nodes=2", "strategy=hsdp") == two
    by_class = ("strategy=gptlit.training.distributed.HSDPStrategy", "strategy.shard_size=2")
    assert weights("devices=4", *by_class) == two


def test_adapters_alone_have_gradients_and_optimizer_state(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, f"--config={ROOT / 'configs/finetune.yaml'}", "--model.lora.rank=16")
    trained = 12 * (6 * 768 + 2 * 768 + 2 * (768 + 3072)) * 16 + (768 + 50257) * 16
    assert plan["checkpoint"]["bytes"] == 3 * 4 * trained
    assert plan["memory"]["optimizer"] == 2 * 4 * trained
    assert plan["parameters"]["total"] == 124_439_808  # the adapters not counted


def test_what_is_frozen_has_neither_gradients_nor_optimizer_state(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts.tsv").write_text("".join(f"{'spam' if n % 2 else 'ham'}\tword {n}\n" for n in range(40)))
    flags = [f"--config={ROOT / 'configs/classify.yaml'}", "--data.source=texts.tsv", "--model.init_from=hf:gpt2"]
    main(["plan", *flags])  # the labels are not known yet
    assert "no corpus yet" in capsys.readouterr().out
    TokenDataModule("texts.tsv", val_fraction=0.1, test_fraction=0.2, balance=True, context_length=1024).load("fit")
    plan = planned(capsys, *flags, "--model.trainable=last_block", "--model.optimizer=muon")
    head, norm, matrices, vectors = 2 * 768 + 2, 2 * 768, 12 * 768**2, 13 * 768
    assert plan["parameters"]["out_head"] == head
    assert plan["memory"]["optimizer"] == 4 * (matrices + 2 * (vectors + norm + head))
    main(["plan", *flags, "--model.trainable=head"])
    out = capsys.readouterr().out
    assert f"{head:,} of them trained: 12 layers" in out
    assert "step    8 rows = 16 tokens" in out  # two each
    assert "28 rows, 4 to validate" in out
    assert plan["memory"]["activations"] < 20e6  # with rows of 1,024 tokens, 6e9


def test_a_glob_that_is_prepared_is_counted(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--config={ROOT / 'configs/quickstart.yaml'}", *TINY, f"--data.source={text_file.parent}/*.txt"]
    assert planned(capsys, *flags)["data"]["train_tokens"] is None
    TokenDataModule(f"{text_file.parent}/*.txt", val_fraction=0.1, context_length=16).load("fit")
    assert planned(capsys, *flags)["data"]["train_tokens"] > 1000


def test_a_missing_corpus_leaves_values_open(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, f"--config={ROOT / 'configs/gpt2-124m.yaml'}", "--data.source=data/NOWHERE")
    assert plan["data"] == {
        "train_tokens": None,
        "train_windows": None,
        "val_windows": None,
        "steps_per_epoch": None,
        "epochs": None,
    }
    assert plan["step"] == {
        "windows": 512,
        "tokens": 512 * 1024,
        "devices": max(1, torch.cuda.device_count()),
        "micro_batch_size": 32,
        "accumulation": 16 // max(1, torch.cuda.device_count()),
    }
    assert plan["run"]["tokens"] == 20_000 * 512 * 1024
    assert plan["run"]["tokens_per_parameter"] == pytest.approx(84.26, abs=0.01)
    assert plan["time"]["seconds"] is None


def test_a_prepared_corpus_is_counted(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare", str(text_file), "--out", "tokens", "--val_fraction", "0.1"])
    capsys.readouterr()
    flags = [flag for flag in TINY if "run.name" not in flag]
    plan = planned(
        capsys, f"--config={ROOT / 'configs/quickstart.yaml'}", *flags, "--data.source=tokens", "--trainer.max_steps=70"
    )
    data = plan["data"]
    assert data["train_windows"] == (data["train_tokens"] - 1) // 16
    assert data["steps_per_epoch"] == -(-data["train_windows"] // 4)
    assert data["epochs"] == pytest.approx(70 * 4 / data["train_windows"])
    assert plan["warnings"] == []
    with pytest.raises(SystemExit):
        main(["plan", f"--config={ROOT / 'configs/gpt2-124m.yaml'}", "--data.source=tokens"])
    assert "the val part of 'tokens' is too short" in capsys.readouterr().err


def test_measure_gives_a_time(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(
        capsys, f"--config={ROOT / 'configs/quickstart.yaml'}", *TINY, "--measure", "--data.micro_batch_size=2"
    )
    assert plan["time"]["seconds"] == pytest.approx(800 * plan["time"]["seconds_a_step"])
    assert plan["time"]["tokens_per_second"] == pytest.approx(4 * 16 / plan["time"]["seconds_a_step"])
    assert re.match(r"20\d\d-", plan["time"]["end"])


@pytest.mark.parametrize("part", [{}, {"trainable": "head"}, {"lora": LoRAConfig(rank=2)}], ids=str)
def test_a_classifier_can_be_measured(part: dict[str, Any]) -> None:
    config = GPTConfig(vocab_size=61, context_length=8, emb_dim=16, n_heads=2, n_layers=1, n_classes=2)
    assert measure(RunSpec(config, micro_batch_size=4, batch_size=4, **part)) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", f"--config={ROOT / 'configs/gpt2-124m.yaml'}", "--measure"])
    assert exit_.value.code == 2
    assert "there is no GPU here; add --trainer.accelerator cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "a run needs an end: set trainer.max_steps"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--config", str(ROOT / "configs/quickstart.yaml"), "--model.lr=-1"], "model.lr must be a number"),
        (["--config", str(ROOT / "configs/quickstart.yaml"), "--model.learning_rate=1"], "learning_rate"),
        (["--config", str(ROOT / "configs/quickstart.yaml"), "--json=maybe"], "Option '--json' does not take a value"),
        (["--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.devices=3"], "not divisible by 3 of them"),
        (["--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.devices=0"], "must be at least 1"),
        (["--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.accelerator=tpu"], "use auto, cpu, gpu or mps"),
        (
            ["--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.accumulate_grad_batches=4"],
            "it follows from data.batch_size",
        ),
        (
            ["--config", str(ROOT / "configs/quickstart.yaml"), "--data.context_length=64"],
            "contradicts model.config.context_length 128",
        ),
        (
            ["--config", str(ROOT / "configs/quickstart.yaml"), "--model.config.vocab_size=1000"],
            "contradicts the tokenizer 'gpt2'",
        ),
        (["--config", str(ROOT / "configs/finetune.yaml"), "--model.config.n_layers=6"], "but hf:gpt2 has 12"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *flags])
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert words in lines[0]


# --- the plan itself ---------------------------------------------------------------------------------------------

SMALL = RunSpec(GPTConfig(tie_weights=True, qkv_bias=True), micro_batch_size=1, steps=1000)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tie_weights", [False, True])
def test_flops_are_those_of_the_paper(preset: str, tie_weights: bool) -> None:
    config = replace(PRESETS[preset], tie_weights=tie_weights)
    with torch.device("meta"):
        model = GPTModel(config)
    products = sum(p.numel() for p in model.trf_blocks.parameters()) + model.out_head.weight.numel()
    norm = sum(p.numel() for p in model.final_norm.parameters())
    expected = 6 * (products + norm) + 12 * config.n_layers * config.emb_dim * config.context_length
    assert flops_per_token(config, count_parameters(config)) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch_size": 10**6, "batch_size": 10**6}, "are needed and the device has"),
        ({"windows": 1000, "val_windows": 3}, "val/loss comes from 3 windows only"),
        ({"warmup_steps": 1000}, "the warm-up of 1000 steps is no shorter than the run of 1000"),
        ({"lr": 0.1}, "model.lr 0.1 is far from the usual 0.0007"),
        ({"lr": 1e-6}, "model.lr 1e-06 is far from the usual"),
        ({"saves": 10**6}, "the checkpoints need"),
    ],
)
def test_suspicious_settings_give_a_warning(changes: dict[str, Any], words: str) -> None:
    assert warnings(SMALL, make_plan(SMALL)) == []
    spec = replace(SMALL, **changes)
    found = warnings(spec, make_plan(spec))
    assert len(found) == 1
    assert words in found[0]


def test_a_small_rate_is_usual_for_trained_weights() -> None:
    spec = replace(SMALL, lr=3e-5, is_pretrained=True)
    assert warnings(spec, make_plan(spec)) == []
    assert usual_lr(10**7) > usual_lr(10**8) > usual_lr(10**10)


def test_sharding_checkpointing_and_half_precision_save_memory() -> None:
    def total(**changes: Any) -> int:
        return int(make_plan(replace(SMALL, **changes))["memory"]["total"])

    assert total(activation_checkpointing=True) < total()
    assert total(precision="bf16-mixed") < total()
    assert total(shards=8, devices=8) < total(devices=8)
    assert total(optimizer="muon") < total()
    assert total(micro_batch_size=8) > total()


def test_gradients_take_memory_only_beside_activations() -> None:
    def gradients(**changes: Any) -> int:
        return int(
            make_plan(replace(SMALL, **{"batch_size": 8, "micro_batch_size": 8, **changes}))["memory"]["gradients"]
        )

    assert gradients() == 0
    assert gradients(micro_batch_size=4) == gradients(devices=2, micro_batch_size=4) > 4 * 124e6


def test_sharded_gradients_are_unsharded_under_accumulation() -> None:
    spec = RunSpec(replace(PRESETS["gpt2-xl"], qkv_bias=True), device="cuda", devices=8, shards=8, micro_batch_size=8)
    unsharded, sharded = (make_plan(replace(spec, batch_size=size))["memory"]["gradients"] for size in (512, 64))
    total = count_parameters(spec.config)["total"]
    assert (unsharded, sharded) == (4 * total, 4 * total // 8)


def test_processes_on_cpus_share_the_memory_of_their_machine() -> None:
    def available(**changes: Any) -> int:
        return int(make_plan(replace(SMALL, **changes))["memory"]["available"])

    assert available() == available(devices=2, nodes=2) == pytest.approx(2 * available(devices=2), abs=2)


def test_precision_decides_the_size_of_a_weight() -> None:
    weights = [
        make_plan(replace(SMALL, precision=precision))["memory"]["weights"]
        for precision in ("bf16-true", "bf16-mixed", "32-true", "64-true")
    ]
    assert weights == [size * 124_439_808 for size in (2, 4, 4, 8)]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_of_activations_is_what_a_plan_says(preset: str) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    cells = re.findall(rf"^\| {preset} (?:\| [\d.]+ )+\|$", text, re.MULTILINE)[0].split("|")[-3:-1]
    config = replace(PRESETS[preset], tie_weights=True, qkv_bias=True, drop_rate=0.0)
    spec = RunSpec(config, precision="bf16-mixed", device="cuda", devices=8, compile=True, micro_batch_size=8)
    for cell, recompute in zip(cells, (False, True), strict=True):
        found = make_plan(replace(spec, activation_checkpointing=recompute))["memory"]
        assert f"{(found['activations'] + found['logits']) / 1e9:.1f}" == cell.strip()


def test_a_plan_without_a_corpus() -> None:
    expected = "data    no corpus yet: `fit` or `gptlit prepare` makes it; windows and epochs are known then"
    assert expected in describe(SMALL, make_plan(SMALL))


def test_describe_shows_every_part() -> None:
    spec = replace(SMALL, windows=1600, val_windows=80, train_tokens=1600 * 1024 + 1, batch_size=64, devices=2)
    spec = replace(spec, micro_batch_size=16)
    text = "\n".join(describe(spec, make_plan(spec)))
    for words in (
        "124,439,808 parameters: 12 layers, 12 heads, 768 wide, context 1024; 32-true on 2 x cpu",
        "step    64 windows = 65,536 tokens: 16 at once on 2 x cpu, accumulated over 2 micro-batches",
        "1,638,401 tokens, 1,600 windows, 80 to validate; an epoch is 25 steps",
        "1,000 steps, 65,536,000 tokens, 40 epochs: 0.53 a parameter (Chinchilla: 20)",
        "1.5 GB a checkpoint, at most 4.5 GB kept",
    ):
        assert words in text


UNCOMPILED = "--model.compile=false"
ON_CPU = ["--trainer.accelerator=cpu", "--data.num_workers=0"]
NATIVE_BF16 = pytest.mark.skipif(
    not has_native_bf16(torch.device("cpu")), reason="emulated bf16 takes minutes for a step of this size"
)
# Prints the plan's figure and the peak of a run of three steps, both in bytes.
PEAK = """
import json, subprocess, sys
import torch
from gptlit.training.callbacks.monitoring import memory_peak
from gptlit.training.cli import main
flags = sys.argv[1:]
command = [sys.executable, "-m", "gptlit", "plan", "--json", *flags]
plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
main(["fit", *flags, "--trainer.max_steps=3", "--run.val_every_n_steps=3"])
print(json.dumps([plan["memory"]["total"], memory_peak(torch.device("cpu"))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ("verdict", ["--trainer.max_epochs=1"]),
        pytest.param("gpt2-124m", [*ON_CPU, "--data.batch_size=2"], marks=NATIVE_BF16),
        pytest.param("gpt2-124m", [*ON_CPU, "--data.batch_size=4", UNCOMPILED], marks=NATIVE_BF16),
    ],
)
def test_memory_is_that_of_a_run(config: str, flags: list[str], text: str) -> None:
    Path("long.txt").write_text(text * 4)
    file = ROOT / "configs" / f"{config}.yaml"
    flags = [f"--config={file}", "--data.source=long.txt", "--data.val_fraction=0.2", *flags]
    done = run_script("-c", PEAK, *flags, cwd=Path())
    assert done.returncode == 0, done.stderr
    expected, peak = json.loads(done.stdout.splitlines()[-1])
    assert peak == pytest.approx(expected, rel=0.10)


def test_a_fit_begins_with_its_plan(fit: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.max_steps=2", "--trainer.enable_progress_bar=true", "--model.warmup_steps=2")
    err = capsys.readouterr().err
    assert re.search(r"memory  .* of .* on each device, about: weights", err)
    assert re.search(r"disk    .* a checkpoint, at most", err)
    assert "warning: the warm-up of 2 steps is no shorter than the run of 2" in err


@pytest.mark.parametrize(
    ("device", "tflops"), [("NVIDIA L4", 121), ("NVIDIA L40", None), ("NVIDIA RTX A1000", None), ("NVIDIA GB200", 2500)]
)
def test_a_gpu_is_known_by_its_whole_name(device: str, tflops: float | None) -> None:
    assert datasheet_peak(device, "bf16-mixed") == (None if tflops is None else tflops * 1e12)


def test_lightnings_short_names_of_a_precision_count_as_the_long_ones(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--config={ROOT / 'configs/quickstart.yaml'}", *TINY]
    short, long = (planned(capsys, *flags, f"--trainer.precision={name}")["memory"] for name in ("64", "64-true"))
    assert short == long
