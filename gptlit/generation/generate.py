"""Autoregressive generation with a key-value cache.

Shapes: B rows, T tokens, C emb_dim, V vocabulary. Rows of different lengths are padded on the right.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    generator: torch.Generator | None = None,
    cuda_graph: bool = False,
) -> Iterator[Tensor]:
    """Continue prompts of any lengths; yield the next ids of all rows, int64 (B,).

    Keys and values are cached while all rows fit the context. After that the window slides, which changes every
    position, so that each token takes a full forward pass.

    Args:
        model: In evaluation mode.
        prompts: Token ids, at least one per row.
        generator: On the device of the model.
        cuda_graph: On a GPU, capture the cached step and replay it, to save kernel launches; not for a sharded model.
    """
    if not prompts or not all(prompts):
        raise InputError("the prompt is empty: at least one token is needed")
    rows = [list(prompt) for prompt in prompts]
    longest, context_length = max(map(len, rows)), model.config.context_length
    next_ids = torch.tensor([row[-1] for row in rows], device=model.pos_emb.weight.device)
    cache: KVCache | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    for step in range(max_new_tokens):
        if longest + step > context_length:
            logits = _forward(model, rows)
        elif cache is None:
            size = 1 << (longest + max_new_tokens - 1).bit_length()  # a step is compiled for each size
            cache = KVCache(model, len(rows), min(context_length, size))
            logits = _forward(model, rows, cache)
        else:
            decode = decode or _decoder(model, cache, cuda_graph)
            logits = decode(next_ids)
            cache.advance(1)
        next_ids = sampling.draw(logits, generator)
        yield next_ids
        for row, next_id in zip(rows, next_ids.tolist(), strict=True):
            row.append(next_id)


def _forward(model: GPTModel, rows: Sequence[Sequence[int]], cache: KVCache | None = None) -> Tensor:
    """Return the logits (B, V) that follow the last `context_length` ids of each row, and fill an empty cache."""
    device = model.pos_emb.weight.device
    tails = [torch.tensor(row[-model.config.context_length :], device=device) for row in rows]
    lengths = torch.tensor([len(tail) for tail in tails], device=device)
    token_ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True)  # (B, T)
    with torch.compiler.set_stance("force_eager"):  # it would be compiled again for each length
        hidden = model.hidden(token_ids, cache)  # (B, T, C)
    if cache is not None:
        cache.advance(lengths)
    return model.out_head(hidden[torch.arange(len(rows), device=device), lengths - 1])  # type: ignore[no-any-return]


def _decoder(model: GPTModel, cache: KVCache, cuda_graph: bool) -> Callable[[Tensor], Tensor]:
    """Return the cached step, next ids (B,) -> logits (B, V), optionally captured in a CUDA graph."""

    def decode(ids: Tensor) -> Tensor:
        return model.out_head(model.hidden(ids[:, None], cache)[:, 0])  # type: ignore[no-any-return]

    if not (cuda_graph and cache.lengths.is_cuda):
        return decode
    static_ids = torch.zeros_like(cache.lengths)
    side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        decode(static_ids)  # warm-up; the keys and values that it writes are overwritten
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_logits = decode(static_ids)

    def replay(ids: Tensor) -> Tensor:
        static_ids.copy_(ids)
        graph.replay()
        return static_logits

    return replay


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
        temperature: 0 is greedy; like `top_k` and `top_p`, as in `Sampling`.
        eos_id: A row that has sampled it is padded with it.
        generator: On the device of the model.

    Raises:
        InputError: A setting is out of range, or the prompt is empty.
    """
    sampling = Sampling(temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    finished = torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)
    try:
        for next_ids in stream(model, token_ids.tolist(), max_new_tokens, sampling, generator):
            if eos_id is not None:
                next_ids = next_ids.masked_fill(finished, eos_id)
                finished |= next_ids == eos_id
            token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
            if finished.all():
                break
    finally:
        model.train(was_training)
    return token_ids


# --- text -------------------------------------------------------------------------------------------------------


@dataclass
class Completion:
    """One continuation of one prompt."""

    prompt: str
    text: str = ""  # without the stop string
    token_ids: list[int] = field(default_factory=list)  # sampled, including the end-of-text token
    reason: Literal["length", "stop", "end"] = "length"  # why it ended: "stop" by a stop string, "end" by that token


class _Row:
    """Detokenizes one row as its ids arrive, up to a stop string or the end-of-text token.

    Text is held back while it may still be the beginning of a stop string or of a multi-byte character.
    """

    def __init__(self, prompt: str, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.completion = Completion(prompt)
        self.is_finished = False
        self._tokenizer, self._stop, self._on_text = tokenizer, stop, on_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token_id: int) -> None:
        self.completion.token_ids.append(token_id)
        if token_id == self._tokenizer.eot_token:
            return self.finish("end")
        self._held += self._decoder.decode(self._tokenizer.decode_single_token_bytes(token_id))
        if cuts := [self._held.index(stop) for stop in self._stop if stop in self._held]:
            self._held = self._held[: min(cuts)]
            return self.finish("stop")
        self._release(keep=max(map(len, self._stop), default=1) - 1)

    def finish(self, reason: Literal["length", "stop", "end"]) -> None:
        self.is_finished, self.completion.reason = True, reason
        if reason != "stop":
            self._held += self._decoder.decode(b"", final=True)
        self._release(keep=0)

    def _release(self, keep: int) -> None:
        end = max(0, len(self._held) - keep)
        text, self._held = self._held[:end], self._held[end:]
        if text:
            self.completion.text += text
            self._on_text(text)


def complete(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 100,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    stop: Sequence[str] = (),
    seed: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continue a batch of texts of any lengths.

    Args:
        model: In evaluation mode.
        tokenizer: The one the model was trained with.
        prompts: Texts of at least one character, or ids.
        stop: Strings that end a continuation and are not part of it.
        seed: The same seed gives the same texts; None: random.
        on_text: Called with (row, text) as soon as text is final.

    Raises:
        InputError: A prompt or a stop string is empty.
    """
    if not all(prompts) or not all(stop):
        raise InputError("a prompt or a stop string is empty: give at least one character")
    seed = (torch.seed() if seed is None else seed) % 2**63
    generator = torch.Generator(model.pos_emb.weight.device).manual_seed(seed)
    show = on_text or (lambda row, text: None)
    ids = [tokenizer.encode_ordinary(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt)) for prompt in prompts]
    rows = [_Row(text, tokenizer, stop, partial(show, index)) for index, text in enumerate(texts)]
    for next_ids in stream(model, ids, max_new_tokens, sampling, generator, cuda_graph=True):
        for row, next_id in zip(rows, next_ids.tolist(), strict=True):
            if not row.is_finished:
                row.add(next_id)
        if all(row.is_finished for row in rows):
            break
    for row in rows:
        if not row.is_finished:
            row.finish("length")
    return [row.completion for row in rows]
