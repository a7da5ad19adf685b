"""Adapters: the book's counts, and that adapters merged into the weights equal adapters applied."""

import math

import pytest
import torch
from llms_from_scratch.appendix_e import LoRALayer
from torch import nn

from gptlit.config import PRESETS, GPTConfig
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import Adapter, LoRAConfig, LoRALinear, add_adapters, build_model, merged, merged_weight
from gptlit.model.loss import linear_cross_entropy, next_token_loss

SMALL = GPTConfig(vocab_size=61, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
IDS = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))


def trained(config: GPTConfig, lora: LoRAConfig) -> GPTModel:
    """A model whose adapters are not zero any more."""
    torch.manual_seed(0)
    model = build_model(config, lora).eval()
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        nn.init.normal_(adapter.B, std=0.1)
    return model


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("preset", "n_classes", "count"), [("small", 2, 2_666_528), ("medium", 0, 7_898_384)])
def test_the_books_numbers_of_trainable_parameters(preset: str, n_classes: int, count: int) -> None:
    with torch.device("meta"):
        model = GPTModel(PRESETS[f"gpt2-{preset}"])
        if n_classes:
            model.out_head = nn.Linear(768, n_classes)
        add_adapters(model, LoRAConfig(rank=16, alpha=16))
    assert trainable(model) == count


def test_an_adapter_is_the_books() -> None:
    torch.manual_seed(0)
    ours = Adapter(6, 5, LoRAConfig(rank=4, alpha=8))
    torch.manual_seed(0)
    theirs = LoRALayer(6, 5, rank=4, alpha=8 / 4)  # it multiplies by alpha
    assert torch.equal(ours.A, theirs.A)
    assert torch.equal(ours.B, theirs.B)
    for adapter in (ours, theirs):
        nn.init.constant_(adapter.B, 0.5)
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("targets", [None, ["att.qkv"], ["ff", "out_head"]], ids=str)
@pytest.mark.parametrize("tie_weights", [False, True])
def test_merged_adapters_equal_applied_ones(tie_weights: bool, targets: list[str] | None) -> None:
    config = GPTConfig(**{**vars(SMALL), "tie_weights": tie_weights})
    model = trained(config, LoRAConfig(rank=3, alpha=5, targets=targets))
    merged_config, state = merged(model)
    plain = GPTModel(merged_config).eval()
    plain.load_state_dict(state)
    assert merged_config.tie_weights == (tie_weights and targets == ["att.qkv"])
    assert torch.equal(plain.tok_emb.weight, model.tok_emb.weight)
    assert not torch.allclose(model(IDS), base_of(model)(IDS), atol=1e-2)
    torch.testing.assert_close(plain(IDS), model(IDS), atol=1e-5, rtol=0)


def base_of(model: GPTModel) -> GPTModel:
    """The model without its adapters."""
    plain = GPTModel(model.config).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".lora." not in name})
    return plain


def test_new_adapters_change_nothing() -> None:
    torch.manual_seed(0)
    model = build_model(SMALL, LoRAConfig(rank=4))
    torch.manual_seed(0)
    assert torch.equal(model(IDS), GPTModel(SMALL)(IDS))  # nor do they take numbers before the weights


@pytest.mark.parametrize("tie_weights", [False, True])
def test_the_fused_loss_trains_the_adapters_of_the_head(tie_weights: bool) -> None:
    model = trained(GPTConfig(**{**vars(SMALL), "tie_weights": tie_weights}), LoRAConfig(rank=3, alpha=5))
    targets = IDS.roll(-1, dims=1)
    linear_cross_entropy(model.hidden(IDS), merged_weight(model.out_head), targets).backward()
    fused = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    next_token_loss(model(IDS), targets).backward()
    assert {"out_head.lora.0.A", "trf_blocks.1.att.qkv.lora.2.B"} < fused.keys()
    assert all(".lora." in name for name in fused)
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


def test_names_of_the_base_stay() -> None:
    assert GPTModel(SMALL).state_dict().keys() < build_model(SMALL, LoRAConfig(rank=4)).state_dict().keys()


def test_targets_select_layers() -> None:
    model = build_model(SMALL, LoRAConfig(rank=4, targets=["att.out_proj", "ff.2"]))
    found = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert found == {f"trf_blocks.{block}.{layer}" for block in range(2) for layer in ("att.out_proj", "ff.2")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, r"model\.lora\.rank must be at least 0"),
        ({"rank": 4, "alpha": 0.0}, r"model\.lora\.alpha must be a positive number, got 0"),
        ({"rank": 4, "alpha": math.inf}, r"model\.lora\.alpha must be a positive number, got inf"),
        ({"rank": 4, "targets": []}, r"model\.lora\.targets is empty"),
        ({"rank": 17}, r"model\.lora\.rank 17 is larger than trf_blocks\.0\.att\.qkv, which has 16 inputs"),
        (
            {"rank": 4, "targets": ["att.qkv", "mlp"]},
            r"model\.lora\.targets: no linear layer is named 'mlp', choose from att.out_proj, att.qkv, ff.0, ff.2, out",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(SMALL, LoRAConfig(**values))  # type: ignore[arg-type]
