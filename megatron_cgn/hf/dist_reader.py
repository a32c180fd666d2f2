"""Read tensors out of Megatron's ``torch_dist`` directories without loading their chunks.

A chunk is an archive as ``torch.save`` writes it, at some place of a ``.distcp`` file. Its tensor
lies in it uncompressed, so it can be viewed in the mapped file. Loading it would take memory for
a whole chunk, which is an unsharded embedding in a checkpoint of one process.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_cgn.errors import CheckpointError
from megatron_cgn.hf.safetensors_io import MappedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A stored box of a tensor: its place in the tensor, and its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: MappedFile
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
        self._files: dict[str, MappedFile] = {}

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
        """The chunks of a tensor, ready to be viewed."""
        stored = self.tensors[key]
        for chunk in stored.chunks:
            place = self._place(key, chunk)
            file = self._file(place.relative_path)
            size = math.prod(chunk.sizes) * stored.properties.dtype.itemsize
            archive = _View(file.view(torch.uint8, (place.length,), offset=place.offset))
            yield Chunk(
                offsets=tuple(chunk.offsets),
                sizes=tuple(chunk.sizes),
                file=file,
                start_byte=place.offset + self._data_offset(archive, key, size),
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

    def _file(self, name: str) -> MappedFile:
        if name not in self._files:
            self._files[name] = MappedFile(self.directory / name)
        return self._files[name]


class _Place:
    """What a file system checkpoint says of a chunk (for type checking only)."""

    relative_path: str
    offset: int
    length: int


class _View(io.RawIOBase):
    """A read-only file over bytes in memory, without copying them."""

    def __init__(self, data: Tensor) -> None:
        self._bytes = memoryview(data.numpy())
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._bytes)}
        if base[whence] + offset < 0:
            raise ValueError(f"seek to {base[whence] + offset}")
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        stop = len(self._bytes) if size < 0 else self._position + size
        data = bytes(self._bytes[self._position : stop])
        self._position += len(data)
        return data
