"""Which conversations are read equally often, and what share of the tokens they have."""

import hashlib
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.data_rules import DOMAIN
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.sft_files import AnyFile
from megatron_cgn.data.sft_order import ConversationPool
from megatron_cgn.data.sources import exact, mixes_of
from megatron_cgn.errors import DataError

type _Members = list[tuple[AnyFile, int]]
"""Files, and the number of each one's first conversation."""


def shares_of(run: RunConfig) -> dict[str, Fraction] | None:
    """Shares of the tokens by source name, which add up to 1; None if nobody says any."""
    if run.data.mix is None and all(source.weight is None for source in run.data.sources):
        return None
    (mix,) = mixes_of(run.data)
    total = sum(mix.values(), Fraction())
    return {name: weight / total for name, weight in mix.items()}


def epochs_of(run: RunConfig) -> str | None:
    """The source of a mix whose epochs are counted; None without a mix, or if it has none."""
    mix = run.data.mix or {}
    return run.data.epochs_of or (DOMAIN if DOMAIN in mix else None)


def make_pools(
    run: RunConfig, files: Sequence[AnyFile], bases: Sequence[int]
) -> tuple[tuple[ConversationPool, ...], float]:
    """Put what is trained on into pools.

    Args:
        run: The configuration.
        files: All files, divided.
        bases: Number of each file's first conversation.

    Returns:
        The pools, in an order that does not depend on how the files are listed; and the time of
        an epoch, see `sft_order`: of the source whose epochs are counted, or else that in which as
        much is read as all sources hold.

    Raises:
        DataError: If a source that has a share has nothing to train on.
    """
    numbered = list(zip(files, bases, strict=False))
    by_source = {
        source.name: [
            (f, base) for f, base in numbered if f.source == place and not f.is_validation
        ]
        for place, source in enumerate(run.data.sources)
    }
    shares = shares_of(run)
    tokens = {name: _tokens(members) for name, members in by_source.items()}
    read = {name: tokens[name] for name in (shares or tokens)}
    if empty := [name for name, count in read.items() if not count]:
        raise DataError("\n".join(_nothing_left(name, by_source[name]) for name in empty))
    total = sum(read.values())
    if shares is None:
        shares_now = {name: Fraction(count, total) for name, count in read.items()}
        return _put_together(by_source, shares_now, joined=True), float(total)
    base = epochs_of(run)
    epoch = float(total) if base is None else tokens[base] * float(1 / shares[base])
    return _put_together(by_source, shares, joined=False), epoch


def held_out_of(
    files: Sequence[AnyFile], bases: Sequence[int], source: int
) -> tuple[npt.NDArray[np.int64], str]:
    """Numbers of a source's held-out conversations, and what stands for their content."""
    mine = [(f, base) for f, base in zip(files, bases, strict=False) if f.source == source]
    mine.sort(key=lambda member: member[0].store.key)
    numbers = np.concatenate([file.held_out + base for file, base in mine])
    return numbers, _identity((file, file.held_out) for file, _ in mine)


def _put_together(
    by_source: dict[str, _Members], shares: dict[str, Fraction], *, joined: bool
) -> tuple[ConversationPool, ...]:
    """One pool a source, and one a file where files have weights.

    Sources are joined if they are read equally often.
    """
    pools, common = [], []
    for name, share in shares.items():
        members = by_source[name]
        weights = [exact(f.config.weight) for f, _ in members if f.config.weight is not None]
        for member, weight in zip(members, weights, strict=False):
            if not len(member[0].training):
                raise DataError(_nothing_left(name, [member]))
            pools.append(_pool([member], share * weight / sum(weights)))
        if not weights and joined:
            common += [(members, share)]
        elif not weights:
            pools.append(_pool(members, share))
    if common:
        everything = [member for members, _ in common for member in members]
        pools.append(_pool(everything, sum((share for _, share in common), Fraction())))
    return tuple(sorted(pools, key=lambda pool: pool.identity))


def _pool(members: _Members, share: Fraction) -> ConversationPool:
    members = sorted(members, key=lambda member: member[0].store.key)
    return ConversationPool(
        identity=_identity((file, file.training) for file, _ in members),
        conversations=np.concatenate([file.training + base for file, base in members]),
        lengths=np.concatenate([file.selection.places[file.training] for file, _ in members]),
        share=share,
    )


def _identity(parts: Iterable[tuple[AnyFile, npt.NDArray[np.int64]]]) -> str:
    """Hash of which conversations, and of how much of each is read."""
    digest = hashlib.blake2b(digest_size=12)
    for file, numbers in parts:
        digest.update(f"{file.store.key}/{len(numbers)}/".encode())
        digest.update(numbers.astype("<i8").tobytes())
        digest.update(file.selection.spans(numbers))
    return digest.hexdigest()


def _tokens(members: _Members) -> int:
    return sum(file.selection.tally(file.training).tokens for file, _ in members)


def _nothing_left(name: str, members: _Members) -> str:
    """Say why a source has nothing to train on."""
    files = [file.describe(0) for file, _ in members]
    long = sum(file.too_long for file in files)
    uncounted = sum(file.nothing_counted for file in files)
    held = sum(file.held_out.conversations for file in files)
    return (
        f"data.sources[{name}]: nothing is left to train on of "
        f"{sum(file.records for file in files):,} {members[0][0].store.unit} in "
        f"{', '.join(file.path for file in files)}: {long:,} are longer than data.seq_length, "
        f"{uncounted:,} have no token that counts within it, {held:,} are held out. Raise "
        "data.seq_length, change chat.truncation, or lower data.validation_fraction."
    )
