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


def test_state_of_torchs_muon_is_continued() -> None:
    """Earlier checkpoints have its keys in the group."""
    old = torch.optim.Muon(matrices(), lr=0.1, adjust_lr_fn="match_rms_adamw")
    for parameter in old.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    old.step()  # type: ignore[no-untyped-call]
    rest = [torch.nn.Parameter(torch.zeros(2))]
    (adamw,) = torch.optim.AdamW(rest).state_dict()["param_groups"]
    saved = old.state_dict()
    saved["param_groups"].append({**adamw, "params": [len(SHAPES)]})
    parameters = matrices()
    optimizer = MuonAdamW(parameters, [{"params": rest}], lr=0.3, fused=False)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(optimizer.state[parameters[0]]["momentum_buffer"], saved["state"][0]["momentum_buffer"])
    before = parameters[0].clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert not torch.equal(parameters[0], before)


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
