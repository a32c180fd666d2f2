"""Which type matrices are multiplied in.

Weights and activations are of the run's type everywhere; a product of two of them may be computed
in a wider one, which changes nothing but the rounding of sums.
"""

import functools

import torch
from torch import Tensor

_FEW_ROWS = 32
"""Rows of a product up to which converting the matrix costs more than it saves: with one row, as
in generation, six times the product itself; measured with AVX-512, whose BF16 this asks for."""


def product_dtype(tensor: Tensor, *, rows: int | None = None) -> torch.dtype:
    """The type in which products of matrices of this tensor's type and device are fastest.

    A CPU without matrix units (AMX) multiplies BF16 at half the speed of FP32, FP16 slower still;
    converting the operands costs a few percent. The product of two BF16 numbers is exact in FP32,
    where either kernel sums it up.

    Args:
        tensor: One operand, the larger.
        rows: Rows of the other, if these may decide. None where they must not: training rounds
            alike whatever the length of a micro-batch.

    Returns:
        Its own type, or float32.
    """
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    if tensor.device.type != "cpu" or not half:
        return tensor.dtype
    few = rows is not None and rows <= _FEW_ROWS and _multiplies_bf16()
    fast = tensor.dtype == torch.bfloat16 and (few or _has_matrix_units())
    return tensor.dtype if fast else torch.float32


@functools.cache
def _has_matrix_units() -> bool:
    """Whether this CPU multiplies tiles of BF16 (Intel's AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU multiplies BF16 at all without converting it (AVX-512's extension)."""
    return bool(torch.cpu._is_avx512_bf16_supported())
