"""What is the same for full and for sharded parameters."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    ThreadLocalWorld,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from gptlit.config import GPTConfig
from gptlit.errors import InputError
from gptlit.model.lora import LoRAConfig, build_model
from gptlit.model.loss import linear_cross_entropy
from gptlit.model.sharding import gathered, local, shard_like
from gptlit.training import muon
from gptlit.training.distributed import HSDPStrategy, gradient_norm, sharded_model
from gptlit.training.muon import MuonAdamW, assign_owners
from gptlit.training.optimizer import OPTIMIZERS, update_param_groups


@pytest.mark.parametrize("init", ["torch", "gpt2"])
@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_seed_gives_the_same_weights_sharded(init: str, tie_weights: bool, rank: int) -> None:
    config = GPTConfig(61, 8, 16, 2, n_layers=2, init=init, tie_weights=tie_weights)  # type: ignore[arg-type]
    torch.manual_seed(0)
    expected = build_model(config, LoRAConfig(rank)).state_dict()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        torch.manual_seed(0)
        model = sharded_model(config, LoRAConfig(rank), init_device_mesh("cpu", (3,)), torch.device("cpu"))
        for name, shard in model.state_dict().items():
            assert torch.equal(local(shard), local(shard_like(expected[name], shard))), name
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(50_257, 256), (3, 5), (7,), (0, 4)])
def test_the_norm_of_the_gradient_is_exact(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parameters = [torch.zeros(shape), torch.zeros(2, 3)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    exact = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm()
    assert float(gradient_norm(parameters)) == pytest.approx(float(exact), rel=2e-7)


def test_work_is_shared_among_owners() -> None:
    assert assign_owners([(4, 4), (16, 4), (4, 16), (12, 4)], 2) == [1, 0, 1, 0]
    assert assign_owners([(8, 8)], 3) == [0]
    blocks = [(192, 64), (64, 64), (256, 64), (64, 256)] * 12
    load = [0] * 8
    for (rows, columns), owner in zip(blocks, assign_owners(blocks, 8), strict=True):
        load[owner] += rows * columns
    assert load == [18 * 64 * 64] * 8


def test_sharded_muon_communicates_twice_a_step() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        model = sharded_model(
            GPTConfig(61, 8, 16, 2, n_layers=2), LoRAConfig(), init_device_mesh("cpu", (4,)), torch.device("cpu")
        )
        optimizer = OPTIMIZERS["muon"].build(model, 0.1, True)
        update_param_groups(optimizer, weight_decay=0.1, decay_all=False, betas=(0.9, 0.95))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with CommDebugMode() as communication:
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert dict(communication.get_comm_counts()) == {torch.ops.c10d.alltoall_base_: 2}  # to the owners, and back


@pytest.mark.skipif(not hasattr(ThreadLocalWorld, "comms"), reason="torch 2.11 cannot destroy threaded process groups")
@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)])
@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_sharded_muon_is_muon(
    mesh_shape: tuple[int, ...], is_native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with matrices of fewer rows than devices, and fewer matrices than devices."""
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: is_native)
    exchange, sent = muon.all_to_all_single, set()

    def record(received: torch.Tensor, *others: Any) -> None:
        sent.add(received.dtype)
        exchange(received, *others)

    monkeypatch.setattr(muon, "all_to_all_single", record)
    torch.manual_seed(0)
    full = [torch.randn(shape) for shape in ((5, 8), (2, 3), (16, 4))]
    gradients = [[torch.randn_like(matrix) for matrix in full] for _ in range(3)]
    rest = torch.zeros(1)

    def train(matrices: list[torch.Tensor], shard: Any) -> list[Any]:
        parameters = [torch.nn.Parameter(shard(matrix)) for matrix in matrices]
        optimizer = MuonAdamW(parameters, [{"params": [torch.nn.Parameter(rest.clone())]}], lr=0.1, fused=False)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = shard(gradient)
            optimizer.step()
        return parameters

    expected = train(full, torch.clone)

    def on_each_device() -> None:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
        placements = [Replicate(), Shard(0)][-len(mesh_shape) :]
        found = train(full, lambda tensor: distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None))
        for parameter, other in zip(expected, found, strict=True):
            torch.testing.assert_close(gathered(other), parameter, rtol=0, atol=1e-7)

    run_in_threads(on_each_device, 4)
    assert sent == {dtype}


def test_parameters_are_gathered_in_bf16() -> None:
    config = GPTConfig(61, 8, 16, 2, n_layers=2, drop_rate=0, init="gpt2")
    ids = torch.randint(61, (4, 9))
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        results = []
        for precision in ("32-true", "bf16-mixed"):
            torch.manual_seed(0)
            model = sharded_model(config, LoRAConfig(), init_device_mesh("cpu", (1,)), torch.device("cpu"), precision)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                hidden = model.hidden(ids[:, :-1])
                read = model.out_head.weight.dtype
                loss = linear_cross_entropy(hidden, model.out_head.weight, ids[:, 1:])
            loss.backward()
            assert read == (torch.float32 if precision == "32-true" else torch.bfloat16)
            gradients = [gathered(parameter.grad) for parameter in model.parameters()]
            assert {value.dtype for value in (*model.parameters(), *gradients)} == {torch.float32}
            results.append((loss.detach(), gradients))
    finally:
        torch.distributed.destroy_process_group()
    (loss, exact), (rounded_loss, rounded) = results
    assert float(rounded_loss) == pytest.approx(float(loss), rel=2e-3)
    for one, other in zip(exact, rounded, strict=True):
        assert (one - other).norm() <= 2e-2 * one.norm()


@pytest.mark.parametrize(
    ("nodes", "devices", "size", "shape"),
    [(2, 2, None, (2, 2)), (1, 4, 2, (2, 2)), (2, 4, None, (2, 4)), (4, 2, 4, (2, 4))],
)
def test_replicas_are_nodes_unless_a_size_is_given(nodes: int, devices: int, size: int | None, shape: Any) -> None:
    assert hsdp(nodes, devices, size).mesh_shape() == shape


@pytest.mark.parametrize(("nodes", "devices", "size"), [(1, 4, None), (1, 4, 3), (2, 2, 4), (2, 1, None), (2, 2, 0)])
def test_devices_that_make_no_groups_are_refused(nodes: int, devices: int, size: int | None) -> None:
    total, given = nodes * devices, devices if size is None else size
    with pytest.raises(InputError, match=f"hsdp cannot split {total} devices into two or more groups of {given}"):
        hsdp(nodes, devices, size).mesh_shape()


def hsdp(nodes: int, devices: int, size: int | None) -> HSDPStrategy:
    """The strategy, as the Trainer sets it up."""
    strategy = HSDPStrategy(size)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * devices, nodes
    return strategy


def run_in_threads(work: Callable[[], None], size: int) -> None:
    """Call `work` in a thread for each member of a process group."""
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    store = HashStore()

    def run(rank: int) -> None:
        torch.distributed.init_process_group("threaded", store=store, rank=rank, world_size=size)
        try:
            work()
        except BaseException as error:
            ProcessLocalGroup.exception_handle(error)  # the others would wait for this one
            raise
        finally:
            torch.distributed.destroy_process_group()

    isolate(True)
    _install_threaded_pg()
    try:
        with ThreadPoolExecutor(size) as threads:
            list(threads.map(run, range(size)))
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        isolate(False)
