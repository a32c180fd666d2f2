"""What an index needs to know of its tokenizer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """About a tokenizer."""

    name: str
    """The name of its directory."""
    vocab_size: int
    """Largest id plus one."""
    eod_id: int | None
    """Id that ends every document, if any."""
