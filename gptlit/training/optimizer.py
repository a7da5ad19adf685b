"""Optimizers (AdamW, Muon), one registry entry each, and the learning-rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from gptlit.model.gpt import GPTModel
from gptlit.training.muon import MuonAdamW

OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer that `model.optimizer` can name. All its parameter groups but the last one hold matrices."""

    build: Callable[[GPTModel, float, bool | None], Optimizer]  # (model, lr, fused) -> the optimizer
    block_matrix_state: int  # values of optimizer state per parameter of the blocks' matrices, for memory estimates
    other_state: int  # the same for all other parameters


def update_param_groups(
    optimizer: Optimizer, *, weight_decay: float, decay_all: bool, betas: tuple[float, float]
) -> None:
    """Set hyper-parameters of the groups, also after a resume: the configuration's hold, not the checkpoint's.

    Args:
        optimizer: One of `OPTIMIZERS`.
        weight_decay: Weight decay of matrices.
        decay_all: Apply weight decay to biases and norms too.
        betas: Betas of AdamW.
    """
    *matrices, vectors = optimizer.param_groups
    for group in matrices:
        group["weight_decay"] = weight_decay
    vectors["weight_decay"] = weight_decay if decay_all else 0.0
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = betas


def _adamw(model: GPTModel, lr: float, fused: bool | None) -> Optimizer:
    """AdamW. Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"."""
    matrices, vectors = _trainable(model)
    return AdamW([{"params": matrices}, {"params": vectors}], lr=lr, fused=fused)


def _muon(model: GPTModel, lr: float, fused: bool | None) -> Optimizer:
    """Muon for the blocks' matrices, AdamW for the rest. Source: Jordan et al. 2024, "Muon"."""
    in_blocks, _ = _trainable(model.trf_blocks)
    known = {id(p) for p in in_blocks}
    matrices, vectors = _trainable(model)
    matrices = [p for p in matrices if id(p) not in known]
    return MuonAdamW(in_blocks, [{"params": matrices}, {"params": vectors}], lr=lr, fused=fused)


def _trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices and the vectors that are not frozen."""
    found = [p for p in module.parameters() if p.requires_grad]
    return [p for p in found if p.dim() >= 2], [p for p in found if p.dim() < 2]


OPTIMIZERS: dict[OptimizerName, OptimizerEntry] = {
    "adamw": OptimizerEntry(_adamw, block_matrix_state=2, other_state=2),
    "muon": OptimizerEntry(_muon, block_matrix_state=1, other_state=2),
}


ScheduleName = Literal["cosine", "constant", "wsd"]
# (peak, minimum, progress from 0 to 1 after the warm-up) -> learning rate
SCHEDULES: dict[ScheduleName, Callable[[float, float, float], float]] = {
    "cosine": lambda peak, low, progress: low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda peak, low, progress: peak,
    "wsd": lambda peak, low, progress: low + (peak - low) * min(1.0, (1 - progress) / WSD_DECAY),
}
WSD_DECAY = 0.2  # of the steps after the warm-up


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `initial` to `peak`, then one of `SCHEDULES`, which approach `minimum`.

    Source: Raschka, appendix D; Loshchilov and Hutter 2017, "SGDR" (cosine); Hu et al. 2024, "MiniCPM" (wsd).
    """

    kind: ScheduleName
    initial: float
    peak: float
    minimum: float
    warmup_steps: int

    def at(self, step: int, max_steps: int) -> float:
        """Return the learning rate of the 0-based optimizer step out of `max_steps`."""
        if step < self.warmup_steps:
            return self.initial + step * (self.peak - self.initial) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return SCHEDULES[self.kind](self.peak, self.minimum, min(1.0, progress))
