"""How many sequences of what length fit into memory beside the model."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cgn.engine.engine import Engine
from megatron_cgn.parallel import cpu

MOST = 64
"""Largest batch chosen: more hardly adds to the throughput of small models."""
_SHARE = 0.5
"""Of the memory that is free, for keys and values; the rest is for prompts and logits."""


def cache_bytes(engine: Engine, tokens: int) -> int:
    """Bytes that the keys and values of one sequence take on this rank.

    Args:
        engine: The model.
        tokens: Length of the sequence.
    """
    config = engine.model_config
    layers = sum(len(chunk.decoder.layers) for chunk in engine.chunks)
    heads = config.num_query_groups // engine.state.groups.tp.size()
    width = heads * config.kv_channels * config.params_dtype.itemsize
    return int(2 * layers * width * tokens)


def fitting_batch(engine: Engine, tokens: int) -> int:
    """How many sequences every rank has room for, at most `MOST`. Collective over all ranks.

    Args:
        engine: The model.
        tokens: Length of the longest sequence.

    Returns:
        At least 1.
    """
    longest = min(tokens, engine.architecture.max_position_embeddings)
    fits = int(_SHARE * _free_bytes()) // cache_bytes(engine, longest)
    answer = torch.tensor(min(MOST, max(1, fits)), dtype=torch.int32, device=cpu.device())
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return int(answer.item())


def _free_bytes() -> int:
    """Memory of this rank's device that nobody uses."""
    if torch.cuda.is_available():
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + reserved
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not Linux
        kib = 4 * 2**20
    return kib * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
