"""Signatures in a directory: of a part of a run, or kept by a run for later ones.

``hashes.npy`` and ``minhashes.npy`` are plain numpy files, mapped when read; ``parameters.json`` is
written last and says how they were made, because other signatures cannot be compared with them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron_cgn.corpus.dedup.signature import Signatures
from megatron_cgn.errors import DataError

_HASHES: Final = "hashes.npy"
_MINHASHES: Final = "minhashes.npy"
_PARAMETERS: Final = "parameters.json"


def save_signatures(
    directory: Path,
    parts: Iterable[Signatures],
    *,
    num_documents: int,
    parameters: Mapping[str, int],
) -> None:
    """Write signatures, part by part, so that they are never in memory together.

    Args:
        directory: To create; what is there already is replaced.
        parts: Signatures in order.
        num_documents: How many there are in all.
        parameters: `Signer.parameters` of what signed them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    width = parameters["num_permutations"]
    # Without it nothing else in the directory is valid.
    (directory / _PARAMETERS).unlink(missing_ok=True)
    files = {
        _HASHES: ("<u8", (num_documents, 4)),
        _MINHASHES: ("<u4", (num_documents, width)),
    }
    with (
        open(directory / _HASHES, "wb") as hashes,
        open(directory / _MINHASHES, "wb") as minhashes,
    ):
        for file, (kind, shape) in zip((hashes, minhashes), files.values(), strict=True):
            layout = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, layout)
        written = 0
        for part in parts:
            hashes.write(np.ascontiguousarray(part.hashes, dtype="<u8").data)
            minhashes.write(np.ascontiguousarray(part.minhashes, dtype="<u4").data)
            written += len(part)
        assert written == num_documents, f"{written} signatures instead of {num_documents}"
        for file in (hashes, minhashes):
            file.flush()
            os.fsync(file.fileno())
    beside = directory / (_PARAMETERS + ".tmp")
    header = {"num_documents": num_documents, "parameters": dict(parameters)}
    with open(beside, "w", encoding="utf-8") as text:
        json.dump(header, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    beside.replace(directory / _PARAMETERS)


def load_signatures(directory: Path, *, parameters: Mapping[str, int]) -> Signatures:
    """Map signatures into memory.

    Args:
        directory: Where `save_signatures` wrote them.
        parameters: Those of this run, which must be the same.

    Returns:
        The signatures.

    Raises:
        DataError: There are none, they are damaged, or they were made in another way.
    """
    path = directory / _PARAMETERS
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        theirs, num_documents = dict(header["parameters"]), int(header["num_documents"])
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; name in deduplicate.prior the "
            "directory of signatures that an earlier run kept."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; make the signatures again.") from None
    different = [
        f"{name} {theirs.get(name)} instead of {parameters.get(name)}"
        for name in sorted(theirs.keys() | parameters.keys())
        if theirs.get(name) != parameters.get(name)
    ]
    if different:
        raise DataError(
            f"{directory}: signatures made in another way ({', '.join(different)}) cannot be "
            "compared; use the same deduplicate settings and package versions, or leave them out "
            "of deduplicate.prior."
        )
    return Signatures(
        _map(directory / _HASHES, "<u8", (num_documents, 4)),
        _map(directory / _MINHASHES, "<u4", (num_documents, parameters["num_permutations"])),
    )


def _map(path: Path, kind: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """Map an array, which must have this type and shape."""
    if shape[0] == 0:
        return np.zeros(shape, dtype=kind)
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); make the signatures again.") from None
    if array.dtype != np.dtype(kind) or array.shape != shape:
        raise DataError(
            f"{path}: {array.dtype} {array.shape} instead of {kind} {shape}; make the signatures "
            "again."
        )
    return array
