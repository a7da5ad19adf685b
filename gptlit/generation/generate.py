"""Autoregressive generation with a key-value cache.

Shapes: B rows, T tokens, C emb_dim, V vocabulary. Rows of different lengths are padded on the right.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gptlit.data.tokenizer import Tokenizer
from gptlit.errors import InputError
from gptlit.generation.sampling import Sampling
from gptlit.model.gpt import GPTModel
from gptlit.model.kv_cache import KVCache


@torch.no_grad()
def stream(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    *,
    generators: Sequence[torch.Generator | None] = (None,),
    use_cache: bool = True,
    cuda_graph: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue several prompts of any lengths; yield the next ids and their log-probabilities, (B,) each.

    Keys and values are cached while all rows fit the context. After that the window slides, which changes every
    position, so that each token takes a full forward pass. The text is the same as without a cache.

    Args:
        model: In evaluation mode.
        prompts: Token ids, at least one per row.
        max_new_tokens: Number of steps.
        sampling: How to sample. Log-probabilities are the model's own, before temperature, top-k and top-p.
        generators: One for all rows, or one per row, so that a row's text does not depend on the others.
        use_cache: False runs a full forward pass for each token.
        cuda_graph: On a GPU, capture the cached step once and replay it: a step of one token is bound by kernel
            launches. Not for a sharded model.

    Raises:
        InputError: A prompt is empty, or max_new_tokens is negative.
        ValueError: An id is outside the vocabulary.
    """
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not prompts or not all(prompts):
        raise InputError("the prompt is empty: at least one token is needed")
    context_length, device = model.config.context_length, model.pos_emb.weight.device
    rows = [list(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    next_ids = torch.tensor([row[-1] for row in rows], device=device)
    cache: KVCache | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    for step in range(max_new_tokens):
        if not use_cache or longest + step > context_length:
            logits = _forward(model, rows)
        elif cache is None:
            capacity = min(context_length, longest + max_new_tokens)
            cache = KVCache(model.config, len(rows), capacity, device, _activation_dtype(model))
            logits = _forward(model, rows, cache)
        else:
            decode = decode or _decoder(model, cache, cuda_graph and device.type == "cuda")
            logits = decode(next_ids)
            cache.advance(1)
        next_ids = sampling.draw(logits, generators)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        yield next_ids, log_probs.gather(-1, next_ids[:, None])[:, 0]
        for row, next_id in zip(rows, next_ids.tolist(), strict=True):
            row.append(next_id)


def _forward(model: GPTModel, rows: Sequence[Sequence[int]], cache: KVCache | None = None) -> Tensor:
    """Return the logits (B, V) that follow the last `context_length` ids of each row, and fill an empty cache."""
    context_length, device = model.config.context_length, model.pos_emb.weight.device
    lengths = torch.tensor([min(len(row), context_length) for row in rows], device=device)
    with torch.compiler.set_stance("force_eager"):  # it would be compiled again for each length
        hidden = model.hidden(_padded(rows, context_length, device), cache)  # (B, T, C)
    if cache is not None:
        cache.advance(lengths)
    return model.out_head(hidden[torch.arange(len(rows), device=device), lengths - 1])  # type: ignore[no-any-return]


def _decoder(model: GPTModel, cache: KVCache, cuda_graph: bool) -> Callable[[Tensor], Tensor]:
    """Return the cached step, next ids (B,) -> logits (B, V), optionally captured in a CUDA graph."""

    def decode(ids: Tensor) -> Tensor:
        return model.out_head(model.hidden(ids[:, None], cache)[:, 0])  # type: ignore[no-any-return]

    if not cuda_graph:
        return decode
    static_ids = torch.zeros_like(cache.lengths)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode(static_ids)  # warm-up; the keys and values that it writes are overwritten
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_logits = decode(static_ids)

    def replay(ids: Tensor) -> Tensor:
        static_ids.copy_(ids)
        graph.replay()
        return static_logits

    return replay


def _padded(rows: Sequence[Sequence[int]], context_length: int, device: torch.device) -> Tensor:
    """Return the last `context_length` ids of each row, padded on the right, int64 (B, T)."""
    tails = [torch.tensor(row[-context_length:]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device)


def _activation_dtype(model: GPTModel) -> torch.dtype:
    device = model.pos_emb.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.pos_emb.weight.dtype


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
    """Continue each row of `token_ids`, int64 (B, T); return prompts and new ids, int64 (B, T + n).

    Args:
        model: The model; its training mode is restored afterwards.
        token_ids: The prompts, all of the same length of at least 1.
        max_new_tokens: n; fewer if every row has reached `eos_id`.
        temperature: As in `Sampling`, like `top_k` and `top_p`.
        top_k: Sample from the k most likely tokens.
        top_p: Sample from the smallest set of tokens with this total probability.
        eos_id: A row that has sampled it is padded with it.
        generator: On the device of the model.

    Raises:
        InputError: A setting is out of range, or the prompt is empty.
        ValueError: An id is outside the vocabulary.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if token_ids.ndim != 2:
        raise InputError(f"token_ids must be (rows, tokens), got the shape {tuple(token_ids.shape)}")
    was_training = model.training
    model.eval()
    finished = torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)
    try:
        for next_ids, _ in stream(model, token_ids.tolist(), max_new_tokens, sampling, generators=(generator,)):
            if eos_id is not None:
                next_ids = next_ids.masked_fill(finished, eos_id)
                finished |= next_ids == eos_id
            token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
            if eos_id is not None and bool(finished.all()):
                break
    finally:
        model.train(was_training)
    return token_ids


# --- text -------------------------------------------------------------------------------------------------------


@dataclass
class Completion:
    """One continuation of one prompt.

    Args:
        prompt: The text that was continued.
        text: The continuation, without the stop string.
        token_ids: The sampled ids, including the end-of-text token.
        log_probs: Log-probability of each, in nats, before temperature, top-k and top-p.
        reason: Why it ended: "length", "stop" (a stop string) or "end" (the end-of-text token).
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    reason: Literal["length", "stop", "end"] = "length"


class _Writer:
    """Incrementally detokenizes one row, up to a stop string or the end-of-text token.

    Text is held back while it may still be the beginning of a stop string or of a multi-byte character.
    """

    def __init__(self, tokenizer: Tokenizer, completion: Completion, stop: Sequence[str]) -> None:
        self.completion = completion
        self.finished = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token_id: int, log_prob: float) -> str:
        """Append an id; return the text that has become final."""
        self.completion.token_ids.append(token_id)
        self.completion.log_probs.append(log_prob)
        if token_id == self._tokenizer.eot_token:
            return self.close("end")
        self._held += self._decoder.decode(self._tokenizer.decode_single_token_bytes(token_id))
        cuts = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if cuts:
            self._held = self._held[: min(cuts)]
            return self.close("stop")
        return self._release(max((_overlap(self._held, stop) for stop in self._stop), default=0))

    def close(self, reason: Literal["length", "stop", "end"]) -> str:
        """End the text; return what was held back."""
        self.finished = True
        self.completion.reason = reason
        if reason != "stop":
            self._held += self._decoder.decode(b"", final=True)
        return self._release(0)

    def _release(self, keep: int) -> str:
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.completion.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def complete(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 100,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    *,
    stop: Sequence[str] = (),
    seed: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continue a batch of texts.

    Args:
        model: In evaluation mode.
        tokenizer: The one the model was trained with.
        prompts: Texts of at least one character, of any lengths.
        max_new_tokens: Maximum length of a continuation, in tokens.
        sampling: How to sample.
        stop: Strings that end a continuation and are not part of it.
        seed: Row n has its own generator, seeded with `seed + n`, so that it does not depend on the other rows; None:
            random.
        on_text: Called with (row, text) as soon as text is final.

    Raises:
        InputError: A prompt or a stop string is empty.
    """
    if not all(prompts):
        raise InputError("a prompt is empty: give at least one character")
    if not all(stop):
        raise InputError("a stop string is empty: it would end every text immediately")
    device = model.pos_emb.weight.device
    first = torch.seed() if seed is None else seed
    generators = [torch.Generator(device).manual_seed((first + row) % 2**63) for row in range(len(prompts))]
    writers = [_Writer(tokenizer, Completion(prompt), stop) for prompt in prompts]

    def emit(row: int, text: str) -> None:
        if text and on_text is not None:
            on_text(row, text)

    ids = [tokenizer.encode_ordinary(prompt) for prompt in prompts]
    steps = stream(model, ids, max_new_tokens, sampling, generators=generators, cuda_graph=True)
    for next_ids, log_probs in steps:
        values = zip(writers, next_ids.tolist(), log_probs.tolist(), strict=True)
        for row, (writer, next_id, log_prob) in enumerate(values):
            if not writer.finished:
                emit(row, writer.add(next_id, log_prob))
        if all(writer.finished for writer in writers):
            break
    for row, writer in enumerate(writers):
        if not writer.finished:
            emit(row, writer.close("length"))
    return [writer.completion for writer in writers]
