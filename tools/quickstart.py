"""Show the whole way on a small machine: index, train, export, reopen, and report.

    make quickstart          # or, in .venv: python tools/quickstart.py

Takes the bundled bilingual samples and SmolLM2-135M-Instruct, trains on two CPU processes with
two pipeline stages, and writes ``runs/quickstart/report.md``. Every figure in the report is
measured in that run.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
SOURCES = {
    "domain_zh": ("domain_zh.jsonl", 0.4),
    "domain_en": ("domain_en.jsonl", 0.4),
    "general": ("general.jsonl", 0.2),
}
HELD_OUT = 0.1
MARK = ".quickstart"
GENERAL_BOUND = 0.05
"""Held-out general bits per byte may rise by this share at most."""
PROMPTS = (
    "The pressuriser of a pressurised water reactor",
    "压水堆核电厂的一回路",
)


def main() -> int:
    """Run every step and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/smollm2-135m-instruct")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs/quickstart")
    parser.add_argument("overrides", nargs="*", help="passed on to train.py")
    args = parser.parse_args()
    # train.py is run from the root of the repository.
    model, output_dir = args.model.resolve(), args.output_dir.resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from megatron_cgn.errors import UserError
    from megatron_cgn.quiet import quiet_dependencies

    quiet_dependencies()
    start = time.perf_counter()
    try:
        _make_room(output_dir, model)
        _say("1/4", "indexing the bundled samples")
        counts = _index(model, output_dir / "data")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    _say("2/4", "training on 2 processes, 2 pipeline stages (the longest part)")
    status = _train(model, output_dir, args.overrides)
    if status:
        return status
    _say("3/4", "reopening the export in transformers")
    answers = {
        "before": _generate(model),
        "after": _generate(output_dir / "export"),
    }
    _say("4/4", "writing the report")
    seconds = time.perf_counter() - start
    text, passed = _report(output_dir, counts, answers, seconds)
    (output_dir / "report.md").write_text(text, "utf-8")
    print(text)
    print(f"report: {output_dir / 'report.md'}")
    return 0 if passed else 1


def _say(step: str, what: str) -> None:
    print(f"[{step}] {what}", flush=True)


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


def _is_held_out(document_id: str) -> bool:
    """Divide by a hash of the id: a document's side never changes when others are added."""
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _index(model: Path, data_dir: Path) -> dict[str, dict[str, Any]]:
    """Divide every sample into documents to train on and held-out ones, and index both."""
    from megatron_cgn.data.preprocess import preprocess

    data_dir.mkdir(parents=True)
    counts: dict[str, dict[str, Any]] = {}
    for name, (file, _) in SOURCES.items():
        lines = (SAMPLES / file).read_text("utf-8").splitlines()
        for part in ("train", "held_out"):
            wanted = part == "held_out"
            chosen = [line for line in lines if _is_held_out(json.loads(line)["id"]) == wanted]
            path = data_dir / f"{name}_{part}.jsonl"
            path.write_text("".join(line + "\n" for line in chosen), "utf-8")
            summary = preprocess([path], tokenizer_dir=model, output_prefix=path.with_suffix(""))
            counts[f"{name}_{part}"] = {
                "documents": summary.sidecar.documents,
                "tokens": summary.sidecar.tokens,
                "bytes": summary.sidecar.text_bytes,
            }
    return counts


def _train(model: Path, output_dir: Path, overrides: list[str]) -> int:
    sources = ",".join(
        f"{{name:{name},path:'{output_dir}/data/{name}_train',weight:{weight},"
        f"validation_path:'{output_dir}/data/{name}_held_out'}}"
        for name, (_, weight) in SOURCES.items()
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "train.py"), "+stage=cpt", "+experiment=quickstart",
        f"model.hf_path='{model}'", f"data.sources=[{sources}]", f"output_dir='{output_dir}'",
        *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _generate(directory: Path) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    silence: Any = logging.disable_progress_bar
    silence()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        answers.append(str(tokenizer.decode(output[0], skip_special_tokens=True)))
    return answers


def _report(
    output_dir: Path,
    counts: dict[str, dict[str, Any]],
    answers: dict[str, list[str]],
    seconds: float,
) -> tuple[str, bool]:
    """Write what was measured; also say whether the domain improved and general ability held."""
    from megatron_cgn.engine.metrics import before_after_table, read_records

    records = read_records(output_dir / "metrics.jsonl")
    scored = [r for r in records if "val/general/bits_per_byte" in r]
    change = {
        name: scored[-1][f"val/{name}/bits_per_byte"] / scored[0][f"val/{name}/bits_per_byte"] - 1
        for name in SOURCES
    }
    better = all(change[name] < 0 for name in SOURCES if name.startswith("domain"))
    held = change["general"] <= GENERAL_BOUND
    steps = [r for r in records if "tokens_per_s" in r]
    speed = sorted(r["tokens_per_s"] for r in steps)[len(steps) // 2]
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "megatron-core", "transformers")
    )
    lines = [
        "# Quickstart report",
        "",
        f"SmolLM2-135M-Instruct, {steps[-1]['step']} steps of "
        f"{steps[-1]['tokens'] // steps[-1]['step']:,} tokens on 2 processes (pipeline parallel), "
        f"{speed:,.0f} tokens/s (median), {seconds / 60:.1f} minutes in all on "
        f"{os.cpu_count()} CPU cores ({platform.machine()}); {versions}.",
        "",
        "## Held-out documents, before and after",
        "",
        before_after_table(records),
        "",
        f"- Domain bits per byte fall: **{'yes' if better else 'NO'}**",
        f"- General bits per byte rise by at most {GENERAL_BOUND:.0%}: "
        f"**{'yes' if held else 'NO'}** ({change['general']:+.1%})",
        "",
        "![training loss and held-out bits per byte](loss.png)",
        "",
        "## Data",
        "",
        "| index | documents | tokens | bytes of text |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {c['documents']} | {c['tokens']:,} | {c['bytes']:,} |"
            for name, c in counts.items()
        ),
        "",
        "## The export, reopened in `transformers` (greedy)",
        "",
    ]
    for index in range(len(PROMPTS)):
        lines += [
            f"- before: {_one_line(answers['before'][index])}",
            f"- after: {_one_line(answers['after'][index])}",
        ]
    return "\n".join(lines) + "\n", better and held


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
