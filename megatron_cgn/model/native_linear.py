"""Megatron's parallel linear layers with products in the type that is fastest.

On a GPU they are Megatron's own in every respect. On a CPU weights' gradients go straight into
Megatron's FP32 buffers, which saves passes over memory; and where its BF16 kernels are slower than
its FP32 ones (see `matmul.py`) operands are converted for each product, and what is kept for the
backward pass stays in the run's type. Communication is Megatron's, or equal to it.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_cgn.model.matmul import product_dtype


class NativeColumnParallelLinear(ColumnParallelLinear):
    """``x @ weight.T``, whose rows are shared out over tp."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Under sequence parallelism Megatron's own gathers and multiplies in one function.
        if weight.device.type != "cpu" or self.sequence_parallel:
            return super()._forward_impl(input, weight, *args, **kwargs)
        group = self.tp_group if self.allreduce_dgrad else None
        return _multiply(input, weight, kwargs["bias"], group=group, layer=self)


class NativeRowParallelLinear(RowParallelLinear):
    """``x @ weight.T``, whose columns are shared out over tp."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if weight.device.type != "cpu":
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _multiply(input, weight, kwargs["bias"], group=None, layer=self)


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, group: dist.ProcessGroup | None, layer: Any
) -> Tensor:
    if not layer.training and not torch.is_grad_enabled():
        return _product(x, weight, bias, product_dtype(weight, rows=x[..., 0].numel()))
    # The engine sets it where Megatron reduces gradients during the backward pass, and then waits
    # for a gradient of every parameter.
    into_buffer = layer.config.no_sync_func is None and hasattr(weight, "main_grad")
    out: Tensor = _Multiply.apply(x, weight, bias, group, into_buffer)
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias``, multiplied in a type and rounded to that of `x`."""
    rows, matrix = x.flatten(0, -2).to(dtype), weight.to(dtype)
    out = rows @ matrix.t() if bias is None else torch.addmm(bias.to(dtype), rows, matrix.t())
    return out.to(x.dtype).view(*x.shape[:-1], -1)


class _Multiply(torch.autograd.Function):
    """``x @ weight.T + bias``; the gradient of x is summed over `group` if there is one.

    The weight's gradient goes straight into Megatron's FP32 buffer, `into_buffer`: unrounded, and
    without a tensor of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: dist.ProcessGroup | None,
        into_buffer: bool,
    ) -> Tensor:
        ctx.group, ctx.into_buffer = group, into_buffer
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _product(x, weight, bias, product_dtype(weight))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        by_out = grad_outputs[0]
        dtype = product_dtype(weight)
        rows = by_out.flatten(0, -2).to(dtype)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = (rows @ weight.to(dtype)).to(by_out.dtype)
            by_x = by_x.view(*by_out.shape[:-1], -1)
            if ctx.group is not None:
                dist.all_reduce(by_x, group=ctx.group)
        if ctx.needs_input_grad[1]:
            inputs = x.flatten(0, -2).to(dtype)
            if ctx.into_buffer and dtype == weight.main_grad.dtype:
                weight.main_grad.addmm_(rows.t(), inputs)
            else:
                by_weight = (rows.t() @ inputs).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = rows.sum(0).to(weight.dtype)
        return by_x, by_weight, by_bias, None, None
