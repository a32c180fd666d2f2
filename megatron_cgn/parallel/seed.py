"""Random states: seeding every generator, and saving and restoring all of them."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random as megatron_random

from megatron_cgn.parallel.state import ParallelState


def seed_everything(seed: int, state: ParallelState) -> None:
    """Seed Python, NumPy and PyTorch.

    Weights and dropout outside tensor-parallel regions draw the same numbers on every
    tensor-parallel rank; those inside draw different ones (Megatron's RNG tracker). Pipeline
    stages differ, data-parallel ranks agree on initialisation.

    Args:
        seed: The run's seed.
        state: This process's place in the layout.
    """
    stage_seed = seed + 100 * state.pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def rng_state() -> dict[str, Any]:
    """Every random state of this process, to be handed to `set_rng_state` later."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random state back.

    Args:
        state: What `rng_state` returned, on the same rank of the same layout.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    megatron_random._set_cuda_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
