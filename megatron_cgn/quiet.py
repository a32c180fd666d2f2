"""Silence, at their source, the warnings of dependencies that a user can do nothing about.

Every entry names one message and says why it means nothing here. Nothing else is hidden:
standard error stays as it is, and other warnings of the same modules still show.
"""

import logging
import threading
import warnings
from collections.abc import Callable

_WARNINGS = (
    # Running without Transformer Engine and Apex is a supported choice, stated once by our log.
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    # Megatron-Core imports these for every model; we use neither.
    r"MimoModelConfig is experimental",
    r"full scope is deprecated. Use empty cuda_graph_modules",
    # Megatron-Core calls PyTorch's checkpoint reader the old way.
    r"The argument order of load has been changed",
    r"torch.distributed is disabled, unavailable or uninitialized, assuming",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    # recompute=selective is what was asked for, and its meaning is documented there.
    r"If you are using transformer_engine as the transformer implementation",
    # True of a run that torchrun did not start: it is rank 0.
    r"Could not determine rank from torch.distributed",
    # Only useful with CUDA, where `parallel/state.py` sets the variable.
    r"When using async grad allreduce it is recommended to set .* CUDA_DEVICE_MAX_CONNECTIONS",
)

_MEGATRON_WARNINGS = (
    # FP32 with the distributed optimizer: its parameters are views, and their gradient is set.
    r"The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
)

_LOG_MESSAGES = {
    # GPTModel stays until its successor is stable: docs/adr/0002-gptmodel.md.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Also printed for synchronous saves, which are what we ask for.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # An announcement to Megatron-LM's own callers; the layout is computed all the same.
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    # Megatron's fault injector, which we do not use, announces that it is off.
    "megatron.core.rerun_state_machine": "Rerun",
    # A CUDA toolkit without a GPU is no fault.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def quiet_dependencies() -> None:
    """Install the filters. Entry points call it before they import Megatron-Core."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for message in _MEGATRON_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=r"megatron\.core\.")
    for name, message in _LOG_MESSAGES.items():
        logging.getLogger(name).addFilter(_without(message))
    threading.excepthook = _without_writer_threads(threading.excepthook)


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    """Return a logging filter that drops records containing `text`."""
    return lambda record: text not in record.getMessage()


def _without_writer_threads(
    show: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], None]:
    """Return a hook that leaves out disk faults of TensorBoard's thread.

    The thread hands them to whoever writes next, who tells them in one line.
    """

    def hook(args: threading.ExceptHookArgs) -> None:
        writer = type(args.thread).__name__ == "_AsyncWriterThread"
        if not (writer and issubclass(args.exc_type, OSError)):
            show(args)

    return hook
