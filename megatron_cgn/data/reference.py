"""Reference log-probabilities of all answers of a run: which are known, and why others are not.

How the scores of one file lie on disk is `reference_store.py`'s; who makes them, `eval/`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.reference_store import (
    FORMAT,
    ReferenceStore,
    differing,
    read_about,
    read_facts,
)
from megatron_cgn.data.sft_loader import ConversationRow

_PATH, _CONTENT = "file", "content"
_SPELLED = {
    _CONTENT: "of another content of the file, another tokenizer or another chat template",
    "weights": "of other weights",
    "model": "of another config.json of the model",
    "adapter": "of another lora.adapter_path",
    "precision": "in another precision",
    "answers": "of other rows",
    "format": "in another version of the file",
}
"""How scores are called that differ in a fact."""

type Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredFile:
    """The answers of one file, as they are scored."""

    path: str
    """Where the file was."""
    facts: Mapping[str, Any]
    """All that decides what is read and counted, but for `readings`, as JSON."""
    readings: npt.NDArray[np.uint64]
    """Stands for what is read of each answer, uint64 ``[N]``."""
    counted: npt.NDArray[np.int32]
    """Tokens of each that count, int32 ``[N]``."""
    lines: npt.NDArray[np.int64]
    """Line or record of each in the file, int64 ``[N]``."""


class Scored(Protocol):
    """The answers of all files of a run, numbered through."""

    @property
    def name(self) -> str:
        """What they are called in messages."""
        ...

    @property
    def files(self) -> Sequence[ScoredFile]:
        """The files, in the order of the numbers."""
        ...

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Places that each answer takes of a row, int32 ``[A]``."""
        ...

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        """Read answers, end to end."""
        ...


def where(scored: Scored, number: int) -> str:
    """File and line of an answer's record."""
    for file in scored.files:
        if number < len(file.lines):
            return f"{file.path}:{file.lines[number]}"
        number -= len(file.lines)
    raise IndexError(number)


class ReferenceCache:
    """The scores of all answers of a run. Use as a context manager; for one process."""

    def __init__(
        self,
        cache: Path,
        scored: Scored,
        *,
        model: Mapping[str, Any],
        about: Mapping[str, str],
    ) -> None:
        """Open the stores of all files, or make a place for them.

        Args:
            cache: Where they belong.
            scored: The answers.
            model: All of the model that decides scores, as JSON.
            about: What may help a reader of the files, such as the model's path.

        Raises:
            DataError: If the cache cannot be read or made.
        """
        self._cache = cache
        self._about = about
        self._name = scored.name
        self._files = scored.files
        self._facts = [{"format": FORMAT, **file.facts, **model} for file in self._files]
        self._stores = [
            ReferenceStore.open_or_start(
                cache,
                facts,
                about={_PATH: file.path, **about},
                readings=file.readings,
                counted=file.counted,
            )
            for file, facts in zip(self._files, self._facts, strict=True)
        ]
        self._bases = np.cumsum([0, *(len(file.readings) for file in self._files)])
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for store in self._stores:
            self._stack.enter_context(store)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    @property
    def logps(self) -> npt.NDArray[np.float64]:
        """Log-probability of each answer; NaN where it is not known, float64 ``[A]``."""
        return np.concatenate([store.logps for store in self._stores])

    def put(self, numbers: Numbers, logps: npt.NDArray[np.float64]) -> None:
        """Keep scores; see `ReferenceStore.put`.

        Raises:
            DataError: If the disk refuses.
        """
        for place, mine in self._by_file(numbers):
            self._stores[place].put(numbers[mine] - self._bases[place], logps[mine])

    def reasons(self, missing: Numbers) -> Iterator[str]:
        """Say of each file with missing answers why they are not known.

        Args:
            missing: Their numbers.

        Yields:
            A line a file.
        """
        for place, mine in self._by_file(missing):
            number = f"{int(mine.sum()):,} {self._name}"
            yield f"  {self._files[place].path}: {number}: {self._reason(place)}"

    def _by_file(self, numbers: Numbers) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        owners = np.searchsorted(self._bases, numbers, side="right") - 1
        for place in np.unique(owners).tolist():
            yield place, owners == place

    def _reason(self, place: int) -> str:
        store = self._stores[place]
        if store.num_other:
            return (
                f"{store.num_other:,} are read differently than when they were scored: "
                "data.seq_length or chat.truncation was another"
            )
        if not np.isnan(store.logps).all():
            return "those that no run before needed or finished"
        relative = _nearest(self._cache, self._facts[place], self._files[place].path)
        if relative is None:
            return "not scored before"
        different, about = relative
        origin = f" ({about['model']})" if "weights" in different and "model" in about else ""
        named = " and ".join(_SPELLED.get(name, f"with another {name}") for name in different)
        return f"there are scores {named}{origin}, which are not used"


def _nearest(
    cache: Path, facts: Mapping[str, Any], path: str
) -> tuple[list[str], dict[str, str]] | None:
    """Scores of the same file or content that were made otherwise: in what, and their `about`."""
    found: list[tuple[list[str], dict[str, str]]] = []
    for folder in sorted(cache.glob("reference-*")):
        try:
            written, about = read_facts(folder), read_about(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of no use to anybody, and no hindrance
        different = differing(written, facts)
        related = _CONTENT not in different or about.get(_PATH) == path
        has_scores = any(folder.glob("scores-*.bin"))
        if different and related and has_scores and written.get("answers") == facts["answers"]:
            found.append((different, about))
    return min(found, key=lambda pair: len(pair[0]), default=None)
