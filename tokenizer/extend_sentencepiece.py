"""Extends a SentencePiece tokenizer: pieces at the end of the vocabulary, with scores that fit.

**BPE** (Llama 2, Mistral v1): SentencePiece joins the neighbours whose joined text is the piece of
the highest score. New pieces have scores below all old ones and below each other, so a text is
encoded as before, then new pieces are joined in their order. SentencePiece asks only for the joined
text, where the merges that are counted here name the two parts. Both come to the same: what a
stretch of text becomes in its place, if nothing is joined over its ends, it becomes alone, for no
step looks beyond its two symbols. So a text that alone becomes a piece never lies there in parts.

**Unigram** (T5, ALBERT): see ``sentencepiece_unigram.py`` for the scores.

Characters that the old vocabulary spells in bytes, as many Chinese ones, become pieces first, as
soon as they save more tokens than the next merge. Ids that added tokens have taken behind the
model's own stay theirs: the model gets placeholders there. How words are cut is in
``sentencepiece_words.py``, terms are in ``sentencepiece_terms.py``.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tokenizer.extend import Kind
from tokenizer.extension import Extension, NewToken, Origin
from tokenizer.filters import Rules
from tokenizer.merge_loop import Merge, continue_merges
from tokenizer.sentencepiece_fast import bare_backend, reserved_tokens, vocabulary_of
from tokenizer.sentencepiece_files import SentencePieceFiles
from tokenizer.sentencepiece_judge import PieceJudge
from tokenizer.sentencepiece_model import SPACE
from tokenizer.sentencepiece_symbols import Segmenter, Symbols
from tokenizer.sentencepiece_terms import Form, forms_of, plan_merges, report_terms, usage_of_terms
from tokenizer.sentencepiece_words import Cutter, PieceSplitter
from tokenizer.words import Splitter, Words
from tokenizer.wrapper import Tokenizer

_REPORTED_EVERY = 100


class SentencePieceExtender:
    """Extends one SentencePiece tokenizer. See `tokenizer.extend.Extender`."""

    def __init__(self, directory: Path, *, kind: Kind) -> None:
        """Open a tokenizer.

        Args:
            directory: Hugging Face directory with ``tokenizer.model``, ``tokenizer.json`` or both.
            kind: One of those of SentencePiece.

        Raises:
            DataError: If it cannot be read, or its files contradict each other.
        """
        self.kind: Kind = kind
        self.tokenizer = Tokenizer.from_pretrained(directory)
        self._directory = directory
        self._files = SentencePieceFiles(directory, self.tokenizer)
        definition = self._files.definition
        self._reserved = reserved_tokens(definition)
        vocabulary = vocabulary_of(definition)
        self._pieces = {t: i for t, i in vocabulary.items() if t not in self._reserved}
        self._cutter = Cutter(self._pieces)

    def splitter(self, terms: Sequence[str] = ()) -> Splitter:
        """Give what cuts texts into the words that `extend` counts; see the protocol."""
        cut = [
            text
            for form in self._forms(terms)
            for text in form.spellings
            if not self._cutter.is_word(text)
        ]
        return self._splitter(cut)

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
        forms = self._forms(terms)
        refused: Counter[str] = Counter()
        tokens: list[NewToken] = []
        for token in self._tokens(words, forms, rules, refused):
            if len(tokens) == num_tokens:
                break
            tokens.append(token)
            if progress is not None and len(tokens) % _REPORTED_EVERY == 0:
                progress(len(tokens))
        needed = {text for form in forms if not form.exists for text in form.spellings}
        if needed - self._pieces.keys() - {token.token for token in tokens}:
            raise DataError(
                f"The terms take more than the {num_tokens:,} new ids that are asked for: each "
                "takes two, and one for every step towards them. Ask for more, or give fewer terms."
            )
        if len(tokens) < num_tokens and not allow_fewer:
            raise _too_few(len(tokens), num_tokens, words, refused, rules)
        settings = {"num_tokens": num_tokens, "kind": self.kind, "rules": rules.to_json()}
        if self.kind == "sentencepiece_unigram":
            settings["corpus_tokens"] = self._count_tokens(words)
        extension = Extension(
            old_vocab_size=self.tokenizer.vocab_size,
            new_tokens=tuple(tokens),
            old_fingerprint=self.tokenizer.fingerprint(),
            new_fingerprint="",
            rejected=dict(refused.most_common()),
            settings=settings,
        )
        opened = self._files.opened(extension)
        definition = opened.definition()
        reports = report_terms(
            forms,
            words,
            old=self._pieces,
            new=vocabulary_of(definition),
            backend=bare_backend(definition),
            alone=opened.encode,
        )
        fingerprint = opened.fingerprint(definition=definition)
        return replace(extension, new_fingerprint=fingerprint, terms=reports)

    def write(
        self, extension: Extension, directory: Path, *, num_tokens: int | None = None
    ) -> None:
        """Write the files of the extended tokenizer; see the protocol."""
        if extension.old_fingerprint != self.tokenizer.fingerprint():
            raise DataError(
                f"{self._directory}: not the tokenizer that was extended. Give the one whose "
                f"fingerprint is {extension.old_fingerprint}."
            )
        self._files.write(extension, directory, num_tokens=num_tokens)

    def _tokens(
        self, words: Words, forms: Sequence[Form], rules: Rules, refused: Counter[str]
    ) -> Iterator[NewToken]:
        """Give new tokens in the order of their ids, without end but for that of the corpus."""
        judge = PieceJudge(
            rules, cutter=self._cutter, reserved=self._reserved, digits=self._files.splits_digits
        )
        new = {t for form in forms if not form.exists for t in form.spellings} - self._pieces.keys()
        made = [form for form in forms if not form.exists]
        joined = self.kind == "sentencepiece_bpe"
        symbols = self._segmenter.segment(
            words,
            judge=judge,
            min_frequency=rules.min_frequency,
            min_spread=rules.min_spread,
            wanted=set("".join(new)) if joined else (),
            refused=refused,
        )
        first: list[tuple[int, int]] = []
        if joined:
            encode = partial(self._segmenter.encode_symbols, of_character=symbols.of_character)
            first = plan_merges(made, spellings=symbols.spellings, encode=encode)
        merges = continue_merges(
            symbols.symbols,
            symbols.starts,
            counts=symbols.counts,
            sketches=symbols.sketches,
            spellings=symbols.spellings,
            judge=judge,
            min_frequency=rules.min_frequency,
            min_spread=rules.min_spread,
            first=first,
            refused=refused,
        )
        found = _in_order(symbols, merges, wanted=new if joined else set(), num_first=len(first))
        if not joined:
            terms = self._whole_terms(made, new, words)
            found = chain(terms, (token for token in found if token.token not in new))
        first_id = self.tokenizer.vocab_size
        return (replace(token, id=first_id + number) for number, token in enumerate(found))

    def _whole_terms(
        self, forms: Sequence[Form], new: set[str], words: Words
    ) -> Iterator[NewToken]:
        """Pieces of terms that need no others on the way to them."""
        usage = usage_of_terms(forms, words)
        for form in forms:
            for text in form.spellings:
                if text in new:
                    frequency, spread = usage[form.bare]
                    yield _token(
                        text,
                        tuple(self._segmenter.encode([text])[0]),
                        frequency=frequency,
                        spread=spread,
                        origin="term",
                    )

    def _forms(self, terms: Sequence[str]) -> list[Form]:
        return forms_of(
            terms,
            splitter=self._splitter(()),
            encode=lambda text: self._segmenter.encode([text])[0].tolist(),
            pieces=self._pieces,
            reserved=self._reserved,
        )

    def _splitter(self, cut: Sequence[str]) -> PieceSplitter:
        definition = self._files.definition
        added = definition["added_tokens"]
        model = {"type": "BPE", "vocab": {}, "merges": []}
        small = Backend.from_str(json.dumps(definition | {"model": model, "added_tokens": []}))
        return PieceSplitter(
            normalizer=small.normalizer,
            pre_tokenizer=small.pre_tokenizer,
            cutter=self._cutter,
            added_tokens=[token["content"] for token in added if not token["special"]],
            terms=cut,
        )

    @cached_property
    def _segmenter(self) -> Segmenter:
        return Segmenter(
            bare_backend(self._files.definition),
            vocabulary=self._pieces,
            size=self.tokenizer.vocab_size,
        )

    def _count_tokens(self, words: Words) -> int:
        """How many tokens the old model makes of the corpus; asked only where scores need it."""
        lengths = map(len, self._segmenter.encode(words.spellings))
        return sum(n * count for n, count in zip(lengths, words.counts.tolist(), strict=True))


def _token(
    spelling: str, old_ids: tuple[int, ...], *, frequency: int, spread: int, origin: Origin
) -> NewToken:
    """A new token that has no id yet."""
    return NewToken(
        id=-1,
        token=spelling,
        text=spelling.replace(SPACE, " "),
        old_ids=old_ids,
        frequency=frequency,
        spread=spread,
        origin=origin,
    )


def _in_order(
    symbols: Symbols, merges: Iterator[Merge], *, wanted: set[str], num_first: int
) -> Iterator[NewToken]:
    """Put characters between merges: each as soon as it saves as much as the next merge.

    A merge never comes before its characters, since those are at least as frequent. What terms
    need comes first: the first `num_first` merges and all characters of `wanted` texts.
    """
    old_ids = list(symbols.old_ids)
    needed = {symbols.of_character.get(character) for character in set("".join(wanted))}
    characters = [c for c in symbols.characters if c.symbol in needed]
    num_needed = len(characters)
    characters += [c for c in symbols.characters if c.symbol not in needed]

    def token(
        symbol: int, *, frequency: int, spread: int, spelling: bytes, on_the_way: bool
    ) -> NewToken:
        text = spelling.decode()
        origin: Origin = "term" if text in wanted else "step" if on_the_way else "corpus"
        return _token(text, old_ids[symbol], frequency=frequency, spread=spread, origin=origin)

    def character(position: int) -> NewToken:
        c = characters[position]
        return token(
            c.symbol,
            frequency=c.frequency,
            spread=c.spread,
            spelling=symbols.spellings[c.symbol],
            on_the_way=position < num_needed,
        )

    position = 0
    for index, merge in enumerate(merges):
        while position < num_needed or (
            index >= num_first
            and position < len(characters)
            and characters[position].saved >= merge.frequency
        ):
            yield character(position)
            position += 1
        old_ids.append(old_ids[merge.left] + old_ids[merge.right])
        yield token(
            merge.symbol,
            frequency=merge.frequency,
            spread=merge.spread,
            spelling=merge.spelling,
            on_the_way=index < num_first,
        )
    yield from map(character, range(position, len(characters)))


def _too_few(
    found: int, wanted: int, words: Words, refused: Counter[str], rules: Rules
) -> DataError:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common(5))
    return DataError(
        f"num_tokens: {wanted:,} new tokens are asked for, but {words.documents:,} documents with "
        f"{words.text_bytes:,} bytes give {found:,} that are met {rules.min_frequency} times in "
        f"{rules.min_spread} documents. Give more text, lower min_frequency or min_spread, or ask "
        f"for {found:,}." + (f" Refused as what no token shall be: {reasons}." if reasons else "")
    )
