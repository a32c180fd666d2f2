"""What a chat template does, found out on a short conversation before any data is read.

A template that cannot be trained on is refused here, once, and not record by record.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tokenizer.chat_jinja import Renderer

_QUESTIONS = ("What is a primary circuit?", "Who may open that valve?")
_ANSWERS = ("It carries the heat away.", "The shift leader decides.")
# How families write their control tokens; a text in this form that is no token is a mistake.
_LIKE_A_TOKEN = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>")


@dataclass(frozen=True, slots=True)
class Probed:
    """What the turns of a template are made of."""

    end_of_turn_ids: tuple[int, ...]
    """Tokens that end the assistant's turns."""
    header: str
    """What the template writes before an answer although it was asked, by
    ``add_generation_prompt``, to write everything that comes before it. Empty for most."""
    unasked: str
    """A header for the next answer that the template writes at the end although it was not asked
    to, as Llama 3's first template did. Empty for most."""


def control_tokens(backend: Backend) -> dict[int, str]:
    """Tokens that no text of a conversation may spell, since they could forge a turn.

    Special ones, and those that look like them: DeepSeek's ``<｜User｜>`` and Yi's ``<|im_start|>``
    are parsed out of any text, and not marked as special.

    Args:
        backend: The tokenizer.

    Returns:
        Texts by id.
    """
    return {
        token: added.content
        for token, added in backend.get_added_tokens_decoder().items()
        if added.special or _LIKE_A_TOKEN.fullmatch(added.content)
    }


def probe(renderer: Renderer, backend: Backend) -> Probed:
    """Find out what ends a turn, and whether turns can be told from their surroundings.

    Args:
        renderer: The template.
        backend: The tokenizer, parsing special tokens.

    Returns:
        What was found.

    Raises:
        DataError: If the template fails, relies on tokens that the tokenizer lacks, ends the
            assistant's turns with no special token, or rewrites earlier text as a conversation
            grows.
    """
    messages = [
        {"role": role, "content": content}
        for pair in zip(_QUESTIONS, _ANSWERS, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    text = renderer(messages)
    _check_contents(renderer, text)
    _check_tokens(renderer, backend, text)
    prompts = [renderer(messages[:turn], add_generation_prompt=True) for turn in (1, 3)]
    for prompt in prompts:
        if not text.startswith(prompt):
            raise DataError(
                f"chat template {renderer.name}: what it writes up to a question, with the "
                f"generation prompt, ends in {prompt[-40:]!r} and is no longer there once the "
                "answer follows. So it cannot be said which tokens the model is to write, nor "
                "would they be those that it sees when it serves. Use another template (bundled "
                "ones: chatml, qwen3-no-thinking, llama3, mistral, plain)."
            )
    end = _end_of_turn(renderer, backend, text)
    asked = [renderer(messages[:1], add_generation_prompt=flag) for flag in (True, False)]
    header = _header(text, prompts) if asked[0] == asked[1] else ""
    return Probed((end,), header, _unasked(backend, text, asked[1]))


def _check_contents(renderer: Renderer, text: str) -> None:
    position = 0
    for content in (c for pair in zip(_QUESTIONS, _ANSWERS, strict=True) for c in pair):
        position = text.find(content, position)
        if position < 0:
            raise DataError(
                f"chat template {renderer.name}: leaves out {content!r} of a conversation in "
                "which user and assistant take two turns each. Use another template."
            )


def _check_tokens(renderer: Renderer, backend: Backend, text: str) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    lacking = sorted(set(_LIKE_A_TOKEN.findall(text)) - known)
    if lacking:
        raise DataError(
            f"chat template {renderer.name}: writes {', '.join(lacking)}, which the tokenizer does "
            "not know as tokens and would take apart. Use a template made for this tokenizer; "
            "the bundled template plain needs no tokens of its own."
        )


def _end_of_turn(renderer: Renderer, backend: Backend, text: str) -> int:
    encoding = backend.encode(text, add_special_tokens=False)
    special = {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    found = []
    limits = (text.find(_QUESTIONS[1]), len(text))
    for answer, limit in zip(_ANSWERS, limits, strict=True):
        after = text.find(answer) + len(answer)
        token = _first_special(encoding.ids, encoding.offsets, special, after, limit)
        if token is None:
            raise DataError(
                f"chat template {renderer.name}: the assistant's turn ends with no special token "
                f"of the tokenizer: {text[after:limit][:40]!r} follows an answer. A model trained "
                "so would never stop. Use a template that ends turns with one, such as eos_token."
            )
        found.append(token)
    if found[0] != found[1]:
        names = [repr(backend.id_to_token(token)) for token in found]
        raise DataError(
            f"chat template {renderer.name}: {names[0]} follows an answer that the conversation "
            f"goes on after, {names[1]} the last one. So it cannot be said which ends a turn, and "
            "a model would learn to go on in the user's name. Use a template that ends every turn "
            "alike."
        )
    return found[0]


def _first_special(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    special: set[int],
    start: int,
    limit: int,
) -> int | None:
    for token, (begin, _) in zip(ids, offsets, strict=True):
        if start <= begin < limit and token in special:
            return token
    return None


def _header(text: str, prompts: Sequence[str]) -> str:
    """What stands between the end of a prompt and the answer, where it is the same every time."""
    headers = [
        text[len(prompt) : text.find(answer)]
        for prompt, answer in zip(prompts, _ANSWERS, strict=True)
    ]
    return headers[0] if headers[0].strip() and headers[0] == headers[1] else ""


def _unasked(backend: Backend, text: str, question: str) -> str:
    """A header at the end of the conversation: one that opens answers, after a question too."""
    special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
    rest = text[text.find(_ANSWERS[1]) + len(_ANSWERS[1]) :]
    starts = sorted((rest.find(token), -len(token)) for token in special if token in rest)
    rest = rest[starts[0][0] - starts[0][1] :]  # behind the end-of-turn token
    opening = text[text.find(_QUESTIONS[0]) : text.find(_ANSWERS[0])]
    is_header = any(token in rest for token in special) and opening.endswith(rest)
    return rest if is_header and question.endswith(rest) else ""
