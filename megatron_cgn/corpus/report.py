"""``report.html``: stand-in."""

from pathlib import Path
from typing import Any

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus.tally import Tally


def write_report(
    path: Path, *, manifest: dict[str, Any], tally: Tally, settings: CorpusConfig
) -> None:
    """Write the report."""
    path.write_text("<!doctype html>\n")
