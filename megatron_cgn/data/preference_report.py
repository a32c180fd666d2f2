"""What files of preference data hold: counts, lengths, faults by reason, and examples to look at.

For people who prepare data, before a run: ``tools/preprocess_data.py --preference``.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cgn.data.conversation_report import (
    EMPTY,
    Counting,
    fault_lines,
    length_lines,
    marked_text,
    quantiles_of,
    visible,
    without_detail,
)
from megatron_cgn.data.conversations import Fault
from megatron_cgn.data.preference_records import (
    Preference,
    encode_preferences,
    pairs_of,
    read_preferences,
)
from tokenizer.chat import ChatTemplate, EncodedChat


@dataclass(slots=True, kw_only=True)
class PreferenceSurvey:
    """What was found in files; faulty records count as faults and no more."""

    forms: Counter[str] = field(default_factory=Counter)
    """Records by form: ``pair``, ``ranking`` or ``unpaired``."""
    answers: int = 0
    """Of all records."""
    pairs: int = 0
    """Pairs of answers of which one is better."""
    ties: int = 0
    """Pairs of answers of equal rank, which are not compared."""
    longer: int = 0
    """Pairs whose better answer has more tokens that count: far above a half, length is what is
    learned."""
    margins: int = 0
    """Records that say by how much one answer is better."""
    desirable: int = 0
    """Of unpaired answers, the good ones."""
    repeated: int = 0
    """Answers that rankings give twice, which are read once."""
    tokens: int = 0
    """Of all answers, each with its prompt."""
    counted: int = 0
    """Tokens that count."""
    too_long: int = 0
    """Records longer than ``seq_length``."""
    faults: Counter[str] = field(default_factory=Counter)
    """Faults by reason, without what differs from record to record."""
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    """What each record takes of ``seq_length``."""

    @property
    def records(self) -> int:
        """Number of records without faults."""
        return len(self.lengths)

    def to_json(self) -> dict[str, Any]:
        """The same as an object of JSON, with the lengths as quantiles."""
        return {
            "records": self.records,
            "forms": dict(self.forms),
            "answers": self.answers,
            "pairs": self.pairs,
            "ties": self.ties,
            "pairs_whose_better_answer_is_longer": self.longer,
            "margins": self.margins,
            "desirable": self.desirable,
            "repeated_answers": self.repeated,
            "tokens": self.tokens,
            "counted_tokens": self.counted,
            "too_long": self.too_long,
            "length_quantiles": quantiles_of(self.lengths),
            "faults": self.faults.total(),
            "faults_by_reason": dict(self.faults.most_common()),
        }


def survey_preferences(
    paths: Sequence[str | Path],
    *,
    chat: ChatTemplate,
    counting: Counting,
    on_fault: Callable[[Fault], object],
    on_record: Callable[[Preference, list[EncodedChat]], object],
    report: Callable[[int], object],
) -> PreferenceSurvey:
    """Read files of preference data to their end and count what is in them.

    Args:
        paths: The files.
        chat: The chat template.
        counting: Which tokens count.
        on_fault: Called with each record that cannot be used, with each that is too long, in
            order, and with a file that holds none, which a run refuses too.
        on_record: Called with each record without faults, in order, and its answers' tokens.
        report: Called with how many more bytes are read.

    Returns:
        What was found.

    Raises:
        DataError: If a file is missing or damaged.
    """
    found = PreferenceSurvey()
    for path in paths:
        before = found.records + found.faults.total()
        records = read_preferences(path, report=report)
        for item in encode_preferences(records, chat=chat):
            if isinstance(item, Fault):
                found.faults[without_detail(item.reason)] += 1
                on_fault(item)
                continue
            _count(found, *item, counting=counting)
            on_record(*item)
            length = found.lengths[-1]
            if counting.seq_length is not None and length > counting.seq_length:
                found.too_long += 1
                on_fault(_too_long(item[0], length, counting.seq_length))
        if found.records + found.faults.total() == before:
            empty = EMPTY.format("record")
            found.faults[empty] += 1
            on_fault(Fault(str(path), 1, empty))
    return found


def _count(
    found: PreferenceSurvey,
    preference: Preference,
    encoded: Sequence[EncodedChat],
    *,
    counting: Counting,
) -> None:
    record = preference.record
    counted = [sum(end - start for start, end in counting.spans(e)) for e in encoded]
    found.forms[record.form] += 1
    found.answers += len(encoded)
    found.margins += record.margin != 0
    found.repeated += record.repeated
    found.tokens += sum(len(e.ids) for e in encoded)
    found.counted += sum(counted)
    found.lengths.append(sum(map(counting.places, encoded)))
    if record.kind == "unpaired":
        found.desirable += record.answers[0].value > 0
        return
    better, worse = pairs_of([answer.value for answer in record.answers])
    found.pairs += len(better)
    found.ties += len(encoded) * (len(encoded) - 1) // 2 - len(better)
    found.longer += sum(counted[b] > counted[w] for b, w in zip(better, worse, strict=True))


def _too_long(preference: Preference, length: int, limit: int) -> Fault:
    answers = len(preference.record.answers)
    reason = (
        f"its {answers} answers, each with the prompt, take {length:,} tokens together, more than "
        f"the sequence length of {limit:,}"
        if answers > 1
        else f"takes {length:,} tokens, more than the sequence length of {limit:,}"
    )
    return Fault(preference.path, preference.line, reason)


def show_preference(
    preference: Preference,
    encoded: Sequence[EncodedChat],
    *,
    chat: ChatTemplate,
    counting: Counting,
    colour: bool,
) -> str:
    """Write a record as the model reads it, with what counts marked.

    Args:
        preference: The record.
        encoded: Its answers' tokens.
        chat: The chat template.
        counting: Which tokens count.
        colour: As for `conversation_report.show`.

    Returns:
        Lines: where it is from and how long; the prompt; and each answer, which the model reads
        with the prompt in front.
    """
    record = preference.record
    begin = _alike(encoded)
    counted = sum(end - start for e in encoded for start, end in counting.spans(e))
    lines = [
        f"--- {visible(preference.id)} ({record.form}, {preference.path}:{preference.line}): "
        f"{len(encoded)} answers of {' + '.join(f'{len(e.ids):,}' for e in encoded)} tokens with "
        f"the prompt, {counted:,} of them count",
        marked_text(
            encoded[0].ids[:begin],
            [(s, min(e, begin)) for s, e in counting.spans(encoded[0]) if s < begin],
            chat=chat,
            colour=colour,
        ),
    ]
    for answer, title, tokens in zip(record.answers, _titles(preference), encoded, strict=True):
        spans = [(max(s, begin), e) for s, e in counting.spans(tokens) if e > begin]
        text = marked_text(tokens.ids, spans, chat=chat, colour=colour, begin=begin)
        lines += [f"[{answer.name}{title}]", text]
    return "\n".join(lines)


def _alike(encoded: Sequence[EncodedChat]) -> int:
    """Tokens that all answers have in front of their first turn; 0 if these differ."""
    begin = min(e.turns[0][0] for e in encoded)
    return begin if all(e.ids[:begin] == encoded[0].ids[:begin] for e in encoded) else 0


def _titles(preference: Preference) -> list[str]:
    """What the data say of each answer."""
    record = preference.record
    values = [answer.value for answer in record.answers]
    if record.form == "ranking":
        return [f", place {1 + sum(other > value for other in values)}" for value in values]
    if record.form == "unpaired":
        return [", good" if value else ", bad" for value in values]
    return [f", by {record.margin:g}" if record.margin else "", ""]


def summarise_preferences(found: PreferenceSurvey, *, counting: Counting) -> list[str]:
    """Write what was found as lines of text."""
    forms = ", ".join(f"{count:,} {form}" for form, count in found.forms.most_common())
    share = f"{100 * found.counted / found.tokens:.1f} %" if found.tokens else "none"
    lines = [
        f"  records          {found.records:>15,} ({forms or 'none'})",
        f"  answers          {found.answers:>15,}",
    ]
    if found.pairs:
        longer = f"{100 * found.longer / found.pairs:.1f} % with the longer answer chosen"
        lines.append(f"  pairs            {found.pairs:>15,} ({longer})")
    if found.ties:
        lines.append(f"  of equal rank    {found.ties:>15,} pairs, which are not compared")
    if found.repeated:
        lines.append(f"  given twice      {found.repeated:>15,} answers, which are read once")
    if found.margins:
        lines.append(f"  with a margin    {found.margins:>15,}")
    if unpaired := found.forms["unpaired"]:
        lines.append(f"  good answers     {found.desirable:>15,} of {unpaired:,}")
    lines += [
        f"  tokens           {found.tokens:>15,} (each answer with its prompt)",
        f"  tokens counted   {found.counted:>15,} ({share})",
    ]
    lines += length_lines(quantiles_of(found.lengths))
    if counting.seq_length is not None:
        lines.append(f"  too long         {found.too_long:>15,} (over {counting.seq_length:,})")
    return lines + fault_lines(found.faults)
