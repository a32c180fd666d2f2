"""``report.json``: whether more vocabulary is worth it, with every figure that says so.

The page (``report.html``, made by ``report_page.py``) shows this content and nothing else. This is
the layout of version 1; sizes are numbers of new tokens, shares are from 0 to 1, bytes are UTF-8:

- ``version``: 1.
- ``tokenizer``: ``name``, ``kind``, ``old_vocab_size``, ``old_fingerprint``, ``new_tokens``
  (ids of the largest size).
- ``model``: None without one; else the model's shape and that of the training run.
- ``recommendation``: ``num_tokens``, ``gain``, ``basis``, ``reason``.
- ``policy``: the rules' numbers, as ``recommend.Policy``.
- ``texts``: ``domain``, ``general`` (None without) and ``corpus`` (None without): what was read.
- ``sizes``: one object a size: ``num_tokens``; ``domain`` and ``general`` by language (``all``
  first) with ``documents, characters, text_bytes, tokens, saved, characters_per_token,
  bytes_per_token, longer_documents``; ``used_share`` of the new ids on held-out domain text;
  ``rare_in_corpus``, those with fewer than ``policy.min_uses`` uses in the corpus itself, and
  ``share_seen``, those with as many in the training that is planned; ``uses_per_million``
  (``tenth``, ``median``: quantiles over new ids, per million tokens of the corpus or, without it,
  of held-out text); ``gain, marginal_gain, accepted, verdict``; and ``cost``, None without a model.
- ``cost``: the fields of ``cost.ModelCost`` and ``flops_per_byte`` (``domain, general, mix``),
  ``corpus_flops`` (the counted documents once), ``planned_flops``,
  ``kv_cache_bytes_per_character``.
- ``made``: None where nothing was; else ``num_tokens``, ``model`` (None, or the fields of
  ``hf.vocabulary.ResizeSummary``) and ``proofs``, with the fields of ``proof.Proof``.
- ``shown_size``: the size that the lists below are of: the one that was asked for, else the
  recommended one, else the largest.
- ``best_tokens``, ``least_used_tokens``: ``id, text, origin, pieces, uses, per_million,
  saved_tokens``; ``uses_in`` says which text the uses are counted in.
- ``terms``, ``rejected``, ``settings``: as in ``vocab_extension.json``.
- ``examples``: ``text``, ``before`` and ``after``: pieces ``[text, tokens, is_new]``.
- ``agreement``: as ``sweep.Agreement``.
- ``bits_per_byte``: None, or rows ``source, before, first, after``: see ``carry_over.py``.
- ``versions``: of the packages that made it.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_cgn.errors import DataError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.vocabulary.carry_over import carried_over
from megatron_cgn.vocabulary.cost import TrainingShape, model_cost
from megatron_cgn.vocabulary.held_out import HeldOut
from megatron_cgn.vocabulary.recommend import Policy, Recommendation, candidates
from megatron_cgn.vocabulary.report_page import page_of
from megatron_cgn.vocabulary.segments import Segments
from megatron_cgn.vocabulary.size_figures import size_figures
from megatron_cgn.vocabulary.sweep import Sweep, SweepPoint
from megatron_cgn.vocabulary.token_lists import token_lists
from tokenizer.extend import Extender
from tokenizer.extension import Extension
from tokenizer.words import Words

JSON_FILE = "report.json"
HTML_FILE = "report.html"

_PACKAGES = ("megatron-cgn", "tokenizers", "gigatoken", "numpy")


def report_content(
    extender: Extender,
    *,
    extension: Extension,
    sweep: Sweep,
    recommendation: Recommendation,
    policy: Policy,
    domain: HeldOut,
    general: HeldOut | None = None,
    words: Words | None = None,
    architecture: Architecture | None = None,
    shape: TrainingShape | None = None,
    asked_for: int | None = None,
) -> dict[str, Any]:
    """Gather everything that ``report.json`` holds.

    Args:
        extender: The tokenizer that was extended.
        extension: Of the largest size.
        sweep: The measurements.
        recommendation: What `recommend` made of them.
        policy: The rules it went by.
        domain: Held-out domain text.
        general: Held-out general text.
        words: Words of the corpus.
        architecture: The model, if there is one.
        shape: How it will be trained; None for the defaults.
        asked_for: Number of new tokens that the user insists on, if any; it was measured.

    Returns:
        Plain values.
    """
    shape = shape or TrainingShape()
    old_size = extension.old_vocab_size
    costs = None
    if architecture is not None:
        costs = [
            model_cost(
                architecture, num_tokens=point.num_tokens, old_vocab_size=old_size, shape=shape
            )
            for point in sweep.points
        ]
    judged = candidates(sweep, extension=extension, costs=costs, policy=policy)
    shown = _shown(sweep, asked_for or recommendation.num_tokens)
    segments = Segments(extender.tokenizer, extension)
    return {
        "version": 1,
        "tokenizer": {
            "name": extender.tokenizer.name,
            "kind": extender.kind,
            "old_vocab_size": extension.old_vocab_size,
            "old_fingerprint": extension.old_fingerprint,
            "new_tokens": len(extension.new_tokens),
        },
        "model": None if architecture is None else asdict(architecture) | asdict(shape),
        "recommendation": {
            name: getattr(recommendation, name)
            for name in ("num_tokens", "gain", "basis", "reason")
        },
        "policy": asdict(policy),
        "texts": {
            "domain": _text(domain),
            "general": general and _text(general),
            "corpus": words
            and {
                "documents": words.documents,
                "text_bytes": words.text_bytes,
                "distinct_words": len(words),
            },
        },
        "sizes": size_figures(
            sweep,
            candidates=judged,
            judgements=recommendation.judgements,
            costs=costs,
            policy=policy,
        ),
        "shown_size": shown.num_tokens,
        **token_lists(shown, extension=extension, segments=segments),
        "terms": [asdict(term) for term in extension.terms],
        "rejected": dict(extension.rejected),
        "examples": _examples(sweep, shown, segments),
        "agreement": asdict(sweep.agreement),
        "bits_per_byte": None,
        "made": None,
        "settings": dict(extension.settings),
        "versions": _versions(),
    }


def write_report(directory: Path, content: Mapping[str, Any]) -> None:
    """Write ``report.json`` and ``report.html``, replacing what is there.

    Args:
        directory: Exists.
        content: From `report_content`.
    """
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    _write(directory / JSON_FILE, text + "\n")
    _write(directory / HTML_FILE, page_of(content))


def add_bits_per_byte(directory: Path, *, before: Path, after: Path) -> None:
    """Add held-out bits per byte of two runs to a report that was written.

    Args:
        directory: Holds ``report.json``.
        before: Figures with the old vocabulary: see `carry_over.read_bits_per_byte`.
        after: Figures with the new one.

    Raises:
        DataError: If a file is missing or damaged, or the runs have no source in common.
    """
    path = directory / JSON_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Make the report again.") from error
    if not isinstance(content, dict) or content.get("version") != 1:
        raise DataError(f"{path}: not a report of this version. Make the report again.")
    write_report(directory, content | {"bits_per_byte": carried_over(before, after)})


def _shown(sweep: Sweep, size: int) -> SweepPoint:
    """The point of a size; where that is 0, the largest, for there is something to see."""
    for point in sweep.points:
        if point.num_tokens == size > 0:
            return point
    return sweep.points[-1]


def _text(held_out: HeldOut) -> dict[str, Any]:
    return {
        "paths": list(held_out.paths),
        "documents": held_out.documents,
        "text_bytes": held_out.text_bytes,
        "measured_documents": len(held_out.texts),
        "sampled": held_out.sampled,
    }


def _examples(sweep: Sweep, shown: SweepPoint, segments: Segments) -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "before": [list(piece) for piece in segments.pieces(before)],
            "after": [list(piece) for piece in segments.pieces(after)],
        }
        for text, before, after in zip(
            sweep.examples, sweep.points[0].examples, shown.examples, strict=True
        )
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
