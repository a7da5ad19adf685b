"""Blocked attention against its definition."""

from typing import Any

import pytest
import torch

from gptlit.model import attention
from gptlit.model.attention import BlockedAttention, causal_attention


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


@pytest.mark.parametrize("has_amx", [True, False])
def test_torch_s_kernel_is_used_where_it_is_faster(has_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "HAS_AMX", has_amx)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(causal_attention, backend=backend)
    for dtype in (torch.bfloat16, torch.float32):
        compiled(*(torch.randn(1, 2, 8, 4, dtype=dtype) for _ in range(3)))
    in_bf16, in_float32 = ("scaled_dot_product_attention" in code for code in graphs)
    assert (in_bf16, in_float32) == (has_amx, True)
