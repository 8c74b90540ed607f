"""Chat templates: messages -> prompt text, rendered as Hugging Face tokenizers render them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_moe.errors import FormatError, InvalidArgument


class ChatTemplate:
    """A compiled template. It comes with a checkpoint, so it runs in jinja2's sandbox."""

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; `origin` names its file in errors.

        Raises:
            FormatError: It is not a template.
        """
        self._special_tokens = dict(special_tokens)
        self._origin = origin
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise FormatError(f"{origin}: the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        **variables: object,
    ) -> str:
        """Render the prompt; `variables` (tools, enable_thinking, ...) go to the template as is.

        Raises:
            InvalidArgument: The template refuses the messages.
        """
        for message in messages:
            if not isinstance(message, Mapping):
                raise InvalidArgument(
                    f"a chat message must be a mapping with role and content, got {message!r}"
                )
        context: dict[str, object] = {"tools": None, "documents": None, **self._special_tokens}
        context.update(variables)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **context,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidArgument(
                f"the chat template {self._origin} refuses these messages: {error}"
            ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is all."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, this one escapes no HTML and keeps the order of keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().astimezone().strftime(format_)
