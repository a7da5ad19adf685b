"""Blocked attention against its definition."""

import pytest
import torch

from gptlit.model.attention import BlockedAttention


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_the_definition(length: int, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(3, length, 8).to(dtype).requires_grad_() for _ in range(3)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    scores = exact[0] @ exact[1].transpose(1, 2) / 8**0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ exact[2]
    found = BlockedAttention.apply(*parts)
    gradient = torch.randn(3, length, 8).to(dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    for ours, theirs in [(found, expected), *((a.grad, b.grad) for a, b in zip(parts, exact, strict=True))]:
        assert ours is not None
        assert theirs is not None
        assert float((ours.double() - theirs).detach().norm()) <= bound * (float(theirs.detach().norm()) + 0.5)
