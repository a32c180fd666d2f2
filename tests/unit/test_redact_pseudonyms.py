"""Placeholders and keyed pseudonyms."""

import re
from pathlib import Path

import pytest

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.document import Document
from megatron_cgn.corpus.redact import Redactor
from megatron_cgn.errors import ConfigError

KEY = "0123456789abcdef-secret"


def redact(text: str, **settings: object) -> str:
    redactor = Redactor(RedactConfig(**settings))  # type: ignore[arg-type]
    outcome = redactor(Document(id="a", text=text, source="s"))
    assert outcome.text is not None
    return outcome.text


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    return str(file)


def test_placeholders_in_both_languages() -> None:
    text = "联系人：王建国，手机13812345678"
    assert redact(text) == "联系人：[姓名]，手机[手机号]"
    assert redact(text, placeholder_language="en") == "联系人：[NAME]，手机[MOBILE]"


def test_a_value_has_one_pseudonym_however_it_is_written(key_file: str) -> None:
    def pseudonyms(text: str) -> list[str]:
        redacted = redact(text, replacement="pseudonym", key_file=key_file)
        return re.findall(r"\[\w+-([0-9a-f]{10})\]", redacted)

    mobiles = pseudonyms("13812345678 / +86 138-1234-5678 / １３８１２３４５６７８ / 13912345678")
    assert len(mobiles) == 4
    assert len(set(mobiles[:3])) == 1
    assert mobiles[3] != mobiles[0]
    names = pseudonyms("姓名：王 伟\n审核：王伟\n批准：王娜")
    assert len(names) == 3
    assert names[0] == names[1] != names[2]
    # And in another document.
    assert pseudonyms("负责人：王伟") == names[:1]


def test_the_key_decides_and_is_not_shown(
    key_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "手机13812345678"
    first = redact(text, replacement="pseudonym", key_file=key_file)
    monkeypatch.setenv("MEGATRON_CGN_REDACT_KEY", KEY)
    assert redact(text, replacement="pseudonym") == first
    monkeypatch.setenv("OTHER_KEY", "f" * 16)
    other = redact(text, replacement="pseudonym", key_environment="OTHER_KEY")
    assert other != first
    assert KEY not in repr(vars(Redactor(RedactConfig(replacement="pseudonym"))))


def test_pseudonyms_are_no_numbers_and_stay(key_file: str) -> None:
    text = "".join(f"手机13812345{i:03}，身份证11010519491231002X\n" for i in range(300))
    once = redact(text, replacement="pseudonym", key_file=key_file)
    assert len(set(re.findall(r"手机号-[0-9a-f]{10}", once))) == 300
    assert redact(once, replacement="pseudonym", key_file=key_file) == once
    # Nor does a run with placeholders, or in English, take them for anything.
    assert redact(once) == once
    assert redact(once, placeholder_language="en") == once


def test_a_missing_or_short_key_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_CGN_REDACT_KEY", raising=False)
    with pytest.raises(ConfigError, match="MEGATRON_CGN_REDACT_KEY; the variable is not set"):
        Redactor(RedactConfig(replacement="pseudonym"))
    with pytest.raises(ConfigError, match="redact.key_file: .*none; No such file"):
        Redactor(RedactConfig(replacement="pseudonym", key_file=str(tmp_path / "none")))
    (tmp_path / "key").write_text("short")
    with pytest.raises(ConfigError, match="the key has 5 bytes, must have at least 16") as caught:
        Redactor(RedactConfig(replacement="pseudonym", key_file=str(tmp_path / "key")))
    assert "short" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RedactConfig(kinds=("mobil",)), "redact.kinds: 'mobil'; must be among id_card"),
        (RedactConfig(kinds=()), "redact.kinds: is empty"),
        (RedactConfig(key_file="k"), "redact.key_file: k; has no effect"),
        (RedactConfig(max_findings=-1), "redact.max_findings: -1; must be at least 0"),
    ],
)
def test_wrong_settings_are_told(settings: RedactConfig, message: str) -> None:
    faults = list(settings.faults())
    assert len(faults) == 1
    assert faults[0].startswith(message)


def test_right_settings_have_no_faults() -> None:
    assert list(RedactConfig(kinds=("address", "name")).faults()) == []
    assert list(RedactConfig(kinds=(), patterns_file="p.yaml").faults()) == []
