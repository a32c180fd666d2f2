"""Show the whole way on a small machine: pre-train, tune, learn preferences, reopen, report.

    make quickstart          # or, in .venv: python tools/quickstart.py

Takes the bundled bilingual samples and SmolLM2-135M-Instruct, trains on two CPU processes with
two pipeline stages on documents, then with adapters on questions and answers, then, with adapters
again, on pairs of answers of which one is better (DPO), and writes ``runs/quickstart/report.md``.
Every figure in the report is measured in that run.

Settings of train.py change the first part as they are, the second behind ``--sft`` and the third
behind ``--dpo``:

    make quickstart ARGS="train.train_iters=5 --sft train.epochs=1 --dpo loss.beta=0.2"
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quickstart_data import (
    HELD_OUT_PREFERENCES,
    PREFERENCES,
    ROOT,
    SAMPLES,
    Question,
    conversation_sources,
    divide_held_out,
    document_sources,
    index_documents,
    preference_sources,
    questions,
)
from quickstart_models import AdapterCheck, Reopened, check_adapter
from quickstart_preferences import Preferences, read_pairs, score_pairs
from quickstart_report import Answers, Findings, write_report

MARK = ".quickstart"
PROMPTS = (
    "The pressuriser of a pressurised water reactor",
    "压水堆核电厂的一回路",
)


class _TrainingFailed(Exception):
    """Training has told its own message; carries the exit code."""


def main() -> int:
    """Run every step and return the exit status."""
    args = _parser().parse_args()
    # train.py is run from the root of the repository.
    model, output_dir = args.model.resolve(), args.output_dir.resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from megatron_cgn.errors import UserError
    from megatron_cgn.quiet import quiet_dependencies

    quiet_dependencies()
    try:
        _make_room(output_dir, model)
        findings = _run(model, output_dir, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except _TrainingFailed as failure:
        return int(failure.args[0])
    except KeyboardInterrupt:
        return 130
    passed = write_report(output_dir, findings)
    print((output_dir / "report.md").read_text("utf-8"))
    print(f"report: {output_dir / 'report.md'}")
    print(f"chat:   python tools/generate.py --chat --model {output_dir / 'dpo/export'}")
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/smollm2-135m-instruct")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs/quickstart")
    parser.add_argument("overrides", nargs="*", help="passed on to train.py +stage=cpt")
    parser.add_argument(
        "--sft", nargs="+", default=[], metavar="OVERRIDE", help="passed on to train.py +stage=sft"
    )
    parser.add_argument(
        "--dpo", nargs="+", default=[], metavar="OVERRIDE", help="passed on to train.py +stage=dpo"
    )
    return parser


def _run(model: Path, output_dir: Path, args: argparse.Namespace) -> Findings:
    """Take every step; how long each took is among what is found."""
    seconds: dict[str, float] = {}
    data_dir = output_dir / "data"
    with _step("1/7", "indexing the bundled documents", seconds):
        documents = index_documents(model, data_dir)
        samples = divide_held_out(data_dir)
    with _step("2/7", "continual pre-training on 2 processes, 2 pipeline stages", seconds):
        sources = document_sources(data_dir)
        _train("cpt", "quickstart", model, sources, output_dir, args.overrides)
        _check_written(output_dir, "export/config.json")
    pretrained, tuned, aligned = (output_dir / name for name in ("export", "sft", "dpo"))
    with _step("3/7", "instruction tuning with adapters (LoRA) on what came out of it", seconds):
        # FP32 export: then adapter and merged export must agree to FP32's accuracy.
        settings = ["export.dtype=fp32", *args.sft]
        sources = conversation_sources(data_dir)
        _train("sft", "sft_quickstart", pretrained, sources, tuned, settings)
        _check_written(tuned, "export/config.json", "adapter/adapter_config.json")
    with _step("4/7", "preference learning (DPO) with adapters on what came out of that", seconds):
        # FP32 export: then `transformers` must give its answers what training gave them.
        settings = ["export.dtype=fp32", *args.dpo]
        sources = preference_sources(data_dir)
        _train("dpo", "dpo_quickstart", tuned / "export", sources, aligned, settings)
        _check_written(aligned, "export/config.json")
    models = (model, pretrained, tuned / "export", aligned / "export")
    with _step("5/7", "asking every model in transformers", seconds):
        asked = questions()
        answers = [_ask(path, asked) for path in models]
    with _step("6/7", "scoring held-out pairs in transformers, before and after", seconds):
        preferences = _score_preferences(*models[2:])
    with _step("7/7", "opening the adapter in peft", seconds):
        check = _check_adapter(pretrained, tuned, asked)
    return Findings(documents, samples, PROMPTS, asked, answers, check, preferences, seconds)


@contextmanager
def _step(number: str, what: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"[{number}] {what}", flush=True)
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start


def _make_room(output_dir: Path, model: Path) -> None:
    """Remove an earlier quickstart, and nothing else."""
    from megatron_cgn.errors import ConfigError
    from megatron_cgn.hf.config import read_architecture

    read_architecture(model)
    if output_dir.exists():
        if not (output_dir / MARK).is_file():
            raise ConfigError(
                f"{output_dir}: exists and is no earlier quickstart; choose another --output-dir."
            )
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True)
    (output_dir / MARK).write_text("Written by tools/quickstart.py, which may remove it.\n")


def _train(
    stage: str, recipe: str, model: Path, sources: str, output_dir: Path, overrides: Sequence[str]
) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "train.py"), f"+stage={stage}", f"+experiment={recipe}",
        f"model.hf_path='{model}'", f"data.sources=[{sources}]", f"output_dir='{output_dir}'",
        *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise _TrainingFailed(status)


def _check_written(output_dir: Path, *files: str) -> None:
    """Refuse to go on without what the next steps read."""
    from megatron_cgn.errors import ConfigError

    for file in files:
        if not (output_dir / file).is_file():
            raise ConfigError(
                f"{output_dir / file}: training has not written it, and the quickstart reads it; "
                "leave out the settings of export, lora and output_dir."
            )


def _ask(directory: Path, asked: Sequence[Question]) -> Answers:
    opened = Reopened(directory)
    return Answers(
        [opened.continue_text(prompt) for prompt in PROMPTS],
        [opened.answer(question.text) for question in asked],
    )


def _score_preferences(before: Path, after: Path) -> Preferences:
    pairs = read_pairs(HELD_OUT_PREFERENCES)
    known = [pair for file in PREFERENCES.values() for pair in read_pairs(SAMPLES / file)]
    return Preferences(known, pairs, score_pairs(before, pairs), score_pairs(after, pairs))


def _check_adapter(base: Path, tuned: Path, asked: Sequence[Question]) -> AdapterCheck:
    pairs = [(question.text, question.answer) for question in asked]
    return check_adapter(base, tuned / "adapter", tuned / "export", pairs)


if __name__ == "__main__":
    sys.exit(main())
