"""Runs that train adapters: checkpoints name the frozen weights, the adapters' base, instead of storing them."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from gptlit.checkpoint.formats import PREFIX, PretrainedWeights
from gptlit.checkpoint.pretrained import check_compatible
from gptlit.config import GPTConfig
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig, build_model


def check_lora(lora: LoRAConfig, config: GPTConfig, init_from: str | None) -> None:
    """Check that there are weights to adapt, with layers for these adapters.

    Raises:
        ValueError: There are none.
    """
    if lora.rank and init_from is None:
        raise ValueError(f"model.lora.rank is {lora.rank}, but there are no weights to adapt: set model.init_from")
    if lora.rank:
        with torch.device("meta"):
            build_model(config, lora)


def exclude_base(module: nn.Module, model: GPTModel, base: PretrainedWeights) -> None:
    """Leave the base, which was copied into `module.model`, out of the module's state dict, saved or loaded."""
    own, theirs = model.state_dict(), check_compatible(asdict(model.config), base).state
    names = tuple(PREFIX + name for name, value in theirs.items() if value.shape == own[name].shape)

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in names:
            del state[prefix + name]

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(names)]

    module.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]
