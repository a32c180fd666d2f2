"""What a run leaves behind and shows: metrics.jsonl, TensorBoard, loss.png, lines, the table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_cgn.engine import metrics
from megatron_cgn.engine.callbacks import SampleAnswer
from megatron_cgn.engine.engine import StepReport
from megatron_cgn.engine.metrics import (
    Monitor,
    before_after_samples,
    before_after_table,
    read_records,
)

TOKENS = 1000


class _Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock.perf_counter)
    return clock


def _monitor(path: Path, *, first_step: int = 0, total_steps: int = 10) -> Monitor:
    return Monitor(
        path, total_steps=total_steps, first_step=first_step, tokens_after=TOKENS.__mul__
    )


def _report(step: int, *, logged: bool = True, **changes: Any) -> StepReport:
    values: dict[str, Any] = dict(
        step=step,
        metrics={"loss": 7.0 - step / 10, "rewards/margins": 0.5} if logged else {},
        count=90 if logged else 0,
        lr=1e-5 * step,
        grad_norm=2.0 + step,
        skipped=False,
    )
    return StepReport(**(values | changes))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_records_have_the_promised_fields(
    tmp_path: Path, clock: _Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = _monitor(tmp_path / "run")
    for step in (1, 2):
        clock.now += 0.5
        monitor.on_step(_report(step))
    monitor.on_end()
    first, second = _lines(tmp_path / "run")
    assert list(first) == [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "step_time_s",
        "rewards/margins",
    ]
    assert second == {
        "step": 2,
        "loss": 6.8,
        "lr": 2e-5,
        "grad_norm": 4.0,
        "tokens": 2000,
        "tokens_per_s": 2000.0,
        "step_time_s": 0.5,
        "rewards/margins": 0.5,
    }
    shown = capsys.readouterr().err.splitlines()
    assert shown[1].startswith(
        "step      2/10  loss 6.8000  margin 0.500  lr 2.00e-05  grad norm 4.000  "
        "2,000 tokens/s  memory "
    )
    # Eight steps of half a second are left.
    assert shown[1].endswith("MiB  ETA 0:00:04")


def test_records_are_in_the_file_as_soon_as_they_are_known(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path)
    monitor.on_step(_report(1))
    assert [r["step"] for r in _lines(tmp_path)] == [1]
    monitor.on_validation(1, {"val/domain/loss": 3.0, "val/domain/bits_per_byte": 1.25})
    assert _lines(tmp_path)[1] == {
        "step": 1,
        "val/domain/loss": 3.0,
        "val/domain/bits_per_byte": 1.25,
    }
    monitor.on_end()


def test_skipped_step_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = _monitor(tmp_path)
    monitor.on_step(_report(1, skipped=True, grad_norm=None))
    monitor.on_step(_report(2))
    monitor.on_end()
    skipped, taken = _lines(tmp_path)
    assert skipped["skipped"] == 1 and skipped["grad_norm"] is None
    assert "skipped" not in taken
    assert "grad norm skipped" in capsys.readouterr().err


def test_rates_span_the_steps_between_reports_and_nothing_else(
    tmp_path: Path, clock: _Clock
) -> None:
    monitor = _monitor(tmp_path)
    clock.now += 50.0
    monitor.on_validation(0, {"val/a/loss": 1.0})
    for step in range(1, 5):
        clock.now += 1.0
        monitor.on_step(_report(step, logged=step == 4))
        if step == 2:
            clock.now += 30.0
            monitor.on_validation(2, {"val/a/loss": 1.0})
            clock.now += 20.0
            monitor.on_message("saved a checkpoint")
    clock.now += 9.0
    monitor.on_message("saved a checkpoint")
    clock.now += 2.0
    monitor.on_step(_report(5))
    monitor.on_end()
    steps = [r for r in _lines(tmp_path) if "loss" in r]
    assert [(r["step"], r["step_time_s"], r["tokens_per_s"]) for r in steps] == [
        (4, 1.0, 1000.0),
        (5, 2.0, 500.0),
    ]


def test_resumed_run_cuts_off_what_was_lost(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path)
    monitor.on_validation(0, {"val/a/loss": 5.0, "val/a/bits_per_byte": 2.0})
    for step in range(1, 7):
        monitor.on_step(_report(step))
    monitor.on_validation(6, {"val/a/loss": 4.0, "val/a/bits_per_byte": 1.5})
    monitor.on_end()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    resumed = _monitor(tmp_path, first_step=4)
    assert [r["step"] for r in _lines(tmp_path)] == [0, 1, 2, 3, 4]
    resumed.on_step(_report(5, lr=0.25))
    resumed.on_end()
    records = _lines(tmp_path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5]
    assert records[-1]["lr"] == 0.25
    assert records[-1]["tokens"] == 5 * TOKENS


def test_new_run_in_an_old_directory_starts_empty(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path)
    monitor.on_validation(0, {"val/a/loss": 5.0})
    monitor.on_step(_report(1))
    monitor.on_end()
    _monitor(tmp_path).on_end()
    assert _lines(tmp_path) == []


def test_metrics_file_is_strict_json_also_for_nan(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path)
    monitor.on_step(_report(1, metrics={"loss": math.nan}, grad_norm=math.inf))
    monitor.on_step(_report(2))
    monitor.on_end()

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=refuse)
    assert first["loss"] is None and first["grad_norm"] is None
    assert (tmp_path / "loss.png").is_file()


def test_losses_of_sources_are_written_readably_and_drawn(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = _monitor(tmp_path)
    monitor.on_step(_report(1, metrics={"loss": 2.0, "train/领域/loss": 1.5}))
    monitor.on_end()
    assert '"train/领域/loss": 1.5' in (tmp_path / "metrics.jsonl").read_text("utf-8")
    _monitor(tmp_path, first_step=1).on_end()
    assert '"train/领域/loss": 1.5' in (tmp_path / "metrics.jsonl").read_text("utf-8")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/领域/loss")[0].value == 1.5
    assert (tmp_path / "loss.png").is_file()


def test_run_without_a_step_leaves_no_plot(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path)
    monitor.on_end()
    assert not (tmp_path / "loss.png").exists()


def test_tensorboard_has_the_same_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = _monitor(tmp_path)
    monitor.on_step(_report(1))
    monitor.on_validation(1, {"val/a/bits_per_byte": 2.5})
    monitor.on_end()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "train/grad_norm", "rewards/margins"} <= tags
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, round(loss.value, 5)) == (1, 6.9)
    assert events.Scalars("val/a/bits_per_byte")[0].value == 2.5


def test_truncated_last_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


def test_table_compares_first_and_last_scores() -> None:
    def scores(step: int, a: float | None, b: float) -> dict[str, Any]:
        return {
            "step": step,
            "val/a/loss": 4.0,
            "val/a/bits_per_byte": a,
            "val/b/loss": 3.0 + step,
            "val/b/bits_per_byte": b,
        }

    step = {"step": 1, "loss": 9.0}
    records = [scores(0, 2.0, 1.0), step, scores(5, 9.9, 9.9), scores(9, 1.5, 1.1)]
    rows = before_after_table(records).splitlines()
    assert rows[2:] == [
        "| a | 4.0000 | 4.0000 | 2.0000 | 1.5000 | -25.0 % |",
        "| b | 3.0000 | 12.0000 | 1.0000 | 1.1000 | +10.0 % |",
    ]
    assert "| a | 4.0000 | 4.0000 | 2.0000 | nan | +nan % |" in before_after_table(
        [scores(0, 2.0, 1.0), scores(1, None, 1.0)]
    )
    assert before_after_table([{"step": 1, "loss": 9.0}]) == ""


def test_table_of_answers_compares_points_of_accuracy() -> None:
    records = [
        {"step": 0, "val/a/loss": 2.0, "val/a/token_accuracy": 0.5},
        {"step": 9, "val/a/loss": 1.0, "val/a/token_accuracy": 0.625},
    ]
    head, _, row = before_after_table(records).splitlines()
    assert head == "| source | loss before | after | token accuracy before | after | change |"
    assert row == "| a | 2.0000 | 1.0000 | 0.5000 | 0.6250 | +12.5 points |"


def test_table_of_comparisons_has_margins_and_no_accuracy_where_there_was_no_order() -> None:
    def scores(step: int, margin: float, accuracy: float) -> dict[str, Any]:
        return {
            "step": step,
            "val/a/loss": 0.7,
            "val/a/rewards/margins": margin,
            "val/a/rewards/accuracies": accuracy,
            "val/a/logps/chosen": -5.0,
        }

    head, _, row = before_after_table([scores(0, 1e-7, 0.4), scores(9, 0.5, 0.9)]).splitlines()
    assert head == (
        "| source | loss before | after | accuracy before | after | change "
        "| margin before | after |"
    )
    assert row == "| a | 0.7000 | 0.7000 | – | 0.9000 | – | 0.0000 | 0.5000 |"
    _, _, row = before_after_table([scores(0, 0.1, 0.4), scores(9, 0.5, 0.9)]).splitlines()
    assert row == "| a | 0.7000 | 0.7000 | 0.4000 | 0.9000 | +50.0 points | 0.1000 | 0.5000 |"
    without = [
        {k: v for k, v in r.items() if "accuracies" not in k}
        for r in (scores(0, 0.0, 0.0), scores(9, 0.5, 0.0))
    ]
    head, _, row = before_after_table(without).splitlines()
    assert head == "| source | loss before | after | margin before | after |"
    assert row == "| a | 0.7000 | 0.7000 | 0.0000 | 0.5000 |"


def test_the_line_of_a_validation_has_what_the_table_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = _monitor(tmp_path)
    monitor.on_validation(4, {"val/a/loss": 0.5, "val/a/logps/chosen": -5.0, "val/a/margin": 0.25})
    monitor.on_end()
    assert capsys.readouterr().err.splitlines() == [
        "step      4  val/a/loss 0.5000  val/a/margin 0.2500"
    ]
    assert _lines(tmp_path)[0]["val/a/logps/chosen"] == -5.0


def _sample(answer: str, *, reference: str | None = None) -> SampleAnswer:
    return SampleAnswer(
        prompt="一回路压力?", answer=answer, reference=reference, num_tokens=3, ended=True
    )


def test_samples_are_recorded_cut_off_on_resuming_and_compared(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = _monitor(tmp_path)
    monitor.on_samples(0, [_sample("15\n\nMPa", reference="15.5 MPa")])
    monitor.on_samples(4, [_sample("four")])
    monitor.on_samples(6, [_sample("lost")])
    monitor.on_end()
    _monitor(tmp_path, first_step=4).on_end()
    records = read_records(tmp_path / "samples.jsonl")
    assert [(r["step"], r["answer"]) for r in records] == [(0, "15\n\nMPa"), (4, "four")]
    assert records[0]["reference"] == "15.5 MPa" and records[0]["num_tokens"] == 3
    assert "一回路压力" in (tmp_path / "samples.jsonl").read_text("utf-8")
    assert list(before_after_samples(records)) == [
        "asked   一回路压力?\nbefore  15 MPa\nafter   four"
    ]
    assert list(before_after_samples(records[:1])) == list(before_after_samples([])) == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "samples/1/text_summary" in events.Tags()["tensors"]


def test_rates_count_the_tokens_of_their_own_steps(tmp_path: Path, clock: _Clock) -> None:
    """Packs are not all full: what was read up to a step is known exactly."""
    read = [0, 100, 150, 450]
    monitor = Monitor(tmp_path, total_steps=3, first_step=0, tokens_after=read.__getitem__)
    for step in (1, 2, 3):
        clock.now += 2.0
        monitor.on_step(_report(step, logged=step != 2))
    monitor.on_end()
    assert [(r["tokens"], r["tokens_per_s"]) for r in _lines(tmp_path)] == [
        (100, 50.0),
        (450, 87.5),
    ]
