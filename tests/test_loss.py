"""The loss against its definition."""

import torch

from gptlit.loss import next_token_loss


def test_mean_and_sum_leave_out_what_has_no_target() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 6], [0, 2, -100]])
    chances = torch.log_softmax(logits, dim=-1)
    expected = -sum(chances[b, t, targets[b, t]] for b, t in ((0, 0), (0, 2), (1, 0), (1, 1)))
    torch.testing.assert_close(next_token_loss(logits, targets, reduction="sum"), expected)
    torch.testing.assert_close(next_token_loss(logits, targets), expected / 4)
    half = logits.bfloat16()
    torch.testing.assert_close(next_token_loss(half, targets), next_token_loss(half.float(), targets))
