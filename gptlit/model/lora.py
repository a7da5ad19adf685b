"""Low-rank adapters (LoRA): trainable updates of frozen linear layers.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Raschka, appendix E.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from gptlit.config import GPTConfig
from gptlit.model.gpt import GPTModel


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers have adapters, and of what rank.

    Args:
        rank: Rank of the updates; 0 trains all weights, without adapters.
        alpha: The updates are scaled by alpha / rank; None: alpha equals rank.
        targets: Layers with adapters: att.qkv, att.out_proj, ff (or ff.0, ff.2), out_head; None: all linear layers.

    Raises:
        ValueError: A value is out of its range; the message names key, value and rule.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"model.lora.rank must be at least 0 (0: no adapters), got {self.rank}")
        if not self.rank and (self.alpha, self.targets) != (None, None):
            raise ValueError("model.lora.alpha and model.lora.targets need model.lora.rank")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"model.lora.alpha must be a positive number, got {self.alpha}")
        if self.targets == []:
            raise ValueError("model.lora.targets is empty: name a layer, or leave it out for all of them")

    @property
    def scale(self) -> float:
        """The factor of the updates."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Adapter(nn.Module):
    """The low-rank map x @ A @ B * alpha / rank: (..., I) -> (..., O); zero at first."""

    def __init__(self, in_features: int, out_features: int, lora: LoRAConfig) -> None:
        super().__init__()
        self.scale = lora.scale
        self.A = nn.Parameter(torch.empty(in_features, lora.rank))
        self.B = nn.Parameter(torch.empty(lora.rank, out_features))
        self.reset()

    def reset(self) -> None:
        """(Re)initialize as the book does."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A * self.scale) @ self.B  # (..., I) -> (..., rank) -> (..., O)


class LoRALinear(nn.Linear):
    """A linear layer plus adapters, one for each of `parts` equal parts of its output: (..., I) -> (..., O)."""

    def __init__(self, layer: nn.Linear, parts: int, lora: LoRAConfig) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        out_features = layer.out_features // parts
        self.lora = nn.ModuleList(Adapter(layer.in_features, out_features, lora) for _ in range(parts))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.cat([adapter(x) for adapter in self.lora], dim=-1)


def merged_weight(layer: nn.Linear) -> Tensor:
    """Return the weight (O, I) of a linear layer, with adapters added if it has them; gradients flow to them."""
    if not isinstance(layer, LoRALinear):
        return layer.weight
    return layer.weight + torch.cat([(part.A @ part.B).t() * part.scale for part in layer.lora])  # type: ignore[operator]


def build_model(config: GPTConfig, lora: LoRAConfig) -> GPTModel:
    """Build a GPTModel, with adapters (see `add_adapters`) if they have a rank."""
    model = GPTModel(config)
    if lora.rank:
        add_adapters(model, lora)
    return model


def add_adapters(model: GPTModel, lora: LoRAConfig) -> None:
    """Freeze a model and give its linear layers adapters, in place: three to query, key and value, else one.

    Names in the state dict stay as they are; those of adapters are `<layer>.lora.<part>.A` and `.B`.

    Raises:
        ValueError: A target is unknown, or the rank is larger than a layer.
    """
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found = {target: [name for name in layers if f".{target}." in f".{name}."] for target in lora.targets or layers}
    if unknown := [target for target, names in found.items() if not names]:
        known = sorted({re.sub(r"^trf_blocks\.\d+\.", "", name) for name in layers})
        raise ValueError(f"model.lora.targets: no linear layer is named {unknown[0]!r}, choose from {', '.join(known)}")
    for name, layer in layers.items():
        if not any(name in names for names in found.values()):
            continue
        if lora.rank > layer.in_features:
            raise ValueError(f"model.lora.rank {lora.rank} is larger than {name}, which has {layer.in_features} inputs")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(layer, 3 if child == "qkv" else 1, lora))


def reset_adapters(model: nn.Module) -> None:
    """(Re)initialize all adapters in the order of the modules, as `build_model` does."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.reset()


def merged(model: GPTModel) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the architecture and the state dict of an equal model without adapters.

    A head with an adapter is not tied to the embedding any more.
    """
    state = {name: value.detach() for name, value in model.state_dict().items() if ".lora." not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            state[f"{name}.weight"] = merged_weight(layer).detach()
    is_tied = model.config.tie_weights and not isinstance(model.out_head, LoRALinear)
    return replace(model.config, tie_weights=is_tied), state
