"""Steps that all ranks take together: a fault on any of them is raised on every one."""

from collections.abc import Callable

import torch.distributed as dist

from megatron_cgn.errors import DataError, UserError


def together[T](step: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run a step on every rank of ``group``; if it fails on one, fail on all. Collective.

    Args:
        step: Returns something.
        group: The ranks that call; None for all.

    Returns:
        What the step returned on this rank.

    Raises:
        UserError: The first rank's that failed.
    """
    if not dist.is_initialized():
        return step()
    result: T | None = None
    fault: UserError | None = None
    try:
        result = step()
    except UserError as error:
        fault = error
    except OSError as error:  # from a place that did not expect one: the others must not wait
        fault = DataError(f"cannot read or write the data: {error}")
    faults: list[UserError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(faults, fault, group=group)
    for found in faults:
        if found is not None:
            raise found
    assert result is not None, "a step returns something"
    return result


def on_first_rank[T](step: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run a step on global rank 0 alone and share its result or its fault. Collective.

    Args:
        step: Returns something that can be pickled.
        group: The ranks that call, global rank 0 among them; None for all.

    Returns:
        What the step returned on rank 0.

    Raises:
        UserError: If the step failed.
    """
    if not dist.is_initialized():
        return step()
    outcome: list[tuple[T | None, UserError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(step(), None)]
        except UserError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, DataError(f"cannot read or write the data: {error}"))]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, fault = outcome[0]
    if fault is not None:
        raise fault
    assert result is not None, "a step returns something"
    return result
