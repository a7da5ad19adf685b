"""The next-token loss: from logits, and fused with the head without ever holding all logits. Labels of texts."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 64  # the vocabulary is padded to a multiple of it: matmul kernels are fastest on aligned rows
ROWS = {"cpu": 1024, "cuda": 8192}  # of logits that exist at once
CACHED_ROWS = 16  # of these, as many as a CPU's cache holds during the softmax

Reduction = Literal["mean", "sum"]


def next_token_loss(logits: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return the cross-entropy in nats, as a mean over tokens or as a sum; targets of -100 are ignored.

    Args:
        logits: (B, T, V).
        targets: int64 (B, T), the inputs shifted by one; or labels.
        reduction: "mean" or "sum" over the B * T losses.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # as autocast does: a mean of thousands of losses needs the digits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def at_labels(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states (B, 1, C) of (B, T, C) that predict the labels of texts, and the labels (B, 1).

    Args:
        hidden: (B, T, C).
        targets: int64 (B, T), -100 everywhere but for one label in a row; none in a row of padding.
    """
    position = targets.argmax(dim=1, keepdim=True)  # (B, 1)
    return hidden.take_along_dim(position[..., None], dim=1), targets.gather(1, position)


def softmax_(logits: Tensor, scale: Tensor) -> Tensor:
    """Replace logits (R, V) by softmax(logits) * scale (R, 1); return their logsumexp (R, 1)."""
    values = logits.to(_accumulation_dtype(logits.dtype))
    log_sum = values.logsumexp(-1, keepdim=True)
    logits.copy_((values - log_sum).exp() * scale)
    return log_sum


def chunked_softmax_(logits: Tensor, scale: Tensor) -> Tensor:
    """As `softmax_`; on a CPU a few rows at a time, so that intermediate values stay in the cache."""
    if logits.device.type != "cpu":
        return softmax_(logits, scale)
    chunks = zip(logits.split(CACHED_ROWS), scale.split(CACHED_ROWS), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([softmax_(*chunk) for chunk in chunks])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    softmax: Callable[[Tensor, Tensor], Tensor] = chunked_softmax_,
) -> Tensor:
    """Return `next_token_loss(hidden @ weight.T, targets)` in a fraction of its memory, and faster.

    Logits are computed for some rows at a time and overwritten by their gradient; backward only scales it. Matrix
    products use autocast's dtype if it is on; losses and the softmax are float32.

    Args:
        hidden: (B, T, C).
        weight: (V, C), the head's.
        targets: int64 (B, T); -100 is ignored.
        reduction: "mean" or "sum" over the B * T losses.
        softmax: `softmax_` or an equivalent, for example compiled.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    is_target = (targets >= 0).flatten()  # (B * T,)
    scale = is_target.to(_accumulation_dtype(dtype))  # the mean is taken at the end: gradients in fp16 would underflow
    needs_grad = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    arguments = hidden.flatten(0, 1), weight, targets.flatten(), scale[:, None], dtype, softmax, needs_grad
    total: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return total / is_target.sum() if reduction == "mean" else total


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses of (N, C) hidden states under a (V, C) head; forward computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, *options: Any) -> Tensor:
        dtype, softmax, needs_grad = options
        with torch.autocast(hidden.device.type, enabled=False):
            states, head = hidden.to(dtype), padded_head(weight, dtype)
            rows = min(len(states), ROWS.get(hidden.device.type, 1024))
            buffer = states.new_empty(rows, len(head))  # of logits
            grad_hidden = torch.empty_like(states) if needs_grad[0] else None
            grad_weight: Tensor | None = None
            loss = scale.new_zeros(())
            for start in range(0, len(states), rows):
                chunk = slice(start, start + rows)
                logits = buffer[: len(states[chunk])]
                torch.mm(states[chunk], head.t(), out=logits)
                logits[:, len(weight) :] = -torch.inf
                loss += _replace_by_gradient(logits, targets[chunk], scale[chunk], softmax)
                if grad_hidden is not None:
                    torch.mm(logits, head, out=grad_hidden[chunk])
                if needs_grad[1]:
                    grad_weight = accumulate_product(grad_weight, logits.t(), states[chunk])
        if grad_weight is not None:
            grad_weight = grad_weight[: len(weight)]
        ctx.grads = (grad_hidden, hidden.dtype), (grad_weight, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # which makes a second backward fail
        scaled = [None if grad is None else grad.to(dtype).mul_(grad_output) for grad, dtype in grads]
        return *scaled, None, None, None, None, None


def _replace_by_gradient(logits: Tensor, targets: Tensor, scale: Tensor, softmax: Any) -> Tensor:
    """Replace logits (R, V) by the gradient of their losses, (softmax - one_hot) * scale; return the losses' sum."""
    target = targets.clamp(min=0)[:, None]  # (R, 1); those of -100 have scale 0
    target_logits = logits.gather(1, target).to(scale.dtype)
    log_sum = softmax(logits, scale)
    logits.scatter_(1, target, (((target_logits - log_sum).exp() - 1) * scale).to(logits.dtype))
    loss: Tensor = ((log_sum - target_logits) * scale).sum()
    return loss


def padded_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head's (V, C) weight in `dtype`, padded with zeros to a multiple of `ALIGNMENT` rows."""
    rows = -(-len(weight) // ALIGNMENT) * ALIGNMENT
    head = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    head[: len(weight)] = weight
    head[len(weight) :] = 0
    return head


def accumulate_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return `total + left @ right` (`total` may be None, and is overwritten), in float32: fp16 would overflow.

    CUDA kernels accumulate in float32 themselves. Elsewhere the product is rounded to its dtype first, and keeps it if
    it is the only one.
    """
    dtype = _accumulation_dtype(left.dtype)
    if left.device.type == "cuda" and left.dtype != dtype:
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    product = left @ right
    return product if total is None else total.to(dtype).add_(product)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
