"""A model in shards (FSDP2): every device holds a part of each parameter, and gathers a block when it computes it.

Plain torch; the strategy that uses it is in `strategies.py`. Source: Zhao et al. 2023, "PyTorch FSDP".
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.linalg import vector_norm

from gptlit.config import GPTConfig
from gptlit.model import GPTModel


def sharded_model(config: GPTConfig, mesh: DeviceMesh, device: torch.device) -> GPTModel:
    """Build a GPTModel in shards, with the weights that `GPTModel(config)` would draw.

    No device ever holds more than its shards and one whole layer, which is drawn on the CPU.

    Args:
        config: The architecture.
        mesh: The devices, in one dimension.
        device: This process's own.
    """
    model = shards_without_memory(config, mesh)
    model.to_empty(device=device)
    if config.tie_weights:
        model.out_head.weight = model.tok_emb.weight
    model.draw_weights(_whole)
    return model


def shards_without_memory(config: GPTConfig, mesh: DeviceMesh) -> GPTModel:
    """Build a GPTModel in shards on the meta device: shapes, but no numbers."""
    with torch.device("meta"):
        model = GPTModel(config)
    for block in model.trf_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")
    return model


@contextmanager
def _whole(layer: nn.Module) -> Iterator[None]:
    """Give a layer whole parameters while they are drawn: each device draws the same and keeps its shard."""
    shards = dict(layer.named_parameters(recurse=False))
    layer._parameters.update({name: nn.Parameter(torch.empty(shard.shape)) for name, shard in shards.items()})
    yield
    with torch.no_grad():
        for name, shard in shards.items():
            whole, layer._parameters[name] = layer._parameters[name], shard
            shard.copy_(shard_like(whole, shard))  # type: ignore[arg-type]


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


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, over the shards of all devices.

    torch's own norm adds up a large tensor in one float32 on a CPU, and is 0.3% low for GPT-2 small's embedding. Row by
    row, and the rows in float64, it is exact to the last digits at the same speed.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [local(gradient) for gradient in gradients]
    if parts[0].device.type == "cpu":
        norms = [vector_norm(vector_norm(part, dim=-1), dtype=torch.float64) for part in parts]
        total: Tensor = vector_norm(torch.stack(norms))
    else:
        total = torch.nn.utils.get_total_norm(parts)
    if isinstance(gradients[0], DTensor):
        square = total.square()
        torch.distributed.all_reduce(square, group=gradients[0].device_mesh.get_group())
        total = square.sqrt()
    return total.float()


def gathered(value: Any) -> Any:
    """Return a sharded tensor whole, on every device; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
