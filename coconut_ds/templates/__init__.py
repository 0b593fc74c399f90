"""Jinja templates of the HTML pages, which escape every value, and of the model card."""

import re
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

ENVIRONMENT = Environment(
    loader=PackageLoader("coconut_ds"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

MARKDOWN = re.compile(r"[\\|\[\]]")


def one_line(value: object) -> str:
    """A value as one line of Markdown text: it adds no lines, cells, HTML, images or links but bare URLs."""
    return MARKDOWN.sub(r"\\\g<0>", escape(" ".join(str(value).replace("`", "'").split()), quote=False))


def code_span(value: object) -> str:
    """A value between backticks, as one line; backslashes have no meaning there."""
    return escape(" ".join(str(value).replace("`", "'").split()), quote=False)


ENVIRONMENT.filters |= {"line": one_line, "code": code_span}


def render(template: str, **values: Any) -> str:
    """The text of one template of this folder.  Raises jinja2.UndefinedError for a missing value."""
    return ENVIRONMENT.get_template(template).render(values)
