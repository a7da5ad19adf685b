"""The loss against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptlit.model import loss as loss_module
from gptlit.model.loss import linear_cross_entropy, next_token_loss


def test_mean_and_sum_ignore_targets_of_minus_100() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 6], [0, 2, -100]])
    log_probs = torch.log_softmax(logits, dim=-1)
    expected = -sum(log_probs[b, t, targets[b, t]] for b, t in ((0, 0), (0, 2), (1, 0), (1, 1)))
    torch.testing.assert_close(next_token_loss(logits, targets, reduction="sum"), expected)
    torch.testing.assert_close(next_token_loss(logits, targets), expected / 4)
    half = logits.bfloat16()
    torch.testing.assert_close(next_token_loss(half, targets), next_token_loss(half.float(), targets))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> list[Tensor]:
    """Return loss and gradients in float64, by definition."""
    hidden, weight = (value.detach().double().requires_grad_() for value in (hidden, weight))
    loss = next_token_loss(hidden @ weight.T, targets, reduction)  # type: ignore[arg-type]
    (loss * 0.5).backward()
    return [loss, hidden.grad, weight.grad]  # type: ignore[list-item]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 200),
    at_once=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_linear_cross_entropy_equals_the_definition(
    rows: int, vocabulary: int, at_once: int, dtype: torch.dtype, reduction: str, seed: int, scale: float
) -> None:
    """Loss and gradients against float64: equal there, to 1e-4 in float32. In bf16 a logit has 8 bits, and
    its error is a relative error of the probability: a hundredth, and more for large logits.
    """
    torch.manual_seed(seed)
    hidden = (scale * torch.randn(1, rows, 8)).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 8).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (1, rows))
    targets[0, torch.rand(rows) < 0.2] = -100
    targets[0, 0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.ROWS, "cpu", at_once)
        patch.setattr(loss_module, "CACHED_ROWS", 3)
        found = linear_cross_entropy(hidden, weight, targets, reduction)  # type: ignore[arg-type]
        (found * 0.5).backward()
    largest = float((hidden.double() @ weight.double().T).abs().max().detach())
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2 + largest / 2**8}[dtype]
    for ours, exact in zip([found, hidden.grad, weight.grad], plain(hidden, weight, targets, reduction), strict=True):
        assert ours is not None
        assert float((ours.double() - exact).detach().norm()) <= bound * float(exact.detach().norm()) + bound


def test_small_gradients_survive_fp16() -> None:
    """A gradient scaler multiplies them by thousands, but not those that were rounded to 0."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 4096, 8).half().requires_grad_()
    weight = (torch.randn(2000, 8) / 10).half().requires_grad_()
    targets = torch.zeros(1, 4096, dtype=torch.int64)
    (linear_cross_entropy(hidden, weight, targets) * 4096.0).backward()
    exact = plain(hidden, weight, targets, "mean")
    for ours, theirs in ((hidden.grad, exact[1]), (weight.grad, exact[2])):
        assert ours is not None
        assert float((ours.double() / 8192.0 - theirs).norm()) < 1e-2 * float(theirs.norm())


def test_under_no_grad_only_the_loss_is_computed() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(9, 4, requires_grad=True), torch.randint(9, (2, 3))
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, next_token_loss(hidden @ weight.T, targets).detach())


def test_a_second_backward_is_refused() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(2, 3, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


@pytest.mark.parametrize("requires_grad", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_required_gradients_are_computed(
    monkeypatch: pytest.MonkeyPatch, requires_grad: tuple[bool, bool]
) -> None:
    """A validation, which requires none, would otherwise spend a quarter of its time on the head's."""
    computed: list[int] = []
    original = loss_module.accumulate_product
    monkeypatch.setattr(loss_module, "accumulate_product", lambda *a: computed.append(1) or original(*a))
    hidden, weight = (
        torch.randn(2, 3, 8, requires_grad=requires_grad[0]),
        torch.randn(11, 8, requires_grad=requires_grad[1]),
    )
    targets = torch.randint(11, (2, 3))
    loss = linear_cross_entropy(hidden, weight, targets)
    assert bool(computed) is requires_grad[1]
    assert loss.requires_grad is any(requires_grad)
    computed.clear()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), loss)
    assert not computed
