"""The plan of a run: shares, phases, epochs, the account, and what a resumed run may change.

Expected counts come from walking through the sequences one by one, and from exact fractions.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.config.schema import (
    DataConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_cgn.data.account import account_of, describe
from megatron_cgn.data.blend import Blend, BlendFile, BlendSource, phases_of
from megatron_cgn.data.history import BlendHistory
from megatron_cgn.data.indexed import IndexInfo, Sidecar
from megatron_cgn.data.interleave import count, interleave, locate
from megatron_cgn.data.plan import plan_run
from megatron_cgn.data.sources import Documents, Source
from megatron_cgn.errors import ConfigError, DataError

WEIGHTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=9)


def source(name: str, *tokens: int, weights: Sequence[float] | None = None) -> Source:
    """A checked source whose files have one document of so many tokens each."""
    files = tuple(
        Documents(
            index=IndexInfo(
                prefix=f"{name}{place}",
                sidecar=Sidecar(
                    tokenizer_fingerprint="f",
                    tokenizer_name="t",
                    vocab_size=9,
                    eod_id=0,
                    documents=1,
                    tokens=size,
                    text_bytes=size,
                    dtype="uint16",
                    digest=f"{name}{place}-{size}",
                ),
                lengths=np.array([size], dtype=np.int32),
            ),
            start=0,
            stop=1,
        )
        for place, size in enumerate(tokens)
    )
    shares = tokens if weights is None else weights
    return Source(
        name=name,
        training=files,
        weights=tuple(Fraction(str(w)) for w in shares),
        validation=(),
    )


def plan(
    *sources: Source,
    seq_length: int = 10,
    batch: int = 4,
    iters: int | None = None,
    epochs: float | None = None,
    **data: Any,
) -> Blend:
    """The plan of a run over checked sources; ``phases`` as pairs of until and mix."""
    phases = tuple(PhaseConfig(until=u, mix=m) for u, m in data.pop("phases", ()))
    weights = data.pop("weights", {})
    run = RunConfig(
        data=DataConfig(
            sources=tuple(
                SourceConfig(name=s.name, path=s.name, weight=weights.get(s.name)) for s in sources
            ),
            seq_length=seq_length,
            phases=phases,
            **data,
        ),
        train=TrainConfig(global_batch_size=batch, train_iters=iters, epochs=epochs),
    )
    return plan_run(run, sources)


DOMAIN, GENERAL, CODE = source("domain", 1003), source("general", 500, 300), source("code", 90)


def by_source(blend: Blend, stop: int | None = None) -> dict[str, int]:
    """Sequences that each source gives."""
    found = account_of(blend, consumed=stop)["sources"]
    return {entry["name"]: entry["sequences"] for entry in found}


@given(weights=WEIGHTS, total=st.integers(0, 300))
def test_drawing_follows_the_weights_at_every_length(weights: list[int], total: int) -> None:
    tree = interleave([(Fraction(w), place) for place, w in enumerate(weights)])
    drawn: Counter[int] = Counter()
    depth = (len(weights) - 1).bit_length()
    for position in range(total):
        leaf, number = locate(tree, position)
        assert number == drawn[leaf]  # each source's sequences in order, none left out
        drawn[leaf] += 1
    assert dict(count(tree, total)) == {leaf: drawn[leaf] for leaf in range(len(weights))}
    for leaf, weight in enumerate(weights):
        exact = Fraction(total * weight, sum(weights))
        assert abs(drawn[leaf] - exact) <= Fraction(depth, 2)


@given(weights=WEIGHTS, total=st.integers(10**12, 10**15))
def test_drawing_is_exact_at_any_size(weights: list[int], total: int) -> None:
    tree = interleave([(Fraction(w), place) for place, w in enumerate(weights)])
    counts = dict(count(tree, total))
    assert sum(counts.values()) == total
    leaf, number = locate(tree, total)
    assert number == counts[leaf]
    assert dict(count(tree, total + 1)) == {**counts, leaf: number + 1}


@st.composite
def blends(draw: st.DrawFn) -> Blend:
    """Plans of up to four phases over up to four sources of up to three files."""
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    sources = []
    for name in names:
        sizes = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=3))
        total = sum(sizes)
        files = tuple(
            BlendFile(
                path=f"{name}{i}",
                identity=f"{name}{i}-{size}[0:1]",
                start=0,
                stop=1,
                tokens=size,
                weight=Fraction(size, total),
            )
            for i, size in enumerate(sizes)
        )
        sources.append(BlendSource(name=name, files=files, held_out_tokens=0, held_out=()))
    ends = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(sorted))
    mixes = [
        {
            name: Fraction(draw(st.integers(1, 9)))
            for name in draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        }
        for _ in ends
    ]
    batch = draw(st.integers(1, 5))
    return Blend(
        sources=tuple(sources),
        phases=phases_of(mixes, ends, global_batch_size=batch),
        seq_length=7,
        global_batch_size=batch,
        seed=1,
    )


@settings(deadline=None)
@given(blend=blends(), data=st.data())
def test_account_is_what_is_read(blend: Blend, data: st.DataObject) -> None:
    """Counted sequence by sequence: totals, files, phases, and every file without a gap."""
    total = data.draw(st.integers(0, blend.sequences))
    drawn: Counter[tuple[int, int]] = Counter()
    for sequence in range(total):
        place, sample = blend.locate(sequence)
        assert sample == drawn[place]
        drawn[place] += 1
    account = account_of(blend, consumed=total)
    assert (account["sequences"], account["tokens"]) == (total, 7 * total)
    for s, entry in enumerate(account["sources"]):
        counts = [file["sequences"] for file in entry["files"]]
        assert counts == [drawn[s, f] for f in range(len(counts))]
        assert entry["sequences"] == sum(counts)
        assert entry["epochs"] == 7 * sum(counts) / blend.sources[s].tokens
    assert sum(entry["sequences"] for entry in account["sources"]) == total
    in_phases: Counter[str] = Counter()
    for phase in account["phases"]:
        in_phases.update({entry["name"]: entry["sequences"] for entry in phase["sources"]})
        assert sum(entry["share"] for entry in phase["sources"]) == pytest.approx(1)
        assert phase["sequences"] == sum(entry["sequences"] for entry in phase["sources"])
    assert +in_phases == +Counter(by_source(blend, total))
    assert account_of(blend, consumed=blend.sequences) == account_of(blend)
    assert json.loads(json.dumps(account)) == account


@settings(deadline=None)
@given(blend=blends(), data=st.data())
def test_account_only_grows_and_composes(blend: Blend, data: st.DataObject) -> None:
    stops = st.integers(0, blend.sequences)
    first, second = sorted((data.draw(stops), data.draw(stops)))
    a, b = blend.drawn(0, first), blend.drawn(0, second)
    assert all(a[place] <= b[place] for place in blend.places)
    between = blend.drawn(first, second)
    assert all(a[place] + between[place] == b[place] for place in blend.places)


@settings(deadline=None)
@given(blend=blends(), other=blends(), data=st.data())
def test_a_plan_goes_on_from_every_prefix_it_shares(
    blend: Blend, other: Blend, data: st.DataObject
) -> None:
    """Keep some steps of one plan, go on as another: what was read stays, and nothing is lost."""
    batch = blend.global_batch_size
    steps = data.draw(st.integers(1, blend.sequences // batch))
    consumed = steps * batch
    known = {s.name: s for s in other.sources} | {s.name: s for s in blend.sources}
    later = tuple(
        replace(p, start=consumed + p.start * batch, stop=consumed + p.stop * batch)
        for p in other.phases
    )
    changed = replace(
        blend,
        sources=tuple(known.values()),
        phases=(*blend.clip(consumed), *later),
    )
    record = json.loads(json.dumps(BlendHistory(blend)))
    assert BlendHistory(changed).conflict(record, consumed_sequences=consumed) is None
    drawn: Counter[tuple[str, int]] = Counter()
    for sequence in range(min(changed.sequences, consumed + 60)):
        (s, f), sample = changed.locate(sequence)
        name = changed.sources[s].name
        assert sample == drawn[name, f]
        drawn[name, f] += 1
        if sequence < consumed:
            (s, before), number = blend.locate(sequence)
            assert (name, f, sample) == (blend.sources[s].name, before, number)
    account = account_of(changed, consumed=consumed)
    assert {e["name"]: e["sequences"] for e in account["sources"] if e["sequences"]} == {
        name: number for name, number in by_source(blend, consumed).items() if number
    }
    assert Blend.from_record(record) == blend


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(20, 3000), min_size=1, max_size=3),
    epochs=st.sampled_from([0.5, 1.0, 2.0, 3.3]),
    batch=st.integers(1, 8),
    share=st.sampled_from([0.1, 0.25, 0.8, 1.0]),
)
def test_epochs_of_a_source_under_a_mix(
    tokens: list[int], epochs: float, batch: int, share: float
) -> None:
    """The longest run of whole steps that reads the source no more than so often."""
    mix = {"domain": share} | ({"general": 1 - share} if share < 1 else {})
    blend = plan(
        source("domain", *tokens),
        source("general", 700),
        epochs=epochs,
        batch=batch,
        mix={name: round(value, 2) for name, value in mix.items()},
        seq_length=8,
    )
    limit = int((Fraction(str(epochs)) * sum(tokens) - 1) // 8)
    read = by_source(blend)["domain"]
    assert read <= limit or blend.sequences == batch  # one step at least
    longer = replace(blend, phases=(replace(blend.phases[0], stop=blend.sequences + batch),))
    assert by_source(longer)["domain"] > limit
    if batch == 1 and blend.sequences > 1:
        assert read == limit


def test_eighty_to_twenty_and_two_epochs_of_the_domain() -> None:
    blend = plan(DOMAIN, GENERAL, epochs=2, mix={"domain": 0.8, "general": 0.2}, batch=1)
    # (2 * 1003 - 1) // 10 = 200 sequences of domain text; one more of general text still fits
    # before the 201st would come: round(250 * 0.8) = 200, round(251 * 0.8) = 201.
    assert blend.sequences == 250
    assert by_source(blend) == {"domain": 200, "general": 50}
    general = account_of(blend)["sources"][1]
    assert [file["sequences"] for file in general["files"]] == [31, 19]  # 50 * 5/8 = 31.25
    assert blend.phases[0].shares == {"domain": Fraction(4, 5), "general": Fraction(1, 5)}


def test_epochs_without_a_mix_count_all_tokens() -> None:
    # floor((E * (1003 + 90) - 1) / 10) sequences, cut down to whole steps of four.
    for epochs, sequences in ((1, 109), (2, 218), (0.5, 54)):
        blend = plan(DOMAIN, CODE, epochs=epochs)
        assert blend.sequences == sequences // 4 * 4
    only = plan(DOMAIN, CODE, epochs=1, weights={"code": 0.0})
    assert by_source(only) == {"domain": 100, "code": 0}
    with pytest.raises(DataError, match=r"train.epochs=0.1 of the 90 .* 'code' do not fill"):
        plan(DOMAIN, CODE, epochs=0.1, mix={"domain": 1, "code": 1}, epochs_of="code")
    assert plan(CODE, epochs=0.2).sequences == 4  # one step, though its epochs hold one sequence


def test_phases_by_fraction_and_by_step() -> None:
    both = {"domain": 0.5, "general": 0.5}
    annealed = plan(DOMAIN, GENERAL, iters=10, phases=[(0.75, {"domain": 1.0}), (1.0, both)])
    assert [(p.start, p.stop) for p in annealed.phases] == [(0, 32), (32, 40)]  # 7.5 rounds to 8
    assert by_source(annealed) == {"domain": 36, "general": 4}
    stepped = plan(DOMAIN, GENERAL, iters=10, phases=[(8, {"domain": 3}), (None, both)])
    assert stepped.phases == annealed.phases
    with pytest.raises(ConfigError, match=r"data.phases.1: has no step.* step 10 of the run's 10"):
        plan(DOMAIN, GENERAL, iters=10, phases=[(10, both), (None, both)])
    # Half of the run reads domain text alone, the other half none: two epochs are 200 sequences.
    blend = plan(
        DOMAIN,
        GENERAL,
        epochs=2,
        phases=[(0.5, {"domain": 1}), (None, {"general": 1})],
    )
    assert by_source(blend) == {"domain": 200, "general": 200}


def test_file_weights_of_a_source() -> None:
    blend = plan(source("domain", 10, 1000, weights=(0.9, 0.1)), iters=25)
    (entry,) = account_of(blend)["sources"]
    assert [file["sequences"] for file in entry["files"]] == [90, 10]
    assert [file["epochs"] for file in entry["files"]] == [90.0, 0.1]
    assert [file["share"] for file in account_of(blend)["phases"][0]["sources"][0]["files"]] == [
        0.9,
        0.1,
    ]


MIX = {"domain": 0.8, "general": 0.2}


def conflict(now: Blend, before: Blend, *, consumed: int) -> str:
    """What keeps a run from going on; empty if nothing does."""
    record = json.loads(json.dumps(BlendHistory(before)))
    return BlendHistory(now).conflict(record, consumed_sequences=consumed) or ""


def test_what_is_still_to_come_may_change() -> None:
    before = plan(DOMAIN, GENERAL, iters=100, mix=MIX)
    later: Mapping[str, float] = {"domain": 0.5, "code": 0.5}
    for now in (
        plan(GENERAL, DOMAIN, iters=100, mix=MIX),
        plan(DOMAIN, GENERAL, iters=70, mix=MIX),
        plan(DOMAIN, GENERAL, iters=900, mix={"general": 20, "domain": 80}),
        plan(DOMAIN, GENERAL, iters=100, weights=MIX),
        plan(DOMAIN, GENERAL, CODE, iters=900, phases=[(50, MIX), (None, later)]),
        plan(DOMAIN, GENERAL, CODE, iters=100, phases=[(0.5, MIX), (1.0, later)]),
    ):
        assert conflict(now, before, consumed=200) == ""
    fixed = plan(DOMAIN, GENERAL, CODE, iters=100, phases=[(50, MIX), (None, later)])
    assert conflict(fixed, before, consumed=204).startswith(
        "the checkpoint read {domain: 0.8, general: 0.2} in steps 1 to 51; this run would have read"
    )


def test_what_was_consumed_may_not_change() -> None:
    before = plan(DOMAIN, GENERAL, iters=100, mix=MIX)

    def fault(now: Blend, **more: Any) -> str:
        return conflict(now, before, consumed=more.get("consumed", 200))

    other = fault(plan(DOMAIN, GENERAL, iters=100, mix={"domain": 0.5, "general": 0.5}))
    assert "this run would have read {domain: 0.5, general: 0.5} in steps 1 to 50" in other
    remedy = "data.phases=[{until: 50, mix: {domain: 0.8, general: 0.2}}, {mix: …}]"
    assert other.endswith(remedy)
    assert "has done 50 steps and this run has only 40" in fault(
        plan(DOMAIN, GENERAL, iters=40, mix=MIX)
    )
    grown = fault(plan(source("domain", 1004), GENERAL, iters=100, mix=MIX))
    assert "'domain' has changed" in grown and "1,003 tokens" in grown and "1,004 tokens" in grown
    more = fault(plan(DOMAIN, source("general", 500, 300, 9), iters=100, mix=MIX))
    assert "'general' has changed: the checkpoint read one file less" in more
    weighted = source("general", 500, 300, weights=(1, 1))
    assert "'general' has other weights" in fault(plan(DOMAIN, weighted, iters=100, mix=MIX))
    gone = plan(DOMAIN, CODE, iters=100, mix={"domain": 0.8, "code": 0.2})
    assert "the source 'general' is gone" in fault(gone)
    held_out = replace(GENERAL, validation=CODE.training)
    part = replace(before.sources[0].files[0], identity="domain0-1003[0:9]", stop=9)
    cut = replace(before.sources[0], files=(part,))
    divided = fault(replace(before, sources=(cut, *before.sources[1:])))
    assert (
        "trains on other documents of domain0: the checkpoint on 0 to 0, this run on 0 to 8;"
        in (divided)
    )
    assert divided.endswith("restore data.validation_fraction")
    with_held_out = plan(DOMAIN, held_out, iters=100, mix=MIX)
    assert "other held-out documents" in conflict(before, with_held_out, consumed=200)
    assert fault(with_held_out) == ""  # there was none: nothing to compare with
    assert "does not say which sequences" in (
        BlendHistory(before).conflict({"phases": []}, consumed_sequences=4) or ""
    )
    # A source that has not been read yet is free.
    phases: list[tuple[float | None, Mapping[str, float]]] = [(50, MIX), (None, {"code": 1.0})]
    planned = plan(DOMAIN, GENERAL, CODE, iters=100, phases=phases)
    now = plan(DOMAIN, GENERAL, source("code", 91), iters=100, phases=phases)
    assert conflict(now, planned, consumed=200) == ""
    assert "'code' has changed" in conflict(now, planned, consumed=204)


def test_the_remedy_gives_exactly_the_old_shares() -> None:
    """Thirds have no decimal: the remedy names whole numbers."""
    before = plan(DOMAIN, GENERAL, CODE, iters=9)
    now = plan(DOMAIN, GENERAL, CODE, iters=9, weights={"code": 2.0})
    message = conflict(now, before, consumed=8)
    assert "{until: 2, mix: {domain: 1, general: 1, code: 1}}" in message
    # A phase cannot say that it ends at step 1.
    assert conflict(now, before, consumed=4).endswith("start anew in another output_dir")
    kept = plan(
        DOMAIN,
        GENERAL,
        CODE,
        iters=9,
        phases=[(2, {"domain": 1, "general": 1, "code": 1}), (None, {"code": 2})],
    )
    assert conflict(kept, before, consumed=8) == ""


def test_the_plan_is_told_as_a_table_with_a_warning() -> None:
    held_out = replace(source("核电", 40), validation=CODE.training)
    blend = plan(
        DOMAIN,
        GENERAL,
        CODE,
        held_out,
        iters=100,
        phases=[(0.9, MIX), (1.0, {"domain": 0.2, "code": 0.8})],
        validation_fraction=0.1,
    )
    table, unseen = describe(blend)
    assert unseen.startswith("warning: nothing is held out of 'domain', 'general', 'code': nobody")
    assert table.splitlines() == [
        "mix                      share  sequences  tokens  epochs  held out",
        "phase 1: steps 1-90",
        "domain                   80.0%        288   2,880    2.87         0",
        "general                  20.0%         72     720    0.90         0",
        "  general0               12.5%         45     450    0.90",
        "  general1                7.5%         27     270    0.90",
        "phase 2: steps 91-100",
        "domain                   20.0%          8      80    0.08         0",
        "code                     80.0%         32     320    3.56         0",
        "all phases: steps 1-100",
        "domain                   74.0%        296   2,960    2.95         0",
        "general                  18.0%         72     720    0.90         0",
        "code                      8.0%         32     320    3.56         0",
        "核电                      0.0%          0       0    0.00        90",
    ]
    empty = replace(source("held", 0), validation=CODE.training)
    table, _ = describe(plan(DOMAIN, empty, iters=1, mix={"domain": 1}, validation_fraction=0.9))
    assert table.splitlines()[-1] == "held      0.0%          0       0    0.00        90"
    table, warning, _ = describe(plan(DOMAIN, CODE, iters=101, mix={"domain": 0.9, "code": 0.1}))
    # 40 of 404 sequences: 4.4 passes over 90 tokens.
    assert table.splitlines()[-1] == "code    10.0%         40     400    4.44         0"
    assert warning.startswith("warning: the source 'code' is read 4.4 times; beyond about 4 passes")


def test_files_in_the_table_and_in_warnings() -> None:
    """A file may be read far too often while its source is not, and too many fill the screen."""
    files = source("domain", 10, 1000, 20, weights=(0.1, 0.8, 0.1))
    files = replace(files, validation=CODE.training)
    blend = plan(files, iters=50, validation_fraction=0.1)
    _, warning = describe(blend)
    # A tenth of 200 sequences of 10 tokens: 20 passes over 10 tokens, 10 over 20.
    start = "warning: domain0 of the source 'domain' is read 20.0 times, and 1 other file(s) too"
    assert warning.startswith(start)
    for number, rows in ((20, 22), (21, 3)):
        many = replace(source("domain", *[100] * number), validation=CODE.training)
        (table,) = describe(plan(many, iters=50, validation_fraction=0.1))
        assert len(table.splitlines()) == rows
    assert table.splitlines()[-1] == "  21 files: see blend.json"
