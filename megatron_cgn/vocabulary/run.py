"""From a corpus to an extended tokenizer and model, or to the advice not to: the order of work.

Everything is made in a hidden directory beside the output and proven there; the output appears
whole, at the end, or not at all.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cgn.data.lock import locked
from megatron_cgn.errors import ConfigError, DataError, MegatronCGNError, UserError
from megatron_cgn.hf.files import disk_fault, replace_directory
from megatron_cgn.vocabulary.checks import Plan, check
from megatron_cgn.vocabulary.console import Console
from megatron_cgn.vocabulary.make import Made, make
from megatron_cgn.vocabulary.report import write_report
from megatron_cgn.vocabulary.settings import Settings
from megatron_cgn.vocabulary.texts import Texts, read_texts
from megatron_cgn.vocabulary.worth import assess, table
from tokenizer.extend import first_tokens
from tokenizer.extension import Extension

_SHOWN = 8
"""New tokens that are named."""
_WAYS = {
    "merges": "by merges",
    "piece": "as pieces",
    "added_token": "as added tokens, which match wherever they stand",
    "existing": "single tokens before",
}


class ProofFailed(MegatronCGNError):
    """What was made is not what it must be: a fault of this program, not of its user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run has made."""

    num_tokens: int
    """New ids of the output; 0 if it only reports, or if none are advised."""
    is_written: bool
    """Whether there is an output."""


def extend_vocabulary(settings: Settings, *, console: Console) -> Outcome:
    """Do what the settings say.

    Args:
        settings: What is asked for.
        console: Shows progress and results.

    Returns:
        What was made.

    Raises:
        UserError: If something of the user is wrong. Nothing is left behind then.
        ProofFailed: If a proof failed. Nothing is left behind then either.
    """
    plan = check(settings)
    with _workspace(plan.output) as work:
        try:
            return _work(settings, plan, work, console)
        except OSError as fault:
            raise ConfigError(disk_fault(plan.output, fault)) from fault
        except UserError as fault:  # named after what is made there, which the user never sees
            raise type(fault)(str(fault).replace(str(work / "output"), str(plan.output))) from fault


def _work(settings: Settings, plan: Plan, work: Path, console: Console) -> Outcome:
    texts = read_texts(settings, split=plan.extender.splitter(plan.terms), console=console)
    extension = _extend(settings, plan, texts, console)
    worth = assess(settings, plan, extension, texts, console)
    console.say(_what_was_read(texts))
    console.say(table(worth))
    domain, general = texts.domain, texts.general
    del texts  # the words of a large corpus, which nothing needs any more
    num_tokens = settings.num_tokens
    if num_tokens is None:
        num_tokens = worth.recommendation.num_tokens
    target, made = work / "output", None
    if settings.report_only:
        num_tokens = 0
        target.mkdir()
    elif num_tokens == 0:
        return Outcome(num_tokens=0, is_written=False)
    else:
        made = make(
            settings,
            plan,
            extension,
            num_tokens=num_tokens,
            target=target,
            domain=domain,
            general=general,
            console=console,
        )
        console.say(_what_was_made(made.extension))
        console.say("\n".join(map(str, made.proofs)))
        if not all(proof.ok for proof in made.proofs):
            raise ProofFailed(
                f"{plan.output}: not written, because what was made failed the proofs above. This "
                "is a fault of the tool: please report it with this output."
            )
    write_report(target, worth.report | {"made": None if made is None else _facts(made)})
    replace_directory(target, plan.output)
    return Outcome(num_tokens=num_tokens, is_written=True)


def _what_was_read(texts: Texts) -> str:
    words, held_out = texts.words, texts.domain
    measured = f"{len(held_out.texts):,} held-out documents"
    if held_out.sampled:
        measured += f" (a sample of {held_out.documents:,})"
    size = f"{words.text_bytes / 1e6:,.1f} MB"
    if texts.corpus_bytes > words.text_bytes:
        size += f" (a sample of {texts.corpus_bytes / 1e6:,.1f} MB: --max-corpus-mb)"
    return (
        f"corpus: {words.documents:,} documents, {size}, "
        f"{len(words):,} distinct words; measured on {measured}"
    )


def _what_was_made(extension: Extension) -> str:
    """The commonest new tokens, and what became of the terms."""
    tokens = [token for token in extension.new_tokens if token.origin == "corpus"]
    tokens.sort(key=lambda token: -token.frequency)
    lines = [f"new tokens: {len(extension.new_tokens):,}, such as "]
    lines[0] += " ".join(repr(token.text) for token in tokens[:_SHOWN])
    if extension.terms:
        ways = Counter(_WAYS[term.way] for term in extension.terms)
        met = sum(term.occurrences for term in extension.terms)
        whole = sum(term.whole for term in extension.terms)
        lines.append(
            f"terms: {', '.join(f'{count:,} {way}' for way, count in ways.items())}; single tokens "
            f"in {whole:,} of the {met:,} places where the corpus has them"
        )
    return "\n".join(lines)


def _facts(made: Made) -> dict[str, Any]:
    """What ``report.json`` says under ``made`` of what lies beside it."""
    return {
        "num_tokens": len(made.extension.new_tokens),
        "model": made.resize and asdict(made.resize),
        "proofs": [asdict(proof) for proof in made.proofs],
    }


def _extend(settings: Settings, plan: Plan, texts: Texts, console: Console) -> Extension:
    """Choose as many tokens as are to be measured, or as there are."""
    wanted = settings.num_tokens or 0
    most = max(wanted, *settings.sizes)
    with console.bar("making tokens", total=most, unit=" tokens") as advance:
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        extension = plan.extender.extend(
            texts.words,
            num_tokens=most,
            rules=plan.rules,
            terms=plan.terms,
            progress=progress,
            allow_fewer=True,
        )
    made = len(extension.new_tokens)
    if made < wanted:
        reasons = ", ".join(f"{why} ({count:,})" for why, count in extension.rejected.items())
        raise DataError(
            f"--num-tokens {wanted:,}: the corpus ({texts.words.text_bytes / 1e6:,.1f} MB in "
            f"{texts.words.documents:,} documents) gives {made:,} tokens that are met "
            f"{plan.rules.min_frequency:,} times in {plan.rules.min_spread:,} documents. Ask for "
            "no more than these, give more text, or lower --min-frequency and --min-spread."
            + (f" Others were refused: {reasons}." if reasons else "")
        )
    if wanted:
        first_tokens(extension, wanted)  # refuses fewer than the terms take
    return extension


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """A hidden directory beside the output, for one run at a time; removed at the end.

    What a killed run left there is removed first.
    """
    work = output.with_name(f".{output.name}.unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output.with_name(f".{output.name}.lock")):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except BlockingIOError as error:
        raise ConfigError(
            f"{output}: another run is writing it. Wait for that one, or give another --output."
        ) from error
    except OSError as fault:
        raise ConfigError(disk_fault(output, fault)) from fault
