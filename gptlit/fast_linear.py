"""Linear layers for generation on a CPU: one row at a time, a product reads every weight once, and memory is the limit.

BLAS reads weights at a fraction of the memory's speed there. The product written as multiply-and-sum, and compiled,
comes close to it; with 8-bit weights a quarter of the bytes are read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlit.errors import InputError
from gptlit.model import GPTModel


class RowLinear(nn.Module):
    """A linear layer that multiplies a single row without BLAS: (..., I) -> (..., O). Only fast when compiled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        return _row_product(self.weight, x, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and one scale an output: (..., I) -> (..., O)."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (linear.weight.detach().float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= 16 and x.device.type == "cpu":
            product = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            product = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], -1)


def _row_product(weight: Tensor, x: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Return weight @ x for a single row, summed in float32."""
    product = (weight.float() * x.reshape(1, -1).float()).sum(dim=-1)  # (O,)
    if scale is not None:
        product = product * scale
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def for_generation(model: GPTModel, quantize: str | None = None, compile: bool = False) -> GPTModel:
    """Make a model fast for one row at a time, in place.

    Args:
        model: The model, not to be trained afterwards.
        quantize: "int8" keeps the matrices in 8 bits; None leaves them as they are.
        compile: Compile block by block: seconds at first, and faster from then on (with 8 bits there is nothing to
            gain). Nothing is compiled for a device other than the CPU.

    Raises:
        InputError: The quantisation is unknown, or there is no compiler.
    """
    if quantize not in (None, "int8"):
        raise InputError(f"no quantisation is named {quantize!r}: 'int8' is the only one")
    compile = compile and quantize is None and model.pos_emb.weight.device.type == "cpu"
    if quantize or compile:
        kind = Int8Linear if quantize else RowLinear
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, kind(child))
    if compile:
        _insist_on_a_compiler()
        for module in (*model.trf_blocks, model.out_head):
            module.compile(dynamic=False)
    return model


def _insist_on_a_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError("compile needs a C++ compiler: install g++ or clang, or leave it out") from error
