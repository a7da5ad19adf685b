"""Another block in GPT-2's place: RMSNorm and SwiGLU instead of LayerNorm and GELU.

    python examples/modern_block.py fit --config quickstart --run.name modern
    python examples/modern_block.py generate --checkpoint runs/modern --prompt "Return the"
    python -m gptlit plot runs/quickstart runs/modern --out blocks.png

All commands but `import` and `export`, whose formats are GPT-2's, work with the new block: resuming, several devices,
LoRA, generation. Its checkpoints need this script.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from gptlit import GPTConfig, GPTModel
from gptlit.commands.main import main
from gptlit.model.gpt import TransformerBlock


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


class ModernBlock(TransformerBlock):
    """A pre-norm block with RMSNorm and SwiGLU. Source: Touvron et al. 2023, "LLaMA"."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.ff = SwiGLU(config)
        self.norm1 = nn.RMSNorm(config.emb_dim)
        self.norm2 = nn.RMSNorm(config.emb_dim)


if __name__ == "__main__":
    GPTModel.block = ModernBlock
    main()
