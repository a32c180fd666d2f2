"""What the first N new tokens do to held-out text, for several N: measured, not estimated.

For each N there is a tokenizer, and texts are really encoded with it: the largest is read from its
files, smaller ones are its beginning (``prefix.py``). What the figures mean for a model is in
``cost.py``, which N to take in ``recommend.py``.
"""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.errors import ConfigError
from megatron_cgn.vocabulary.held_out import HeldOut, language
from megatron_cgn.vocabulary.prefix import first_tokens_only
from megatron_cgn.vocabulary.uses import Counter, SampledWords, sample_words
from tokenizer.extend import Extender
from tokenizer.extension import Extension
from tokenizer.words import Words
from tokenizer.wrapper import Tokenizer

SIZES = (0, 250, 1_000, 2_000, 5_000, 10_000)
"""Numbers of new tokens that are tried."""
ALL = "all"
"""The language that stands for every document."""

_CHECKED_CHARACTERS = 1 << 19
_SENTENCE = re.compile(r"[^\n。！？!?]{20,80}(?:[。！？]|[.!?](?=\s)|$)", re.MULTILINE)
_NUM_SENTENCES = 8

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """Documents as one tokenizer cuts them."""

    documents: int
    characters: int
    text_bytes: int
    tokens: int
    longer_documents: int = 0
    """Documents of which the old tokenizer makes fewer tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """The tokenizer with the first N new tokens."""

    num_tokens: int
    """N."""
    vocab_size: int
    """Ids of this tokenizer."""
    domain: Mapping[str, TextFigures]
    """By language, and `ALL`."""
    general: Mapping[str, TextFigures]
    """The same of general text; empty where none was given."""
    uses: npt.NDArray[np.int64]
    """How often held-out domain text has each new token, int64 ``[N]``."""
    corpus_uses: npt.NDArray[np.float64] | None = None
    """The same for the corpus that the tokens were made from, float64 ``[N]``; estimated where its
    words were sampled, None where they were not given."""
    corpus_tokens: float | None = None
    """Tokens of that corpus."""
    examples: tuple[tuple[int, ...], ...] = ()
    """Ids of the sentences in `Sweep.examples`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Whether an extension is the old tokenizer with tokens joined, and nothing else.

    Compared are the Hugging Face tokenizers themselves, on held-out domain text.
    """

    num_tokens: int
    documents: int
    """Documents compared."""
    differing: int
    """Those in which the ids, each new one replaced by the old ids it stands for, are not those of
    the old tokenizer. 0 for byte-level BPE, unless a term became an added token."""
    lossy: int
    """Those that decode to another text than the old tokenizer's ids do; 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All sizes, smallest first; the first is the old tokenizer."""

    points: tuple[SweepPoint, ...]
    agreement: Agreement
    corpus_bytes: int | None
    """UTF-8 bytes of the corpus that `SweepPoint.corpus_uses` counts in."""
    examples: tuple[str, ...] = ()
    """Sentences of held-out domain text, to be shown."""


def sweep(
    extender: Extender,
    *,
    extension: Extension,
    domain: HeldOut,
    general: HeldOut | None = None,
    words: Words | None = None,
    sizes: Sequence[int] = SIZES,
    further: Callable[[Sequence[SweepPoint]], Sequence[int]] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Sweep:
    """Encode held-out text with the tokenizers of several sizes.

    Args:
        extender: The tokenizer that was extended.
        extension: The extension; its first N tokens are the extension of N.
        domain: Held-out domain text.
        general: Held-out general text.
        words: Words of the corpus, as `extender.extend` got them.
        sizes: Numbers of new tokens: see `usable_sizes`.
        further: Told what was measured of them, names more sizes, below the largest, to measure.
        progress: Told how many tokenizers are done, and how many there are.

    Returns:
        The figures.

    Raises:
        ConfigError: If a size is negative.
    """
    usable = usable_sizes(extension, sizes)
    sampled = None if words is None else sample_words(words)
    before: list[Lengths] = []
    shown = _sentences(domain)
    largest = _largest(extender, extension, usable[-1])
    definition = largest.definition()
    points: dict[int, SweepPoint] = {}

    def measure(size: int) -> None:
        tokenizer = largest
        if size < usable[-1]:
            vocab_size = extension.old_vocab_size + size
            tokenizer = (
                first_tokens_only(definition, vocab_size, name=largest.name)
                if size
                else extender.tokenizer
            )
        counter = Counter(tokenizer, old_vocab_size=extension.old_vocab_size, kind=extender.kind)
        point = _point(counter, size, extension, domain, general, sampled, before)
        points[size] = replace(point, examples=tuple(map(tuple, tokenizer.encode_batch(shown))))

    for size in usable:
        measure(size)
        if progress is not None:
            progress(len(points), len(usable))
    if further is not None:
        for size in usable_sizes(extension, further([points[size] for size in usable])):
            if size not in points and size < usable[-1]:
                measure(size)
    return Sweep(
        points=tuple(points[size] for size in sorted(points)),
        agreement=_compare(extender.tokenizer, largest, extension, domain.texts),
        corpus_bytes=None if words is None else words.text_bytes,
        examples=tuple(shown),
    )


def _largest(extender: Extender, extension: Extension, size: int) -> Tokenizer:
    """The tokenizer of the largest size, as its files define it."""
    if size == 0:
        return extender.tokenizer
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as directory:
        extender.write(extension, Path(directory), num_tokens=size)
        return Tokenizer.from_pretrained(directory)


def usable_sizes(extension: Extension, sizes: Sequence[int]) -> list[int]:
    """Give the sizes that can be tried: 0 always, and none that would leave out a term.

    Args:
        extension: The largest extension. It stands for every size beyond its own.
        sizes: Numbers of new tokens.

    Returns:
        Numbers in ascending order, each once.

    Raises:
        ConfigError: If one is negative.
    """
    if wrong := [size for size in sizes if size < 0]:
        raise ConfigError(
            f"sizes: {', '.join(map(str, wrong))} asked for, but a number of new tokens is 0 or "
            "more. Leave out what is negative."
        )
    most = len(extension.new_tokens)
    ends = [term.id + 1 - extension.old_vocab_size for term in extension.terms]
    least = max([0, *ends])
    return sorted({0, *(min(size, most) for size in sizes if min(size, most) >= least)})


def _point(
    counter: Counter,
    size: int,
    extension: Extension,
    domain: HeldOut,
    general: HeldOut | None,
    sampled: SampledWords | None,
    before: list[Lengths],
) -> SweepPoint:
    """Measure one tokenizer; `before` is filled by the first, for the others to compare with."""
    domain_lengths, uses = counter.texts(domain.texts)
    general_lengths = counter.texts(general.texts)[0] if general else np.zeros(0, np.int64)
    if not before:
        before += [domain_lengths, general_lengths]
    corpus_tokens, corpus_uses = counter.words(sampled) if sampled else (None, None)
    return SweepPoint(
        num_tokens=size,
        vocab_size=extension.old_vocab_size + size,
        domain=_figures(domain, domain_lengths, before[0]),
        general=_figures(general, general_lengths, before[1]) if general else {},
        uses=uses,
        corpus_uses=corpus_uses,
        corpus_tokens=corpus_tokens,
    )


def _figures(held_out: HeldOut, lengths: Lengths, before: Lengths) -> dict[str, TextFigures]:
    """Sums over all documents, and over those of each language."""
    groups: dict[str, list[int]] = {ALL: list(range(len(held_out.texts)))}
    for place, name in enumerate(held_out.languages):
        groups.setdefault(name, []).append(place)
    return {
        name: TextFigures(
            documents=len(places),
            characters=sum(len(held_out.texts[place]) for place in places),
            text_bytes=sum(len(held_out.texts[place].encode()) for place in places),
            tokens=int(lengths[places].sum()),
            longer_documents=int((lengths[places] > before[places]).sum()),
        )
        for name, places in groups.items()
    }


def _sentences(held_out: HeldOut) -> list[str]:
    """One from the middle of each of the first documents, not the best; no listings if possible."""
    found: list[str] = []
    for text, name in zip(held_out.texts, held_out.languages, strict=True):
        sentences = [match.strip() for match in _SENTENCE.findall(text)]
        if sentences := [sentence for sentence in sentences if language(sentence) == name]:
            found.append(sentences[len(sentences) // 2])
        if len(found) == _NUM_SENTENCES:
            break
    return found


def _compare(
    old: Tokenizer, new: Tokenizer, extension: Extension, texts: Sequence[str]
) -> Agreement:
    """Hold the last tokenizer against the old one, by another way than the counting went."""
    chosen: list[str] = []
    size = 0
    for text in texts:
        if size and size + len(text) > _CHECKED_CHARACTERS:
            break
        chosen.append(text)
        size += len(text)
    first = extension.old_vocab_size
    differing = lossy = 0
    for before, after in zip(old.encode_batch(chosen), new.encode_batch(chosen), strict=True):
        expanded: list[int] = []
        for token in after:
            expanded += extension.new_tokens[token - first].old_ids if token >= first else (token,)
        differing += expanded != before
        lossy += old.decode(before) != new.decode(after)
    return Agreement(
        num_tokens=max(0, new.vocab_size - first),
        documents=len(chosen),
        differing=differing,
        lossy=lossy,
    )
