"""The GPT-2 architecture: token ids -> logits, in plain torch.

Shapes: B batch, T tokens, C emb_dim, H heads, D head size (C = H * D), V vocabulary.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; module names of S. Raschka's
"Build a Large Language Model (From Scratch)", chapter 4.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptlit.config import GPTConfig
from gptlit.model.attention import causal_attention
from gptlit.model.kv_cache import KVCache, LayerCache

LayerContext = Callable[[nn.Module], AbstractContextManager[None]]


def _plain(_: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


class MultiHeadAttention(nn.Module):
    """Causal self-attention with one fused projection to query, key and value: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, hidden: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        B, T, C = hidden.shape  # noqa: N806
        parts = self.qkv(hidden).split(C, dim=-1)
        query, key, value = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in parts)  # (B, H, T, D)
        if cache is None:
            context = causal_attention(query, key, value, self.drop_rate if self.training else 0.0)
        else:
            key, value, seen = cache.extend(key, value)  # (B, H, S, D) twice, (B, 1, T, S)
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]


class GELU(nn.Module):
    """x times the normal distribution function of x, approximated by tanh.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; GPT-2's form.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":  # the same by its exponential: twice as fast
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Sequential):
    """Two linear layers, four times wider in between: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            GELU(),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added to its shortcut: (B, T, C) -> (B, T, C).

    With `recompute` a training step keeps only the block's input and computes the rest again on the way back.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.recompute = False
        self.att = MultiHeadAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.emb_dim)
        self.norm2 = nn.LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, hidden: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self._forward, hidden, use_reentrant=False)  # type: ignore[no-any-return]
        return self._forward(hidden, cache)

    def _forward(self, hidden: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        hidden = hidden + self.drop_shortcut(self.att(self.norm1(hidden), cache))
        hidden = hidden + self.drop_shortcut(self.ff(self.norm2(hidden)))
        return hidden


class GPTModel(nn.Module):
    """GPT-2: token ids (B, T) -> logits (B, T, V).

    Parameters are drawn in the order of the modules below, so that a seed gives the same weights as the book's code.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        self._draw_as_gpt2(_plain)  # what torch draws, the layers have drawn

    def init_weights(self, whole: LayerContext = _plain) -> None:
        """Draw all weights anew, as the constructor does: the same seed gives the same ones.

        Args:
            whole: A context for each layer while it draws; a sharded model makes its parameters whole in it.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding | nn.LayerNorm):
                with whole(layer):
                    layer.reset_parameters()
        self._draw_as_gpt2(whole)

    def _draw_as_gpt2(self, whole: LayerContext) -> None:
        """N(0, 0.02) everywhere, scaled down where a block adds to the residual stream. Source: GPT-2, section 2.3.

        A tied embedding is drawn so in any case.
        """

        def draw(layer: nn.Module, std: float = 0.02) -> None:
            with whole(layer):
                nn.init.normal_(layer.weight, std=std)  # type: ignore[arg-type]
                if getattr(layer, "bias", None) is not None:
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

        def visit(module: nn.Module) -> None:
            if isinstance(module, nn.Linear | nn.Embedding):
                draw(module)
            if isinstance(module, TransformerBlock):  # `apply` visits a block after its layers
                draw(module.att.out_proj, 0.02 / math.sqrt(2 * self.config.n_layers))
                draw(module.ff[2], 0.02 / math.sqrt(2 * self.config.n_layers))

        if self.config.init == "gpt2":
            self.apply(visit)
        if self.config.tie_weights:
            draw(self.tok_emb)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) for int64 ids (B, T).

        Raises:
            ValueError: As in `hidden`.
        """
        return self.out_head(self.hidden(token_ids))  # type: ignore[no-any-return]

    def hidden(self, token_ids: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Return what the head reads, (B, T, C), for int64 ids (B, T): all but the largest product.

        Args:
            token_ids: The ids; with a cache, those that follow what it has seen.
            cache: Keys and values of the ids before; they are added to it, but its `lengths` are the caller's.

        Raises:
            ValueError: The sequence is longer than `context_length`, or (on a CPU, where looking is free) an id is
                outside the vocabulary.
        """
        self._check(token_ids)
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)  # (T,)
        if cache is not None:
            positions = cache.positions(token_ids.shape[1])  # (B, T)
        hidden = self.drop_emb(self.tok_emb(token_ids) + self.pos_emb(positions))  # (B, T, C)
        for layer, block in enumerate(self.trf_blocks):
            hidden = block(hidden, cache.layers[layer]) if cache is not None else block(hidden)
        return self.final_norm(hidden)  # type: ignore[no-any-return]

    def _check(self, token_ids: Tensor) -> None:
        if token_ids.shape[1] > self.config.context_length:
            raise ValueError(
                f"a sequence of {token_ids.shape[1]} tokens is longer than context_length {self.config.context_length}"
            )
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling() and token_ids.numel():
            low, high = torch.aminmax(token_ids)
            if low < 0 or high >= self.config.vocab_size:
                wrong = int(low if low < 0 else high)
                raise ValueError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size} ids")
