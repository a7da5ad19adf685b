"""Muon against torch's."""

import pytest
import torch

from gptlit.training import muon
from gptlit.training.muon import MuonAdamW, orthogonalize

SHAPES = [(12, 5), (4, 8), (6, 6)]


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize(("is_native", "error"), [(True, 0), (False, 1e-2)])
def test_muon_takes_the_steps_of_torch(is_native: bool, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise in bf16; in float32 up to bf16's rounding."""
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: is_native)
    ours, theirs = matrices(), matrices()
    optimizer = MuonAdamW(ours, [{"params": [torch.nn.Parameter(torch.zeros(2))]}], lr=0.1, fused=False)
    expected = torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        optimizer.step()
        expected.step()  # type: ignore[no-untyped-call]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=error)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: False)
    left, values, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    matrix = left[:, : len(values)] * values @ right[: len(values)]
    update = orthogonalize(matrix.clone())
    assert update.dtype == torch.float32
    turned = left.T @ update @ right.T  # diagonal in the basis of the matrix
    diagonal = turned.diagonal()
    assert ((diagonal > 0.3) & (diagonal < 1.6)).all()
    torch.testing.assert_close(turned, torch.zeros(shape).diagonal_scatter(diagonal), rtol=0, atol=1e-5)
