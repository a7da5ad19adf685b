"""Conversions between full and sharded tensors (DTensor)."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, which every device holds, as `like` is; return it unchanged if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return full
    full = full.detach().to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # None: no communication


def local(value: Tensor) -> Tensor:
    """Return this device's shard of a tensor; the tensor itself if it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(value: Any) -> Any:
    """Return the full tensor of a sharded one, on every device; anything else unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value
