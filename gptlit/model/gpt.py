"""The GPT-2 architecture: token ids -> logits, in plain torch.

Shapes: B batch, T tokens, C emb_dim, H heads, D head size (C = H * D), V vocabulary.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; module names of S. Raschka's
"Build a Large Language Model (From Scratch)", chapter 4.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from gptlit.config import GPTConfig
from gptlit.model.attention import causal_attention
from gptlit.model.kv_cache import KVCache, LayerCache


class MultiHeadAttention(nn.Module):
    """Causal self-attention with one fused projection to query, key and value: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    @override
    def forward(self, hidden: Tensor, cache: LayerCache | None = None) -> Tensor:
        query, key, value = self.project(hidden, cache)  # (B, H, T, D) each
        if cache is None:
            context = causal_attention(query, key, value, self.drop_rate if self.training else 0.0)  # (B, H, T, D)
        else:
            key, value, mask = cache.extend(key, value)  # (B, H, S, D), (B, H, S, D), (B, 1, T, S)
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (B, H, T, D)
        context = context.transpose(1, 2).reshape(hidden.shape)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return self.out_proj(context)  # type: ignore[no-any-return]

    def project(self, hidden: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, ...]:
        """Return query, key and value (B, H, T, D) of hidden states (B, T, C), which follow the tokens in the cache."""
        B, T, C = hidden.shape  # noqa: N806
        qkv = self.qkv(hidden).split(C, dim=-1)  # 3 x (B, T, C)
        return tuple(x.view(B, T, self.n_heads, -1).transpose(1, 2) for x in qkv)


class GELU(nn.Module):
    """x * Phi(x), with Phi approximated by tanh as in GPT-2.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":  # 1 + tanh(z) = 2 sigmoid(2z): twice as fast
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Sequential):
    """Two linear layers with a hidden size of 4 * C: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            GELU(),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward with residual connections: (B, T, C) -> (B, T, C).

    With `activation_checkpointing` only the block's input is saved; the rest is recomputed in backward.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.att = MultiHeadAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.emb_dim)
        self.norm2 = nn.LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    @override
    def forward(self, hidden: Tensor, cache: LayerCache | None = None) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(self._forward, hidden, use_reentrant=False)  # type: ignore[no-any-return]
        return self._forward(hidden, cache)

    def _forward(self, hidden: Tensor, cache: LayerCache | None = None) -> Tensor:
        hidden = hidden + self.drop_shortcut(self.att(self.norm1(hidden), cache))
        hidden = hidden + self.drop_shortcut(self.ff(self.norm2(hidden)))
        return hidden


class GPTModel(nn.Module):
    """GPT-2: token ids (B, T) -> logits (B, T, V), or (B, T, n_classes).

    Parameters are initialized in the order of the modules below: a seed gives the same weights as the book's code.
    """

    block = TransformerBlock  # assign a subclass to try another one: see examples/modern_block.py
    residual_in_fp32 = True  # under autocast to bf16; False: the residual stream is bf16 too

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[self.block(config) for _ in range(config.n_layers)])
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.n_classes or config.vocab_size, bias=config.n_classes > 0)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        self._init_as_gpt2()  # the layers have initialized themselves as torch does

    @override
    def forward(self, token_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) for int64 ids (B, T)."""
        return self.out_head(self.hidden(token_ids))  # type: ignore[no-any-return]

    def hidden(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the final hidden states (B, T, C), the input of the head, for int64 ids (B, T).

        Args:
            token_ids: The ids; with a cache, those that follow the cached ones.
            cache: Keys and values of the previous ids. Extended in place, except for `lengths`: see `KVCache.advance`.

        Raises:
            ValueError: The sequence is longer than `context_length`.
        """
        if token_ids.shape[1] > self.config.context_length:
            raise ValueError(
                f"a sequence of {token_ids.shape[1]} tokens is longer than context_length {self.config.context_length}"
            )
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)  # (T,)
        if cache is not None:
            positions = cache.positions(token_ids.shape[1])  # (B, T)
        hidden = self.drop_emb(self.tok_emb(token_ids) + self.pos_emb(positions))  # (B, T, C)
        device = hidden.device.type
        is_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        if is_bf16 and not self.residual_in_fp32:
            hidden = hidden.bfloat16()
        for layer, block in enumerate(self.trf_blocks):
            hidden = block(hidden, cache.layers[layer]) if cache is not None else block(hidden)  # (B, T, C)
        return self.final_norm(hidden)  # type: ignore[no-any-return]

    def init_weights(self) -> None:
        """(Re)initialize all parameters as the constructor does: the same seed gives the same weights."""
        for layer in self.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
        self._init_as_gpt2()

    def _init_as_gpt2(self) -> None:
        """Initialize with N(0, 0.02), divided by sqrt(2 * n_layers) in front of the residual stream, if `config.init`
        says so; a tied embedding in any case. Source: GPT-2, section 2.3.
        """
        if self.config.init == "gpt2":
            self.apply(self._init_module)
        if self.config.tie_weights:
            _init_normal(self.tok_emb)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            _init_normal(module)
        if isinstance(module, TransformerBlock):  # `apply` visits a block after its layers
            for projection in (module.att.out_proj, module.ff[2]):
                _init_normal(projection, 0.02 / math.sqrt(2 * self.config.n_layers))


def _init_normal(layer: nn.Module, std: float = 0.02) -> None:
    nn.init.normal_(layer.weight, std=std)  # type: ignore[arg-type]
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
