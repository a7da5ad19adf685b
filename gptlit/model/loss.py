"""The next-token loss: plain from logits, and fused with the head, which never holds all logits."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 64  # the vocabulary is padded to a multiple of it: matmul kernels are fastest on aligned rows


ROWS = {"cpu": 1024, "cuda": 8192}  # of logits that exist at once


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


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def softmax_(logits: Tensor, scale: Tensor) -> Tensor:
    """Replace logits (R, V) by their softmax times `scale` (R, 1); return the logarithm of its denominator (R, 1)."""
    values = logits.to(_accumulation_dtype(logits.dtype))
    log_sum = values.logsumexp(-1, keepdim=True)
    logits.copy_((values - log_sum).exp() * scale)
    return log_sum


def chunked_softmax_(logits: Tensor, scale: Tensor) -> Tensor:
    """As `softmax_`; on a CPU a few rows at a time, so that intermediate values stay in the cache."""
    if logits.device.type != "cpu":
        return softmax_(logits, scale)
    parts = zip(logits.split(CACHED_ROWS), scale.split(CACHED_ROWS), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([softmax_(*part) for part in parts])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    softmax: Callable[[Tensor, Tensor], Tensor] = chunked_softmax_,
) -> Tensor:
    """Return `next_token_loss(hidden @ weight.T, targets)` in a fraction of its memory, and faster.

    Logits are computed for some rows at a time and overwritten by their gradient at once; backward only scales it.
    Matrix products use autocast's dtype where it is on; losses and the softmax are float32.

    Args:
        hidden: (B, T, C).
        weight: (V, C), the head's.
        targets: int64 (B, T); -100 is left out.
        reduction: What becomes of the B * T losses.
        softmax: As `softmax_`; perhaps compiled.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    kept = (targets >= 0).flatten()
    scale = kept.to(_accumulation_dtype(dtype))  # divided by their number at the end: fp16 would underflow
    wants = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    arguments = hidden.flatten(0, 1), weight, targets.flatten(), scale[:, None], dtype, softmax, wants
    total: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return total / kept.sum() if reduction == "mean" else total


def padded_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head's (V, C) weight in `dtype`, with zeros below to a multiple of `ALIGNMENT` rows."""
    rows = -(-len(weight) // ALIGNMENT) * ALIGNMENT
    head = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    head[: len(weight)] = weight
    head[len(weight) :] = 0
    return head


def accumulate_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return `total + left @ right` (`total` may be None) with the sum in float32, which fp16 would overflow.

    CUDA's kernels add in float32 themselves; elsewhere the product is rounded to its dtype first, and stays in it
    where it is the only one.
    """
    dtype = _accumulation_dtype(left.dtype)
    if left.device.type == "cuda" and left.dtype != dtype:
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype)
    product = left @ right
    return product if total is None else total.to(dtype).add_(product)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of (N, C) hidden states under a (V, C) head; forward computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, dtype: Any, softmax: Any, wants: Any
    ) -> Tensor:
        wants_hidden, wants_weight = wants
        with torch.autocast(hidden.device.type, enabled=False):
            states, head = hidden.to(dtype), padded_head(weight, dtype)
            rows = min(len(states), ROWS.get(hidden.device.type, 1024))
            buffer = states.new_empty(rows, len(head))
            hidden_grad = torch.empty_like(states) if wants_hidden else None
            weight_grad: Tensor | None = None
            loss = scale.new_zeros(())
            for first in range(0, len(states), rows):
                part = slice(first, first + rows)
                logits = buffer[: len(states[part])]
                torch.mm(states[part], head.t(), out=logits)
                logits[:, len(weight) :] = -torch.inf
                target = targets[part].clamp(min=0)[:, None]
                picked = logits.gather(1, target).to(scale.dtype)
                log_sum = softmax(logits, scale[part])
                loss += ((log_sum - picked) * scale[part]).sum()
                logits.scatter_(1, target, (((picked - log_sum).exp() - 1) * scale[part]).to(dtype))
                if hidden_grad is not None:
                    torch.mm(logits, head, out=hidden_grad[part])
                if wants_weight:
                    weight_grad = accumulate_product(weight_grad, logits.t(), states[part])
        if weight_grad is not None:
            weight_grad = weight_grad[: len(weight)]
        ctx.grads = (hidden_grad, hidden.dtype), (weight_grad, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy frees its gradients in the first backward: there is no second")
        grads, ctx.grads = ctx.grads, None
        scaled = [None if grad is None else grad.to(dtype).mul_(gradient) for grad, dtype in grads]
        return *scaled, None, None, None, None, None
