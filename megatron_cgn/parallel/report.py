"""One message from many processes."""

import datetime
import os
import sys

import torch.distributed as dist

_KEY = "megatron_cgn/told"
_STORE_TIMEOUT = datetime.timedelta(seconds=10)


def tell_once(message: str) -> None:
    """Write a message to standard error, once, though every rank may have it.

    The first to come speaks, whichever failed. Before the ranks have joined, that takes the store
    that ``torchrun`` keeps for them; elsewhere the first process of each node speaks.

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
        first = _first_before_joining()
    if first:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


def _first_before_joining() -> bool:
    """Whether this process is the first to speak, asked of the store that ``torchrun`` holds."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=_STORE_TIMEOUT,
            )
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return bool(store.add(f"{_KEY}/{attempt}", 1) == 1)
        except (dist.DistError, KeyError, ValueError):
            # The store's node is gone; a message a node is better than none.
            pass
    return os.environ.get("LOCAL_RANK", "0") == "0"
