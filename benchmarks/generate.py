"""Generation compared with Transformers: random weights of the same shape, same prompts, greedy decoding."""

import time
from pathlib import Path
from typing import Any

from benchmarks.peers import check_peers, tuned_precision

PROMPT = 32  # tokens


def run(
    out: str = "generate.json",
    new_tokens: int = 64,
    rounds: int = 4,
    batch_sizes: tuple[int, ...] = (1, 8),
) -> None:
    """Compare tokens per second of the 124M model: fp32, bf16 and int8 in gptlit, fp32 and bf16 in Transformers.

    bf16 is left out on a CPU without native bf16.

    Args:
        out: JSON file for the results; a table is printed.
        new_tokens: Number of generated tokens.
        rounds: Measurements of each contender, in A B B A order.
        batch_sizes: Batch sizes.
    """
    from benchmarks.contenders import compare

    check_peers(["transformers"], None)
    best = "bf16" if tuned_precision("cpu") == "bf16-mixed" else "fp32"
    pairs = {"gptlit fp32": "transformers fp32", f"gptlit {best}": f"transformers {best}"}
    pairs["gptlit int8"] = f"transformers {best}"
    names = sorted({*pairs, *pairs.values()})
    contenders = {
        f"{name} batch {size}": ("benchmarks.generate", {"name": name, "size": size, "new_tokens": new_tokens})
        for size in batch_sizes
        for name in names
    }
    sized = [tuple(f"{name} batch {size}" for name in pair) for size in batch_sizes for pair in pairs.items()]
    compare("tokens per second", contenders, sized, "steady", Path(out), rounds=rounds)


def contender(name: str, size: int, new_tokens: int, device: str = "cpu", toy: bool = False) -> Any:
    """Return a function that generates once and returns its measurements; called in the contender's process."""
    import torch

    torch.set_default_device(device)

    project, precision = name.split()
    # A single row of int8 is compiled, with activations in fp32.
    is_fp32 = precision == "fp32" or (precision == "int8" and (size == 1 or tuned_precision("cpu") == "32-true"))
    dtype = torch.float32 if is_fp32 else torch.bfloat16
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
