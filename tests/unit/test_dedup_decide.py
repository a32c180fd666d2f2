"""Decisions: equal to comparing everything in order, whatever the parts, memory and crowds."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup import (
    Banding,
    Decisions,
    Kind,
    Signatures,
    Signer,
    banding,
    find_duplicates,
    load_signatures,
    save_signatures,
)
from megatron_cgn.corpus.dedup import decide as module
from megatron_cgn.corpus.dedup.lsh import Rows

WIDTH = 16
SETTINGS = DeduplicateConfig(num_permutations=WIDTH, similarity_threshold=0.4)
# So few that similar documents often meet by a third one only, which may itself be dropped.
FEW_BANDS = Banding(3, 2)


@contextmanager
def few_bands() -> Iterator[None]:
    with mock.patch.object(module, "banding", return_value=FEW_BANDS):
        yield


def random_signatures(seed: int, count: int, *, noise: float = 0.25) -> Signatures:
    """Documents around a few centres, so that many are similar, in chains too; some equal."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**32 - 1, size=(4, WIDTH), dtype=np.uint32)
    rows = centres[rng.integers(0, 4, count)]
    changed = rng.random(rows.shape) < noise
    rows = np.where(changed, rng.integers(0, 5, rows.shape, dtype=np.uint32), rows)
    hashes = rng.integers(0, 2**63, size=(count, 4), dtype=np.uint64)
    hashes[:, 2] = rng.integers(0, count, count)
    for copy in np.flatnonzero(rng.random(count) < 0.1):
        origin = rng.integers(0, copy + 1)
        rows[copy], hashes[copy] = rows[origin], hashes[origin]
    return Signatures(hashes, rows)


def compare_everything(
    signatures: Signatures, config: DeduplicateConfig, *, num_prior: int = 0
) -> tuple[list[bool], list[set[int]]]:
    """Decide by the definition: in order, against every earlier kept document.

    Returns:
        Which are kept, and for each the earlier kept documents that it duplicates.
    """
    cut = FEW_BANDS
    rows, hashes = signatures.minhashes, signatures.hashes
    kept: list[bool] = []
    reasons: list[set[int]] = []
    for this in range(len(signatures)):
        found = set()
        for other in range(this):
            if not kept[other]:
                continue
            equal = rows[this] == rows[other]
            bands = equal[: cut.bands * cut.rows].reshape(cut.bands, cut.rows)
            near = bool(bands.all(axis=1).any()) and equal.mean() >= config.similarity_threshold
            if config.protect_numbers == "form":
                near &= bool(hashes[this, 2] != hashes[other, 2])
            if config.protect_numbers == "all":
                near &= bool(hashes[this, 3] == hashes[other, 3])
            if near or (hashes[this, :2] == hashes[other, :2]).all():
                found.add(other)
        kept.append(not found or this < num_prior)
        reasons.append(found)
    return kept, reasons


def split(signatures: Signatures, *cuts: int) -> list[Signatures]:
    ends = [0, *cuts, len(signatures)]
    return [
        Signatures(signatures.hashes[a:b], signatures.minhashes[a:b])
        for a, b in zip(ends, ends[1:], strict=False)
    ]


def same(first: Decisions, second: Decisions) -> None:
    np.testing.assert_array_equal(first.kinds, second.kinds)
    np.testing.assert_array_equal(first.of, second.of)
    np.testing.assert_array_equal(first.similarity, second.similarity)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 60),
    noise=st.sampled_from([0.1, 0.25, 0.4]),
    protect=st.sampled_from(["none", "form"]),
)
@settings(max_examples=150, deadline=None)
def test_equals_comparing_everything(seed: int, count: int, noise: float, protect: str) -> None:
    config = DeduplicateConfig(
        num_permutations=WIDTH,
        similarity_threshold=0.4,
        protect_numbers=protect,  # type: ignore[arg-type]
    )
    signatures = random_signatures(seed, count, noise=noise)
    with few_bands():
        decisions = find_duplicates([signatures], config)
    kept, reasons = compare_everything(signatures, config)
    assert decisions.num_crowded == 0
    assert (decisions.kinds == Kind.KEPT).tolist() == kept
    for this in np.flatnonzero(decisions.kinds != Kind.KEPT):
        of = int(decisions.of[this])
        assert kept[of]
        if decisions.kinds[this] == Kind.EXACT:
            assert (signatures.hashes[this, :2] == signatures.hashes[of, :2]).all()
            assert decisions.similarity[this] == 1
        else:
            equal = signatures.minhashes[this] == signatures.minhashes[of]
            assert decisions.similarity[this] == np.float32(equal.mean())
            assert of in reasons[this] or decisions.similarity[this] >= 0.4


@pytest.mark.parametrize(("passes", "equal"), [(1, False), (16, True)])
def test_one_pass_would_not_do(monkeypatch: pytest.MonkeyPatch, passes: int, equal: bool) -> None:
    monkeypatch.setattr(module, "_MAX_PASSES", passes)
    samples = [random_signatures(seed, 60) for seed in range(10)]
    with few_bands():
        kept = [find_duplicates([sample], SETTINGS).kinds == Kind.KEPT for sample in samples]
    wanted = [compare_everything(sample, SETTINGS)[0] for sample in samples]
    assert ([flags.tolist() for flags in kept] == wanted) is equal


@given(st.integers(0, 10**6), st.lists(st.integers(0, 50), max_size=4))
@settings(max_examples=40, deadline=None)
def test_parts_and_memory_make_no_difference(seed: int, cuts: list[int]) -> None:
    signatures = random_signatures(seed, 50)
    with few_bands():
        whole = find_duplicates([signatures], SETTINGS)
        parts = split(signatures, *sorted(cuts))
        same(whole, find_duplicates(parts, SETTINGS, memory_bytes=1))


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_cgn.corpus.dedup import lsh

    signatures = random_signatures(3, 400)
    whole = find_duplicates([signatures], SETTINGS)
    monkeypatch.setattr(lsh, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(lsh, "_PAIRS_AT_ONCE", 5)
    monkeypatch.setattr(module, "_EDGES_AT_ONCE", 3)
    same(whole, find_duplicates([signatures], SETTINGS))


@given(st.integers(0, 10**6), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_earlier_runs_win(seed: int, num_prior: int) -> None:
    signatures = random_signatures(seed, 50)
    prior, ours = split(signatures, num_prior)
    with few_bands():
        decisions = find_duplicates([ours], SETTINGS, prior=[prior])
    kept, _ = compare_everything(signatures, SETTINGS, num_prior=num_prior)
    assert (decisions.kinds == Kind.KEPT).tolist() == kept[num_prior:]
    of = decisions.of + num_prior
    assert (of >= 0).all()
    assert all(kept[index] for index in of)


def test_only_equal_documents_when_near_is_off() -> None:
    signatures = random_signatures(1, 50)
    config = DeduplicateConfig(num_permutations=WIDTH, near=False)
    decisions = find_duplicates([signatures], config)
    hashes = [tuple(row) for row in signatures.hashes[:, :2].tolist()]
    assert (decisions.kinds == Kind.EXACT).tolist() == [
        hashes.index(value) < index for index, value in enumerate(hashes)
    ]
    assert decisions.of.tolist() == [hashes.index(value) for value in hashes]


def crowd(count: int, similarity: float, *, seed: int = 0) -> Signatures:
    """Many documents around one centre, each pair about as similar as wanted."""
    rng = np.random.default_rng(seed)
    centre = rng.integers(0, 2**32 - 1, size=128, dtype=np.uint32)
    own = rng.integers(0, 2**32 - 1, size=(count, 128), dtype=np.uint32)
    rows = np.where(rng.random((count, 128)) < np.sqrt(similarity), centre, own)
    return Signatures(rng.integers(0, 2**63, size=(count, 4), dtype=np.uint64), rows)


def count_pairs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have comparisons counted."""
    asked = [0]
    original = Rows.similarities

    def counting(
        self: Rows, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        asked[0] += len(first)
        return original(self, first, second)

    monkeypatch.setattr(Rows, "similarities", counting)
    return asked


def test_form_letters_take_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_pairs(monkeypatch)
    signatures = crowd(20_000, 0.92)
    decisions = find_duplicates([signatures], DeduplicateConfig())
    assert (decisions.kinds == Kind.KEPT).sum() == 1
    assert asked[0] < 8 * len(signatures)


def test_crowds_of_different_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_pairs(monkeypatch)
    signatures = crowd(6_000, 0.5)
    rng = np.random.default_rng(1)
    # Real duplicates among them: other words, the same numbers.
    origins, copies = np.arange(100, 200), np.arange(5_000, 5_100)
    changed = rng.random((100, 128)) < 0.1
    # A record may by chance be like another: those are true as well.
    by_chance = (find_duplicates([signatures], DeduplicateConfig()).kinds == Kind.NEAR).sum()
    asked[0] = 0
    signatures.minhashes[copies] = np.where(
        changed, rng.integers(0, 2**32 - 1, (100, 128)), signatures.minhashes[origins]
    )
    signatures.hashes[copies, 3] = signatures.hashes[origins, 3]
    decisions = find_duplicates([signatures], DeduplicateConfig())
    cut = banding(128, DeduplicateConfig().similarity_threshold)
    assert asked[0] <= 2 * module._MAX_LEADERS * cut.bands * len(signatures)
    assert decisions.num_crowded > 1_000
    found = decisions.kinds[copies] == Kind.NEAR
    assert found.mean() > 0.95
    assert (decisions.kinds == Kind.NEAR).sum() <= 100 + by_chance


@pytest.mark.parametrize("num_permutations", [16, 64, 128, 256, 1024])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.75, 0.8, 0.95, 1.0])
def test_bands_are_as_long_as_recall_allows(num_permutations: int, threshold: float) -> None:
    def meeting(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (num_permutations // rows)

    cut = banding(num_permutations, threshold)
    assert cut.bands * cut.rows <= num_permutations
    assert cut.probability(threshold) == pytest.approx(meeting(cut.rows))
    assert meeting(cut.rows) >= 0.98 or cut.rows == 1
    longer = range(cut.rows + 1, num_permutations + 1)
    assert all(meeting(rows) < 0.98 for rows in longer)


def test_the_probability_of_meeting_is_what_happens() -> None:
    rng = np.random.default_rng(0)
    cut = banding(128, DeduplicateConfig().similarity_threshold)
    for similarity in (0.4, 0.5, 0.6):
        equal = rng.random((20_000, cut.bands, cut.rows)) < similarity
        met = equal.all(axis=2).any(axis=1).mean()
        assert met == pytest.approx(cut.probability(similarity), abs=0.015)


# From here on with texts.

FORM = (
    "设备位号{tag}，{date}执行预防性维修。检查机械密封无泄漏，润滑油位正常，联轴器护罩完好，地脚螺栓无松动，"
    "出口压力{value}MPa，各项参数在规程要求范围内，试运行合格，恢复备用，工作票已终结，现场已清理干净。"
)


def kinds_of(texts: list[str], config: DeduplicateConfig | None = None) -> list[int]:
    config = config or DeduplicateConfig()
    return list(find_duplicates([Signer(config).sign(texts)], config).kinds.tolist())


def prose(seed: int, count: int = 400) -> str:
    """Text of a made-up language, unlike that of any other seed; words come in small families."""
    rng = random.Random(seed)
    return "".join(
        chr(rng.randint(0x4E00, 0x9F00)) if rng.random() < 0.95 else "。\n" for _ in range(count)
    )


def test_records_of_one_form_are_kept() -> None:
    texts = [
        FORM.format(tag=f"1RCV{i:03d}PO", date=f"2026-05-{i + 1:02d}", value=f"{i / 7:.2f}")
        for i in range(28)
    ]
    assert kinds_of(texts) == [Kind.KEPT] * 28
    assert kinds_of(texts, DeduplicateConfig(protect_numbers="all")) == [Kind.KEPT] * 28
    unprotected = DeduplicateConfig(protect_numbers="none", number_weight=0)
    assert kinds_of(texts, unprotected).count(Kind.NEAR) > 20


def test_a_changed_word_makes_a_duplicate_unless_all_numbers_are_protected() -> None:
    texts = [FORM.format(tag=f"1RCV00{i}PO", date="2026-05-01", value="1.5") for i in (1, 2)]
    texts[1] = texts[1].replace("现场已清理干净", "现场清理完毕")
    long = [prose(1) + text for text in texts]
    assert kinds_of(long) == [Kind.KEPT, Kind.NEAR]
    assert kinds_of(long, DeduplicateConfig(protect_numbers="all")) == [Kind.KEPT] * 2
    same_numbers = [long[0], long[0].replace("现场已清理干净", "现场清理完毕")]
    assert kinds_of(same_numbers, DeduplicateConfig(protect_numbers="all")) == [0, Kind.NEAR]


def test_short_titles_are_not_merged() -> None:
    texts = [
        "主泵检修",
        "主泵检查",
        "Main pump",
        "Main pumps",
        "",
        "！",
        "主泵检修规程一",
        "主泵检修规程二",
    ]
    assert kinds_of(texts) == [Kind.KEPT] * len(texts)
    assert kinds_of([*texts, "主泵 检修。", "main  PUMP"])[-2:] == [Kind.EXACT] * 2


def test_the_source_that_comes_first_keeps_its_copy() -> None:
    config = DeduplicateConfig()
    signer = Signer(config)
    shared, domain_only, general_only = prose(1), prose(2), prose(3)
    edited = shared.replace("。", "", 3) + "补充说明"
    domain, general = signer.sign([domain_only, shared]), signer.sign([edited, general_only])
    by_domain = find_duplicates([domain, general], config)
    assert by_domain.kinds.tolist() == [Kind.KEPT, Kind.KEPT, Kind.NEAR, Kind.KEPT]
    assert by_domain.of[2] == 1
    by_general = find_duplicates([general, domain], config)
    assert by_general.kinds.tolist() == [Kind.KEPT, Kind.KEPT, Kind.KEPT, Kind.NEAR]
    assert by_general.of[3] == 0
    earlier_run = find_duplicates([general], config, prior=[domain])
    assert earlier_run.kinds.tolist() == [Kind.NEAR, Kind.KEPT]
    assert earlier_run.of.tolist() == [-1, 1]


def test_an_exact_copy_of_a_near_duplicate_duplicates_the_kept_one() -> None:
    config = DeduplicateConfig()
    text = prose(5)
    signed = Signer(config).sign([text, text + "补充", "  " + text + "补充\n"])
    decisions = find_duplicates([signed], config)
    assert decisions.kinds.tolist() == [Kind.KEPT, Kind.NEAR, Kind.NEAR]
    assert decisions.of.tolist() == [0, 0, 0]
    assert decisions.similarity[1] == decisions.similarity[2] > 0.9


def test_unrelated_and_planted_documents() -> None:
    originals = [prose(seed) for seed in range(150)]
    planted = []
    for seed, text in enumerate(originals[:50]):
        rng = random.Random(seed)
        # One character in a hundred: about 0.9 of the n-grams' Jaccard similarity.
        places = rng.sample(range(len(text)), 4)
        planted.append("".join("某" if i in places else c for i, c in enumerate(text)))
    kinds = kinds_of([*originals, *planted])
    assert kinds[:150] == [Kind.KEPT] * 150
    assert kinds[150:] == [Kind.NEAR] * 50
    assert Kind.KEPT.reason is None
    assert (Kind.EXACT.reason, Kind.NEAR.reason) == ("duplicate/exact", "duplicate/near")


def test_mapped_files_make_no_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megatron_cgn.corpus.dedup import lsh

    monkeypatch.setattr(lsh, "_ROWS_TO_HOLD", 1)
    signatures = random_signatures(5, 300)
    parameters = Signer(SETTINGS).parameters
    mapped = []
    for number, part in enumerate(split(signatures, 0, 1, 40, 40, 200)):
        directory = tmp_path / str(number)
        save_signatures(directory, [part], num_documents=len(part), parameters=parameters)
        mapped.append(load_signatures(directory, parameters=parameters))
    same(find_duplicates([signatures], SETTINGS), find_duplicates(mapped, SETTINGS))
    rows = Rows(mapped)
    wanted = np.random.default_rng(0).integers(0, 300, 1000)
    np.testing.assert_array_equal(rows.gather(wanted), signatures.minhashes[wanted])
