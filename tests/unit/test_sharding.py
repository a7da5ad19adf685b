"""What is the same for full and for sharded parameters."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from gptlit.config import GPTConfig
from gptlit.model.gpt import GPTModel
from gptlit.model.sharding import local, shard_like
from gptlit.training.distributed import gradient_norm, sharded_model


@pytest.mark.parametrize("init", ["torch", "gpt2"])
@pytest.mark.parametrize("tie_weights", [False, True])
def test_a_seed_gives_the_same_weights_sharded(init: str, tie_weights: bool) -> None:
    config = GPTConfig(61, 8, 16, 2, n_layers=2, init=init, tie_weights=tie_weights)  # type: ignore[arg-type]
    torch.manual_seed(0)
    expected = GPTModel(config).state_dict()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        torch.manual_seed(0)
        model = sharded_model(config, init_device_mesh("cpu", (3,)), torch.device("cpu"))
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
