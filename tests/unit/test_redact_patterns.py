"""The user's own patterns: what they find, and what a wrong file is told."""

from pathlib import Path

import pytest

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.document import Document
from megatron_cgn.corpus.redact import Redactor
from megatron_cgn.corpus.redact.patterns import load_patterns
from megatron_cgn.corpus.redact.view import View
from megatron_cgn.errors import ConfigError, DataError

EXAMPLE = str(Path(__file__).parents[2] / "samples" / "patterns.example.yaml")


def redact(text: str, patterns: str) -> tuple[str | None, dict[str, int]]:
    redactor = Redactor(RedactConfig(patterns_file=patterns))
    outcome = redactor(Document(id="a", text=text, source="s"))
    assert outcome.text is not None
    again = redactor(Document(id="a", text=outcome.text, source="s"))
    assert again.text == outcome.text
    return outcome.text, dict(outcome.changes)


def write(path: Path, text: str) -> str:
    file = path / "patterns.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("合同CGN-HT-2024-00123 生效", "合同[合同编号] 生效"),
        ("合同ＣＧＮ－ＨＴ－２０２４－００１２３ 生效", "合同[合同编号] 生效"),
        ("工号：A12345，编号 A12345", "工号：[工号]，编号 A12345"),
        ("1RCP002PO 与 1RCP001PO", "[设备位号] 与 1RCP001PO"),
        # 1234567897 passes the Luhn check, 1234567890 does not.
        ("门禁卡 1234567897、1234567890", "门禁卡 [BADGE]、1234567890"),
        ("单号 1234567897", "单号 1234567897"),
        ("热线 400-830-1234，电话 400-831-1234", "热线 400-830-1234，电话 [电话号码]"),
    ],
)
def test_the_example_file(text: str, expected: str) -> None:
    assert redact(text, EXAMPLE)[0] == expected


def test_a_pattern_wins_over_a_built_in_kind(tmp_path: Path) -> None:
    path = write(tmp_path, "patterns: [{name: test_line, regex: '138\\d{8}', replacement: '[试]'}]")
    assert redact("手机13812345678、13912345678", path) == (
        "手机[试]、[手机号]",
        {"redact/test_line": 1, "redact/mobile": 1},
    )


def test_a_replacement_that_matches_itself_is_made_once(tmp_path: Path) -> None:
    path = write(tmp_path, "patterns: [{name: a, regex: 'x{1,9}', replacement: '[xx]'}]")
    assert redact("axxxb", path) == ("a[xx]b", {"redact/a": 1})


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("patterns: [", ["not YAML"]),
        ("- name: a", ["must have one key, `patterns`"]),
        ("patterns: {name: a}", ["must be a list"]),
        ("patterns:\n  - name: a\n", ["patterns.yaml:2: regex: None; must be a regular"]),
        (
            "patterns:\n\n  - {name: A-1, regex: '('}\n  - {name: b, regex: 'b', regx: c}\n",
            [
                "patterns.yaml:3: name: 'A-1'; must be small letters",
                "patterns.yaml:3: regex: (; missing ) at character 2",
                "patterns.yaml:4: regx: unknown key; did you mean `regex`",
            ],
        ),
        ("patterns: [{name: a, regex: 'x*'}]", ["matches the empty text"]),
        ("patterns: [{name: a, regex: '(a+)+$'}]", ["it backtracks. Bound its repetitions"]),
        ("patterns: [{name: a, regex: '编号：x'}]", ["has full-width characters"]),
        ("patterns: [{name: mobile, regex: x}]", ["is a built-in kind"]),
        ("patterns: [{name: a, regex: x}, {name: a, regex: y}]", ["used twice"]),
        ("patterns: [{name: a, regex: x, checksum: crc}]", ["checksum: 'crc'; must be one of"]),
        (
            "patterns: [{name: a, regex: x, replacement: ''}]",
            ["replacement: ''; must be a text in brackets"],
        ),
        ("patterns: [{name: a, regex: x, context: [1]}]", ["must be a list of texts"]),
        ("patterns: [{name: a, regex: x, keep: 'no'}]", ["keep: 'no'; must be a bool"]),
    ],
)
def test_faults_are_told_with_their_lines(
    tmp_path: Path, content: str, messages: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_patterns(write(tmp_path, content))
    for message in messages:
        assert message in str(caught.value)


def test_a_missing_file_and_a_wrong_encoding_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_patterns(str(tmp_path / "none.yaml"))
    (tmp_path / "gbk.yaml").write_bytes("patterns: []  # 编号".encode("gbk"))
    with pytest.raises(ConfigError, match="not YAML in UTF-8"):
        load_patterns(str(tmp_path / "gbk.yaml"))


def test_a_pattern_that_backtracks_on_a_document_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Harmless on the probes made at loading, which have no such letters.
    path = write(tmp_path, "patterns: [{name: slow, regex: '([qz]+)+$'}]")
    (pattern,) = load_patterns(path)
    monkeypatch.setattr("megatron_cgn.corpus.redact.patterns._SECONDS", 0.2)
    with pytest.raises(DataError, match=r"patterns.yaml:1: pattern 'slow' took longer than 0 s"):
        list(pattern.find(View("qz" * 5000 + "!")))
