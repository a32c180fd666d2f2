import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron_cgn.errors import DataError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.vocabulary import charts
from megatron_cgn.vocabulary.carry_over import carried_over, read_bits_per_byte
from megatron_cgn.vocabulary.cost import TrainingShape, model_cost
from megatron_cgn.vocabulary.held_out import HeldOut, language
from megatron_cgn.vocabulary.recommend import Policy, candidates, recommend
from megatron_cgn.vocabulary.report import add_bits_per_byte, report_content, write_report
from megatron_cgn.vocabulary.segments import Segments
from megatron_cgn.vocabulary.sweep import ALL, Agreement, Sweep, SweepPoint, TextFigures
from tokenizer.extension import Extension, NewToken, Term
from tokenizer.joined_pairs import byte_characters
from tokenizer.wrapper import Tokenizer

TINY = Architecture(
    family="llama", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, vocab_size=256, max_position_embeddings=64, norm_eps=1e-5,
    rope_theta=10_000.0, rope_scaling=None, tie_word_embeddings=True, qkv_bias=False,
    qk_norm=False, initializer_range=0.02,
)  # fmt: skip
SENTENCE = "一回路 <script>alert('x')</script> & 反应堆"


class Bytes:
    """A tokenizer of bytes, as far as a report asks for its extender."""

    kind = "byte_level_bpe"

    def __init__(self) -> None:
        backend = Backend(
            models.BPE({letter: place for place, letter in enumerate(byte_characters())}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        self.tokenizer = Tokenizer(backend, name="bytes <b>", eos_token=None)


def spelt(text: str) -> str:
    return "".join(byte_characters()[byte] for byte in text.encode())


def new_token(place: int, text: str) -> NewToken:
    return NewToken(
        id=256 + place, token=spelt(text), text=text, old_ids=tuple(text.encode()),
        frequency=9, spread=3, origin="corpus",
    )  # fmt: skip


EXTENSION = Extension(
    old_vocab_size=256,
    new_tokens=(new_token(0, "反应"), new_token(1, "<i>"), new_token(2, "堆")),
    old_fingerprint="0" * 32,
    new_fingerprint="1" * 32,
    terms=(Term(text="堆", way="merges", id=258, occurrences=4, whole=3),),
    rejected={"is <markup>": 7},
    settings={"num_tokens": 3},
)


def figures(tokens: int) -> dict[str, TextFigures]:
    return {ALL: TextFigures(documents=1, characters=500, text_bytes=1000, tokens=tokens)}


def the_sweep() -> Sweep:
    ids = tuple(SENTENCE.encode())
    joined = (*"一回路 <script>alert('x')</script> & ".encode(), 256, 258)
    points = [
        SweepPoint(
            num_tokens=size,
            vocab_size=256 + size,
            domain=figures(domain),
            general=figures(general),
            uses=np.array(uses, dtype=np.int64),
            corpus_uses=np.array(uses, dtype=np.float64) * 10,
            corpus_tokens=float(domain * 10),
            examples=(ids if size == 0 else joined,),
        )
        for size, domain, general, uses in (
            (0, 400, 300, ()),
            (2, 300, 290, (50, 10)),
            (3, 200, 280, (50, 10, 0)),
        )
    ]
    return Sweep(
        points=tuple(points),
        agreement=Agreement(num_tokens=3, documents=1, differing=0, lossy=0),
        corpus_bytes=10_000,
        examples=(SENTENCE,),
    )


def held_out() -> HeldOut:
    return HeldOut(
        texts=(SENTENCE,),
        languages=(language(SENTENCE),),
        documents=1,
        text_bytes=1000,
        paths=("保留 <集>.jsonl",),
    )


def content_of(
    *,
    architecture: Architecture | None = TINY,
    policy: Policy | None = None,
    asked_for: int | None = None,
) -> dict[str, Any]:
    policy = policy or Policy(min_uses=1, min_share_seen=0.5)
    shape = TrainingShape(seq_length=16, make_vocab_size_divisible_by=1)
    costs = None
    if architecture:
        costs = [
            model_cost(architecture, num_tokens=size, old_vocab_size=256, shape=shape)
            for size in (0, 2, 3)
        ]
    sweep = the_sweep()
    found = candidates(sweep, extension=EXTENSION, costs=costs, policy=policy)
    return report_content(
        Bytes(),  # type: ignore[arg-type]
        extension=EXTENSION,
        sweep=sweep,
        recommendation=recommend(
            found, policy=policy, basis="training FLOPs" if costs else "tokens"
        ),
        policy=policy,
        domain=held_out(),
        general=held_out(),
        architecture=architecture,
        shape=shape,
        asked_for=asked_for,
    )


class Page(HTMLParser):
    """Reads a page as a browser would: elements, and text outside of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    directory = tmp_path_factory.mktemp("report")
    write_report(directory, content_of())
    return Page((directory / "report.html").read_text("utf-8"))


def test_the_page_needs_no_network_and_runs_nothing(page: Page) -> None:
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.addresses == []


def test_what_comes_from_texts_is_shown_as_text(page: Page) -> None:
    assert "i" not in page.tags
    assert "b" not in page.tags
    assert "markup" not in page.tags
    for shown in (
        "<i>",
        "is <markup>",
        "one token, by merges",
        "75.0%",
        "保留 <集>.jsonl",
        "bytes <b>",
    ):
        assert shown in page.text


def test_the_page_says_what_is_recommended_and_why(page: Page) -> None:
    reason = content_of()["recommendation"]["reason"]
    assert reason.startswith("3 new tokens save")
    assert reason in page.text


def test_what_was_made_is_shown_with_its_proofs(tmp_path: Path) -> None:
    content = content_of(asked_for=2)
    assert content["shown_size"] == 2
    proofs = [{"name": "ids", "ok": True, "text": "all <old> tokens keep theirs"}]
    write_report(tmp_path, content | {"made": {"num_tokens": 2, "model": None, "proofs": proofs}})
    shown = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "2 new tokens, ids 256 to 257. 2 were asked for, 3 are recommended." in shown.text
    assert "all <old> tokens keep theirs" in shown.text and "old" not in shown.tags


def test_figures_of_a_size() -> None:
    size = content_of()["sizes"][2]
    domain = size["domain"]["all"]
    assert domain["saved"] == pytest.approx(0.5)
    assert domain["characters_per_token"] == pytest.approx(2.5)
    assert domain["bytes_per_token"] == pytest.approx(5.0)
    assert size["general"]["all"]["saved"] == pytest.approx(1 - 280 / 300)
    assert size["used_share"] == pytest.approx(2 / 3)
    # Uses in the corpus are 500, 100 and 0, of 2,000 tokens.
    assert size["uses_per_million"]["median"] == pytest.approx(50_000.0)
    assert size["rare_in_corpus"] == 1


def test_costs_of_a_size() -> None:
    policy = Policy(min_uses=1, min_share_seen=0.5, planned_bytes=2000)
    cost = content_of(policy=policy)["sizes"][2]["cost"]
    # A layer: 8·16 for queries, keys and values, 8·8 out of them, 3·8·16 in the MLP.
    per_token = 6 * (2 * (128 + 64 + 384) + 8 * 259) + 6 * 2 * 16 * 8
    assert cost["training_flops_per_token"] == per_token
    assert cost["flops_per_byte"]["domain"] == pytest.approx(per_token * 0.2)
    assert cost["flops_per_byte"]["general"] == pytest.approx(per_token * 0.28)
    mix = per_token * (0.8 * 0.2 + 0.2 * 0.28)
    assert cost["flops_per_byte"]["mix"] == pytest.approx(mix)
    assert cost["planned_flops"] == pytest.approx(mix * 2000)
    assert cost["corpus_flops"] == pytest.approx(per_token * 0.2 * 10_000)
    # Two layers of four keys and four values in BF16, at 200 tokens for 500 characters.
    assert cost["kv_cache_bytes_per_character"] == pytest.approx(32 * 200 / 500)
    assert cost["extra_parameters"] == 3 * 8


def test_tokens_are_listed_by_what_they_save() -> None:
    content = content_of()
    best = content["best_tokens"]
    assert content["uses_in"] == "corpus"
    # 反应 was six bytes, <i> three: 500 · 5 and 100 · 2 tokens fewer.
    assert [(token["text"], token["saved_tokens"]) for token in best[:2]] == [
        ("反应", 2500),
        ("<i>", 200),
    ]
    assert best[0]["pieces"] == [["反", 3, False], ["应", 3, False]]
    assert [token["text"] for token in content["least_used_tokens"]] == ["堆", "<i>", "反应"]


def test_examples_show_both_ways_of_cutting() -> None:
    (example,) = content_of()["examples"]
    assert "".join(text for text, _, _ in example["before"]) == SENTENCE
    assert "".join(text for text, _, _ in example["after"]) == SENTENCE
    assert sum(tokens for _, tokens, _ in example["before"]) == len(SENTENCE.encode())
    assert example["after"][-2:] == [["反应", 1, True], ["堆", 1, True]]


def test_without_a_model_the_page_says_what_is_not_known(tmp_path: Path) -> None:
    content = content_of(architecture=None)
    assert content["model"] is None
    assert content["recommendation"]["basis"] == "tokens"
    write_report(tmp_path, content)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "No model was given" in page.text
    assert "Training FLOPs per byte" not in page.text


def test_nothing_recommended_shows_the_largest_size() -> None:
    content = content_of(policy=Policy(min_gain=0.99, min_uses=0))
    assert content["recommendation"]["num_tokens"] == 0
    assert content["shown_size"] == 3


def test_the_json_is_the_content(tmp_path: Path) -> None:
    content = content_of()
    write_report(tmp_path, content)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def metrics(path: Path, records: Sequence[dict[str, Any]], *, rest: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + rest, encoding="utf-8")
    return path


def test_bits_per_byte_of_two_runs_are_added(tmp_path: Path) -> None:
    write_report(tmp_path, content_of())
    name = "val/领域/bits_per_byte"
    before = metrics(tmp_path / "a.jsonl", [{"step": 0, name: 1.5}, {"step": 9, name: 1.25}])
    after = metrics(
        tmp_path / "b.jsonl",
        [{"step": 0, name: 1.3, "loss": 9.0}, {"step": 5, name: None}, {"step": 9, name: 1.0}],
        rest='{"step": 10, "val/领',
    )
    add_bits_per_byte(tmp_path, before=before, after=after)
    (row,) = json.loads((tmp_path / "report.json").read_text("utf-8"))["bits_per_byte"]
    assert row == {"source": "领域", "before": 1.25, "first": 1.3, "after": 1.0}
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "-20.0%" in page.text


def test_figures_may_come_as_one_object(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text('{"domain": 1.5, "val/general/bits_per_byte": 1, "note": "x"}')
    assert read_bits_per_byte(path) == {"domain": [1.5], "general": [1.0]}


def test_runs_without_common_figures_are_refused(tmp_path: Path) -> None:
    one = metrics(tmp_path / "a.jsonl", [{"val/a/bits_per_byte": 1.0}])
    other = metrics(tmp_path / "b.jsonl", [{"val/b/bits_per_byte": 1.0}])
    with pytest.raises(DataError, match="no held-out source in common"):
        carried_over(one, other)
    with pytest.raises(DataError, match="holds no bits per byte"):
        read_bits_per_byte(metrics(tmp_path / "c.jsonl", [{"loss": 1.0}]))
    with pytest.raises(DataError, match="cannot be read"):
        read_bits_per_byte(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        read_bits_per_byte(metrics(tmp_path / "d.jsonl", [], rest="{\n{}\n"))


def test_a_missing_report_is_a_fault_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="report.json"):
        add_bits_per_byte(tmp_path, before=tmp_path, after=tmp_path)


def test_pieces_join_what_is_no_whole_character() -> None:
    segments = Segments(Bytes().tokenizer, EXTENSION)
    assert segments.pieces([*"a堆".encode(), 256]) == [
        ("a", 1, False),
        ("堆", 3, False),
        ("反应", 1, True),
    ]
    assert segments.pieces("堆".encode()[:2]) == [("<E5><A0>", 2, False)]


def test_a_chart_has_a_point_for_every_measurement() -> None:
    drawn = charts.lines([0, 250, 1000], {"领域": [0.0, 5.0, 10.0]}, label="{:.0f}".format)
    assert drawn.count("<circle") == 3
    (points,) = re.findall(r'points="([^"]+)"', drawn)
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    # 250 of 1,000 lies in the middle of a square-root scale, and so does 5 of 10.
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2, abs=0.1)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.1)
    assert places[0][1] > places[2][1]
    assert "领域" in drawn


def test_a_single_size_is_no_chart() -> None:
    assert "<svg" not in charts.lines([0], {"domain": [1.0]}, label=str)
