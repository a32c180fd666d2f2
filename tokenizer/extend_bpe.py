"""Extends a byte-level BPE tokenizer by continuing its merges on a corpus.

New merges come after all old ones, so a text is encoded as before and then further, and text in
which no new merge applies keeps its ids. Terms of the user come first; see ``term_plan.py``. The
files are written by ``extended_files.py``.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_cgn.errors import DataError
from tokenizer.bpe_vocabulary import ByteLevelVocabulary, Pair, apply_merges, spell
from tokenizer.extend import Kind, first_tokens
from tokenizer.extended_files import Definition, write_files
from tokenizer.extension import Extension, NewToken, Origin
from tokenizer.filters import Judge, Rules
from tokenizer.merge_loop import Merge, continue_merges, estimate_documents
from tokenizer.splitters import ByteLevelSplitter
from tokenizer.term_plan import TermPlan, check_plan, plan_terms
from tokenizer.term_splitter import TermSplitter
from tokenizer.terms import check_terms
from tokenizer.words import Splitter, Words
from tokenizer.wrapper import Tokenizer

_REPORTED_EVERY = 100


class ByteLevelExtender:
    """Extends one byte-level BPE tokenizer. See `tokenizer.extend.Extender`."""

    kind: Kind = "byte_level_bpe"

    def __init__(self, directory: Path) -> None:
        """Open a tokenizer.

        Args:
            directory: Hugging Face directory of a byte-level BPE tokenizer.

        Raises:
            DataError: If it cannot be read, or has options under which it cannot be extended.
        """
        self.tokenizer = Tokenizer.from_pretrained(directory)
        self._directory = directory
        self._definition = Definition.read(directory, self.tokenizer)
        self._vocabulary = ByteLevelVocabulary(self._definition.actual, name=self.tokenizer.name)
        self._split = ByteLevelSplitter(self._definition.actual)
        self._vocabulary.refuse_spelt_tokens(self._split, name=self.tokenizer.name)

    def splitter(self, terms: Sequence[str] = ()) -> Splitter:
        """Give what cuts texts into the words that `extend` counts; see the protocol."""
        cut = list(self._plan(terms).added)
        return TermSplitter(self._definition.actual, terms=cut) if cut else self._split

    def extend(
        self,
        words: Words,
        *,
        num_tokens: int,
        rules: Rules,
        terms: Sequence[str] = (),
        progress: Callable[[int], object] | None = None,
        allow_fewer: bool = False,
    ) -> Extension:
        """Choose new tokens; see the protocol."""
        size = self._vocabulary.size
        plan = self._plan(terms)
        if plan.num_ids > num_tokens:
            raise DataError(
                f"The terms need {plan.num_ids:,} new ids ({len(plan.pairs):,} by merges, steps "
                f"between their pieces included), but only {num_tokens:,} are asked for. Ask for "
                "more tokens, or give fewer terms."
            )
        refused: Counter[str] = Counter()
        found: list[Merge] = []
        number_of_merges = num_tokens - len(plan.new_added)
        for merge in islice(self._merges(words, plan, rules, refused), number_of_merges):
            found.append(merge)
            if progress is not None and len(found) % _REPORTED_EVERY == 0:
                progress(len(plan.new_added) + len(found))
        made = len(found) + len(plan.new_added)
        if made < num_tokens and not allow_fewer:
            raise _too_few(made, num_tokens, words, refused, rules)
        tokens = self._tokens(found, plan, words)
        extended = self._extended(tokens, plan.added).open()
        return Extension(
            old_vocab_size=size,
            new_tokens=tuple(tokens),
            old_fingerprint=self.tokenizer.fingerprint(),
            new_fingerprint=extended.fingerprint(),
            terms=check_plan(plan, extended=extended, words=words),
            rejected=dict(refused.most_common()),
            settings={"kind": self.kind, "num_tokens": num_tokens, "rules": rules.to_json()},
        )

    def write(
        self, extension: Extension, directory: Path, *, num_tokens: int | None = None
    ) -> None:
        """Write the files of the extended tokenizer; see the protocol."""
        if extension.old_fingerprint != self.tokenizer.fingerprint():
            raise DataError(
                f"{self._directory}: not the tokenizer that was extended; its fingerprint is "
                f"{self.tokenizer.fingerprint()}, not {extension.old_fingerprint}. Extend again."
            )
        taken = first_tokens(extension, num_tokens)
        # Terms of other ways are made by merges, or were there.
        added = {term.text: term.id for term in taken.terms if term.way == "added_token"}
        definition = self._extended(taken.new_tokens, added)
        if taken is not extension:
            taken = replace(taken, new_fingerprint=definition.open().fingerprint())
        write_files(definition, taken, source=self._directory, directory=directory)

    def _plan(self, terms: Sequence[str]) -> TermPlan:
        checked = check_terms(
            terms,
            normalize=self._definition.normalize,
            added=self._vocabulary.added_texts,
            special=self._vocabulary.special_texts,
        )
        return plan_terms(checked, vocabulary=self._vocabulary, split=self._split)

    def _merges(
        self, words: Words, plan: TermPlan, rules: Rules, refused: Counter[str]
    ) -> Iterator[Merge]:
        symbols, starts = self._vocabulary.encode(words.spellings)
        if plan.added:
            # Cut out before merges: they are words of the corpus, but not of the merges.
            is_word = np.array([word not in plan.added for word in words.spellings], dtype=bool)
            symbols = symbols[np.repeat(is_word, np.diff(starts))]
            lengths = np.where(is_word, np.diff(starts), 0)
            starts = np.concatenate(([0], np.cumsum(lengths)))
        return continue_merges(
            symbols,
            starts,
            counts=words.counts,
            sketches=words.sketches,
            spellings=self._vocabulary.spellings,
            judge=Judge(rules).spelling,
            min_frequency=rules.min_frequency,
            min_spread=rules.min_spread,
            first=plan.pairs,
            refused=refused,
        )

    def _tokens(self, merges: Sequence[Merge], plan: TermPlan, words: Words) -> list[NewToken]:
        """The new tokens by id: merges of terms, terms that are added tokens, other merges."""
        number, shift = len(plan.pairs), len(plan.new_added)
        leaves: dict[int, tuple[int, ...]] = {}
        tokens = []
        for merge in merges:
            old_ids = tuple(i for s in (merge.left, merge.right) for i in leaves.get(s, (s,)))
            leaves[merge.symbol] = old_ids
            is_first = merge.symbol < self._vocabulary.size + number
            origin: Origin = "step" if merge.step or is_first else "corpus"
            tokens.append(
                NewToken(
                    id=merge.symbol if is_first else merge.symbol + shift,
                    token=spell(merge.spelling),
                    text=_text_of(merge.spelling),
                    old_ids=old_ids,
                    frequency=merge.frequency,
                    spread=merge.spread,
                    origin="term" if merge.symbol in plan.wanted else origin,
                )
            )
        return tokens[:number] + self._added_tokens(plan, words) + tokens[number:]

    def _added_tokens(self, plan: TermPlan, words: Words) -> list[NewToken]:
        place_of = {}
        if plan.new_added:
            wanted = plan.new_added.keys()
            place_of = {word: i for i, word in enumerate(words.spellings) if word in wanted}
        tokens = []
        for text, token_id in plan.new_added.items():
            place = place_of.get(text)
            tokens.append(
                NewToken(
                    id=token_id,
                    token=text,
                    text=text,
                    old_ids=tuple(self.tokenizer.encode(text)),
                    frequency=0 if place is None else int(words.counts[place]),
                    spread=0 if place is None else estimate_documents(int(words.sketches[place])),
                    origin="term",
                )
            )
        return tokens

    def _extended(self, tokens: Sequence[NewToken], added: Mapping[str, int]) -> Definition:
        if not tokens and not added:
            return self._definition
        names = self._vocabulary.names | {token.id: token.token for token in tokens}
        by_merges = [token for token in tokens if added.get(token.token) != token.id]
        merges = [(names[left], names[right]) for left, right in pairs_of(by_merges)]
        return self._definition.extended(tokens, merges, added)


def pairs_of(tokens: Sequence[NewToken]) -> list[Pair]:
    """Find which two tokens each new token joins, from the old ids that it stands for.

    New merges are made everywhere, one after another. So those before a token's own join its old
    ids as they did in the words that it was made in: to two tokens.

    Args:
        tokens: Made by merges, in order; steps included.

    Returns:
        Ids of the left and the right one of each.

    Raises:
        DataError: If they are not what such merges lead to.
    """
    made: dict[Pair, int] = {}
    for token in tokens:
        pieces = apply_merges(token.old_ids, made)
        if len(pieces) != 2:
            raise DataError(
                f"vocab_extension.json: damaged: the old ids of token {token.id} "
                f"({token.token!r}) are not joined by the merges before it. Extend again."
            )
        made[pieces[0], pieces[1]] = token.id
    return list(made)


def _text_of(spelling: bytes) -> str | None:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return None


def _too_few(
    made: int, wanted: int, words: Words, refused: Mapping[str, int], rules: Rules
) -> DataError:
    """Say how many tokens there are, and what would give more."""
    text = (
        f"The corpus gives {made:,} new tokens, but {wanted:,} are asked for: it has "
        f"{words.documents:,} documents with {words.text_bytes:,} bytes, in which nothing else is "
        f"met {rules.min_frequency} times (min_frequency)"
    )
    if refused:
        reason, number = max(refused.items(), key=lambda item: item[1])
        text += (
            f" and allowed. Of what was refused, most ({number:,} of {sum(refused.values()):,}): "
            f"{reason}"
        )
    return DataError(f"{text}. Give more text, ask for fewer tokens, or loosen the rules.")
