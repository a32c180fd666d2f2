"""Chat templates and conversations that cannot be trained on: refused, with the reason."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tests.unit.chat_samples import (
    CHATML,
    LLAMA3,
    MISTRAL,
    THINKING,
    chatml_tokenizer,
    llama3_tokenizer,
    mistral_tokenizer,
    untagged,
)
from tokenizer.chat import ChatTemplate, Message

PLAIN_CHATML = untagged(CHATML)


def _said(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in pairs]


def test_no_template_names_the_bundled_ones(tmp_path: Path) -> None:
    directory = chatml_tokenizer(tmp_path, template=None)
    with pytest.raises(DataError, match=r"no chat template .*chatml, llama3, mistral, plain"):
        ChatTemplate.open(directory)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m }}", r"line 1: not valid Jinja"),
        ("{% if x %}\n{{ 'a' + }}{% endif %}", r"line 2: not valid Jinja"),
        ("{{ raise_exception('not today') }}", r"refuses it: not today"),
        ("{{ messages[0].content + nothing.at.all }}", r"fails: 'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", r"fails: TypeError"),
        ("{{ messages.append(1) }}", r"refuses it: .*append.* is unsafe"),
        ("{{ 1 // 0 }}", r"fails: ZeroDivisionError"),
        ("{{ messages[0].content }}<|im_end|>", r"leaves out 'It carries the heat away\.'"),
        (PLAIN_CHATML.replace("im_end", "im_stop"), r"writes <\|im_stop\|>, which the tokenizer"),
        (untagged(LLAMA3), r"writes <\|end_header_id\|>, <\|eot_id\|>, <\|start_header_id\|>,"),
        (PLAIN_CHATML.replace("<|im_end|>", "</s>"), r"ends with no special token"),
        # Tokens of the next message end the turn, as in GLM's: nothing in the turn itself does.
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endfor %}",
            r"ends with no special token .*'' follows an answer",
        ),
        # Only the last turn ends with one.
        (
            PLAIN_CHATML.replace("m['content'] + '<|im_end|>'", "m['content']")
            + "{% if messages[-1].role == 'assistant' %}<|im_end|>{% endif %}",
            r"'<\|im_start\|>' follows an answer that .*, '<\|im_end\|>' the last one",
        ),
        # The generation prompt opens thoughts that are gone once the answer is there.
        (PLAIN_CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"),
         r"ends in '.*<think>\\n' and is no longer there"),
        # Questions say how many messages there are.
        ("{{ messages | length }}" + PLAIN_CHATML, r"is no longer there once the answer follows"),
    ],
)  # fmt: skip
def test_faulty_templates(template: str, reason: str, tmp_path: Path) -> None:
    directory = chatml_tokenizer(tmp_path, template=template)
    with pytest.raises(DataError, match=reason):
        ChatTemplate.open(directory)


def test_a_template_can_be_named_or_be_a_file(tmp_path: Path) -> None:
    directory = chatml_tokenizer(tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    marked = {name: f"{{{{ '{name}' }}}}{PLAIN_CHATML}" for name in ("default", "rag", "chatml")}
    config["chat_template"] = [{"name": n, "template": t} for n, t in marked.items()]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    more = directory / "additional_chat_templates"
    more.mkdir()
    (more / "tools.jinja").write_text("tools" + PLAIN_CHATML)
    (tmp_path / "own.jinja").write_text("own" + PLAIN_CHATML)
    question = [Message("user", "?")]
    for template, start in [
        (None, "default"),
        ("rag", "rag"),
        ("chatml", "chatml"),  # the directory's before the bundled one of the same name
        ("tools", "tools"),
        (str(tmp_path / "own.jinja"), "own"),
        ("plain", "### Instruction"),
    ]:
        text = ChatTemplate.open(directory, template=template).render(question)
        assert text.startswith(start), template
    (directory / "chat_template.jinja").write_text("file" + PLAIN_CHATML)
    assert ChatTemplate.open(directory).render(question).startswith("file")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("chatlm", r"'chatlm': there is none of that name.*to one of chatml, llama3, mistral"),
        ("absent.jinja", r"absent\.jinja: cannot be read"),
        ("latin.jinja", r"not valid UTF-8"),
    ],
)
def test_templates_that_are_not_there(
    template: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.jinja").write_bytes(b"{# caf\xe9 #}")
    with pytest.raises(DataError, match=reason):
        ChatTemplate.open(chatml_tokenizer(tmp_path / "t", template=None), template=template)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "neither a text nor a list"),
        ([{"name": "default"}], "lacks name or template"),
        ([{"name": "default", "template": None}], "no text"),
        ([{"name": "rag", "template": "x"}], "of the names rag, but none for default"),
    ],
)
def test_tokenizer_configs_with_odd_templates(value: object, reason: str, tmp_path: Path) -> None:
    directory = chatml_tokenizer(tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(DataError, match=reason):
        ChatTemplate.open(directory)


QUESTION, ANSWER = ("user", "压力？"), ("assistant", "15.5 MPa")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], r"there is no message"),
        ([QUESTION], r"no turn of the assistant"),
        ([ANSWER], r"the assistant speaks first"),
        ([("robot", "x"), ANSWER], r"message 1 has the unknown role 'robot'.*system, developer"),
        ([QUESTION, ("assistant", " \n\u3000")], r"message 2 \(assistant\) is empty"),
        ([QUESTION, ("assistant", ""), QUESTION, ANSWER], r"message 2 \(assistant\) is empty"),
        ([("user", "\n"), ANSWER], r"message 1 \(user\) is empty"),
        ([("user", "a<|im_end|>b"), ANSWER], r"message 1 \(user\) spells .*'<\|im_end\|>'"),
        ([QUESTION, ("assistant", "<|im_start|>")], r"message 2 \(assistant\) spells"),
        ([("system", "<|endoftext|>"), QUESTION, ANSWER], r"message 1 \(system\) spells"),
        ([QUESTION, ("assistant", "a\ud800")], r"message 2 .*lone surrogate at character 2"),
    ],
)
def test_faulty_conversations(
    messages: list[tuple[str, str]], reason: str, chatml: ChatTemplate
) -> None:
    with pytest.raises(DataError, match=reason):
        chatml.encode(_said(*messages))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return ChatTemplate.open(chatml_tokenizer(tmp_path_factory.mktemp("chatml")))


def test_tokens_of_the_template_that_are_not_marked_as_special(tmp_path: Path) -> None:
    # As DeepSeek's <｜User｜> and <｜Assistant｜>: they too are parsed out of any text.
    directory = chatml_tokenizer(
        tmp_path,
        template="{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
    )
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens(["<｜User｜>", "<｜Assistant｜>"])
    backend.save(str(directory / "tokenizer.json"))
    chat = ChatTemplate.open(directory)
    with pytest.raises(DataError, match=r"message 1 \(user\) spells .*'<｜Assistant｜>'"):
        chat.encode(_said(("user", "hi<｜Assistant｜>yes"), ANSWER))
    chat.encode(_said(QUESTION, ("assistant", "<think>\nhm\n</think>\n\nyes")))  # is no control


def test_what_is_no_fault(chatml: ChatTemplate) -> None:
    tool = ("tool", "")
    for messages in (
        [("system", ""), QUESTION, ANSWER],
        [QUESTION, ANSWER, QUESTION],
        [QUESTION, QUESTION, ANSWER, ANSWER],
        [QUESTION, ("assistant", "<think>\n\n</think>\n\nyes"), tool, ANSWER],
        [("system", "greet"), ANSWER],
    ):
        encoded = chatml.encode(_said(*messages))
        assert len(encoded.turns) == sum(role == "assistant" for role, _ in messages)


def test_a_template_says_which_order_it_wants(tmp_path: Path) -> None:
    mistral = ChatTemplate.open(mistral_tokenizer(tmp_path, template=None), template="mistral")
    with pytest.raises(DataError, match=r"mistral refuses it: user and assistant must take turns"):
        mistral.encode(_said(QUESTION, QUESTION, ANSWER))
    own = ChatTemplate.open(mistral_tokenizer(tmp_path, template=MISTRAL))
    with pytest.raises(DataError, match=r"refuses it: only user and assistant roles"):
        own.encode(_said(("system", "S"), QUESTION, ANSWER))


def test_a_message_that_the_template_leaves_out(tmp_path: Path) -> None:
    # As Qwen 3's does with roles that it does not know.
    template = PLAIN_CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}"
    )
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path, template=template))
    with pytest.raises(DataError, match=r"leaves out message 1 \(developer: 'be brief'\)"):
        chat.encode(_said(("developer", "be brief"), QUESTION, ANSWER))


def test_a_system_message_that_moves_along_the_conversation(tmp_path: Path) -> None:
    # As the templates of some Mistral models do: it goes with the last question.
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last or loop.index0 == messages | length - 2 %}"
        "{{ messages[0].content if messages[0].role == 'system' else '' }}{% endif %}"
        "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    chat = ChatTemplate.open(mistral_tokenizer(tmp_path, template=template))
    chat.encode(_said(("system", "S"), QUESTION, ANSWER))
    with pytest.raises(
        DataError, match=r"what comes before message 3, the assistant's, in another"
    ):
        chat.encode(_said(("system", "S"), QUESTION, ANSWER, QUESTION, ANSWER))


def test_an_answer_of_thoughts_alone_that_the_template_drops(tmp_path: Path) -> None:
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path, template=THINKING))
    thoughts = ("assistant", "<think>\nhm\n</think>\n\n")
    with pytest.raises(DataError, match=r"leaves nothing of turn 1 of the assistant"):
        chat.encode(_said(QUESTION, thoughts, QUESTION, ANSWER))
    whole = _said(QUESTION, ("assistant", "<think>\nhm\n</think>\n\nyes"))
    encoded = chat.encode(whole)
    ((start, end),) = encoded.turns
    marked = chat.decode(encoded.ids[start:end], skip_special_tokens=False)
    assert marked == "<think>\nhm\n</think>\n\nyes<|im_end|>"


def test_the_bundled_template_without_thoughts_refuses_thoughts(tmp_path: Path) -> None:
    directory = chatml_tokenizer(tmp_path, template=None)
    chat = ChatTemplate.open(directory, template="qwen3-no-thinking")
    with pytest.raises(DataError, match=r"refuses it: .*without a <think> block"):
        chat.encode(_said(QUESTION, ("assistant", "<think>\nhm\n</think>\n\nyes")))


def test_prompts_are_checked_too(chatml: ChatTemplate) -> None:
    with pytest.raises(DataError, match="spells the special token"):
        chatml.encode_prompt(_said(("user", "<|im_start|>")))


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    directory = llama3_tokenizer(tmp_path, template=None)
    content = json.loads((directory / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="ends with no special token"):
        ChatTemplate.open(directory, template="llama3")
