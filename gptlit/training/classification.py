"""Classification: which part of a model is trained, and a confusion matrix."""

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from gptlit.config import GPTConfig
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig

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
    """Freeze all but the head, as many of the last blocks, and the norm between them; or nothing for "all"."""
    blocks = BLOCKS.get(trainable, trainable)
    if isinstance(blocks, int):
        trained = [model.out_head, *([model.final_norm, *list(model.trf_blocks)[-blocks:]] if blocks else [])]
        model.requires_grad_(False)
        for module in trained:
            module.requires_grad_()


def log_confusion(trainer: pl.Trainer, name: str, matrix: Tensor) -> None:
    """Write the confusion matrix (K, K) of "val" or "test", true labels in rows, to TensorBoard's text tab."""
    labels = getattr(getattr(trainer, "datamodule", None), "labels", range(len(matrix)))
    table = [["true, predicted", *labels], ["---"] * (len(labels) + 1)]
    table += [[label, *counts] for label, counts in zip(labels, matrix.tolist(), strict=True)]
    text = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"{name}/confusion", text, trainer.global_step)
