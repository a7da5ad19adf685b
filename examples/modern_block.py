"""Another block in GPT-2's place: RMSNorm, SwiGLU and rotary positions instead of LayerNorm and GELU.

    python examples/modern_block.py fit --config quickstart --run.name modern
    python examples/modern_block.py generate --checkpoint runs/modern --prompt "Return the"
    python -m gptlit plot runs/quickstart runs/modern --out blocks.png

All commands but `import` and `export`, whose formats are GPT-2's, work with the new block: resuming, several devices,
LoRA, generation. Its checkpoints need this script. The model adds GPT-2's learned positions to the embeddings, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from gptlit import GPTConfig, GPTModel
from gptlit.commands.main import main
from gptlit.model.gpt import MultiHeadAttention, TransformerBlock
from gptlit.model.kv_cache import LayerCache


class GatedSiLU(nn.Module):
    """The first half of the features, through SiLU, times the second: (..., 2 * N) -> (..., N)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)  # (..., N) each
        return F.silu(gate) * value


class SwiGLU(nn.Sequential):
    """A gated feed-forward with as many parameters as GPT-2's: (B, T, C) -> (B, T, C).

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, config: GPTConfig) -> None:
        width = 8 * config.emb_dim // 3  # three matrices of this width instead of two of 4 * C
        super().__init__(
            nn.Linear(config.emb_dim, 2 * width, bias=False),
            GatedSiLU(),
            nn.Linear(width, config.emb_dim, bias=False),  # the last layer: initialized for the residual stream
        )


class RotaryAttention(MultiHeadAttention):
    """Attention whose scores depend on the distance of query and key: (B, T, C) -> (B, T, C).

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """

    @override
    def project(self, hidden: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, ...]:
        query, key, value = super().project(hidden, cache)  # (B, H, T, D) each
        steps = torch.arange(hidden.shape[1], device=hidden.device)[None]  # (1, T)
        positions = steps if cache is None else cache.positions  # (1, T) or (B, T)
        return rotate(query, positions), rotate(key, positions), value


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate each pair (i, i + D / 2) of the D features of (B, H, T, D) by an angle in proportion to its position."""
    half = x.shape[-1] // 2
    frequencies = 10_000 ** (-torch.arange(half, device=x.device) / half)  # (D / 2,), radians per position
    angles = positions[:, None, :, None] * frequencies  # (B or 1, 1, T, D / 2)
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).type_as(x)


class ModernBlock(TransformerBlock):
    """A pre-norm block with RMSNorm, SwiGLU and rotary positions. Source: Touvron et al. 2023, "LLaMA"."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.att = RotaryAttention(config)
        self.ff = SwiGLU(config)
        self.norm1 = nn.RMSNorm(config.emb_dim)
        self.norm2 = nn.RMSNorm(config.emb_dim)


if __name__ == "__main__":
    GPTModel.block = ModernBlock
    main()
