"""Jinja as chat templates use it: what they may call, in a sandbox, the same today and tomorrow.

The functions and tags are those that templates written for transformers expect; importing it is
not needed. Which template a directory has is in ``chat_sources.py``.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_cgn.errors import DataError

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"""What a template is told when it asks for the time.

Templates that write the date of today into the system prompt would make a run that is started, or
resumed, on another day train on other tokens. Llama 3.1 names this date where it is told none.
"""


class _Generation(ext.Extension):
    """``{% generation %}``, by which some templates mark what the model writes: text as any other.

    Where turns begin and end is found without it, since hardly any published template has it.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return TEMPLATE_DATE.strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON without Jinja's escapes for HTML. Templates give the options by place, too."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()


class Renderer:
    """A compiled chat template.

    Attributes:
        name: What to call it in messages.
        source: Jinja text.
        asks_for_time: Whether it calls ``strftime_now``, which gives `TEMPLATE_DATE`.
    """

    def __init__(self, source: str, *, name: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: Jinja text.
            name: What to call it in messages.
            special_tokens: Values of ``bos_token``, ``eos_token`` and so on.

        Raises:
            DataError: If it is not valid Jinja.
        """
        self.name = name
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._render: Callable[..., str] = _ENVIRONMENT.from_string(source).render
            names = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"chat template {name}, line {error.lineno}: not valid Jinja ({error.message}). "
                "Mend the template."
            ) from error
        self.asks_for_time = "strftime_now" in names

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Write a conversation as text.

        Args:
            messages: Objects with ``role`` and ``content``.
            add_generation_prompt: Whether to end where the assistant is to begin.

        Raises:
            DataError: If the template refuses the conversation or fails on it; says why.
        """
        try:
            return self._render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except jinja2.UndefinedError as error:
            raise DataError(f"chat template {self.name} fails: {error}") from error
        except jinja2.TemplateError as error:
            raise DataError(f"chat template {self.name} refuses it: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A template is a program: adding a text to nothing, a division, an index.
            kind = type(error).__name__
            raise DataError(f"chat template {self.name} fails: {kind}: {error}") from error
        except RecursionError as error:
            raise DataError(
                f"chat template {self.name} fails: it calls itself endlessly"
            ) from error
