"""The architecture of a GPT, and the four sizes that OpenAI released."""

from dataclasses import dataclass, replace
from typing import Any, Literal

GPT_CONFIG_124M: dict[str, Any] = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of a GPT. The defaults are `GPT_CONFIG_124M`.

    | here | nanoGPT | Hugging Face |
    | --- | --- | --- |
    | context_length | block_size | n_positions |
    | emb_dim | n_embd | n_embd |
    | n_heads | n_head | n_head |
    | n_layers | n_layer | n_layer |
    | drop_rate | dropout | embd_pdrop, attn_pdrop, resid_pdrop |

    Args:
        vocab_size: Number of token ids, of the tokenizer.
        context_length: Longest sequence, in tokens.
        emb_dim: Width of the residual stream.
        n_heads: Attention heads per block; must divide `emb_dim`.
        n_layers: Transformer blocks.
        drop_rate: Dropout on embeddings, attention weights and shortcuts, 0 <= drop_rate < 1.
        qkv_bias: Whether query, key and value have a bias (OpenAI's weights do).
        tie_weights: Whether the output head shares the token embedding's weight (as in OpenAI's weights).
        init: "torch" uses the default of each layer, "gpt2" GPT-2's N(0, 0.02). A tied embedding is initialized as in
            GPT-2 in both cases: torch's N(0, 1) would make the first loss huge.
        n_classes: 0 is a language model. Otherwise the head, which has a bias and is never tied, gives one logit for
            each of the classes of a text.

    Raises:
        ValueError: A value is out of its range; the message names key, value and rule.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_weights: bool = False
    init: Literal["torch", "gpt2"] = "torch"
    n_classes: int = 0

    def __post_init__(self) -> None:
        for key in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} must be a positive integer, got {value!r}")
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be at least 0 and below 1, got {self.drop_rate!r}")
        if self.init not in ("torch", "gpt2"):
            raise ValueError(f"init must be 'torch' or 'gpt2', got {self.init!r}")
        if not isinstance(self.n_classes, int) or self.n_classes < 0 or self.n_classes == 1:
            raise ValueError(f"n_classes must be 0 (a language model) or at least 2, got {self.n_classes!r}")
        if self.n_classes and self.tie_weights:
            raise ValueError(f"tie_weights must be false with n_classes {self.n_classes}: that head is no embedding")

    @property
    def summary(self) -> str:
        """The architecture in words: "12 layers, 12 heads, 768 wide, context 1024"."""
        counts = ((self.n_layers, "layer"), (self.n_heads, "head"))
        words = [f"{count} {noun}{'s' * (count > 1)}" for count, noun in counts]
        return ", ".join([*words, f"{self.emb_dim} wide", f"context {self.context_length}"])


PRESETS: dict[str, GPTConfig] = {
    "gpt2-small": GPTConfig(),
    "gpt2-medium": replace(GPTConfig(), emb_dim=1024, n_layers=24, n_heads=16),
    "gpt2-large": replace(GPTConfig(), emb_dim=1280, n_layers=36, n_heads=20),
    "gpt2-xl": replace(GPTConfig(), emb_dim=1600, n_layers=48, n_heads=25),
}
