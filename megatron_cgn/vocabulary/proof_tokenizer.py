"""Proofs that an extended tokenizer lost nothing, made on the directory that was written.

Old and new tokenizer read the same texts: documents, their lines, texts that were made to break
tokenizers (``tokenizer/hard_texts.py``), and the new tokens cut short and joined to others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cgn.vocabulary.proof import Proof, judge
from megatron_cgn.vocabulary.proof_files import (
    Definition,
    prove_files,
    prove_options,
    unknown_id,
    vocabulary,
)
from tokenizer.extension import Extension, NewToken
from tokenizer.fast import FastEncoder, NotEqual
from tokenizer.hard_texts import hard_texts
from tokenizer.wrapper import Tokenizer

_AROUND = ("", " ", "\n", "。", "a", "0", "(")
"""What is put around a token's text when it does not come out of its text alone."""
_LINES = 20_000
"""Most single lines of the documents that are tried besides the documents."""


def prove_tokenizer(
    old: Path,
    new: Path,
    extension: Extension,
    *,
    domain: Sequence[str],
    general: Sequence[str] = (),
) -> list[Proof]:
    """Make every proof of a tokenizer.

    Args:
        old: Directory of the tokenizer that was extended.
        new: Directory that was written; with its ``config.json``, if the old one has one.
        extension: What the new one is said to be.
        domain: Documents of the kind that the new tokens are for; valid Unicode.
        general: Other documents; the hard texts stand in for them where there are none.

    Returns:
        The proofs, in the order in which they are shown.

    Raises:
        DataError: If one of the tokenizers cannot be opened.
    """
    before, after = Tokenizer.from_pretrained(old), Tokenizer.from_pretrained(new)
    old_definition, new_definition = before.definition(), after.definition()
    hard = hard_texts(after.added_tokens(), count=500)
    hard += _broken_tokens(extension.new_tokens)
    texts = [*domain, *_lines(domain), *general, *hard]
    sample = _Sample(texts, before.encode_batch(texts), after.encode_batch(texts))
    return [
        prove_ids(old_definition, new_definition, extension),
        prove_options(old_definition, new_definition, extension),
        prove_files(old, new, new_definition, texts=hard),
        prove_reachable(after, extension, seen={i for ids in sample.after for i in ids}),
        _prove_decoding(before, after, sample),
        _prove_old_texts(sample, first=extension.old_vocab_size),
        _prove_other_text(before, after, general or hard, given=bool(general)),
        _prove_transformers(old, new, sample, added=before.added_tokens()),
        _prove_fast_encoder(before, after, sample),
    ]


def prove_ids(old: Definition, new: Definition, extension: Extension) -> Proof:
    """Old tokens keep their ids, and the new ones have those that the extension says.

    Args:
        old: ``tokenizer.json`` of the tokenizer that was extended, parsed.
        new: The same of the extended one.
        extension: What the new one is said to be.

    Returns:
        The proof.
    """
    before, after = vocabulary(old), vocabulary(new)
    said = {token.token: token.id for token in extension.new_tokens}
    wrong = [token for token, i in before.items() if after.get(token) != i]
    added = {token: i for token, i in after.items() if token not in before}
    wrong += [token for token in added.keys() | said if added.get(token) != said.get(token)]
    if extension.old_vocab_size != max(before.values()) + 1:
        wrong.append(f"the first new id, {extension.old_vocab_size}")
    first, last = extension.old_vocab_size, extension.new_vocab_size - 1
    news = f"the {len(said):,} new ones are {first:,} to {last:,}" if said else "none is new"
    return judge(
        "ids", wrong, good=f"all {len(before):,} old tokens keep theirs; {news}", bad="moved"
    )


def prove_reachable(new: Tokenizer, extension: Extension, *, seen: set[int]) -> Proof:
    """Every new token that stands for a text comes out of some text.

    Args:
        new: The extended tokenizer.
        extension: What it is said to be.
        seen: Ids that came out of texts already.

    Returns:
        The proof. Steps, which are parts of characters, are counted only.
    """
    wholes = [(token.id, token.text) for token in extension.new_tokens if token.text is not None]
    ids = new.encode_batch([text for _, text in wholes])
    alone = {i for (i, _), made in zip(wholes, ids, strict=True) if made == [i]}
    lost = [text for i, text in wholes if i not in alone | seen and not _comes_out(new, i, text)]
    good = f"each of {len(wholes):,} new tokens comes out, {len(alone):,} for their text alone"
    if steps := [token for token in extension.new_tokens if token.text is None]:
        good += f"; {len(steps):,} are steps, parts of new characters"
    return judge("reachable", lost, good=good, bad="never come out")


@dataclass(frozen=True, slots=True)
class _Sample:
    """Texts with their ids before and after."""

    texts: list[str]
    before: list[list[int]]
    after: list[list[int]]

    def __iter__(self) -> Iterator[tuple[str, list[int], list[int]]]:
        return zip(self.texts, self.before, self.after, strict=True)


def _prove_decoding(old: Tokenizer, new: Tokenizer, sample: _Sample) -> Proof:
    """What decoded to itself still does; anything else gives what it gave before, or itself.

    Where the old tokenizer had no token for a character, a new one may have it: the rest is as
    before if the old tokenizer makes of the result what it made of the text.
    """
    unknown = unknown_id(old.definition())
    wrong, same = [], 0
    for text, before, after in sample:
        decoded, was = new.decode(after), old.decode(before)
        same += decoded == text
        if decoded in (text, was):
            continue
        if unknown not in before or old.decode(old.encode(decoded)) != was:
            wrong.append(text)
    good = f"{same:,} of {len(sample.texts):,} texts encode and decode to themselves"
    if same < len(sample.texts):
        good += ", the others to what they did before"
        good += " and characters that had no token" if unknown is not None else ""
    return judge("decoding", wrong, good=good, bad="decode to something else")


def _prove_old_texts(sample: _Sample, *, first: int) -> Proof:
    """A text without a new token has the ids that it had."""
    untouched = [(t, b, a) for t, b, a in sample if all(i < first for i in a)]
    return judge(
        "old texts",
        [text for text, before, after in untouched if before != after],
        good=f"{len(untouched):,} texts without a new token have the ids that they had",
        bad="have other ids, without a new token",
    )


def _prove_other_text(
    old: Tokenizer, new: Tokenizer, texts: Sequence[str], *, given: bool
) -> Proof:
    """Other text takes no more tokens than before.

    Texts with unknown characters are left aside: a run of them was one token, whatever its length.
    """
    unknown = unknown_id(old.definition())
    ids = zip(old.encode_batch(texts), new.encode_batch(texts), strict=True)
    known = [(len(was), len(now)) for was, now in ids if unknown not in was]
    before, after = (sum(lengths) for lengths in zip(*known, strict=True)) if known else (0, 0)
    what = "general text" if given else "hard texts"
    return Proof(
        name="other text",
        ok=after <= before,
        text=f"{what} of {before:,} tokens now takes {after:,}",
    )


def _prove_transformers(old: Path, new: Path, sample: _Sample, *, added: Sequence[str]) -> Proof:
    """The directory opens in `transformers`, whose fast tokenizer gives the same ids.

    Added tokens are read as such first, with what the template adds, as inference engines do.
    """
    try:
        was, now = _open_in_transformers(old), _open_in_transformers(new)
    except Exception as error:  # it lets through whatever its converters raise
        text = f"transformers does not open it: {error}"
        return Proof(name="fast tokenizer", ok=False, text=text)
    backend = getattr(now, "backend_tokenizer", None)
    if backend is None:
        return Proof(name="fast tokenizer", ok=False, text=f"{type(now).__name__} is not fast")
    wrong = [text for text in ("", *added) if was(text)["input_ids"] != now(text)["input_ids"]]
    backend.encode_special_tokens = True  # from here on text is text, as in `Tokenizer`
    made = backend.encode_batch_fast(sample.texts, add_special_tokens=False)
    for (text, _, after), encoding in zip(sample, made, strict=True):
        wrong += [text] if encoding.ids != after else []
    good = f"{type(now).__name__} of transformers gives the same ids for {len(made):,} texts"
    return judge("fast tokenizer", wrong, good=good, bad="gives other ids")


def _prove_fast_encoder(old: Tokenizer, new: Tokenizer, sample: _Sample) -> Proof:
    """What makes ``tools/preprocess_data.py`` fast still gives the same ids, if it did before."""
    name = "fast encoder"
    try:
        FastEncoder(old)
    except ImportError:
        return Proof(name=name, ok=True, text="not tried, gigatoken is not installed")
    except NotEqual as reason:
        return Proof(name=name, ok=True, text=f"not possible before either ({reason})")
    try:
        FastEncoder(new).prove(sample.texts)
    except NotEqual as reason:
        return Proof(name=name, ok=False, text=f"not possible any more ({reason})")
    return Proof(name=name, ok=True, text=f"gives the same ids for {len(sample.texts):,} texts")


def _open_in_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def _comes_out(tokenizer: Tokenizer, token_id: int, text: str) -> bool:
    texts = [before + text + after for before in _AROUND for after in _AROUND]
    return any(token_id in ids for ids in tokenizer.encode_batch(texts))


def _lines(documents: Sequence[str]) -> Iterator[str]:
    """Distinct single lines, the first of them."""
    seen: set[str] = set()
    for document in documents:
        for line in document.split("\n"):
            if len(seen) == _LINES:
                return
            if line not in seen:
                seen.add(line)
                yield line


def _broken_tokens(tokens: Sequence[NewToken]) -> Iterator[str]:
    """New tokens cut short, doubled and joined to marks: where an extension would break first."""
    texts = [token.text for token in tokens if token.text]
    for text, other in zip(texts, texts[1:] + texts[:1], strict=True):
        yield f"{text[:-1]} {text}{text[-1]}{other}{other[1:]}\u0301 {text}\n{other}1{text}"
