"""Jinja templates of the HTML pages, which escape every value, and of the model card."""

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


def one_line(value: object) -> str:
    """A value as one line of Markdown, so that it cannot add lines to a table or a list."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", r"\|")


ENVIRONMENT.filters["line"] = one_line


def render(template: str, **values: Any) -> str:
    """The text of one template of this folder.  Raises jinja2.UndefinedError for a missing value."""
    return ENVIRONMENT.get_template(template).render(values)
