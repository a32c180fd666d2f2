"""Write Megatron's ``torch_dist`` format in this process.

Megatron-Core's own strategy hands even a synchronous save to its asynchronous writer, which starts
a manager process on every rank: half a gigabyte and several seconds each, for nothing. The plan
and the format are Megatron's all the same; only PyTorch's plain writer does the writing.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save


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
        writer = FileSystemWriter(str(checkpoint_dir), sync_files=True)
        writer.fs = _PatientFileSystem()
        save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=writer,
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )


class _PatientFileSystem(FileSystem):
    """PyTorch's file system, whose files tell of a full disk at their end.

    A write that fails inside PyTorch's archive writer leaves that writer half-destroyed: a message
    about positions in the archive hides the disk's, and the process may crash when the garbage
    collector comes by.
    """

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; raises what the disk refused when the file is closed."""
        with Path(path).open(mode) as file:
            if "w" not in mode:
                yield cast(io.IOBase, file)
                return
            stream = _PatientStream(cast(BinaryIO, file))
            yield stream
            if stream.fault is not None:
                raise stream.fault


class _PatientStream(io.BufferedIOBase):
    """A file to write that takes everything, and keeps the first fault."""

    def __init__(self, file: BinaryIO) -> None:
        self.fault: OSError | None = None
        self._file = file
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._position += size
        if self.fault is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.fault = error
        return size

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        if self.fault is None:
            try:
                self._file.flush()
            except OSError as error:
                self.fault = error

    def fileno(self) -> int:
        return self._file.fileno()
