"""Generation compared with Transformers: random weights of the same shape, same prompts, greedy decoding."""

import time
from pathlib import Path
from typing import Any

PROMPT = 32  # tokens


def run(
    out: str = "generate.json",
    new_tokens: int = 64,
    rounds: int = 4,
    batch_sizes: tuple[int, ...] = (1, 8),
) -> None:
    """Compare tokens per second of the 124M model: fp32, bf16 and int8 in gptlit, fp32 and bf16 in Transformers.

    Args:
        out: JSON file for the results; a table is printed.
        new_tokens: Number of generated tokens.
        rounds: Measurements of each contender, in A B B A order.
        batch_sizes: Batch sizes.
    """
    from benchmarks.contenders import compare

    contenders = {
        f"{name} batch {size}": ("benchmarks.generate", {"name": name, "size": size, "new_tokens": new_tokens})
        for size in batch_sizes
        for name in ("transformers fp32", "gptlit fp32", "transformers bf16", "gptlit bf16", "gptlit int8")
    }
    pairs = [
        (f"gptlit {ours} batch {size}", f"transformers {theirs} batch {size}")
        for size in batch_sizes
        for ours, theirs in (("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16"))
    ]
    compare("tokens per second", contenders, pairs, "steady", Path(out), rounds=rounds)


def contender(name: str, size: int, new_tokens: int, device: str = "cpu", toy: bool = False) -> Any:
    """Return a function that generates once and returns its measurements; called in the contender's process."""
    import torch

    torch.set_default_device(device)

    project, precision = name.split()
    single = size == 1  # int8 weights are then packed and compiled, with activations in fp32
    dtype = torch.float32 if precision == "fp32" or (precision == "int8" and single) else torch.bfloat16
    torch.manual_seed(0)
    prompts = torch.randint(0, 50257, (size, PROMPT))
    if project == "transformers":
        return _transformers(prompts, new_tokens, dtype, {"n_layer": 1, "n_embd": 48} if toy else {})
    shape = {"n_layers": 1, "emb_dim": 48} if toy else {}
    return _gptlit(prompts, new_tokens, dtype, "int8" if precision == "int8" else None, shape)


def _gptlit(prompts: Any, new_tokens: int, dtype: Any, quantize: str | None, shape: dict[str, int]) -> Any:
    from gptlit.config import GPTConfig
    from gptlit.generation.fast_linear import for_generation
    from gptlit.generation.generate import stream
    from gptlit.model.gpt import GPTModel

    model = GPTModel(GPTConfig(tie_weights=True, qkv_bias=True, init="gpt2", **shape)).eval().to(dtype)
    for_generation(model, quantize, compile=len(prompts) == 1 and not shape)
    rows = prompts.tolist()

    def once() -> dict[str, float]:
        began = time.perf_counter()
        steps = stream(model, rows, new_tokens + 1, cuda_graph=prompts.is_cuda)
        next(steps).tolist()  # waits for the device
        first = time.perf_counter()
        count = sum(1 for _ in steps)
        return {"first": first - began, "steady": count * len(rows) / (time.perf_counter() - first)}

    return once


def _transformers(prompts: Any, new_tokens: int, dtype: Any, shape: dict[str, int]) -> Any:
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval().to(dtype)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompts)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        model.generate(prompts, attention_mask=mask, max_new_tokens=count, **options)
        return time.perf_counter() - began

    def once() -> dict[str, float]:
        first = seconds(1)
        return {"first": first, "steady": new_tokens * len(prompts) / (seconds(new_tokens + 1) - first)}

    return once
