"""Which type matrices are multiplied in.

Weights and activations are of the run's type everywhere; a product of two of them may be computed
in a wider one, which changes nothing but the rounding of sums.
"""

import functools

import torch
from torch import Tensor


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which products of matrices of this tensor's type and device are fastest.

    A CPU without matrix units (AMX) multiplies BF16 at half the speed of FP32, FP16 slower still;
    converting the operands costs a few percent. The product of two BF16 numbers is exact in FP32,
    where either kernel sums it up.

    Args:
        tensor: One operand.

    Returns:
        Its own type, or float32.
    """
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    if tensor.device.type != "cpu" or not half:
        return tensor.dtype
    fast = tensor.dtype == torch.bfloat16 and _has_matrix_units()
    return tensor.dtype if fast else torch.float32


@functools.cache
def _has_matrix_units() -> bool:
    """Whether this CPU multiplies tiles of BF16 (Intel's AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())
