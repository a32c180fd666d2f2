"""Which documents a checkpoint has consumed, and how often: exactly, from its account alone.

A token is consumed when it is a label: when the model has been taught to predict it. The first
token of everything is nobody's label. The order is drawn again instead of being read from a cache,
so only the indices themselves are needed, wherever they lie now.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.account import ACCOUNT_FILE
from megatron_cgn.data.blend import Blend, BlendFile
from megatron_cgn.data.indexed import check_index
from megatron_cgn.data.order import ReadingOrder
from megatron_cgn.errors import DataError

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumedFile:
    """What of one index was consumed."""

    source: str
    """Name of its source."""
    file: BlendFile
    """The index, and which of its documents were there to train on."""
    documents: Counts
    """Numbers of the documents of which anything was consumed, ascending, int64 ``[N]``."""
    tokens: Counts
    """Tokens consumed of each of them, every pass counted, int64 ``[N]``."""
    passes: npt.NDArray[np.float64]
    """The same in passes: ``tokens`` over the document's length, float64 ``[N]``."""

    def tokens_of(self, document: int) -> int:
        """Tokens consumed of one document of the index; 0 if it was not consumed."""
        place = int(np.searchsorted(self.documents, document))
        found = place < len(self.documents) and self.documents[place] == document
        return int(self.tokens[place]) if found else 0


def read_account(path: Path) -> tuple[Blend, int]:
    """Read what a checkpoint, or a whole run as planned, consumes.

    Args:
        path: A checkpoint's or a run's directory, or its ``blend.json``.

    Returns:
        The plan, and how many of its sequences were consumed.

    Raises:
        DataError: If there is no account or it cannot be read.
    """
    file = path / ACCOUNT_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text("utf-8"))
        blend, consumed = Blend.from_record(content["plan"]), int(content["sequences"])
        if not 0 <= consumed <= blend.sequences:
            raise ValueError(f"{consumed} of {blend.sequences} sequences")
        return blend, consumed
    except FileNotFoundError as error:
        raise DataError(
            f"{file}: there is no such file. Give the directory of a checkpoint, or of a run, that "
            "this version has written."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not an account of this version ({error}).") from error


def documents_consumed(
    blend: Blend,
    *,
    consumed: int,
    prefixes: Mapping[str, str] | None = None,
    digest: str | None = None,
) -> Iterator[ConsumedFile]:
    """Say of every index which documents were consumed.

    Takes the time and memory of drawing an epoch's order: about 60 bytes a document of one index
    at a time.

    Args:
        blend: The plan; see `read_account`.
        consumed: How many of its sequences were consumed.
        prefixes: Where indices lie now, by the prefix that the plan has; others lie where they
            were.
        digest: Only the index with this digest, as its sidecar has it.

    Yields:
        One result an index that was read, in the order of the plan.

    Raises:
        DataError: If an index is missing or not the one that was read.
    """
    for place, samples in blend.drawn(0, consumed).items():
        file = blend.file(place)
        if not samples or digest not in (None, file.digest):
            continue
        prefix = (prefixes or {}).get(file.path, file.path)
        index = check_index(prefix)
        if index.sidecar.digest != file.digest:
            raise DataError(
                f"{prefix}: not the index that was read: its digest is {index.sidecar.digest}, "
                f"not {file.digest}. Restore it, or say where it lies now."
            )
        order = ReadingOrder(
            identity=file.identity,
            num_documents=file.stop - file.start,
            tokens=file.tokens,
            seq_length=blend.seq_length,
            seed=blend.seed,
        )
        lengths = index.lengths[file.start : file.stop].view(np.ndarray)
        tokens = tokens_consumed(order, lengths, samples=samples)
        (found,) = np.nonzero(tokens)
        yield ConsumedFile(
            source=blend.sources[place[0]].name,
            file=file,
            documents=found + file.start,
            tokens=tokens[found],
            passes=tokens[found] / lengths[found],
        )


def tokens_consumed(order: ReadingOrder, lengths: npt.NDArray[np.int32], *, samples: int) -> Counts:
    """Count the tokens of each document that the first samples consume.

    Args:
        order: The order of the index.
        lengths: Tokens of each document, int32 ``[D]``.
        samples: How many samples were consumed.

    Returns:
        Tokens, int64 ``[D]``; their sum is ``samples * seq_length``.
    """
    totals = np.zeros(len(lengths), dtype=np.int64)
    before = np.zeros(0, dtype=np.int64)
    for number in range(order.blocks_for(samples)):
        first, end = order.first_sample(number), order.first_sample(number + 1)
        if number and end <= samples:  # every token of it once: no need to draw it
            totals += order.epochs_per_block * lengths.astype(np.int64)
            before = _last_window(order, number)
            continue
        block = order.build(number, lengths)
        bounds = np.zeros(len(block.documents) + 1, dtype=np.int64)
        np.cumsum(lengths[block.documents], out=bounds[1:])
        starts = block.starts[: min(samples, end) - first]
        windows = bounds[starts[:, 0]] + starts[:, 1] + 1  # the first label of each
        windows.sort()
        windows = np.concatenate([before, windows])
        np.add.at(totals, block.documents, np.diff(_covered(windows, bounds, order)))
        before = windows[-1:] - order.block_tokens
    return totals


def _last_window(order: ReadingOrder, block: int) -> Counts:
    """First label of a block's last window, in tokens from the next block's first."""
    last = order.first_sample(block + 1) - 1
    return np.array([last * order.seq_length + 1 - (block + 1) * order.block_tokens])


def _covered(windows: Counts, bounds: Counts, order: ReadingOrder) -> Counts:
    """Labels before each bound: windows are in order and do not overlap."""
    number = np.searchsorted(windows, bounds, side="left")
    beyond = windows[number - 1] + order.seq_length - bounds
    covered = number * order.seq_length - np.maximum(beyond, 0)
    return np.where(number > 0, covered, 0)
