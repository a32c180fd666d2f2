"""Safetensors files as bytes on a disk: mapped for reading, streamed for writing.

A reader checks every header before anything is loaded, and hands out views of the mapped file
whose pages can be dropped again, so that reading a model of any size needs no memory of its own.
A writer knows its whole layout beforehand and puts tensors at their places in any order.
The format: 8 bytes of header length, a JSON header, then the tensors' bytes one after another.
"""

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cgn.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of weights that are read and written."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

type TensorTypes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Types and shapes of tensors, by name."""

_MAX_HEADER_BYTES = 100_000_000
_COPY_BYTES = 2**24
_MAP_NORESERVE = 0x4000
"""Linux's flag; the module `mmap` names it only from Python 3.13 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where one tensor lies, in bytes from the start of its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class MappedFile:
    """A file mapped into memory, from which tensors are viewed and pages are dropped.

    Views stay valid after pages are dropped: they are read again from the disk when touched.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        # Private and without reserve: a mapping larger than the memory must not be refused, and
        # torch wants a writable buffer.
        self._map = mmap.mmap(
            self._file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
        self._map.madvise(mmap.MADV_SEQUENTIAL)

    def view(self, dtype: torch.dtype, shape: Sequence[int], *, offset: int) -> Tensor:
        """A tensor whose memory is the file. It must only be read."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(*shape)

    def drop(self, *, offset: int, num_bytes: int, for_all: bool) -> None:
        """Let go of the memory that backs a range; whole pages inside it only.

        Args:
            offset: Start of the range.
            num_bytes: Its length.
            for_all: Also out of the page cache, where other processes would find it.
        """
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)
            if for_all:
                descriptor = self._file.fileno()
                os.posix_fadvise(descriptor, first, stop - first, os.POSIX_FADV_DONTNEED)


class MappedTensors:
    """Tensors in safetensors files, by name. Nothing is mapped before a tensor is read."""

    def __init__(self, places: Mapping[str, TensorPlace]) -> None:
        """Take tensors from files whose headers were read, by `read_header`."""
        self.places = dict(places)
        self._mapped: dict[Path, MappedFile] = {}

    def view(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or rows of it, as a view of the mapped file; only to be read."""
        place = self.places[name]
        if rows is None:
            return self._file(place).view(place.dtype, place.shape, offset=place.offset)
        count = rows.stop - rows.start
        return self._file(place).view(
            place.dtype, (count, *place.shape[1:]), offset=_row_offset(place, rows.start)
        )

    def drop(self, name: str, rows: slice, *, for_all: bool = False) -> None:
        """Let go of the memory that backs rows which were viewed.

        Args:
            name: The tensor.
            rows: The rows.
            for_all: Also out of the page cache. Only a program that streams through more than
                fits does well to: other ranks on this machine may be about to read the rows.
        """
        place = self.places[name]
        start = _row_offset(place, rows.start)
        stop = _row_offset(place, rows.stop)
        self._file(place).drop(offset=start, num_bytes=stop - start, for_all=for_all)

    def _file(self, place: TensorPlace) -> MappedFile:
        if place.file not in self._mapped:
            self._mapped[place.file] = MappedFile(place.file)
        return self._mapped[place.file]


class SafetensorsDirectory(MappedTensors):
    """The weights of a Hugging Face directory: one file, or several with an index.

    Opening it reads and checks every header, so that a missing or truncated file is found
    before anything is loaded.
    """

    def __init__(self, path: str | Path) -> None:
        """Read and check the headers.

        Args:
            path: Hugging Face directory.

        Raises:
            ModelError: If a file is missing, truncated or damaged, naming it.
        """
        super().__init__({})
        self.path = Path(path)
        for file, names in _files(self.path).items():
            header = read_header(file)
            if names is not None and (lost := sorted(names - header.keys())):
                raise ModelError(
                    f"{file}: tensor {lost[0]!r} ({len(lost)} in all) is named in {INDEX_FILE} "
                    "but not in the file; copy the model again"
                )
            self.places |= header if names is None else {name: header[name] for name in names}


def forget_file(path: Path) -> None:
    """Let a file that was made durable out of the page cache.

    Who streams through more than fits frees what is done with, or the kernel has to search for
    memory to reclaim while the next bytes wait.
    """
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row_blocks(num_rows: int, row_bytes: int, *, block_bytes: int) -> Iterator[slice]:
    """Cut rows into consecutive blocks of at most `block_bytes`, but of one row at least."""
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _row_offset(place: TensorPlace, row: int) -> int:
    return place.offset + row * math.prod(place.shape[1:]) * place.dtype.itemsize


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors its index names (None without an index)."""
    index = path / INDEX_FILE
    if not index.exists():
        if not (path / SINGLE_FILE).exists():
            raise ModelError(
                f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "save the model as safetensors"
            )
        return {path / SINGLE_FILE: None}
    if (path / SINGLE_FILE).exists():
        raise ModelError(
            f"{path}: holds both {SINGLE_FILE} and {INDEX_FILE}, perhaps of two models; remove "
            "the one that is not meant"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a readable index: {error!r}; copy it again") from error
    files: dict[Path, set[str] | None] = {}
    for name, file in pairs:
        names = files.setdefault(path / file, set())
        assert names is not None
        names.add(name)
    for file_path in files:
        if not file_path.exists():
            raise ModelError(f"{file_path}: missing, but {INDEX_FILE} names it; copy it again")
    return files


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Find the tensors of one file.

    Args:
        path: A safetensors file.

    Returns:
        Their places by name.

    Raises:
        ModelError: If the file is damaged, too short, or has types that are not supported.
    """
    return dict(_read_header(path))


def _read_header(path: Path) -> Iterator[tuple[str, TensorPlace]]:
    """The tensors of one file, checked against its size."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError(f"the header is a {type(header).__name__}")
            header.pop("__metadata__", None)
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a complete safetensors file: {error}") from error
    for name, entry in header.items():
        try:
            start, stop = (int(value) for value in entry["data_offsets"])
            kind, shape = str(entry["dtype"]), tuple(int(value) for value in entry["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: tensor {name!r} is badly described: {error!r}") from error
        if kind not in DTYPES:
            raise ModelError(
                f"{path}: tensor {name!r} has type {kind}; supported are {', '.join(DTYPES)}. "
                "Dequantise the model first"
            )
        place = TensorPlace(file=path, dtype=DTYPES[kind], shape=shape, offset=8 + length + start)
        if stop - start != place.num_bytes or start < 0:
            raise ModelError(f"{path}: tensor {name!r} of shape {shape} has {stop - start} bytes")
        if 8 + length + stop > size:
            raise ModelError(
                f"{path}: truncated: tensor {name!r} ends at byte {8 + length + stop}, "
                f"the file has {size}; copy it again"
            )
        yield name, place


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One safetensors file to be written: its name, header and every tensor's place in it."""

    file_name: str
    header: bytes
    offsets: Mapping[str, int]
    num_bytes: int


def plan_shards(tensors: Sequence[TensorTypes], *, max_shard_bytes: int) -> list[ShardPlan]:
    """Lay tensors out over files, in order.

    Args:
        tensors: Types and shapes by name, in one mapping per writer. A file never mixes
            writers, unless everything fits one file.
        max_shard_bytes: A file is closed before it would exceed this; a single larger tensor
            gets a file of its own.

    Returns:
        The files, in order.
    """
    sizes = [
        {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in group.items()}
        for group in tensors
    ]
    merged = {name: value for group in tensors for name, value in group.items()}
    if sum(sum(group.values()) for group in sizes) <= max_shard_bytes:
        return [_plan_shard(SINGLE_FILE, merged)]
    shards: list[list[str]] = []
    for group in sizes:
        filled = max_shard_bytes + 1
        for name, size in group.items():
            if filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
    return [
        _plan_shard(
            f"model-{number:05d}-of-{len(shards):05d}.safetensors",
            {name: merged[name] for name in names},
        )
        for number, names in enumerate(shards, start=1)
    ]


def plan_again(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ShardPlan:
    """Lay out a file as another one is, but for the shapes of some tensors.

    Args:
        path: An existing file; name, order, types and metadata are taken from it.
        shapes: New shapes by name.

    Returns:
        The layout.

    Raises:
        ModelError: If the file is damaged.
    """
    places = sorted(read_header(path).items(), key=lambda item: item[1].offset)
    types = {name: (place.dtype, shapes.get(name, place.shape)) for name, place in places}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__", {"format": "pt"})
    return _plan_shard(path.name, types, metadata)


def _plan_shard(
    file_name: str, tensors: TensorTypes, metadata: Mapping[str, str] | None = None
) -> ShardPlan:
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    starts: dict[str, int] = {}
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        starts[name] = position
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return ShardPlan(
        file_name=file_name,
        header=struct.pack("<Q", len(text)) + text,
        offsets={name: base + start for name, start in starts.items()},
        num_bytes=base + position,
    )


def index_json(plans: Sequence[ShardPlan]) -> str:
    """The text of ``model.safetensors.index.json`` for several files."""
    total = sum(plan.num_bytes - len(plan.header) for plan in plans)
    weight_map = {name: plan.file_name for plan in plans for name in plan.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2) + "\n"


class ShardWriter:
    """Writes the tensors of one planned file at their places. Close it to make it durable."""

    def __init__(self, directory: Path, plan: ShardPlan) -> None:
        """Create the file and write its header."""
        self._plan = plan
        self._file = (directory / plan.file_name).open("wb")
        self._file.write(plan.header)
        self._file.truncate(plan.num_bytes)

    def write(self, name: str, tensor: Tensor, *, start_byte: int = 0) -> None:
        """Write a tensor, or consecutive rows of it, at its place.

        Args:
            name: Planned tensor.
            tensor: Contiguous, on the CPU, of the planned type.
            start_byte: Where in the planned tensor these bytes begin.
        """
        self._file.seek(self._plan.offsets[name] + start_byte)
        self._file.write(memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy()))

    def copy(
        self, name: str, source: Path, *, offset: int, num_bytes: int, start_byte: int = 0
    ) -> None:
        """Copy bytes of another file to a tensor's place, within the kernel if it can.

        Args:
            name: Planned tensor.
            source: File to read.
            offset: Where in it the bytes begin.
            num_bytes: How many.
            start_byte: Where in the planned tensor they shall begin.
        """
        position = self._plan.offsets[name] + start_byte
        with source.open("rb", buffering=0) as opened:
            done = 0
            while done < num_bytes:
                count = _copy_some(
                    opened.fileno(),
                    self._file.fileno(),
                    min(num_bytes - done, _COPY_BYTES),
                    offset + done,
                    position + done,
                )
                if not count:
                    raise OSError(errno.EIO, "ends too early", str(source))
                done += count
            # Copied once, not needed again: better free than for the kernel to reclaim.
            os.posix_fadvise(opened.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flush to the disk and close."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _copy_some(source: int, target: int, count: int, from_byte: int, to_byte: int) -> int:
    """Copy up to `count` bytes between open files; how many it were."""
    try:
        return os.copy_file_range(source, target, count, from_byte, to_byte)
    except OSError as error:
        # Not every file system and pair of file systems can.
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return os.pwrite(target, os.pread(source, count, from_byte), to_byte)
