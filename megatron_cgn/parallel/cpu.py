"""Let Megatron-Core run where there is no CUDA device, by answering `torch.cuda` with the CPU.

This is the only module of the project that patches anything. Megatron-Core allocates with
``device="cuda"``, keeps RNG state through `torch.cuda`, waits on streams and compares type
names; it never computes anything that PyTorch's CPU kernels cannot. `install` maps exactly
those calls to the CPU. Where CUDA is available it changes nothing at all (`is_installed`
stays False), and ``torch.cuda.is_available()`` always tells the truth.
"""

import contextlib
import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor as_tensor zeros ones empty full arange rand randn randint eye linspace "
    "zeros_like ones_like empty_like full_like rand_like randn_like"
).split()

_installed = False


def is_installed() -> bool:
    """Whether `torch.cuda` is answered by the CPU in this process."""
    return _installed


def install() -> bool:
    """Make Megatron-Core run on the CPU if there is no CUDA device; else do nothing.

    Idempotent, and cheap to call again. Call it before building any Megatron module.

    Returns:
        Whether the CPU answers for `torch.cuda` from now on.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return _installed
    _keep_freed_memory()
    _patch_devices()
    _patch_factories()
    _patch_tensors()
    _patch_rng()
    _patch_scaling()
    _patch_buffers()
    # Megatron wraps small functions in torch.compile; on a CPU that would need a C++ compiler
    # on the user's machine and minutes of warm-up for kernels that gain nothing.
    torch.compiler.set_stance("force_eager")
    _installed = True
    return True


def device() -> torch.device:
    """The device of this process's model: its CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return _CPU


def backend() -> str:
    """The process-group backend that fits `device`: ``nccl`` or ``gloo``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it to the kernel.

    Activations are freed and allocated again every step. Fresh pages are zeroed by the kernel at
    a tenth of the speed of memory already mapped, which is the largest cost of a CPU step. Blocks
    above 32 MiB, such as logits, are still returned: kept, they would fragment the heap to
    half as much memory again. What the user has set, by ``MALLOC_MMAP_THRESHOLD_`` and its like
    or in ``GLIBC_TUNABLES``, stays.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl, macOS: nothing to tune
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    for name, parameter, value in (
        ("mmap_threshold", m_mmap_threshold, 32 * 1024 * 1024),
        ("trim_threshold", m_trim_threshold, -1),
        ("top_pad", m_top_pad, 256 * 1024 * 1024),
    ):
        if f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables:
            continue
        mallopt(parameter, value)


class _Stream:
    """A CUDA stream's interface where everything is already synchronous."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept and ignore what a CUDA stream accepts."""

    def synchronize(self) -> None:
        """Return at once: CPU work is done when its call returns."""

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def record_event(self, event: object = None) -> object:
        """Return an event that has already happened."""
        return event or _Event()

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True


class _Event:
    """A CUDA event's interface where everything is already synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept and ignore what a CUDA event accepts."""

    def record(self, stream: object = None) -> None:
        """Return at once."""

    def wait(self, stream: object = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Whether the event has happened: always."""
        return True


@contextlib.contextmanager
def _no_stream(stream: object) -> Iterator[None]:
    yield


def _patch_devices() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = _no_stream
    cuda.nvtx.range_push = lambda message: None
    cuda.nvtx.range_pop = lambda: None


def _is_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        # Pinning asks for a CUDA driver; there is no device to copy to.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _patch_factories() -> None:
    # `with torch.device("meta")` knows the factories by identity, from a list that it makes at its
    # first use. The wrappers call the originals, so those must be on it: otherwise `transformers`
    # would load models whose RoPE frequencies are whatever the memory held.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _patch_tensors() -> None:
    tensor: Any = torch.Tensor
    to, type_ = tensor.to, tensor.type

    def move(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *(_CPU if _is_cuda(a) else a for a in args), **kwargs)  # type: ignore[no-any-return]

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by names such as "torch.cuda.HalfTensor".
        answer = type_(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    tensor.to = move
    tensor.type = type_name
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


def _scale(chunk_size: int, overflow: object, tensors: Any, factor: float) -> None:
    """Write the first list's tensors times a factor into the second's, as Apex's kernel does."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)


def _patch_scaling() -> None:
    """Clip gradients in place: Megatron's stand-in for Apex's kernel copies each one.

    That is a pass over all of them, and as much memory again as the largest, an embedding's, at
    the very moment when a step holds most.
    """
    from megatron.core.optimizer import clip_grads, optimizer

    for module in (clip_grads, optimizer):
        patched: Any = module
        patched.multi_tensor_scale_impl = _scale


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def wrapper(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        in_place = output.data_ptr() == source.data_ptr() and output.numel() == source.numel()
        # A group of one, which need not wait either.
        if in_place and not kwargs.get("async_op"):
            return None
        return collective(output, source, *args, **kwargs)

    return wrapper


def _patch_buffers() -> None:
    """Let a rank that shares with nobody leave its buffers of weights and gradients as they are.

    gloo would copy each whole buffer to gather or scatter it from itself to itself.
    """
    from megatron.core.distributed import param_and_grad_buffer

    patched: Any = param_and_grad_buffer
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(patched, name, _unless_alone(getattr(patched, name)))


def _patch_rng() -> None:
    """Keep "CUDA" RNG state in the CPU generator, which is the one that draws here."""
    cuda: Any = torch.cuda

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = set_rng_state
        # Not torch.manual_seed, which itself calls torch.cuda.
        module.manual_seed = torch.default_generator.manual_seed
    from megatron.core.tensor_parallel import random as megatron_random

    # The tracker swaps states with a private function that reaches below torch.cuda.
    patched: Any = megatron_random
    patched._set_cuda_rng_state = set_rng_state
    # It warns when the CPU generator moves while "CUDA" draws; here they are one generator.
    megatron_random_logger = logging.getLogger(megatron_random.__name__)
    megatron_random_logger.addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
