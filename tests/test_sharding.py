"""What is the same for whole and for sharded parameters."""

import pytest
import torch

from gptlit.training.distributed import gradient_norm


@pytest.mark.parametrize("shape", [(50_257, 256), (3, 5), (7,), (0, 4)])
def test_the_norm_of_the_gradient_is_exact(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parameters = [torch.zeros(shape), torch.zeros(2, 3)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    exact = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm()
    assert float(gradient_norm(parameters)) == pytest.approx(float(exact), rel=2e-7)
