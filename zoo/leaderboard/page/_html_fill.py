"""Filling the templates of the HTML pages, with the style and script that all of them carry."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zoo.leaderboard.page._html_mechanisms import TRAITS

_PACKAGE, _FOLDER = "zoo.leaderboard.page", "_html"


def filled(template: str, **values: Any) -> str:
    """Fill a template.

    Args:
        template: Name of a page: "index" or "mechanism".
        values: What it shows.
    """
    style, script = _asset("page.css"), _asset("page.js")
    hashes = {"style": digest(style), "script": digest(script)}
    page = _templates().get_template(f"{template}.html.jinja")
    return page.render(**values, traits=TRAITS, style=style, script=script, hashes=hashes)


def digest(text: str) -> str:
    """Return what a browser must find before it runs a script or applies a style.

    Args:
        text: The script or the style.
    """
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader(_PACKAGE, _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@cache
def _asset(name: str) -> Markup:
    """Return a file of ours that stands in the pages as it is."""
    file = resources.files(_PACKAGE) / _FOLDER / name
    return Markup(file.read_text(encoding="utf-8"))
