"""Labels of texts, by a classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptlit.data.rows import Labels
from gptlit.data.tokenizer import Tokenizer
from gptlit.model.gpt import GPTModel


@torch.inference_mode()
def classify(
    model: GPTModel, tokenizer: Tokenizer, texts: Sequence[str], labels: Labels, batch_size: int = 8
) -> Tensor:
    """Return the probabilities (N, K) of the labels of texts, which are cut and padded as in training.

    Args:
        model: A classifier, in evaluation mode.
        tokenizer: Its tokenizer.
        texts: None of them empty.
        labels: What it was trained to predict.
        batch_size: Texts at once.
    """
    limit = min(model.config.context_length, labels.row_length or model.config.context_length)
    device, probs = model.tok_emb.weight.device, []
    for start in range(0, len(texts), batch_size):
        rows = [tokenizer.encode_ordinary(text)[:limit] for text in texts[start : start + batch_size]]
        length = labels.row_length or max(map(len, rows))
        padded = [ids + [tokenizer.eot_token] * (length - len(ids)) for ids in rows]
        last = [len(ids) - 1 if labels.position is None else labels.position for ids in rows]
        hidden = model.hidden(torch.tensor(padded, device=device))  # (B, T, C)
        probs.append(model.out_head(hidden[range(len(rows)), last]).float().softmax(-1))  # (B, K)
    return torch.cat(probs)
