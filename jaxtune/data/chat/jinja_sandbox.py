"""The Jinja environment that chat templates run in: nothing outside it can be reached or changed."""

import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox


class _GenerationBlocks(jinja2.ext.Extension):
    """Lets `{% generation %}` stand in a template; what it encloses is rendered like all else."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def chat_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as transformers documents it for chat templates: its white space rules, filters and functions."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment
