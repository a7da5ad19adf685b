"""The examples: another block keeps the model causal, trains, samples and loads."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import ROOT, losses
from gptlit import GPTConfig, GPTModel, load_pretrained, save_pretrained
from gptlit.errors import InputError

BLOCK = runpy.run_path(str(ROOT / "examples" / "modern_block.py"))["ModernBlock"]
CONFIG = GPTConfig(vocab_size=50, context_length=16, emb_dim=48, n_heads=2, n_layers=2, drop_rate=0, init="gpt2")


@pytest.fixture
def _modern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTModel, "block", BLOCK)


@pytest.mark.usefixtures("_modern")
def test_another_block_has_as_many_parameters_and_is_causal() -> None:
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    assert isinstance(model.trf_blocks[1], BLOCK)
    ff = model.trf_blocks[0].ff
    assert sum(p.numel() for p in ff.parameters()) == 8 * CONFIG.emb_dim**2
    assert ff[2].weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    ids = torch.randint(50, (2, 16))
    other = ids.clone()
    other[:, 9:] = (ids[:, 9:] + 1) % 50
    torch.testing.assert_close(model(ids)[:, :9], model(other)[:, :9])
    assert not torch.allclose(model(ids)[:, 9:], model(other)[:, 9:])


@pytest.mark.usefixtures("_modern")
def test_another_block_trains_and_loads(fit: Callable[..., None]) -> None:
    fit("--trainer.max_steps=8", "--run.sample_prompt=the")
    curve = losses(Path("runs/t/version_0"))
    assert curve[8] < curve[1] - 0.1
    model = load_pretrained("runs/t")
    assert isinstance(model.trf_blocks[0], BLOCK)
    with pytest.raises(InputError, match="another block than TransformerBlock"):
        save_pretrained(model, "exported")
