"""Causal attention: torch's kernels, and one of our own in bf16 for compiled models on a CPU, where it is faster
(not with AMX, which torch's kernel uses).

The latter computes one block of queries after the other against the keys up to its end, which skips most of the masked
scores, and recomputes the probabilities in backward instead of saving them. Source: Dao et al. 2022, "FlashAttention".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries
HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, drop_rate: float = 0.0) -> Tensor:
    """Return softmax(query @ key.T / sqrt(D)) @ value with a causal mask: (B, H, T, D)."""
    is_bf16_here = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not HAS_AMX
    if torch.compiler.is_compiling() and is_bf16_here and not drop_rate:
        heads = (x.flatten(0, 1).contiguous() for x in (query, key, value))  # (B * H, T, D) each
        return BlockedAttention.apply(*heads).view(query.shape)  # type: ignore[no-any-return,no-untyped-call]
    return F.scaled_dot_product_attention(query, key, value, dropout_p=drop_rate, is_causal=True)


class BlockedAttention(torch.autograd.Function):
    """Causal attention of (N, T, D) queries, keys and values; scores and sums in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs, log_sums = [], []
        for start in range(0, query.shape[1], BLOCK):
            scores = _scores(query, key, start)  # (N, block, end)
            log_sum = scores.logsumexp(-1, keepdim=True)  # (N, block, 1)
            probs = (scores - log_sum).exp().to(value.dtype)
            outputs.append(probs @ value[:, : probs.shape[-1]])  # (N, block, D)
            log_sums.append(log_sum)
        output, log_sum = torch.cat(outputs, dim=1), torch.cat(log_sums, dim=1)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        delta = (grad_output.float() * output.float()).sum(-1, keepdim=True)  # (N, T, 1)
        grad_query, grad_key, grad_value = [], [], []  # blocks, the last one first
        sum_key = sum_value = grad_output.new_zeros(())  # over the blocks so far, in float32
        for start in reversed(range(0, query.shape[1], BLOCK)):
            rows, columns = slice(start, start + BLOCK), slice(0, start + BLOCK)
            probs = (_scores(query, key, start) - log_sum[:, rows]).exp()  # (N, block, end)
            grad_probs = (grad_output[:, rows] @ value[:, columns].transpose(1, 2)).float()
            grad_scores = (probs * (grad_probs - delta[:, rows]) * query.shape[-1] ** -0.5).to(query.dtype)
            grad_query.append(grad_scores @ key[:, columns])  # (N, block, D)
            sum_key = sum_key + (grad_scores.transpose(1, 2) @ query[:, rows]).float()  # (N, end, D)
            sum_value = sum_value + (probs.to(value.dtype).transpose(1, 2) @ grad_output[:, rows]).float()
            grad_key.append(sum_key[:, start:].to(key.dtype))  # (N, block, D): no earlier query attends to them
            grad_value.append(sum_value[:, start:].to(value.dtype))
            sum_key, sum_value = sum_key[:, :start], sum_value[:, :start]
        return tuple(torch.cat(blocks[::-1], dim=1) for blocks in (grad_query, grad_key, grad_value))


def _scores(query: Tensor, key: Tensor, start: int) -> Tensor:
    """Return the masked scores (N, block, end) of the block of queries at `start` with all keys up to its end."""
    end = min(start + BLOCK, query.shape[1])
    scores: Tensor = (query[:, start:end] @ key[:, :end].transpose(1, 2)).float() * query.shape[-1] ** -0.5
    positions = torch.arange(end, device=query.device)
    return scores.masked_fill(positions > positions[start:, None], -torch.inf)
