"""What a person sees: a line a step, a progress bar, TensorBoard, loss.png, and two records.

``metrics.jsonl`` has the figures of every step, ``samples.jsonl`` what the model answered.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_cgn.engine.callbacks import SampleAnswer
from megatron_cgn.engine.engine import StepReport
from megatron_cgn.engine.plot import MARGINS, ordered, plot_losses

SAMPLES_FILE = "samples.jsonl"
_MIB = 1024 * 1024
_COMPARED = {
    "bits_per_byte": "bits per byte",
    "token_accuracy": "token accuracy",
    "rewards/accuracies": "accuracy",
    "accuracy": "accuracy",
}
"""Held-out scores that tell more than a loss, by what the closing table calls them."""
_SHARES = ("token_accuracy", "rewards/accuracies", "accuracy")
_ON_THE_LINE = {"rewards/accuracies": "accuracy", "accuracy": "accuracy"}
_ON_THE_LINE |= dict.fromkeys(MARGINS, "margin")
"""What the line of a step says beside the loss, where answers are compared."""
_SHOWN_CHARACTERS = 300
"""Of an answer, in the closing lines; `SAMPLES_FILE` has all of it."""


class Monitor:
    """Writes a run's metrics. Only made on rank 0; other ranks have nothing to say."""

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        first_step: int,
        tokens_after: Callable[[int], int],
    ) -> None:
        """Open the files, cutting off what a later, lost part of the run had written.

        Args:
            output_dir: The run's directory.
            total_steps: Steps of the whole run.
            first_step: Steps done already; records after it are from a part that was lost.
            tokens_after: Tokens that all ranks have read after so many steps, padding left out.
        """
        from torch.utils.tensorboard import SummaryWriter

        output_dir.mkdir(parents=True, exist_ok=True)
        self._path = output_dir / "metrics.jsonl"
        self._samples_path = output_dir / SAMPLES_FILE
        for path in (self._path, self._samples_path):
            _keep_records(path, upto=first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(output_dir / "tensorboard"), purge_step=first_step + 1
        )
        self._plot_path = output_dir / "loss.png"
        self._tokens_after = tokens_after
        self._total_steps = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._last_time = self._idle_since = time.perf_counter()
        self._last_step = first_step
        self._seconds = 0.0
        self._counted_steps = 0

    def on_step(self, report: StepReport) -> None:
        """Record a step, if its turn has come."""
        self._bar.update(1)
        done = report.step - self._last_step
        now = self._idle_since = time.perf_counter()
        if not report.metrics:
            return
        seconds = now - self._last_time
        tokens = self._tokens_after(report.step)
        tokens_per_s = (tokens - self._tokens_after(self._last_step)) / seconds
        self._seconds += seconds
        self._counted_steps += done
        self._last_time, self._last_step = now, report.step
        metrics = dict(report.metrics)
        record = {
            "step": report.step,
            "loss": metrics.pop("loss"),
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens": tokens,
            "tokens_per_s": tokens_per_s,
            "step_time_s": seconds / done,
            **metrics,
        }
        if report.skipped:
            record["skipped"] = 1
        self._write(record)
        self._say(self._line(record))

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Record held-out scores."""
        self._write({"step": step, **metrics})
        # All of them are in the record; here are those that the closing table compares.
        shown = "  ".join(
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if name.endswith(tuple(f"/{shown}" for shown in ("loss", *_COMPARED, *MARGINS)))
        )
        self._say(f"step {step:>6}  {shown}")
        self._leave_out_time()

    def on_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """Record answers."""
        with self._samples_path.open("a", encoding="utf-8") as file:
            file.writelines(_line_of({"step": step, **asdict(sample)}) for sample in samples)
        for number, sample in enumerate(samples, 1):
            self._tensorboard.add_text(f"samples/{number}", _in_markdown(sample), step)
        self._leave_out_time()

    def on_message(self, message: str) -> None:
        """Show a line."""
        self._say(message)
        self._leave_out_time()

    def on_end(self) -> None:
        """Close the files and draw the plot."""
        self._bar.close()
        self._file.close()
        self._tensorboard.close()
        records = read_records(self._path)
        if any("loss" in record for record in records):
            plot_losses(records, self._plot_path)

    def _leave_out_time(self) -> None:
        """Validating and saving, since the last step ended, are no part of a step's time."""
        now = time.perf_counter()
        self._last_time += now - self._idle_since
        self._idle_since = now

    def _line(self, record: dict[str, Any]) -> str:
        left = (self._total_steps - record["step"]) * self._seconds / self._counted_steps
        norm = "skipped" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
        compared = "".join(
            f"{label} {record[name]:.3f}  "
            for name, label in _ON_THE_LINE.items()
            if name in record
        )
        return (
            f"step {record['step']:>6}/{self._total_steps}  loss {record['loss']:.4f}  {compared}"
            f"lr {record['lr']:.2e}  grad norm {norm}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"memory {peak_memory_mib():,.0f} MiB  ETA {_clock(left)}"
        )

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(_line_of(_finite(record)))
        self._file.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                tag = name if "/" in name else f"train/{name}"
                self._tensorboard.add_scalar(tag, value, record["step"])

    def _say(self, text: str) -> None:
        if self._bar.disable:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        else:
            self._bar.write(text, file=sys.stderr)


def peak_memory_mib() -> float:
    """Largest memory this process has held: on its GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``.

    Args:
        path: The file.

    Returns:
        Its records in order; a last line cut short by a kill is left out.
    """
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def before_after_table(records: Sequence[dict[str, Any]]) -> str:
    """Tell how held-out scores changed over the run.

    Args:
        records: From `read_records`.

    Returns:
        A Markdown table with a row a source: its loss; bits per byte, or an accuracy; and the
        margin of rewards where answers are compared. Empty if nothing was validated.
    """
    scored = [r for r in records if any(n.startswith("val/") for n in r)]
    if not scored:
        return ""
    last = scored[-1]
    found = {n.partition("/")[2].partition("/")[2] for n in last if n.startswith("val/")}
    metric = next((name for name in _COMPARED if name in found), None)
    margin = next((name for name in MARGINS if name in found), None)
    columns = ["source", "loss before", "after"]
    columns += [] if metric is None else [f"{_COMPARED[metric]} before", "after", "change"]
    columns += [] if margin is None else ["margin before", "after"]
    rows = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    for source in (n[4:-5] for n in last if n.startswith("val/") and n.endswith("/loss")):
        cells = [source, *_before_after(scored, f"val/{source}/loss")]
        if metric is not None:
            before, after = _first_and_last(scored, f"val/{source}/{metric}")
            shown = [*_before_after(scored, f"val/{source}/{metric}")]
            shown += [_change(before, after, is_share=metric in _SHARES)]
            if margin is not None:
                at_first, _ = _first_and_last(scored, f"val/{source}/{margin}")
                shown = shown if ordered(at_first) else ["–", shown[1], "–"]
            cells += shown
        if margin is not None:
            cells += _before_after(scored, f"val/{source}/{margin}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _change(before: float, after: float, *, is_share: bool) -> str:
    if is_share:
        return f"{100 * (after - before):+.1f} points"
    return f"{100 * (after / before - 1):+.1f} %"


def _before_after(scored: Sequence[dict[str, Any]], name: str) -> list[str]:
    return [f"{value:.4f}" for value in _first_and_last(scored, name)]


def _first_and_last(scored: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """First and last value of a score; one that was no number is null in the file."""
    values = [record[name] for record in scored if name in record] or [None]
    first, last = (math.nan if v is None else float(v) for v in (values[0], values[-1]))
    return first, last


def before_after_samples(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tell how answers to the fixed prompts changed over the run.

    Args:
        records: Of `SAMPLES_FILE`, from `read_records`.

    Yields:
        Three lines a prompt, as one text.
    """
    if not records:
        return
    first, last = records[0]["step"], records[-1]["step"]
    before = {r["prompt"]: r["answer"] for r in records if r["step"] == first}
    for record in (r for r in records if r["step"] == last and first != last):
        lines = [f"asked   {_shortened(record['prompt'])}"]
        if record["prompt"] in before:
            lines.append(f"before  {_shortened(before[record['prompt']])}")
        yield "\n".join([*lines, f"after   {_shortened(record['answer'])}"])


def _shortened(text: str) -> str:
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " …"


def _in_markdown(sample: SampleAnswer) -> str:
    """A sample as TensorBoard shows it: indented, so that no text is taken for markup."""
    ended = "ended its turn" if sample.ended else "cut off"
    parts = [("Prompt", sample.prompt), (f"Answer ({ended})", sample.answer)]
    if sample.reference is not None:
        parts.append(("Reference", sample.reference))
    return "\n\n".join(
        f"**{title}**\n\n" + "\n".join(f"    {line}" for line in (text or " ").splitlines())
        for title, text in parts
    )


def _keep_records(path: Path, *, upto: int) -> None:
    if not path.exists():
        return
    kept = [r for r in read_records(path) if r["step"] <= upto] if upto else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(map(_line_of, kept)), "utf-8")
    partial.replace(path)


def _line_of(record: dict[str, Any]) -> str:
    """A line of the file: names of sources are readable in any script."""
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"
