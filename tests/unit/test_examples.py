"""The examples: another block keeps the model causal, trains, samples and loads."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import ROOT, losses
from gptlit import GPTConfig, GPTModel, load_pretrained, save_pretrained
from gptlit.errors import InputError
from gptlit.model.kv_cache import KVCache

EXAMPLE = runpy.run_path(str(ROOT / "examples" / "modern_block.py"))
BLOCK = EXAMPLE["ModernBlock"]
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


def test_rotary_scores_depend_on_distances() -> None:
    query, key = torch.randn(2, 1, 2, 1, 12).expand(2, 1, 2, 9, 12)  # the same vectors at each of nine positions
    near, far = (torch.arange(9)[None] + offset for offset in (0, 100))
    scores = EXAMPLE["rotate"](query, near) @ EXAMPLE["rotate"](key, near).transpose(2, 3)
    shifted = EXAMPLE["rotate"](query, far) @ EXAMPLE["rotate"](key, far).transpose(2, 3)
    torch.testing.assert_close(scores, shifted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-4, rtol=1e-4)
    assert scores[0, 0, 4].std() > 0.1


@pytest.mark.usefixtures("_modern")
def test_another_block_continues_from_its_cache() -> None:
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    ids = torch.randint(50, (2, 8))
    cache = KVCache(model, rows=2, capacity=8)
    parts = []
    for part in ids.split([3, 1, 4], dim=1):
        parts.append(model.hidden(part, cache))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(ids))


@pytest.mark.usefixtures("_modern")
def test_another_block_trains_and_loads(fit: Callable[..., None]) -> None:
    fit("--trainer.max_steps=8", "--run.sample_prompt=the")
    curve = losses(Path("runs/t/version_0"))
    assert curve[8] < curve[1] - 0.1
    model = load_pretrained("runs/t")
    assert isinstance(model.trf_blocks[0], BLOCK)
    with pytest.raises(InputError, match="another block than TransformerBlock"):
        save_pretrained(model, "exported")
