"""Conversations to ids and turns, held against transformers' own."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_cgn.errors import DataError
from tests.unit.chat_samples import (
    CHATML,
    CLOSED,
    DEMO,
    LLAMA3,
    MISTRAL,
    THINKING,
    chatml_tokenizer,
    llama3_tokenizer,
    mistral_tokenizer,
    untagged,
)
from tokenizer.chat import ChatTemplate, Message, bundled_templates

ROOT = Path(__file__).parents[2]
EXAMPLES = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TWO_TURNS = (
    Message("user", "一回路压力是多少？"),
    Message("assistant", "约15.5兆帕 🙂"),
    Message("user", "And the steam's?"),
    Message("assistant", "6.9 MPa."),
)
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="run `make demo-model`")

# What texts are made of; `str.strip` leaves nothing of some, and some nearly spell a token.
_PIECES = [
    "核岛",
    "压力容器",
    "🙂",
    "👩🏽‍🔬",
    "e\u0301",
    " ",
    "\n",
    "\n\n",
    "\t",
    "\u3000",
    "a",
    "Answer",
]
_PIECES += [
    "<|",
    "|>",
    "<|im_",
    "im_end|>",
    "[INST]",
    "<think>",
    "{{ x }}",
    "{% raw %}",
    "</p>",
    "\\n",
]
contents = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=6).map("".join)
# The demo's tokenizer drops some control characters, where transformers' mask then ends.
_anything = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
# One that spells a token is refused, and empty ones are: see test_chat_faults.py.
texts = st.one_of(contents, _anything).filter(lambda t: t.strip() and "<|im_end|>" not in t)


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True) -> list[Message]:
    """Turns of user and assistant, perhaps a system message, perhaps a question left open."""
    messages = []
    if system and draw(st.booleans()):
        messages.append(Message("system", draw(st.one_of(st.just(""), texts))))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(texts)))
        messages.append(Message("assistant", draw(texts)))
    if draw(st.booleans()):
        messages.append(Message("user", draw(texts)))
    return messages


def _reference(directory: Path) -> PreTrainedTokenizerFast:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    named = {name: config[name] for name in ("bos_token", "eos_token") if name in config}
    file = str(directory / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, **named)  # type: ignore[no-untyped-call]


def _expected(
    reference: Any, messages: list[Message] | tuple[Message, ...], template: str, **options: Any
) -> Any:
    return reference.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        **options,
    )


def _mask(turns: tuple[tuple[int, int], ...], size: int) -> list[int]:
    inside = {token for start, end in turns for token in range(start, end)}
    return [int(token in inside) for token in range(size)]


SHAPES: dict[str, tuple[Callable[..., Path], str, bool]] = {
    "chatml": (chatml_tokenizer, CHATML, True),
    "llama3": (llama3_tokenizer, LLAMA3, True),
    "mistral": (mistral_tokenizer, MISTRAL, False),
    "thinking": (chatml_tokenizer, THINKING, True),
    "closed": (chatml_tokenizer, CLOSED, True),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ChatTemplate, ChatTemplate, PreTrainedTokenizerFast, str, bool]:
    make, template, system = SHAPES[request.param]
    tagged = make(tmp_path_factory.mktemp("tagged"), template=template)
    plain = make(tmp_path_factory.mktemp("plain"), template=untagged(template))
    opened = (ChatTemplate.open(tagged), ChatTemplate.open(plain))
    return *opened, _reference(tagged), template, system


@EXAMPLES
@given(data=st.data())
def test_ids_and_turns_are_those_of_transformers(
    shape: tuple[ChatTemplate, ChatTemplate, PreTrainedTokenizerFast, str, bool],
    data: st.DataObject,
) -> None:
    tagged, plain, reference, template, system = shape
    messages = data.draw(conversations(system=system))
    expected = _expected(reference, messages, template, return_assistant_tokens_mask=True)
    for chat in (tagged, plain):
        encoded = chat.encode(messages)
        assert encoded.ids == expected["input_ids"]
        assert _mask(encoded.turns, len(encoded.ids)) == expected["assistant_masks"]
        assert all(encoded.ids[end - 1] in chat.end_of_turn_ids for _, end in encoded.turns)
        assert len(encoded.turns) == sum(m.role == "assistant" for m in messages)


@EXAMPLES
@given(data=st.data())
def test_prompts_are_those_of_transformers(
    shape: tuple[ChatTemplate, ChatTemplate, PreTrainedTokenizerFast, str, bool],
    data: st.DataObject,
) -> None:
    _, chat, reference, template, system = shape
    messages = [*data.draw(conversations(system=system)), Message("user", "?")]
    expected = _expected(reference, messages, template, add_generation_prompt=True)
    assert chat.encode_prompt(messages) == expected["input_ids"]


@needs_demo
@EXAMPLES
@given(messages=conversations())
def test_the_demo_models_own_template(messages: list[Message]) -> None:
    chat, reference = _demo()
    template = json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]
    expected = _expected(reference, messages, template)["input_ids"]
    encoded = chat.encode(messages)
    assert encoded.ids == expected
    # The same turns marked by hand in the template.
    content = "message['content'] + '<|im_end|>'"
    tagged = template.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + " + content + " + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ " + content + " }}{% endgeneration %}"
        "{% else %}{{ " + content + " }}{% endif %}{{ '\n' }}",
    )
    assert tagged != template
    marked = _expected(reference, messages, tagged, return_assistant_tokens_mask=True)
    assert marked["input_ids"] == expected
    assert _mask(encoded.turns, len(expected)) == marked["assistant_masks"]


_OPENED: list[tuple[ChatTemplate, PreTrainedTokenizerFast]] = []


def _demo() -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    if not _OPENED:
        _OPENED.append((ChatTemplate.open(DEMO), _reference(DEMO)))
    return _OPENED[0]


@needs_demo
def test_an_answer_that_the_tokenizer_drops_is_a_fault() -> None:
    chat, _ = _demo()
    with pytest.raises(DataError, match="leaves nothing of turn 1 of the assistant"):
        chat.encode((Message("user", "?"), Message("assistant", "\x06")))


def test_a_control_token_that_takes_white_space_in_is_not_part_of_the_answer(
    tmp_path: Path,
) -> None:
    # As Phi 3's <|assistant|>: the white space behind it, the answer's too, becomes a part of it.
    directory = llama3_tokenizer(tmp_path, template=untagged(LLAMA3).replace(" | trim", ""))
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] == "<|end_header_id|>"
    file.write_text(json.dumps(content))
    chat = ChatTemplate.open(directory)
    encoded = chat.encode((Message("user", "?"), Message("assistant", " \n yes")))
    ((start, end),) = encoded.turns
    assert chat.decode(encoded.ids[start:end], skip_special_tokens=False) == "yes<|eot_id|>"
    assert encoded.ids[:start] == chat.encode_prompt((Message("user", "?"),))


def test_a_batch_gives_what_one_by_one_gives(tmp_path: Path) -> None:
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path))
    bad = (Message("user", "?"),)
    given_ = [TWO_TURNS, bad, TWO_TURNS[:2]] * 100  # more than are tokenised at a time
    batch = chat.encode_batch(given_)
    assert len(batch) == 300
    for conversation, encoded in zip(given_, batch, strict=True):
        if conversation is bad:
            assert isinstance(encoded, DataError)
        else:
            assert encoded == chat.encode(conversation)


def test_a_template_without_a_generation_prompt_gets_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = untagged(CHATML).split("{% if add_generation_prompt %}")[0]
    whole = ChatTemplate.open(chatml_tokenizer(tmp_path / "a", template=untagged(CHATML)))
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path / "b", template=without))
    assert "has no generation prompt" in caplog.text
    assert chat.encode(TWO_TURNS) == whole.encode(TWO_TURNS)
    assert chat.encode_prompt(TWO_TURNS[:1]) == whole.encode_prompt(TWO_TURNS[:1])
    # What is exported has it too, for servers.
    exported = tmp_path / "exported.jinja"
    exported.write_text(chat.source)
    again = ChatTemplate.open(tmp_path / "b", template=str(exported))
    assert again.encode_prompt(TWO_TURNS[:1]) == whole.encode_prompt(TWO_TURNS[:1])


def test_a_generation_prompt_that_is_always_there_is_not_part_of_a_conversation(
    tmp_path: Path,
) -> None:
    always = untagged(LLAMA3).replace("{% if add_generation_prompt %}", "{% if true %}")
    whole = ChatTemplate.open(llama3_tokenizer(tmp_path / "a", template=untagged(LLAMA3)))
    chat = ChatTemplate.open(llama3_tokenizer(tmp_path / "b", template=always))
    for messages in (TWO_TURNS, TWO_TURNS[:3]):
        assert chat.encode(messages) == whole.encode(messages)
        assert chat.encode_prompt(messages[:1]) == whole.encode_prompt(messages[:1])


def test_the_time_is_always_the_same(tmp_path: Path) -> None:
    dated = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path, template=dated + untagged(CHATML)))
    assert chat.render(TWO_TURNS).startswith("<|im_start|>system\n26 Jul 2024<|im_end|>\n")


def test_json_in_templates_is_that_of_transformers(tmp_path: Path) -> None:
    template = untagged(CHATML).replace("m['content']", "(m['content'] | tojson)")
    directory = chatml_tokenizer(tmp_path, template=template)
    messages = (Message("tool", "<压力> & 'x'"),)
    expected = _expected(_reference(directory), messages, template)["input_ids"]
    chat = ChatTemplate.open(directory)
    assert chat.encode_prompt(messages)[: len(expected)] == expected


def test_the_answer_is_decoded_without_its_end_of_turn_token(tmp_path: Path) -> None:
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path))
    encoded = chat.encode(TWO_TURNS)
    answers = [chat.decode(encoded.ids[start:end]) for start, end in encoded.turns]
    assert answers == ["约15.5兆帕 🙂", "6.9 MPa."]
    start, end = encoded.turns[0]
    whole = chat.decode(encoded.ids[start:end], skip_special_tokens=False)
    assert whole == "约15.5兆帕 🙂<|im_end|>"


def test_the_fingerprint_says_when_text_or_turns_may_differ(tmp_path: Path) -> None:
    one = ChatTemplate.open(chatml_tokenizer(tmp_path / "a")).fingerprint()
    same = ChatTemplate.open(chatml_tokenizer(tmp_path / "elsewhere")).fingerprint()
    other = ChatTemplate.open(tmp_path / "a", template="plain").fingerprint()
    llama = llama3_tokenizer(tmp_path / "b")
    before = ChatTemplate.open(llama).fingerprint()
    config = json.loads((llama / "tokenizer_config.json").read_text())
    config["bos_token"] = "<|endoftext|>"
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    assert one == same
    assert len({one, other, before, ChatTemplate.open(llama).fingerprint()}) == 4


BUNDLED = {
    "chatml": (
        chatml_tokenizer,
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\nQ 1<|im_end|>\n<|im_start|>assistant\n⟦A 1<|im_end|>⟧\n"
        "<|im_start|>user\nQ 2<|im_end|>\n<|im_start|>assistant\n⟦A 2<|im_end|>⟧\n",
    ),
    "qwen3-no-thinking": (
        chatml_tokenizer,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ 1<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦A 1<|im_end|>⟧\n"
        "<|im_start|>user\nQ 2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦A 2<|im_end|>⟧\n",
    ),
    "llama3": (
        llama3_tokenizer,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ 1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A 1<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nQ 2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A 2<|eot_id|>⟧",
    ),
    "mistral": (
        mistral_tokenizer,
        "<s>[INST] S\n\nQ 1[/INST]⟦ A 1</s>⟧[INST] Q 2[/INST]⟦ A 2</s>⟧",
    ),
    "plain": (
        mistral_tokenizer,
        "S\n\n### Instruction:\nQ 1\n\n### Response:\n⟦A 1</s>⟧\n\n"
        "### Instruction:\nQ 2\n\n### Response:\n⟦A 2</s>⟧\n\n",
    ),
}


def test_every_bundled_template_is_tested() -> None:
    assert set(BUNDLED) == set(bundled_templates())


def test_bundled_templates_are_installed_with_the_package() -> None:
    settings_ = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (pattern,) = settings_["package-data"]["tokenizer"]
    assert {file.stem for file in (ROOT / "tokenizer").glob(pattern)} == set(bundled_templates())


@pytest.mark.parametrize("name", list(BUNDLED))
def test_bundled_templates(name: str, tmp_path: Path) -> None:
    make, marked = BUNDLED[name]
    chat = ChatTemplate.open(make(tmp_path, template=None), template=name)
    messages = (
        Message("system", "S"),
        *(Message(r, f"{r[0].upper().replace('U', 'Q')} {n}") for n in (1, 2) for r in ROUND),
    )
    text = marked.replace("⟦", "").replace("⟧", "")
    assert chat.render(messages) == text
    encoded = chat.encode(messages)
    backend = _reference(tmp_path)
    offsets = backend(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.ids == offsets["input_ids"]
    spans = [
        (offsets["offset_mapping"][a][0], offsets["offset_mapping"][b - 1][1])
        for a, b in encoded.turns
    ]
    parts = marked.split("⟦")
    lengths = [len(part.replace("⟧", "")) for part in parts]
    starts = [sum(lengths[: n + 1]) for n in range(len(parts) - 1)]
    ends = [start + part.index("⟧") for start, part in zip(starts, parts[1:], strict=True)]
    assert spans == list(zip(starts, ends, strict=True))
    prompt = chat.render(messages[:2], add_generation_prompt=True)
    assert prompt == marked.partition("⟦")[0]


ROUND = ("user", "assistant")


def test_plain_begins_with_bos_where_the_tokenizer_does(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    directory = mistral_tokenizer(tmp_path, template=None)
    file = str(directory / "tokenizer.json")
    backend = Backend.from_file(file)
    bos = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(file)
    for name in ("plain", "mistral"):  # nor has one that writes it itself two
        ids = ChatTemplate.open(directory, template=name).encode(TWO_TURNS).ids
        assert ids[0] == bos and bos not in ids[1:]
