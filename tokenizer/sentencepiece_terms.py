"""Terms of the user as pieces of a SentencePiece vocabulary.

Every term gets two pieces, as all words of such vocabularies have: one for where a space or the
beginning of a text is before it, and one for anywhere else. SentencePiece itself does not cut at
spaces, digits or scripts, so terms with those can be pieces too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tokenizer.extension import Term
from tokenizer.merge_loop import estimate_documents
from tokenizer.sentencepiece_model import SPACE
from tokenizer.sentencepiece_words import PieceSplitter, is_number
from tokenizer.term_merges import TermMerges
from tokenizer.terms import TermFinder, fault_of, list_faults
from tokenizer.words import Words

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a term is spelt in the vocabulary."""

    term: str
    bare: str
    """Anywhere but after a space."""
    exists: bool
    """Whether the old vocabulary has it in both spellings."""

    @property
    def spaced(self) -> str:
        """Its spelling after a space."""
        return SPACE + self.bare

    @property
    def spellings(self) -> tuple[str, str]:
        """Both."""
        return self.bare, self.spaced


def forms_of(
    terms: Sequence[str],
    *,
    splitter: PieceSplitter,
    encode: Encode,
    pieces: Mapping[str, int],
    reserved: set[str],
) -> list[Form]:
    """Check terms and spell them.

    Args:
        terms: As given by the user.
        splitter: Without cuts.
        encode: Encodes what the normaliser gives, with the old model.
        pieces: What text can become in the old vocabulary.
        reserved: Tokens that text does not become by way of the model.

    Returns:
        A form for each, without repetitions.

    Raises:
        DataError: If some cannot be single tokens; names all of them.
    """
    forms, faults = [], []
    for term in dict.fromkeys(terms):
        fault = fault_of(term)
        bare = term.replace(" ", SPACE)
        if fault is None:
            fault = _fault_for(term, bare, list(splitter.normalized(term)), reserved)
        old = [text for text in (bare, SPACE + bare) if text in pieces]
        if fault is None and any(encode(text) != [pieces[text]] for text in old):
            fault = "it is a token that text never becomes"
        if fault is not None:
            faults.append(f"{ascii(term)[:60] if not term.isprintable() else repr(term)}: {fault}")
            continue
        forms.append(Form(term=term, bare=bare, exists=len(old) == 2))
    if faults:
        raise DataError(
            f"Terms that cannot be single tokens: {list_faults(faults)}. Correct or remove them."
        )
    return forms


def _fault_for(term: str, bare: str, parts: list[str], reserved: set[str]) -> str | None:
    for token in sorted(reserved):
        if token in bare:
            return f"it holds the token {token!r}"
    if SPACE in term:
        return f"it has {SPACE!r}, which stands for a space"
    if len(parts) > 1:
        return f"the tokenizer cuts it into {parts}"
    if parts not in ([bare], [SPACE + bare]):
        return f"the tokenizer's normaliser makes {''.join(parts)!r} of it"
    return None


def plan_merges(
    forms: Sequence[Form], *, spellings: Sequence[bytes], encode: Encode
) -> list[tuple[int, int]]:
    """Find merges that make single pieces of terms.

    Args:
        forms: The terms.
        spellings: Bytes of all symbols.
        encode: Encodes what the normaliser gives, in symbols.

    Returns:
        Pairs of symbols, in order; their products are numbered from the number of old ones on.

    Raises:
        DataError: If there is no way to some term; names all of them.
    """
    plan = TermMerges(spellings)
    faults = []
    for form in forms:
        if form.exists:
            continue
        for text in form.spellings:
            if not _plan_one(plan, encode(text)):
                faults.append(f"{form.term!r}: every way to it leads over pieces that exist")
                break
    if faults:
        raise DataError(f"Terms that cannot be single tokens: {list_faults(faults)}. Remove them.")
    return list(plan.pairs)


def _plan_one(plan: TermMerges, pieces: Sequence[int]) -> bool:
    """Join pieces, those without digits first: pieces that are numbers would change all numbers."""
    word = plan.apply(pieces)
    plain = [not any(map(is_number, plan.spellings[symbol].decode())) for symbol in word]
    if all(plain) or not any(plain):
        return plan.add([word]) is not None
    start = plain.index(True)
    end = next((i for i in range(start, len(word)) if not plain[i]), len(word))
    if plan.add([word[start:end]]) is None:
        return False
    # Outwards from what is no number. A merge is made everywhere, so the rest is looked at anew.
    while len(word := plan.apply(pieces)) > 1:
        texts = (plan.spellings[symbol].decode() for symbol in word)
        place = next(i for i, text in enumerate(texts) if not all(map(is_number, text)))
        place -= place == len(word) - 1
        if plan.add([word[place : place + 2]]) is None:
            return False
    return True


def usage_of_terms(forms: Sequence[Form], words: Words) -> dict[str, tuple[int, int]]:
    """How often the corpus has terms, and in how many documents about, by their bare spelling."""
    usage = {form.bare: (0, 0) for form in forms}
    if forms:
        for word, term in TermFinder([form.bare for form in forms]).find(words):
            frequency, sketch = usage[forms[term].bare]
            both = sketch | int(words.sketches[word])
            usage[forms[term].bare] = (frequency + int(words.counts[word]), both)
    return {text: (n, estimate_documents(s) if n else 0) for text, (n, s) in usage.items()}


def report_terms(
    forms: Sequence[Form],
    words: Words,
    *,
    old: Mapping[str, int],
    new: Mapping[str, int],
    backend: Backend,
    alone: Callable[[str], list[int]],
) -> tuple[Term, ...]:
    """Say what became of the terms.

    Args:
        forms: The terms.
        words: Of the corpus.
        old: Pieces of the old vocabulary.
        new: Pieces of the extended one.
        backend: The extended model proper.
        alone: Encodes a text with the extended tokenizer.

    Returns:
        A report for each. Its id is what the term's text becomes alone: mostly the piece with a
        space in front, which such tokenizers put before a text.
    """
    if not forms:
        return ()
    found: list[list[int]] = [[] for _ in forms]
    for word, term in TermFinder([form.bare for form in forms]).find(words):
        found[term].append(word)
    terms = []
    for form, places in zip(forms, found, strict=True):
        wanted = [new[text] for text in form.spellings]
        distinct = list(dict.fromkeys(places))
        texts = [words.spellings[word] for word in distinct]
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        whole = sum(
            int(words.counts[word]) * sum(token_id in wanted for token_id in encoding.ids)
            for word, encoding in zip(distinct, encodings, strict=True)
        )
        ids = alone(form.term)
        terms.append(
            Term(
                text=form.term,
                way="existing" if all(text in old for text in form.spellings) else "piece",
                id=ids[0] if len(ids) == 1 else new[form.bare],
                occurrences=int(words.counts[places].sum()) if places else 0,
                whole=whole,
            )
        )
    return tuple(terms)
