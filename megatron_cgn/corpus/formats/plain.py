"""Bytes to text: UTF-8, UTF-16, GB18030 or Big5, told apart without guessing at meaning.

Statistical detectors name a dozen other encodings for a short Chinese file. Here a multi-byte
encoding is accepted only if every byte is valid in it and nearly all of its double-byte characters
are ones in common use, which by chance they are not.
"""

import codecs

from megatron_cgn.corpus.formats.unreadable import Unreadable

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_COMMON_SHARE = 0.9
_SAMPLE_BYTES = 1 << 18


def decode(content: bytes, *, declared: str | None = None) -> str:
    """Decode a text file.

    Args:
        content: All of its bytes.
        declared: Encoding that the file itself states; used where it fits.

    Returns:
        The text, without a byte-order mark, lines ended by line feeds.

    Raises:
        Unreadable: If no encoding fits.
    """
    return _decode(content, declared).replace("\r\n", "\n").replace("\r", "\n")


def _decode(content: bytes, declared: str | None) -> str:
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return _strict(content, encoding).removeprefix("\ufeff")
    text, utf8_fault = _utf8(content)
    # Zero bytes are valid UTF-8, and every second byte of Latin text in UTF-16.
    if text is not None and "\0" not in text:
        return text
    if declared is not None:
        try:
            return content.decode(declared)
        except (UnicodeDecodeError, LookupError):
            pass  # files often state a wrong one
    for encoding in _candidates(content):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            pass
    if text is not None:
        return text
    raise Unreadable(
        "undecodable",
        f"neither UTF-8 ({utf8_fault}) nor UTF-16, GB18030 or Big5. Convert it to UTF-8",
    )


def _utf8(content: bytes) -> tuple[str | None, str]:
    """The text, or None and what is wrong."""
    try:
        return content.decode(), ""
    except UnicodeDecodeError as error:
        return None, f"{error.reason} at byte {error.start}"


def _strict(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(
            "undecodable",
            f"starts as {encoding} but is not ({error.reason} at byte {error.start}). Convert it "
            "to UTF-8",
        ) from error


def _candidates(content: bytes) -> list[str]:
    """Encodings that the statistics of the bytes allow, likeliest first."""
    sample = content[:_SAMPLE_BYTES]
    if len(content) % 2 == 0 and (utf16 := _utf16(sample)):
        return [utf16]
    shares = {"gb18030": _common_share(sample, _GB_COMMON), "big5": _common_share(sample, _BIG5)}
    fitting = [name for name, share in shares.items() if share >= _COMMON_SHARE]
    return sorted(fitting, key=lambda name: -shares[name])


def _utf16(sample: bytes) -> str | None:
    """UTF-16 without a mark: line ends and spaces have a zero byte on one side, always the same."""
    spaces = (0x20, 0x0A, 0x0D, 0x09)
    little = sum(sample[i + 1] == 0 and sample[i] in spaces for i in range(0, len(sample) - 1, 2))
    big = sum(sample[i] == 0 and sample[i + 1] in spaces for i in range(0, len(sample) - 1, 2))
    if little and not big:
        return "utf-16-le"
    return "utf-16-be" if big and not little else None


# Lead bytes of what is in common use: GB 2312's punctuation, letters and first level of characters
# (0xA1-0xA3, 0xB0-0xD7), and Big5's punctuation and frequent characters (0xA1-0xC6).
_GB_COMMON = frozenset([0xA1, 0xA2, 0xA3, *range(0xB0, 0xD8)])
_BIG5 = frozenset(range(0xA1, 0xC7))


def _common_share(sample: bytes, common: frozenset[int]) -> float:
    """Share of double-byte characters that are in common use; 0 if there are none."""
    total = usual = place = 0
    gb = common is _GB_COMMON
    while place < len(sample) - 1:
        if sample[place] < 0x80:
            place += 1
            continue
        total += 1
        trail = sample[place + 1]
        # GB 2312 has trail bytes from 0xA1 only: rarer characters of GBK and Big5 have lower ones.
        usual += sample[place] in common and (trail >= 0xA1 or not gb)
        place += 2
    return usual / total if total else 0.0
