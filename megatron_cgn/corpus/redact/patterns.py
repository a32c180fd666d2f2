"""The user's own patterns: equipment tags, contract numbers, project names.

They come from a YAML file (``samples/patterns.example.yaml`` explains every key), are
checked when it is read, and are matched by the ``regex`` package under a time limit: an expression
that backtracks catastrophically stops the run with its name, rather than for ever.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cgn.corpus.redact.identity import compact
from megatron_cgn.corpus.redact.replace import PLACEHOLDERS
from megatron_cgn.corpus.redact.view import Span, View
from megatron_cgn.errors import ConfigError, DataError

_KEYS = {
    "name": str,
    "description": str,
    "regex": str,
    "ignore_case": bool,
    "context": list,
    "checksum": str,
    "replacement": str,
    "ignore": list,
    "keep": bool,
}
_CHECKSUMS = ("luhn", "id_card", "credit_code")
_CONTEXT_CHARACTERS = 30
_PROBE_SECONDS = 1.0
_SECONDS = 30.0
_SECONDS_PER_CHARACTER = 2e-5
# Runs of what identifiers are made of, none of them complete.
_PROBES = tuple(
    unit * (2000 // len(unit)) + end
    for unit in ("a", "A", "1", "-", " ", "字", "A1", "A-", "1.", "a ", "1A-")
    for end in ("!", "")
)


@dataclass(frozen=True, slots=True)
class UserPattern:
    """One pattern of the user's file."""

    name: str
    """Kind of its findings."""
    pattern: Any
    """Compiled by the package ``regex``, which has no types."""
    source: str
    """File and line, for messages."""
    replacement: str
    context: tuple[str, ...]
    """Words of which one must be near; none means anywhere."""
    checksum: str | None
    ignore: frozenset[str]
    keep: bool
    """Whether what matches is protected from redaction."""

    def find(self, view: View) -> Iterator[Span]:
        """Find the pattern in a text.

        Args:
            view: The text.

        Yields:
            What is to be replaced or, with ``keep``, left alone.

        Raises:
            DataError: If it takes too long on this text.
        """
        text = view.text
        limit = _SECONDS + _SECONDS_PER_CHARACTER * len(text)
        group = "value" if "value" in self.pattern.groupindex else 0
        try:
            for match in self.pattern.finditer(text, timeout=limit):
                start, end = match.span(group)
                if start < end and self._accepts(text, start, end):
                    yield Span(self.name, start, end, " ".join(text[start:end].split()))
        except TimeoutError as error:
            raise DataError(
                f"{self.source}: pattern {self.name!r} took longer than {limit:.0f} s on a text of "
                f"{len(text)} characters. Bound its repetitions ({{1,20}} for +), and let no "
                "two neighbours match the same characters."
            ) from error

    def _accepts(self, text: str, start: int, end: int) -> bool:
        if text[start:end] in self.ignore:
            return False
        if self.context:
            near = text[max(0, start - _CONTEXT_CHARACTERS) : end + _CONTEXT_CHARACTERS]
            if not any(word in near for word in self.context):
                return False
        return self.checksum is None or _verify(self.checksum, compact(text[start:end]))


def load_patterns(path: str) -> tuple[UserPattern, ...]:
    """Read and check a file of patterns.

    Args:
        path: YAML file.

    Returns:
        The patterns, in the file's order: where two overlap, the first wins.

    Raises:
        ConfigError: Naming all faults with their lines.
    """
    faults: list[str] = []
    patterns: list[UserPattern] = []
    for line, entry in _entries(path):
        where = f"{path}:{line}"
        found = list(_entry_faults(entry))
        if not found and any(pattern.name == entry["name"] for pattern in patterns):
            found = [f"name: {entry['name']}; used twice. Give every pattern a name of its own"]
        if found:
            faults += [f"{where}: {fault}." for fault in found]
        else:
            patterns.append(_pattern(entry, where))
    if faults:
        raise ConfigError("redact.patterns_file is wrong:\n  " + "\n  ".join(faults))
    return tuple(patterns)


def _entries(path: str) -> list[tuple[int, dict[str, Any]]]:
    """Entries of the file's list ``patterns`` and the line each begins at."""
    import yaml

    where = f"redact.patterns_file: {path}"
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}; {error.strerror}. Give a readable file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}; not YAML in UTF-8: {error}") from error
    if not isinstance(content, dict) or list(content) != ["patterns"]:
        raise ConfigError(f"{where}; must have one key, `patterns`, with a list of patterns.")
    entries = content["patterns"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where}; `patterns` must be a list of mappings with name and regex.")
    assert isinstance(root, yaml.MappingNode)
    lines = [node.start_mark.line + 1 for node in root.value[0][1].value]
    return list(zip(lines, entries, strict=True))


def _entry_faults(entry: dict[str, Any]) -> Iterator[str]:
    for key, value in entry.items():
        if key not in _KEYS:
            nearest = difflib.get_close_matches(str(key), _KEYS, 1)
            remedy = f"did you mean `{nearest[0]}`" if nearest else f"known are {', '.join(_KEYS)}"
            yield f"{key}: unknown key; {remedy}"
        elif not isinstance(value, _KEYS[key]):
            yield f"{key}: {value!r}; must be a {_KEYS[key].__name__}"
        elif isinstance(value, list) and not all(isinstance(item, str) and item for item in value):
            yield f"{key}: {value!r}; must be a list of texts; put numbers in quotes"
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]{0,39}", name):
        yield f"name: {name!r}; must be small letters, digits and _, at most 40"
    elif name in PLACEHOLDERS:
        yield f"name: {name}; is a built-in kind; choose another"
    if entry.get("checksum", "luhn") not in _CHECKSUMS:
        yield f"checksum: {entry['checksum']!r}; must be one of {', '.join(_CHECKSUMS)}"
    replacement = entry.get("replacement", "[X]")
    if isinstance(replacement, str) and not re.fullmatch(r"\[[^\[\]\n]{1,40}\]", replacement):
        # Else the next redaction could take a document's own words for a replacement.
        yield f"replacement: {replacement!r}; must be a text in brackets, such as [CONTRACT]"
    if not isinstance(entry.get("regex"), str):
        yield f"regex: {entry.get('regex')!r}; must be a regular expression in quotes"
    else:
        yield from _regex_faults(entry["regex"])


def _regex_faults(source: str) -> Iterator[str]:
    import regex

    if any(0xFF01 <= ord(character) <= 0xFF5E or character == "\u3000" for character in source):
        yield (
            f"regex: {source}; has full-width characters, but patterns are matched after these "
            "became half-width ones (： is :). Write half-width"
        )
    try:
        pattern = _compile(source)
    except regex.error as error:
        yield f"regex: {source}; {error.msg} at character {(error.pos or 0) + 1}"
        return
    try:
        for probe in _PROBES:
            pattern.search(probe, timeout=_PROBE_SECONDS)
        if pattern.search("") is not None:
            yield f"regex: {source}; matches the empty text. Ask for at least one character"
    except TimeoutError:
        yield (
            f"regex: {source}; takes more than {_PROBE_SECONDS:.0f} s on {len(probe)} characters "
            f"({probe[:4]}…): it backtracks. Bound its repetitions ({{1,20}} for +), and let no "
            "two neighbours match the same characters"
        )


def _compile(source: str, *, ignore_case: bool = False) -> Any:
    import regex

    # ASCII, so that \\b lies between 号 and A: both are letters to Unicode.
    return regex.compile(source, regex.ASCII | (regex.IGNORECASE if ignore_case else 0))


def _pattern(entry: dict[str, Any], where: str) -> UserPattern:
    name = entry["name"]
    return UserPattern(
        name=name,
        pattern=_compile(entry["regex"], ignore_case=entry.get("ignore_case", False)),
        source=where,
        replacement=entry.get("replacement", f"[{name.upper()}]"),
        context=tuple(entry.get("context", ())),
        checksum=entry.get("checksum"),
        ignore=frozenset(entry.get("ignore", ())),
        keep=entry.get("keep", False),
    )


def _verify(checksum: str, number: str) -> bool:
    from stdnum import luhn
    from stdnum.cn import ric, uscc

    if checksum == "luhn":
        return luhn.is_valid(number)
    if len(number) != 18:
        return False
    if checksum == "id_card":
        return number[:-1].isdigit() and ric.calc_check_digit(number) == number[-1]
    return uscc.is_valid(number)
