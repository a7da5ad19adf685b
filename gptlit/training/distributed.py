"""Training on several devices: sharded models (FSDP2, HSDP), the norm of their gradient, and the strategies."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from gptlit.config import GPTConfig
from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel
from gptlit.model.lora import LoRAConfig, build_model, reset_adapters
from gptlit.model.sharding import gathered, local, shard_like

TIMEOUT = timedelta(minutes=10)  # after which a process that waits for a silent one gives up


def sharded_model(
    config: GPTConfig, lora: LoRAConfig, mesh: DeviceMesh, device: torch.device, precision: str = "32-true"
) -> GPTModel:
    """Build a sharded GPTModel with the weights that `build_model(config, lora)` would have.

    No device ever holds more than its shards and one full parameter, which is initialized on the CPU.

    Args:
        config: The architecture.
        lora: The adapters.
        mesh: The devices that shard; in two dimensions: (replicas, devices that shard each).
        device: This process's own.
        precision: The Trainer's. In bf16-mixed, parameters are gathered in bf16 and gradients reduced in float32.
    """
    model = sharded_meta_model(config, lora, mesh, precision)
    model.to_empty(device=device)
    if config.tie_weights:
        model.out_head.weight = model.tok_emb.weight
    with _FullInit():
        model.init_weights()
        reset_adapters(model)
    return model


def sharded_meta_model(config: GPTConfig, lora: LoRAConfig, mesh: DeviceMesh, precision: str = "32-true") -> GPTModel:
    """Build a sharded GPTModel on the meta device: shapes without storage. Source: Zhao et al. 2023, "PyTorch FSDP"."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.device("meta"):
        model = build_model(config, lora)
    for block in model.trf_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")
    return model


class _FullInit(TorchFunctionMode):
    """Makes random initializers fill a sharded parameter with the values that the unsharded one would have.

    DTensor's own random numbers differ. Here each device fills the full tensor, on the CPU, and keeps its shard.
    """

    RANDOM = ("normal_", "uniform_", "kaiming_uniform_")

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ not in self.RANDOM:
            return func(*args, **kwargs)
        shard, *rest = args or (kwargs.pop("tensor"),)  # nn.init passes its tensor by name
        full = func(torch.empty(shard.shape, dtype=shard.dtype), *rest, **kwargs)
        with torch.no_grad():
            return shard.copy_(shard_like(full, shard))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients, over the shards of all devices.

    On a CPU torch's own norm accumulates a large tensor in one float32, and is 0.3% low for GPT-2 small's embedding.
    Row by row, with the rows' norms in float64, it is exact to the last digits at the same speed.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [local(gradient) for gradient in gradients]
    if shards[0].device.type == "cpu":
        norms = [vector_norm(vector_norm(shard, dim=-1), dtype=torch.float64) for shard in shards]
        total: Tensor = vector_norm(torch.stack(norms))
    else:
        total = torch.nn.utils.get_total_norm(shards)
    if isinstance(gradients[0], DTensor):
        square, mesh = total.square(), gradients[0].device_mesh
        torch.distributed.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))  # replicas have the same shards
        total = square.sqrt()
    return total.float()


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all devices; saves full state dicts.

    Args:
        process_group_backend: "nccl" or "gloo"; None: the default for the device.
        timeout: Timeout of a collective.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = TIMEOUT) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )

    def mesh_shape(self) -> tuple[int, ...]:
        """Return (replicas,) and the devices over which each of them is sharded."""
        return (self.num_processes * self.num_nodes,)

    def sharding_mesh(self) -> DeviceMesh:
        """Build the mesh of `sharded_model`; Lightning's own, `device_mesh`, is (nodes, devices of a node)."""
        shape = self.mesh_shape()
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate unsharded gradients on each device, without communication."""
        assert self.lightning_module is not None
        modules = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        yield
        for module in modules:
            module.set_requires_gradient_sync(True, recurse=False)

    # --- full state dicts ---------------------------------------------------------------------------------------

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather one parameter at a time; only rank 0 keeps it."""
        assert self.lightning_module is not None
        found: dict[int, Any] = {}  # a tied parameter is gathered once
        state = self.lightning_module.state_dict(keep_vars=True)
        for value in state.values():
            if id(value) not in found:
                found[id(value)] = self._gather_to_rank_0(value)
        return {name: found[id(value)] for name, value in state.items()} if self.is_global_zero else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        full = {
            index: {key: self._gather_to_rank_0(value) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        return {"state": full, "param_groups": state["param_groups"]}

    def _gather_to_rank_0(self, value: Any) -> Any:
        """Return the full tensor in CPU memory on rank 0, an empty one on the other devices."""
        if not isinstance(value, Tensor):
            return value
        full: Tensor = gathered(value).detach()
        return full.cpu() if self.is_global_zero else full.new_empty(0)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load a full state dict into the sharded model. It is memory-mapped: each device reads only its shards."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: shard_like(v, own[name]) if name in own else v for name, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shard a full optimizer state, whose parameters are numbered in the order of the optimizer's groups."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
            sharded = {
                index: {
                    key: shard_like(value, parameters[index])
                    if isinstance(value, Tensor) and value.shape == parameters[index].shape
                    else value
                    for key, value in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({"state": sharded, "param_groups": state["param_groups"]})


class HSDPStrategy(FSDP2Strategy):
    """Shards as FSDP2 does, but within groups of devices, which are replicas: between groups only gradients are sent.

    Args:
        shard_size: Devices of a group; None: those of a node.
        options: Options of FSDP2Strategy.
    """

    def __init__(self, shard_size: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.shard_size = shard_size

    @override
    def mesh_shape(self) -> tuple[int, ...]:
        """Return (replicas, devices over which each of them is sharded).

        Raises:
            InputError: The devices are not two or more such groups.
        """
        (devices,) = super().mesh_shape()
        size = self.num_processes if self.shard_size is None else self.shard_size
        if not 1 < size < devices or devices % size:
            raise InputError(
                f"trainer.strategy hsdp cannot split {devices} devices into two or more groups of {size} (shard_size, "
                "by default the devices of a node; at least 2): use another shard_size, or fsdp2"
            )
        return devices // size, size


def register_strategies() -> None:
    """Register "fsdp2" and "hsdp" for `trainer.strategy`. Also let "ddp" (and "auto" on several devices) use gradients
    that are views of its communication buckets, which saves a copy of them.
    """
    StrategyRegistry.register(
        "ddp", DDPStrategy, override=True, start_method="popen", gradient_as_bucket_view=True, timeout=TIMEOUT
    )
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all devices", override=True)
    StrategyRegistry.register("hsdp", HSDPStrategy, description="FSDP2 within nodes, replicas between", override=True)
