"""``report.html``: the content of ``report.json`` as one page to decide by.

It needs no network and runs no script. Whatever comes from a text is escaped.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from megatron_cgn.corpus.charts import bars
from megatron_cgn.corpus.page import page
from megatron_cgn.vocabulary import charts
from megatron_cgn.vocabulary.page_tables import (
    bits_table,
    cost_table,
    language_table,
    proof_table,
    size_table,
    term_table,
    token_table,
)
from megatron_cgn.vocabulary.recommend import Policy, planned_text

_NUM_OPEN = 20
_STYLE = (
    charts.STYLE
    + """
body { max-width: 68rem; }
.advice { border-left: .25rem solid #4b9a6a; padding: .25rem .75rem; background: #f3f8f4; }
tr.taken td { background: #f3f8f4; font-weight: 600; }
.cut { line-height: 2.1; word-break: break-all; margin: 0 0 .2rem; }
.cut span { background: #f1f4f8; border-radius: 3px; padding: .1rem .15rem; margin-right: 2px;
            white-space: pre-wrap; }
.cut span.new { background: #cfe8d6; } .cut sup { color: #a4508b; font-size: .65em; }
.count { color: #59636e; font-size: .85em; margin-right: .5rem; }
.wide { overflow-x: auto; } td.n { white-space: nowrap; } h3 { margin: 1.25rem 0 0; }
hr { border: 0; border-top: 1px solid #eaeef2; }
"""
)


def page_of(content: Mapping[str, Any]) -> str:
    """Make the page.

    Args:
        content: What is in ``report.json``: see ``report.py``.

    Returns:
        HTML.
    """
    sections = (
        _overview(content),
        _made(content),
        _sizes(content),
        _charts(content),
        _languages(content),
        _costs(content),
        _tokens(content),
        _terms(content),
        _examples(content),
        _bits(content),
        _details(content),
    )
    return page(f"Vocabulary report: {content['tokenizer']['name']}", sections, style=_STYLE)


def _overview(content: Mapping[str, Any]) -> str:
    advice, name = content["recommendation"], content["tokenizer"]["name"]
    texts = content["texts"]
    read = [_read(kind, text) for kind, text in texts.items() if text and kind != "corpus"]
    if corpus := texts["corpus"]:
        read.append(
            f"the tokens were made from {corpus['documents']:,} documents "
            f"({_megabytes(corpus['text_bytes'])})"
        )
    warnings = []
    if not texts["general"]:
        warnings.append(
            "No general text was given: that it does not get longer was not measured, and it is "
            "taken to save nothing."
        )
    if any(size["general"] and size["general"]["all"]["saved"] < 0 for size in content["sizes"]):
        warnings.append("General text gets longer with some sizes: they are not recommended.")
    if content["agreement"]["lossy"]:
        warnings.append(
            f"{content['agreement']['lossy']} held-out documents do not decode to the same text."
        )
    return (
        f"<h1>Vocabulary report</h1><p class='muted'>Tokenizer {escape(name)}, "
        f"{content['tokenizer']['old_vocab_size']:,} ids.</p>"
        '<p class="advice"><strong>Recommendation.</strong> '
        f"{escape(advice['reason'])}</p><p>Measured on {escape('; '.join(read))}.</p>"
        + "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)
    )


def _made(content: Mapping[str, Any]) -> str:
    """What lies beside the page, and what was checked on it."""
    made = content.get("made")
    if not made:
        return ""
    number, first = made["num_tokens"], content["tokenizer"]["old_vocab_size"]
    advised = content["recommendation"]["num_tokens"]
    asked = "" if number == advised else f" {number:,} were asked for, {advised:,} are recommended."
    return (
        f"<h2>What was made</h2><p>{number:,} new tokens, ids {first:,} to {first + number - 1:,}."
        f"{asked} Checked on what was written:</p>" + proof_table(made["proofs"])
    )


def _read(kind: str, text: Mapping[str, Any]) -> str:
    sampled = f", {text['measured_documents']:,} of them sampled" if text["sampled"] else ""
    return (
        f"{text['documents']:,} held-out documents of {kind} text "
        f"({_megabytes(text['text_bytes'])}{sampled})"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _sizes(content: Mapping[str, Any]) -> str:
    policy = content["policy"]
    plan = planned_text(Policy(**policy))
    return (
        f'<h2>Sizes</h2><div class="wide">{size_table(content)}</div>'
        f'<p class="muted">Gain: saved {escape(content["recommendation"]["basis"])} of a mix with '
        f"{policy['domain_share']:.0%} domain text, by bytes. Learnable: new tokens from the "
        f"corpus that training on {plan} would meet {policy['min_uses']:,} times or more. Used: "
        "new ids that held-out domain text has at all.</p>"
    )


def _languages(content: Mapping[str, Any]) -> str:
    longer = sum(
        size[kind]["all"]["longer_documents"]
        for size in content["sizes"]
        for kind in ("domain", "general")
        if size[kind]
    )
    return (
        "<h2>Languages</h2><p>By script: <code>zh</code> for ideographs, <code>en</code> for Latin "
        "letters; documents of which some size makes more tokens than before: "
        f"{longer:,}.</p><h3>Tokens saved, by new tokens</h3>"
        + language_table(content, "saved")
        + "<h3>Characters a token</h3>"
        + language_table(content, "characters_per_token")
        + "<h3>UTF-8 bytes a token</h3>"
        + language_table(content, "bytes_per_token")
    )


def _charts(content: Mapping[str, Any]) -> str:
    sizes = content["sizes"]
    xs = [size["num_tokens"] for size in sizes]
    chosen = content["recommendation"]["num_tokens"]
    saved = {
        kind: [size[kind]["all"]["saved"] * 100 for size in sizes]
        for kind in ("domain", "general")
        if sizes[0][kind]
    }
    parts = [
        "<h2>Tokens saved on held-out text</h2>",
        charts.lines(xs, saved, label=lambda value: f"{value:.1f} %", chosen=chosen),
    ]
    if sizes[0]["cost"]:
        flops = {
            kind: [
                100
                * size["cost"]["flops_per_byte"][kind]
                / sizes[0]["cost"]["flops_per_byte"][kind]
                for size in sizes
            ]
            for kind in ("domain", "general", "mix")
            if sizes[0]["cost"]["flops_per_byte"][kind]
        }
        parts += [
            "<h2>Training FLOPs per byte of text</h2><p>Before the extension: 100 %.</p>",
            charts.lines(xs, flops, label=lambda value: f"{value:.1f} %", chosen=chosen),
        ]
    return "".join(parts)


def _costs(content: Mapping[str, Any]) -> str:
    head = "<h2>What it costs the model</h2>"
    if content["model"] is None:
        return head + (
            "<p>No model was given. What is measured in tokens holds for every model; parameters, "
            "FLOPs and memory depend on its width and cannot be told. Neither can it be told "
            "whether the larger output matrix eats up what shorter texts save: in a small model it "
            "may.</p>"
        )
    model = content["model"]
    return (
        head
        + f'<div class="wide">{cost_table(content)}</div>'
        + '<p class="muted">Training FLOPs: 6 for each parameter that is multiplied, and attention '
        f"over {model['seq_length']:,} tokens of which a causal mask leaves half (Megatron-LM's "
        "convention, without recomputation). Logits: of a micro-batch of "
        f"{model['micro_batch_size']:,} on one of {model['tensor_model_parallel_size']:,} "
        "tensor-parallel ranks, 6 bytes each (BF16 and FP32). Training state: 18 bytes a parameter "
        "(BF16 weight; FP32 gradient, weight and two moments), over all ranks that share the "
        "model. Cache: BF16 keys and values of domain text on a server.</p>"
    )


def _tokens(content: Mapping[str, Any]) -> str:
    size, best = content["shown_size"], content["best_tokens"]
    if not best:
        return ""
    where = "the corpus" if content["uses_in"] == "corpus" else "held-out domain text"
    rest = best[_NUM_OPEN:]
    return (
        f"<h2>New tokens</h2><p>Of {size:,} new tokens, those that save most, by their uses in "
        f"{where}.</p>"
        + token_table(best[:_NUM_OPEN])
        + _folded(f"{len(rest)} more", token_table(rest) if rest else "")
        + _folded(
            "The least used ones: judge whether they are words",
            token_table(content["least_used_tokens"]) if content["least_used_tokens"] else "",
        )
    )


def _terms(content: Mapping[str, Any]) -> str:
    parts = []
    if content["terms"]:
        parts.append("<h2>Terms</h2>" + term_table(content["terms"]))
    if content["rejected"]:
        rows = [(reason, [number]) for reason, number in content["rejected"].items()]
        parts.append(
            "<h2>What was not taken</h2><p>Candidates that were frequent enough, by the reason "
            "against them.</p>" + bars(rows, series=["candidates"], label_width=280)
        )
    return "".join(parts)


def _examples(content: Mapping[str, Any]) -> str:
    if not content["examples"]:
        return ""
    parts = [
        f"<h2>Before and after</h2><p>Sentences from the middle of held-out documents, not chosen "
        f"by what they save, with {content['shown_size']:,} new tokens (green). A small number "
        "says how many tokens a character takes that is cut into parts.</p>"
    ]
    for example in content["examples"]:
        parts += [_cut(example["before"]), _cut(example["after"]), "<hr>"]
    return "".join(parts)


def _cut(pieces: Iterable[Sequence[Any]]) -> str:
    pieces = list(pieces)
    spans = "".join(
        f"<span{" class='new'" if is_new else ''}>{escape(text)}"
        f"{f'<sup>{tokens}</sup>' if tokens > 1 else ''}</span>"
        for text, tokens, is_new in pieces
    )
    count = sum(tokens for _, tokens, _ in pieces)
    return f'<p class="cut"><span class="count">{count} tokens</span>{spans}</p>'


def _bits(content: Mapping[str, Any]) -> str:
    head = "<h2>Bits per byte, before and after</h2>"
    how = (
        "<p>A loss per token says nothing across vocabularies: a longer token is harder to "
        "predict. Bits per byte of the same held-out text can be compared. Right after the "
        "extension they are a little worse, as the new rows are only guessed; what counts is where "
        "training with the same FLOPs ends.</p>"
    )
    if content["bits_per_byte"]:
        return head + how + bits_table(content["bits_per_byte"])
    return (
        head
        + how
        + "<p>None yet: validate the model on the same texts before the extension and after it "
        "(<code>val/&lt;source&gt;/bits_per_byte</code> in <code>metrics.jsonl</code>), then add "
        "both to this report.</p>"
    )


def _details(content: Mapping[str, Any]) -> str:
    names = ("texts", "tokenizer", "model", "policy", "settings", "agreement", "versions")
    text = json.dumps({name: content[name] for name in names}, ensure_ascii=False, indent=2)
    return "<h2>How it was made</h2>" + _folded(
        "texts, settings and versions", f"<pre>{escape(text)}</pre>"
    )


def _folded(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>" if inner else ""
