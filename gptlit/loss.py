"""The next-token loss."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


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
