"""Causal attention in blocks of queries, for compiled models on a CPU; everywhere else torch's own is faster.

Each block of queries meets only the keys up to its end, so that little is computed for nothing, and the probabilities
are computed again on the way back, so that none are kept. Source: Dao et al. 2022, "FlashAttention".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries


def causal_attention(query: Tensor, key: Tensor, value: Tensor, drop_rate: float = 0.0) -> Tensor:
    """Return softmax(query @ key.T / sqrt(D)) @ value, each token seeing itself and those before: (B, H, T, D)."""
    is_compiled_here = torch.compiler.is_compiling() and query.device.type == "cpu" and query.dtype == torch.bfloat16
    if is_compiled_here and not drop_rate:
        heads = (part.flatten(0, 1).contiguous() for part in (query, key, value))
        return BlockedAttention.apply(*heads).view(query.shape)  # type: ignore[no-any-return,no-untyped-call]
    return F.scaled_dot_product_attention(query, key, value, dropout_p=drop_rate, is_causal=True)


class BlockedAttention(torch.autograd.Function):
    """Causal attention of (N, T, D) queries, keys and values; scores and sums in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs, sums = [], []
        for first in range(0, query.shape[1], BLOCK):
            scores = _scores(query, key, first)
            log_sum = scores.logsumexp(-1, keepdim=True)
            probs = (scores - log_sum).exp().to(value.dtype)
            outputs.append(probs @ value[:, : probs.shape[-1]])
            sums.append(log_sum)
        output, log_sums = torch.cat(outputs, dim=1), torch.cat(sums, dim=1)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        shared = (gradient.float() * output.float()).sum(-1, keepdim=True)
        to_query, to_key, to_value = [], [], []  # in parts, the last one first
        keys = values = gradient.new_zeros(())  # sums over the queries so far, of tokens that earlier ones see too
        for first in reversed(range(0, query.shape[1], BLOCK)):
            rows, columns = slice(first, first + BLOCK), slice(0, first + BLOCK)
            probs = (_scores(query, key, first) - log_sums[:, rows]).exp()
            grad_probs = (gradient[:, rows] @ value[:, columns].transpose(1, 2)).float()
            to_scores = (probs * (grad_probs - shared[:, rows]) * query.shape[-1] ** -0.5).to(query.dtype)
            to_query.append(to_scores @ key[:, columns])
            keys = keys + (to_scores.transpose(1, 2) @ query[:, rows]).float()
            values = values + (probs.to(value.dtype).transpose(1, 2) @ gradient[:, rows]).float()
            to_key.append(keys[:, first:].to(key.dtype))
            to_value.append(values[:, first:].to(value.dtype))
            keys, values = keys[:, :first], values[:, :first]
        to_heads = (torch.cat(parts[::-1], dim=1) for parts in (to_query, to_key, to_value))
        return tuple(to_heads)


def _scores(query: Tensor, key: Tensor, first: int) -> Tensor:
    """Return the scaled scores of a block of queries with all keys up to its end, those of later tokens -inf."""
    last = min(first + BLOCK, query.shape[1])
    scores: Tensor = (query[:, first:last] @ key[:, :last].transpose(1, 2)).float() * query.shape[-1] ** -0.5
    positions = torch.arange(last, device=query.device)
    return scores.masked_fill(positions > positions[first:, None], -torch.inf)
