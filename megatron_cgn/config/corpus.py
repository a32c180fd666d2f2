"""Settings of ``tools/prepare_corpus.py``: name, type, default and meaning of each.

Every step has a group of its own, and can be turned off. Rules live in each group's ``faults``.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

# Settings that have an effect only together with others.
_NAVIGATION, _CONFIDENCE = ("max_navigation_fraction",), ("min_language_confidence",)
_NEAR, _CUT = ("similarity_threshold", "protect_numbers"), ("max_cut_fraction",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadConfig:
    """What is taken out of the raw files."""

    field: str = "text"
    """Name of the text's field in JSON Lines and Parquet."""
    max_bad: float = 0.01
    """Lines and files that may be unreadable before the run stops: a share of all where below 1,
    else their number."""
    part_mib: float = 8.0
    """Raw MiB that a worker takes at a time. More memory for each worker, or more files."""
    max_parse_s: int = 300
    """Seconds of processor time to parse a PDF, HTML or DOCX file in; one that takes longer counts
    as unreadable."""

    def faults(self) -> Iterator[str]:
        """Find what is wrong with these settings; see `CorpusConfig.faults`."""
        if not self.field:
            yield "read.field: is empty; give the name of the field that holds the text."
        # Also refuses what is no number.
        if not self.max_bad >= 0:
            yield (
                f"read.max_bad: {self.max_bad}; must be at least 0: a share below 1, or a number "
                "of lines and files."
            )
        if not 0 < self.part_mib <= 1024:
            yield f"read.part_mib: {self.part_mib}; must be above 0 and at most 1024."
        if not 1 <= self.max_parse_s <= 10**6:
            yield f"read.max_parse_s: {self.max_parse_s}; must be from 1 to 1000000."


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanConfig:
    """Unicode, boilerplate, quality and language of each document.

    A limit at the end of its range (0 for a least, 1 for a most) turns its rule off. Where each
    comes from and what it was seen to drop is in docs/corpus-cleaning.md.
    """

    enabled: bool = True
    """Whether to clean."""
    simplify_chinese: bool = False
    """Whether to make traditional Chinese simplified."""
    remove_lines: tuple[str, ...] = ("page_numbers", "contents", "navigation", "copyright")
    """Kinds of lines that go: page numbers with the headers and footers beside them, tables of
    contents with leaders, menus and notices of web sites, copyright lines. Of these four."""
    max_navigation_fraction: float = 0.5
    """Most characters in lines of web navigation: above it a page holds nothing else."""
    min_characters: int = 30
    """Fewest characters that are not blank."""
    min_letter_fraction: float = 0.08
    """Fewest letters and ideographs among the characters."""
    max_symbol_fraction: float = 0.5
    """Most punctuation and symbols among the characters; a row of one symbol counts once."""
    max_garbled_fraction: float = 0.01
    """Most characters of mojibake and U+FFFD among the characters."""
    min_common_han_fraction: float = 0.85
    """Fewest ideographs of everyday use among the ideographs, from 50 ideographs on."""
    min_common_bigram_fraction: float = 0.45
    """Fewest pairs of letters common in English among the pairs of Latin letters that end in a
    small one, from 100 on and where most of the text is in Latin letters."""
    max_mean_word_length: float = 20.0
    """Most letters in the mean word of Latin letters, from 100 letters on."""
    max_ellipsis_line_fraction: float = 0.4
    """Most lines that end in an ellipsis, from 5 lines on."""
    max_duplicate_line_fraction: float = 0.8
    """Most characters in lines that have occurred before in the document, tables left out."""
    max_top_ngram_fraction: float = 0.9
    """Most tokens in the most frequent run of 4 tokens (words, or Chinese characters), tables left
    out."""
    max_duplicate_ngram_fraction: float = 0.9
    """Most runs of 10 tokens that have occurred before in the document, tables left out."""
    max_dump_fraction: float = 0.5
    """Most digits of hexadecimal dumps among the characters, from 1,000 such digits on."""
    identify_language: bool = True
    """Whether to identify the language, which `languages` needs."""
    languages: tuple[str, ...] = ()
    """Languages to keep, as ISO 639-1 codes, and `und` for unknown; none keeps all."""
    min_language_confidence: float = 0.3
    """Least probability at which the model's language is taken, and not `und`."""

    def faults(self) -> Iterator[str]:
        """Find what is wrong with these settings; see `CorpusConfig.faults`."""
        kinds = ("page_numbers", "contents", "navigation", "copyright")
        if unknown := sorted(set(self.remove_lines) - set(kinds)):
            yield f"clean.remove_lines: {', '.join(unknown)}; must be among {', '.join(kinds)}."
        for name in (each.name for each in fields(self)):
            if not name.endswith(("_fraction", "_confidence")):
                continue
            if not 0 <= (value := getattr(self, name)) <= 1:
                yield f"clean.{name}: {value}; must be between 0 and 1."
        for name in ("min_characters", "max_mean_word_length"):
            if (value := getattr(self, name)) < 0:
                yield f"clean.{name}: {value}; must be at least 0."
        if "navigation" not in self.remove_lines:
            yield from _idle(self, "clean", "without navigation in clean.remove_lines", _NAVIGATION)
        if not self.identify_language:
            yield from _idle(self, "clean", "with clean.identify_language=false", _CONFIDENCE)
        if self.languages and not self.identify_language:
            yield (
                f"clean.languages: {', '.join(self.languages)}; has no effect with "
                "clean.identify_language=false. Set that to true, or leave the languages out."
            )
        for code in self.languages:
            if not (code.isascii() and code.isalpha() and code.islower() and len(code) in (2, 3)):
                yield (
                    f"clean.languages: {code!r}; must be an ISO 639 code in small letters, such as "
                    "zh or en, or und for unknown."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeduplicateConfig:
    """Equal and nearly equal documents; ``docs/deduplication.md`` has the figures behind these."""

    enabled: bool = True
    """Whether to deduplicate."""
    near: bool = True
    """Whether to drop nearly equal documents too, or only equal ones."""
    similarity_threshold: float = 0.7
    """Least Jaccard similarity of near-duplicates' n-grams, above 0 and at most 1."""
    ngram_tokens: int = 5
    """Tokens in an n-gram: Chinese characters, and words or numbers of other scripts."""
    protect_numbers: Literal["none", "form", "all"] = "form"
    """Which documents are kept however alike they are: ``form``: those that differ in numbers,
    dates and equipment tags alone, as records of one form do; ``all``: all that differ in any of
    them; ``none`` suits web pages, which may differ in a date or a counter."""
    number_weight: int = 20
    """How many n-grams a number, date or tag counts as, so that records of one form that differ in
    a few words too are less alike; 0: numbers count like words."""
    num_permutations: int = 128
    """Places of a signature, of 4 bytes each: more estimate the similarity better."""
    seed: int = 0
    """Seed of the signatures' hash functions."""
    prior: tuple[str, ...] = ()
    """Directories of signatures that earlier runs kept; what is in them is dropped here."""

    def faults(self) -> Iterator[str]:
        """Find what is wrong with these settings; see `CorpusConfig.faults`."""
        if not 0 < self.similarity_threshold <= 1:
            yield (
                f"deduplicate.similarity_threshold: {self.similarity_threshold}; must be above 0 "
                "and at most 1; set deduplicate.near=false for equal documents only."
            )
        if not self.near:
            yield from _idle(self, "deduplicate", "with deduplicate.near=false", _NEAR)
        if self.prior and not self.enabled:
            yield from _idle(self, "deduplicate", "with deduplicate.enabled=false", ("prior",))
        if self.protect_numbers not in ("none", "form", "all"):
            yield (
                f"deduplicate.protect_numbers: {self.protect_numbers}; must be none, form or all."
            )
        for name, low, high in (
            ("ngram_tokens", 1, 32),
            ("number_weight", 0, 1000),
            ("num_permutations", 16, 1024),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                yield f"deduplicate.{name}: {value}; must be from {low} to {high}."


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactConfig:
    """Personal data and whatever else must not be trained on; ``docs/redaction.md`` measures it."""

    enabled: bool = True
    """Whether to redact."""
    kinds: tuple[str, ...] = (
        "id_card",
        "credit_code",
        "bank_card",
        "passport",
        "licence_plate",
        "mobile",
        "phone",
        "email",
        "ip",
        "mac",
        "name",
    )
    """What to replace, besides the patterns of ``patterns_file``; ``address`` is one more."""
    replacement: Literal["placeholder", "pseudonym"] = "placeholder"
    """``[手机号]``, the same for all, or ``[手机号-3fa9c2d17b]``, the same for the same number."""
    placeholder_language: Literal["zh", "en"] = "zh"
    """Language of the placeholders: ``[手机号]`` or ``[MOBILE]``."""
    key_file: str | None = None
    """File with the key of the pseudonyms, at least 16 bytes; whoever has it can undo them."""
    key_environment: str = "MEGATRON_CGN_REDACT_KEY"
    """Environment variable with that key, read where there is no ``key_file``."""
    patterns_file: str | None = None
    """YAML file of your own patterns; ``samples/patterns.example.yaml`` explains it."""
    ignore: tuple[str, ...] = ()
    """Values that stay, such as a public hotline; separators, width and case do not matter."""
    max_findings: int | None = None
    """Drops a document with more replacements than this, such as a staff directory."""

    def faults(self) -> Iterator[str]:
        """Find what is wrong with these settings; see `CorpusConfig.faults`."""
        known = (*RedactConfig().kinds, "address")
        for kind in self.kinds:
            if kind not in known:
                yield f"redact.kinds: {kind!r}; must be among {', '.join(known)}."
        if self.enabled and not self.kinds and self.patterns_file is None:
            yield (
                "redact.kinds: is empty, and there is no redact.patterns_file; name a kind, or set "
                "redact.enabled=false."
            )
        if self.key_file is not None and self.replacement != "pseudonym":
            yield (
                f"redact.key_file: {self.key_file}; has no effect with "
                f"redact.replacement={self.replacement}; set redact.replacement=pseudonym."
            )
        if self.max_findings is not None and self.max_findings < 0:
            yield f"redact.max_findings: {self.max_findings}; must be at least 0."


@dataclass(frozen=True, slots=True, kw_only=True)
class DecontaminateConfig:
    """Overlap with evaluation files. How it is found is in docs/corpus-cleaning.md."""

    evaluation_files: tuple[str, ...] = ()
    """Files whose content must not be trained on; none turns the step off. JSONL, JSON, CSV, TSV,
    Parquet, and text with a blank line between items."""
    fields: tuple[str, ...] = ()
    """Fields or columns to compare; none means every text there is."""
    mode: Literal["drop", "cut"] = "drop"
    """Whether to drop a document that holds an item, or to cut the paragraphs that do."""
    ngram_tokens: int = 13
    """Tokens (Chinese characters, or words) in a row that must agree to count as overlap."""
    min_item_tokens: int = 10
    """Fewest tokens of a text to look for: one below `ngram_tokens` must be there as a whole, and
    one with fewer than this is not looked for."""
    min_coverage: float = 0.5
    """Least share of a question, passage or set of choices that must be found in a document."""
    max_shared_items: int = 8
    """Most items that may share a run of tokens: one in more of them is a stock phrase, and does
    not count."""
    fold_traditional: bool = True
    """Whether traditional and simplified Chinese compare as equal."""
    max_cut_fraction: float = 0.5
    """Most of a document to cut: above it the document is dropped."""

    def faults(self) -> Iterator[str]:
        """Find what is wrong with these settings; see `CorpusConfig.faults`."""
        if self.mode not in ("drop", "cut"):
            yield f"decontaminate.mode: {self.mode}; must be drop or cut."
        if self.mode == "drop":
            yield from _idle(self, "decontaminate", "with decontaminate.mode=drop", _CUT)
        if not self.evaluation_files:
            without = "without decontaminate.evaluation_files"
            yield from _idle(self, "decontaminate", without, ("fields",))
        if self.ngram_tokens < 2:
            yield f"decontaminate.ngram_tokens: {self.ngram_tokens}; must be at least 2."
        if not 1 <= self.min_item_tokens <= self.ngram_tokens:
            yield (
                f"decontaminate.min_item_tokens: {self.min_item_tokens}; must be at least 1 and at "
                f"most decontaminate.ngram_tokens, which is {self.ngram_tokens}."
            )
        if self.max_shared_items < 1:
            yield f"decontaminate.max_shared_items: {self.max_shared_items}; must be at least 1."
        for name in ("min_coverage", "max_cut_fraction"):
            if not 0 < (value := getattr(self, name)) <= 1:
                yield f"decontaminate.{name}: {value}; must be above 0 and at most 1."


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Held-out documents."""

    validation_fraction: float = 0.01
    """Share of the documents held out, decided by the hash of each document's group."""
    group_by: str = r"^(.*)#[^#]*$"
    """Regular expression on a document's id: documents for which its first group matches the same
    text are held out together; an id that it does not match is a group of its own. The default
    keeps the sections of a file (``a.rst#1``, ``a.rst#2``) together. Lines without an id of their
    own are called ``<file>#<line>``: they are not sections, and each is a group of its own."""

    def faults(self) -> Iterator[str]:
        """Find what is wrong with these settings; see `CorpusConfig.faults`."""
        if not 0 <= self.validation_fraction < 1:
            yield (
                f"split.validation_fraction: {self.validation_fraction}; must be at least 0 and "
                "below 1."
            )
        try:
            groups = re.compile(self.group_by).groups
        except re.error as error:
            yield f"split.group_by: {self.group_by!r} is no regular expression ({error})."
            return
        if self.group_by and groups < 1:
            yield (
                f"split.group_by: {self.group_by!r} has no group; put what names the group into "
                "parentheses, as in '^(.*)#'."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteConfig:
    """What is written."""

    format: Literal["jsonl.zst", "parquet"] = "jsonl.zst"
    """Kind of the shards."""
    shard_mib: int = 256
    """Size at which a shard ends, in MiB before compression."""

    def faults(self) -> Iterator[str]:
        """Find what is wrong with these settings; see `CorpusConfig.faults`."""
        if self.shard_mib < 1:
            yield f"write.shard_mib: {self.shard_mib}; must be at least 1."


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """Everything that decides what ``prepare_corpus.py`` makes of its input."""

    read: ReadConfig = field(default_factory=ReadConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    deduplicate: DeduplicateConfig = field(default_factory=DeduplicateConfig)
    redact: RedactConfig = field(default_factory=RedactConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    write: WriteConfig = field(default_factory=WriteConfig)

    def faults(self) -> Iterator[str]:
        """Find what is wrong with the settings, whatever the input.

        Yields:
            A message a fault: path, value, limit and remedy.
        """
        for step in fields(self):
            yield from getattr(self, step.name).faults()


def _idle(settings: Any, step: str, why: str, names: Iterable[str]) -> Iterator[str]:
    """Refuse what was set and would be ignored."""
    for name in names:
        value, default = getattr(settings, name), getattr(type(settings)(), name)
        if value != default:
            yield f"{step}.{name}: {value}; has no effect {why}. Leave one of them out."
