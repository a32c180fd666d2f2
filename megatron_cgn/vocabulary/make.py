"""Writes an extended tokenizer and its model, and proves both before anyone sees them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_cgn.hf.resize import resize_hf, resized_bytes
from megatron_cgn.hf.resize_checkpoint import resize_checkpoint
from megatron_cgn.hf.vocabulary import ResizeSummary
from megatron_cgn.vocabulary.checks import Plan
from megatron_cgn.vocabulary.console import Console
from megatron_cgn.vocabulary.held_out import HeldOut
from megatron_cgn.vocabulary.proof import Proof
from megatron_cgn.vocabulary.proof_model import prove_model
from megatron_cgn.vocabulary.proof_tokenizer import prove_tokenizer
from megatron_cgn.vocabulary.settings import Settings
from tokenizer.extension import FILE_NAME, Extension

_PROOF_BYTES = 2 << 20
"""UTF-8 bytes of held-out documents of each kind that proofs are made on, about."""
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made, and whether it is what it should be."""

    extension: Extension
    resize: ResizeSummary | None
    """Of the model; None where there is none."""
    proofs: tuple[Proof, ...]


def make(
    settings: Settings,
    plan: Plan,
    extension: Extension,
    *,
    num_tokens: int,
    target: Path,
    domain: HeldOut,
    general: HeldOut | None,
    console: Console,
) -> Made:
    """Write the tokenizer with its first new tokens, and the model if there is one.

    Args:
        settings: What is asked for.
        plan: What there is.
        extension: Of all new tokens.
        num_tokens: How many of them to take.
        target: Directory to make, in a directory of its own.
        domain: Held-out documents, which proofs are made on.
        general: Other documents, if given.
        console: Shows progress.

    Returns:
        What was made. The proofs may have failed.

    Raises:
        UserError: If the disk refuses, or the model cannot be given rows.
    """
    tokenizer = target.with_name("tokenizer")
    tokenizer.mkdir()
    plan.extender.write(extension, tokenizer, num_tokens=num_tokens)
    taken = _read_extension(tokenizer / FILE_NAME)
    if plan.kind != "tokenizer":
        shutil.copyfile(plan.tokenizer / _CONFIG, tokenizer / _CONFIG)  # for transformers
    sample = _sample(domain)
    proofs = prove_tokenizer(
        plan.tokenizer,
        tokenizer,
        taken,
        domain=sample,
        general=_sample(general) if general else (),
    )
    if plan.kind == "tokenizer":
        tokenizer.rename(target)
        return Made(extension=taken, resize=None, proofs=tuple(proofs))
    resize = resize_hf if plan.kind == "hugging_face" else resize_checkpoint
    with console.bar("writing model", total=_model_bytes(settings, plan), unit="B") as advance:
        summary = resize(
            settings.model,
            target,
            taken,
            write_tokenizer=partial(_copy_tokenizer, tokenizer),
            method=settings.init or "mean",
            seed=settings.seed,
            make_vocab_size_divisible_by=settings.make_vocab_size_divisible_by,
            tensor_parallel=settings.tensor_parallel,
            progress=advance,
        )
    proofs += prove_model(settings.model, target, taken, texts=sample)
    return Made(extension=taken, resize=summary, proofs=tuple(proofs))


def _model_bytes(settings: Settings, plan: Plan) -> int:
    if plan.kind == "hugging_face":
        return resized_bytes(settings.model)
    return sum(file.stat().st_size for file in settings.model.rglob("*") if file.is_file())


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.name != _CONFIG:
            shutil.copyfile(file, target / file.name)


def _read_extension(path: Path) -> Extension:
    return Extension.from_json(json.loads(path.read_text(encoding="utf-8")), name=str(path))


def _sample(held_out: HeldOut) -> Sequence[str]:
    """The first documents, which come in an order of chance."""
    size = 0
    for number, text in enumerate(held_out.texts):
        size += len(text.encode())
        if size > _PROOF_BYTES:
            return held_out.texts[: number + 1]
    return held_out.texts
