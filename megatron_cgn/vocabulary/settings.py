"""What is asked of an extension of a vocabulary; ``checks.py`` says whether it can be done."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_cgn.model.resize import InitMethod
from megatron_cgn.vocabulary.sweep import SIZES
from tokenizer.filters import Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is asked for."""

    model: Path
    """Hugging Face directory, tokenizer directory or checkpoint."""
    corpus: tuple[Path, ...]
    """Documents that new tokens are made from."""
    output: Path
    """Directory to write."""
    num_tokens: int | None = None
    """New ids; None for as many as are recommended."""
    report_only: bool = False
    """Write the report alone."""
    held_out: tuple[Path, ...] = ()
    """Documents that figures are measured on; none to hold out one in ten of the corpus."""
    general: tuple[Path, ...] = ()
    """Documents of another kind, which must not become longer."""
    terms: Path | None = None
    """File of texts that shall become single tokens."""
    deny: Path | None = None
    """File of texts and patterns that shall not."""
    rules: Rules = field(default_factory=Rules)
    """What a token of the corpus must be, without the deny list."""
    init: InitMethod | None = None
    """How new rows are made; None for the default."""
    seed: int = 1234
    """Of everything that is drawn."""
    sizes: tuple[int, ...] = SIZES
    """Numbers of new tokens to measure."""
    text_field: str = "text"
    """Name of the text's field."""
    workers: int = 1
    """Processes that count."""
    max_corpus_mb: int = 300
    """MB of text from which on documents are sampled: counting takes about nine bytes of memory for
    each byte of Chinese text."""
    make_vocab_size_divisible_by: int = 128
    """Rows of a rank are a multiple of this."""
    tensor_parallel: int = 1
    """Ranks that shall share the rows."""
    planned_training_mb: int | None = None
    """MB of text that the model shall be trained on, for what the extension is worth; None for the
    corpus once and the general text that goes with it."""
    domain_share: float = 0.8
    """Of the bytes of that text."""
    seq_length: int = 4096
    """Tokens of a sequence in that training."""
    overwrite: bool = False
    """Whether an output of this tool may be replaced."""
