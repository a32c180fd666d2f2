"""Write Megatron's ``torch_dist`` format in this process.

Megatron-Core's own strategy hands even a synchronous save to its asynchronous writer, which starts
a manager process on every rank: half a gigabyte and several seconds each, for nothing. The plan
and the format are Megatron's all the same; only PyTorch's plain writer does the writing.
"""

from pathlib import Path

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class InProcessSaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy with PyTorch's plain file writer."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Write this rank's shards. Collective over all ranks.

        Args:
            sharded_state_dict: Sharded tensors and objects.
            checkpoint_dir: An existing directory that every rank sees.
        """
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=dcp.FileSystemWriter(str(checkpoint_dir), sync_files=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )
