"""One message from many processes."""

import os
import sys

import torch.distributed as dist

_KEY = "megatron_cgn/told"


def tell_once(message: str) -> None:
    """Write a message to standard error, once, though every rank may have it.

    After the ranks have joined, the first to come speaks, whichever failed; before, all ranks fail
    alike and rank 0 speaks.

    Args:
        message: One or more lines, without a final newline.
    """
    if dist.is_initialized():
        try:
            first = dist.distributed_c10d._get_default_store().add(_KEY, 1) == 1
        except dist.DistError:
            # Rank 0 keeps the count. It is gone, so it has spoken or crashed with a traceback.
            first = False
    else:
        first = os.environ.get("RANK", "0") == "0"
    if first:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
