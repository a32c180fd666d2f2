"""Between the passes: which documents are duplicates, and what their ids are made to be.

The only step that looks at all documents at once; it knows them by hashes and signatures alone,
gathered into mapped files.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus import first_pass
from megatron_cgn.corpus.names import Names
from megatron_cgn.corpus.steps import Steps
from megatron_cgn.corpus.work import Work, write_json

STAGE = "decide"

_REASONS = {1: "duplicate/exact", 2: "duplicate/near"}
_CLUSTERS = 10
_MEMBERS = 4


def decide(work: Work, *, num_parts: int, settings: CorpusConfig) -> None:
    """Decide on every document, and keep the decisions in the work directory.

    Args:
        work: Where the first pass left its results.
        num_parts: How many parts there are.
        settings: Of all steps.

    Raises:
        DataError: If the signatures of an earlier corpus cannot be compared with these.
    """
    with work.writing(STAGE) as target:
        parts = [work.path(first_pass.STAGE, index) for index in range(num_parts)]
        kept = [len(np.load(part / "kept.npy", mmap_mode="r")) for part in parts]
        ids = [np.load(part / "ids.npy") for part in parts]
        offsets = np.zeros((num_parts + 1, 2), dtype=np.int64)
        offsets[1:, 0] = np.cumsum([len(part) for part in ids])
        offsets[1:, 1] = np.cumsum(kept)
        np.save(target / "offsets.npy", offsets)
        np.save(target / "copies.npy", number_copies(np.concatenate(ids)))
        del ids
        _save_duplicates(target, parts, int(offsets[-1, 1]), settings)


def _save_duplicates(
    target: Path, parts: Sequence[Path], num_kept: int, settings: CorpusConfig
) -> None:
    signer = Steps(settings).signer
    if signer is None:
        kinds, of = np.zeros(num_kept, dtype=np.uint8), np.arange(num_kept)
        similarity, num_crowded = np.ones(num_kept, dtype=np.float32), 0
    else:
        from megatron_cgn.corpus.dedup import find_duplicates, load_signatures, save_signatures

        # One file instead of thousands: a process may map only so many.
        gathered = target / "signatures"
        save_signatures(
            gathered,
            (load_signatures(part / "signatures", parameters=signer.parameters) for part in parts),
            num_documents=num_kept,
            parameters=signer.parameters,
        )
        found = find_duplicates(
            [load_signatures(gathered, parameters=signer.parameters)],
            settings.deduplicate,
            prior=[
                load_signatures(Path(path), parameters=signer.parameters)
                for path in settings.deduplicate.prior
            ],
        )
        kinds, of, similarity = found.kinds, found.of, found.similarity
        num_crowded = int(found.num_crowded)
    np.save(target / "kinds.npy", kinds)
    np.save(target / "of.npy", of)
    np.save(target / "similarity.npy", similarity)
    write_json(target / "tally.json", {"crowded": num_crowded})


def number_copies(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Number the documents whose id is already another's.

    Args:
        ids: Hashes of each document's id, and of id and text, ``[documents, 2]``.

    Returns:
        For each: 0 if it is the first of its id; else 1 for the first such document of its id and
        text, 2 for the second, and so on. ``[documents]``
    """
    copies = np.zeros(len(ids), dtype=np.uint32)
    later = np.flatnonzero(~_first_of_each(ids[:, 0]))
    if not len(later):
        return copies
    texts = ids[later, 1]
    order = np.argsort(texts, kind="stable")
    in_order = texts[order]
    starts = np.flatnonzero(np.append(True, in_order[1:] != in_order[:-1]))
    lengths = np.diff(np.append(starts, len(in_order)))
    copies[later[order]] = np.arange(len(in_order)) - np.repeat(starts, lengths) + 1
    return copies


def _first_of_each(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    _, first = np.unique(values, return_index=True)
    flags = np.zeros(len(values), dtype=np.bool_)
    flags[first] = True
    return flags


def unique_id(name: str, *, mark: int, copy: int) -> str:
    """An id no other document has.

    Args:
        name: The document's id.
        mark: Hash of id and text.
        copy: From `number_copies`.

    Returns:
        The id itself; with a suffix if an earlier document has it.
    """
    if copy == 0:
        return name
    return f"{name}~{mark:016x}" + (f".{copy}" if copy > 1 else "")


class Decisions:
    """Decisions on the documents of any part, read from the work directory."""

    def __init__(self, work: Work, *, prior: Sequence[str] = ()) -> None:
        """Map the decisions.

        Args:
            work: Where `decide` left them.
            prior: Directories of signatures of earlier corpora, as `decide` had them.
        """
        self._work = work
        folder = work.path(STAGE)
        self._offsets: npt.NDArray[np.int64] = np.load(folder / "offsets.npy")
        self._copies = np.load(folder / "copies.npy", mmap_mode="r")
        self._kinds = _map(folder / "kinds.npy")
        self._of = _map(folder / "of.npy")
        self._similarity = _map(folder / "similarity.npy")
        self._prior = [(Path(path), Names.load(Path(path))) for path in prior]
        self._part_names = lru_cache(maxsize=64)(self._load_names)

    def ids(self, part: int, names: list[str]) -> list[str]:
        """Make ids unique.

        Args:
            part: A part.
            names: Ids of all of its documents.

        Returns:
            The ids they get.
        """
        start, end = self._offsets[part : part + 2, 0]
        copies = self._copies[start:end].tolist()
        if not any(copies):
            return names
        marks = np.load(self._work.path(first_pass.STAGE, part) / "ids.npy")[:, 1].tolist()
        return [
            unique_id(name, mark=mark, copy=copy)
            for name, mark, copy in zip(names, marks, copies, strict=True)
        ]

    def duplicates(self, part: int) -> dict[int, tuple[str, str]]:
        """Find the duplicates in a part.

        Args:
            part: A part.

        Returns:
            Reason and evidence, by place among those of its documents that the first pass kept.
        """
        start, end = self._offsets[part : part + 2, 1].tolist()
        kinds = self._kinds[start:end]
        found = {}
        for place in np.flatnonzero(kinds).tolist():
            reason = _REASONS[int(kinds[place])]
            other = self._name(int(self._of[start + place]))
            alike = "equal"
            if reason == "duplicate/near":
                alike = f"{self._similarity[start + place]:.2f} similar"
            found[place] = reason, f"{alike} to {other}"
        return found

    def clusters(self) -> list[dict[str, Any]]:
        """Describe the documents that have most duplicates.

        Returns:
            For each its id, the number of its duplicates, and ids of some.
        """
        dropped = np.flatnonzero(self._kinds)
        kept, counts = np.unique(self._of[dropped], return_counts=True)
        largest = np.lexsort((kept, -counts))[:_CLUSTERS]
        return [
            {
                "id": self._name(int(kept[place])),
                "duplicates": int(counts[place]),
                "members": [
                    self._name(int(member))
                    for member in dropped[self._of[dropped] == kept[place]][:_MEMBERS]
                ],
            }
            for place in largest
        ]

    def _name(self, index: int) -> str:
        """Id of a document, by its place among all that the first pass kept."""
        if index < 0:
            return self._prior_name(index)
        part = int(np.searchsorted(self._offsets[:, 1], index, side="right")) - 1
        names, kept, ids = self._part_names(part)
        place = index - int(self._offsets[part, 1])
        row = int(kept[place])
        return unique_id(
            names[place],
            mark=int(ids[row, 1]),
            copy=int(self._copies[int(self._offsets[part, 0]) + row]),
        )

    def _prior_name(self, index: int) -> str:
        """Id of a document of an earlier corpus: -1 is the last of the last."""
        for path, names in reversed(self._prior):
            if -index <= len(names):
                return f"{names[len(names) + index]} of {path.parent}"
            index += len(names)
        raise AssertionError(f"no document {index} in the earlier corpora")

    def _load_names(
        self, part: int
    ) -> tuple[Names, npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        folder = self._work.path(first_pass.STAGE, part)
        return Names.load(folder), np.load(folder / "kept.npy"), np.load(folder / "ids.npy")


def _map(path: Path) -> npt.NDArray[Any]:
    """Map an array; an empty one cannot be mapped."""
    array: npt.NDArray[Any] = np.load(path)
    return np.load(path, mmap_mode="r") if array.size else array
