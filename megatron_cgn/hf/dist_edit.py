"""Change the rows of some matrices of a ``torch_dist`` directory, and share all other files.

The metadata of such a directory says in which file and at which byte each chunk of a tensor
lies. So a changed directory needs new bytes for changed chunks only: they go into one new file,
and every file that holds other chunks is linked as it is. What was replaced stays behind in a
linked file, unread, and is gone with the next checkpoint that training writes.
"""

import errno
import io
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_cgn.errors import CheckpointError
from megatron_cgn.hf.checkpoint_layout import TENSOR_SUFFIX
from megatron_cgn.hf.dist_reader import DistReader
from megatron_cgn.hf.safetensors_io import MappedFile, row_blocks
from megatron_cgn.hf.streaming import BLOCK_BYTES

_METADATA = ".metadata"
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Another file system, or one without links."""


class StoredMatrix:
    """A stored matrix whose chunks have whole rows, mapped for reading."""

    def __init__(self, reader: DistReader, key: str) -> None:
        """Find the chunks.

        Args:
            reader: The directory.
            key: The tensor.

        Raises:
            CheckpointError: If it is not a matrix in chunks of whole rows.
        """
        self.key = key
        stored = reader.tensors[key]
        self.dtype = stored.properties.dtype
        chunks = sorted(reader.chunks(key), key=lambda chunk: chunk.offsets)
        self._starts = [chunk.offsets[0] for chunk in chunks]
        stops = [chunk.offsets[0] + chunk.sizes[0] for chunk in chunks]
        whole = all(chunk.sizes[1:] == tuple(stored.size[1:]) for chunk in chunks)
        if len(stored.size) != 2 or not whole or [0, *stops[:-1]] != self._starts:
            raise CheckpointError(
                f"{reader.directory}: tensor {key!r} is not stored in chunks of whole rows; "
                "convert the checkpoint to a Hugging Face directory and use that"
            )
        self.num_rows, self.width = stored.size
        self.files = sorted({chunk.file for chunk in chunks})
        maps = {file: MappedFile(file) for file in self.files}
        self._places = [(maps[chunk.file], chunk.start_byte) for chunk in chunks]
        self._views = [
            maps[chunk.file].view(chunk.dtype, chunk.sizes, offset=chunk.start_byte)
            for chunk in chunks
        ]

    def parts(self, num_rows: int) -> list[Tensor]:
        """The first rows, as views of the files; only to be read."""
        return [
            view[: num_rows - start]
            for start, view in zip(self._starts, self._views, strict=True)
            if start < num_rows
        ]

    def whole_until(self, num_rows: int) -> int:
        """Row up to which chunks end without one that reaches beyond `num_rows`."""
        stops = [*self._starts[1:], self.num_rows]
        return max([stop for stop in stops if stop <= num_rows], default=0)

    def read(self, rows: slice, *, into: Tensor) -> None:
        """Copy stored rows into ``[rows, width]`` of the same type."""
        row_bytes = self.width * self.dtype.itemsize
        for start, view, (mapped, first_byte) in zip(
            self._starts, self._views, self._places, strict=True
        ):
            low, high = max(rows.start, start), min(rows.stop, start + len(view))
            if low < high:
                into[low - rows.start : high - rows.start] = view[low - start : high - start]
                mapped.drop(
                    offset=first_byte + (low - start) * row_bytes,
                    num_bytes=(high - low) * row_bytes,
                    for_all=False,
                )


class DistEdit:
    """A new directory that is an existing one but for some rows."""

    def __init__(self, reader: DistReader, directory: Path) -> None:
        """Create the directory and its one new file.

        Args:
            reader: The existing directory.
            directory: To be created.
        """
        self._source, self._directory = reader.directory, directory
        # Read again, because it is changed here.
        self._metadata = FileSystemReader(reader.directory).read_metadata()
        directory.mkdir()
        taken = {place.relative_path for place in self._places.values()}
        number = next(n for n in range(len(taken) + 1) if _file_name(n) not in taken)
        self.file = directory / _file_name(number)
        """Where the new chunks are."""
        self._stream: BinaryIO = self.file.open("wb")

    @property
    def _places(self) -> dict[MetadataIndex, Any]:
        places: dict[MetadataIndex, Any] = self._metadata.storage_data
        return places

    def replace_rows(
        self, key: str, blocks: Iterable[tuple[int, Tensor]], *, kept: int, num_rows: int
    ) -> None:
        """Keep the chunks of a matrix up to a row, and write the others anew.

        Args:
            key: The tensor.
            blocks: Consecutive blocks of whole rows from `kept` on, each with its first row.
            kept: Rows of the chunks that stay; a chunk ends there.
            num_rows: Rows that the matrix has from now on.
        """
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata), key
        model = next(place for index, place in self._places.items() if index.fqn == key)
        staying = [chunk for chunk in stored.chunks if chunk.offsets[0] < kept]
        for chunk in stored.chunks:
            if chunk.offsets[0] >= kept:
                del self._places[MetadataIndex(key, chunk.offsets)]
        for start, block in blocks:
            offsets = torch.Size((start, 0))
            first_byte = self._stream.tell()
            _save(block, self._stream)
            staying.append(ChunkStorageMetadata(offsets, block.shape))
            index = MetadataIndex(key, offsets, len(staying) - 1)
            self._places[index] = replace(
                model,
                relative_path=self.file.name,
                offset=first_byte,
                length=self._stream.tell() - first_byte,
            )
        stored.chunks = staying
        stored.size = torch.Size((num_rows, *stored.size[1:]))

    def finish(self) -> tuple[int, int]:
        """Write the metadata and take over every other file that is still needed.

        Returns:
            Bytes written or copied, and bytes linked.
        """
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        with (self._directory / _METADATA).open("wb") as stream:
            pickle.dump(self._metadata, stream)
        needed = {place.relative_path for place in self._places.values()}
        written, linked = self.file.stat().st_size, 0
        for file in sorted(self._source.iterdir()):
            is_tensors = file.name.endswith(TENSOR_SUFFIX)
            if file.name == _METADATA or (is_tensors and file.name not in needed):
                continue
            if is_tensors and link_or_copy(file, self._directory / file.name):
                linked += file.stat().st_size
            else:
                if not is_tensors:
                    shutil.copyfile(file, self._directory / file.name)
                written += file.stat().st_size
        return written, linked


def link_or_copy(source: Path, target: Path) -> bool:
    """Give a file that never changes a second name, or copy it where that cannot be.

    Returns:
        Whether it was linked.
    """
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, target)
        return False
    return True


def blocks_of(start: int, stop: int, *, row_bytes: int) -> Iterator[slice]:
    """Cut rows into blocks that a loader can hold at once."""
    for rows in row_blocks(stop - start, row_bytes, block_bytes=BLOCK_BYTES):
        yield slice(start + rows.start, start + rows.stop)


def _save(tensor: Tensor, stream: BinaryIO) -> None:
    """Append an archive as PyTorch's own writer does."""
    assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    stream.write(buffer.getbuffer())


def _file_name(number: int) -> str:
    return f"__vocabulary_{number}{TENSOR_SUFFIX}"
