"""Conversions between full and sharded tensors (DTensor)."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this device's shard of a whole tensor, placed as `like` is; the tensor itself where that is whole too."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.detach().to(like.device)
    everywhere = None  # every device has it, so that none needs to send it
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=everywhere)


def local(value: Tensor) -> Tensor:
    """Return this device's shard of a tensor, or the whole where it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(value: Any) -> Any:
    """Return a sharded tensor whole, on every device; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
