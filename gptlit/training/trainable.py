"""What is trained of a model, if not all: its last blocks, its head, or adapters."""

from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import nn

from gptlit.checkpoint.formats import PREFIX, PretrainedWeights
from gptlit.checkpoint.pretrained import check_compatible
from gptlit.config import GPTConfig
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig, build_model

Trainable = Literal["all", "last_block", "head"] | int
BLOCKS: dict[Trainable, int] = {"last_block": 1, "head": 0}


def check_trainable(trainable: Trainable, config: GPTConfig, lora: LoRAConfig) -> None:
    """Check that a model has this part.

    Raises:
        ValueError: It has not, or the part contains the token embedding, or adapters are trained.
    """
    blocks = BLOCKS.get(trainable, trainable)
    if trainable != "all" and not (isinstance(blocks, int) and 0 <= blocks <= config.n_layers):
        known = f"all, last_block, head, or a number of blocks up to {config.n_layers}"
        raise ValueError(f"model.trainable must be {known}, got {trainable!r}")
    if trainable != "all" and lora.rank:
        raise ValueError(f"model.trainable {trainable} and model.lora.rank {lora.rank} exclude each other: choose one")
    if trainable != "all" and config.tie_weights:
        raise ValueError(f"model.trainable {trainable} needs model.config.tie_weights false: it trains the head")


def freeze(model: GPTModel, trainable: Trainable) -> None:
    """Freeze what `trainable` does not name; "all" freezes nothing."""
    blocks = BLOCKS.get(trainable, trainable)
    if isinstance(blocks, int):
        trained = [model.out_head, *([model.final_norm, *list(model.trf_blocks)[-blocks:]] if blocks else [])]
        model.requires_grad_(False)
        for module in trained:
            module.requires_grad_()


def check_lora(lora: LoRAConfig, config: GPTConfig, init_from: str | None) -> None:
    """Check that there are weights to adapt, with layers for these adapters."""
    if lora.rank and init_from is None:
        raise ValueError(f"model.lora.rank is {lora.rank}, but there are no weights to adapt: set model.init_from")
    if lora.rank:
        with torch.device("meta"):
            build_model(config, lora)


def exclude_base(module: nn.Module, model: GPTModel, base: PretrainedWeights) -> None:
    """Leave the base of adapters, which is in `module.model`, out of the module's state dict, saved or loaded:
    a checkpoint names it instead.
    """
    own, theirs = model.state_dict(), check_compatible(asdict(model.config), base).state
    names = tuple(PREFIX + name for name, value in theirs.items() if value.shape == own[name].shape)

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in names:
            del state[prefix + name]

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(names)]

    module.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]
