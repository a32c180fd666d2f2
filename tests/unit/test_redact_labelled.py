"""The labelled set of `benchmarks/redact.py`, small: recall, precision, and look-alikes kept.

On the development templates: the final ones are for the published figures only.
"""

import sys
from pathlib import Path

import pytest

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.redact import Redactor

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from redact import CHECKSUMMED, Score, draw, report, score  # noqa: E402
from redact_templates import DEVELOPMENT, KINDS, LOOK_ALIKES, SECOND, THIRD, UNANNOUNCED  # noqa: E402

SEEN = DEVELOPMENT + SECOND + THIRD
SAMPLES = list(draw(SEEN, seed=11, documents=900))


@pytest.fixture(scope="module")
def result() -> Score:
    return score(Redactor(RedactConfig()), SAMPLES)


@pytest.mark.parametrize("kind", sorted(set(KINDS.values()) - {UNANNOUNCED}))
def test_recall_and_precision(result: Score, kind: str) -> None:
    slots = [slot for slot in KINDS if KINDS[slot] == kind]
    marked = sum(result.marked[slot] for slot in slots)
    assert marked >= 20
    recall = sum(result.found[slot] for slot in slots) / marked
    assert recall >= (0.99 if kind in CHECKSUMMED else 0.95), result.missed
    assert result.right[kind] / result.findings[kind] >= 0.98, result.wrong


def test_look_alikes_stay(result: Score) -> None:
    assert min(result.look_alikes[slot] for slot in LOOK_ALIKES) >= 10
    assert result.kept.total() / result.look_alikes.total() >= 0.98, result.wrong


def test_the_score_sees_what_is_missed_and_what_is_wrong(result: Score) -> None:
    only_emails = score(Redactor(RedactConfig(kinds=("email",))), SAMPLES)
    assert only_emails.found["email"] == result.found["email"]
    assert only_emails.found.total() == only_emails.found["email"]
    assert only_emails.marked == result.marked
    # A mark taken away makes its finding a wrong one.
    sample = next(s for s in SAMPLES if any(mark[0] == "email" for mark in s.marks))
    bare = score(Redactor(RedactConfig(kinds=("email",))), [type(sample)(sample.text, ())])
    assert bare.right.total() == 0 < bare.findings["email"] == len(bare.wrong)


def test_a_seed_gives_the_same_set() -> None:
    assert list(draw(SEEN, seed=11, documents=20)) == SAMPLES[:20]
    assert list(draw(SEEN, seed=12, documents=20)) != SAMPLES[:20]


def test_the_report_has_a_row_a_kind(result: Score) -> None:
    lines = report(result)
    for name in (*KINDS.values(), *LOOK_ALIKES):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1
