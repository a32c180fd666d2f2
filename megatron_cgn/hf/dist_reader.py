"""Find tensors in Megatron's ``torch_dist`` directories without loading their chunks.

A chunk is an archive as ``torch.save`` writes it, at some place of a ``.distcp`` file. Its tensor
lies in it uncompressed, so its bytes can be read in portions, or copied within the kernel.
Loading it would take memory for a whole chunk, which is an unsharded embedding in a checkpoint of
one process.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_cgn.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A stored box of a tensor: its place in the tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start_byte: int
    dtype: torch.dtype


class DistReader:
    """The tensors of a ``torch_dist`` directory, by key."""

    def __init__(self, directory: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: If the directory is not complete.
        """
        self.directory = directory
        try:
            metadata = FileSystemReader(directory).read_metadata()
        except Exception as error:
            # Damaged bytes in a pickle raise whatever they spell.
            raise CheckpointError(
                f"{directory / '.metadata'}: not the metadata of a complete checkpoint: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(
                f"{directory / '.metadata'}: not the metadata of a complete checkpoint: it holds "
                f"a {type(metadata).__name__}"
            )
        self._places = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def check_files(self, keys: Sequence[str]) -> None:
        """Refuse files that are missing or shorter than the metadata says.

        Args:
            keys: Tensors that will be read.

        Raises:
            CheckpointError: Naming the file and both sizes.
        """
        needed: dict[str, int] = {}
        for key in keys:
            for chunk in self.tensors[key].chunks:
                place = self._place(key, chunk)
                stop = place.offset + place.length
                needed[place.relative_path] = max(needed.get(place.relative_path, 0), stop)
        for name, size in needed.items():
            file = self.directory / name
            found = file.stat().st_size if file.exists() else 0
            if found < size:
                raise CheckpointError(
                    f"{file}: has {found} bytes, but the checkpoint's metadata needs {size}: "
                    "truncated or missing; use another checkpoint"
                )

    def chunks(self, key: str) -> Iterator[Chunk]:
        """The chunks of a tensor, found in their files."""
        stored = self.tensors[key]
        for chunk in stored.chunks:
            place = self._place(key, chunk)
            file = self.directory / place.relative_path
            size = math.prod(chunk.sizes) * stored.properties.dtype.itemsize
            with file.open("rb") as opened:
                archive = _View(opened, place.offset, place.length)
                start = self._data_offset(archive, key, size)
            yield Chunk(
                offsets=tuple(chunk.offsets),
                sizes=tuple(chunk.sizes),
                file=file,
                start_byte=place.offset + start,
                dtype=stored.properties.dtype,
            )

    def _data_offset(self, archive: io.RawIOBase, key: str, size: int) -> int:
        """Where a chunk's bytes begin in its archive."""
        try:
            with zipfile.ZipFile(archive) as contents:
                records = [r for r in contents.infolist() if "/data/" in r.filename]
            if len(records) != 1 or records[0].compress_type != zipfile.ZIP_STORED:
                raise ValueError("not a single uncompressed tensor")
            if records[0].file_size != size:
                raise ValueError(f"{records[0].file_size} bytes, expected {size}")
            archive.seek(records[0].header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", archive.read(4) or b"")
        except (zipfile.BadZipFile, ValueError, struct.error) as error:
            raise CheckpointError(
                f"{self.directory}: tensor {key!r} cannot be read: {error}; the checkpoint is "
                "damaged, use another"
            ) from error
        return int(records[0].header_offset) + 30 + int(name_length) + int(extra_length)

    def _place(self, key: str, chunk: ChunkStorageMetadata) -> "_Place":
        place: _Place = self._places[MetadataIndex(key, chunk.offsets)]
        return place


class _Place:
    """What a file system checkpoint says of a chunk (for type checking only)."""

    relative_path: str
    offset: int
    length: int


class _View(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}
        if base[whence] + offset < 0:
            raise ValueError(f"seek to {base[whence] + offset}")
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data
