"""Which way each term of the user becomes a single token of a byte-level BPE vocabulary.

A term that is one word for the pre-tokeniser, in a script that puts spaces between words, is made
by merges: itself, and with a space in front, because that is another word (``rod`` and `` rod``
share all tokens on the way but the last). Any other term becomes an added token that is not
special: such a token is found wherever its text stands, inside words too. That is so for terms
that the pre-tokeniser cuts, and for Chinese. There, old merges would join a term's end with what
follows before any new merge is made: Qwen has 系统的, so 冷却剂系统 by merges would be in parts
wherever 的 is behind it. A single character is left to merges; longer words may have it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_cgn.errors import DataError
from tokenizer.bpe_vocabulary import ByteLevelVocabulary, Pair, encode_words, encoder_of_words
from tokenizer.extension import Term, Way
from tokenizer.term_merges import TermMerges
from tokenizer.terms import TermFinder, list_faults, puts_spaces
from tokenizer.words import Words
from tokenizer.wrapper import Tokenizer

Split = Callable[[str], Sequence[str]]


@dataclass(frozen=True, slots=True)
class TermPlan:
    """What becomes of the terms."""

    first_id: int
    pairs: tuple[Pair, ...] = ()
    """The first new merges. Their products are the first new ids."""
    merged: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Terms that are merged, with their id, and that of the form with a space where it is made."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Terms that become added tokens, with their ids. An old id where a token that no merges lead
    to is spelt so."""
    existing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Terms that were single tokens, as in `merged`."""
    order: tuple[str, ...] = ()
    """All of them, as the user gave them."""

    @property
    def new_added(self) -> dict[str, int]:
        """Those added tokens that have new ids."""
        return {text: i for text, i in self.added.items() if i >= self.first_id}

    @property
    def num_ids(self) -> int:
        """New ids needed, tokens on the way included."""
        return len(self.pairs) + len(self.new_added)

    @property
    def wanted(self) -> frozenset[int]:
        """Ids of the terms themselves; other products are steps."""
        return frozenset(i for ids in self.merged.values() for i in ids)


def plan_terms(terms: Sequence[str], *, vocabulary: ByteLevelVocabulary, split: Split) -> TermPlan:
    """Plan how terms become single tokens.

    Args:
        terms: Checked by `check_terms`.
        vocabulary: The old one.
        split: Cuts a text as its tokenizer does.

    Returns:
        The plan.
    """
    old = {t: (vocabulary.tokens[t],) for t in terms if t in vocabulary.added_texts}
    forms = {term: _forms(term, split) for term in terms if term not in old}
    pieces = _pieces(vocabulary, [form for some in forms.values() for form in some])
    impossible = {
        term
        for term, some in forms.items()
        if not some or (_is_open(term) and len(pieces[term]) > 1)
    }
    while True:
        joined = {t: [pieces[f] for f in some] for t, some in forms.items() if t not in impossible}
        merges, found = _join(joined, vocabulary)
        impossible |= joined.keys() - found.keys()
        # An added token is found inside longer terms too, and would cut them.
        cut = {term for term in found if any(short in term for short in impossible)}
        if not cut:
            break
        impossible |= cut
    added: dict[str, int] = {}
    next_id = vocabulary.size + len(merges)
    for term in terms:
        if term in impossible:
            added[term] = vocabulary.tokens.get(term, next_id)
            next_id += added[term] == next_id
    return TermPlan(
        first_id=vocabulary.size,
        pairs=merges,
        merged={term: ids for term, ids in found.items() if max(ids) >= vocabulary.size},
        added=added,
        existing=old | {t: ids for t, ids in found.items() if max(ids) < vocabulary.size},
        order=tuple(terms),
    )


def _join(
    pieces: Mapping[str, Sequence[Sequence[int]]], vocabulary: ByteLevelVocabulary
) -> tuple[tuple[Pair, ...], dict[str, tuple[int, ...]]]:
    """Merges for terms, from the old pieces of their forms; and the ids of those they make."""
    plan = TermMerges(vocabulary.spellings)
    found: dict[str, tuple[int, ...]] = {}
    # Short ones first, so that they are steps of longer ones.
    for term in sorted(pieces, key=lambda term: max(map(len, pieces[term]))):
        symbols = plan.add(pieces[term]) or plan.add(pieces[term][:1])
        if symbols is not None:
            found[term] = tuple(symbols)
    return tuple(plan.pairs), found


def check_plan(plan: TermPlan, *, extended: Tokenizer, words: Words) -> tuple[Term, ...]:
    """Hold an extended tokenizer against the plan, and count the terms in the corpus.

    Args:
        plan: Of the terms.
        extended: The tokenizer with all new tokens.
        words: Of the corpus.

    Returns:
        What became of each term, in the user's order.

    Raises:
        DataError: If terms are not single tokens, because others hold parts of them; names all.
    """
    ways: dict[str, Way] = {}
    ids: dict[str, tuple[int, ...]] = {}
    added = {term: (token_id,) for term, token_id in plan.added.items()}
    groups: tuple[tuple[Way, Mapping[str, tuple[int, ...]]], ...] = (
        ("merges", plan.merged),
        ("added_token", added),
        ("existing", plan.existing),
    )
    for way, group in groups:
        ways.update(dict.fromkeys(group, way))
        ids.update(group)
    broken = []
    for term in plan.order:
        for form, token_id in zip((term, " " + term), ids[term], strict=False):
            if extended.encode(form) != [token_id]:
                broken.append(repr(form))
    if broken:
        raise DataError(
            f"Terms that others cut, because these become added tokens and are found inside them: "
            f"{list_faults(broken)}. Leave out the shorter ones."
        )
    occurrences, whole = _count(plan, ids, extended, words)
    return tuple(
        Term(
            text=term,
            way=ways[term],
            id=ids[term][0],
            occurrences=occurrences[term],
            whole=whole[term],
        )
        for term in plan.order
    )


def _forms(term: str, split: Split) -> list[str]:
    """The words that a term can be, itself first; none if it is cut."""
    if list(split(term)) != [term]:
        return []
    spaced = " " + term
    return [term, spaced] if puts_spaces(term[0]) and list(split(spaced)) == [spaced] else [term]


def _is_open(term: str) -> bool:
    """Whether what is around a term, in its script, is in the same word of the pre-tokeniser."""
    return len(term) > 1 and not (puts_spaces(term[0]) and puts_spaces(term[-1]))


def _pieces(vocabulary: ByteLevelVocabulary, forms: Sequence[str]) -> dict[str, list[int]]:
    symbols, starts = vocabulary.encode(forms)
    bounds = zip(forms, starts.tolist(), starts[1:].tolist(), strict=False)
    return {form: symbols[start:end].tolist() for form, start, end in bounds}


def _count(
    plan: TermPlan, ids: Mapping[str, tuple[int, ...]], extended: Tokenizer, words: Words
) -> tuple[dict[str, int], dict[str, int]]:
    """How often the corpus has each term, and how often as a single token."""
    occurrences, whole = dict.fromkeys(plan.order, 0), dict.fromkeys(plan.order, 0)
    if not plan.order:
        return occurrences, whole
    by_word: dict[int, list[str]] = {}
    for place, number in TermFinder(plan.order).find(words):
        by_word.setdefault(place, []).append(plan.order[number])
    backend = encoder_of_words(extended.definition()["model"])
    places = sorted(by_word)
    encoded = encode_words(backend, [words.spellings[place] for place in places])
    for place, made in zip(places, encoded, strict=True):
        count = int(words.counts[place])
        is_added = words.spellings[place] in plan.added
        for term in by_word[place]:
            occurrences[term] += count
            is_whole = is_added and term == words.spellings[place]
            whole[term] += count * is_whole
        for term in set(by_word[place]) - plan.added.keys():
            whole[term] += count * sum(i in ids[term] for i in made)
    return occurrences, whole
