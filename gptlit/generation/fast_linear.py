"""Linear layers for generation on a CPU, where a product with one or a few rows is bound by memory bandwidth.

BLAS reaches a fraction of that bandwidth. A compiled multiply-and-sum comes close to it, and int8 weights are a quarter
of the bytes.
"""

import os
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlit.errors import InputError
from gptlit.model.gpt import GPTModel

FEW_ROWS = 16
HAS_ONLY_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
CACHED_ROWS = 1024  # of int8 weights, as many as a CPU's cache holds in float32


class RowLinear(nn.Module):
    """A linear layer for a single row, when compiled, or a few: (..., I) -> (..., O)."""

    weight: Tensor  # (O, I)
    bias: Tensor | None

    def __init__(self, linear: "nn.Linear | RowLinear") -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 1 and torch.compiler.is_compiling():
            product = (self.weight.float() * rows.float()).sum(dim=-1)  # (O,)
            return _as_row(product, self.bias, x)
        is_few = 1 < len(rows) <= FEW_ROWS and x.device.type == "cpu"
        if is_few and x.dtype == torch.float32 and HAS_ONLY_AVX2:
            # MKL takes 1.3 to 2 times as long for rows @ weight.t() (AMD Zen 3; AVX-512 has not been measured).
            product = (self.weight @ rows.t()).t().contiguous()
            return (product if self.bias is None else product + self.bias).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per output: (..., I) -> (..., O).

    Args:
        linear: The layer to copy.
        packed: Pack four weights into 32 bits, which is fastest for a compiled product with a single row; other
            products unpack them first.
        exact: Keep activations in their dtype, as logits must be; other layers multiply a few rows in bf16 on a CPU.
    """

    # int8 (O, I), or packed: words (O, I/4), whose byte k of word j is the weight k * I/4 + j. Words are stored as
    # float32, which compiled code loads several times as fast as int32 on AVX2: view them as int32, never convert them.
    weight: Tensor
    scale: Tensor  # (O,)

    def __init__(self, linear: nn.Linear | RowLinear, packed: bool, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.packed = packed and linear.weight.shape[1] % 4 == 0
        full = linear.weight.detach().float()
        scale = full.abs().amax(dim=1).clamp(min=1e-12) / 127
        weight = (full / scale[:, None]).round().to(torch.int8)
        if self.packed:
            planes = weight.view(len(weight), 4, -1).transpose(1, 2)  # (O, I/4, 4)
            weight = planes.contiguous().view(torch.float32)[..., 0]
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.packed and len(rows) == 1:
            planes, words = x.reshape(4, -1).float(), self.weight.view(torch.int32)  # (4, I/4), (O, I/4)
            # A left and a right shift sign-extend a byte.
            parts = [((words << (24 - 8 * k)) >> 24).float() * planes[k] for k in range(4)]
            product = (parts[0] + parts[1] + parts[2] + parts[3]).sum(dim=-1) * self.scale.float()  # (O,)
            return _as_row(product, self.bias, x)
        weight = self.weight
        if self.packed:
            planes = weight[..., None].view(torch.int8).transpose(1, 2)  # (O, 4, I/4)
            weight = planes.reshape(len(weight), -1)
        if len(rows) > FEW_ROWS or x.device.type != "cpu":
            product = F.linear(rows, weight.to(x.dtype)) * self.scale
        elif x.dtype == torch.bfloat16 or not self.exact:
            # torch has no public int8 product. With float32 rows this one takes ten times as long.
            product = torch._weight_int8pack_mm(rows.bfloat16(), weight, self.scale.bfloat16()).to(x.dtype)
        else:
            parts = weight.split(CACHED_ROWS)  # type: ignore[no-untyped-call]
            product = torch.cat([part.to(x.dtype) @ rows.t() for part in parts]).t().contiguous() * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], -1)


def _as_row(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Add the bias to a float32 product (O,); return it in the dtype and shape of the single row `x`."""
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile finds the C++ compiler that it needs on a CPU."""
    if device.type == "cpu" and not any(map(shutil.which, os.environ.get("CXX", "g++ clang++ cl").split())):
        raise InputError("compile needs a C++ compiler: install g++ or clang, or leave it out")


def for_generation(model: GPTModel, quantize: str | None = None, compile: bool = False) -> GPTModel:
    """Optimize a model for generation, in place.

    Args:
        model: The model, which cannot be trained afterwards.
        quantize: "int8" stores the matrices in 8 bits; None leaves them as they are.
        compile: Compile each block, which pays off for one row on a CPU; ignored on other devices.

    Raises:
        InputError: The quantization is unknown or not for this device, or there is no compiler.
    """
    device = model.pos_emb.weight.device.type
    if quantize not in (None, "int8"):
        raise InputError(f"quantize {quantize!r} is unknown: 'int8' is supported")
    if quantize and device == "cuda":
        raise InputError("quantize 'int8' is for a CPU; on a GPU bf16 is faster: leave it out")
    compile = compile and device == "cpu"
    if quantize and compile:
        model.float()  # bf16 activations would only be converted back and forth
    if compile:
        check_compiler(model.pos_emb.weight.device)
    if quantize or device == "cpu":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear or type(child) is RowLinear:
                    is_head = child is model.out_head
                    fast = Int8Linear(child, packed=compile, exact=is_head) if quantize else RowLinear(child)
                    setattr(module, name, fast)
    if compile:
        for module in (*model.trf_blocks, model.out_head):
            module.compile(dynamic=False)
    return model
