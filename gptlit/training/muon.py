"""Muon for the blocks' matrices and AdamW for the rest, as one optimizer; sharded matrices have one owner each."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override

from gptlit.model.sharding import local
from gptlit.training.lightning_compat import muon_lr, orthogonalize


class MuonAdamW(Optimizer):
    """torch's Muon and AdamW as one optimizer: the first group is Muon's, the others are AdamW's.

    Muon's updates are scaled to the RMS of AdamW's, so that both use the same learning rate. Groups and state are kept
    here, so that saving and loading is torch's own.
    """

    def __init__(self, hidden: list[nn.Parameter], groups: list[dict[str, Any]], lr: float, fused: bool) -> None:
        self._muon = Muon([{"params": hidden}], lr=lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(groups, lr=lr, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state
        matrices = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        if matrices and isinstance(matrices[0], DTensor):
            _step_sharded(matrices, self.param_groups[0], self.state)
        else:
            self._muon.step()  # type: ignore[no-untyped-call,unused-ignore]
        self._adamw.step()  # type: ignore[no-untyped-call,unused-ignore]
        return loss


def assign_owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """Return the rank that orthogonalizes each matrix: the largest first, each to the least loaded rank."""
    work = [rows * columns * min(rows, columns) for rows, columns in shapes]
    load, owners = [0] * ranks, [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: -work[index]):
        owners[index] = min(range(ranks), key=load.__getitem__)
        load[owners[index]] += work[index]
    return owners


def _step_sharded(matrices: list[Any], group: dict[str, Any], state: Any) -> None:
    """Take Muon's step on matrices (DTensor) whose rows are sharded over the mesh's last dimension.

    Momentum is updated in shards. Each matrix is then collected by its owner and its update scattered, in one
    all-to-all for all matrices and direction; DTensor would gather and reduce in each iteration of each matrix.
    """
    mesh = matrices[0].device_mesh
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    owners = assign_owners([matrix.shape for matrix in matrices], ranks)
    owned = [[index for index, owner in enumerate(owners) if owner == other] for other in range(ranks)]
    gradients = [_apply_momentum(matrix, group, state[matrix]) for matrix in matrices]
    sent = [[gradients[index].bfloat16() for index in indices] for indices in owned]  # Muon's own precision
    shards = [[_shard_shape(matrices[index].shape, other, ranks) for index in owned[rank]] for other in range(ranks)]
    collected = zip(*_exchange(sent, shards, mesh), strict=True)  # for each matrix of this rank: its shards
    updates = [
        orthogonalize(torch.cat(parts), group).split_with_sizes([len(part) for part in parts]) for parts in collected
    ]
    sent = [[update[other] for update in updates] for other in range(ranks)]
    returned = _exchange(sent, [[gradients[index].shape for index in indices] for indices in owned], mesh)
    for index, update in zip(chain(*owned), chain(*returned), strict=True):
        shard, rate = local(matrices[index]), muon_lr(matrices[index].shape, group)
        shard.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def _apply_momentum(matrix: Any, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """Update the momentum of a shard; return the gradient with Nesterov momentum."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(matrix.grad)
    gradient, momentum = local(matrix.grad), local(state["momentum_buffer"])
    momentum.lerp_(gradient, 1 - group["momentum"])
    return gradient.lerp(momentum, group["momentum"])


def _shard_shape(shape: tuple[int, int], rank: int, ranks: int) -> torch.Size:
    """Return the shape of a rank's shard: rows are divided as `torch.chunk` does, the last ranks may have none."""
    rows = -(-shape[0] // ranks)
    return torch.Size((max(0, min(rows, shape[0] - rank * rows)), shape[1]))


def _exchange(sent: list[list[Tensor]], shapes: list[list[torch.Size]], mesh: DeviceMesh) -> list[list[Tensor]]:
    """Send the bf16 tensors `sent[r]` to each rank r; return those from each rank, of the shapes in `shapes[r]`."""
    empty = torch.empty(0, dtype=torch.bfloat16, device=mesh.device_type)  # for a rank that owns nothing
    out = torch.cat([empty, *(tensor.flatten() for tensors in sent for tensor in tensors)])
    sizes = [[shape.numel() for shape in row] for row in shapes]
    received = out.new_empty(sum(map(sum, sizes)))
    out_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    all_to_all_single(received, out, [sum(row) for row in sizes], out_sizes, mesh.get_group(mesh.ndim - 1))
    parts = iter(received.split_with_sizes(list(chain(*sizes))))
    return [[next(parts).view(shape) for shape in row] for row in shapes]
