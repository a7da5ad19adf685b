"""Muon for the blocks' matrices and AdamW for the rest, as one optimizer; sharded matrices have one owner each."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from gptlit.model.sharding import local
from gptlit.training.lightning_compat import has_native_bf16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the iteration (Jordan et al. 2024, "Muon")
ITERATIONS = 5


class MuonAdamW(Optimizer):
    """Muon and AdamW as one optimizer: the first group is Muon's, the others are AdamW's.

    Muon's updates are scaled to the RMS of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training"), so that both
    use the same learning rate. With native bf16 it takes the steps of `torch.optim.Muon`, which has neither float32
    nor sharded matrices. Groups and state are kept here, so that saving and loading is torch's own.
    """

    def __init__(self, hidden: list[nn.Parameter], groups: list[dict[str, Any]], lr: float, fused: bool | None) -> None:
        self._adamw = AdamW(groups, lr=lr, fused=fused)
        muon = {"params": hidden, "lr": lr, "weight_decay": 0.1, "momentum": 0.95}
        super().__init__([muon, *self._adamw.param_groups], {})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, *adamw_groups = self.param_groups
        matrices = [p for p in group["params"] if p.grad is not None]
        gradients = (_apply_momentum(matrix, group["momentum"], self.state[matrix]) for matrix in matrices)
        is_sharded = bool(matrices) and isinstance(matrices[0], DTensor)
        updates = _orthogonalize_sharded(matrices, list(gradients)) if is_sharded else map(orthogonalize, gradients)
        for matrix, update in zip(matrices, updates, strict=True):
            rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
            local(matrix).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        self._adamw.param_groups, self._adamw.state = adamw_groups, self.state
        self._adamw.step()  # type: ignore[no-untyped-call,unused-ignore]
        return loss


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return the nearest matrix of orthonormal rows or columns, roughly, by Newton-Schulz iterations.

    Args:
        matrix: (rows, columns); may be overwritten.

    Returns:
        (rows, columns) in `iteration_dtype`; singular values of about 0.5 to 1.5, unless they were near 0.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(iteration_dtype(matrix.device))
    wide = x if len(x) <= x.shape[1] else x.T
    wide = wide.div_(wide.norm().clamp(min=1e-7))
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if len(x) <= x.shape[1] else wide.T


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of Muon's iterations: bf16 where it is native, else float32, which is faster there."""
    return torch.bfloat16 if has_native_bf16(device) else torch.float32


def assign_owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """Return the rank that orthogonalizes each matrix: the largest first, each to the least loaded rank."""
    work = [rows * columns * min(rows, columns) for rows, columns in shapes]
    load, owners = [0] * ranks, [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: -work[index]):
        owners[index] = min(range(ranks), key=load.__getitem__)
        load[owners[index]] += work[index]
    return owners


def _apply_momentum(matrix: Any, momentum: float, state: dict[str, Any]) -> Tensor:
    """Update the momentum of a matrix, or of this rank's shard; return the gradient with Nesterov momentum."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(matrix.grad)
    gradient, buffer = local(matrix.grad), local(state["momentum_buffer"])
    buffer.lerp_(gradient, 1 - momentum)
    return gradient.lerp(buffer, momentum)


def _orthogonalize_sharded(matrices: list[Any], gradients: list[Tensor]) -> list[Tensor]:
    """Orthogonalize the gradients of matrices (DTensor) whose rows are sharded over the mesh's last dimension.

    Each gradient is collected by its owner and its update scattered, in one all-to-all for all matrices and direction;
    DTensor would gather and reduce in each iteration of each matrix.

    Returns:
        This rank's shard of each update.
    """
    mesh = matrices[0].device_mesh
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    owners = assign_owners([matrix.shape for matrix in matrices], ranks)
    owned = [[index for index, owner in enumerate(owners) if owner == other] for other in range(ranks)]
    dtype = iteration_dtype(gradients[0].device)
    sent = [[gradients[index].to(dtype) for index in indices] for indices in owned]
    shards = [[_shard_shape(matrices[index].shape, other, ranks) for index in owned[rank]] for other in range(ranks)]
    collected = zip(*_exchange(sent, shards, mesh), strict=True)  # for each matrix of this rank: its shards
    owned_updates = [
        orthogonalize(torch.cat(parts)).split_with_sizes([len(part) for part in parts]) for parts in collected
    ]
    sent = [[update[other] for update in owned_updates] for other in range(ranks)]
    returned = _exchange(sent, [[gradients[index].shape for index in indices] for indices in owned], mesh)
    updates = dict(zip(chain(*owned), chain(*returned), strict=True))
    return [updates[index] for index in range(len(matrices))]


def _shard_shape(shape: tuple[int, int], rank: int, ranks: int) -> torch.Size:
    """Return the shape of a rank's shard: rows are divided as `torch.chunk` does, the last ranks may have none."""
    rows = -(-shape[0] // ranks)
    return torch.Size((max(0, min(rows, shape[0] - rank * rows)), shape[1]))


def _exchange(sent: list[list[Tensor]], shapes: list[list[torch.Size]], mesh: DeviceMesh) -> list[list[Tensor]]:
    """Send the tensors `sent[r]` to each rank r; return those from each rank, of the shapes in `shapes[r]`."""
    device = torch.device(mesh.device_type)
    empty = torch.empty(0, dtype=iteration_dtype(device), device=device)  # for a rank that owns nothing
    out = torch.cat([empty, *(tensor.flatten() for tensors in sent for tensor in tensors)])
    sizes = [[shape.numel() for shape in row] for row in shapes]
    received = out.new_empty(sum(map(sum, sizes)))
    out_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    all_to_all_single(received, out, [sum(row) for row in sizes], out_sizes, mesh.get_group(mesh.ndim - 1))
    parts = iter(received.split_with_sizes(list(chain(*sizes))))
    return [[next(parts).view(shape) for shape in row] for row in shapes]
