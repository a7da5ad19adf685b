"""How several devices share the work: Lightning's DDP with this project's settings, and FSDP2."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from gptlit.sharding import gathered, shard_like


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and moments in shards over all devices; checkpoints are whole, as any strategy writes them.

    Args:
        process_group_backend: "nccl" or "gloo"; None: what suits the device.
        timeout: How long a process waits for the others.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Shard over all devices of all nodes."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside an accumulation window gradients stay where they are: whole, on each device."""
        assert self.lightning_module is not None
        modules = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        yield
        for module in modules:
            module.set_requires_gradient_sync(True, recurse=False)

    # --- whole checkpoints --------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the weights, one after the other; only the first device keeps them."""
        assert self.lightning_module is not None
        found: dict[int, Any] = {}  # what is shared (a tied head) is gathered once
        state = self.lightning_module.state_dict(keep_vars=True)
        for value in state.values():
            if id(value) not in found:
                found[id(value)] = self._first_keeps(value)
        return {name: found[id(value)] for name, value in state.items()} if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the optimizer's state."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        moments = {
            index: {key: self._first_keeps(value) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        return {"state": moments, "param_groups": state["param_groups"]}

    def _first_keeps(self, value: Any) -> Any:
        """Gather a tensor: the first device gets it in the memory of the CPU, the others let it go at once."""
        if not isinstance(value, Tensor):
            return value
        whole: Tensor = gathered(value).detach()
        return whole.cpu() if self.is_global_zero else whole.new_empty(0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Let the first device write it."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it, memory-mapped: each device brings only its shards into memory."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the shards of whole weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: shard_like(v, own[name]) if name in own else v for name, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the shards of whole moments; parameters are counted in the order of the optimizer's groups."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
            moments = {
                index: {
                    key: shard_like(value, parameters[index])
                    if isinstance(value, Tensor) and value.shape == parameters[index].shape
                    else value
                    for key, value in values.items()
                }
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def register_strategies() -> None:
    """Let `trainer.strategy` know "fsdp2", and give "ddp" (and "auto", where there are several devices) gradients that
    are views of its buckets: one copy of them less.
    """
    StrategyRegistry.register("ddp", DDPStrategy, override=True, start_method="popen", gradient_as_bucket_view=True)
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Parameters in shards over all devices")
