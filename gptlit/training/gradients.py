"""What happens to the gradient between backward and the optimizer step: clipping, and skipping of non-finite steps."""

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gptlit.training.distributed import gradient_norm


def clip_gradients(optimizer: Optimizer, limit: float | None, algorithm: str | None) -> Tensor:
    """Clip by norm or value as `trainer.gradient_clip_val` says (None or 0: not); return the norm before clipping.

    A fused AdamW scales the gradient in its own kernel, which saves a pass over it.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = gradient_norm(parameters)
    if limit and algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    elif limit and _supports_fused_unscale(optimizer):
        optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)  # type: ignore[attr-defined]
    elif limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


class NonFiniteGuard:
    """Skips optimizer steps whose gradient is not finite, and counts them on the device.

    Not needed with 16-mixed precision, whose gradient scaler does the same.
    """

    def __init__(self) -> None:
        self.before = 0  # steps skipped before this fit
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Start counting on the device of a fit."""
        self._skipped, self._in_a_row = torch.zeros((), device=device), torch.zeros((), device=device)

    def check(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Make the next `optimizer.step()` leave weights and state unchanged if the gradient's norm is not finite.

        The fused AdamW is told so on the device, without a synchronization; the others lose their gradients.
        """
        found = (~norm.isfinite()).float()
        self._skipped += found
        self._in_a_row = (self._in_a_row + 1) * found
        if _supports_fused_unscale(optimizer):
            optimizer.found_inf = found  # type: ignore[attr-defined]
        elif found.item():
            optimizer.zero_grad(set_to_none=True)

    @property
    def total(self) -> int:
        """Steps skipped since the run began. Synchronizes."""
        return self.before + int(self._skipped.item())

    @property
    def in_a_row(self) -> int:
        """Steps skipped since the last finite one. Synchronizes."""
        return int(self._in_a_row.item())


def _supports_fused_unscale(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel takes `grad_scale` and `found_inf`, as a gradient scaler sets them.

    A Mac's GPU (MPS) has a fused kernel that ignores both.
    """
    devices = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    return isinstance(optimizer, AdamW) and bool(optimizer.defaults.get("fused")) and "mps" not in devices
