"""GPTModule: the schedule, the optimizer's groups, and a checkpoint that loads without running code."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from gptlit import GPTConfig, GPTModule
from gptlit.errors import InputError
from gptlit.training.optimizer import Schedule

TINY = GPTConfig(vocab_size=61, context_length=8, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)


def batches(count: int) -> torch.utils.data.DataLoader[tuple[torch.Tensor, ...]]:
    ids = torch.randint(0, TINY.vocab_size, (count, 2, 9), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids[..., :-1], ids[..., 1:]), batch_size=None)


def trainer(**options: object) -> pl.Trainer:
    defaults = {"max_steps": 5, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**defaults, **options})  # type: ignore[arg-type]


def test_the_schedule_is_the_books() -> None:
    schedule = Schedule("cosine", initial=1e-5, peak=1e-3, minimum=1e-5, warmup_steps=27)
    assert [schedule.at(step, 135) for step in (0, 27, 81)] == pytest.approx([1e-5, 1e-3, 5.05e-4])
    assert schedule.at(135, 135) == pytest.approx(1e-5)
    constant = Schedule("constant", initial=0.0, peak=4e-4, minimum=0.0, warmup_steps=2)
    assert [constant.at(step, 10) for step in (0, 1, 2, 9)] == pytest.approx([0, 2e-4, 4e-4, 4e-4])


def test_wsd_decays_over_the_last_fifth() -> None:
    schedule = Schedule("wsd", initial=0.0, peak=1.0, minimum=0.1, warmup_steps=10)
    found = [schedule.at(step, 60) for step in (5, 10, 49, 50, 55, 59, 60, 99)]
    assert found == pytest.approx([0.5, 1, 1, 1, 0.55, 0.19, 0.1, 0.1])
    assert Schedule("wsd", 0.0, 1.0, 0.1, warmup_steps=90).at(60, 60) == pytest.approx(60 / 90)


@pytest.mark.parametrize("decay_all", [False, True])
def test_only_matrices_decay(decay_all: bool) -> None:
    module = GPTModule(TINY, weight_decay=0.3, decay_all=decay_all)
    module.configure_model()
    names = {id(p): name for name, p in module.model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in module.configure_optimizers().param_groups for p in g["params"]}
    assert len(decay) == len(names)
    for name, value in decay.items():
        is_matrix = "norm" not in name and not name.endswith("bias")
        assert value == (0.3 if is_matrix or decay_all else 0.0), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_overfitted(optimizer: Any) -> None:
    torch.manual_seed(0)
    module = GPTModule(TINY, lr=1e-2, schedule="constant", optimizer=optimizer)
    loader = batches(1)
    long = torch.utils.data.DataLoader([next(iter(loader))] * 120, batch_size=None)  # type: ignore[arg-type]
    fitter = trainer(max_steps=120, log_every_n_steps=120)
    fitter.fit(module, long)
    assert fitter.callback_metrics["train/loss"] < 0.05


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_logged_loss_is_the_mean_of_the_global_batch(accumulation: int) -> None:
    torch.manual_seed(0)
    module = GPTModule(TINY)
    module.configure_model()
    with torch.no_grad():
        expected = [
            torch.nn.functional.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
            for inputs, targets in batches(accumulation)
        ]
    fitter = trainer(max_steps=1, log_every_n_steps=1, accumulate_grad_batches=accumulation)
    fitter.fit(module, batches(accumulation))
    torch.testing.assert_close(fitter.callback_metrics["train/loss"], torch.stack(expected).mean())
    assert fitter.callback_metrics["train/tokens"] == accumulation * 2 * 8


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_honoured_and_the_norm_logged_is_from_before(algorithm: str) -> None:
    torch.manual_seed(0)
    seen = {}

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            def look(*_: object) -> None:
                grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
                seen["norm"] = torch.nn.utils.get_total_norm(grads).item()
                seen["largest"] = max(float(g.abs().max()) for g in grads)

            trainer.optimizers[0].register_step_post_hook(look)

    fitter = trainer(
        log_every_n_steps=1,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
        callbacks=[Watch()],
    )
    fitter.fit(GPTModule(TINY), batches(5))
    assert fitter.callback_metrics["train/grad_norm"] > 0.1
    assert seen["norm" if algorithm == "norm" else "largest"] == pytest.approx(1e-3, rel=1e-2)


def test_gradients_are_zeroed_right_after_the_step() -> None:
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
            seen.append(all(p.grad is None for p in pl_module.parameters()))

    trainer(max_steps=2, accumulate_grad_batches=2, callbacks=[Watch()]).fit(GPTModule(TINY), batches(4))
    assert seen == [False, True, False, True]


def test_a_plain_loader_resumes_in_the_epoch_that_follows(tmp_path: Path) -> None:
    first = trainer(max_epochs=1, max_steps=-1)
    first.fit(GPTModule(TINY), batches(5))
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(max_epochs=2, max_steps=-1)
    second.fit(GPTModule(TINY), batches(5), ckpt_path=tmp_path / "a.ckpt")
    assert (second.global_step, second.current_epoch) == (10, 2)


def test_the_schedule_knows_the_end_of_a_run_in_epochs() -> None:
    module = GPTModule(TINY, lr=1e-2, min_lr=0.0)
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, *_: object) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])  # of the step before

    trainer(max_steps=-1, max_epochs=2, callbacks=[Watch()]).fit(module, batches(5))
    assert min(seen) == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 0.8)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": -1.0}, "model.lr must be a number of at least 0, got -1.0"),
        ({"min_lr": float("nan")}, "model.min_lr must be a number of at least 0, got nan"),
        ({"schedule": "linear"}, "model.schedule must be one of cosine, constant, wsd, got 'linear'"),
        ({"optimizer": "sgd"}, "model.optimizer must be one of adamw, muon, got 'sgd'"),
        ({"beta2": 1.0}, "model.beta2 must be at least 0 and below 1, got 1.0"),
        ({"warmup_steps": -2}, "model.warmup_steps must be at least 0, got -2"),
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTModule(TINY, **wrong)  # type: ignore[arg-type]


def test_a_checkpoint_is_plain_and_loads_in_python(tmp_path: Path) -> None:
    fitter = trainer()
    fitter.fit(GPTModule(TINY), batches(5))
    path = tmp_path / "a.ckpt"
    fitter.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 5
    assert checkpoint["hyper_parameters"]["config"]["emb_dim"] == 16
    module = GPTModule.load_from_checkpoint(path, weights_only=True)
    for key, value in fitter.lightning_module.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)


def test_compile_leaves_the_keys_unchanged() -> None:
    plain, compiled = GPTModule(TINY), GPTModule(TINY, compile=True)
    for module in (plain, compiled):
        module.configure_model()
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert all(block._compiled_call_impl is not None for block in compiled.model.trf_blocks)


def test_a_checkpoint_from_before_a_key_was_there_resumes(tmp_path: Path) -> None:
    fitter = trainer(max_steps=2)
    fitter.fit(GPTModule(TINY), batches(5))
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for key in ("n_classes", "init"):
        del checkpoint["hyper_parameters"]["config"][key]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    again = trainer(max_steps=3)
    again.fit(GPTModule(TINY), batches(5), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.global_step == 3


def test_another_architecture_is_not_resumed(tmp_path: Path) -> None:
    fitter = trainer()
    fitter.fit(GPTModule(TINY), batches(5))
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    other = GPTModule(GPTConfig(**{**fitter.lightning_module.hparams["config"], "n_layers": 2}))
    with pytest.raises(InputError, match=r"model\.config\.n_layers is 2, but the checkpoint was trained with 1"):
        trainer().fit(other, batches(5), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
