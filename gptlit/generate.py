"""Sampling: logits -> the next token, and the loop around it."""

import torch
from torch import Tensor

from gptlit.errors import InputError
from gptlit.model import GPTModel


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, max_new_tokens: int = 1) -> None:
    """Insist on settings that mean something.

    Raises:
        InputError: A value is out of its range.
    """
    if not temperature >= 0 or temperature == float("inf"):
        raise InputError(f"temperature must be at least 0, got {temperature} (0 always takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k} (leave it out to keep every token)")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be at least 0, got {max_new_tokens}")


def next_token_probabilities(
    logits: Tensor, *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the distribution to draw from, float32 (B, V), for logits (B, V) and a temperature above 0.

    The k likeliest tokens are kept, then the smallest set of them whose probabilities reach p.
    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p).
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = torch.topk(logits, top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ranked.cumsum(dim=-1) - ranked >= top_p  # what stands before a token reaches p already
        ranked = ranked.masked_fill(beyond, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked / ranked.sum(dim=-1, keepdim=True))
    return probabilities


@torch.no_grad()
def generate(
    model: GPTModel,
    token_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of `token_ids`, int64 (B, T); return prompt and new ids, int64 (B, T + n).

    When the context is full the window slides: a token is predicted from the `context_length` ids before it.

    Args:
        model: The model; put back into its mode afterwards.
        token_ids: The prompts, all of one length of at least 1.
        max_new_tokens: n; fewer when every row has met `eos_id`.
        temperature: 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the smallest set of tokens that has this probability.
        eos_id: A row that has drawn it is filled up with it.
        generator: Source of randomness, on the device of the model.

    Raises:
        InputError: A setting is out of its range, or the prompt is empty.
        ValueError: An id is outside the vocabulary.
    """
    check_sampling(temperature, top_k, top_p, max_new_tokens)
    if token_ids.ndim != 2 or token_ids.shape[1] == 0:
        raise InputError(
            f"the prompt is empty: token_ids has shape {tuple(token_ids.shape)}, at least one id is needed"
        )
    was_training = model.training
    model.eval()
    finished = torch.zeros(len(token_ids), 1, dtype=torch.bool, device=token_ids.device)
    try:
        for _ in range(max_new_tokens):
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                logits = model(token_ids[:, -model.config.context_length :])[:, -1]  # (B, V)
            if temperature == 0:
                next_ids = logits.argmax(dim=-1, keepdim=True)
            else:
                chances = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                next_ids = torch.multinomial(chances, 1, generator=generator)  # (B, 1)
            if eos_id is not None:
                next_ids = next_ids.masked_fill(finished, eos_id)
                finished |= next_ids == eos_id
            token_ids = torch.cat([token_ids, next_ids], dim=1)
            if eos_id is not None and bool(finished.all()):
                break
    finally:
        model.train(was_training)
    return token_ids
