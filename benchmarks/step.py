"""A training step (forward, loss, backward, clipping, optimizer): other projects, overhead of Lightning, ablation."""

from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, StepTimer, compare
from benchmarks.peers import SIZES, VOCAB_SIZE, bare, check_peers, loop, make


def run(
    peers: tuple[str, ...] = ("nanogpt", "trainer", "transformers", "book"),
    size: str = "124m",
    batch_size: int = 1,
    length: int = 1024,
    rounds: int = 4,
    nanogpt: str | None = None,
    litgpt_python: str | None = None,
    out: str = "step.json",
) -> None:
    """Compare the time of a step. "matmul" is the time of its FLOPs at peak throughput.

    gptlit is tuned like its peers; "gptlit, shipped" is `train.py` with its defaults, not compiled.

    Args:
        peers: Some of nanogpt, transformers (in a plain loop), trainer (Transformers' Trainer), litgpt, book.
        size: "124m", or "small" (6 layers, width 384).
        batch_size: Windows per step.
        length: Tokens per window.
        rounds: Measurements of each contender; every other round runs in reverse order.
        nanogpt: Folder of a clone of nanoGPT.
        litgpt_python: Python of an environment with litgpt, whose pinned requirements conflict with ours; it needs our
            dependencies, too.
        out: JSON file for the results; the peer is appended to its name.
    """
    check_peers([peer for peer in peers if peer != "litgpt" or not litgpt_python], nanogpt)
    for peer in peers:  # one peer at a time: all of them at once need too much memory for a small machine
        shipped = [] if peer == "litgpt" else ["gptlit, shipped", f"{peer}, shipped"]
        names = ["gptlit", "matmul", f"{peer}, tuned", *shipped]
        options = {"folder": nanogpt} if peer == "nanogpt" else {}
        contenders = {name: make(name, size, batch_size, length, **options) for name in names}
        pythons = {f"{peer}, tuned": litgpt_python} if peer == "litgpt" and litgpt_python else {}
        pairs = [(name, "gptlit") for name in names[1:]] + ([(shipped[1], shipped[0])] if shipped else [])
        title = f"seconds per step, {size}, {batch_size} x {length} tokens"
        path = Path(out)
        compare(title, contenders, pairs, "seconds", path.with_stem(f"{path.stem}-{peer}"), rounds, pythons)


def overhead(rounds: int = 6, out: str = "overhead.json") -> None:
    """Compare a step under `train.py` with the same step in a bare loop: GPT-2 small, and a toy model.

    Args:
        rounds: Measurements of each contender; every other round runs in reverse order.
        out: JSON file for the results; the size is appended to its name.
    """
    for size, length, steps in (("124m", 1024, 2), ("toy", 16, 100)):
        contenders = {name: make(name, size, 1, length, steps=steps) for name in ("gptlit", "bare")}
        title = f"seconds per step, {size}, 1 x {length} tokens"
        path = Path(out)
        pairs = [("gptlit", "bare")]
        compare(title, contenders, pairs, "seconds", path.with_stem(f"{path.stem}-{size}"), rounds)


ABLATION = (
    "plain float32",
    "keep freed memory",
    "bf16",
    "fused AdamW",
    "compile each block",
    "fused linear cross-entropy",
    "blockwise attention, cheap operations recomputed",
    "GELU with one exponential",
    "clipping inside AdamW",
)


def ladder(batch_size: int = 1, length: int = 1024, rounds: int = 4, out: str = "ladder.json") -> None:
    """Ablation of GPT-2 small's step: each row adds one optimization, and the last row is gptlit's own step.

    Args:
        batch_size: Windows per step.
        length: Tokens per window.
        rounds: Measurements of each contender; every other round runs in reverse order.
        out: JSON file for the results; the row number is appended to its name.
    """
    last = len(ABLATION) - 1
    for level in range(last):
        contenders: dict[str, Contender] = {
            ABLATION[number]: (__name__, {"level": number, "batch_size": batch_size, "length": length})
            for number in (level, last)
        }
        path = Path(out)
        title = f"seconds per step, 124m, {batch_size} x {length} tokens"
        pairs = [(ABLATION[level], ABLATION[last])]
        compare(title, contenders, pairs, "seconds", path.with_stem(f"{path.stem}-{level}"), rounds)


def contender(level: int, batch_size: int, length: int) -> Any:
    """Train with the first `level` optimizations and call the timer; never returns."""
    import torch
    import torch.nn.functional as F

    from benchmarks.contenders import keep_freed_memory
    from gptlit import GPTConfig, GPTModel
    from gptlit.model import attention
    from gptlit.model import gpt as architecture
    from gptlit.model.loss import linear_cross_entropy, next_token_loss, softmax_
    from gptlit.training.lightning_compat import recompute_cheap_ops

    torch.manual_seed(0)
    batch = torch.randint(VOCAB_SIZE, (batch_size, length + 1))
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    on = {name: number <= level for number, name in enumerate(ABLATION)}
    timer = StepTimer(warm=5, steps=2)
    if on["keep freed memory"]:
        keep_freed_memory()
    if on["clipping inside AdamW"]:
        return bare(*SIZES["124m"], inputs, targets, timer)
    if not on["blockwise attention, cheap operations recomputed"]:
        attention.torch.compiler.is_compiling = lambda: False  # type: ignore[assignment]
    else:
        recompute_cheap_ops(torch.device("cpu"))
    if not on["GELU with one exponential"]:
        architecture.GELU.forward = lambda self, x: F.gelu(x, approximate="tanh")  # type: ignore[method-assign]
    model = GPTModel(GPTConfig(context_length=length, drop_rate=0.0, qkv_bias=True, tie_weights=True, init="gpt2"))
    if on["compile each block"]:
        for block in model.trf_blocks:
            block.compile()
    softmax = torch.compile(softmax_, dynamic=False)

    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        if on["fused linear cross-entropy"]:
            return linear_cross_entropy(model.hidden(inputs), model.out_head.weight, targets, softmax=softmax)
        return next_token_loss(model(inputs), targets)

    return loop(model, loss, inputs, targets, on["bf16"], timer, fused=on["fused AdamW"], compiled=False)
