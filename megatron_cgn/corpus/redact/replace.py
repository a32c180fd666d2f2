"""What stands in the place of a finding: a typed placeholder, or a lasting pseudonym."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.errors import ConfigError

PLACEHOLDERS: Mapping[str, tuple[str, str]] = {
    "id_card": ("[身份证号]", "[ID_NUMBER]"),
    "credit_code": ("[统一社会信用代码]", "[CREDIT_CODE]"),
    "bank_card": ("[银行卡号]", "[BANK_CARD]"),
    "passport": ("[护照号]", "[PASSPORT]"),
    "licence_plate": ("[车牌号]", "[LICENCE_PLATE]"),
    "mobile": ("[手机号]", "[MOBILE]"),
    "phone": ("[电话号码]", "[PHONE]"),
    "email": ("[邮箱]", "[EMAIL]"),
    "ip": ("[IP地址]", "[IP_ADDRESS]"),
    "mac": ("[MAC地址]", "[MAC_ADDRESS]"),
    "name": ("[姓名]", "[NAME]"),
    "address": ("[地址]", "[ADDRESS]"),
}
"""Placeholder of each kind, Chinese and English."""

_DIGEST_BYTES = 5
_MIN_KEY_BYTES = 16


class Replacer:
    """Writes what stands in the place of a finding.

    A pseudonym is the placeholder with ten hexadecimal digits: BLAKE2b of kind and value under the
    user's key. The same value has the same pseudonym in every document and every run with that key;
    without the key nobody can find the value by trying all telephone numbers. In brackets and with
    ten digits it is no valid number of any kind. Forty bits confuse two of 100,000 persons with a
    probability of about 0.5 %.

    Args:
        settings: The settings; names where the key is.
        custom: Placeholders of the user's own kinds.

    Raises:
        ConfigError: If pseudonyms are asked for and the key is missing or too short.
    """

    def __init__(self, settings: RedactConfig, *, custom: Mapping[str, str]) -> None:
        column = 0 if settings.placeholder_language == "zh" else 1
        self._placeholders = {kind: pair[column] for kind, pair in PLACEHOLDERS.items()} | dict(
            custom
        )
        self._key = _read_key(settings) if settings.replacement == "pseudonym" else None
        # Those of the other language too: a corpus may have been redacted before.
        known = {text for pair in PLACEHOLDERS.values() for text in pair} | set(custom.values())
        self.pattern = re.compile(
            "|".join(_with_digest(text) for text in sorted(known, key=len, reverse=True))
        )
        """Matches everything that a redaction may have written."""

    def __call__(self, kind: str, value: str) -> str:
        """Replacement of a value.

        Args:
            kind: What it is.
            value: Its value without separators.

        Returns:
            The text to put in its place.
        """
        placeholder = self._placeholders[kind]
        if self._key is None:
            return placeholder
        message = f"{kind}\0{value}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(message, key=self._key, digest_size=_DIGEST_BYTES).hexdigest()
        return f"{placeholder[:-1]}-{digest}]"


def _with_digest(placeholder: str) -> str:
    return rf"{re.escape(placeholder[:-1])}(?:-[0-9a-f]{{{2 * _DIGEST_BYTES}}})?\]"


def _read_key(settings: RedactConfig) -> bytes:
    if settings.key_file is not None:
        where = f"redact.key_file: {settings.key_file}"
        try:
            key = Path(settings.key_file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"{where}; {error.strerror}. Give a readable file.") from error
    else:
        where = f"redact.key_environment: {settings.key_environment}"
        key = os.environ.get(settings.key_environment, "").encode().strip()
        if not key:
            raise ConfigError(
                f"{where}; the variable is not set, and redact.replacement=pseudonym needs a key. "
                "Set it, or give redact.key_file; `openssl rand -hex 32` makes a key."
            )
    if len(key) < _MIN_KEY_BYTES:
        raise ConfigError(
            f"{where}; the key has {len(key)} bytes, must have at least {_MIN_KEY_BYTES}; "
            "`openssl rand -hex 32` makes one."
        )
    # BLAKE2b takes keys up to 64 bytes.
    return hashlib.blake2b(key, digest_size=64).digest()
