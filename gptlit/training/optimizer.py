"""The optimizers: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

OptimizerName = Literal["adamw", "muon"]


def make_optimizer(
    model: nn.Module,
    name: OptimizerName,
    *,
    lr: float,
    weight_decay: float,
    decay_all: bool,
    betas: tuple[float, float],
    fused: bool = True,
) -> Optimizer:
    """Build the optimizer of a GPTModel.

    Its groups are always the same, so that weight decay may change on a resume: matrices, the rest, and with "muon"
    first the matrices inside the blocks. Source: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon).

    Args:
        model: The model; a tied head counts once.
        name: Which one.
        lr: Learning rate. Muon's updates are scaled to the size of AdamW's, so one rate serves both.
        weight_decay: Of matrices.
        decay_all: Decay everything else too.
        betas: AdamW's.
        fused: Whether AdamW runs as one kernel.
    """
    hidden = {id(p) for n, p in model.named_parameters() if name == "muon" and "trf_blocks" in n and p.dim() >= 2}
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2 and id(p) not in hidden]},
        {"params": [p for p in parameters if p.dim() < 2]},
    ]
    if name == "adamw":
        optimizer: Optimizer = AdamW(groups, lr=lr, fused=fused)
    else:
        optimizer = MuonAdamW([p for p in parameters if id(p) in hidden], groups, lr=lr, fused=fused)
    set_values(optimizer, weight_decay=weight_decay, decay_all=decay_all, betas=betas)
    return optimizer


def set_values(optimizer: Optimizer, *, weight_decay: float, decay_all: bool, betas: tuple[float, float]) -> None:
    """Set what `make_optimizer` was given: after a resume the configuration holds, not the checkpoint."""
    *matrices, rest = optimizer.param_groups
    for group in matrices:
        group["weight_decay"] = weight_decay
    rest["weight_decay"] = weight_decay if decay_all else 0.0
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = betas


class MuonAdamW(Optimizer):
    """torch's Muon and AdamW behind one interface: the first group is Muon's, the others are AdamW's.

    Groups and state live here, so that saving and loading is torch's own.
    """

    def __init__(self, hidden: list[nn.Parameter], groups: list[dict[str, Any]], lr: float, fused: bool) -> None:
        self._muon = Muon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(groups, lr=lr, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step with both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        for part in (self._muon, self._adamw):
            part.state = self.state
            part.step()  # type: ignore[no-untyped-call,unused-ignore]
        return loss


ScheduleName = Literal["cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate: a linear warm-up from `initial` to `peak`, then half a cosine down to `minimum`.

    Source: Raschka, appendix D; Loshchilov and Hutter 2017, "SGDR" (cosine).
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
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
