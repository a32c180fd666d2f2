"""The plan of a run: which sequences come from which source, in which phase.

A *phase* draws sequences from its sources in proportion to their shares, and from a source's files
in proportion to their weights (`interleave.py`). Each file goes on in its own order where it
stopped (`order.py`), so that nothing is repeated or skipped where phases meet. Hence two runs with
the same first phases read the same, whatever follows: a checkpoint is gone on from when what it
has consumed is the beginning of the new plan.

Arithmetic over a few integers and fractions only: no files, no arrays.
"""

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from megatron_cgn.data.interleave import Tree, count, interleave, locate
from megatron_cgn.data.sources import Source

FORMAT = 1
"""Version of the record."""

type Place = tuple[int, int]
"""A file: the place of its source, and its place in the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendFile:
    """A range of documents of one index."""

    path: str
    """Prefix of the index, as it was given."""
    identity: str
    """Stands for the content of the documents: the index's digest and their range."""
    start: int
    """First document."""
    stop: int
    """One past the last document."""
    tokens: int
    """Tokens of an epoch."""
    weight: Fraction
    """Share of the source's sequences: the files' weights add up to 1."""

    @property
    def digest(self) -> str:
        """The index's own, without the range."""
        return self.identity.partition("[")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendSource:
    """A source."""

    name: str
    """Its name."""
    files: tuple[BlendFile, ...]
    """What is trained on."""
    held_out_tokens: int
    """Tokens of what is held out."""
    held_out: tuple[str, ...]
    """Stands for the content of what is held out."""

    @classmethod
    def of(cls, source: Source) -> Self:
        """Describe a checked source."""
        total = sum(source.weights, Fraction())
        return cls(
            name=source.name,
            files=tuple(
                BlendFile(
                    path=documents.index.prefix,
                    identity=documents.identity,
                    start=documents.start,
                    stop=documents.stop,
                    tokens=documents.tokens,
                    weight=weight / total if total else weight,
                )
                for documents, weight in zip(source.training, source.weights, strict=True)
            ),
            held_out_tokens=sum(documents.tokens for documents in source.validation),
            held_out=tuple(documents.identity for documents in source.validation),
        )

    @property
    def tokens(self) -> int:
        """Tokens of an epoch of all files."""
        return sum(file.tokens for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Some consecutive sequences of a run, and where they come from."""

    start: int
    """First sequence."""
    stop: int
    """One past the last sequence."""
    shares: Mapping[str, Fraction]
    """Shares of the sources by name, above 0; they add up to 1."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The plan. Immutable; every question is answered without going through the sequences."""

    sources: tuple[BlendSource, ...]
    """Every source, also those that are only validated on."""
    phases: tuple[Phase, ...]
    """What is read, from sequence 0 without gaps."""
    seq_length: int
    """Tokens of one sequence."""
    global_batch_size: int
    """Sequences of one step."""
    seed: int
    """Seed of the order within each file."""

    @property
    def sequences(self) -> int:
        """Sequences of the run."""
        return self.phases[-1].stop

    @functools.cached_property
    def _trees(self) -> list[Tree[Place]]:
        return [self._tree(phase) for phase in self.phases]

    @functools.cached_property
    def _begins(self) -> list[int]:
        return [phase.start for phase in self.phases]

    @functools.cached_property
    def _before(self) -> list[dict[Place, int]]:
        """What each file has given when a phase begins."""
        totals = [dict.fromkeys(self.places, 0)]
        for phase, tree in zip(self.phases, self._trees, strict=True):
            drawn = dict(count(tree, phase.stop - phase.start))
            totals.append({place: n + drawn.get(place, 0) for place, n in totals[-1].items()})
        return totals

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """Every file that is there to train on, in order."""
        return tuple(
            (s, f) for s, source in enumerate(self.sources) for f in range(len(source.files))
        )

    def file(self, place: Place) -> BlendFile:
        """The file at a place."""
        return self.sources[place[0]].files[place[1]]

    def locate(self, sequence: int) -> tuple[Place, int]:
        """Find a sequence of the run: its file, and which sample of that file it is."""
        assert 0 <= sequence < self.sequences, (sequence, self.sequences)
        phase = bisect.bisect_right(self._begins, sequence) - 1
        place, sample = locate(self._trees[phase], sequence - self._begins[phase])
        return place, self._before[phase][place] + sample

    def drawn(self, start: int, stop: int) -> dict[Place, int]:
        """How many of the sequences ``start`` to ``stop`` each file gives."""
        first, last = self._consumed(start), self._consumed(stop)
        return {place: last[place] - first[place] for place in self.places}

    def _consumed(self, sequences: int) -> dict[Place, int]:
        assert 0 <= sequences <= self.sequences, (sequences, self.sequences)
        phase = max(0, bisect.bisect_left(self._begins, sequences) - 1)
        totals = dict(self._before[phase])
        for place, number in count(self._trees[phase], sequences - self._begins[phase]):
            totals[place] += number
        return totals

    def _tree(self, phase: Phase) -> Tree[Place]:
        """By name, so that the order in which sources are listed changes nothing."""
        places = {source.name: place for place, source in enumerate(self.sources)}
        return interleave(
            [(share, self._files(places[name])) for name, share in sorted(phase.shares.items())]
        )

    def _files(self, source: int) -> Tree[Place]:
        files = self.sources[source].files
        return interleave([(file.weight, (source, place)) for place, file in enumerate(files)])

    def clip(self, sequences: int) -> tuple[Phase, ...]:
        """The phases of the first ``sequences`` sequences."""
        return tuple(
            Phase(start=p.start, stop=min(p.stop, sequences), shares=p.shares)
            for p in self.phases
            if p.start < sequences
        )

    def to_record(self) -> dict[str, Any]:
        """The plan as JSON; fractions become text such as ``4/5``."""
        return {
            "format": FORMAT,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "global_batch_size": self.global_batch_size,
            "sources": [
                {
                    "name": source.name,
                    "files": [
                        {
                            "path": file.path,
                            "identity": file.identity,
                            "documents": [file.start, file.stop],
                            "tokens": file.tokens,
                            "weight": str(file.weight),
                        }
                        for file in source.files
                    ],
                    "held_out": {
                        "tokens": source.held_out_tokens,
                        "identities": list(source.held_out),
                    },
                }
                for source in self.sources
            ],
            "phases": [
                {
                    "start": phase.start,
                    "stop": phase.stop,
                    "shares": {name: str(share) for name, share in phase.shares.items()},
                }
                for phase in self.phases
            ],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read a plan back.

        Args:
            record: What `to_record` wrote.

        Returns:
            The plan.

        Raises:
            ValueError, KeyError, TypeError: If it is no such record.
        """
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}; this version reads {FORMAT}")
        return cls(
            sources=tuple(_source_of(source) for source in record["sources"]),
            phases=tuple(
                Phase(
                    start=phase["start"],
                    stop=phase["stop"],
                    shares={name: Fraction(share) for name, share in phase["shares"].items()},
                )
                for phase in record["phases"]
            ),
            seq_length=record["seq_length"],
            global_batch_size=record["global_batch_size"],
            seed=record["seed"],
        )


def _source_of(record: Mapping[str, Any]) -> BlendSource:
    return BlendSource(
        name=record["name"],
        files=tuple(
            BlendFile(
                path=file["path"],
                identity=file["identity"],
                start=file["documents"][0],
                stop=file["documents"][1],
                tokens=file["tokens"],
                weight=Fraction(file["weight"]),
            )
            for file in record["files"]
        ),
        held_out_tokens=record["held_out"]["tokens"],
        held_out=tuple(record["held_out"]["identities"]),
    )


def phases_of(
    mixes: Sequence[Mapping[str, Fraction]], ends: Sequence[int], *, global_batch_size: int
) -> tuple[Phase, ...]:
    """Put phases together.

    Args:
        mixes: Weights of the sources in each phase, above 0; made to add up to 1.
        ends: Step after which each phase is over, ascending.
        global_batch_size: Sequences of one step.

    Returns:
        The phases; those of no step are left out.
    """
    phases = []
    for mix, (start, stop) in zip(mixes, itertools.pairwise([0, *ends]), strict=True):
        total = sum(mix.values(), Fraction())
        if stop > start:
            phases.append(
                Phase(
                    start=start * global_batch_size,
                    stop=stop * global_batch_size,
                    shares={name: weight / total for name, weight in mix.items()},
                )
            )
    return tuple(phases)
