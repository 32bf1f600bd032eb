"""Markdown and docstrings as HTML, with nothing in them that could load or run anything."""

from __future__ import annotations

import inspect

from markdown_it import MarkdownIt
from markupsafe import Markup

# Text of our own pages; names in it come from records, so that no address becomes a link.
_PAGE = MarkdownIt("commonmark", {"html": False})
_PAGE.enable("table").disable(
    ["image", "link", "autolink", "reference", "html_block", "html_inline"]
)
# A docstring is prose, lists, `names` and formulas, in which stars and underscores are themselves.
_DOCSTRING = MarkdownIt("zero").enable(["list", "code", "backticks"])


def markdown(text: str) -> Markup:
    """Return a piece of one of our Markdown pages as HTML.

    Args:
        text: Headings, paragraphs, lists and tables.
    """
    tokens = _PAGE.parse(text)
    for token in tokens:
        # The page's rules refuse styles in attributes; a column of numbers is a class there.
        if "right" in str(token.attrs.pop("style", "")):
            token.attrs["class"] = "number"
    # The renderer escapes all text.
    return Markup(_PAGE.renderer.render(tokens, _PAGE.options, {}))


def docstring(text: str) -> tuple[Markup, Markup]:
    """Return a docstring as HTML: up to the end of the first formula, and the rest.

    Args:
        text: The docstring as it is written.
    """
    tokens = _DOCSTRING.parse(inspect.cleandoc(text))
    formulas = [i for i, token in enumerate(tokens) if token.type == "code_block"]
    ends = [i for i, token in enumerate(tokens) if token.type == "paragraph_close"]
    first = (formulas or ends or [-1])[0] + 1
    # A formula inside a list ends where the list does.
    while first < len(tokens) and tokens[first - 1].level > 0:
        first += 1
    render, options = _DOCSTRING.renderer.render, _DOCSTRING.options
    return Markup(render(tokens[:first], options, {})), Markup(render(tokens[first:], options, {}))


def inline(text: str) -> Markup:
    """Return a sentence of a docstring as HTML, with its `names` as code.

    Args:
        text: The sentence.
    """
    return Markup(_DOCSTRING.renderInline(text))


def arguments(text: str) -> dict[str, str]:
    """Return the descriptions in the section ``Args:`` of a docstring by name.

    Args:
        text: The docstring as it is written.
    """
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(text).splitlines():
        depth = len(line) - len(line.lstrip())
        if depth == 0 and line:
            inside = line == "Args:"
        elif inside and depth == 4 and ":" in line:
            name, _, rest = line.strip().partition(":")
            found[name] = rest.strip()
        elif inside and name and line.strip():
            found[name] = f"{found[name]} {line.strip()}"
    return found
