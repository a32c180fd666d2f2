"""The tables of ``report.html``, and how figures are written in them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cgn.corpus.page import table

_WAYS = {
    "merges": "one token, by merges",
    "piece": "one token, as a piece",
    "added_token": "added token",
    "existing": "was one token",
}
_JOINT = " | "


def size_table(content: Mapping[str, Any]) -> str:
    """A row a size: what it saves, what is used of it and what became of it."""
    sizes = content["sizes"]
    with_cost = bool(sizes[0]["cost"])
    heads = ["#new tokens", "#domain tokens", "#saved", "#general saved", "#characters a token"]
    heads += ["#used", "#learnable", *(["#parameters"] if with_cost else []), "#gain"]
    heads += ["#each 1,000 more", "verdict"]
    rows = []
    for size in sizes:
        domain = size["domain"]["all"]
        row = [
            size["num_tokens"],
            domain["tokens"],
            share(domain["saved"]),
            share(size["general"]["all"]["saved"]) if size["general"] else "?",
            f"{domain['characters_per_token']:.3f}",
            share(size["used_share"]),
            share(size["share_seen"]),
        ]
        if with_cost:
            row.append(f"+{size['cost']['extra_parameters'] / 1e6:,.1f} M")
        marginal = size["marginal_gain"]
        more = "" if marginal is None else f"{marginal:+.2%}"
        rows.append([*row, share(size["gain"]), more, size["verdict"]])
    drawn = table(heads, rows)
    chosen = content["recommendation"]["num_tokens"]
    return re.sub(rf'<tr>(<td class="n">{chosen:,}</td>)', r'<tr class="taken">\1', drawn, count=1)


def language_table(content: Mapping[str, Any], figure: str) -> str:
    """A row for each kind of text and language, a column for each size.

    Args:
        content: Of the report.
        figure: ``saved``, a share, or another figure of a language.

    Returns:
        A table.
    """
    sizes = content["sizes"]
    heads = ["text", "language", "#documents", *(f"#{size['num_tokens']:,}" for size in sizes)]
    rows = []
    for kind in ("domain", "general"):
        for name, first in sizes[0][kind].items():
            if name == "all" and len(sizes[0][kind]) == 2:
                continue  # one language is all
            values = [size[kind][name][figure] for size in sizes]
            cells = [share(v) if figure == "saved" else f"{v:,.3f}" for v in values]
            rows.append([kind, name, first["documents"], *cells])
    return table(heads, rows)


def cost_table(content: Mapping[str, Any]) -> str:
    """A row a size: parameters, FLOPs and memory."""
    heads = ["#new tokens", "#rows", "#parameters", "#FLOPs a token", "#FLOPs a domain byte"]
    heads += ["#planned FLOPs", "#logits", "#training state", "#cache a character"]
    sizes = content["sizes"]
    first = sizes[0]["cost"]
    rows = []
    for size in sizes:
        cost = size["cost"]
        per_byte = cost["flops_per_byte"]["domain"]
        rows.append(
            [
                size["num_tokens"],
                cost["rows"],
                f"{cost['parameters'] / 1e6:,.1f} M",
                f"{cost['training_flops_per_token'] / 1e9:,.2f} G",
                f"{per_byte / 1e9:,.2f} G ({_change(per_byte, first['flops_per_byte']['domain'])})",
                f"{cost['planned_flops']:.3g}" if cost["planned_flops"] else "",
                f"{cost['logits_bytes'] / 2**30:,.2f} GiB",
                f"{cost['training_state_bytes'] / 2**30:,.2f} GiB",
                f"{cost['kv_cache_bytes_per_character'] / 1024:,.1f} KiB",
            ]
        )
    return table(heads, rows)


def token_table(tokens: Sequence[Mapping[str, Any]]) -> str:
    """A row a token: what it is, what it was, and how often it is used."""
    rows = [
        [
            visible(token["text"]),
            _JOINT.join(_piece(*piece) for piece in token["pieces"]),
            token["origin"],
            token["uses"],
            f"{token['per_million']:,.1f}",
            token["saved_tokens"],
        ]
        for token in tokens
    ]
    heads = ("token", "before", "from", "#uses", "#a million tokens", "#tokens saved")
    return table(heads, rows)


def _piece(text: str, tokens: int, _: bool) -> str:
    return visible(text) + (f" ({tokens} tokens)" if tokens > 1 else "")


def term_table(terms: Sequence[Mapping[str, Any]]) -> str:
    """A row a term: what became of it."""
    rows = [
        [
            term["text"],
            _WAYS.get(term["way"], term["way"]),
            term["id"],
            term["occurrences"],
            share(term["whole"] / term["occurrences"]) if term["occurrences"] else "",
        ]
        for term in terms
    ]
    return table(("term", "now", "#id", "#in the corpus", "#comes out whole"), rows)


def proof_table(proofs: Sequence[Mapping[str, Any]]) -> str:
    """A row a proof: whether it holds, and what was checked."""
    rows = [[proof["name"], "ok" if proof["ok"] else "FAILED", proof["text"]] for proof in proofs]
    return table(("proof", "", "what was checked"), rows)


def bits_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a held-out source."""
    heads = ("source", "#before", "#right after", "#after training", "#change")
    return table(
        heads,
        [
            [
                row["source"],
                *(f"{row[name]:.4f}" for name in ("before", "first", "after")),
                _change(row["after"], row["before"]),
            ]
            for row in rows
        ],
    )


def share(value: float | None) -> str:
    """A share as per cent; nothing where it is unknown."""
    return "" if value is None else f"{value:.1%}"


def visible(text: str) -> str:
    """A text whose spaces and line ends can be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _change(after: float, before: float) -> str:
    return f"{after / before - 1:+.1%}" if before else "?"
