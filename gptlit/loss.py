"""The next-token loss: plain from logits, and with the head from hidden states, which never holds all logits."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 64  # columns: the product for the weight's gradient is up to 1.8 times as fast on rows of whole cache lines
ROWS = {"cpu": 1024, "cuda": 4096}  # of logits that exist at once
CACHED_ROWS = 16  # of these, as many as the softmax works on at once without leaving a CPU's cache


def next_token_loss(logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Cross-entropy in nats: a token's mean, or the sum. Targets of -100 are left out.

    Args:
        logits: (B, T, V).
        targets: int64 (B, T), the inputs shifted by one.
        reduction: What becomes of the B * T losses.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # as autocast does: a mean of thousands of losses needs the digits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def softmax_(logits: Tensor, scale: Tensor) -> Tensor:
    """Replace logits (R, V) by their softmax times `scale` (R, 1); return the logarithm of its denominator (R, 1)."""
    values = logits.to(_wide(logits.dtype))
    log_sum = values.logsumexp(-1, keepdim=True)
    logits.copy_((values - log_sum).exp() * scale)
    return log_sum


def softmax_by_parts_(logits: Tensor, scale: Tensor) -> Tensor:
    """As `softmax_`, a few rows at a time on a CPU: what is computed on the way stays in its cache."""
    if logits.device.type != "cpu":
        return softmax_(logits, scale)
    parts = zip(logits.split(CACHED_ROWS), scale.split(CACHED_ROWS), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([softmax_(*part) for part in parts])


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    softmax: Callable[[Tensor, Tensor], Tensor] = softmax_by_parts_,
) -> Tensor:
    """Return `next_token_loss(hidden @ weight.T, targets)` in a fraction of its memory, and faster.

    Logits are made for some rows at a time, and their gradient takes their place at once: the way back has only to
    multiply. Products are in autocast's type where it is on, losses and the softmax in float32.

    Args:
        hidden: (B, T, C).
        weight: (V, C), the head's.
        targets: int64 (B, T); -100 is left out.
        reduction: What becomes of the B * T losses.
        softmax: As `softmax_`; perhaps a compiled one.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    kept = (targets >= 0).flatten()
    scale = kept.to(_wide(dtype))  # the mean is taken at the end: divided by thousands, a gradient is nothing in fp16
    arguments = hidden.flatten(0, 1), weight, targets.flatten(), scale[:, None], dtype, softmax
    total: Tensor = _HeadLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return total / kept.sum() if reduction == "mean" else total


class _HeadLoss(torch.autograd.Function):
    """The loss of (N, C) hidden states under a (V, C) head; the gradients are made on the way there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, dtype: Any, softmax: Any
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            states, head = hidden.to(dtype), weight.to(dtype)
            rows = min(len(states), ROWS.get(hidden.device.type, 1024))
            columns = -(-len(head) // ALIGNMENT) * ALIGNMENT
            buffer = states.new_empty(rows, columns)
            buffer[:, len(head) :] = 0
            to_hidden = torch.empty_like(states) if wants_hidden else None
            to_weight: Tensor | None = None
            loss = scale.new_zeros(())
            for first in range(0, len(states), rows):
                part = slice(first, first + rows)
                padded = buffer[: len(states[part])]
                logits = padded[:, : len(head)]
                torch.mm(states[part], head.t(), out=logits)
                target = targets[part].clamp(min=0)[:, None]
                picked = logits.gather(1, target).to(scale.dtype)
                log_sum = softmax(logits, scale[part])
                loss += ((log_sum - picked) * scale[part]).sum()
                logits.scatter_(1, target, (((picked - log_sum).exp() - 1) * scale[part]).to(dtype))
                if to_hidden is not None:
                    torch.mm(logits, head, out=to_hidden[part])
                if wants_weight:
                    product = (padded.t() @ states[part])[: len(head)]
                    to_weight = product if to_weight is None else to_weight.to(scale.dtype).add_(product)
        ctx.parts = (to_hidden, hidden.dtype), (to_weight, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.parts is None:
            raise RuntimeError("head_loss gives its gradients away at the first backward: there is no second")
        parts, ctx.parts = ctx.parts, None
        found = [None if part is None else part.to(dtype).mul_(gradient) for part, dtype in parts]
        return *found, None, None, None, None
