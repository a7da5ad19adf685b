"""One training step (forward, loss, backward, clipping, optimizer): beside others, without Lightning, rung by rung."""

from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, Gate, compare
from benchmarks.peers import SIZES, VOCABULARY, bare, loop, make


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
    """Compare the time of a step. "matmul" is the time that its operations take at the peak of bf16 products.

    gptlit is tuned as its peers are; "gptlit, shipped" is `train.py` with nothing said, not compiled.

    Args:
        peers: Some of nanogpt, transformers (bare), trainer (Transformers' own), litgpt, book.
        size: "124m", or "small" (6 layers, 384 wide).
        batch_size: Windows in a step.
        length: Tokens in a window.
        rounds: Measurements of each, every other round backwards.
        nanogpt: Folder of a clone of nanoGPT.
        litgpt_python: The Python of an environment that has litgpt, whose pins collide with ours.
        out: JSON file for the figures; the name of the peer is added to its name. Table and picture lie beside it.
    """
    for peer in peers:  # one after the other: all of them at once need more memory than a small machine has
        shipped = [] if peer == "litgpt" else ["gptlit, shipped", f"{peer}, shipped"]
        names = ["gptlit", "matmul", f"{peer}, tuned", *shipped]
        options = {"folder": nanogpt} if peer == "nanogpt" else {}
        contenders = {name: make(name, size, batch_size, length, **options) for name in names}
        pythons = {f"{peer}, tuned": litgpt_python} if peer == "litgpt" and litgpt_python else {}
        pairs = [(name, "gptlit") for name in names[1:]] + ([(shipped[1], shipped[0])] if shipped else [])
        title = f"seconds a step, {size}, {batch_size} x {length} tokens"
        path = Path(out)
        compare(title, contenders, pairs, "seconds", path.with_stem(f"{path.stem}-{peer}"), rounds, pythons)


def overhead(rounds: int = 6, out: str = "overhead.json") -> None:
    """Compare a step under `train.py`'s Trainer with the same step in a bare loop: GPT-2 small, and a toy.

    Args:
        rounds: Measurements of each, every other round backwards.
        out: JSON file for the figures; the size is added to its name.
    """
    for size, length, steps in (("124m", 1024, 2), ("toy", 16, 100)):
        contenders = {name: make(name, size, 1, length, steps=steps) for name in ("gptlit", "bare")}
        title = f"seconds a step, {size}, 1 x {length} tokens"
        path = Path(out)
        pairs = [("gptlit", "bare")]
        compare(title, contenders, pairs, "seconds", path.with_stem(f"{path.stem}-{size}"), rounds)


RUNGS = (
    "plain float32",
    "freed memory is kept",
    "bf16",
    "fused AdamW",
    "blocks compiled",
    "loss with its head",
    "attention in blocks",
    "GELU by one exponential",
    "clipping inside AdamW",
)


def ladder(batch_size: int = 1, length: int = 1024, rounds: int = 4, out: str = "ladder.json") -> None:
    """Compare GPT-2 small's step with each technique on top of those before it; the last rung is gptlit's own step.

    Args:
        batch_size: Windows in a step.
        length: Tokens in a window.
        rounds: Measurements of each, every other round backwards.
        out: JSON file for the figures; the rung is added to its name.
    """
    top = len(RUNGS) - 1
    for rung in range(top):
        contenders: dict[str, Contender] = {
            RUNGS[number]: (__name__, {"rung": number, "batch_size": batch_size, "length": length})
            for number in (rung, top)
        }
        path = Path(out)
        title = f"seconds a step, 124m, {batch_size} x {length} tokens"
        compare(
            title, contenders, [(RUNGS[rung], RUNGS[top])], "seconds", path.with_stem(f"{path.stem}-{rung}"), rounds
        )


def contender(rung: int, batch_size: int, length: int) -> Any:
    """Train on a rung of the ladder, through the gate; never returns."""
    import torch
    import torch.nn.functional as F

    from benchmarks.allocator import keep_freed_memory
    from gptlit import GPTConfig, GPTModel
    from gptlit.model import attention
    from gptlit.model import gpt as architecture
    from gptlit.model.loss import linear_cross_entropy, next_token_loss, softmax_
    from gptlit.training.lightning_compat import recompute_cheap_ops

    torch.manual_seed(0)
    batch = torch.randint(VOCABULARY, (batch_size, length + 1))
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    on = {name: number <= rung for number, name in enumerate(RUNGS)}
    gate = Gate(warm=5, steps=2)
    if on["freed memory is kept"]:
        keep_freed_memory()
    if on["clipping inside AdamW"]:
        return bare(*SIZES["124m"], inputs, targets, gate)
    if not on["attention in blocks"]:
        attention.torch.compiler.is_compiling = lambda: False  # type: ignore[assignment]
    else:
        recompute_cheap_ops(torch.device("cpu"))
    if not on["GELU by one exponential"]:
        architecture.GELU.forward = lambda self, x: F.gelu(x, approximate="tanh")  # type: ignore[method-assign]
    model = GPTModel(GPTConfig(context_length=length, drop_rate=0.0, qkv_bias=True, tie_weights=True, init="gpt2"))
    if on["blocks compiled"]:
        for block in model.trf_blocks:
            block.compile()
    softmax = torch.compile(softmax_, dynamic=False)

    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        if on["loss with its head"]:
            return linear_cross_entropy(model.hidden(inputs), model.out_head.weight, targets, softmax=softmax)
        return next_token_loss(model(inputs), targets)

    return loop(model, loss, inputs, targets, on["bf16"], gate, fused=on["fused AdamW"], compiled=False)
