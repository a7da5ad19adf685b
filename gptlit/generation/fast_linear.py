"""Linear layers for generation on a CPU: one row at a time, a product reads every weight once, and memory is the limit.

BLAS reads weights at a fraction of the memory's speed there. The product written as multiply-and-sum, and compiled,
comes close to it; with 8-bit weights a quarter of the bytes is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel


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
    """A linear layer with 8-bit weights and one scale an output: (..., I) -> (..., O).

    Args:
        linear: The layer to copy.
        packed: Keep four weights in an int32, which a compiled product with a single row reads fastest; everything
            else has to unpack them first.
    """

    weight: Tensor  # int8 (O, I), or packed: int32 (O, I/4), whose byte k of word j is the weight k * I/4 + j
    scale: Tensor  # (O,)

    def __init__(self, linear: nn.Linear, packed: bool) -> None:
        super().__init__()
        self.packed = packed and linear.in_features % 4 == 0
        full = linear.weight.detach().float()
        scale = full.abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (full / scale[:, None]).round().to(torch.int8)
        if self.packed:
            planes = weight.view(len(weight), 4, -1).transpose(1, 2)  # (O, I/4, 4)
            weight = planes.contiguous().view(torch.int32)[..., 0]
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.packed and len(rows) == 1:
            return _packed_row_product(self.weight, x, self.bias, self.scale)
        weight = self._unpacked() if self.packed else self.weight
        if len(rows) <= 16 and x.device.type == "cpu":
            product = torch._weight_int8pack_mm(rows, weight, self.scale)
        else:
            product = F.linear(rows, weight.to(x.dtype)) * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], -1)

    def _unpacked(self) -> Tensor:
        planes = self.weight[..., None].view(torch.int8).transpose(1, 2)  # (O, 4, I/4)
        return planes.reshape(len(self.weight), -1)


def _packed_row_product(weight: Tensor, x: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """Return weight @ x for a single row and packed weights: a shift up and one down bring out a signed byte."""
    planes = x.reshape(4, -1).float()  # (4, I/4)
    parts = [((weight << (24 - 8 * k)) >> 24).float() * planes[k] for k in range(4)]
    product = (parts[0] + parts[1] + parts[2] + parts[3]).sum(dim=-1) * scale.float()  # (O,)
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def _row_product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return weight @ x for a single row, summed in float32."""
    product = (weight.float() * x.reshape(1, -1).float()).sum(dim=-1)  # (O,)
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def for_generation(model: GPTModel, quantize: str | None = None, compile: bool = False) -> GPTModel:
    """Make a model fast for one row at a time, in place.

    Args:
        model: The model, not to be trained afterwards.
        quantize: "int8" keeps the matrices in 8 bits; None leaves them as they are.
        compile: Compile block by block: seconds at first, and faster from then on for one row at a time. Only a CPU
            has anything to gain; on another device nothing is compiled.

    Raises:
        InputError: The quantisation is unknown, or there is no compiler.
    """
    device = model.pos_emb.weight.device.type
    if quantize not in (None, "int8"):
        raise InputError(f"no quantisation is named {quantize!r}: 'int8' is the only one")
    if quantize and device == "cuda":
        raise InputError("quantize 'int8' is for a CPU; on a GPU bf16 is faster: leave it out")
    compile = compile and device == "cpu"
    if quantize and compile:
        model.float()  # the weights are in 8 bits; activations in bf16 would only be converted back and forth
    if quantize or compile:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, Int8Linear(child, packed=compile) if quantize else RowLinear(child))
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
